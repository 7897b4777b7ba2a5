"""How far several readers of the same images agree: kappa of labels, Dice of masks, and what STAPLE says of each.

Rules:
  * Agreement is among readers of the same image; an image with one reader says nothing of it.
  * Of masks only sums are kept: the memory does not grow with the images.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt

from locum.site_client.imaging.grids import Volume
from locum.site_client.imaging.labels.readers import box_of, framed, staple, values_of


def dice(one: npt.NDArray[np.bool_], other: npt.NDArray[np.bool_]) -> float | None:
    """Dice coefficient 2|A ∩ B| / (|A| + |B|); None if both are empty."""
    size = int(np.count_nonzero(one)) + int(np.count_nonzero(other))
    return 2 * int(np.count_nonzero(one & other)) / size if size else None


def cohen_kappa(pairs: Sequence[tuple[str, str]]) -> float | None:
    """Cohen's kappa of two readers (Educ Psychol Meas 20, 1960); None if chance alone would agree always."""
    if not pairs:
        return None
    total = len(pairs)
    observed = sum(one == other for one, other in pairs) / total
    first, second = (Counter(pair[side] for pair in pairs) for side in (0, 1))
    expected = sum(first[label] * second[label] for label in first) / total**2
    return (observed - expected) / (1 - expected) if expected < 1 else None


def fleiss_kappa(readings: Sequence[Sequence[str]]) -> float | None:
    """Fleiss' kappa (Psychol Bull 76, 1971) of images with two or more labels each; None as for Cohen's.

    Images may have different numbers of readers: the agreement of an image is then over its own pairs of readers, and
    the part of a label is over all labels given.
    """
    rated = [Counter(labels) for labels in readings if len(labels) > 1]
    if not rated:
        return None
    total = sum(counts.total() for counts in rated)
    observed = sum(_pairs_agreeing(counts) for counts in rated) / len(rated)
    parts = sum(rated, Counter())
    expected = sum((votes / total) ** 2 for votes in parts.values())
    return (observed - expected) / (1 - expected) if expected < 1 else None


def _pairs_agreeing(counts: Counter[str]) -> float:
    readers = counts.total()
    return sum(votes * (votes - 1) for votes in counts.values()) / (readers * (readers - 1))


@dataclass
class LabelAgreement:
    """Agreement of labels, case by case."""

    _readings: list[dict[str, str]] = field(default_factory=list)

    def add(self, labels: Mapping[str, str]) -> None:
        """What each reader said of one image; one reader alone says nothing of agreement."""
        if len(labels) > 1:
            self._readings.append(dict(labels))

    def summary(self) -> dict[str, Any]:
        """Numbers of images and readers, and kappa: of all labels, and of each against the rest.

        Cohen's if two readers read every image, else Fleiss'.
        """
        readers = sorted({reader for labels in self._readings for reader in labels})
        classes = sorted({label for labels in self._readings for label in labels.values()})
        cohens = len(readers) == 2
        return {
            "images": len(self._readings),
            "readers": len(readers),
            "statistic": "cohen" if cohens else "fleiss",
            "kappa": self._kappa(None, readers),
            "classes": {label: self._kappa(label, readers) for label in classes},
        }

    def _kappa(self, label: str | None, readers: Sequence[str]) -> float | None:
        named = [
            {reader: said if label is None else str(said == label) for reader, said in labels.items()}
            for labels in self._readings
        ]
        if len(readers) == 2:
            return cohen_kappa([(labels[readers[0]], labels[readers[1]]) for labels in named])
        return fleiss_kappa([list(labels.values()) for labels in named])


@dataclass
class _Mean:
    total: float = 0.0
    count: int = 0
    least: float = float("inf")

    def add(self, value: float | None) -> None:
        if value is not None:
            self.total, self.count, self.least = self.total + value, self.count + 1, min(self.least, value)

    @property
    def mean(self) -> float | None:
        return self.total / self.count if self.count else None


@dataclass
class MaskAgreement:
    """Agreement of masks, case by case; of each only sums are kept."""

    _images: int = 0
    _dice: dict[int, _Mean] = field(default_factory=dict)
    _rates: dict[tuple[int, str], tuple[_Mean, _Mean]] = field(default_factory=dict)

    def add(self, masks: Mapping[str, Volume]) -> None:
        """What each reader drew on one image; one reader alone says nothing of agreement."""
        if len(masks) < 2:
            return
        self._images += 1
        arrays = [volume.array for volume in masks.values()]
        union = np.logical_or.reduce([array != 0 for array in arrays])
        if not union.any():
            return
        inside = framed(arrays, box_of(union))
        for value in values_of(inside):
            self._add_structure(value, dict(zip(masks, [array == value for array in inside], strict=True)))

    def _add_structure(self, value: int, masks: Mapping[str, npt.NDArray[np.bool_]]) -> None:
        mean = self._dice.setdefault(value, _Mean())
        for one, other in combinations(masks.values(), 2):
            mean.add(dice(one, other))
        estimate = staple(list(masks.values()))
        for reader, sensitivity, specificity in zip(masks, estimate.sensitivity, estimate.specificity, strict=True):
            rates = self._rates.setdefault((value, reader), (_Mean(), _Mean()))
            rates[0].add(sensitivity)
            rates[1].add(specificity)

    def summary(self) -> dict[str, Any]:
        """Number of images; of each value the mean and least Dice of two readers, and what STAPLE says of each reader.

        Specificity holds within the box around all readers' masks.
        """
        return {
            "images": self._images,
            "structures": {
                str(value): {
                    "dice": mean.mean,
                    "least_dice": mean.least if mean.count else None,
                    "pairs": mean.count,
                    "readers": self._readers(value),
                }
                for value, mean in sorted(self._dice.items())
            },
        }

    def _readers(self, value: int) -> dict[str, dict[str, float | int | None]]:
        return {
            reader: {"images": first.count, "sensitivity": first.mean, "specificity": second.mean}
            for (number, reader), (first, second) in sorted(self._rates.items())
            if number == value
        }
