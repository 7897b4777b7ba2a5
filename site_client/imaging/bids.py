"""Trees in the layout of BIDS (Brain Imaging Data Structure 1.10): sub-X/[ses-Y/]FOLDER/sub-X_…_SUFFIX.nii[.gz].

Rules:
  * The patient is the participant (sub-X); participants.tsv gives sex and age, *_scans.tsv the month.
  * Sidecars (.json) give maker, model and numbers of the scanner; a nearer one wins (the inheritance principle).
    Times stand there in seconds and are kept in milliseconds.
  * Folders beside sub-X (derivatives, sourcedata, code) hold no images of the site.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from locum.site_client.imaging import nifti
from locum.site_client.imaging.damage import damage_is
from locum.site_client.imaging.items import Item, item_at, stem, unreadable_folder
from locum.site_client.imaging.keys import Keys
from locum.site_client.imaging.known import OLDEST, Known
from locum.site_client.imaging.protocol import UNITS, Loaded, Protocol, placed
from locum.site_client.imaging.reasons import Reason
from locum.site_client.imaging.sheets import read_sheet
from locum.site_client.imaging.sources import BidsSource, SiteData

_SUFFIXES = (".nii", ".nii.gz")
_IN_SECONDS = frozenset({"RepetitionTime", "EchoTime", "InversionTime", "ExposureTime"})
_MS_PER_SECOND = 1000.0
#: A time before 1925 is one that was moved there to hide it (BIDS, "Units").
_DAY = re.compile(r"(19(?:2[5-9]|[3-9]\d)|20\d\d)-(0[1-9]|1[0-2])-")
_SEXES = {"f": "F", "female": "F", "m": "M", "male": "M", "o": "O", "other": "O"}


def items(site: SiteData, source: BidsSource, number: int, keys: Keys) -> Iterator[Item]:
    """The images of the suffixes that the site names, participant by participant.

    Raises:
        DataError: participants.tsv or a *_scans.tsv is no table.
    """
    people = _table(source.path / "participants.tsv", "participant_id")
    for participant in sorted(path for path in source.path.glob("sub-*") if path.is_dir()):
        person = people.get(participant.name, {})
        known = Known(
            patient=keys.patient(participant.name),
            place=keys.place(participant.name),
            sex=_SEXES.get(person.get("sex", "").casefold(), ""),
            age=_age(person.get("age", "")),
        )
        yield from _images(site, source, number, participant, known)


def load(source: BidsSource, item: Item) -> Loaded:
    """One image, with what its sidecars say.

    Raises:
        RefusedError: it cannot be read, or a sidecar cannot.
    """
    volume = nifti.read_image(item.path, item.size)
    with damage_is(Reason.UNREADABLE, "sidecar"):
        said = _sidecar(source.path, item.path)
        protocol = Protocol(body_part=_text(said, "BodyPartExamined").upper(), parameters=_parameters(said))
        maker, model = _text(said, "Manufacturer"), _text(said, "ManufacturersModelName")
    return Loaded(volume, source.modality, maker, model, placed(protocol, volume))


def mask(source: BidsSource, item: Item) -> Path | None:
    """An image's mask: at its place in the tree of masks, under its name with the site's ending; None without one."""
    if source.masks is None:
        return None
    folder = source.masks / item.path.parent.relative_to(source.path)
    wanted = (folder / f"{stem(item.path.name)}{source.mask_suffix}{suffix}" for suffix in reversed(_SUFFIXES))
    return next((path for path in wanted if path.is_file()), None)


def fold(source: BidsSource, item: Item) -> None:
    """The layout states no folds."""


def label(source: BidsSource, item: Item) -> None:
    """The layout states no labels; participants.tsv can be the site's table of labels."""


def _images(site: SiteData, source: BidsSource, number: int, participant: Path, known: Known) -> Iterator[Item]:
    endings = tuple(f"_{suffix}{ending}" for suffix in source.suffixes for ending in _SUFFIXES)
    for parent, folders, files in os.walk(participant, onerror=unreadable_folder):
        folders.sort()
        for file in sorted(files):
            if file.endswith(endings):
                path = Path(parent, file)
                # Without its content, as in a tree of git-annex, it is an item that cannot be read.
                item = item_at(site.root, str(path), number)
                changed = _changed(item, list(_sidecars_of(source.path, path)))
                yield replace(item, mtime_ns=changed, known=replace(known, month=_month(source.path, path)))


def _changed(item: Item, sidecars: Sequence[Path]) -> int:
    """The time of an image's last change, mixed with those of its sidecars, which may be older and come or go."""
    if not sidecars:
        return item.mtime_ns
    states = [(file.name, file.stat()) for file in sidecars]
    told = [item.mtime_ns, *((name, state.st_size, state.st_mtime_ns) for name, state in states)]
    return int.from_bytes(hashlib.sha256(repr(told).encode()).digest()[:7], "big")


def _table(path: Path, column: str) -> Mapping[str, dict[str, str]]:
    """The rows of a table by one of its columns; none if there is no such file."""
    if not path.is_file():
        return {}
    sheet = read_sheet(path)
    sheet.require([column])
    return {row.cells[column]: row.cells for row in sheet.rows}


def _age(written: str) -> int | None:
    """Whole years; '89+' and the like stop at the number; None for n/a."""
    found = re.match(r"(\d{1,3})(\.\d+)?\+?$", written)
    return min(int(found[1]), OLDEST) if found else None


def _month(root: Path, path: Path) -> str:
    """From the table of the scans of a participant or session, whose file names are relative to its folder."""
    for folder in path.parents[:2]:
        scans = folder / f"{'_'.join(folder.relative_to(root).parts)}_scans.tsv"
        row = _table(scans, "filename").get(path.relative_to(folder).as_posix())
        found = _DAY.match(row.get("acq_time", "")) if row else None
        if found:
            return f"{found[1]}-{found[2]}"
    return ""


def _sidecar(root: Path, path: Path) -> dict[str, Any]:
    """All that sidecars say of an image; what a nearer one says stands."""
    said: dict[str, Any] = {}
    for file in _sidecars_of(root, path):
        content = json.loads(file.read_text(encoding="utf-8"))
        said |= content if isinstance(content, dict) else {}
    return said


def _sidecars_of(root: Path, path: Path) -> Iterator[Path]:
    """The sidecars of an image: those of outer folders first, in a folder those that say more of the image last."""
    *entities, suffix = stem(path.name).split("_")
    for folder in (root, *(folder for folder in reversed(path.parents) if root in folder.parents)):
        for name in _sidecars(folder, folder.stat().st_mtime_ns):
            *given, kind = name.removesuffix(".json").split("_")
            if kind == suffix and set(given) <= set(entities):
                yield folder / name


@lru_cache(maxsize=256)
def _sidecars(folder: Path, mtime_ns: int) -> tuple[str, ...]:  # noqa: ARG001 (a changed folder is another key)
    """Names of the sidecars in a folder, those with fewer entities first."""
    return tuple(sorted((path.name for path in folder.glob("*.json")), key=lambda name: (name.count("_"), name)))


def _parameters(said: Mapping[str, Any]) -> dict[str, float]:
    found = {name: said[name] for name in UNITS if isinstance(said.get(name), int | float)}
    return {name: float(value) * (_MS_PER_SECOND if name in _IN_SECONDS else 1.0) for name, value in found.items()}


def _text(said: Mapping[str, Any], name: str) -> str:
    value = said.get(name, "")
    return " ".join(value.split()) if isinstance(value, str) else ""
