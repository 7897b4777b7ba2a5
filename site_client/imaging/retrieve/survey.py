"""What a query names at a PACS, counted before anything is fetched.

Rules:
  * It asks and fetches nothing; it tells numbers, no names.
  * What it counts is what `retrieve` in `pacs.py` would fetch, by the same comparisons.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from time import sleep as wait
from typing import Any

from locum.common.errors import LocumError
from locum.site_client.imaging.retrieve.pacs import opened, patiently
from locum.site_client.imaging.retrieve.peer import Pacs, SeriesError
from locum.site_client.imaging.retrieve.query import accession_numbers, has_kind, named
from locum.site_client.imaging.sources import PacsSource


@dataclass
class Survey:
    """What one PACS says.

    Attributes:
        pacs: its name.
        rate: instances a second that the site file allows.
        problem: why it cannot be asked, and `remedy` what to do; empty if it can.
        studies: those that the query names, and of them `uncounted` without a number of images.
        series, images: by modality.
        unstated: series that do not say their modality or body part although the query asks for it: their images are
            fetched and asked themselves.
        unlisted: studies of which the series cannot be listed.
        nowhere: accession numbers of the list that name no study.
    """

    pacs: str
    rate: float
    problem: str = ""
    remedy: str = ""
    studies: int = 0
    uncounted: int = 0
    unstated: int = 0
    unlisted: int = 0
    nowhere: int = 0
    series: Counter[str] = field(default_factory=Counter)
    images: Counter[str] = field(default_factory=Counter)

    @property
    def seconds(self) -> float:
        """How long a retrieval of all of it takes at least."""
        return self.images.total() / self.rate

    def as_dict(self) -> dict[str, Any]:
        """For a machine."""
        plain = {name: value for name, value in vars(self).items() if not isinstance(value, Counter)}
        by_modality = {name: dict(sorted(getattr(self, name).items())) for name in ("series", "images")}
        return {**plain, **by_modality, "seconds": round(self.seconds, 1)}


def survey(source: PacsSource, sleep: Callable[[float], object] = wait) -> Survey:
    """Ask a PACS what the query of its source names; what goes wrong is told in `problem`."""
    with closing(opened(source)) as pacs:
        found = Survey(pacs.name.removeprefix("the PACS "), source.rate)
        try:
            pacs.greet()
            _count(pacs, source, found, sleep)
        except LocumError as error:
            found.problem, found.remedy = error.message, error.remedy
    return found


def _count(pacs: Pacs, source: PacsSource, found: Survey, sleep: Callable[[float], object]) -> None:
    query = source.query
    studies = patiently(lambda: named(query, pacs.studies(query)), sleep)
    if query.accessions is not None:
        found.nowhere = len(set(accession_numbers(query.accessions)) - {study.asked for study in studies})
    for study in studies:
        try:
            every = patiently(lambda study=study: pacs.series(study), sleep)  # type: ignore[misc]
        except SeriesError:
            found.unlisted += 1
            continue
        wanted = [series for series in every if has_kind(query, series)]
        found.studies += bool(wanted)
        found.uncounted += any(series.said is None for series in wanted)
        for series in wanted:
            found.series[series.modality] += 1
            found.images[series.modality] += series.said or 0
            found.unstated += (bool(query.modalities) and not series.modality) or (
                bool(query.body_parts) and not series.body_part
            )
