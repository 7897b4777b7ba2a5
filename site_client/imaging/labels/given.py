"""What every source of labels or masks gives, whatever it reads.

Rules:
  * It is asked of a unit by the keyed names of its patient, study and series; nothing else of the unit is known to it.
  * Nothing is dropped in silence: an image without a label, with an unknown code or with two labels is refused, and
    what names no image is listed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from locum.site_client.imaging.grids import Volume
from locum.site_client.imaging.items import Unit
from locum.site_client.imaging.known import Known


@dataclass(frozen=True)
class Label:
    """What an image shows.

    Attributes:
        name: the class of the plan.
        codes: standard codes, SCHEME:CODE, that were found for it.
    """

    name: str
    codes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Annotation:
    """A DICOM object among the sources that says something of images: SEG, SR or RTSTRUCT.

    Attributes:
        path: its file.
        size: bytes.
        sop_class: SOP Class UID.
        cleaned: whether its UIDs are keyed already, as in what a PACS gave; else they are those of the original.
        known: what is kept of its patient and study.
    """

    path: Path
    size: int
    sop_class: str
    cleaned: bool
    known: Known


class LabelSource(Protocol):
    """Labels by image."""

    def label(self, unit: Unit) -> Label:
        """The label of a unit; raises RefusedError (no_label, unmapped_code, conflicting_labels, uncertain_label)."""
        ...

    def unmatched(self) -> list[str]:
        """'file name:line' of all that named none of the units asked for so far.

        Raises DataError if units were asked for and none was named: the key is wrong.
        """
        ...


class MaskSource(Protocol):
    """Masks by image."""

    def stamp(self, unit: Unit) -> str | None:
        """By what a change of the unit's mask is seen; None if its source has no masks. Raises RefusedError."""
        ...

    def read(self, unit: Unit, image: Volume) -> Volume:
        """The mask on the grid of the image, uint8; raises RefusedError (mask_missing, _unreadable, _mismatch)."""
        ...

    def unmatched(self) -> list[str]:
        """The name of every file that is the mask of none of the units asked for so far."""
        ...
