"""Masks in NIfTI files: beside NIfTI images under the same names, or in a folder by the name of a DICOM image.

Rules:
  * A file of the folder is named by the accession number, series UID or patient ID of its image, as the PACS has
    them or as the site knows them once keyed.
  * With `consensus`, files are <key>.READER.nii.gz: what stands between the last dot and the suffix is the reader.
  * Two files for one image are refused, unless they are of two readers and the site says how these agree.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from locum.site_client.imaging.grids import Volume
from locum.site_client.imaging.items import Unit, stem, tree_of
from locum.site_client.imaging.keys import Keys
from locum.site_client.imaging.labels.readers import consensus_mask
from locum.site_client.imaging.labels.tables import keyed_name, name_of
from locum.site_client.imaging.nifti import read_mask
from locum.site_client.imaging.reasons import Reason, RefusedError
from locum.site_client.imaging.sources import BidsSource, DicomSource, Masks, NiftiSource, PacsSource, SiteData


class FolderMasks:
    """The masks of a site in NIfTI files."""

    def __init__(self, site: SiteData, keys: Keys) -> None:
        self._site = site
        self._masks = site.masks if isinstance(site.masks, Masks) else None
        self._named = _by_name(self._masks, keys) if self._masks else {}
        self._asked: set[str] = set()

    def stamp(self, unit: Unit) -> str | None:
        """As :meth:`MaskSource.stamp`: the files, their sizes and times of change."""
        files = self._files(unit)
        if files is None:
            return None
        seen = [str(self._masks.consensus) if self._masks else ""]
        for path in files.values():
            status = path.stat()
            seen.append(f"{path} {status.st_size} {status.st_mtime_ns}")
        return " ".join(seen)

    def read(self, unit: Unit, image: Volume) -> Volume:
        """As :meth:`MaskSource.read`; also raises RefusedError (conflicting_labels)."""
        volumes = self.readings(unit, image)
        consensus = self._masks.consensus if self._masks else None
        return consensus_mask(list(volumes.values()), consensus) if consensus else next(iter(volumes.values()))

    def readings(self, unit: Unit, image: Volume) -> dict[str, Volume]:
        """What each reader drew; one that is not named is ''. Raises as :meth:`read`."""
        files = self._files(unit)
        if not files:
            raise RefusedError(Reason.MASK_MISSING)
        return {reader: read_mask(path, image) for reader, path in files.items()}

    def unmatched(self) -> list[str]:
        """The name of every file of the folder that is the mask of none of the units asked for."""
        files = {path.name for name, found in self._named.items() if name not in self._asked for _, path in found}
        used = {path.name for name in self._asked for _, path in self._named.get(name, ())}
        return sorted(files - used)

    def _files(self, unit: Unit) -> Mapping[str, Path] | None:
        """By reader, the files of a unit's mask; None if the site has no masks for images of its source.

        Raises:
            RefusedError: mask_missing or conflicting_labels.
        """
        source = self._site.sources[unit.source]
        if isinstance(source, NiftiSource) and source.masks is not None:
            path = source.masks / unit.items[0].path.relative_to(source.images)
            return _present({"": path} if path.is_file() else {})
        if isinstance(source, BidsSource) and source.masks is not None:
            beside = tree_of(source).mask(source, unit.items[0])
            return _present({"": beside} if beside is not None and beside.is_file() else {})
        if self._masks is None or not isinstance(source, DicomSource | PacsSource):
            return None
        name = name_of(unit, self._masks.key)
        if not name:
            raise RefusedError(Reason.MASK_MISSING)
        self._asked.add(name)
        files = self._named.get(name, [])
        if len({reader for reader, _ in files}) < len(files):
            raise RefusedError(Reason.CONFLICTING_LABELS, "two files are masks of one image")
        return _present(dict(files))


def _present(files: Mapping[str, Path]) -> Mapping[str, Path]:
    if not files:
        raise RefusedError(Reason.MASK_MISSING)
    return files


def _by_name(masks: Masks, keys: Keys) -> dict[str, list[tuple[str, Path]]]:
    """By each name that an image may have: the reader and path of its files."""
    named: dict[str, list[tuple[str, Path]]] = {}
    for path in sorted(masks.path.iterdir()):
        whole = stem(path.name)
        if not whole or not path.name.endswith((".nii", ".nii.gz")):
            continue
        name, _, reader = whole.rpartition(".") if masks.consensus else (whole, "", "")
        for known in {name, keyed_name(name, masks.key, keys)}:
            named.setdefault(known, []).append((reader, path))
    return named
