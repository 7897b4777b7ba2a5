from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from locum.common.errors import DataError
from locum.simulations.federations import FederationSpec, federation


def _four(seed: int) -> FederationSpec:
    return FederationSpec(sites=4, seed=seed, size_skew=0.3, label_skew=4.0, scanner_shift=0.8, broken=0.05)


def test_one_seed_gives_one_federation() -> None:
    assert federation(_four(3)) == federation(_four(3))
    assert federation(_four(3)) != federation(_four(4))


@given(sites=st.integers(1, 60), patients=st.integers(1, 80), skew=st.floats(0, 3))
def test_sizes_add_up_fall_with_rank_and_leave_nobody_empty(sites: int, patients: int, skew: float) -> None:
    sizes = [made.patients for made in federation(FederationSpec(sites, 1, patients=patients, size_skew=skew))]
    assert sum(sizes) == sites * patients
    assert sizes == sorted(sizes, reverse=True)
    assert min(sizes) >= 1


def test_names_are_unique_and_fit_the_site_name_rule() -> None:
    names = [made.name for made in federation(FederationSpec(200, 0, patients=1))]
    assert len(set(names)) == 200
    assert all(len(name) <= 40 and set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-") for name in names)


def test_label_skew_spreads_prevalence_around_the_federations_own() -> None:
    def shares(alpha: float | None) -> np.ndarray:
        spec = FederationSpec(200, 0, patients=2, prevalence=0.4, label_skew=alpha)
        return np.array([made.prevalence for made in federation(spec)])

    assert set(shares(None)) == {0.4}
    assert shares(0.2).std() > 0.3
    assert shares(10.0).std() < 0.15
    assert abs(shares(2.0).mean() - 0.4) < 0.05


def test_without_shift_there_is_one_scanner_and_with_it_four() -> None:
    for shift, kinds in ((0.0, 1), (1.0, 4)):
        made = federation(FederationSpec(4, 0, scanner_shift=shift))
        assert len({(one.scanner, one.vessel_contrast, one.spacing, one.diameters) for one in made}) == kinds


def test_a_site_that_joins_changes_no_other_sites_patients_and_scanner() -> None:
    few, many = (federation(FederationSpec(sites, 5)) for sites in (3, 9))
    assert [(one.seed, one.scanner, one.spacing) for one in few] == [
        (one.seed, one.scanner, one.spacing) for one in many[:3]
    ]


def test_pictures_of_one_slice_come_in_both_photometric_interpretations() -> None:
    made = federation(FederationSpec(4, 0, modality="DX", dims=2, shape=(1, 64, 64), spacing=(1.0, 2.0, 2.0)))
    assert {one.storage.inverted for one in made} == {False, True}
    assert {one.storage.bits for one in made} == {12, 14, 15, 16}


def test_the_demo_has_both_classes_everywhere_and_some_broken_files() -> None:
    for seed in range(20):
        for made in federation(_four(seed)):
            assert 3 <= round(made.prevalence * made.patients) <= made.patients - 3
            assert made.broken >= 1


@pytest.mark.parametrize(
    "wrong",
    [
        {"sites": 0},
        {"patients": 0},
        {"prevalence": -0.1},
        {"scanner_shift": 2.0},
        {"label_skew": 0.0},
        {"size_skew": -1.0},
        {"modality": "DX"},
        {"dims": 2},
    ],
)
def test_an_impossible_federation_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(DataError):
        replace(FederationSpec(4, 0), **wrong)
