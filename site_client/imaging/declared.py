"""What a site declares of its data beside the images, kept in the catalog at each ingest.

An agent knows its stores, and the site file only if it is its own; so what the file says is noted where the images are.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from locum.common.canonical import digest
from locum.site_client.imaging import consent
from locum.site_client.imaging.catalog import FILE_NAME, Catalog, read_meta, write_meta
from locum.site_client.imaging.reasons import Reason
from locum.site_client.imaging.sources import SiteData
from locum.site_client.imaging.terminology import Terminology

_CONSENT, _TERMINOLOGY = "consent", "terminology"


@dataclass(frozen=True)
class Declared:
    """What the last ingest noted, and found, beside the images.

    Attributes:
        consent: whether the site keeps a list of withdrawn consent.
        withdrawn: how many patients with images here are on it.
        terminology: the digest of the site's map; empty without one.
        codes: class to the standard codes that mean it.
        unmapped: local codes that are mapped to nothing, with how many images have them.
        quarantined: reason to number of files.
    """

    consent: bool = False
    withdrawn: int = 0
    terminology: str = ""
    codes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    unmapped: Mapping[str, int] = field(default_factory=dict)
    quarantined: Mapping[str, int] = field(default_factory=dict)


def note(connection: sqlite3.Connection, site: SiteData) -> None:
    """Writes down what a site file declares; raises DataError if the terminology map cannot be read."""
    terms = None if site.terminology is None else Terminology.load(site.terminology)
    with connection:
        write_meta(connection, _CONSENT, site.consent is not None)
        known = {} if terms is None else {"digest": terms.digest, "codes": terms.codes_by_class()}
        write_meta(connection, _TERMINOLOGY, known)


def declared(stores: Iterable[Path]) -> Declared:
    """What was noted; of several stores together.

    Raises:
        DataError: a catalog cannot be read, or its last ingest did not finish.
    """
    found = [_of_store(store) for store in stores if not store.is_dir() or (store / FILE_NAME).is_file()]
    maps = sorted({one.terminology for one in found if one.terminology})
    codes: dict[str, set[str]] = {}
    for one in found:
        for name, known in one.codes.items():
            codes.setdefault(name, set()).update(known)
    return Declared(
        consent=bool(found) and all(one.consent for one in found),
        withdrawn=sum(one.withdrawn for one in found),
        terminology="" if not maps else maps[0] if len(maps) == 1 else digest(maps),
        codes={name: tuple(sorted(known)) for name, known in codes.items()},
        unmapped=_added(one.unmapped for one in found),
        quarantined=_added(one.quarantined for one in found),
    )


def _of_store(store: Path) -> Declared:
    with closing(Catalog.open(store)) as catalog:
        connection = catalog.connection
        terms = read_meta(connection, _TERMINOLOGY, {})
        unmapped = connection.execute(
            "SELECT detail, count(*) FROM units WHERE reason = ? GROUP BY detail ORDER BY detail",
            (Reason.UNMAPPED_CODE,),
        )
        return Declared(
            consent=bool(read_meta(connection, _CONSENT, False)),
            withdrawn=consent.withdrawn_patients(connection),
            terminology=terms.get("digest", ""),
            codes={name: tuple(codes) for name, codes in terms.get("codes", {}).items()},
            unmapped=dict(unmapped.fetchall()),
            quarantined=catalog.counts().quarantined,
        )


def _added(numbers: Iterable[Mapping[str, int]]) -> dict[str, int]:
    found: dict[str, int] = {}
    for one in numbers:
        for name, count in one.items():
            found[name] = found.get(name, 0) + count
    return dict(sorted(found.items()))
