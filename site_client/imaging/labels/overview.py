"""What a site's labels hold, before or after an ingest: for the person who has to put them right.

Rules:
  * Codes and classes are counted, and nothing is left out: what has no class is listed with its number.
  * A conflict is told by its lines, never by the name of the image, and no text of a report is in it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from locum.common.errors import DataError
from locum.site_client.imaging.catalog import Catalog
from locum.site_client.imaging.keys import Keys
from locum.site_client.imaging.labels.fhir import FhirBook
from locum.site_client.imaging.labels.reports import ReportBook, keep
from locum.site_client.imaging.reasons import Reason, RefusedError
from locum.site_client.imaging.sheets import Conflict, conflicts
from locum.site_client.imaging.sources import FhirLabels, Labels, ReportLabels, SiteData, label_rows
from locum.site_client.imaging.terminology import Terminology, labelled

#: The reasons for quarantine that lie in the labels.
_OF_LABELS = (Reason.NO_LABEL, Reason.UNMAPPED_CODE, Reason.CONFLICTING_LABELS, Reason.UNCERTAIN_LABEL)
NO_REVIEW = (
    "no sample of the reports was reviewed: nobody knows how often the rules are right. Draw one with --sample 200, "
    "fill its column 'label', and name it as labels.reviewed"
)


@dataclass(frozen=True)
class Overview:
    """What a site's labels hold.

    Attributes:
        kind: table, reports, fhir or sr.
        counted: of what the numbers are: lines, reports, coded resources, or images.
        classes: class to number.
        unmapped: code that has no class to number; `meanings` has its words where the data have some.
        resources: of FHIR, by type.
        conflicts: lines that give one image different labels.
        review: of reports, how the rules did on the reviewed sample.
        terminology: name, version, digest and codes by class of the site's map.
        quarantined: reason to number of files, of an ingest; None without a store.
        without_image: 'file name:line' of what names no image, of an ingest; None without a store.
        warnings: what the steward should know.
    """

    kind: str
    counted: str
    classes: Mapping[str, int] = field(default_factory=dict)
    unmapped: Mapping[str, int] = field(default_factory=dict)
    meanings: Mapping[str, str] = field(default_factory=dict)
    resources: Mapping[str, int] = field(default_factory=dict)
    conflicts: tuple[Conflict, ...] = ()
    review: Mapping[str, Any] | None = None
    terminology: Mapping[str, Any] | None = None
    quarantined: Mapping[str, int] | None = None
    without_image: tuple[str, ...] | None = None
    warnings: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


def overview(site: SiteData, keys: Keys, store: Path | None = None) -> Overview:
    """What the labels of a site file hold; with a store also what an ingest made of them.

    Raises:
        DataError: the site has no labels, or they are not as described; the store holds no catalog.
    """
    terms = Terminology.load(site.terminology) if site.terminology is not None else None
    stored: dict[str, Any] = {} if store is None else _stored(store)
    found = _read(site, keys, terms, store)
    if found is None:
        if store is None:
            raise DataError("labels of the kind sr are read at ingest", "name the store: --store DIR")
        found = {"kind": "sr", "counted": "images", "classes": stored["labels"], "unmapped": stored["unmapped"]}
    stored = {name: value for name, value in stored.items() if name not in {"labels", "unmapped"}}
    return Overview(**found, **stored, terminology=None if terms is None else _of_map(terms))


def _read(site: SiteData, keys: Keys, terms: Terminology | None, store: Path | None) -> dict[str, Any] | None:
    if site.labels is None:
        raise DataError(f"the site {site.name} names no labels", "add labels to the site file")
    if isinstance(site.labels, Labels):
        return _of_table(site.labels, terms)
    if isinstance(site.labels, ReportLabels):
        return _of_reports(ReportBook(site.labels, keys, terms), store)
    return _of_fhir(FhirBook(site.labels, keys, terms)) if isinstance(site.labels, FhirLabels) else None


def _of_table(labels: Labels, terms: Terminology | None) -> dict[str, Any]:
    rows = label_rows(labels)
    classes: Counter[str] = Counter()
    unmapped: Counter[str] = Counter()
    for code, number in Counter(row.cells[labels.label_column] for row in rows).items():
        try:
            classes[labelled(code, labels.classes, terms).name] += number
        except RefusedError:
            unmapped[code] += number
    differ = () if labels.reader_column is not None else conflicts(rows, labels.key_column, labels.label_column)
    return {
        "kind": "table",
        "counted": "lines",
        "classes": dict(classes),
        "unmapped": dict(unmapped),
        "conflicts": differ,
    }


def _of_reports(book: ReportBook, store: Path | None) -> dict[str, Any]:
    review = book.review()
    if store is not None:
        keep(book, store)
    told = {"review": None, "warnings": (NO_REVIEW,)} if review is None else {"review": review.as_dict()}
    return {"kind": "reports", "counted": "reports", "classes": dict(book.tally())} | told


def _of_fhir(book: FhirBook) -> dict[str, Any]:
    read = book.summary
    meanings = {code: read.meanings.get(code, "") for code in read.unmapped}
    return {
        "kind": "fhir",
        "counted": "coded resources",
        "classes": dict(read.classes),
        "unmapped": dict(read.unmapped),
        "resources": dict(read.resources),
        "meanings": meanings,
    }


def _of_map(terms: Terminology) -> dict[str, Any]:
    return {"name": terms.name, "version": terms.version, "digest": terms.digest, "codes": terms.codes_by_class()}


def _stored(store: Path) -> dict[str, Any]:
    with closing(Catalog.open(store)) as catalog:
        counts = catalog.counts()
        labels = Counter(facts.label for facts in catalog.facts() if facts.label is not None)
        unmapped = Counter(
            detail for _, reason, detail in catalog.quarantine() if detail and reason == Reason.UNMAPPED_CODE
        )
        return {
            "quarantined": {
                reason: counts.quarantined[reason] for reason in _OF_LABELS if reason in counts.quarantined
            },
            "without_image": catalog.unmatched_lines(),
            "labels": dict(labels),
            "unmapped": dict(unmapped),
        }
