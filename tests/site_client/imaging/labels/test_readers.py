"""Several readers: one label or mask out of theirs, and how far they agree."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import cohen_kappa_score

from locum.site_client.imaging.grids import Volume
from locum.site_client.imaging.labels.agreement import (
    LabelAgreement,
    MaskAgreement,
    cohen_kappa,
    dice,
    fleiss_kappa,
)
from locum.site_client.imaging.labels.readers import consensus_mask, majority, staple

words = st.sampled_from(["lesion", "normal", "unclear"])


def on_grid(array):
    return Volume(np.asarray(array, dtype=np.uint8), np.diag([1.0, 1.0, 2.0, 1.0]))


def simulated(truth, rates, seed=0):
    """What readers of known sensitivity and specificity mark."""
    rng = np.random.default_rng(seed)
    return [np.where(truth, rng.random(truth.shape) < p, rng.random(truth.shape) >= q) for p, q in rates]


@given(st.lists(words, max_size=9))
def test_a_majority_is_more_than_half_or_nobody(labels):
    found = majority(labels)
    assert found is None or labels.count(found) > len(labels) / 2
    assert found is not None or all(labels.count(label) <= len(labels) / 2 for label in labels)


@settings(deadline=None)
@given(st.integers(1, 5), st.integers(0, 1000), st.integers(1, 3))
def test_a_voxel_has_the_value_of_more_than_half_of_the_readers_or_is_background(readers, seed, most):
    masks = np.random.default_rng(seed).integers(0, most + 1, (readers, 4, 5, 3)).astype(np.uint8)
    found = consensus_mask([on_grid(mask) for mask in masks], "majority").array
    for index in np.ndindex(found.shape):
        votes = masks[(slice(None), *index)]
        expected = [value for value in range(1, most + 1) if (votes == value).sum() > readers / 2]
        assert found[index] == (expected[0] if expected else 0)


@pytest.mark.parametrize("how", ["majority", "staple"])
def test_readers_who_agree_are_their_own_consensus_and_an_empty_mask_stays_empty(how):
    mask = np.zeros((6, 7, 4))
    assert not consensus_mask([on_grid(mask)] * 3, how).array.any()
    mask[2:4, 1:5, 1:3], mask[4, 4, 1] = 1, 2
    found = consensus_mask([on_grid(mask)] * 3, how)
    assert np.array_equal(found.array, mask)
    assert found.array.dtype == np.uint8
    assert np.array_equal(consensus_mask([on_grid(mask)], how).array, mask)


@settings(deadline=None, max_examples=200)
@given(
    shape=st.tuples(*[st.integers(1, 4)] * 3),
    readers=st.integers(2, 4),
    seed=st.integers(0, 10_000),
    part=st.sampled_from([0.05, 0.5, 0.9, 1.0]),
)
def test_staple_has_an_answer_for_every_mask_between_what_all_and_what_any_mark(shape, readers, seed, part):
    rng = np.random.default_rng(seed)
    masks = rng.random((readers, *shape)) < part
    found = consensus_mask([on_grid(mask) for mask in masks], "staple").array
    assert (found[masks.all(axis=0)] == 1).all()
    assert (found[~masks.any(axis=0)] == 0).all()
    agreement = MaskAgreement()
    agreement.add({str(number): on_grid(mask) for number, mask in enumerate(masks)})
    rates = [rate for one in agreement.summary()["structures"].values() for rate in one["readers"].values()]
    assert np.isfinite([(rate["sensitivity"], rate["specificity"]) for rate in rates]).all()


@pytest.mark.parametrize("how", ["majority", "staple"])
@pytest.mark.parametrize("values", [(1,), (2,), (1, 2)])
def test_readers_who_all_mark_the_whole_image_are_believed(how, values):
    mask = np.resize(values, (4, 4, 2))
    assert np.array_equal(consensus_mask([on_grid(mask)] * 2, how).array, mask)


def test_staple_recovers_the_rates_of_simulated_readers():
    """As in the paper: ten simulated raters of sensitivity 0.95 and specificity 0.90, half of the image foreground."""
    truth = np.zeros((256, 256), dtype=bool)
    truth[:, 128:] = True
    found = staple(simulated(truth, [(0.95, 0.90)] * 10))
    assert found.sensitivity == pytest.approx([0.95] * 10, abs=0.01)
    assert found.specificity == pytest.approx([0.90] * 10, abs=0.01)
    assert ((found.probability >= 0.5) == truth).mean() > 0.999


def test_staple_tells_a_careful_reader_from_careless_ones_and_follows_the_careful():
    truth = np.zeros((60, 60, 10), dtype=bool)
    truth[15:45, 15:45, 2:8] = True
    rates = [(0.98, 0.99), (0.75, 0.90), (0.70, 0.85)]
    masks = simulated(truth, rates)
    found = staple(masks)
    assert np.argmax(found.sensitivity) == 0
    assert np.argmax(found.specificity) == 0
    by_staple = consensus_mask([on_grid(mask) for mask in masks], "staple").array
    by_majority = consensus_mask([on_grid(mask) for mask in masks], "majority").array
    assert dice(by_staple == 1, truth) > dice(by_majority == 1, truth)


def expectation_maximisation(masks, rounds):
    """STAPLE by the paper's equations 11, 12 and 18, 19, over the patterns of decisions; the prior is ITK's."""
    decisions = np.stack([mask.ravel() for mask in masks]).T
    patterns, where, counts = np.unique(decisions, axis=0, return_inverse=True, return_counts=True)
    prior = decisions.mean()
    p = q = np.full(len(masks), 0.99999)
    for _ in range(rounds):
        foreground = prior * np.where(patterns, p, 1 - p).prod(axis=1)
        background = (1 - prior) * np.where(patterns, 1 - q, q).prod(axis=1)
        weight = foreground / (foreground + background)
        p = (weight * counts) @ patterns / (weight @ counts)
        q = ((1 - weight) * counts) @ ~patterns / ((1 - weight) @ counts)
    return p, q, weight[where.ravel()].reshape(masks[0].shape)


@pytest.mark.parametrize("seed", range(4))
def test_staple_is_the_expectation_maximisation_of_the_paper(seed):
    truth = np.zeros((40, 40, 6), dtype=bool)
    truth[8:30, 10:35, 1:5] = True
    masks = simulated(truth, [(0.9, 0.95), (0.85, 0.97), (0.7, 0.9), (0.95, 0.8)], seed)
    p, q, weight = expectation_maximisation(masks, rounds=300)
    found = staple(masks)
    assert found.sensitivity == pytest.approx(p, abs=1e-3)
    assert found.specificity == pytest.approx(q, abs=1e-3)
    assert np.allclose(found.probability, weight, atol=1e-2)


def test_staple_of_several_structures_is_nearer_to_each_than_the_best_reader():
    truth = np.zeros((40, 40, 8), dtype=np.uint8)
    truth[5:20, 5:35, 1:7], truth[22:36, 8:30, 2:6] = 1, 2
    rng = np.random.default_rng(0)
    masks = [
        np.where(rng.random(truth.shape) < error, rng.integers(0, 3, truth.shape), truth) for error in (0.1, 0.2, 0.3)
    ]
    found = consensus_mask([on_grid(mask) for mask in masks], "staple").array
    for value in (1, 2):
        best = max(dice(mask == value, truth == value) for mask in masks)
        assert dice(found == value, truth == value) > best + 0.05


def test_what_all_readers_leave_out_around_their_masks_changes_nothing():
    truth = np.zeros((20, 20, 6), dtype=bool)
    truth[5:15, 5:15, 1:5] = True
    masks = [mask & truth for mask in simulated(truth, [(0.9, 1), (0.8, 1), (0.95, 1)])]
    small = consensus_mask([on_grid(mask) for mask in masks], "staple").array
    padded = [np.pad(mask, ((30, 10), (0, 25), (4, 4))) for mask in masks]
    large = consensus_mask([on_grid(mask) for mask in padded], "staple").array
    assert np.array_equal(large[30:50, :20, 4:10], small)
    assert large.sum() == small.sum()


@given(st.lists(st.tuples(words, words), min_size=1, max_size=30))
def test_cohens_kappa_is_that_of_scikit_learn(pairs):
    one, other = zip(*pairs, strict=True)
    found = cohen_kappa(pairs)
    if found is None:
        assert len({*one, *other}) == 1
    else:
        assert found == pytest.approx(cohen_kappa_score(one, other), abs=1e-12)


def test_fleiss_kappa_of_fourteen_readers_and_ten_images_is_the_published_one():
    """The worked example of ten subjects, fourteen raters and five categories: kappa 0.210."""
    table = """0 0 0 0 14, 0 2 6 4 2, 0 0 3 5 6, 0 3 9 2 0, 2 2 8 1 1,
               7 7 0 0 0, 3 2 6 3 0, 2 5 3 2 2, 6 5 2 1 0, 0 2 2 3 7"""
    readings = [
        [str(label) for label, votes in enumerate(map(int, line.split())) for _ in range(votes)]
        for line in table.split(",")
    ]
    assert fleiss_kappa(readings) == pytest.approx(0.210, abs=5e-4)
    assert fleiss_kappa([*readings, ["0"]]) == fleiss_kappa(readings)
    assert fleiss_kappa([["a", "a"], ["a", "a"]]) is None
    assert fleiss_kappa([["a"], []]) is None


def test_label_agreement_has_kappa_of_all_and_of_each_class():
    pairs = [("lesion", "lesion")] * 5 + [("normal", "normal")] * 3 + [("lesion", "normal")] * 2
    agreement = LabelAgreement()
    for one, other in pairs:
        agreement.add({"A": one, "B": other})
    agreement.add({"A": "lesion"})
    found = agreement.summary()
    assert (found["images"], found["readers"], found["statistic"]) == (10, 2, "cohen")
    assert found["kappa"] == pytest.approx(cohen_kappa_score(*zip(*pairs, strict=True)))
    assert found["classes"]["lesion"] == pytest.approx(found["kappa"])
    agreement.add({"A": "unclear", "C": "unclear"})
    assert agreement.summary()["statistic"] == "fleiss"
    assert LabelAgreement().summary()["kappa"] is None


def test_mask_agreement_has_dice_of_each_pair_and_the_rates_of_each_reader():
    truth = np.zeros((30, 30, 6), dtype=bool)
    truth[8:22, 8:22, 1:5] = True
    agreement = MaskAgreement()
    expected = []
    for seed in range(3):
        masks = simulated(truth, [(0.95, 0.99), (0.9, 0.98), (0.8, 0.97)], seed)
        agreement.add(dict(zip("ABC", (on_grid(mask) for mask in masks), strict=True)))
        expected += [dice(one, other) for one, other in itertools.combinations(masks, 2)]
    agreement.add({"A": on_grid(truth)})
    found = agreement.summary()
    assert found["images"] == 3
    structure = found["structures"]["1"]
    assert structure["dice"] == pytest.approx(np.mean(expected))
    assert structure["least_dice"] == pytest.approx(min(expected))
    assert structure["pairs"] == 9
    rates = [structure["readers"][reader]["sensitivity"] for reader in "ABC"]
    assert rates == sorted(rates, reverse=True)
    assert all(structure["readers"][reader]["images"] == 3 for reader in "ABC")


def test_a_structure_that_only_one_reader_marks_lowers_the_agreement():
    one, other = np.zeros((2, 5, 5, 2))
    one[1:3, 1:3] = 1
    agreement = MaskAgreement()
    agreement.add({"A": on_grid(one), "B": on_grid(other)})
    agreement.add({"A": on_grid(other), "B": on_grid(other)})
    assert agreement.summary()["structures"]["1"]["dice"] == 0
    assert agreement.summary()["structures"]["1"]["pairs"] == 1
