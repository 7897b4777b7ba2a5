"""`locum site labels`: what a site's labels hold, and a sample of reports to review."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from locum.common.errors import DataError
from locum.site_client.options import Json

if TYPE_CHECKING:
    from locum.site_client.imaging.keys import Keys
    from locum.site_client.imaging.labels.overview import Overview

_Table = tuple[str, tuple[str, ...], Sequence[tuple[str, ...]]]
#: Of a long list the screen shows so many; --json has all.
_SHOWN = 20


def labels(
    site: Annotated[
        Path, typer.Argument(metavar="SITE.yaml", show_default=False, help="Where the images and labels are.")
    ],
    store: Annotated[
        Path | None, typer.Option("--store", metavar="DIR", help="The folder of volumes and catalog, after an ingest.")
    ] = None,
    key_file: Annotated[
        Path | None, typer.Option("--key-file", help="The site's secret key; split.key in the store if absent.")
    ] = None,
    sample: Annotated[
        int | None, typer.Option("--sample", min=1, metavar="N", help="Draw so many reports to review, into --out.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE.csv", help="Where the sample goes.")] = None,
    as_json: Json = False,
) -> None:
    """Show what the labels hold: classes, codes without a class, conflicts, how far report rules are right."""
    # The imaging libraries take most of a second to load: not for `--help`.
    from locum.site_client.configuration import read_data
    from locum.site_client.imaging.labels.overview import overview

    data = read_data(site)
    if (sample is None) != (out is None):
        raise typer.BadParameter("--sample and --out belong together")
    if sample is not None and out is not None:
        _draw(data.labels, _keys(store, key_file, needed=True), sample, out)
        return
    found = overview(data, _keys(store, key_file, needed=False), store)
    if as_json:
        typer.echo(json.dumps(found.as_dict(), indent=2))
        return
    _print(found)


def _keys(store: Path | None, key_file: Path | None, *, needed: bool) -> Keys:
    from locum.site_client.imaging.keys import KEY_BYTES, Keys, load_or_create_keys

    file = key_file or (None if store is None else store / "split.key")
    if file is not None:
        return load_or_create_keys(file)
    if needed:
        raise DataError(
            "a sample is drawn with the site's key", "name the store, or the key: --store DIR or --key-file"
        )
    # Nothing that is shown depends on the key.
    return Keys.of(secrets.token_bytes(KEY_BYTES))


def _draw(given: object, keys: Keys, number: int, out: Path) -> None:
    from locum.site_client.imaging.labels.reports import LABEL, ReportBook, write_sample
    from locum.site_client.imaging.sources import ReportLabels

    if not isinstance(given, ReportLabels):
        raise DataError("only the text of reports has a sample to review", "leave --sample out")
    write_sample(ReportBook(given, keys).sample(number), out)
    typer.echo(f"{out} holds report text: keep it where patient data may be")
    typer.echo(f"next: fill the column '{LABEL}', and name the file as labels.reviewed in the site file")


def _print(found: Overview) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for title, head, rows in _tables(found):
        table = Table(*head, title=title)
        for row in rows[:_SHOWN]:
            table.add_row(*row)
        console.print(table)
        if len(rows) > _SHOWN:
            console.print(f"and {len(rows) - _SHOWN} more: --json lists all")
    if found.without_image is not None:
        told = ", ".join(found.without_image[:_SHOWN])
        console.print(
            f"{len(found.without_image)} name no image{': ' + told if told else ''}", soft_wrap=True, markup=False
        )
    for warning in found.warnings:
        console.print(f"warning: {warning}", style="yellow", soft_wrap=True, markup=False)


def _tables(found: Overview) -> Iterator[_Table]:
    yield "labels", ("class", found.counted), [(name, str(count)) for name, count in sorted(found.classes.items())]
    if found.unmapped:
        rows = [
            (code, str(count), found.meanings.get(code, ""))
            for code, count in sorted(found.unmapped.items(), key=lambda pair: (-pair[1], pair[0]))
        ]
        yield "codes without a class", ("code", "number", "meaning"), rows
    if found.conflicts:
        differ = [(", ".join(map(str, each.lines)), ", ".join(each.labels)) for each in found.conflicts]
        yield "different labels of one image", ("lines", "labels"), differ
    if found.review is not None:
        title = f"rules on {found.review['reports']} reviewed reports, {found.review['uncertain']} of them uncertain"
        head = ("class", "precision", "95 %", "recall", "95 %", "right", "wrong", "missed")
        yield title, head, [_measured(name, each) for name, each in found.review["classes"].items()]
    if found.terminology is not None:
        title = f"map: {found.terminology['name']} {found.terminology['version']}, {found.terminology['digest'][:16]}"
        yield title, ("class", "codes"), [(name, ", ".join(each)) for name, each in found.terminology["codes"].items()]
    if found.quarantined:
        yield (
            "in quarantine for their label",
            ("reason", "files"),
            [(reason, str(count)) for reason, count in found.quarantined.items()],
        )


def _measured(name: str, each: Mapping[str, Any]) -> tuple[str, ...]:
    rates = [
        cell for rate in ("precision", "recall") for cell in (_share(each[rate]), _range(each[f"{rate}_interval"]))
    ]
    return name, *rates, str(each["right"]), str(each["wrong"]), str(each["missed"])


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _range(interval: Sequence[float] | None) -> str:
    return "-" if interval is None else f"{interval[0]:.2f}\u2013{interval[1]:.2f}"
