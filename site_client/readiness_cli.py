"""`locum site readiness`: whether this site's data meet a plan's contract, and what to do where they do not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from locum.common.errors import DataError, RunError
from locum.site_client.identity import usable
from locum.site_client.options import Home, Json

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.table import Table

    from locum.common.plan import Plan
    from locum.site_client.gate import Ready
    from locum.site_client.readiness.clauses import Measured
    from locum.site_client.readiness.statement import Steward


def readiness(
    plan: Annotated[
        str, typer.Argument(metavar="PLAN", show_default=False, help="A plan.yaml, or the digest of a proposed plan.")
    ],
    home: Home,
    store: Annotated[
        list[Path] | None,
        typer.Option("--store", metavar="DIR", help="A folder of volumes and catalog; that of site.yaml unless given."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Where the report goes; `readiness` in the store.")
    ] = None,
    release: Annotated[bool, typer.Option("--release", help="Let the signed statement go to the coordinator.")] = False,
    as_json: Json = False,
) -> None:
    """Hold this site's data against a plan's contract: what is met, what is not, and how to mend it."""
    from locum.site_client.readiness.statement import open_steward

    with usable(home):
        of = _plan(plan, home)
        steward = open_steward(home, store or ())
        with _bars(visible=not as_json) as tell:
            measured = steward.measured(of)
            said = steward.said(of, measured)
            page = _written(measured, said, steward, out, tell)
        if release:
            _let_go(home, said)
    _tell(measured, said, page, as_json=as_json, released=release)
    if not measured.ready:
        raise typer.Exit(1)


def _plan(given: str, home: Path) -> Plan:
    """A plan by its file or its digest; raises LocumError."""
    from locum.common.plan import load_plan
    from locum.site_client.approvals import open_approvals
    from locum.site_client.gate import Policy

    if Path(given).is_file():
        return load_plan(Path(given))
    try:
        approvals = open_approvals(home, Policy())
        return approvals.held(approvals.find(given)).plan
    except RunError as error:  # exit code 1 is for a site that is not ready
        if any(mark in given for mark in "./"):
            raise DataError(
                f"there is no plan at {given}", "give a plan.yaml, or the digest of a proposed plan"
            ) from error
        raise DataError(error.message, error.remedy) from error


def _written(
    measured: Measured, said: Ready, steward: Steward, out: Path | None, tell: Callable[[int, int], None]
) -> Path:
    """Writes the report and its numbers; returns the page. Raises RunError."""
    from locum.common.durable import replace_file
    from locum.site_client.readiness.report import page

    store = steward.stores[0]
    folder = out or store / "readiness"
    name = f"{measured.plan.name}-{measured.plan.digest[:12]}"
    content = page(measured, said.said, store, at=steward.now().astimezone(), tell=tell)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        replace_file(folder / f"{name}.html", content)
        replace_file(folder / f"{name}.json", json.dumps(_fields(measured, said), indent=2).encode())
    except OSError as error:
        raise RunError(
            f"the report cannot be written to {folder}: {error.strerror}", "free space, or use --out"
        ) from error
    return folder / f"{name}.html"


def _fields(measured: Measured, said: Ready) -> dict[str, Any]:
    return {
        "plan": measured.plan.name,
        "digest": measured.plan.digest,
        "ready": measured.ready,
        "clauses": [
            {"clause": r.clause, "asked": r.asked, "measured": r.measured, "met": r.passed, "remedy": r.remedy}
            for r in measured.results
        ],
        "statement": said.said.model_dump(mode="json"),
        "signed": said.envelope is not None,
        "envelope": said.envelope,
    }


def _let_go(home: Path, said: Ready) -> None:
    from locum.site_client.readiness.outbox import let_go

    if said.envelope is None:
        raise DataError(
            "a statement that is not signed cannot be released", "enrol this site: locum site enrol INVITATION"
        )
    let_go(home, said.said.plan, said.envelope.encode())


# --- on the screen


def _tell(measured: Measured, said: Ready, page: Path, *, as_json: bool, released: bool) -> None:
    from rich.console import Console

    if as_json:
        typer.echo(json.dumps({**_fields(measured, said), "report": str(page), "released": released}, indent=2))
        return
    console = Console()
    console.print(_table(measured))
    signed = "signed" if said.envelope is not None else "NOT SIGNED, for this site is not enrolled"
    verdict = "ready" if measured.ready else f"NOT ready: {', '.join(measured.failing)}"
    typer.echo(f"{measured.plan.name}: {verdict}; the statement is {signed}")
    if released:
        typer.echo("released: the agent hands it over as soon as it is connected, and writes that down first")
    typer.echo(f"next: open {page}")


def _table(measured: Measured) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table("clause", "the plan asks", "this site has", "met")
    for result in (one for one in measured.results if one.asked or not one.passed):
        words = Text(result.measured)
        if result.remedy:
            words.append(f"\n{result.remedy}", style="bold")
        met = Text("yes", style="green") if result.passed else Text("NO", style="red")
        table.add_row(result.clause, Text(result.asked or "nothing"), words, met)
    return table


@contextmanager
def _bars(*, visible: bool) -> Iterator[Callable[[int, int], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not visible) as bars:
        task = bars.add_task("measuring", total=None)

        def tell(done: int, total: int) -> None:
            bars.update(task, description="drawing", completed=done, total=total)

        yield tell
