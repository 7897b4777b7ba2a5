"""A site that does not meet one clause of a contract is told which, and how to mend it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from locum.common.envelope import CLAUSES
from locum.site_client.imaging.fitting import OF_IMAGES
from tests.site_client.readiness.made import DECLARED, asking, everybody, measured, seen


def test_a_site_that_has_what_is_asked_is_ready() -> None:
    found = measured(asking())
    assert found.ready
    assert [(one.clause, one.remedy) for one in found.results] == [(name, "") for name in CLAUSES]
    assert all(one.asked and one.measured for one in found.results)
    assert len(found.people) == 40


#: By clause that says which images are used, what is wrong with the images of a site.
_IMAGES: dict[str, dict[str, Any]] = {
    "modality": {"modality": "MR"},
    "dimensions": {"shape": (64, 64), "spacing": (1.0, 1.0), "slices": 40},
    "spacing": {"spacing": (1.0, 1.0, 3.1)},
    "sop_classes": {"sop_class": "1.2.840.10008.5.1.4.1.1.4"},
    "body_parts": {"body_part": ""},
    "orientation": {"orientation": "sagittal"},
    "least_slices": {"slices": 19},
    "months": {"month": "2025-01"},
}


def test_every_clause_of_images_is_tried_here() -> None:
    assert list(_IMAGES) == list(OF_IMAGES)


@pytest.mark.parametrize("clause", _IMAGES)
def test_images_that_miss_one_clause_keep_the_site_out(clause: str) -> None:
    of = asking()
    found = measured(of, everybody(of, **_IMAGES[clause]))
    assert found.failing == (clause, "least_patients")
    assert [one.clause for one in found.results if one.remedy] == [clause, "least_patients"]
    assert not found.fitting


@pytest.mark.parametrize("clause", _IMAGES)
def test_images_that_miss_a_clause_are_not_used_and_the_others_count(clause: str) -> None:
    of = asking()
    found = measured(of, [*everybody(of), seen(of, 99, **_IMAGES[clause])])
    assert found.ready
    assert (len(found.seen), len(found.fitting)) == (41, 40)
    assert "1 of 41 images is not used" in next(one.measured for one in found.results if one.clause == clause)


#: By clause that a site must meet as a whole, its cases, and what of its declarations is other.
_WHOLE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "least_patients": ({"count": 19, "sex": "F"}, {}),
    "classes": ({"label": "mass"}, {}),
    "single_class": ({"label": "lesion"}, {}),
    "codes": ({}, {"codes": {"lesion": ("SCT:4147007", "SCT:1")}}),
    "prevalence": ({}, {}),
    "strata": ({"sex": "M"}, {}),
    "deidentified": ({"profile": ""}, {}),
    "deface": ({"defaced": False}, {}),
    "consent": ({}, {"consent": False}),
}
_ALONE = {"prevalence": {}, "single_class": "allow"}


@pytest.mark.parametrize("clause", _WHOLE)
def test_a_clause_that_is_not_met_as_a_whole_keeps_the_site_out(clause: str) -> None:
    facts, declared = _WHOLE[clause]
    others = {"classes": _ALONE, "single_class": {"prevalence": {}}}.get(clause, {})
    of = asking(**others, **({"prevalence": {"lesion": {"most": 0.4}}} if clause == "prevalence" else {}))
    found = measured(of, everybody(of, **facts), replace(DECLARED, **declared))
    assert found.failing == (clause,)
    assert [one.clause for one in found.results if one.remedy] == [clause]


def test_every_clause_is_tried_here() -> None:
    assert [*_IMAGES, *_WHOLE] == list(CLAUSES)


def test_a_contract_without_the_newer_keys_asks_no_more_than_before() -> None:
    of = asking(sop_classes=[], body_parts=[], orientation=[], strata=[], least_slices=1, months={},
                codes={}, prevalence={}, deidentified=False, deface="none", consent="none")  # fmt: skip
    bare = {"sop_class": "", "body_part": "", "orientation": "", "slices": 1, "month": "", "profile": "", "sex": "",
            "age": None, "defaced": False}  # fmt: skip
    assert measured(of, everybody(of, **bare), replace(DECLARED, consent=False, codes={}, terminology="")).ready


def test_what_a_catalog_does_not_know_does_not_fit() -> None:
    of = asking(months={"first": "1900-01"})
    assert measured(of, everybody(of, month="")).failing == ("months", "least_patients")


def test_a_code_of_another_scheme_than_the_plans_says_nothing_and_none_at_all_fails() -> None:
    of = asking()
    both = replace(DECLARED, codes={"lesion": ("RADLEX:RID3874", "SCT:4147007")})
    assert measured(of, declared=both).ready
    other = replace(DECLARED, codes={"lesion": ("RADLEX:RID3874",)})
    assert measured(of, declared=other).failing == ("codes",)
    nothing = measured(of, declared=replace(DECLARED, codes={}, terminology=""))
    assert nothing.failing == ("codes",)
    assert "Write a terminology map" in next(one.remedy for one in nothing.results if one.clause == "codes")


def test_a_patient_counts_once_with_the_first_image() -> None:
    of = asking(least_patients=1, strata=[], prevalence={}, single_class="allow")
    cases = [
        seen(of, n, patient="same", sex=sex, manufacturer=maker)
        for n, (sex, maker) in enumerate([("M", "GE MEDICAL SYSTEMS"), ("F", "SIEMENS")])
    ]
    found = measured(of, cases[::-1])
    assert [(one.sex, one.maker) for one in found.people.values()] == [("M", "GE")]


def test_patients_of_other_folds_are_no_training_patients() -> None:
    of = asking(least_patients=30)
    cases = [*everybody(of, 29), *(seen(of, n, fold="test") for n in range(50, 90))]
    assert measured(of, cases).failing == ("least_patients",)


def test_a_site_with_few_patients_does_not_say_whether_it_has_none_or_a_few_that_a_clause_alone_keeps_out() -> None:
    of = asking(least_patients=1, strata=[], prevalence={}, single_class="allow")
    told = set()
    for fitting in range(1, 10):
        others = [seen(of, 50 + n, modality="MR") for n in range(25)]
        told.add(measured(of, [*everybody(of, fitting, slices=1), *others]).failing)
    none = measured(of, [seen(of, 50 + n, modality="MR") for n in range(25)])
    assert told == {none.failing} == {("modality", "least_patients")}
    exact = {one.clause: one.passed for one in measured(of, [*everybody(of, 5, slices=1), *others]).results}
    assert exact["modality"]  # the steward is told that five patients have CT


def test_a_site_with_few_patients_does_not_say_whether_a_clause_keeps_none_or_a_few_of_them_out() -> None:
    of = asking(least_patients=50, strata=[], prevalence={}, single_class="allow")
    kept_out = [[seen(of, 50 + n, modality="MR") for n in range(count)] for count in range(10)]
    assert {measured(of, [*everybody(of), *some]).failing for some in kept_out} == {("least_patients",)}
    many = [seen(of, 50 + n, modality="MR") for n in range(10)]
    assert measured(of, [*everybody(of), *many]).failing == ("modality", "least_patients")


@pytest.mark.parametrize("facts", [{"defaced": False}, {"profile": ""}, {"label": "other"}])
def test_a_site_with_few_patients_does_not_say_whether_one_of_them_has_an_image_that_a_clause_is_about(
    facts: dict[str, Any],
) -> None:
    of = asking(months={"first": "2024-03", "last": "2024-03"})
    crowd = everybody(of)
    nobody = measured(of, crowd)
    one = measured(of, [*crowd, seen(of, 99, **{"month": "2024-03"} | facts)])
    assert one.failing == nobody.failing == ("months", "least_patients")
    assert sum(not result.passed for result in one.results) == 3  # the steward is told


@pytest.mark.parametrize(("count", "met"), [(9, False), (10, True), (19, True)])
def test_a_group_counts_in_steps_of_the_least_cell(count: int, met: bool) -> None:
    of = asking(strata=[{"by": "sex", "value": "M", "least_patients": 1}])
    cases = [seen(of, n, sex="M" if n < count else "F", label=("lesion", "no_lesion")[n % 2]) for n in range(40)]
    assert measured(of, cases).ready is met


@pytest.mark.parametrize("having", range(10))
def test_a_class_of_a_few_patients_is_held_against_every_number_that_it_could_be(having: int) -> None:
    rare = asking(prevalence={"lesion": {"most": 0.1}}, single_class="allow", strata=[])
    wide = asking(prevalence={"lesion": {"most": 0.3}}, single_class="allow", strata=[])
    some = asking(prevalence={"lesion": {"least": 0.01}}, single_class="allow", strata=[])
    for of, met in ((rare, False), (wide, True), (some, False)):
        cases = [seen(of, n, label="lesion" if n < having else "no_lesion") for n in range(40)]
        assert measured(of, cases).ready is met
