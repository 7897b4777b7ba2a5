"""A folder of DICOM to a folder of cleaned DICOM, for whoever wants the files and not a store.

Rules:
  * The output is another folder, neither within the input nor around it; the input is only read.
  * A file is whole or not there, and is called by its keyed UIDs: names of folders and files may name patients.
  * It can be stopped and run again: what is there already, the same to the byte, is skipped; what differs is refused.
  * Everything found is counted once: written, skipped or refused, with one reason and no identifier.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from locum.common.durable import replace_unflushed
from locum.common.errors import DataError, RunError
from locum.site_client.imaging.dicom import read
from locum.site_client.imaging.headers import text
from locum.site_client.imaging.reasons import Reason, RefusedError

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

    from locum.site_client.imaging.deid.engine import Deidentifier
    from locum.site_client.imaging.keys import Keys


@dataclass
class Tally:
    """What became of the files of a folder.

    Attributes:
        refused: path below the input, reason, detail; it stays at the site, for paths may hold names.
    """

    found: int = 0
    written: int = 0
    skipped: int = 0
    refused: list[tuple[str, Reason, str]] = field(default_factory=list)


def clean_folder(
    source: Path, target: Path, engine: Deidentifier, keys: Keys, tell: Callable[[int], None] = lambda _: None
) -> Tally:
    """Clean every DICOM file below `source` into `target`.

    Args:
        source: the folder with the originals.
        target: the folder for the cleaned files, made if absent.
        engine: what cleans them.
        keys: of the site; they name the files.
        tell: called with the number of files that are done.

    Raises:
        DataError: a folder is not there, or one lies within the other.
        RunError: the target cannot be written.
    """
    _check(source, target)
    for left in target.rglob(".*.dcm.*.tmp"):  # of a run that was killed
        left.unlink(missing_ok=True)
    tally = Tally()
    for path in _files(source):
        tally.found += 1
        try:
            _one(path, target, engine, keys, tally)
        except RefusedError as refused:
            tally.refused.append((str(path.relative_to(source)), refused.reason, refused.detail))
        tell(tally.found)
    return tally


def _check(source: Path, target: Path) -> None:
    if not source.is_dir():
        raise DataError(f"there is no folder {source}", "check its path")
    inner, outer = source.resolve(), target.resolve()
    if inner == outer or inner in outer.parents or outer in inner.parents:
        raise DataError(
            f"{target} and {source} lie within each other", "name a folder elsewhere: originals stay as they are"
        )


def _files(source: Path) -> Iterator[Path]:
    for folder, folders, names in os.walk(source):
        folders.sort()
        yield from (Path(folder) / name for name in sorted(names))


def _one(path: Path, target: Path, engine: Deidentifier, keys: Keys, tally: Tally) -> None:
    try:
        size = path.stat().st_size if path.is_file() else -1
    except OSError:
        size = -1
    dataset = read(path, size)
    made = target / _name(dataset, keys)
    content = engine.file(dataset)
    if made.exists():
        if made.read_bytes() != content:
            detail = "another file with this UID is there, or this one as it was cleaned with other options"
            raise RefusedError(Reason.CONFLICTING_INSTANCES, detail)
        tally.skipped += 1
        return
    try:
        made.parent.mkdir(parents=True, exist_ok=True)
        replace_unflushed(made, content)
    except OSError as error:
        raise RunError(
            f"{target} cannot be written: {error.strerror}", "mend that and run it again: it continues where it stopped"
        ) from error
    tally.written += 1


def _name(dataset: Dataset, keys: Keys) -> Path:
    """study/series/instance.dcm, keyed."""
    uids = [text(dataset, name) for name in ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID")]
    if not uids[2]:
        raise RefusedError(Reason.INCOMPLETE_HEADER, "no SOP instance UID")
    study, series, instance = (keys.uid(uid) or "none" for uid in uids)
    return Path(study, series, f"{instance}.dcm")
