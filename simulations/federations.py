"""Simulated federations: how several hospitals differ in size, labels and scanners.

Rules:
  * One seed, one federation, whatever the machine.
  * Hospitals differ by their places on a few physical scales (kernel, noise, contrast medium, case mix, voxel
    size). Four archetypes span the scales, so a federation differs by its `scanner_shift` whatever the seed.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np

from locum.common.errors import DataError
from locum.simulations.hospitals import HospitalSpec, Modality, Task, check_share
from locum.simulations.phantoms import TISSUES, Scanner, Vector
from locum.simulations.scans import VENDORS, Storage

# First words of the seeds, as in hospitals.py.
_LABELS, _SEEDS, _PLACES = 100, 101, 102

_NAMES = (
    "north", "riverside", "st-anne", "lakeview", "hillcrest", "old-harbour", "eastgate", "marienhof",
    "westfield", "st-luke", "kingsbridge", "pinewood", "southbank", "bellevue", "fairmount", "castlegate",
)  # fmt: skip

#: How vendors store CT: unsigned 12 bits, signed 16 bits, half units in 14 bits, signed 13 bits.
_CT_STORAGE = (
    Storage(bits=12, intercept=-1024.0),
    Storage(bits=16, signed=True, intercept=0.0),
    Storage(bits=14, slope=0.5, intercept=-1024.0),
    Storage(bits=13, signed=True, intercept=0.0),
)


@dataclass(frozen=True)
class FederationSpec:
    """Several simulated institutions and how much they differ.

    Attributes:
        sites: how many.
        seed: of everything.
        patients: per site, on average.
        size_skew: sizes follow rank^-size_skew; 0 makes all sites equal.
        prevalence: share of patients with a lesion over all sites.
        label_skew: concentration α of the Dirichlet of each site's labels; small is skewed, None is equal.
        scanner_shift: 0 (one scanner everywhere) to 1 (as different as scanners are).
        broken: share of patients to which some damage is done.
        follow_ups: share of patients with a second study.
        modality: CT, MR, CR or DX.
        dims: 3 for volumes, 2 for single pictures.
        shape: voxels of an average scanner (slices, rows, columns).
        spacing: mm of an average scanner (slice, row, column).
        task: classification or segmentation.
    """

    sites: int
    seed: int
    patients: int = 60
    size_skew: float = 0.0
    prevalence: float = 0.5
    label_skew: float | None = None
    scanner_shift: float = 0.5
    broken: float = 0.0
    follow_ups: float = 0.1
    modality: Modality = "CT"
    dims: Literal[2, 3] = 3
    shape: tuple[int, int, int] = (16, 48, 48)
    spacing: Vector = (5.0, 2.5, 2.5)
    task: Task = "classification"

    def __post_init__(self) -> None:
        for name in ("prevalence", "scanner_shift", "broken", "follow_ups"):
            check_share(name, getattr(self, name))
        if self.sites < 1 or self.patients < 1:
            raise DataError(
                f"a federation of {self.sites} sites with {self.patients} patients each is empty",
                "give at least one site and one patient",
            )
        if self.size_skew < 0 or (self.label_skew is not None and self.label_skew <= 0):
            raise DataError("size_skew or label_skew is out of range", "give size_skew >= 0 and label_skew > 0")
        if (self.dims == 3) != (self.modality in {"CT", "MR"}):
            raise DataError(
                f"{self.modality} does not come in {self.dims} dimensions",
                "use CT or MR with dims 3, CR or DX with dims 2",
            )


def federation(spec: FederationSpec) -> tuple[HospitalSpec, ...]:
    """The hospitals of a federation; one seed, one answer."""
    rng = np.random.default_rng((spec.seed, _LABELS))
    sizes = _sizes(spec)
    shares = _prevalences(spec, rng)
    return tuple(
        replace(_hospital(spec, site), patients=size, prevalence=share, broken=round(spec.broken * size))
        for site, (size, share) in enumerate(zip(sizes, shares, strict=True))
    )


def _sizes(spec: FederationSpec) -> list[int]:
    """Patients per site: rank^-skew of the total, every site at least one, largest remainders first."""
    total = spec.sites * spec.patients
    weights = np.arange(1, spec.sites + 1, dtype=np.float64) ** -spec.size_skew
    exact = weights / weights.sum() * (total - spec.sites)
    sizes = np.floor(exact).astype(int)
    short = total - spec.sites - int(sizes.sum())
    sizes[np.argsort(sizes - exact, kind="stable")[:short]] += 1
    return [int(size) + 1 for size in sizes]


def _prevalences(spec: FederationSpec, rng: np.random.Generator) -> list[float]:
    """Each site's share of patients with a lesion."""
    if spec.label_skew is None or spec.prevalence in {0.0, 1.0}:
        return [spec.prevalence] * spec.sites
    alpha = 2 * spec.label_skew * np.array([spec.prevalence, 1 - spec.prevalence])
    return [round(float(share), 4) for share in rng.dirichlet(alpha, spec.sites)[:, 0]]


@dataclass(frozen=True)
class _Places:
    """Where one hospital stands on the scales on which hospitals differ, each from -1 to 1.

    Attributes:
        kernel: sharp to smooth.
        noise: low to high dose noise.
        level: calibration and enhancement of the tissue.
        vessels: how much contrast medium the vessels hold.
        lesions: how much the lesions take up.
        size: of the lesions that it sees.
        plane: pixel spacing.
        between: slice spacing.
    """

    kernel: float
    noise: float
    level: float
    vessels: float
    lesions: float
    size: float
    plane: float
    between: float


#: Four hospitals of which none stands in the middle; further sites vary around them.
_ARCHETYPES = (
    _Places(kernel=-1, noise=-0.3, level=-0.3, vessels=1, lesions=0.3, size=1, plane=1, between=-1),
    _Places(kernel=1, noise=1, level=-1, vessels=-1, lesions=1, size=-0.3, plane=-1, between=0.3),
    _Places(kernel=0.3, noise=0.3, level=1, vessels=0.3, lesions=-0.3, size=-1, plane=-0.3, between=1),
    _Places(kernel=-0.3, noise=-1, level=0.3, vessels=-0.3, lesions=-1, size=0.3, plane=0.3, between=-0.3),
)
_VARIATION = 0.15


def _places(spec: FederationSpec, site: int) -> _Places:
    """The site's archetype, varied by the seed and scaled by the shift that was asked for."""
    rng = np.random.default_rng((spec.seed, _PLACES, site))
    archetype = asdict(_ARCHETYPES[site % len(_ARCHETYPES)])
    return _Places(
        **{
            scale: float(np.clip(place + rng.uniform(-_VARIATION, _VARIATION), -1, 1)) * spec.scanner_shift
            for scale, place in archetype.items()
        }
    )


def _hospital(spec: FederationSpec, site: int) -> HospitalSpec:
    """One hospital with its own scanner, files and habits, and as yet nobody in it."""
    lap, name = divmod(site, len(_NAMES))
    places = _places(spec, site)
    vendors = tuple(VENDORS)
    return HospitalSpec(
        name=_NAMES[name] + (f"-{lap + 1}" if lap else ""),
        seed=_seed(spec, site),
        patients=0,
        prevalence=spec.prevalence,
        modality=spec.modality,
        vendor=vendors[site % len(vendors)],
        scanner=_scanner(spec, places),
        storage=_storage(spec, site),
        orientation="oblique" if spec.dims == 3 and spec.scanner_shift > 0 and site % 4 == 2 else "axial",
        feet_first=spec.dims == 3 and site % 2 == 1,
        follow_ups=spec.follow_ups,
        habits=site,
        task=spec.task,
        **_imaging(spec, places),
    )


def _seed(spec: FederationSpec, site: int) -> int:
    """A hospital's own seed; it does not change when more sites join."""
    return int(np.random.SeedSequence((spec.seed, _SEEDS, site)).generate_state(1, np.uint32)[0])


def _imaging(spec: FederationSpec, places: _Places) -> dict[str, Any]:
    """Voxel size, contrast medium and case mix."""
    plane, between = 1 + 0.12 * places.plane, 1 + 0.15 * places.between
    smallest = spec.spacing[1] * spec.shape[1] * (0.14 + 0.02 * places.size)
    return {
        "shape": spec.shape,
        "spacing": tuple(
            round(mm * factor, 3) for mm, factor in zip(spec.spacing, (between, plane, plane), strict=True)
        ),
        "vessel_contrast": round(1 + 0.4 * places.vessels, 3),
        "lesion_contrast": round(1 + 0.25 * places.lesions, 3),
        "diameters": (round(smallest, 2), round(1.8 * smallest, 2)),
    }


def _scanner(spec: FederationSpec, places: _Places) -> Scanner:
    """Kernel, noise and calibration; units follow the modality's tissue table."""
    unit = TISSUES[spec.modality].lesion
    magnetic = spec.modality == "MR"
    return Scanner(
        kernel=round(0.4 + 0.8 * places.kernel, 3),
        noise=round(0.11 * unit * 2**places.noise, 3),
        gain=1.0 if spec.modality == "CT" else round(2**places.level, 3),
        offset=round(0.1 * unit * places.level, 3) if spec.modality == "CT" else 0.0,
        bias=0.15 * spec.scanner_shift if magnetic else 0.0,
        rician=magnetic,
    )


def _storage(spec: FederationSpec, site: int) -> Storage:
    if spec.modality == "CT":
        return _CT_STORAGE[site % len(_CT_STORAGE)]
    return Storage(bits=(12, 14, 16, 15)[site % 4], intercept=0.0, inverted=spec.dims == 2 and site % 2 == 1)
