"""Whether a bundle holds: every check in its order, without network and without torch.

Rules:
  * The checks have numbers, by which the page on the bundle describes them; another program can do the same.
  * The first check that fails is named, with the entry that it failed at. Checks 1 to 6 say whether this is the log
    that was signed: if one of them fails, nothing that the log says is looked at.
  * One pass over the entries. Nothing grows with them but what the run's rounds and the federation's members need.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from locum.common.audit import course, papers, people, privacy, questions, readiness
from locum.common.audit.bundle import CHECKPOINTS, ENTRIES, Bundle, BundleError, Manifest, open_bundle
from locum.common.audit.rules import AtEntry, Rule, Wrong, shown
from locum.common.audit.standing import OF_RUN, Anchors, Standing
from locum.common.audit.tree import Tree, checkpoints, entry_of, witnessed
from locum.common.audit.words import named
from locum.common.identity import fingerprint_of
from locum.common.log.entries import Entry, moment

RULES: tuple[Rule, ...] = (
    *people.RULES,
    *course.RULES,
    *privacy.RULES,
    *course.LAST,
    *readiness.RULES,
    *questions.RULES,
)
_TITLES = {
    1: "the bundle is whole",
    2: "its certificates are those of one federation",
    3: "the plan is the one that was proposed",
    4: "each entry has its form",
    5: "each checkpoint has the root of the entries",
    6: "each checkpoint is signed by the log key",
    7: "sites have witnessed the log",
    18: "the files are those that the log names",
    **{rule.number: rule.title for rule in RULES},
}
#: Every check, by number.
TITLES = dict(sorted(_TITLES.items()))
#: Those without which nothing in the log counts.
_GROUND = 6

State = Literal["holds", "fails", "not looked at"]
Watch = Callable[[int, Entry, Standing], None]


@dataclass(frozen=True)
class Result:
    """What came of one check.

    Attributes:
        told: what was found, in words.
        means: of one that fails, what that means.
        entry: of one that fails, the number of the entry to blame, from 0; None if it is none.
        at: that entry in words.
    """

    number: int
    state: State
    told: str = ""
    means: str = ""
    entry: int | None = None
    at: str = ""

    @property
    def title(self) -> str:
        """What holds if it does."""
        return TITLES[self.number]


@dataclass(frozen=True)
class Verdict:
    """What came of all checks.

    Attributes:
        federation: its name, `run` the run's, `plan` the plan's digest; empty for what is no bundle.
        authority: the SHA-256 of the authority's certificate (DER); empty if it cannot be read.
        pinned: whether the authority was given, and does not come out of the bundle alone.
        results: every check in order.
        witnesses: by site, when it last cosigned the log, and how many entries that counts.
        standing: what stands at the end of the log; None if it was not looked at.
    """

    federation: str
    run: str
    plan: str
    authority: str
    pinned: bool
    results: tuple[Result, ...]
    witnesses: dict[str, tuple[str, int]] = field(default_factory=dict)
    standing: Standing | None = field(default=None, repr=False)

    @property
    def first(self) -> Result | None:
        """The first check that fails."""
        return next((result for result in self.results if result.state == "fails"), None)

    @property
    def holds(self) -> bool:
        """Whether all checks hold."""
        return all(result.state == "holds" for result in self.results)


def verify(
    path: Path, *, authority: str | None = None, witnesses: int | None = None, watch: Watch | None = None
) -> Verdict:
    """Checks a bundle.

    Args:
        path: of the bundle.
        authority: the SHA-256 of the authority's certificate (DER) that is trusted; None for the one in the bundle.
        witnesses: how many sites must have witnessed all of the run; None for more than half of its roster.
        watch: is told each entry of the run and of the federation, with what stood before it.
    """
    checks = _Checks(watch)
    with ExitStack() as stack, suppress(_Stop):
        _look_through(checks, stack, path, authority, witnesses)
    return checks.verdict(pinned=authority is not None)


class _Stop(Exception):
    """Nothing that would follow can be looked at."""


@dataclass
class _Checks:
    """What came of the checks so far, and what was found on the way."""

    watch: Watch | None
    results: dict[int, Result] = field(default_factory=dict)
    manifest: Manifest | None = None
    anchors: Anchors | None = None
    standing: Standing | None = None
    witnesses: dict[str, tuple[str, int]] = field(default_factory=dict)

    def hold(self, number: int, told: str) -> None:
        """A check holds."""
        self.results[number] = Result(number, "holds", shown(told))

    def fail(self, number: int, wrong: Wrong | BundleError, entry: int | None = None, at: str = "") -> None:
        """A check fails, at an entry; raises _Stop if nothing counts without it."""
        if isinstance(wrong, Wrong):
            blamed = entry if wrong.entry is None else wrong.entry
            at = shown(at) if blamed == entry else ""
            self.results[number] = Result(number, "fails", shown(wrong.what), shown(wrong.means), blamed, at)
        else:
            self.results[number] = Result(number, "fails", shown(wrong.message), "the file is damaged", entry)
        if number <= _GROUND:
            raise _Stop from wrong

    @contextmanager
    def at(self, number: int) -> Iterator[None]:
        """What is done within is this check."""
        try:
            yield
        except (Wrong, BundleError) as wrong:
            self.fail(number, wrong)

    def verdict(self, *, pinned: bool) -> Verdict:
        """What came of all checks."""
        manifest, authority = self.manifest, self.anchors and fingerprint_of(self.anchors.authority)
        return Verdict(
            federation=manifest.federation if manifest else "",
            run=manifest.run if manifest else "",
            plan=manifest.plan if manifest else "",
            authority=authority or "",
            pinned=pinned,
            results=tuple(self.results.get(number, Result(number, "not looked at")) for number in TITLES),
            witnesses=self.witnesses,
            standing=self.standing,
        )


def _look_through(checks: _Checks, stack: ExitStack, path: Path, authority: str | None, witnesses: int | None) -> None:
    with checks.at(1):
        bundle = stack.enter_context(open_bundle(path))
        checks.manifest = bundle.manifest
        checks.hold(1, f"{len(bundle.manifest.members) + 1} members, as its manifest lists them")
    with checks.at(2):
        anchors = checks.anchors = papers.anchors_of(bundle, authority)
        checks.hold(2, f"of {anchors.federation}, whose authority is {fingerprint_of(anchors.authority)}")
    with checks.at(3):
        proposed = papers.plan_of(bundle, anchors)
        checks.hold(3, f"{proposed.plan.name}, {bundle.manifest.plan}, signed by the log key")
    manifest = bundle.manifest
    standing = Standing(manifest.run, proposed.plan, proposed.content, manifest.plan, proposed.proposal, anchors)
    with checks.at(5):
        tree = Tree(anchors, checkpoints(bundle.lines(CHECKPOINTS)))
    _read(checks, bundle, standing, tree)
    checks.standing = standing
    checks.witnesses = {
        site: (moment(at), size) for key, (site, at, size) in tree.last_seen.items() if key in standing.keys
    }
    with checks.at(7):
        checks.hold(7, witnessed(tree, standing, witnesses))
    for rule in RULES:
        with checks.at(rule.number):
            if rule.number not in checks.results:
                checks.hold(rule.number, rule.at_end(standing))
    with checks.at(18):
        checks.hold(18, papers.results(bundle, standing))


def _read(checks: _Checks, bundle: Bundle, standing: Standing, tree: Tree) -> None:
    """The one pass over the log: checks 4 to 6, and at each entry what the others ask of it."""
    number, step = 0, 4
    try:
        for content in bundle.lines(ENTRIES):
            entry = entry_of(content, number, standing.anchors)
            step = 5
            tree.add(content)
            _hold_against(checks, standing, number, entry)
            number, step = number + 1, 4
        checks.hold(4, f"{number} entries in canonical JSON")
        step = 5
        checks.hold(5, tree.close())
    except (Wrong, BundleError) as wrong:
        checks.fail(step, wrong, number)
    if tree.signatures is not None:
        checks.fail(6, tree.signatures)
    checks.hold(6, f"{tree.count} signatures of the log key")


def _asked() -> dict[type, list[tuple[int, AtEntry]]]:
    """By kind of entry, what the rules ask of it."""
    found: dict[type, list[tuple[int, AtEntry]]] = {}
    for rule in RULES:
        for kind, ask in rule.at_entry.items():
            found.setdefault(kind, []).append((rule.number, ask))
    return found


_ASKED = _asked()


def _hold_against(checks: _Checks, standing: Standing, number: int, entry: Entry) -> None:
    """What the rules ask of an entry, and then the entry stands; those of other runs are nobody's concern."""
    if isinstance(entry, OF_RUN) and entry.run != standing.run:
        return
    for rule, ask in _ASKED.get(type(entry), ()):
        if rule not in checks.results:  # one that has failed has said so
            try:
                ask(standing, entry)
            except Wrong as wrong:
                checks.fail(rule, wrong, number, named(entry))
    if checks.watch is not None:
        checks.watch(number, entry, standing)
    standing.take(number, entry)
