from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from locum.simulations.phantoms import (
    TISSUES,
    Grid,
    Lesion,
    Scanner,
    acquire,
    draw_anatomy,
    draw_lesions,
    render,
)

GRID = Grid((16, 48, 48), (5.0, 2.5, 2.5), centre=(4.0, -7.0, 30.0))
OBLIQUE = Grid(
    (14, 40, 44), (4.0, 2.0, 2.2), row=(0.96, 0.28, 0.0), column=(-0.28 * 0.6, 0.96 * 0.6, 0.8), centre=(0, 9, -40)
)


def _centroid(mask: np.ndarray, grid: Grid) -> np.ndarray:
    index = np.argwhere(mask).mean(axis=0)
    return (grid.affine @ np.append(index, 1.0))[:3]


@pytest.mark.parametrize("grid", [GRID, OBLIQUE])
def test_the_mask_of_a_lesion_lies_where_the_truth_says(grid: Grid) -> None:
    rng = np.random.default_rng(3)
    anatomy = draw_anatomy(rng, grid)
    (lesion,) = draw_lesions(rng, anatomy, grid, count=1, diameters=(16, 20))
    phantom = render(anatomy, (lesion,), grid, TISSUES["CT"])
    assert np.linalg.norm(_centroid(phantom.mask, grid) - lesion.centre) < 2.0
    volume = phantom.mask.sum() * np.prod(grid.spacing)
    assert volume == pytest.approx(np.pi / 6 * lesion.diameter**3, rel=0.25)


def test_two_scanners_see_one_patient_at_the_same_place() -> None:
    rng = np.random.default_rng(5)
    anatomy = draw_anatomy(rng, GRID)
    lesion = Lesion((14.0, -2.0, 28.0), (20.0, 18.0, 22.0), 1.0)
    finer = Grid((32, 60, 60), (2.5, 2.0, 2.0), centre=GRID.centre)
    seen = [_centroid(render(anatomy, (lesion,), grid, TISSUES["CT"]).mask, grid) for grid in (GRID, finer)]
    assert np.linalg.norm(seen[0] - seen[1]) < 1.5


@given(seed=st.integers(0, 10_000), slices=st.integers(4, 20), size=st.floats(8, 24))
@settings(max_examples=25, deadline=None)
def test_a_lesion_lies_in_the_body_and_in_the_picture(seed: int, slices: int, size: float) -> None:
    rng = np.random.default_rng(seed)
    grid = Grid((slices, 40, 48), (4.0, 2.5, 2.0), row=OBLIQUE.row, column=OBLIQUE.column)
    anatomy = draw_anatomy(rng, grid)
    (lesion,) = draw_lesions(rng, anatomy, grid, count=1, diameters=(size, size))
    index = np.linalg.solve(grid.affine, np.append(lesion.centre, 1.0))[:3]
    assert np.all(index >= -0.5)
    assert np.all(index <= np.asarray(grid.shape) - 0.5)
    inside = np.subtract(lesion.centre, anatomy.shift)[:2] / anatomy.axes
    assert np.hypot(*inside) < 0.8


def test_no_intensity_tells_who_has_a_lesion() -> None:
    brightest, present = [], []
    for number in range(60):
        rng = np.random.default_rng(number)
        anatomy = draw_anatomy(rng, GRID)
        lesions = draw_lesions(rng, anatomy, GRID, count=number % 2, diameters=(14, 24))
        volume = acquire(render(anatomy, lesions, GRID, TISSUES["CT"]).volume, Scanner(noise=15), rng)
        brightest.append(volume[:, 14:34, 14:34].max())
        present.append(number % 2)
    assert roc_auc_score(present, brightest) < 0.85


@pytest.mark.parametrize("modality", sorted(TISSUES))
def test_every_modality_gives_finite_values_and_shows_the_lesion(modality: str) -> None:
    rng = np.random.default_rng(1)
    grid = Grid((1, 64, 64), (1.0, 2.0, 2.0)) if modality in {"CR", "DX"} else GRID
    anatomy = draw_anatomy(rng, grid, vessels=0)
    lesions = draw_lesions(rng, anatomy, grid, count=1, diameters=(24, 24))
    with_lesion, without = (render(anatomy, some, grid, TISSUES[modality]) for some in (lesions, ()))
    assert with_lesion.volume.dtype == np.float32
    assert np.isfinite(with_lesion.volume).all()
    difference = with_lesion.volume - without.volume
    assert difference[with_lesion.mask == 1].mean() > 0.5 * TISSUES[modality].lesion
    assert not without.mask.any()


def test_a_smooth_kernel_blurs_noise_and_a_sharp_one_raises_it() -> None:
    flat = np.zeros((6, 40, 40), dtype=np.float32)
    spread = {
        kernel: acquire(flat, Scanner(kernel=kernel, noise=10), np.random.default_rng(0)).std()
        for kernel in (-0.8, 0.0, 1.0)
    }
    assert spread[1.0] < 0.7 * spread[0.0] < 0.7 * spread[-0.8]


def test_a_magnitude_image_has_no_negative_values() -> None:
    flat = np.zeros((4, 20, 20), dtype=np.float32)
    shown = acquire(flat, Scanner(noise=10, rician=True, bias=0.2), np.random.default_rng(0))
    assert shown.min() >= 0
