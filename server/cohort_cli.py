"""`locum cohort`: ask every site how many patients it has who fit a description."""

from __future__ import annotations

import csv
import io
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from locum.common.errors import DataError, RunError
from locum.server.home import Home, read_config, who_types
from locum.server.options import HomeDir, Json

if TYPE_CHECKING:
    from locum.server.cohort import Cell, Result

app = typer.Typer(add_completion=False, rich_markup_mode=None)
_LOOK_SECONDS = 0.5


@app.command()
def cohort(  # noqa: PLR0913, PLR0917 - the options of a command
    home: HomeDir,
    query: Annotated[
        Path | None, typer.Argument(metavar="[QUERY]", show_default=False, help="A QUERY.yaml to ask.")
    ] = None,
    wait: Annotated[float, typer.Option("--wait", metavar="SECONDS", help="Wait so long for the sites.")] = 30.0,
    by: Annotated[str, typer.Option("--by", help="Who asks; the sites read this.", show_default="you")] = "",
    days: Annotated[float, typer.Option("--days", min=0.001, max=365, help="How long sites may still answer.")] = 7.0,
    show: Annotated[
        str | None, typer.Option("--show", metavar="DIGEST", help="What has come back to a question.")
    ] = None,
    every: Annotated[bool, typer.Option("--list", help="List the questions that were asked.")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="A line for each cell and site.")] = False,
    as_json: Json = False,
    html: Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Write a page with bars, too.")] = None,
) -> None:
    """Ask the sites how many of their patients fit a description, and show what they tell."""
    from locum.server import cohort as asking

    folder = Home(home)
    read_config(folder)
    if [query is not None, show is not None, every].count(True) != 1:
        raise DataError("give a QUERY.yaml to ask, or --show DIGEST, or --list", "see docs/cohort.md")
    if every:
        _list(folder, as_json=as_json)
        return
    if query is not None:
        from locum.common.cohort import load_query

        digest = asking.ask(folder, load_query(query), by=by or who_types(), days=days)
        found = _awaited(folder, digest, wait, visible=not as_json and not as_csv)
    else:
        found = asking.result(folder, asking.find(folder, str(show)))
    if html is not None:
        from locum.server.cohort_page import page

        try:
            html.write_bytes(page(found))
        except OSError as error:
            raise RunError(f"{html} cannot be written: {error.strerror}", "give another --html") from error
    if as_json:
        typer.echo(json.dumps(found.as_dict(), indent=2))
    elif as_csv:
        typer.echo(_csv(found), nl=False)
    else:
        _print(found)


def _awaited(home: Home, digest: str, seconds: float, *, visible: bool) -> Result:
    """Waits until every site has answered, or the time is over."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from locum.server.cohort import result

    end = time.monotonic() + seconds
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not visible) as bars:
        task = bars.add_task("answers", total=None)
        while True:
            found = result(home, digest)
            done = len(found.answers) + len(found.refused)
            bars.update(task, completed=done, total=done + len(found.silent))
            if not found.silent or time.monotonic() >= end:
                return found
            time.sleep(_LOOK_SECONDS)


def _list(home: Home, *, as_json: bool) -> None:
    from datetime import UTC, datetime

    from locum.server.cohort import questions
    from locum.server.site_states import plain

    found = questions(home)
    if as_json:
        typer.echo(json.dumps([question.model_dump(mode="json") for question in found], indent=2))
        return
    for question in found:
        at = datetime.fromtimestamp(question.asked_at, UTC)
        name, study = question.query["name"], question.query["study"]
        typer.echo(f"{question.digest[:12]}  {at:%Y-%m-%d %H:%M}  {name}, for {study}, by {plain(question.by)}")
    typer.echo("next: locum cohort --show DIGEST" if found else "nothing was asked yet: locum cohort QUERY.yaml")


def _csv(found: Result) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(found.rows())
    return text.getvalue()


def _print(found: Result) -> None:
    from rich.console import Console
    from rich.table import Table

    from locum.server.cohort import named

    console = Console(highlight=False)
    sites = sorted(found.answers)
    for place, table in enumerate(found.query.tables):
        shown = Table(*(each.by for each in table.dimensions), "all sites", title=named(table), title_justify="left")
        for site in sites if len(sites) <= _MOST_COLUMNS else ():
            shown.add_column(site, justify="right")
        for cell in found.cells(place):
            numbers = [cell.sites[site] for site in sites] if len(sites) <= _MOST_COLUMNS else []
            shown.add_row(
                *map(_shown, cell.key), _total(cell), *("–" if number is None else str(number) for number in numbers)
            )
        console.print(shown)
    for line in words(found):
        console.print(line, soft_wrap=True, markup=False)


def _shown(value: str) -> str:
    """A site's word, as a terminal may have it."""
    from rich.markup import escape

    from locum.server.site_states import plain

    return escape(plain(value))


#: With more sites only the sums are shown.
_MOST_COLUMNS = 8


def _total(cell: Cell) -> str:
    """A sum, and how much more there can be."""
    missing = sum(number is None for number in cell.sites.values())
    return f"{cell.least}" if not missing else f"≥ {cell.least} ({missing} not told)"


def words(found: Result) -> list[str]:
    """Who has answered, who not, and what a number that is not there means."""
    lines = [f"question {found.question.digest[:12]}: {len(found.answers)} sites have answered"]
    if found.refused:
        lines.append(f"refused: {', '.join(f'{site} ({clause})' for site, clause in sorted(found.refused.items()))}")
    if found.silent and found.question.until <= time.time():
        lines.append(f"silent: {', '.join(found.silent)}; the question is closed: another `edition` of it asks again")
    elif found.silent:
        lines.append(f"silent: {', '.join(found.silent)}; locum cohort --show {found.question.digest[:12]} looks again")
    least = sorted({answer.least_cell for answer in found.answers.values()})
    if least:
        cells = " or ".join(map(str, least))
        lines.append(f"not told: fewer than {cells} patients, none included, or a number from which such a one follows")
    return lines
