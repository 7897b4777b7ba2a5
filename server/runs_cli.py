"""The ML team's commands: propose a plan, run it, watch the run, stop it, resume it, pull what came out.

Exit codes of `watch` and of `run --wait`: 0 completed, 3 completed with losses, 1 failed, 4 stopped, 130 left.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from locum.common.errors import RunError
from locum.server.home import Home, default_home, read_config, who_types
from locum.server.options import HomeDir, Json

if TYPE_CHECKING:
    from rich.console import Console

    from locum.common.plan import Plan
    from locum.server.outcome import Outcome
    from locum.server.runs import Run, State, Status


def _app() -> typer.Typer:
    return typer.Typer(add_completion=False, rich_markup_mode=None)


propose_app, run_app, watch_app, stop_app, resume_app, pull_app = (_app() for _ in range(6))

_RunName = Annotated[
    str, typer.Argument(metavar="RUN", show_default=False, help="A run's name, or the beginning or the end of it.")
]

_EXIT: dict[State, int] = {"completed": 0, "completed with losses": 3, "failed": 1, "stopped": 4}
_LEFT = 130


# --- a plan


@propose_app.command()
def propose(
    plan: Annotated[Path, typer.Argument(metavar="PLAN", show_default=False, help="A plan.yaml.")],
    home: HomeDir,
    by: Annotated[str, typer.Option("--by", help="Who proposes it; the sites read this.", show_default="you")] = "",
    as_json: Json = False,
) -> None:
    """Check a plan, sign it, and put it before the sites."""
    from locum.common.plan import load_plan
    from locum.common.plan_cli import notes
    from locum.common.yaml_source import read_yaml
    from locum.server import proposals

    folder = _home(home)
    found = load_plan(plan)
    digest = proposals.propose(folder, found, by or who_types(), source=read_yaml(plan))
    approved, others = proposals.sites_of(folder, digest)
    if as_json:
        _tell({"digest": digest, "plan": found.name, "approved": list(approved), "not_approved": list(others)})
        return
    typer.echo(f"{found.name} is before the sites: {digest}")
    for line in notes(found):
        typer.echo(f"note: {line}")
    _say_approvals(approved, others)
    if others or not approved:
        typer.echo(f"next, at each hospital: locum site review {digest[:12]}")
    typer.echo(f"next, when {found.participation.quorum} or more approve: locum run {digest[:12]}{_at(home)}")


def _say_approvals(approved: Sequence[str], others: Sequence[str]) -> None:
    if approved:
        typer.echo(f"approved by {_some(approved)}")
    if others:
        typer.echo(f"not yet approved by {_some(others)}")
    if not approved and not others:
        typer.echo("no site is enrolled yet: locum server invite NAME")


# --- a run


@run_app.command()
def run(
    digest: Annotated[
        str, typer.Argument(metavar="DIGEST", show_default=False, help="A proposed plan's digest, or six digits of it.")
    ],
    home: HomeDir,
    wait: Annotated[bool, typer.Option("--wait", help="Watch the run until it ends.")] = False,
    anyway: Annotated[bool, typer.Option("--anyway", help="Start it below quorum; it waits for sites.")] = False,
    without: Annotated[
        list[str] | None, typer.Option("--without", metavar="SITE", help="Leave a site out; can be given again.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Run a plan that sites have approved."""
    from locum.server.proposals import proposed, sites_of
    from locum.server.runs import all_runs

    folder = _home(home)
    proposal, plan = proposed(folder, digest)
    approved, others = sites_of(folder, proposal.digest)
    left_out = _known(without or (), (*approved, *others))
    approved, others = (tuple(site for site in sites if site not in left_out) for sites in (approved, others))
    quorum = plan.participation.quorum
    if len(approved) < quorum and not anyway:
        raise RunError(_below_quorum(plan.name, approved, others, quorum), "wait for them, or start it with --anyway")
    going = [other.id for other in all_runs(folder) if _is_of(other, plan.digest)]
    made = _made(folder, plan, approved, left_out)
    if as_json:
        _tell({"run": made.id, "digest": plan.digest, "approved": list(approved), "not_approved": list(others),
               "without": list(left_out), "folder": str(made.folder)}, lines=wait)  # fmt: skip
    else:
        typer.echo(f"run {made.id} is asked for: {plan.name}, {plan.rounds} rounds, quorum {quorum}")
        _say_approvals(approved, others)
        if left_out:
            typer.echo(f"without {_some(left_out)}")
        if going:
            typer.echo(f"note: {_some(going)} of the same plan is not at its end")
        if len(approved) < quorum:
            typer.echo(f"it waits until {quorum} sites have approved and are there")
        if not wait:
            typer.echo(f"next: locum watch {made.id}{_at(home)}")
            typer.echo(f"      locum stop {made.id}{_at(home)}    or, at its end, locum pull {made.id}{_at(home)}")
    if wait:
        _follow(made, folder, as_json=as_json)


def _below_quorum(plan: str, approved: Sequence[str], others: Sequence[str], quorum: int) -> str:
    have = f"approved by {_some(approved)} only" if approved else "approved by no site"
    missing = f"; not by {_some(others)}" if others else "; no other site is enrolled"
    return f"{plan} is {have}{missing}; its quorum is {quorum}"


def _known(names: Sequence[str], sites: Sequence[str]) -> tuple[str, ...]:
    """Names that are sites' names; raises RunError."""
    for name in names:
        if name not in sites:
            raise RunError(f"no site is called '{name}'", f"the sites are {_some(sites)}" if sites else "invite one")
    return tuple(sorted(set(names)))


def _made(home: Home, plan: Plan, approved: Sequence[str], without: Sequence[str]) -> Run:
    from locum.server.runs import create_run

    try:
        return create_run(home, plan, sites=approved, without=without, by=who_types())
    except OSError as error:
        raise RunError(
            f"{home.runs} cannot be written: {error.strerror}", "free space, or use the coordinator's account"
        ) from error


def _is_of(run: Run, digest: str) -> bool:
    """Whether a run of this plan has not ended."""
    with suppress(RunError):
        return run.created.digest == digest and not run.status().ended
    return False


# --- watching


@watch_app.command()
def watch(
    home: HomeDir,
    run: Annotated[
        str | None,
        typer.Argument(
            metavar="[RUN]", show_default=False, help="A run's name, or its beginning or end; else the newest."
        ),
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="List all runs with their states, once.")] = False,
    as_json: Json = False,
) -> None:
    """Watch a run until it ends: its rounds, losses and metrics, and what each site does. Ctrl-C leaves it alone."""
    from locum.server.runs import find, newest

    folder = _home(home)
    if every:
        _list(folder, as_json=as_json)
        return
    _follow(newest(folder) if run is None else find(folder, run), folder, as_json=as_json)


def _follow(run: Run, home: Home, *, as_json: bool) -> None:
    """Shows a run until it ends, and exits with the code of its end."""
    from locum.server.watch import print_events, watch_run

    console = _console()
    try:
        status = print_events(run) if as_json else watch_run(run, home, console)
    except KeyboardInterrupt:
        if not as_json:
            typer.echo(
                f"left; the run goes on without you: locum watch {run.id}{_at(home.path)} shows it again", err=True
            )
        raise typer.Exit(_LEFT) from None
    except BrokenPipeError:
        # Whoever read has gone; without this the interpreter complains when it flushes at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(_LEFT) from None
    if not as_json:
        _say_end(run, status, _at(home.path))
    raise typer.Exit(_EXIT[status.state])


def _say_end(run: Run, status: Status, at: str) -> None:
    """Says how a run has ended, and what can be done; `at` is what a command needs to find the same folder."""
    if status.state == "failed":
        typer.echo(f"{run.id} has failed after round {status.round}: {_plain(status.reason)}")
        typer.echo(f" next: {_plain(status.remedy)}")
        typer.echo(f"       then: locum resume {run.id}{at}")
    elif status.state == "stopped":
        typer.echo(f"{run.id} is stopped after round {status.round} of {status.rounds}; committed rounds are kept")
        typer.echo(f" next: locum resume {run.id}{at}, or locum pull {run.id}{at} for what there is")
    else:
        typer.echo(_ended(run))
        typer.echo(f" next: locum pull {run.id}{at}")


def _plain(text: str) -> str:
    """Text that may hold words of a site, as a terminal may have it."""
    from locum.server.site_states import plain

    return "\n".join(map(plain, text.splitlines()))


def _ended(run: Run) -> str:
    """The end of a run in words, with what was lost."""
    from locum.server.outcome import read_summary
    from locum.server.report_words import status_of

    return f"{run.id}: {_plain(status_of(read_summary(run)))}"


def _list(home: Home, *, as_json: bool) -> None:
    from locum.server.runs import all_runs
    from locum.server.watch import status_fields

    rows = [(run, run.status()) for run in all_runs(home)]
    if as_json:
        _tell([status_fields(run, status) for run, status in rows])
    elif not rows:
        typer.echo("this coordinator has no run yet: locum run DIGEST")
    else:
        _print_runs(rows)


def _print_runs(rows: Iterable[tuple[Run, Status]]) -> None:
    import time

    from rich.table import Table

    from locum.server.site_states import clock, plain

    now = time.time()
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("run", overflow="fold")
    for name in ("state", "round", "since", "why"):
        table.add_column(name)
    for run, status in rows:
        why = plain(status.reason.splitlines()[0]) if status.reason else ""
        table.add_row(run.id, status.state, f"{status.round}/{status.rounds}", clock(status.since, now), why)
    _console().print(table)


# --- what is wanted of it


@stop_app.command()
def stop(run: _RunName, home: HomeDir, as_json: Json = False) -> None:
    """Stop a run; its committed rounds are kept, and it can be resumed."""
    from locum.server.runs import find

    found = find(_home(home), run)
    status = found.status()
    if status.state in {"completed", "completed with losses", "failed"}:
        raise RunError(f"{found.id} has {_has(status.state)} already", f"locum watch {found.id}{_at(home)} says how")
    if status.state not in {"stopping", "stopped"}:
        _want(found, "stop")
    kept = f"{status.round} committed rounds are kept"
    _say_wanted(found, as_json, f"{found.id} stops; {kept}: locum resume {found.id}{_at(home)}")


@resume_app.command()
def resume(run: _RunName, home: HomeDir, as_json: Json = False) -> None:
    """Go on with a run that was stopped or has failed, from its last committed round."""
    from locum.server.runs import find

    found = find(_home(home), run)
    status = found.status()
    if status.state in {"completed", "completed with losses"}:
        raise RunError(f"{found.id} has completed", f"locum pull {found.id}{_at(home)} fetches its model")
    text = f"{found.id} is {status.state} already: locum watch {found.id}{_at(home)}"
    if status.state in {"failed", "stopped", "stopping"}:
        _want(found, "run")
        text = f"{found.id} goes on after round {status.round}: locum watch {found.id}{_at(home)}"
    _say_wanted(found, as_json, text)


def _has(state: State) -> str:
    return "failed" if state == "failed" else "completed"


def _want(run: Run, what: Any) -> None:
    try:
        run.want(what, by=who_types())
    except OSError as error:
        reason = f"{run.folder} cannot be written: {error.strerror}"
        raise RunError(reason, "free space, or use the coordinator's account") from error


def _say_wanted(run: Run, as_json: bool, text: str) -> None:
    from locum.server.watch import status_fields

    if as_json:
        _tell(status_fields(run, run.status()))
    else:
        typer.echo(text)


# --- what came out


@pull_app.command()
def pull(
    run: _RunName,
    home: HomeDir,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Where to put it.", show_default="./RUN")
    ] = None,
    as_json: Json = False,
) -> None:
    """Fetch a run's model, metrics, report and model card; before its end those of the last committed round."""
    from locum.server import outcome
    from locum.server.runs import find

    found = find(_home(home), run)
    folder = out or Path(found.id)
    fetched = outcome.pull(found, folder)
    if as_json:
        _tell({**outcome.metrics_of(fetched), "folder": str(folder)})
        return
    _say_fetched(fetched, folder)


def _say_fetched(fetched: Outcome, folder: Path) -> None:
    from locum.server.report_words import status_of

    summary = fetched.summary
    if fetched.final:
        typer.echo(status_of(summary))
        typer.echo(f"the model of round {summary.round} is in {folder}; SHA-256 {fetched.model_sha256}")
    else:
        typer.echo(
            f"{fetched.run.id} has not ended, it is {fetched.status.state}: this is the model of round {summary.round} "
            f"of {fetched.plan.rounds}, not the result"
        )
        typer.echo(f"it is in {folder}; SHA-256 {fetched.model_sha256}")
    typer.echo(f" next: open {folder / 'report.html'}")


# --- helpers


def _home(path: Path) -> Home:
    """The coordinator in a folder; raises RunError if there is none."""
    home = Home(path)
    read_config(home)
    return home


def _at(home: Path) -> str:
    """What a next command needs to find the same folder."""
    return "" if home == default_home() else f" --home {home}"


def _some(names: Sequence[str]) -> str:
    from locum.server.report_words import listed

    return listed(names)


def _console() -> Console:
    from rich.console import Console

    return Console(highlight=False)


def _tell(value: Any, *, lines: bool = False) -> None:
    typer.echo(json.dumps(value) if lines else json.dumps(value, indent=2))
