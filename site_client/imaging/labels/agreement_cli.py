"""`locum site agreement`: how far several readers of the same images agree."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from locum.site_client.options import Json


def agreement(
    site: Annotated[
        Path, typer.Argument(metavar="SITE.yaml", show_default=False, help="Where the images and labels are.")
    ],
    store: Annotated[Path, typer.Option("--store", metavar="DIR", help="The folder of volumes and catalog.")],
    key_file: Annotated[
        Path | None, typer.Option("--key-file", help="The site's secret key; split.key in the store if absent.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show how far several readers agree: kappa of labels, Dice of masks, each reader's sensitivity by STAPLE."""
    # The imaging libraries take most of a second to load: not for `--help`.
    from rich.console import Console
    from rich.table import Table

    from locum.site_client.configuration import read_data
    from locum.site_client.imaging.keys import load_or_create_keys
    from locum.site_client.imaging.labels.measuring import FILE_NAME, measure

    found = measure(read_data(site), store, load_or_create_keys(key_file or store / "split.key"))
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    console = Console()
    for title, head, rows in _tables(found):
        table = Table(*head, title=title)
        for row in rows:
            table.add_row(*row)
        console.print(table)
    console.print(f"written to {store / FILE_NAME}", soft_wrap=True, markup=False)


def _tables(found: Mapping[str, Any]) -> Iterator[tuple[str, tuple[str, ...], Sequence[tuple[str, ...]]]]:
    labels, masks = found["labels"], found["masks"]
    if labels is not None:
        title = f"labels: {labels['images']} images, {labels['readers']} readers{_refused(labels)}"
        kappas = {"all": labels["kappa"], **labels["classes"]}
        kind = f"kappa ({labels['statistic'].capitalize()})"
        yield title, ("class", kind), [(str(name), _figure(kappa)) for name, kappa in kappas.items()]
    if masks is not None:
        title = f"masks: {masks['images']} images{_refused(masks)}"
        yield title, ("structure", "reader", "Dice", "least", "sensitivity", "specificity"), list(_mask_rows(masks))


def _mask_rows(masks: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    for value, structure in masks["structures"].items():
        name = ", ".join(masks["names"].get(value, [value]))
        yield name, f"{structure['pairs']} pairs", _figure(structure["dice"]), _figure(structure["least_dice"]), "", ""
        for reader, rates in structure["readers"].items():
            yield "", reader, "", "", _figure(rates["sensitivity"]), _figure(rates["specificity"])


def _refused(part: Mapping[str, Any]) -> str:
    return "".join(f", {number} refused ({reason})" for reason, number in part["refused"].items())


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
