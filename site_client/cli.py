"""`locum site`: what a hospital does with its own images.

Errors with a remedy are printed by the `locum` command; nothing here catches them.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from locum.common.errors import DataError

if TYPE_CHECKING:
    from locum.site_client.imaging import ingest as imaging
    from locum.site_client.imaging.catalog import Catalog, Counts

app = typer.Typer(help="At a hospital: ingest images, look at the catalog.", no_args_is_help=True, add_completion=False)

_SITE_HELP = "A site.yaml: where the images and labels are."
_SiteFile = Annotated[Path, typer.Argument(metavar="SITE.yaml", show_default=False, help=_SITE_HELP)]
_Store = Annotated[Path, typer.Option("--store", metavar="DIR", help="The folder of volumes and catalog.")]
_KeyFile = Annotated[
    Path | None,
    typer.Option("--key-file", help="The site's secret key; drawn and kept in the store as split.key if absent."),
]
_Json = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]

#: The split that `catalog` shows; a plan states its own.
_SPLIT = (0.8, 0.1, 0.1)


@app.command()
def ingest(site: _SiteFile, store: _Store, key_file: _KeyFile = None, as_json: _Json = False) -> None:
    """Bring the store up to date: read, check, convert and catalogue the site's images."""
    # The imaging libraries take most of a second to load: not for `--help`.
    from locum.site_client.imaging.ingest import ingest as run
    from locum.site_client.imaging.keys import load_or_create_key
    from locum.site_client.imaging.sources import load_site

    data = load_site(site)
    key = load_or_create_key(key_file or store / "split.key")
    with _bars(visible=not as_json) as tell:
        counts = run(data, store, key=key, progress=tell)
    if counts.found == 0:
        raise DataError(f"no file was found in the sources of {site}", "check the paths in the site file")
    _print_ingest(counts, store, as_json=as_json)


@app.command()
def catalog(
    store: _Store,
    as_json: _Json = False,
    quarantine: Annotated[bool, typer.Option("--quarantine", help="List every item in quarantine, and why.")] = False,
) -> None:
    """Show what the store holds: counts, folds, labels, and makes of scanners."""
    from locum.site_client.imaging.catalog import Catalog

    with closing(Catalog.open(store)) as opened:
        summary = _summary(opened)
        counts = opened.counts()
        held = opened.quarantine() if quarantine else ()
    if as_json:
        listed = {"quarantine": [list(item) for item in held]} if quarantine else {}
        typer.echo(json.dumps(counts.as_dict() | summary | listed, indent=2))
        return
    console = Console()
    console.print(_counts_table(counts))
    for title, rows in summary.items():
        console.print(_two_columns(title, rows))
    for name, reason, detail in held:
        console.print(f"{name}: {reason}{f' ({detail})' if detail else ''}", soft_wrap=True, markup=False)


@contextmanager
def _bars(*, visible: bool) -> Iterator[Callable[[imaging.Progress], None]]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not visible) as bars:
        tasks = {stage: bars.add_task(stage, total=None, visible=False) for stage in ("reading", "storing")}

        def tell(progress: imaging.Progress) -> None:
            bars.update(tasks[progress.stage], completed=progress.done, total=progress.total, visible=True)

        yield tell


def _print_ingest(counts: Counts, store: Path, *, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(counts.as_dict(), indent=2))
        return
    console = Console()
    console.print(_counts_table(counts))
    if counts.labels_without_image:
        console.print(f"{counts.labels_without_image} lines of the tables name no image of this site")
    console.print(f"next: locum site catalog --store {store}", soft_wrap=True)


def _counts_table(counts: Counts) -> Table:
    from locum.site_client.imaging.reasons import SENTENCE, Reason

    table = Table("", "files", "meaning", title=f"{counts.cases} cases")
    table.add_row("found", str(counts.found), "")
    table.add_row("stored", str(counts.stored), "")
    for reason, number in counts.quarantined.items():
        table.add_row(reason, str(number), SENTENCE[Reason(reason)], style="yellow")
    return table


def _summary(opened: Catalog) -> dict[str, dict[str, int]]:
    cases, facts = opened.cases(_SPLIT), opened.facts()
    return {
        "folds": _sorted(Counter(case.fold for case in cases)),
        "patients": _sorted(Counter({case.patient: case.fold for case in cases}.values())),
        "labels": _sorted(Counter(case.label or "none" for case in cases)),
        "scanners": _sorted(Counter(fact.scanner for fact in facts)),
    }


def _sorted(counter: Counter[Any]) -> dict[str, int]:
    return {str(name): counter[name] for name in sorted(counter)}


def _two_columns(title: str, rows: dict[str, int]) -> Table:
    table = Table(title, "number")
    for name, number in rows.items():
        table.add_row(name or "unknown", str(number))
    return table
