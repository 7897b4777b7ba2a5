"""`locum site pacs`: does the PACS let this site in, and what does the query name there?"""

from __future__ import annotations

import json
import logging
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from locum.common.errors import DataError
from locum.site_client.options import Json

if TYPE_CHECKING:
    from locum.site_client.imaging.retrieve.survey import Survey

_SiteFile = Annotated[
    Path,
    typer.Argument(
        metavar="SITE.yaml", show_default=False, help="A site.yaml with a source of kind dicomweb or dimse."
    ),
]


def pacs(site: _SiteFile, as_json: Json = False) -> None:
    """Ask the site's PACSs what the queries name; fetch nothing. Ends with 1 if one refuses, or names nothing."""
    from locum.site_client.configuration import read_data
    from locum.site_client.imaging.retrieve.survey import survey
    from locum.site_client.imaging.sources import PacsSource

    for library in ("pynetdicom", "pydicom"):
        logging.getLogger(library).setLevel(logging.CRITICAL)  # they quote; what is wrong is told in our words
    warnings.simplefilter("ignore")
    sources = [source for source in read_data(site).sources if isinstance(source, PacsSource)]
    if not sources:
        raise DataError(f"{site} has no PACS among its sources", "add a source of kind dicomweb or dimse")
    surveys = []
    for source in sources:
        surveys.append(survey(source))
        if not as_json:
            _print(surveys[-1])
    if as_json:
        typer.echo(json.dumps({"pacs": [found.as_dict() for found in surveys]}, indent=2))
    if any(found.problem or not found.studies for found in surveys):
        raise typer.Exit(1)


def _print(found: Survey) -> None:
    console = Console()
    if found.problem:
        console.print(f"{found.pacs}: {found.problem}", soft_wrap=True, markup=False, highlight=False)
        console.print(f"next: {found.remedy}", soft_wrap=True, markup=False, highlight=False)
        return
    table = Table("modality", "series", "images", title=f"{found.pacs}: {found.studies} studies")
    for modality, number in sorted(found.series.items()):
        table.add_row(modality or "not stated", str(number), str(found.images[modality]))
    console.print(table)
    for line in _remarks(found):
        console.print(line, soft_wrap=True, markup=False, highlight=False)


def _remarks(found: Survey) -> list[str]:
    said = {
        "accession numbers of the list name no study": found.nowhere,
        "studies have series without a number of images: they are counted one by one": found.uncounted,
        "series do not say their modality or body part: their images are asked when they come": found.unstated,
        "studies do not list their series: they stay incomplete": found.unlisted,
    }
    remarks = [f"{number} {words}" for words, number in said.items() if number]
    if not found.studies:
        return [*remarks, "next: check the query in the site file"]
    minutes, seconds = divmod(round(found.seconds), 60)
    return [*remarks, f"at {found.rate:g} images a second: {minutes} min {seconds} s at least"]
