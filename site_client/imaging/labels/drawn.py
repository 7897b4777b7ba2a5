"""The masks of a site that are drawn in DICOM objects, whatever kind of object it is."""

from __future__ import annotations

from collections.abc import Callable

from locum.site_client.imaging.grids import Volume
from locum.site_client.imaging.items import Unit
from locum.site_client.imaging.labels.canvas import Drawing, masks_by_reader, one_mask
from locum.site_client.imaging.labels.objects import Found, ObjectIndex
from locum.site_client.imaging.reasons import Reason, RefusedError
from locum.site_client.imaging.sources import ObjectMasks


class DrawnMasks:
    """A :class:`MaskSource` over an index of objects; `drawing` opens one of them for a unit."""

    def __init__(self, masks: ObjectMasks, index: ObjectIndex, drawing: Callable[[Found, Unit], Drawing]) -> None:
        self._masks = masks
        self._index = index
        self._drawing = drawing

    def stamp(self, unit: Unit) -> str | None:
        """As :meth:`MaskSource.stamp`."""
        return self._index.stamp(unit, self._masks.model_dump_json())

    def read(self, unit: Unit, image: Volume) -> Volume:
        """As :meth:`MaskSource.read`; also raises RefusedError (conflicting_labels)."""
        return one_mask(self._drawings(unit), self._masks, image)

    def readings(self, unit: Unit, image: Volume) -> dict[str, Volume]:
        """What each reader drew; raises as :meth:`read`."""
        return masks_by_reader(self._drawings(unit), self._masks, image)

    def unmatched(self) -> list[str]:
        """The name of every object that refers to none of the units asked for, and of every file that is none."""
        return self._index.unmatched()

    def _drawings(self, unit: Unit) -> list[tuple[str, Drawing]]:
        objects = self._index.of(unit)
        if not objects:
            raise RefusedError(Reason.MASK_MISSING)
        return [(found.reader, self._drawing(found, unit)) for found in objects]
