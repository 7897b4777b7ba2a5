"""A verdict and a story as lines of text, a question at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from locum.common.audit.rules import shown
from locum.common.audit.story import Story
from locum.common.audit.verify import Result, Verdict
from locum.common.audit.words import reason

#: What neither a log nor its checks can show, said beside every verdict.
LIMITS = (
    "Whether two stewards approved where a site asks for two: the site tells others only that the approval stands.",
    "What happened inside a site: that its images are what they are called, and that it trained on all of them.",
    "What a site has spent in attempts that do not count, before its next statement says it.",
    "That the first model is the one that the plan's seed gives: that takes torch, and is checked by each site.",
)


# --- the verdict


def verdict_lines(verdict: Verdict) -> Iterator[str]:
    """Each check with what was found, then what holds or the first thing that does not."""
    for result in verdict.results:
        yield f"{result.number:3}  {_STATES[result.state]:6} {result.title}" + (
            f": {result.told}" if result.told else ""
        )
    yield ""
    if verdict.first is None:
        yield f"all {len(verdict.results)} checks hold: this is the record of {verdict.run}"
    else:
        yield from failure_lines(verdict.first)
    yield from _anchor(verdict)


_STATES = {"holds": "ok", "fails": "FAILS", "not looked at": "-"}


def failure_lines(result: Result) -> Iterator[str]:
    """A check that fails: where, what, and what it means."""
    yield f"FAILS at check {result.number}, {result.title}{_place(result)}:"
    yield f"  {result.told}"
    yield f"  this means: {result.means}"


def _place(result: Result) -> str:
    if result.entry is None:
        return ""
    return f", at entry {result.entry}" + (f" ({result.at})" if result.at else "")


def _anchor(verdict: Verdict) -> Iterator[str]:
    if verdict.pinned or not verdict.authority:
        return
    yield "note: whom to trust came out of the bundle itself. Compare it, or give it:"
    yield f"  --fingerprint {verdict.authority}"


def verdict_fields(verdict: Verdict) -> dict[str, Any]:
    """The verdict as plain data."""
    results = [
        {"number": r.number, "title": r.title, "state": r.state, "told": r.told, "means": r.means, "entry": r.entry}
        for r in verdict.results
    ]
    first = verdict.first
    return {
        "holds": verdict.holds,
        "federation": verdict.federation,
        "run": verdict.run,
        "plan": verdict.plan,
        "authority": verdict.authority,
        "pinned": verdict.pinned,
        "first": None if first is None else results[first.number - 1],
        "checks": results,
    }


# --- the story


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """Columns of text; the last one is as long as it is."""
    cells = [list(head), *([shown(str(cell)) for cell in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    widths[-1] = 0
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]


def time_of(at: str) -> str:
    """A time for a person."""
    return at[:16].replace("T", " ")


def epsilon(value: float) -> str:
    """An epsilon for a person."""
    return f"{value:.3g}"


def number(value: Any) -> str:
    """A metric for a person."""
    if value is None:
        return "not defined"
    return f"{value:.3f}" if isinstance(value, int | float) else "a matrix"


def sites(story: Story, _site: str | None, _round: int | None) -> list[str]:
    """Who is in the federation, who took part, and who witnessed it."""
    taking = set() if story.roster is None else set(story.roster.sites)
    rows = [
        (
            site.name,
            "; ".join(f"{event.what} {time_of(event.at)} (entry {event.entry})" for event in site.events),
            f"{site.counted} of {len(story.rounds)}" if site.name in taking else "takes no part",
            (site.policy or "-")[:12],
            f"{site.witnessed[1]} entries, {time_of(site.witnessed[0])}" if site.witnessed else "no",
        )
        for site in _chosen(story, _site)
    ]
    return table(("site", "in the federation", "rounds", "policy", "has witnessed"), rows)


def _chosen(story: Story, site: str | None) -> list[Any]:
    return [each for name, each in sorted(story.sites.items()) if site in {None, name}]


def approvals(story: Story, site: str | None, _round: int | None) -> list[str]:
    """What was proposed, and each site's decisions."""
    proposed = story.proposed
    lines = [f"plan {story.told.plan}"]
    if proposed is not None:
        lines.append(f"proposed {time_of(proposed.at)} (entry {proposed.entry}), signed by the log key")
    rows = [
        (
            said.entry,
            time_of(said.at),
            said.site,
            {"approve": "approves", "revoke": "takes it back"}[said.decision],
            said.steward,
        )
        for said in story.decisions
        if site in {None, said.site}
    ]
    silent = [name for name in story.sites if not any(said.site == name for said in story.decisions)]
    lines += ["", *table(("entry", "when", "site", "decision", "steward, as the site signed it"), rows)]
    return [*lines, *([f"no decision: {', '.join(sorted(silent))}"] if silent and site is None else [])]


def rounds(story: Story, site: str | None, of: int | None) -> list[str]:
    """Every round: who is in it, who is not and why, how it was summed, which model came of which."""
    rows = [
        (
            done.entry,
            done.round,
            time_of(done.at),
            ", ".join(done.sites),
            "; ".join(f"{name}: {reason(word)}" for name, word in sorted(done.refused.items())) or "nobody",
            f"secure, {done.secured[1]} of {done.secured[0]} must answer" if done.secured else "in the clear",
            f"{done.start[:12]} to {done.model[:12]}" + (" (went back)" if done.back else ""),
        )
        for done in story.rounds
        if of in {None, done.round} and (site is None or site in {*done.sites, *done.refused})
    ]
    return table(("entry", "round", "when", "in it", "left out", "sum", "model"), rows)


def refusals(story: Story, site: str | None, of: int | None) -> list[str]:
    """What was done without whom, and why."""
    rows = [
        (left.entry, time_of(left.at), left.site, left.step, left.why)
        for left in story.left
        if site in {None, left.site} and (of is None or left.step.endswith(f"round {of}"))
    ]
    if not rows:
        return ["nothing was refused, and nobody was left out"]
    return table(("entry", "when", "site", "missing in", "why"), rows)


def privacy(story: Story, site: str | None, _round: int | None) -> list[str]:
    """What each site says it has spent of its patients' privacy in this run."""
    plan = story.plan
    if plan is None or plan.private is None:
        return ["the plan has no differential privacy: nothing bounds what the model tells of a single patient"]
    bound = plan.private
    folds = (
        "no metric is released"
        if bound.metrics_epsilon is None
        else f"{bound.metrics_epsilon:g} for the metrics of a fold"
    )
    lines = [f"the plan allows epsilon {bound.epsilon:g} at delta {bound.delta:g} for training, {folds}", ""]
    rows = [
        (each.name, purpose, epsilon(spent), f"{delta:g}", f"{spent / most:.0%}" if most else "-")
        for each in _chosen(story, site)
        for purpose, (spent, delta) in sorted(each.spent.items())
        for most in (bound.epsilon if purpose == "train" else bound.metrics_epsilon,)
    ]
    return [*lines, *table(("site", "of its patients in", "epsilon", "delta", "of what is allowed"), rows)]


def metrics(story: Story, site: str | None, of: int | None) -> list[str]:
    """What was measured of which model, over all sites and of each that tells its own."""
    rows: list[tuple[object, ...]] = []
    for told in story.metrics:
        if of not in {None, told.round}:
            continue
        over = {"all sites": told.overall, **told.per_site}
        for name, values in over.items():
            if site in {None, name}:
                shown = ", ".join(f"{metric} {number(value)}" for metric, value in values.items())
                cases = told.cases if name == "all sites" and told.cases is not None else ""
                rows.append((told.entry, told.round, told.fold, told.model[:12], name, cases, shown))
    return table(("entry", "round", "fold", "model", "over", "cases", "metrics"), rows)


def plan(story: Story, _site: str | None, _round: int | None) -> list[str]:
    """The whole plan."""
    return story.plan_text.splitlines() or ["the plan cannot be read"]


def course(story: Story, _site: str | None, _round: int | None) -> list[str]:
    """What became of the run, and its model."""
    lines = table(("entry", "when", "what"), ((each.entry, time_of(each.at), each.what) for each in story.happened))
    end = story.end
    if end is None:
        return [*lines, "", "the run has no end, and released no model"]
    return [*lines, "", f"released: the model of round {end.round}, SHA-256 {end.model}"]


def readiness(story: Story, site: str | None, _round: int | None) -> list[str]:
    """What each site said of its data: whether they meet the contract, and of whom they are, in rounded numbers."""
    said = [(each.name, each.readiness) for each in _chosen(story, site) if each.readiness is not None]
    if not said:
        return ["no site said whether its data meet the contract"]
    return table(("site", "ready", "not met", "training patients", "of which", "cleaned by"), map(_readiness, said))


def _readiness(said: tuple[str, dict[str, Any]]) -> tuple[object, ...]:
    site, told = said
    failing = [name for name, met in told["clauses"].items() if not met]
    strata = [f"{value} {count}" for cells in told["strata"].values() for value, count in cells.items()]
    patients = f"{told['patients']} or more" if told["patients"] else "not told"
    return site, "yes" if told["ready"] else "NO", ", ".join(failing), patients, ", ".join(strata), told["profile"]


Part = Callable[[Story, str | None, int | None], list[str]]
#: What can be asked of a bundle, by the word to ask with.
PARTS: dict[str, Part] = {
    "course": course,
    "plan": plan,
    "approvals": approvals,
    "readiness": readiness,
    "sites": sites,
    "rounds": rounds,
    "refusals": refusals,
    "privacy": privacy,
    "metrics": metrics,
}


def story_fields(story: Story) -> dict[str, Any]:
    """The story as plain data."""
    return {
        "verdict": verdict_fields(story.told),
        "proposed": story.proposed and vars(story.proposed),
        "sites": {
            name: {**vars(site), "events": list(map(vars, site.events))} for name, site in sorted(story.sites.items())
        },
        "decisions": list(map(vars, story.decisions)),
        "course": list(map(vars, story.happened)),
        "roster": story.roster and story.roster.model_dump(mode="json"),
        "rounds": list(map(vars, story.rounds)),
        "refusals": [{**vars(left), "why": left.why} for left in story.left],
        "metrics": list(map(vars, story.metrics)),
        "end": story.end and story.end.model_dump(mode="json"),
        "plan": None if story.told.standing is None else json.loads(story.told.standing.content),
        "not_shown": list(LIMITS),
    }
