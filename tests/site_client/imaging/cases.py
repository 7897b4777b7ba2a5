"""The thirteen geometry cases: files as scanners and PACS give them, and where every voxel truly lies.

The truth is written down voxel by voxel from the attributes (PS3.3 C.7.6.2.1.1) when the files are made; nothing of the
code under test is used for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from highdicom.legacy import LegacyConvertedEnhancedCTImage
from pydicom.dataset import Dataset
from pydicom.uid import DigitalXRayImageStorageForPresentation, PositronEmissionTomographyImageStorage, generate_uid

#: Place in LPS, in hundredths of a millimetre, to the modality value there.
Truth = Mapping[tuple[int, int, int], float]

SLICES = 12
#: Of one angle, in as many digits as an attribute of VR DS has room for.
_COS, _SIN = 0.9393727128, 0.3428978075


@dataclass(frozen=True)
class Case:
    """A folder of files, in the order of their names, and the volumes that are in it.

    Attributes:
        truths: one for each volume; none if the files make no volume that could be told without guessing.
        reasons: why files of it must go to quarantine.
        placeless: a picture: only its values can be compared, and lie at column, row, 0.
    """

    images: Sequence[Dataset]
    truths: tuple[Truth, ...] = ()
    reasons: frozenset[str] = frozenset()
    placeless: bool = False

    def write(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        for number, image in enumerate(self.images):
            image.InstanceNumber = number + 1
            image.save_as(folder / f"IM{number:04d}.dcm", enforce_file_format=True)


def thirteen(series: Any) -> dict[str, Case]:
    """The cases by name; `series` is the class of that fixture."""
    plain = series(slices=SLICES)
    tipped = replace(
        plain,
        orientation=(1.0, 0.0, 0.0, 0.0, _COS, _SIN),
        step=(0.0, round(-2.5 * _SIN, 10), round(2.5 * _COS, 10)),
        origin=(-9.0, 4.0, 1.0),
    )
    tilted = replace(plain, step=(0.0, 0.6698729811, 2.5))
    other = series(number=2, slices=SLICES)
    return {
        "ordinary": _whole(plain.images()),
        "reversed": _whole(plain.images()[::-1]),
        "oblique": _whole(tipped.images()),
        "rescaled slice by slice": _whole(_rescaled(plain)),
        "a single slice": _whole(series(slices=1).images()),
        "a missing slice": Case(_without(plain.images(), 5), reasons=frozenset({"missing_slices"})),
        "irregular spacing": Case(_shifted(plain.images(), 5), reasons=frozenset({"irregular_spacing"})),
        "two series in a folder": _mixed(plain.images(), other.images()),
        "a localizer in the series": _with_localizer(plain),
        "two images at each position": Case(plain.images() + _echo(plain), reasons=frozenset({"duplicated_positions"})),
        "gantry tilt": Case(tilted.images(), reasons=frozenset({"tilted"})),
        "MONOCHROME1": _inverted(series),
        "enhanced multi-frame": _enhanced(plain),
    }


def truth_of(images: Sequence[Dataset]) -> Truth:
    """Where every voxel of these images lies, and what it stands for."""
    found: dict[tuple[int, int, int], float] = {}
    for image in images:
        origin = np.array(image.ImagePositionPatient, float)
        along_row, along_column = np.reshape(np.array(image.ImageOrientationPatient, float), (2, 3))
        between_rows, between_columns = map(float, image.PixelSpacing)
        plane = image.pixel_array * float(image.RescaleSlope) + float(image.RescaleIntercept)
        for (row, column), value in np.ndenumerate(plane):
            place = origin + along_row * between_columns * column + along_column * between_rows * row
            found[_key(place)] = float(value)
    return found


def is_right(array: np.ndarray, affine: np.ndarray, case: Case) -> bool:
    """Whether an image, (column, row[, slice]) with an affine to RAS, is one of the case's volumes in every voxel."""
    stack = array if array.ndim == 3 else array[..., None]
    found: dict[tuple[int, int, int], float] = {}
    for index, value in np.ndenumerate(stack):
        place = np.array(index, float) if case.placeless else (affine @ (*index, 1.0))[:3] * (-1, -1, 1)
        found[_key(place)] = float(value)
    return any(
        len(found) == stack.size and found.keys() == truth.keys() and all(
            abs(value - truth[place]) < 1e-3 for place, value in found.items()
        )
        for truth in case.truths
    )  # fmt: skip


def _key(place: np.ndarray) -> tuple[int, int, int]:
    x, y, z = (round(float(part) * 100) for part in place)
    return x, y, z


def _whole(images: Sequence[Dataset]) -> Case:
    return Case(images, (truth_of(images),))


def _rescaled(series: Any) -> list[Dataset]:
    images = series.images()
    for number, image in enumerate(images):
        image.SOPClassUID = image.file_meta.MediaStorageSOPClassUID = PositronEmissionTomographyImageStorage
        image.Modality, image.RescaleSlope, image.RescaleIntercept = "PT", 0.5 + number / 8, 0
    return images


def _without(images: list[Dataset], number: int) -> list[Dataset]:
    return images[:number] + images[number + 1 :]


def _shifted(images: list[Dataset], number: int) -> list[Dataset]:
    images[number].ImagePositionPatient[2] += 0.8
    return images


def _mixed(one: list[Dataset], other: list[Dataset]) -> Case:
    together = [image for pair in zip(one, other, strict=True) for image in pair]
    return Case(together, (truth_of(one), truth_of(other)))


def _with_localizer(series: Any) -> Case:
    images = series.images()
    scout = replace(series, slices=1, origin=(-10.0, 0.0, 60.0), orientation=(1.0, 0.0, 0.0, 0.0, 0.0, -1.0))
    (localizer,) = scout.images()
    localizer.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
    localizer.SOPInstanceUID = localizer.file_meta.MediaStorageSOPInstanceUID = f"{series.uid}.1.99"
    return Case([localizer, *images], (truth_of(images),), frozenset({"localizer"}))


def _echo(series: Any) -> list[Dataset]:
    images = series.images()
    for number, image in enumerate(images):
        image.SOPInstanceUID = image.file_meta.MediaStorageSOPInstanceUID = f"{series.uid}.4.{number + 1}"
        image.PixelData = (4095 - image.pixel_array).tobytes()
    return images


def _inverted(series: Any) -> Case:
    (image,) = series(slices=1).images()
    image.SOPClassUID = image.file_meta.MediaStorageSOPClassUID = DigitalXRayImageStorageForPresentation
    image.Modality, image.BurnedInAnnotation, image.PhotometricInterpretation = "DX", "NO", "MONOCHROME1"
    image.RescaleIntercept = 0
    for name in ("ImagePositionPatient", "ImageOrientationPatient", "FrameOfReferenceUID"):
        delattr(image, name)
    plane = 4095 - image.pixel_array.astype(int)
    truth = {(100 * column, 100 * row, 0): float(value) for (row, column), value in np.ndenumerate(plane)}
    return Case([image], (truth,), placeless=True)


def _enhanced(series: Any) -> Case:
    images = series.images()
    for image in images:
        image.StudyDate, image.StudyTime, image.StudyID, image.SeriesNumber = "20200101", "120000", "1", 1
        image.PatientBirthDate, image.PatientSex, image.ReferringPhysicianName = "", "", ""
        image.InstanceNumber, image.AcquisitionNumber, image.LossyImageCompression = 1, 1, "00"
    whole = LegacyConvertedEnhancedCTImage(images, generate_uid(), 1, generate_uid(), 1)
    return Case([whole], (truth_of(images),))
