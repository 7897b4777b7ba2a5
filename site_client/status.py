"""What an agent's folder tells: who the site is, what is proposed and approved, and whether the agent runs."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from locum.common.errors import DataError, RunError
from locum.common.identity import utc_now
from locum.site_client import gate
from locum.site_client.approvals import Approvals, open_approvals
from locum.site_client.configuration import FILE, read_configuration, read_policy
from locum.site_client.gate import Policy
from locum.site_client.identity import SiteIdentity
from locum.site_client.review import Held, day_and_time, printable
from locum.site_client.witness import FOLDER, seen_by

LOCK, WORD = "agent.lock", "agent.json"
#: A clock is told to be wrong when it is more than so many seconds off the coordinator's.
CLOCK_WARNING = 60.0


@dataclass(frozen=True)
class Doing:
    """What the agent last said of itself.

    Attributes:
        running: whether a process holds the folder.
        said: its word, empty if there is none; see `in_words` for the keys.
    """

    running: bool
    said: Mapping[str, Any]

    def in_words(self) -> str:
        """One line for a person."""
        at = self.said.get("at")
        when = day_and_time(at) if isinstance(at, int | float) else "no time"
        if not self.said:
            return "runs, and has not said anything yet" if self.running else "does not run"
        if not self.running:
            return f"does not run; last heard of at {when}"
        if not self.said.get("connected"):
            return f"runs, not connected since {when}: {printable(str(self.said.get('problem', '')))}"
        return f"runs, connected since {when}{self._work()}"

    @property
    def clock_off(self) -> float:
        """Seconds by which this machine's clock was ahead of the coordinator's when the agent last said something."""
        offset = self.said.get("offset")
        return -float(offset) if isinstance(offset, int | float) else 0.0

    def _work(self) -> str:
        """`, training in round 3 of RUN`, if the agent says so."""
        activity, number, run = (printable(str(self.said.get(key) or "")) for key in ("activity", "round", "run"))
        text = f", {activity}" if activity else ""
        if run:
            text += f" in round {number} of {run}" if number else f" for {run}"
        return text


def doing(home: Path) -> Doing:
    """Whether the agent of a folder runs, and what it said last."""
    try:
        said = json.loads((home / WORD).read_bytes())
    except (FileNotFoundError, ValueError):
        said = {}
    return Doing(_is_held(home / LOCK), said if isinstance(said, dict) else {})


def _is_held(path: Path) -> bool:
    if not path.exists():
        return False
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def proposal_as_dict(approvals: Approvals, held: Held) -> dict[str, Any]:
    """One proposal and what this site says to it, for a list."""
    standing = approvals.state(held.digest)
    return {
        "digest": held.digest,
        "name": held.plan.name,
        "proposed_by": held.proposal.by,
        "proposed_at": held.proposal.proposed_at,
        "state": standing.in_words(),
        "forbidden_by": [refusal.clause for refusal in gate.refusals(approvals.policy, held.plan)],
        **standing.as_dict(),
    }


def status(home: Path) -> dict[str, Any]:
    """All of it, for scripts; raises DataError if no site is enrolled here."""
    policy, problem = _configured(home / FILE)
    approvals = open_approvals(home, policy)
    agent = doing(home)
    return {
        "home": str(home),
        **_identity(approvals.identity),
        "configuration": problem or "ok",
        "log": _witnessed(home, approvals.identity),
        "agent": {"running": agent.running, "state": agent.in_words(), **agent.said},
        "proposals": [proposal_as_dict(approvals, held) for held in approvals.proposals()],
        "damaged": [str(path) for path in approvals.damaged()],
    }


def _witnessed(home: Path, identity: SiteIdentity) -> dict[str, Any]:
    """What the site has seen of the federation's log, and what is wrong with it; empty if nothing is."""
    refused = sorted(str(path) for path in (home / FOLDER).glob("refused-*.json"))
    try:
        seen = seen_by(home, identity.authority)
    except RunError as error:
        return {"witnessed": 0, "at": "", "problem": error.message, "refused": refused}
    return {"witnessed": seen.size, "at": seen.at, "problem": seen.problem, "refused": refused}


def _configured(path: Path) -> tuple[Policy, str]:
    """The policy, and what is wrong with the file; the strictest policy where it cannot be read."""
    try:
        read_configuration(path)
    except DataError as error:
        try:
            return read_policy(path), error.message
        except DataError:
            return Policy(stewards=2), error.message
    return read_policy(path), ""


def _identity(identity: SiteIdentity) -> dict[str, Any]:
    ends = identity.certificate.not_valid_after_utc
    return {
        "site": identity.site,
        "federation": identity.membership.federation,
        "address": identity.membership.address,
        "certificate_ends": ends.isoformat(),
        "certificate_valid": utc_now() < ends,
    }
