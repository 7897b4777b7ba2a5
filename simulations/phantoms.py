"""Phantoms: small volumes of a body with vessels and lesions whose truth is known.

Rules:
  * Anatomy lives in patient coordinates (DICOM's LPS, mm), never in voxels: two scanners see the same patient
    through two grids, and the truth of a lesion is a point and a diameter in mm.
  * Anatomy, lesions and acquisition are drawn from generators that the caller hands over.
  * Vessels have a lesion's brightness and run through every patient, so no intensity tells who has a lesion:
    shape does.
  * Arrays are ordered (slice, row, column), as in highdicom.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Array = NDArray[np.float32]
Vector = tuple[float, float, float]

#: Normalised radii of the body: soft tissue up to the first, a broken rim of bone to the second, then fat.
SOFT_RADIUS, BONE_RADIUS = 0.80, 0.88
#: Lesions lie wholly within this normalised radius, away from the rim.
LESION_RADIUS = 0.74
_WAVES = 10


@dataclass(frozen=True)
class Grid:
    """Where the voxels of a volume lie in the patient.

    Attributes:
        shape: voxels (slices, rows, columns).
        spacing: mm between centres (slices, rows, columns).
        row: unit vector along a row (increasing column index), LPS; ImageOrientationPatient's first three.
        column: unit vector down a column (increasing row index), LPS; ImageOrientationPatient's last three.
        centre: mm, the middle of the volume, LPS.
    """

    shape: tuple[int, int, int]
    spacing: Vector
    row: Vector = (1.0, 0.0, 0.0)
    column: Vector = (0.0, 1.0, 0.0)
    centre: Vector = (0.0, 0.0, 0.0)

    @cached_property
    def normal(self) -> NDArray[np.float64]:
        """Unit vector from one slice to the next: row × column (PS3.3 C.7.6.2.1.1)."""
        normal: NDArray[np.float64] = np.cross(self.row, self.column)
        return normal

    @cached_property
    def steps(self) -> NDArray[np.float64]:
        """Columns are the mm of one step along slice, row index and column index; shape (3, 3)."""
        steps: NDArray[np.float64] = np.stack([self.normal, self.column, self.row], axis=1) * self.spacing
        return steps

    @cached_property
    def origin(self) -> NDArray[np.float64]:
        """Position in mm of voxel (0, 0, 0), LPS."""
        middle = (np.asarray(self.shape) - 1) / 2
        position: NDArray[np.float64] = np.asarray(self.centre) - self.steps @ middle
        return position

    @cached_property
    def affine(self) -> NDArray[np.float64]:
        """Index (slice, row, column) to LPS mm, shape (4, 4)."""
        matrix = np.eye(4)
        matrix[:3, :3], matrix[:3, 3] = self.steps, self.origin
        return matrix

    @cached_property
    def points(self) -> Array:
        """LPS mm of every voxel's centre relative to :attr:`centre`, shape (3, voxels)."""
        return _points(replace(self, centre=(0.0, 0.0, 0.0)))

    def extent(self) -> NDArray[np.float64]:
        """Size in mm along the patient's x, y and z of the imaged box."""
        size: NDArray[np.float64] = np.abs(self.steps) @ np.asarray(self.shape, dtype=np.float64)
        return size


@lru_cache(maxsize=8)
def _points(centred: Grid) -> Array:
    """A hospital images all its patients with one grid, so its coordinates are computed once."""
    index = np.indices(centred.shape, dtype=np.float32).reshape(3, -1)
    points: Array = centred.steps.astype(np.float32) @ index + centred.origin.astype(np.float32)[:, None]
    points.setflags(write=False)
    return points


def vector(values: NDArray[np.float64]) -> Vector:
    """Three numbers as plain data."""
    x, y, z = (float(value) for value in values)
    return x, y, z


class Tissue(NamedTuple):
    """What a scanner shows of each tissue: HU for CT, arbitrary units for MR, detector units for X-rays.

    Attributes:
        air: outside of the body.
        fat: under the skin.
        bone: the rim.
        soft: inside.
        texture: standard deviation of the soft tissue's slow variation.
        vessel: added to `soft` in a vessel.
        lesion: added to `soft` in a lesion of contrast 1.
    """

    air: float
    fat: float
    bone: float
    soft: float
    texture: float
    vessel: float
    lesion: float


#: Tissue as seen by the average scanner, by DICOM Modality.
TISSUES = {
    "CT": Tissue(air=-1000, fat=-100, bone=420, soft=40, texture=8, vessel=160, lesion=150),
    "MR": Tissue(air=0, fat=820, bone=60, soft=380, texture=35, vessel=330, lesion=280),
    "CR": Tissue(air=120, fat=900, bone=2900, soft=1500, texture=90, vessel=560, lesion=480),
    "DX": Tissue(air=120, fat=900, bone=2900, soft=1500, texture=90, vessel=560, lesion=480),
}


@dataclass(frozen=True)
class Lesion:
    """One lesion of known truth.

    Attributes:
        centre: LPS mm.
        diameters: mm along x, y, z of the patient.
        contrast: share of the tissue table's lesion brightness.
    """

    centre: Vector
    diameters: Vector
    contrast: float

    @property
    def diameter(self) -> float:
        """Diameter in mm of the sphere of the same volume."""
        return math.prod(self.diameters) ** (1 / 3)

    def grown(self, factor: float) -> Lesion:
        """The same lesion at a follow-up, every diameter times `factor`."""
        x, y, z = (diameter * factor for diameter in self.diameters)
        return Lesion(self.centre, (x, y, z), self.contrast)


@dataclass(frozen=True)
class Anatomy:
    """One patient without lesions, in mm relative to the grid's centre.

    Attributes:
        axes: mm, semi-axes of the elliptic body along the patient's x and y.
        shift: mm, the body's centre.
        tubes: vessels, shape (tubes, 7): a point, a unit direction, a radius.
        waves: slow variation of the tissue, shape (waves, 4): radians per mm along x, y, z and a phase.
    """

    axes: tuple[float, float]
    shift: Vector
    tubes: NDArray[np.float64]
    waves: NDArray[np.float64]


class Phantom(NamedTuple):
    """A volume and its truth.

    Attributes:
        volume: (slices, rows, columns) in the tissue table's units.
        mask: 1 inside lesions, same shape, uint8.
        lesions: the truth, centres in LPS mm.
    """

    volume: Array
    mask: NDArray[np.uint8]
    lesions: tuple[Lesion, ...]


def draw_anatomy(rng: np.random.Generator, grid: Grid, vessels: int = 5) -> Anatomy:
    """A patient that fills the grid's field of view as a technician would choose it."""
    width, height, _ = grid.extent()
    scale = rng.uniform(0.84, 0.94, 2) / 2
    shift = rng.normal(0, 0.012, 3) * (width, height, 0)
    axes = (float(width * scale[0]), float(height * scale[1] * 0.92))
    return Anatomy(axes, vector(shift), _draw_tubes(rng, grid, axes, vessels), _draw_waves(rng, axes))


def _draw_tubes(rng: np.random.Generator, grid: Grid, axes: tuple[float, float], count: int) -> NDArray[np.float64]:
    """Straight vessels through the body; where there is one slice only, they run within it."""
    angle, radius = rng.uniform(0, 2 * math.pi, count), np.sqrt(rng.uniform(0.02, 0.42, count))
    point = np.stack([axes[0] * radius * np.cos(angle), axes[1] * radius * np.sin(angle), np.zeros(count)], axis=1)
    direction = rng.normal(0, (0.45, 0.45, 1.0), (count, 3))
    if grid.shape[0] == 1:
        direction -= np.outer(direction @ grid.normal, grid.normal) + 1e-6
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    thickness = rng.uniform(0.035, 0.06, (count, 1)) * min(axes)
    return np.concatenate([point, direction, thickness], axis=1)


def _draw_waves(rng: np.random.Generator, axes: tuple[float, float]) -> NDArray[np.float64]:
    lengths = rng.uniform(0.35, 1.6, (_WAVES, 1)) * max(axes)
    direction = rng.normal(size=(_WAVES, 3))
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    return np.concatenate([2 * math.pi / lengths * direction, rng.uniform(0, 2 * math.pi, (_WAVES, 1))], axis=1)


def draw_lesions(
    rng: np.random.Generator, anatomy: Anatomy, grid: Grid, *, count: int, diameters: tuple[float, float]
) -> tuple[Lesion, ...]:
    """Draw `count` ellipsoids inside the body and the imaged slices; `diameters` is the range in mm."""
    return tuple(_draw_lesion(rng, anatomy, grid, diameters) for _ in range(count))


def _draw_lesion(rng: np.random.Generator, anatomy: Anatomy, grid: Grid, diameters: tuple[float, float]) -> Lesion:
    diameter = rng.uniform(*diameters)
    along = diameter * rng.uniform(0.85, 1.15, 3)
    angle, share = rng.uniform(0, 2 * math.pi), math.sqrt(rng.uniform())
    room = [max(LESION_RADIUS * axis - diameter / 2, 0.0) for axis in anatomy.axes]
    z = rng.uniform(-0.5, 0.5) * grid.extent()[2]
    offset = np.array([share * room[0] * math.cos(angle), share * room[1] * math.sin(angle), z]) + anatomy.shift
    centre = _within(grid, offset, diameter / 2) + grid.centre
    return Lesion(vector(centre), vector(along), float(rng.uniform(0.8, 1.2)))


def _within(grid: Grid, offset: NDArray[np.float64], margin: float) -> NDArray[np.float64]:
    """The point nearest to `offset` (mm from the grid's centre) that is `margin` mm inside the imaged box."""
    most = np.maximum(np.asarray(grid.shape) / 2 - margin / np.asarray(grid.spacing), 0)
    inside: NDArray[np.float64] = grid.steps @ np.clip(np.linalg.solve(grid.steps, offset), -most, most)
    return inside


def render(anatomy: Anatomy, lesions: tuple[Lesion, ...], grid: Grid, tissue: Tissue) -> Phantom:
    """The noiseless volume of a patient on a grid; edges are one voxel wide, as partial volume makes them."""
    points = grid.points - np.asarray(anatomy.shift, dtype=np.float32)[:, None]
    waves = _waves(anatomy.waves, grid)
    body = np.hypot(points[0] / np.float32(anatomy.axes[0]), points[1] / np.float32(anatomy.axes[1]))
    volume = _layers(body, waves, tissue, np.float32(min(anatomy.axes)))
    inside = body < SOFT_RADIUS
    # Where vessel and lesion meet, the brighter shows: two media in one place do not add up.
    bright = np.maximum(_tubes(anatomy.tubes, points) * np.float32(tissue.vessel), 0)
    mask = np.zeros(volume.shape, dtype=np.uint8)
    for lesion in lesions:
        depth = _depth(lesion, grid)
        edge = np.clip(depth / 2 + np.float32(0.5), 0, 1) * np.float32(tissue.lesion * lesion.contrast)
        bright = np.where(np.abs(edge) > np.abs(bright), edge, bright)
        mask[depth >= 0] = 1
    volume += bright * inside
    return Phantom(volume.reshape(grid.shape), mask.reshape(grid.shape), lesions)


def _layers(body: Array, waves: Array, tissue: Tissue, radius: np.float32) -> Array:
    """Soft tissue, a broken rim of bone, fat and air by normalised radius `body`."""
    soft = np.float32(tissue.soft) + np.float32(tissue.texture) * waves
    rim = np.where(waves > 0, np.float32(tissue.bone), soft)
    layers = np.where(body < SOFT_RADIUS, soft, np.where(body < BONE_RADIUS, rim, np.float32(tissue.fat)))
    skin = np.clip((1 - body) * radius / 2 + np.float32(0.5), 0, 1)
    return np.asarray(skin * layers + (1 - skin) * np.float32(tissue.air), dtype=np.float32)


def _waves(waves: NDArray[np.float64], grid: Grid) -> Array:
    """Sum of plane waves with unit variance, shape (voxels,).

    On a grid a plane wave is a product of three one-dimensional ones, so the sum is one matrix product.
    """
    turn = waves[:, :3] @ grid.steps
    phase = np.exp(1j * waves[:, 3, None]).astype(np.complex64)
    s, r, c = (_turns(turn[:, axis], size) for axis, size in enumerate(grid.shape))
    plane = ((phase * s)[:, :, None] * r[:, None, :]).reshape(len(waves), -1)
    total: Array = (plane.real.T @ c.real - plane.imag.T @ c.imag) * np.float32(math.sqrt(2 / len(waves)))
    return total.ravel()


def _turns(step: NDArray[np.float64], size: int) -> NDArray[np.complex64]:
    """Waves along one axis, `step` radians a voxel and 0 in the middle; shape (waves, size)."""
    turns: NDArray[np.complex64] = np.exp(1j * step[:, None] * (np.arange(size) - (size - 1) / 2)).astype(np.complex64)
    return turns


def _tubes(tubes: NDArray[np.float64], points: Array) -> Array:
    """Share of every voxel that a vessel fills, shape (voxels,)."""
    if not len(tubes):
        return np.zeros(points.shape[1], dtype=np.float32)
    start, direction, radius = tubes[:, :3], tubes[:, 3:6], tubes[:, 6:]
    along = _dot(direction, points) - np.einsum("ij,ij->i", start, direction).astype(np.float32)[:, None]
    square = np.einsum("ij,ij->j", points, points) - 2 * _dot(start, points)
    square += np.einsum("ij,ij->i", start, start).astype(np.float32)[:, None]
    along *= along
    square -= along
    np.sqrt(np.maximum(square, 0, out=square), out=square)
    depth = np.max(radius.astype(np.float32) - square, axis=0)
    filled: Array = np.clip(depth / 2 + np.float32(0.5), 0, 1)
    return filled


def _dot(vectors: NDArray[np.float64], points: Array) -> Array:
    """Scalar products, shape (vectors, voxels); a library's matrix product would start threads for three terms."""
    products: Array = np.einsum("ij,jk->ik", vectors.astype(np.float32), points)
    return products


def _depth(lesion: Lesion, grid: Grid) -> Array:
    """Roughly the mm from every voxel to the lesion's surface, positive inside, shape (voxels,)."""
    offset = np.subtract(lesion.centre, grid.centre).astype(np.float32)
    scale = np.asarray(lesion.diameters, dtype=np.float32) / 2
    scaled = (grid.points - offset[:, None]) / scale[:, None]
    depth: Array = (1 - np.sqrt(np.einsum("ij,ij->j", scaled, scaled))) * np.float32(lesion.diameter / 2)
    return depth


@dataclass(frozen=True)
class Scanner:
    """What an acquisition does to a patient.

    Attributes:
        kernel: pixels in the plane; positive smooths with this σ, negative sharpens by as much.
        noise: standard deviation in the tissue table's units.
        gain: factor on all values: the arbitrary unit of MR and of X-ray detectors, 1 for CT.
        offset: added afterwards: drift of the calibration.
        bias: amplitude of the multiplicative field across the body (MR), 0 for none.
        rician: noise of a magnitude image (MR) instead of Gaussian noise.
    """

    kernel: float = 0.0
    noise: float = 0.0
    gain: float = 1.0
    offset: float = 0.0
    bias: float = 0.0
    rician: bool = False


def acquire(volume: Array, scanner: Scanner, rng: np.random.Generator) -> Array:
    """The volume as this scanner measures it."""
    shown = volume * np.float32(scanner.gain) + np.float32(scanner.offset)
    if scanner.bias:
        shown *= _bias_field(volume.shape, scanner.bias, rng)
    return _filtered(_noisy(shown, scanner, rng), scanner.kernel)


def _noisy(volume: Array, scanner: Scanner, rng: np.random.Generator) -> Array:
    noise = np.float32(scanner.noise)
    real = volume + noise * rng.standard_normal(volume.shape, dtype=np.float32)
    if not scanner.rician:
        return real
    magnitude: Array = np.hypot(real, noise * rng.standard_normal(volume.shape, dtype=np.float32))
    return magnitude


def _filtered(volume: Array, kernel: float) -> Array:
    """The reconstruction kernel acts on tissue and noise alike, within the slice."""
    if not kernel:
        return volume
    smooth: Array = ndimage.gaussian_filter1d(volume, abs(kernel), axis=1, truncate=2.5)
    smooth = ndimage.gaussian_filter1d(smooth, abs(kernel), axis=2, truncate=2.5)
    return smooth if kernel > 0 else volume + np.float32(0.6) * (volume - smooth)


def _bias_field(shape: tuple[int, ...], amplitude: float, rng: np.random.Generator) -> Array:
    """A slow field around 1: exp of a random plane plus a bowl, as a surface coil leaves it."""
    axes = [np.linspace(-1, 1, n, dtype=np.float32) if n > 1 else np.zeros(1, np.float32) for n in shape]
    slope = rng.normal(0, amplitude, 3).astype(np.float32)
    s, r, c = np.ix_(*axes)
    field: Array = np.exp(slope[0] * s + slope[1] * r + slope[2] * c - np.float32(amplitude / 2) * (r * r + c * c))
    return field
