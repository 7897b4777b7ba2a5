"""Several readers of one image: how their labels or masks become one.

Rules:
  * A majority is more than half of the readers. Without one a label is refused, and a voxel is background.
  * STAPLE (Warfield, Zou, Wells, IEEE TMI 23(7), 2004) is SimpleITK's, on the smallest box that holds every reader's
    mask, and one voxel of background around it: there its prior is not swamped by background on which all agree,
    outside nothing is in question, and without any background its equations have no answer.
  * SimpleITK takes a fifth of a second to load: it is loaded when STAPLE is asked for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from locum.site_client.imaging.grids import Array, Volume
from locum.site_client.imaging.reasons import Reason, RefusedError
from locum.site_client.imaging.sources import Consensus

#: Iterations after which STAPLE's expectation-maximisation stops if it has not converged.
_ITERATIONS = 200


def majority(labels: Sequence[str]) -> str | None:
    """The label that more than half of the readers gave; None if there is none."""
    if not labels:
        return None
    label, votes = Counter(labels).most_common(1)[0]
    return label if 2 * votes > len(labels) else None


def by_reader(given: Iterable[tuple[str, str]]) -> dict[str, str]:
    """The label of each reader, out of (reader, label): one who says the same twice has said it once.

    Raises:
        RefusedError: conflicting_labels, if a reader gave two labels.
    """
    said: dict[str, str] = {}
    for reader, label in given:
        if said.setdefault(reader, label) != label:
            raise RefusedError(Reason.CONFLICTING_LABELS, f"one reader says {said[reader]} and {label}")
    return said


def consensus_mask(volumes: Sequence[Volume], how: Consensus) -> Volume:
    """One mask out of those of several readers, all on one grid, in uint8.

    Args:
        volumes: one or more.
        how: `majority`, or `staple`: the value that is most probable given every reader's estimated performance.
    """
    arrays = [volume.array for volume in volumes]
    union = np.logical_or.reduce([array != 0 for array in arrays])
    if len(arrays) == 1 or not union.any():
        return volumes[0]
    box = box_of(union)
    inside = framed(arrays, box)
    found = _majority_mask(inside) if how == "majority" else _staple_mask(inside)
    whole = np.zeros_like(arrays[0])
    whole[box] = found[(slice(1, -1),) * found.ndim]
    return Volume(whole, volumes[0].affine)


def box_of(region: npt.NDArray[np.bool_]) -> tuple[slice, ...]:
    """The smallest box that holds all that is true."""
    axes = range(region.ndim)
    spans = (np.flatnonzero(region.any(axis=tuple(other for other in axes if other != axis))) for axis in axes)
    return tuple(slice(int(span[0]), int(span[-1]) + 1) for span in spans)


def framed(arrays: Sequence[Array], box: tuple[slice, ...]) -> list[Array]:
    """What lies in a box, with one voxel of background around it."""
    return [np.pad(array[box], 1) for array in arrays]


def _majority_mask(arrays: Sequence[Array]) -> Array:
    result = np.zeros_like(arrays[0])
    for value in values_of(arrays):
        votes = np.sum([array == value for array in arrays], axis=0, dtype=np.uint16)
        result[2 * votes > len(arrays)] = value
    return result


def _staple_mask(arrays: Sequence[Array]) -> Array:
    values = values_of(arrays)
    if len(values) == 1:
        probability = staple([array == values[0] for array in arrays]).probability
        return np.where(probability >= 0.5, values[0], 0).astype(np.uint8)
    import SimpleITK

    multi = SimpleITK.MultiLabelSTAPLEImageFilter()
    multi.SetMaximumNumberOfIterations(_ITERATIONS)
    multi.SetLabelForUndecidedPixels(0)
    return np.asarray(SimpleITK.GetArrayFromImage(multi.Execute([_image(array) for array in arrays])))


def values_of(arrays: Sequence[Array]) -> list[int]:
    """The values that masks have besides the background's, rising."""
    return sorted({int(value) for array in arrays for value in np.unique(array)} - {0})


def _image(array: Array) -> Any:
    import SimpleITK

    return SimpleITK.GetImageFromArray(array.astype(np.uint8))


@dataclass(frozen=True)
class Staple:
    """What STAPLE estimates of one structure.

    Attributes:
        probability: of each voxel, that it belongs to the structure.
        sensitivity: of each reader, p of the paper: the part of the structure that the reader marked.
        specificity: of each reader, q of the paper: the part of the rest that the reader left.
    """

    probability: Array
    sensitivity: tuple[float, ...]
    specificity: tuple[float, ...]


def staple(masks: Sequence[npt.NDArray[np.bool_]]) -> Staple:
    """STAPLE of one structure over all voxels given, of which some are marked by nobody.

    The prior is ITK's: the mean part of the voxels that readers mark.
    """
    import SimpleITK

    single = SimpleITK.STAPLEImageFilter()
    single.SetForegroundValue(1.0)
    single.SetMaximumIterations(_ITERATIONS)
    probability = SimpleITK.GetArrayFromImage(single.Execute([_image(mask) for mask in masks]))
    return Staple(np.asarray(probability), tuple(single.GetSensitivity()), tuple(single.GetSpecificity()))
