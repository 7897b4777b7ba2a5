"""An upload: the tensors in which a site gives to one sum, made piece by piece while they are written.

scalars       64-bit lane: weight, loss, counts, metric sums (masked)
update        the coordinates of all shared tensors, by name ascending, each in C order (masked; not where only metrics
              are summed)
boxes         by receiver's place, the shares of the seeds, sealed to that site
commitments   by place, the SHA-256 of the seed shared with that site; at the giver's own place, of its self-mask's
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from locum.common.secagg import keys, skellam
from locum.common.secagg.masks import Masks, Stream
from locum.common.secagg.ring import CHUNK, Floats, Ring, Scalar, write_scalars
from locum.common.secagg.roster import Roster
from locum.common.secagg.shares import SHARE_BYTES
from locum.common.secagg.site import Masking
from locum.common.tensor_files import Arrays, Lazy, Tensor, forget_part

SCALARS, UPDATE, BOXES, COMMITMENTS = "scalars", "update", "boxes", "commitments"
SCALAR_LANE, UPDATE_LANE = 0, 1
#: How the names of tensors begin that a site tells of itself beside its upload, in the clear, where the plan asks.
TOLD = "told."
_COMMITMENT_BYTES = 32


@dataclass(frozen=True)
class Layout:
    """What an upload to a sum holds.

    Attributes:
        roster: the sites.
        ring: how the coordinates of an update are written.
        size: how many coordinates an update has; 0 where no update is summed.
        lane: the scalars, in their order.
        noise: variance of the Skellam noise that a site adds to each coordinate of its update, in steps²; 0 for none.
    """

    roster: Roster
    ring: Ring
    size: int
    lane: tuple[Scalar, ...]
    noise: float = 0.0

    @property
    def scalars(self) -> int:
        """Numbers in the scalars' lane."""
        return sum(scalar.length for scalar in self.lane)

    @property
    def bytes(self) -> int:
        """Of an upload's tensors."""
        sites = len(self.roster.members)
        boxes = sites * (sites * SHARE_BYTES + keys.BOX_BYTES + _COMMITMENT_BYTES)
        return 8 * self.scalars + self.size * self.ring.dtype.itemsize + boxes

    def problem(self, tensors: Arrays) -> str | None:
        """Why tensors are no upload, in words; None if they have its form, whatever is told beside it."""
        sites = len(self.roster.members)
        expected: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] = {
            SCALARS: (np.dtype("<u8"), (self.scalars,)),
            BOXES: (np.dtype("u1"), (sites, sites * SHARE_BYTES + keys.BOX_BYTES)),
            COMMITMENTS: (np.dtype("u1"), (sites, _COMMITMENT_BYTES)),
        }
        if self.size:
            expected[UPDATE] = (self.ring.dtype, (self.size,))
        found = {name: (array.dtype, array.shape) for name, array in tensors.items() if not name.startswith(TOLD)}
        return None if found == expected else "its tensors are not those of an upload to this sum"


@dataclass(frozen=True)
class Given:
    """What a site gives to a sum, before it is masked.

    Attributes:
        update: the update's tensors, within the plan's norm bound; none where only metrics are summed.
        weight: w' = min(w, W_max) / W_max, by which the update is multiplied; less where it is clipped.
        scalars: the numbers of the scalars' lane by name.
    """

    update: Arrays
    weight: float
    scalars: Mapping[str, Floats]


def masked(layout: Layout, given: Given, masking: Masking, rounding: Stream) -> dict[str, Tensor]:
    """The tensors of an upload; the update is quantised and masked when it is written, and can be written once.

    `rounding` is what the update is rounded by, and what its noise is drawn from. Raises RingError for a scalar beyond
    its bound.
    """
    scalars = write_scalars(layout.lane, given.scalars, len(layout.roster.members))
    Masks(SCALAR_LANE, add=masking.add, subtract=masking.subtract).apply(scalars)
    tensors: dict[str, Tensor] = {
        SCALARS: scalars,
        BOXES: _rows(masking.boxes),
        COMMITMENTS: _rows(masking.commitments),
    }
    if layout.size:
        pieces = _pieces(layout, given, masking, rounding)
        tensors[UPDATE] = Lazy(layout.ring.dtype, (layout.size,), pieces)
    return tensors


def _rows(rows: tuple[bytes, ...]) -> NDArray[np.uint8]:
    return np.frombuffer(b"".join(rows), np.uint8).reshape(len(rows), -1)


def _pieces(layout: Layout, given: Given, masking: Masking, rounding: Stream) -> Iterator[NDArray[Any]]:
    """The masked coordinates; each piece lies where the one before it lay."""
    ring, noise = layout.ring, skellam.of(layout.noise) if layout.noise else None
    masks = Masks(UPDATE_LANE, add=masking.add, subtract=masking.subtract)
    random, out, scratch = np.empty(CHUNK, np.uint32), np.empty(CHUNK, ring.dtype), np.empty((2, CHUNK))
    drawn = np.empty(CHUNK if noise else 0, np.int64)
    for name in sorted(given.update):
        flat = given.update[name].reshape(-1)
        for start in range(0, flat.size, CHUNK):
            part = flat[start : start + CHUNK]
            draws, piece = random[: part.size], out[: part.size]
            rounding.fill(draws)
            ring.write(part, given.weight, draws, piece, scratch[:, : part.size])
            forget_part(part)
            if noise is not None:
                noise.fill(drawn[: part.size], rounding)
                skellam.add(piece, drawn[: part.size])
            masks.apply(piece)
            yield piece
        forget_part(flat)  # once more: the kernel maps pages around each one that is read, also behind it
