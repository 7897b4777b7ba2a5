"""Masks in files: beside the NIfTI images of a source, or in one folder for DICOM images."""

from __future__ import annotations

from pathlib import Path

from locum.site_client.imaging import nifti
from locum.site_client.imaging.geometry import Volume
from locum.site_client.imaging.items import Unit, stem, tree_of
from locum.site_client.imaging.keys import Keys
from locum.site_client.imaging.labels.tables import keyed_name, name_of
from locum.site_client.imaging.reasons import Reason, RefusedError
from locum.site_client.imaging.sources import (
    BidsSource,
    DicomSource,
    Masks,
    NiftiSource,
    PacsSource,
    SiteData,
)


class FolderMasks:
    """The masks of a site, by name of the image."""

    def __init__(self, site: SiteData, keys: Keys) -> None:
        self._site = site
        self._masks = site.masks if isinstance(site.masks, Masks) else None
        self._named = _by_name(self._masks, keys) if self._masks is not None else {}

    def stamp(self, unit: Unit) -> str | None:
        """The mask's file, its size and time of change; None if the unit's source has no masks.

        Raises:
            RefusedError: mask_missing.
        """
        path = self._path(unit)
        if path is None:
            return None
        status = path.stat()
        return f"{path} {status.st_size} {status.st_mtime_ns}"

    def read(self, unit: Unit, image: Volume) -> Volume:
        """The mask on the grid of its image; raises RefusedError (mask_missing, _unreadable, _mismatch)."""
        path = self._path(unit)
        if path is None:
            raise RefusedError(Reason.MASK_MISSING)
        return nifti.read_mask(path, image)

    def _path(self, unit: Unit) -> Path | None:
        source = self._site.sources[unit.source]
        if isinstance(source, NiftiSource) and source.masks is not None:
            return _present(source.masks / unit.items[0].path.relative_to(source.images))
        if isinstance(source, BidsSource) and source.masks is not None:
            return _present(tree_of(source).mask(source, unit.items[0]))
        if isinstance(source, DicomSource | PacsSource) and self._masks is not None:
            return _present(self._named.get(name_of(unit, self._masks.key)))
        return None


def _by_name(masks: Masks, keys: Keys) -> dict[str, Path]:
    files = (path for path in sorted(masks.path.iterdir()) if path.name.endswith((".nii", ".nii.gz")))
    return {keyed_name(stem(path.name), masks.key, keys): path for path in files if stem(path.name)}


def _present(path: Path | None) -> Path:
    if path is None or not path.is_file():
        raise RefusedError(Reason.MASK_MISSING)
    return path
