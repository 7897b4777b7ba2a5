"""Patients who have withdrawn their consent: the site's own list, and what follows from it.

Rules:
  * The list is text with one patient ID a line, UTF-8 with or without a byte-order mark; blank lines and lines that
    begin with # say nothing. A line that can be no patient ID stops the ingest: a withdrawal is never passed over.
  * IDs are compared by their pseudonyms. No ID is stored.
  * A withdrawal takes effect at the next ingest: the images leave the catalog, the store and what was retrieved, the
    pictures of earlier readiness reports go, and a warm worker opens the catalog anew (`State`).
  * How many have withdrawn is counted; who, is not told.
"""

from __future__ import annotations

import hashlib
import json
import re
import sqlite3
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from locum.common.errors import DataError
from locum.site_client.imaging.catalog import FILE_NAME, Catalog, read_meta
from locum.site_client.imaging.keys import Keys
from locum.site_client.imaging.reasons import Reason
from locum.site_client.imaging.sources import Consent

#: What a Patient ID (LO, PS3.5 6.2) cannot hold.
_NO_ID = re.compile(r"[\x00-\x1f\x7f\\]")
_LONGEST = 64
#: Where the readiness reports of a store are, relative to it; they hold pictures.
REPORTS = "readiness"
_WITHDRAWN = (Reason.CONSENT_WITHDRAWN,)


def withdrawn(consent: Consent | None, keys: Keys) -> frozenset[str]:
    """The pseudonyms of all patients on the site's list; none if the site has no list.

    Raises:
        DataError: the list cannot be read, or a line can be no patient ID; the message names the line, not the ID.
    """
    return frozenset() if consent is None else frozenset(_lines(consent.withdrawn, keys))


def unmatched(consent: Consent | None, keys: Keys, connection: sqlite3.Connection) -> list[str]:
    """'file name:line' of each line of the list that names no patient of whom the catalog knows any image.

    The list may name patients of other studies; but a misspelt ID looks the same, so a person should see these lines.

    Raises:
        DataError: as :func:`withdrawn`.
    """
    if consent is None:
        return []
    known = {row[0] for row in connection.execute("SELECT DISTINCT json_extract(known, '$.patient') FROM items")}
    known |= {row[0] for row in connection.execute("SELECT detail FROM units WHERE reason = ?", _WITHDRAWN)}
    lines = _lines(consent.withdrawn, keys)
    return [f"{consent.withdrawn.name}:{line}" for pseudonym, line in lines.items() if pseudonym not in known]


def withdrawn_patients(connection: sqlite3.Connection) -> int:
    """How many patients with images at this site have withdrawn their consent, as the last ingest found it."""
    # The detail of a refused unit is the patient whom the site's table names, who may be another than the file's.
    row = connection.execute(
        "SELECT count(DISTINCT coalesce(nullif(units.detail, ''), json_extract(items.known, '$.patient'))) FROM items"
        " LEFT JOIN units ON units.key = items.unit WHERE coalesce(items.apart, units.reason) = ?",
        _WITHDRAWN,
    ).fetchone()
    return int(row[0])


@dataclass
class State:
    """What the cases of a store were at some time, by which whoever keeps them in memory sees that they have changed.

    Attributes:
        store: the folder.
        file: identity, size and time of the catalog's file: while these stay, nothing else is read.
        digest: of the cases; empty if there is no catalog that can be read.
    """

    store: Path
    file: tuple[int, ...]
    digest: str

    @classmethod
    def of(cls, store: Path) -> Self:
        """What the cases are now."""
        return cls(store, _file(store), _digest(store) or "")

    def outdated(self) -> bool:
        """Whether the cases are others now; as long as an ingest is at work, they are not."""
        file = _file(self.store)
        if file == self.file:
            return False
        digest = _digest(self.store)
        if digest in {None, self.digest}:
            self.file = file if digest is not None else self.file
            return False
        return True


def _file(store: Path) -> tuple[int, ...]:
    try:
        status = (store / FILE_NAME).stat()
    except OSError:
        return ()
    return status.st_ino, status.st_size, status.st_mtime_ns


def _digest(store: Path) -> str | None:
    """A digest of all that a model can be trained on at a store; None while an ingest is at work or failed."""
    try:
        with closing(Catalog.open(store)) as catalog:
            if not read_meta(catalog.connection, "complete", False):
                return None
            rows = catalog.connection.execute(
                "SELECT cases.id, cases.patient, cases.label, cases.fold, units.inputs FROM cases"
                " JOIN units ON units.key = cases.unit ORDER BY cases.id"
            )
            digest = hashlib.sha256()
            for row in rows:
                digest.update(json.dumps(row).encode())
            return digest.hexdigest()
    except (DataError, sqlite3.Error):
        return None


def forget_reports(store: Path) -> int:
    """Remove the readiness reports of a store, which show pictures of its cases; the number of those removed."""
    reports = list((store / REPORTS).glob("*.html"))
    for report in reports:
        report.unlink(missing_ok=True)
    return len(reports)


def _lines(file: Path, keys: Keys) -> dict[str, int]:
    """Pseudonym to the last line of its ID."""
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}", "check the path in the site file") from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise DataError(f"{file}, line {line}: the text is not UTF-8", "save it again as UTF-8 text") from None
    numbered = enumerate(re.split(r"\r\n|\n|\r", text), start=1)
    told = ((line, one.strip()) for line, one in numbered)
    return {keys.patient(_checked(file, line, one)): line for line, one in told if one and not one.startswith("#")}


def _checked(file: Path, line: int, given: str) -> str:
    if len(given) > _LONGEST or _NO_ID.search(given):
        raise DataError(
            f"{file}, line {line}: this can be no patient ID",
            f"write one patient ID a line, of at most {_LONGEST} characters, and nothing else",
        )
    return given
