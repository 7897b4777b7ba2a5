"""What is known of each site's data: what became of its files, its cases per fold and class, its scanners.

A simulation asks its sites itself: a coordinator knows only what they release.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from locum.common.plan import Fold, Plan
from locum.server.report_words import many
from locum.site_client.imaging.catalog import FILE_NAME, Catalog, Counts, Facts
from locum.site_client.imaging.reasons import SENTENCE, Reason


@dataclass(frozen=True)
class Quarantined:
    """Files that were left out for one reason: how many, at which sites, and what the reason means."""

    reason: str
    sentence: str
    by_site: Mapping[str, int]

    @property
    def files(self) -> int:
        """Files of all sites."""
        return sum(self.by_site.values())


@dataclass(frozen=True)
class SiteData:
    """The data of one site.

    Attributes:
        emulated: whether the simulation made this hospital and its images.
        folds: cases that fit the plan's contract, by fold; empty if not known.
        labels: cases in the store by class; empty in segmentation, or if there is no catalog.
        scanners: each maker and model with its number of cases.
        spacing: the range of voxel spacings in mm, in words.
    """

    site: str
    counts: Counts
    emulated: bool
    folds: Mapping[Fold, int] = field(default_factory=dict)
    labels: Mapping[str, int] = field(default_factory=dict)
    scanners: tuple[str, ...] = ()
    spacing: str = ""

    @property
    def quarantined(self) -> int:
        """Files that were left out."""
        return sum(self.counts.quarantined.values())

    @property
    def unfit(self) -> int:
        """Cases that do not fit the plan's contract."""
        return self.counts.cases - sum(self.folds.values()) if self.folds else 0


def data_of(
    folder: Path, plan: Plan, counts: Mapping[str, Counts], folds: Mapping[str, Mapping[Fold, int]]
) -> list[SiteData]:
    """The data of every site, by name, with the catalogs under `sites/`; raises DataError if one is damaged."""
    return [
        _site(site, plan, found, folder / "sites" / site, folds.get(site, {})) for site, found in sorted(counts.items())
    ]


def quarantined(data: list[SiteData]) -> list[Quarantined]:
    """Every reason for which files were left out, the most frequent first."""
    reasons = sorted({reason for site in data for reason in site.counts.quarantined})
    found = [
        Quarantined(
            reason.replace("_", " "),
            SENTENCE[Reason(reason)],
            {site.site: files for site in data if (files := site.counts.quarantined.get(reason, 0))},
        )
        for reason in reasons
    ]
    return sorted((item for item in found if item.files), key=lambda item: -item.files)


def asked_words(folder: Path) -> dict[str, str]:
    """What the simulation was asked for (`simulation.json`), a topic to a line; empty if the folder does not say."""
    path = folder / "simulation.json"
    asked: dict[str, Any] = json.loads(path.read_bytes()) if path.is_file() else {}
    topics = {"engine": "Engine", "sites": "Emulated sites asked for", "sites_file": "Sites file"}
    return {topic: Path(str(asked[key])).name for key, topic in topics.items() if asked.get(key) is not None}


def _site(site: str, plan: Plan, counts: Counts, folder: Path, folds: Mapping[Fold, int]) -> SiteData:
    emulated = (folder / "raw").is_dir()
    if not (folder / "store" / FILE_NAME).is_file():
        return SiteData(site, counts, emulated, folds)
    with closing(Catalog.open(folder / "store")) as catalog:
        facts = tuple(catalog.facts())
        labels = Counter(case.label for case in catalog.cases(plan.contract.split.fractions) if case.label is not None)
    ordered = {name: labels[name] for name in plan.contract.classes if name in labels}
    return SiteData(site, counts, emulated, folds, ordered, _scanners(facts), _spacing(facts))


def _scanners(facts: tuple[Facts, ...]) -> tuple[str, ...]:
    found = Counter(fact.scanner or "not stated" for fact in facts)
    return tuple(f"{name} ({many(count, 'case')})" for name, count in found.most_common(4))


def _spacing(facts: tuple[Facts, ...]) -> str:
    """The spacing along each axis: one number, or the least and the most."""
    axes = list(zip(*(fact.spacing for fact in facts if len(fact.spacing) == len(facts[0].spacing)), strict=True))
    ranges = [(f"{min(axis):.3g}", f"{max(axis):.3g}") for axis in axes]
    return " × ".join(low if low == high else f"{low}–{high}" for low, high in ranges) + (" mm" if ranges else "")
