"""How far the readers of a store's images agree, from what the site file says of them.

Rules:
  * The store's images are gone through one by one; nothing in it is changed but `agreement.json`.
  * Of labels every image counts, also those that are in quarantine because their readers do not agree; of masks those
    that are stored, for only they have a grid.
  * An image whose readers cannot be read counts as refused, by reason, and stops nothing.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol, cast

import nibabel
import numpy as np

from locum.common.errors import DataError
from locum.site_client.imaging.catalog import Catalog
from locum.site_client.imaging.grids import Volume
from locum.site_client.imaging.items import Unit, kept_path
from locum.site_client.imaging.keys import Keys
from locum.site_client.imaging.known import Known
from locum.site_client.imaging.labels.agreement import LabelAgreement, MaskAgreement
from locum.site_client.imaging.labels.given import Annotation
from locum.site_client.imaging.labels.opening import label_source, mask_source
from locum.site_client.imaging.labels.readers import by_reader
from locum.site_client.imaging.labels.tables import Named
from locum.site_client.imaging.reasons import RefusedError
from locum.site_client.imaging.sources import Labels, ObjectMasks, PacsSource, SiteData, label_rows
from locum.site_client.imaging.store import Draft, exclusive
from locum.site_client.imaging.terminology import Terminology, labelled

FILE_NAME = "agreement.json"

_UNITS = "SELECT key, source, known, file FROM units WHERE NOT elsewhere ORDER BY key"
_MASKED = (
    "SELECT units.key, units.source, units.known, units.file, cases.image FROM units"
    " JOIN cases ON cases.unit = units.key WHERE cases.mask IS NOT NULL ORDER BY units.key"
)


class LabelReaders(Protocol):
    """A source of labels that knows who gave them."""

    def readings(self, unit: Unit) -> dict[str, str]:
        """The class that each reader gave a unit; raises RefusedError."""
        ...


class MaskReaders(Protocol):
    """A source of masks that knows who drew them."""

    def readings(self, unit: Unit, image: Volume) -> dict[str, Volume]:
        """What each reader drew on the grid of a unit's image; raises RefusedError."""
        ...


def measure(site: SiteData, store: Path, keys: Keys) -> dict[str, Any]:
    """The agreement of labels and of masks of a store, each None if the site has one reader of them; `at` is now.

    It is written to `agreement.json` beside the catalog as well; names of readers stand in it.

    Raises:
        DataError: there is no catalog, or the site file names no several readers.
    """
    labels, masks = getattr(site.labels, "consensus", None), getattr(site.masks, "consensus", None)
    if labels is None and masks is None:
        raise DataError(
            "this site file has one reader of each image", "set consensus for labels or masks: see docs/labels.md"
        )
    with closing(Catalog.open(store)) as catalog:
        found = {
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
            "labels": _labels(site, keys, catalog) if labels else None,
            "masks": _masks(site, keys, catalog, store) if masks else None,
        }
    with exclusive(store):
        draft = Draft(store)
        draft.write(FILE_NAME, json.dumps(found, indent=1).encode())
        draft.publish()
    return found


def _labels(site: SiteData, keys: Keys, catalog: Catalog) -> dict[str, Any] | None:
    readers = _label_readers(site, keys, catalog)
    if readers is None:
        return None
    agreement, refused = LabelAgreement(), Counter[str]()
    for key, number, known, file in catalog.connection.execute(_UNITS):
        with _counted(refused):
            agreement.add(readers.readings(Unit(key, number, (), Known.from_json(known), file)))
    return {**agreement.summary(), "refused": dict(refused)}


def _label_readers(site: SiteData, keys: Keys, catalog: Catalog) -> LabelReaders | None:
    if isinstance(site.labels, Labels):
        return TableReaders(site.labels, keys, Terminology.load(site.terminology) if site.terminology else None)
    source = label_source(site, keys, _annotations(site, catalog))
    return cast("LabelReaders", source) if hasattr(source, "readings") else None


class TableReaders:
    """The readers of a table of labels."""

    def __init__(self, labels: Labels, keys: Keys, terms: Terminology | None) -> None:
        self._labels = labels
        self._terms = terms
        self._named = Named(labels, label_rows(labels), keys)

    def readings(self, unit: Unit) -> dict[str, str]:
        """The class that each reader gave a unit; raises RefusedError (unmapped_code, conflicting_labels)."""
        column, labels = self._labels.reader_column or "", self._labels
        return by_reader(
            (row.cells[column], labelled(row.cells[labels.label_column], labels.classes, self._terms).name)
            for row in self._named.of(unit)
        )


def _masks(site: SiteData, keys: Keys, catalog: Catalog, store: Path) -> dict[str, Any] | None:
    source = mask_source(site, keys, _annotations(site, catalog))
    if not hasattr(source, "readings"):
        return None
    readers, agreement, refused = cast("MaskReaders", source), MaskAgreement(), Counter[str]()
    for key, number, known, file, image in catalog.connection.execute(_MASKED):
        with _counted(refused):
            unit = Unit(key, number, (), Known.from_json(known), file)
            agreement.add(readers.readings(unit, _grid(store / image)))
    return {**agreement.summary(), "names": _names(site), "refused": dict(refused)}


@contextmanager
def _counted(refused: Counter[str]) -> Iterator[None]:
    try:
        yield
    except RefusedError as error:
        refused[str(error.reason)] += 1


def _names(site: SiteData) -> dict[str, list[str]]:
    """Value of a mask to what the site file calls it."""
    named: dict[str, list[str]] = {}
    if isinstance(site.masks, ObjectMasks):
        for name, value in site.masks.segments.items():
            named.setdefault(str(value), []).append(name)
    return named


def _annotations(site: SiteData, catalog: Catalog) -> list[Annotation]:
    rows = catalog.connection.execute(
        "SELECT source, path, size, sop_class, known FROM items WHERE annotation ORDER BY name"
    )
    return [
        Annotation(
            kept_path(path), size, sop_class, isinstance(site.sources[source], PacsSource), Known.from_json(known)
        )
        for source, path, size, sop_class, known in rows
    ]


def _grid(path: Path) -> Volume:
    """The grid of a stored image, without its voxels."""
    image = nibabel.load(path)
    return Volume(np.broadcast_to(np.uint8(0), image.shape), np.asarray(image.affine, dtype=np.float64))
