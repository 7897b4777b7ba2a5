"""Cases of a catalog as batches for a network.

Rules:
  * Training reads the NIfTI store, never DICOM. The deterministic transforms run once per case and are kept in memory
    as far as the budget allows; what does not fit is prepared again each time.
  * Every draw comes from a generator seeded by (seed, site, round): MONAI's loader would otherwise rewind torch's
    default generator and repeat the same augmentation every round.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import nibabel
import numpy as np
import torch
from monai.data import CacheDataset, DataLoader, list_data_collate
from monai.data.meta_tensor import MetaTensor
from monai.transforms import Compose, EnsureTyped, MapTransform
from torch.utils.data import Sampler

from locum.common import build
from locum.common.errors import Code, SiteFailure
from locum.common.plan import Plan
from locum.site_client.imaging.catalog import Case

Batch = Mapping[str, Any]


def draw_seed(seed: int, site: str, round_number: int, purpose: str = "train", attempt: int = 1) -> int:
    """A 32-bit seed from (seed, site, round, purpose, attempt): equal on every machine, different for every use."""
    again = f"\x00{attempt}" if attempt > 1 else ""
    text = f"{seed}\x00{site}\x00{round_number}\x00{purpose}{again}".encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:4], "big")


class LoadVolumed(MapTransform):  # type: ignore[misc]  # MONAI is untyped
    """Reads NIfTI files of the store as channel-first images with their affine (RAS, mm).

    MONAI's own `LoadImaged` starts every reader it knows, whatever is asked for, and warns about the absent ones.
    """

    def __init__(self, keys: Sequence[str], dimensions: int) -> None:
        super().__init__(keys)
        self._dimensions = dimensions

    def __call__(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """Replaces each path by a MetaTensor: channel × space."""
        return {**data, **{key: self._load(data[key]) for key in self.keys}}

    def _load(self, path: str) -> MetaTensor:
        image = nibabel.load(path)
        array = np.asanyarray(image.dataobj)
        volume = array.reshape(array.shape + (1,) * (4 - array.ndim))
        space = volume[:, :, 0] if self._dimensions == 2 else volume
        first = np.ascontiguousarray(np.moveaxis(space, -1, 0), dtype=np.float32)
        return MetaTensor(torch.from_numpy(first), affine=torch.from_numpy(np.array(image.affine)))


class RecordSpacing(MapTransform):  # type: ignore[misc]  # MONAI is untyped
    """Keeps the voxel spacing (mm) of the prepared image, before its metadata is dropped."""

    def __call__(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """Adds `spacing` (one float per spatial axis) to an item."""
        image = data["image"]
        dimensions = image.ndim - 1
        pixdim = image.pixdim if isinstance(image, MetaTensor) else torch.ones(dimensions)
        return {**data, "spacing": pixdim[:dimensions].to(torch.float32)}


class CheckMask(MapTransform):  # type: ignore[misc]  # MONAI is untyped
    """Refuses a mask with a value that is no class: on a GPU such a value would end the worker."""

    def __init__(self, keys: Sequence[str], classes: int) -> None:
        super().__init__(keys)
        self._classes = classes

    def __call__(self, data: Mapping[str, Any]) -> Mapping[str, Any]:
        """Gives the item back as it is; raises ValueError."""
        for key in self.keys:
            largest = float(data[key].max())
            if largest >= self._classes:
                raise ValueError(f"the {key} has the value {largest:g}, the plan has {self._classes} classes")
        return data


def _pipeline(plan: Plan, *, augment: bool) -> Compose:
    keys = ["image", "mask"] if plan.contract.task == "segmentation" else ["image"]
    return Compose(
        [
            LoadVolumed(keys, plan.contract.dimensions),
            *build.transforms(plan, "prepare"),
            RecordSpacing(keys=["image"]),
            EnsureTyped(keys=keys, dtype=torch.float32, track_meta=False),
            *(CheckMask([key], len(plan.contract.classes)) for key in keys[1:]),
            *(build.transforms(plan, "augment") if augment else []),
        ]
    )


def _item(plan: Plan, index: int, case: Case) -> dict[str, Any]:
    item: dict[str, Any] = {"index": index, "image": str(case.image)}
    if plan.contract.task == "segmentation":
        if case.mask is None:
            raise SiteFailure(Code.DATA_UNREADABLE, f"case {case.id} has no mask")
        return {**item, "mask": str(case.mask)}
    if case.label not in plan.contract.classes:
        raise SiteFailure(Code.DATA_UNREADABLE, f"case {case.id} has the label {case.label!r}, not in the plan")
    return {**item, "label": plan.contract.classes.index(case.label)}


def dataset(plan: Plan, cases: Sequence[Case], *, augment: bool, budget_bytes: int) -> CacheDataset:
    """The cases as a dataset whose deterministic part is cached, for as many as fit the budget, judged by the first.

    Raises:
        SiteFailure: NO_DATA if there is no case, DATA_UNREADABLE if one cannot be loaded or transformed.
    """
    if not cases:
        raise SiteFailure(Code.NO_DATA, "no case in this fold")
    items = [_item(plan, index, case) for index, case in enumerate(cases)]
    pipeline = _pipeline(plan, augment=augment)
    # Some of MONAI's augmentations write into their input (RandCoarseDropoutd does): they get a copy.
    keep = partial(CacheDataset, transform=pipeline, num_workers=0, progress=False, copy_cache=augment)
    with _unreadable():
        size = held_bytes(keep(items[:1]))
        made = keep(items, cache_num=max(0, budget_bytes // max(1, size)))
        _check_first(plan, made[0], augment=augment)
    return made


@contextmanager
def _unreadable() -> Iterator[None]:
    """Raises SiteFailure (DATA_UNREADABLE) for what reading and transforming a case may raise."""
    try:
        yield
    except (RuntimeError, ValueError, TypeError, KeyError, OSError, IndexError) as error:
        raise SiteFailure(Code.DATA_UNREADABLE, _with_causes(error)) from error


def _with_causes(error: BaseException) -> str:
    """An error and its causes: MONAI's own says only which transform failed."""
    said = f"{type(error).__name__}: {error}"
    return said if error.__cause__ is None else f"{said}; from {_with_causes(error.__cause__)}"


def held_bytes(data: CacheDataset) -> int:
    """The memory of the prepared cases that a dataset keeps."""
    kept = data._cache  # noqa: SLF001 - MONAI tells how many it keeps, but not how large they are
    return sum(value.nbytes for item in kept for value in item.values() if isinstance(value, torch.Tensor))


def _check_first(plan: Plan, item: Any, *, augment: bool) -> None:
    first = item[0] if isinstance(item, list) else item
    channels, size = first["image"].shape[0], tuple(first["image"].shape[1:])
    whole = plan.contract.task == "classification" or augment
    if channels != plan.contract.channels or (whole and size != plan.training.input_size):
        raise ValueError(
            f"the transforms give {channels} channels of {list(size)}, the plan says "
            f"{plan.contract.channels} of {list(plan.training.input_size)}"
        )


class Draws(Sampler[int]):
    """Indices for a number of steps: shuffled passes over all cases, or draws with equal chance for every class."""

    def __init__(self, labels: Sequence[int] | None, count: int, total: int, generator: torch.Generator) -> None:
        """Args: labels of the cases for balanced draws or None, number of cases, draws in all, generator."""
        self._labels, self._count, self._total, self._generator = labels, count, total, generator

    def __len__(self) -> int:
        return self._total

    def __iter__(self) -> Iterator[int]:
        if self._labels is None:
            yield from self._passes()
            return
        frequency = np.bincount(self._labels)
        weights = torch.tensor([1.0 / frequency[label] for label in self._labels], dtype=torch.float64)
        yield from torch.multinomial(weights, self._total, replacement=True, generator=self._generator).tolist()

    def _passes(self) -> Iterator[int]:
        left = self._total
        while left > 0:
            order = torch.randperm(self._count, generator=self._generator).tolist()
            yield from order[:left]
            left -= len(order)


def steps_of(plan: Plan, cases: int) -> int:
    """Optimiser steps of one round at a site with `cases` training cases."""
    training = plan.training
    if training.local_steps is not None:
        return training.local_steps
    return (training.local_epochs or 1) * -(-cases // training.batch_size)


def training_loader(plan: Plan, data: CacheDataset, *, site: str, round_number: int, attempt: int = 1) -> DataLoader:
    """The batches of one round; the same (plan, data, site, round, attempt) gives the same batches.

    Each of the round's steps has a full batch, or all cases where a site has fewer.
    """
    seed = draw_seed(plan.seed, site, round_number, attempt=attempt)
    generator = torch.Generator().manual_seed(seed)
    data.transform.set_random_state(seed=seed)
    size = min(plan.training.batch_size, len(data))
    balanced = plan.training.sampling == "balanced" and plan.contract.task == "classification"
    labels = [int(item["label"]) for item in data.data] if balanced else None
    draws = Draws(labels, len(data), steps_of(plan, len(data)) * size, generator)
    return DataLoader(data, batch_size=size, sampler=draws, generator=generator, collate_fn=list_data_collate)


def read(loader: DataLoader) -> Iterator[Batch]:
    """The batches of a loader; raises SiteFailure (DATA_UNREADABLE) at a case that cannot be read."""
    batches = iter(loader)
    while True:
        with _unreadable():
            batch = next(batches, None)
        if batch is None:
            return
        yield batch


@dataclass(frozen=True)
class People:
    """The training cases of a site, patient by patient, for training with differential privacy.

    Attributes:
        dataset: the cases.
        cases: the cases of each patient, as positions in the dataset.
    """

    dataset: CacheDataset
    cases: tuple[tuple[int, ...], ...]

    def reseed(self) -> None:
        """Starts augmentation anew, from the operating system's entropy.

        With a seed that the plan tells, what is drawn for one patient would tell which patients were drawn before it.
        """
        self.dataset.transform.set_random_state(seed=int.from_bytes(os.urandom(4), "big"))

    def read(self, cases: Sequence[int]) -> Batch:
        """Some cases of one patient as one batch, with all the crops that augmentation makes of each.

        Raises SiteFailure (DATA_UNREADABLE).
        """
        with _unreadable():
            batch: Batch = list_data_collate([self.dataset[case] for case in cases])
            return batch


def people(prepared: CacheDataset, cases: Sequence[Case]) -> People:
    """The cases of a dataset, which are `cases` in their order, by patient."""
    found: dict[str, list[int]] = {}
    for place, case in enumerate(cases):
        found.setdefault(case.patient, []).append(place)
    return People(prepared, tuple(map(tuple, found.values())))


def evaluation_loader(plan: Plan, data: CacheDataset) -> DataLoader:
    """The cases in their order; one at a time where sizes may differ."""
    size = 1 if plan.contract.task == "segmentation" else plan.evaluation.batch_size
    return DataLoader(data, batch_size=size, shuffle=False, generator=torch.Generator(), collate_fn=list_data_collate)
