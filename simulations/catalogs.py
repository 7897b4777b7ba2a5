"""Catalogs without images, for what only counts: cohort questions over many sites.

Rules:
  * A catalog is that of the imaging side, to the column. No case of it can be trained on.
  * `spine_generic` makes of the metadata of the Spine Generic Public Database (Cohen-Adad et al., Open-access
    quantitative MRI data of the spinal cord, Scientific Data 8, 2021) a site of each institution of `participants.tsv`,
    and a case of each sidecar. BIDS has seconds, a catalog milliseconds.
"""

from __future__ import annotations

import csv
import json
import sqlite3
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from locum.site_client.imaging import catalog
from locum.site_client.imaging.keys import Keys

_STATED = ("patient", "label", "modality", "manufacturer", "body_part", "sex", "age", "month")
_SECONDS = ("EchoTime", "RepetitionTime", "InversionTime")
_NUMBERS = (*_SECONDS, "FlipAngle", "MagneticFieldStrength", "SliceThickness")


@dataclass(frozen=True)
class Entry:
    """A case of a catalog without images; what is left out is not stated."""

    patient: str
    modality: str = "MR"
    manufacturer: str = ""
    body_part: str = ""
    sex: str = ""
    age: int | None = None
    month: str = ""
    label: str | None = None
    spacing: tuple[float, ...] = (1.0, 1.0, 1.0)
    parameters: Mapping[str, float] = field(default_factory=dict)
    codes: tuple[str, ...] = ()


#: Give the patients of such catalogs their places.
KEYS = Keys.of(bytes(32))


def write_catalog(store: Path, entries: Iterable[Entry]) -> None:
    """Writes a store's catalog anew, with a case of each entry."""
    store.mkdir(parents=True, exist_ok=True)
    with closing(sqlite3.connect(store / catalog.FILE_NAME)) as connection:
        catalog.create(connection)
        with connection:
            connection.execute("DELETE FROM cases")
            connection.execute("DELETE FROM codes")
            for number, entry in enumerate(entries):
                _insert(connection, f"{number:016x}", entry)
            catalog.write_meta(connection, "complete", True)


def _insert(connection: sqlite3.Connection, name: str, entry: Entry) -> None:
    stated: dict[str, Any] = {column: getattr(entry, column) for column in _STATED}
    made = {"id": name, "unit": name, "image": f"{name}.nii", "shape": "[1,1,1]", "dtype": "int16", "slices": 1}
    numbers = {"spacing": json.dumps(entry.spacing), "parameters": json.dumps(dict(entry.parameters))}
    empty = dict.fromkeys(("model", "sop_class", "orientation", "profile"), "") | {"defaced": 0}
    row = stated | made | numbers | empty | {"place": KEYS.place(entry.patient)}
    places = ", ".join("?" * len(row))
    query = f"INSERT INTO cases ({', '.join(row)}) VALUES ({places})"  # noqa: S608 (names of our own)
    connection.execute(query, tuple(row.values()))
    connection.executemany("INSERT INTO codes VALUES (?, ?)", [(name, code) for code in entry.codes])


# --- spine


def spine_generic(folder: Path) -> dict[str, list[Entry]]:
    """By institution, a case of each sidecar of its participants; sorted. Raises OSError."""
    sites: dict[str, list[Entry]] = defaultdict(list)
    with (folder / "participants.tsv").open(encoding="utf-8", newline="") as file:
        for person in csv.DictReader(file, delimiter="\t"):
            sites[person["institution_id"]] += _scans(folder / person["participant_id"], person)
    return dict(sorted(sites.items()))


def _scans(folder: Path, person: Mapping[str, str]) -> Iterator[Entry]:
    age = person["age"].partition(".")[0]
    for path in sorted(folder.rglob("*.json")):
        sidecar = json.loads(path.read_text(encoding="utf-8"))
        yield Entry(
            patient=person["participant_id"],
            modality=str(sidecar.get("Modality", "MR")),
            manufacturer=str(sidecar.get("Manufacturer") or person["manufacturer"]),
            body_part="SPINE",
            sex=person["sex"] if person["sex"] in {"F", "M"} else "",
            age=int(age) if age.isdigit() else None,
            month=person["date_of_scan"][:7] if person["date_of_scan"][:1].isdigit() else "",
            label=path.stem.rpartition("_")[2],
            parameters=_parameters(sidecar),
        )


def _parameters(sidecar: Mapping[str, Any]) -> dict[str, float]:
    found = {name: float(value) for name in _NUMBERS if isinstance(value := sidecar.get(name), int | float)}
    return {name: round(value * 1000, 6) if name in _SECONDS else value for name, value in found.items()}
