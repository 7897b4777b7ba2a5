"""Two-dimensional images: radiographs, ultrasound and secondary captures, in grey or in colour.

Rules:
  * Of an ultrasound nothing stays outside its regions: cut away, and between regions black.
  * A crop that a person drew at release is applied too; it never brings back what lies outside the regions.
  * Colours become red, green and blue: (column, row, 1, 3). A palette of 16 bits gives its upper 8, as the others have.
  * Grey keeps its depth, in MONOCHROME2. Windows are not applied.
"""

from __future__ import annotations

import numpy as np
from pydicom.dataset import Dataset
from pydicom.pixels import apply_color_lut
from pydicom.uid import UID

from locum.site_client.imaging.damage import damage_is
from locum.site_client.imaging.decoding import decoded
from locum.site_client.imaging.dicom import ULTRASOUND
from locum.site_client.imaging.grids import Array, Box, Volume, at_spacing, cropped, narrow, picture, pixel_spacing
from locum.site_client.imaging.headers import count, numbers, text
from locum.site_client.imaging.reasons import Reason, RefusedError
from locum.site_client.imaging.stored import modality_values, stored_monochrome2, stored_values
from locum.site_client.imaging.ultrasound import Region, bounding_box, pixel_size, regions

_PALETTE = "PALETTE COLOR"
#: Where an image without a place says how large its pixels are (PS3.3 10.7.1): the first that is there.
_SPACINGS = ("PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing")
#: Photometric interpretations that pydicom turns into RGB (PS3.3 C.7.6.3.1.2).
_COLOURS = frozenset({"RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT"})


def radiograph(dataset: Dataset) -> Volume:
    """A grey image of one frame: two-dimensional, at its full depth, in MONOCHROME2; it has no place in the patient.

    Raises:
        RefusedError: it cannot be decoded, or its spacing is impossible.
    """
    inverted = text(dataset, "PhotometricInterpretation") == "MONOCHROME1"
    array = narrow(modality_values([dataset], stored_monochrome2 if inverted else stored_values))
    with damage_is(Reason.NO_GEOMETRY):
        spacing = pixel_spacing(next(filter(None, (numbers(dataset, name) for name in _SPACINGS)), (1.0, 1.0)))
    return at_spacing(array[0].T, spacing)


def picture_of(dataset: Dataset, crop: Box | None = None) -> Volume:
    """An ultrasound image or a secondary capture of one frame.

    Args:
        dataset: the object.
        crop: what a person lets through: left, top, width, height in pixels of the whole image.

    Raises:
        RefusedError: it cannot be decoded; its colours are of an unknown kind; the crop leaves nothing of it.
    """
    grey = text(dataset, "PhotometricInterpretation").startswith("MONOCHROME")
    volume = radiograph(dataset) if grey else _colour(dataset)
    if text(dataset, "SOPClassUID") in ULTRASOUND:
        with damage_is(Reason.NO_REGIONS, "regions"):
            found = regions(dataset)
        if found:
            return _within(volume, found, crop)
    return cropped(volume, crop) if crop else volume


def _within(volume: Volume, found: tuple[Region, ...], crop: Box | None) -> Volume:
    inside = np.zeros(volume.array.shape[:2], dtype=bool)
    for region in found:
        left, top, width, height = region.box
        inside[left : left + width, top : top + height] = True
    kept = inside.reshape(inside.shape + (1,) * (volume.array.ndim - 2))
    blanked = Volume(np.where(kept, volume.array, volume.array.dtype.type(0)), volume.affine)
    size = pixel_size(found)
    placed = at_spacing(blanked.array, size) if size else blanked
    bounds = bounding_box([region.box for region in found])
    return cropped(placed, _common(bounds, crop) if crop else bounds)


def _common(one: Box, other: Box) -> Box:
    left, top = max(one[0], other[0]), max(one[1], other[1])
    right, bottom = min(one[0] + one[2], other[0] + other[2]), min(one[1] + one[3], other[1] + other[3])
    return left, top, right - left, bottom - top


def _colour(dataset: Dataset) -> Volume:
    photometric = text(dataset, "PhotometricInterpretation")
    if photometric not in _COLOURS | {_PALETTE}:
        raise RefusedError(Reason.COLOUR, f"photometric interpretation {photometric}")
    pixels = decoded(dataset)
    with damage_is(Reason.DECODE_FAILED, "palette"):
        colours = _through_palette(pixels, dataset) if photometric == _PALETTE else pixels
    if colours.shape != (count(dataset, "Rows"), count(dataset, "Columns"), 3):
        raise RefusedError(Reason.DECODE_FAILED, f"decoded to shape {colours.shape}")
    return picture(colours)


def _through_palette(pixels: Array, dataset: Dataset) -> Array:
    """Colours of 8 bits for indices into a palette (PS3.3 C.7.6.3.1.5, .6)."""
    if "RedPaletteColorLookupTableData" not in dataset:
        return _upper_byte(apply_color_lut(pixels, dataset)[..., :3])
    entries, first, _ = (int(number) for number in dataset.RedPaletteColorLookupTableDescriptor)
    entries = entries or 1 << 16
    table = np.stack([_palette(dataset, colour, entries) for colour in ("Red", "Green", "Blue")], axis=-1)
    return _upper_byte(table)[np.clip(pixels.astype(np.int64) - first, 0, entries - 1)]


def _palette(dataset: Dataset, colour: str, entries: int) -> Array:
    data = dataset[f"{colour}PaletteColorLookupTableData"].value
    width = min(len(data) // entries, 2)
    # PS3.5 A.3: in a big-endian file these words are big-endian too, which pydicom 3.0 overlooks.
    order = "<" if UID(dataset.file_meta.TransferSyntaxUID).is_little_endian else ">"
    return np.frombuffer(data, f"{order}u{width}", entries).astype(f"u{width}")


def _upper_byte(colours: Array) -> Array:
    """The upper byte of 16-bit colours; some files put 8-bit ones into 16 bits."""
    return (colours >> 8).astype(np.uint8) if colours.max() > 255 else colours.astype(np.uint8)
