"""Subgroups at a site: their sums add up to the whole, and few patients are told apart from no others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from locum.common.messages import EvaluateResult, EvaluateTask, Tensors, pack, unpack
from locum.common.plan import Plan
from locum.common.secagg.upload import TOLD
from locum.common.sums import cells_of, metric_lengths
from locum.site_client import gate
from locum.site_client.gate import Made, Policy, told_cells
from locum.site_client.imaging.catalog import Catalog
from locum.site_client.operations import OPERATIONS
from locum.site_client.session import open_session
from locum.site_client.settings import Settings
from tests.plans import initial
from tests.site_client.asking import plan

A, B, OTHER = "manufacturer=A", "manufacturer=B", "manufacturer=other"


def grouped(*makers: str, **changes: Any) -> Plan:
    return plan(evaluation__subgroups=[{"by": "manufacturer", "values": list(makers)}], **changes)


def evaluated(settings: Settings, of: Plan, fold: str = "test") -> tuple[dict[str, Any], Mapping[str, Any]]:
    return OPERATIONS["evaluate"](open_session(settings, of), {"round": 0, "fold": fold}, initial(of))


# --- the worker


@pytest.mark.parametrize("named", ["maker", "nobody"])
def test_the_sums_of_the_cells_add_up_to_the_whole(settings: Settings, named: str) -> None:
    catalog = Catalog.open(settings.stores[0])
    (maker,) = {fact.manufacturer for fact in catalog.facts()}
    catalog.close()
    asked = maker.swapcase() if named == "maker" else "Nobody Medical"
    of = grouped(asked, evaluation__metrics=["AUC", "accuracy", "calibration", "Brier"])
    done, sums = evaluated(settings, of)
    cells = cells_of(of, "test")
    for name in of.released_metrics:
        assert np.sum([sums[cell.of(name)] for cell in cells], axis=0) == pytest.approx(sums[name])
    counts = {cell.value: float(sums[cell.of("cases")][0]) for cell in cells}
    mine = asked if named == "maker" else "other"
    assert counts == {asked: 0, "other": 0} | {mine: done["cases"]}
    assert len(done["cells"][f"manufacturer={mine}"]) <= done["cases"]


def test_only_the_test_fold_is_told_apart(settings: Settings) -> None:
    of = grouped("A")
    done, sums = evaluated(settings, of, "validation")
    assert done["cells"] == {}
    assert set(sums) == set(of.evaluation.metrics)


# --- the gate

cells = st.dictionaries(st.sampled_from(["A", "B", "C", "other"]), st.frozensets(st.integers(0, 40)), min_size=1)


@given(cells, st.integers(1, 15))
def test_neither_a_told_value_nor_the_others_together_are_few(found: dict[str, frozenset[int]], least: int) -> None:
    told = told_cells(found, least)
    assert "other" not in told
    assert all(len(found[value]) >= least for value in told)
    left = frozenset[int]().union(*(patients for value, patients in found.items() if value not in told))
    assert not told or not left or len(left) >= least


def test_a_value_is_told_apart_if_it_and_all_others_are_enough() -> None:
    one, two, three = (frozenset(range(start, start + 12)) for start in (0, 20, 40))
    assert told_cells({"A": one, "B": two, "other": three}, 10) == {"A", "B"}
    assert told_cells({"A": one, "B": two, "other": frozenset()}, 10) == {"A", "B"}
    assert told_cells({"A": frozenset(range(30, 50)), "B": one, "other": frozenset({60, 61})}, 10) == {"A"}
    assert told_cells({"A": one, "other": frozenset({60})}, 10) == set()


def made(of: Plan, patients: Mapping[str, int]) -> Made:
    sums: Tensors = {name: np.ones(length) for name, length in metric_lengths(of, "test").items()}
    numbered, start = {}, 0
    for cell, count in patients.items():
        numbered[cell] = list(range(start, start + count))
        start += count
    return Made(sums, {"cases": start, "cells": numbered})


@pytest.mark.parametrize("secure", [False, True])
def test_what_a_site_has_too_few_of_is_with_the_others(secure: bool) -> None:
    protection = {"participation__quorum": 3} if secure else {}
    of = grouped("A", "B", **protection, protection__secure_aggregation="required" if secure else "off")
    task = EvaluateTask(plan_digest=of.digest, round=1, fold="test")
    found = made(of, {A: 30, B: 12, OTHER: 9})
    if secure:
        left: Mapping[str, Any] = gate.mask_metrics(Policy(), of, task, found).given.scalars
    else:
        left = unpack(pack(*gate.release_metrics(Policy(), of, task, found)), EvaluateResult)[1]
    for name in ("AUC", "accuracy", "cases"):
        assert (left[f"{name}@{A}"] == 1).all()
        assert not left[f"{name}@{B}"].any(), "the others would be 9 patients"
        assert (left[f"{name}@{OTHER}"] == 2).all()
    assert (left["AUC"] == 1).all()


def test_the_policy_says_how_small_is_small() -> None:
    of = grouped("A")
    task = EvaluateTask(plan_digest=of.digest, round=1, fold="test")
    found = made(of, {A: 30, OTHER: 5})
    for least, told in ((10, False), (5, True)):
        left = unpack(pack(*gate.release_metrics(Policy(least_cell=least), of, task, found)), EvaluateResult)[1]
        assert bool(left[f"AUC@{A}"].any()) is told
        assert (left[f"AUC@{OTHER}"] == (1 if told else 2)).all()


def test_cells_are_never_told_in_the_clear_beside_a_secure_sum() -> None:
    of = grouped("A", protection__secure_aggregation="required", participation__quorum=3,
                 release__per_site=["metrics"])  # fmt: skip
    task = EvaluateTask(plan_digest=of.digest, round=1, fold="test")
    masked = gate.mask_metrics(Policy(), of, task, made(of, {A: 30, OTHER: 30}))
    assert set(masked.told) == {f"{TOLD}AUC", f"{TOLD}accuracy"}


def test_a_worker_that_does_not_say_who_is_in_a_cell_has_none_told() -> None:
    of = grouped("A")
    task = EvaluateTask(plan_digest=of.digest, round=1, fold="test")
    found = made(of, {A: 30, OTHER: 30})
    released = gate.release_metrics(Policy(), of, task, Made(found.tensors, {"cases": 60}))
    left = unpack(pack(*released), EvaluateResult)[1]
    assert not left[f"AUC@{A}"].any()
    assert (left[f"AUC@{OTHER}"] == 2).all()


def test_a_site_that_keeps_its_own_metrics_back_refuses_subgroups_of_secure_sums() -> None:
    of = grouped("A", protection__secure_aggregation="required", participation__quorum=3)
    (refusal,) = gate.refusals(Policy(release_site_metrics=False), of)
    assert refusal.clause == "release_site_metrics"
    assert not list(gate.refusals(Policy(), of))
    assert not list(gate.refusals(Policy(release_site_metrics=False), plan(protection__secure_aggregation="required")))


def test_a_site_without_a_case_gives_zeros() -> None:
    of = grouped("A", protection__secure_aggregation="required", participation__quorum=3)
    task = EvaluateTask(plan_digest=of.digest, round=1, fold="test")
    masked = gate.mask_metrics(Policy(), of, task, Made({}, {"cases": 0}))
    assert set(masked.given.scalars) == {*metric_lengths(of, "test"), "cases"}
    assert not any(array.any() for array in masked.given.scalars.values())
