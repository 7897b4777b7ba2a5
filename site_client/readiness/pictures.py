"""Slices of a site's cases for its steward: the middle one, or that with the most of the mask, and the mask's outline.

They are pictures of patients, and stay at the site.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from locum.site_client.desk.pictures import grey
from locum.site_client.desk.png import png
from locum.site_client.imaging.damage import damage_is
from locum.site_client.imaging.fitting import Seen
from locum.site_client.imaging.reasons import Reason, RefusedError

#: The longest side of a picture, in pixels.
SIDE = 240
_OUTLINE = (255, 214, 0)

Plane = NDArray[Any]


@dataclass(frozen=True)
class Picture:
    """One slice.

    Attributes:
        case: the case's name in the store.
        words: what it is of: label, fold, maker, size.
        source: a data: address of a PNG; empty if the file cannot be read.
    """

    case: str
    words: str
    source: str


def spread(seen: Iterable[Seen], count: int) -> list[Seen]:
    """Some cases, taking labels and makers in turn."""
    groups: dict[tuple[str, str], list[Seen]] = {}
    for one in seen:
        groups.setdefault((one.facts.label or "", one.facts.manufacturer), []).append(one)
    turns = max(map(len, groups.values()), default=0)
    return [group[turn] for turn in range(turns) for group in groups.values() if turn < len(group)][:count]


def picture(one: Seen) -> Picture:
    """A slice of a case."""
    facts = one.facts
    words = [facts.label or "", one.case.fold, facts.manufacturer, " × ".join(map(str, facts.shape))]
    if one.misses:
        words.append(f"not used: {', '.join(one.misses)}")
    try:
        with damage_is(Reason.UNREADABLE):
            source = _drawn(one)
    except RefusedError:  # a file that was removed or damaged since the ingest is a gap, and no failure
        source = ""
    return Picture(one.case.id, ", ".join(filter(None, words)), source)


def values(one: Seen) -> NDArray[np.float32]:
    """Some values of the middle slice of a case; none if its file cannot be read."""
    try:
        with damage_is(Reason.UNREADABLE):
            plane = _plane(one.case.image, None)
    except RefusedError:
        return np.zeros(0, np.float32)
    return np.asarray(plane[::4, ::4], np.float32).ravel()


def _drawn(one: Seen) -> str:
    at, outline = None, None
    if one.case.mask is not None:
        inside = _whole(one.case.mask) != 0
        at = int(inside.sum(axis=(0, 1)).argmax()) if inside.ndim == 3 else None
        outline = _edge(_upright(inside[:, :, at] if at is not None else inside))
    plane = _upright(_plane(one.case.image, at))
    shown = grey(plane) if plane.ndim == 2 else np.asarray(plane, np.uint8)
    colours = np.repeat(shown[..., None], 3, axis=2) if shown.ndim == 2 else shown.copy()
    if outline is not None and outline.shape == colours.shape[:2]:
        colours[outline] = _OUTLINE
    step = max(1, -(-max(colours.shape[:2]) // SIDE))
    content = png(np.ascontiguousarray(colours[::step, ::step]))
    return "data:image/png;base64," + base64.b64encode(content).decode()


def _plane(path: Path, at: int | None) -> Plane:
    """One slice (column, row[, channel]): the middle one unless told; no more of the file is read."""
    import nibabel

    data = nibabel.load(path).dataobj
    if len(data.shape) == 2:
        return np.asarray(data)
    found: Plane = np.asarray(data[:, :, data.shape[2] // 2 if at is None else at])
    return found


def _whole(path: Path) -> Plane:
    import nibabel

    found: Plane = np.asarray(nibabel.load(path).dataobj)
    return found


def _upright(plane: Plane) -> Plane:
    """As a viewer shows it: the store's axes are column and row with rows upwards."""
    return np.swapaxes(plane, 0, 1)[::-1]


def _edge(inside: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The pixels of a region that have a neighbour outside."""
    padded = np.pad(inside, 1)
    core = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return np.asarray(inside & ~core)
