"""What the ledger says, in words and for scripts: what was spent, by which runs, and what is left.

Rules:
  * The rows are checked before anything is said of them.
  * Runs without differential privacy are named beside the number, which says nothing of them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from locum.site_client.configuration import FILE, read_accounts, read_policy
from locum.site_client.gate import Policy
from locum.site_client.privacy.accountant import Mechanism, epsilon
from locum.site_client.privacy.budget import FOLDS
from locum.site_client.privacy.ledger import Ledger, Row, composed, reserved
from locum.site_client.privacy.noise import NoiseSource

Words = tuple[str, ...]
#: Noise multipliers between which the room for another plan is looked for, and how often the gap is halved.
_LEAST_NOISE, _MOST_NOISE, _HALVINGS = 0.3, 100.0, 12

_COUNTED = (
    "Unit: the patient. Neighbouring data differ in one patient, whose images count as none (zero-out adjacency).",
    "How many patients there are is not protected.",
    "All folds count together: who is tested in one plan may be trained on in another.",
    "What was reserved counts, committed or not: after a crash nobody knows what left.",
    "Reserved, noise as a multiple of the clip, and the rate at which each patient is drawn (1: everybody):",
)
_COMPOSED = (
    f"Noise: {NoiseSource.name}.",
    "Accountant: privacy loss distributions (dp-accounting, PLD); every rounding is against the site.",
)
_TAIL = "Delta {delta:g}: the probability with which the loss may be larger than that epsilon."
_ROOM = (
    "A further run could use epsilon {room:.2f}, its training and its metrics together, and be within the lifetime's."
)


@dataclass(frozen=True)
class RunAccount:
    """What one run has spent.

    Attributes:
        run: its name.
        plan: the plan's digest.
        epsilon: of all its reservations, at the ledger's delta.
        reservations: how many, by fold.
        uncommitted: how many of them were never committed; they count.
    """

    run: str
    plan: str
    epsilon: float
    reservations: Mapping[str, int]
    uncommitted: int

    def in_words(self) -> str:
        """One line."""
        folds = ", ".join(f"{fold} {self.reservations[fold]}" for fold in FOLDS if fold in self.reservations)
        never = f"; {self.uncommitted} never committed, which count" if self.uncommitted else ""
        return f"{self.run}  plan {self.plan[:12]}  epsilon {self.epsilon:.2f}  reserved: {folds}{never}"


@dataclass(frozen=True)
class Account:
    """A population's account.

    Attributes:
        population: whose.
        spent: the epsilon of all reservations together, at `delta`.
        lifetime: the most that it may come to, by the policy.
        warn: from where on the ledger warns.
        delta: the ledger's.
        runs: those with differential privacy, in the order of their first reservation.
        unprotected: run and plan of those without.
        mechanisms: what was reserved, equal ones together.
        rows: of the ledger, all populations'.
        head: the hash of the last row; empty if there is no ledger.
        others: further populations in the same file.
    """

    population: str
    spent: float
    lifetime: float
    warn: float
    delta: float
    runs: tuple[RunAccount, ...]
    unprotected: tuple[tuple[str, str], ...]
    mechanisms: tuple[Mechanism, ...]
    rows: int
    head: str
    others: tuple[str, ...]

    @property
    def left(self) -> float:
        """What is left of the lifetime's epsilon."""
        return max(0.0, self.lifetime - self.spent)

    def words(self) -> Words:
        """For a terminal."""
        stands = f"epsilon {self.spent:.2f} of {self.lifetime:g} is spent, at delta {self.delta:g}"
        chained = f"{self.rows} rows, each follows the one before; the last is {self.head[:12]}"
        return (
            f"{self.population}: {stands}; {self.left:.2f} is left",
            *([f"WARNING: that is above {self.warn:g}"] if self.spent > self.warn else []),
            *(f"  {run.in_words()}" for run in self.runs),
            *self._unprotected(),
            *([f"other populations in this ledger: {', '.join(self.others)}"] if self.others else []),
            chained if self.rows else "there is no ledger yet: the agent begins one when it starts",
        )

    def _unprotected(self) -> Words:
        if not self.unprotected:
            return ()
        number = "1 run" if len(self.unprotected) == 1 else f"{len(self.unprotected)} runs"
        named = (f"  {run}  plan {plan[:12]}" for run, plan in self.unprotected)
        return (f"ALSO: {number} without differential privacy; the epsilon above says nothing of them", *named)

    def explained(self) -> Words:
        """How the number comes about, and what a further plan could ask for."""
        room, delta = self.room(), self.delta
        named = tuple(f"  noise {one.noise:g}, rate {one.rate:.3g}, {one.steps} times" for one in self.mechanisms)
        return (
            *_COUNTED,
            *(named or ("  nothing yet",)),
            *_COMPOSED,
            _TAIL.format(delta=delta),
            _ROOM.format(room=room),
        )

    def room(self) -> float:
        """The largest epsilon of one further release that the lifetime allows: more than what adding up leaves."""

        def fits(noise: float) -> bool:
            return epsilon([*self.mechanisms, Mechanism(noise, 1.0, 1)], self.delta) <= self.lifetime

        low, high = math.log(_LEAST_NOISE), math.log(_MOST_NOISE)
        if not fits(_MOST_NOISE):
            return 0.0
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            low, high = (low, middle) if fits(math.exp(middle)) else (middle, high)
        return epsilon([Mechanism(math.exp(high), 1.0, 1)], self.delta)

    def as_dict(self) -> dict[str, Any]:
        """For scripts."""
        return {
            **asdict(self),
            "left": self.left,
            "unprotected": [{"run": run, "plan": plan} for run, plan in self.unprotected],
        }


def account_of(rows: Sequence[Row], population: str, policy: Policy) -> Account:
    """A population's account by the rows of a ledger, which were checked."""
    own, delta = reserved(rows, population), policy.ledger_delta
    runs = dict.fromkeys((row.run or "", row.plan or "") for row in own)
    committed = {row.of for row in rows}
    named = dict.fromkeys(row.population for row in rows if row.population is not None)
    return Account(
        population=population,
        spent=composed(own, delta),
        lifetime=policy.lifetime_epsilon,
        warn=policy.warn_epsilon,
        delta=delta,
        runs=tuple(_of_run([row for row in own if (row.run, row.plan) == key], committed, delta) for key in runs),
        unprotected=tuple(
            (row.run or "", row.plan or "") for row in rows if (row.kind, row.population) == ("unprotected", population)
        ),
        mechanisms=_together(own),
        rows=len(rows),
        head=rows[-1].hash if rows else "",
        others=tuple(sorted(name for name in named if name != population)),
    )


def _of_run(rows: Sequence[Row], committed: set[int | None], delta: float) -> RunAccount:
    return RunAccount(
        run=rows[0].run or "",
        plan=rows[0].plan or "",
        epsilon=composed(rows, delta),
        reservations=dict(Counter(str(row.purpose) for row in rows)),
        uncommitted=sum(row.id not in committed for row in rows),
    )


def _together(rows: Iterable[Row]) -> tuple[Mechanism, ...]:
    steps: Counter[tuple[float, float]] = Counter()
    for row in rows:
        one = row.mechanism
        steps[one.noise, one.rate] += one.steps
    return tuple(Mechanism(noise, rate, times) for (noise, rate), times in steps.items())


def account(home: Path) -> Account:
    """The account of an agent's folder; raises DataError for its site.yaml, and LedgerError."""
    accounts, policy = read_accounts(home / FILE), read_policy(home / FILE)
    rows = Ledger(accounts.ledger).rows() if accounts.ledger.exists() else ()
    return account_of(rows, accounts.population, policy)
