"""What lies in the site's sources, before anything is opened.

Rules:
  * An item is one file, or one row of an .npz; each has a name that stays the same at the next ingest.
  * Images that the site's table gives to another site are not this site's items.
  * They come one by one, source by source, so that a large site does not fill the memory.
  * Folders are walked in a fixed order; links to folders are not followed, so that a walk ends.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from locum.common.errors import DataError
from locum.site_client.imaging import npz
from locum.site_client.imaging.keys import Keys
from locum.site_client.imaging.known import Known
from locum.site_client.imaging.reasons import Reason
from locum.site_client.imaging.sources import (
    BidsSource,
    DeepLesionSource,
    DicomSource,
    NiftiSource,
    NpzSource,
    PacsSource,
    SiteData,
    table_rows,
)
from locum.site_client.imaging.split import Fold

_SUFFIXES = (".gz", ".nii", ".dcm")


@dataclass(frozen=True, slots=True)
class Item:
    """One thing found.

    Attributes:
        name: its path relative to the site's root; '#split/index' follows for a row.
        source: the number of its source in the site file.
        size: bytes, or -1 for something that is no regular file.
        mtime_ns: the time of its last change; with `size` it tells whether it has changed.
        row: split and index of a row of an .npz.
        known: what is known of its patient and study without opening it: of what a PACS gave, or a tree says.
        refused: why it cannot be used, if that is known without opening it.
    """

    name: str
    path: Path
    source: int
    size: int
    mtime_ns: int
    row: tuple[Fold, int] | None = None
    known: Known | None = None
    refused: tuple[Reason, str] | None = None


@dataclass(frozen=True)
class Unit:
    """What becomes one case: a DICOM series (or radiograph), a NIfTI image, a row of an .npz.

    Attributes:
        key: keyed series UID (with the keyed SOP instance UID for a radiograph), or the name of the file or row.
        known: what is kept of its patient and study.
        file: the stem of the file name if the unit is one file; the index for a training row of an .npz.
        gate: why the headers alone refuse it, or None.
    """

    key: str
    source: int
    items: tuple[Item, ...]
    known: Known
    file: str = ""
    gate: Reason | None = None
    gate_detail: str = ""


def stem(name: str) -> str:
    """A file name without folders and without .nii.gz, .nii, .dcm or .gz: by it tables name files."""
    base = name.rpartition("/")[2]
    while base.endswith(_SUFFIXES):
        base = base.rpartition(".")[0]
    return base


def path_as_kept(path: Path) -> str | bytes:
    """A path as a database can hold it: one whose bytes are no UTF-8 as these bytes."""
    written = str(path)
    return os.fsencode(written) if any("\ud800" <= letter <= "\udfff" for letter in written) else written


def kept_path(written: str | bytes) -> Path:
    """What :func:`path_as_kept` was given."""
    return Path(os.fsdecode(written))


def find_items(site: SiteData, store: Path, keys: Keys) -> Iterator[Item]:
    """Everything that is this site's, source by source; of a PACS what was retrieved into the store.

    Raises:
        DataError: a folder or an .npz cannot be read.
    """
    for number in range(len(site.sources)):
        yield from _of_source(site, store, number, keys)


def _of_source(site: SiteData, store: Path, number: int, keys: Keys) -> Iterator[Item]:
    source = site.sources[number]
    if isinstance(source, DicomSource):
        return _walk(site.root, source.path, number)
    if isinstance(source, NpzSource):
        return _rows(site, source, number)
    if isinstance(source, NiftiSource):
        return _nifti(site, source, number)
    if isinstance(source, PacsSource):
        from locum.site_client.imaging.retrieve.spool import spooled

        return spooled(store, number)
    items: Iterator[Item] = tree_of(source).items(site, source, number, keys)
    return items


def tree_of(source: BidsSource | DeepLesionSource) -> Any:
    """The module that reads a tree with a layout of its own."""
    from locum.site_client.imaging import bids, deeplesion

    return bids if isinstance(source, BidsSource) else deeplesion


def _nifti(site: SiteData, source: NiftiSource, number: int) -> Iterator[Item]:
    items = _walk(site.root, source.images, number)
    if site.table is None or site.table.key != "file":
        return items
    ours = {stem(row.cells[site.table.key_column]) for row in table_rows(site.table)}
    return (item for item in items if stem(item.name) in ours)


def _rows(site: SiteData, source: NpzSource, number: int) -> Iterator[Item]:
    status = source.path.stat()
    name = _name(site.root, str(source.path))
    ours = None
    if site.table is not None:
        ours = {row.cells[site.table.key_column] for row in table_rows(site.table)}
    for fold, count in npz.row_counts(source.path).items():
        for index in range(count):
            if _is_ours(source, fold, index, ours):
                label = f"{name}#{fold}/{index}"
                yield Item(label, source.path, number, status.st_size, status.st_mtime_ns, (fold, index))


def _is_ours(source: NpzSource, fold: Fold, index: int, ours: set[str] | None) -> bool:
    if fold == "train":
        return ours is None or str(index) in ours
    return source.part is None or index % source.part[1] == source.part[0]


def _walk(root: Path, folder: Path, number: int) -> Iterator[Item]:
    for parent, folders, files in os.walk(folder, onerror=unreadable_folder):
        folders.sort()
        for file in files:
            yield item_at(root, f"{parent}/{file}", number)


def unreadable_folder(error: OSError) -> NoReturn:
    """For a walk; raises DataError."""
    # A folder that is passed over in silence is a hospital's missing patients.
    raise DataError(f"the folder {error.filename} cannot be read: {error.strerror}", "mend its access rights")


def item_at(root: Path, path: str, number: int) -> Item:
    """The file at a path, as an item of a source."""
    name = _name(root, path)
    try:
        status = os.stat(path)  # noqa: PTH116 (thousands of files: a third of the time of Path.stat)
    except OSError:
        return Item(name, Path(path), number, -1, 0)
    size = status.st_size if stat.S_ISREG(status.st_mode) else -1
    return Item(name, Path(path), number, size, status.st_mtime_ns)


def _name(root: Path, path: str) -> str:
    prefix = f"{root}/"
    name = path[len(prefix) :] if path.startswith(prefix) else os.path.relpath(path, root)
    return name.encode("utf-8", "backslashreplace").decode()
