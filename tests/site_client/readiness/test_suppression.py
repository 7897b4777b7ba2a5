"""Nothing that a site tells of few patients, or of none, follows from what it says."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from locum.common.envelope import Readiness
from locum.common.plan import AGE_BANDS
from locum.site_client import gate
from locum.site_client.gate import Policy
from locum.site_client.suppression import rounded, told
from tests.site_client.readiness.made import asking, measured, seen

_PEOPLE = st.lists(
    st.tuples(
        st.sampled_from(["F", "M", "O", ""]),
        st.sampled_from([5, 30, 50, 70, 90, None]),
        st.sampled_from(["SIEMENS", "Siemens Healthineers", "GE MEDICAL SYSTEMS", "Philips", "Somebody", ""]),
    ),
    max_size=60,
)


def _ways(total: int, parts: int) -> Iterator[tuple[int, ...]]:
    """Every way to divide so many patients into so many values."""
    if parts == 1:
        yield (total,)
        return
    for first in range(total + 1):
        for rest in _ways(total - first, parts - 1):
            yield (first, *rest)


def _named(counts: Sequence[int]) -> dict[str, int]:
    return {str(number): count for number, count in enumerate(counts)}


@pytest.mark.parametrize(("least", "most", "sizes", "reached"), [
    (2, 11, (3, 3), 0), (3, 16, (2, 2), 0), (3, 15, (3, 2), 0), (3, 15, (3, 2), 1), (3, 15, (3, 2), 5),
    (3, 15, (3, 2), 9), (2, 9, (2, 2, 2), 0),
])  # fmt: skip
def test_who_knows_the_rule_and_all_that_is_told_learns_of_no_small_number(
    least: int, most: int, sizes: tuple[int, ...], reached: int
) -> None:
    """Every site there can be is tried: those that say the same cannot be told apart by anybody.

    For each value of a grouping, and for all of its values together that are not told: if a site that says something
    has fewer than the least cell of it, then for each number below that some site says the same.
    """
    alike: dict[object, list[tuple[tuple[int, ...], ...]]] = defaultdict(list)
    for total in range(reached, most + 1):
        for ways in itertools.product(*(list(_ways(total, size)) for size in sizes)):
            groups = {str(by): _named(counts) for by, counts in enumerate(ways)}
            found = told(total, groups, least, reached=reached)
            alike[found.patients, repr(found.groups)].append(ways)
    for (_, groups), sites in alike.items():
        if max(sum(ways[0]) for ways in sites) > most - 2 * least:
            continue  # larger sites that would say the same were not tried
        hidden = [{v for v, n in cells.items() if n is None} for cells in _cells(groups)]
        for by, size in enumerate(sizes):
            for value in range(size):
                _is_open({ways[by][value] for ways in sites}, least)
            if hidden[by]:
                kept = [v for v in range(size) if _cells(groups)[by].get(str(v)) is None]
                _is_open({sum(ways[by][v] for v in kept) for ways in sites}, least)


def _cells(groups: Any) -> list[dict[str, int | None]]:
    return list(eval(groups).values())  # noqa: S307 - our own repr


def _is_open(numbers: set[int], least: int) -> None:
    small = {number for number in numbers if number < least}
    assert small in (set(), set(range(least))), (small, sorted(numbers))


def _said(people: Sequence[tuple[str, int | None, str]], least: int, **changes: Any) -> Readiness:
    of = asking(least_patients=1, strata=[], prevalence={}, single_class="allow", **changes)
    cases = [seen(of, n, sex=sex, age=age, manufacturer=maker) for n, (sex, age, maker) in enumerate(people)]
    policy = Policy(least_cell=least)
    return gate.readiness(policy, of, measured(of, cases, least_cell=least), site="north", run=None, at=0.0)


@settings(deadline=None)
@given(people=_PEOPLE, least=st.integers(1, 12))
def test_no_number_is_small_none_is_too_large_and_what_is_left_over_may_be_nobody(
    people: list[tuple[str, int | None, str]], least: int
) -> None:
    said = _said(people, least)
    numbers = [said.patients, *(n for cells in said.strata.values() for n in cells.values())]
    assert all(n is None or (n >= least and n % least == 0) for n in numbers)
    assert (said.patients or 0) <= len(people)
    for cells in said.strata.values():
        lowest = sum(cells.values())
        assert lowest <= (said.patients or 0)
        # The told patients alone can be as many as are told to be there: of the others nothing follows.
        assert (said.patients or 0) <= sum(n + least - 1 for n in cells.values())


@settings(deadline=None)
@given(people=_PEOPLE, least=st.integers(2, 12), number=st.integers(0, 11), sex=st.sampled_from(["M", "O", ""]))
def test_a_few_patients_more_or_less_of_a_value_that_is_not_told_change_no_number_of_it(
    people: list[tuple[str, int | None, str]], least: int, number: int, sex: str
) -> None:
    others = [one for one in people if one[0] != sex]
    few = [(sex, 50, "SIEMENS")] * min(number, least - 1)
    assert (sex or "unknown") not in _said([*others, *few], least).strata.get("sex", {})


@settings(deadline=None)
@given(people=_PEOPLE)
def test_a_site_that_is_not_ready_tells_no_number(people: list[tuple[str, int | None, str]]) -> None:
    said = _said(people, 10, modality=["MR"])
    assert (said.ready, said.patients, [n for cells in said.strata.values() for n in cells]) == (False, None, [])


@pytest.mark.parametrize(
    ("policy", "changes"),
    [
        ({"release_case_counts": False}, {}),
        ({}, {"release": {"case_counts": False}, "participation__weighting": "equal"}),
        ({}, {"protection__differential_privacy": {"epsilon": 1, "delta": 1e-6, "clip": 1, "metrics_epsilon": 1},
              "release": {"training_loss": False}}),
    ],
)  # fmt: skip
def test_numbers_are_told_only_where_policy_and_plan_let_them_be(policy: Any, changes: Any) -> None:
    from tests.plans import plan
    from tests.site_client.readiness.made import CONTRACT

    of = plan(contract=CONTRACT, **changes)
    found = measured(of)
    assert found.ready
    said = gate.readiness(Policy(**policy), of, found, site="north", run=None, at=0.0)
    assert (said.ready, said.patients) == (True, None)
    assert not any(said.strata.values())


@pytest.mark.parametrize(("count", "expected"), [(0, None), (9, None), (10, 10), (19, 10), (20, 20)])
def test_a_number_by_itself_is_rounded_down(count: int, expected: int | None) -> None:
    assert rounded(count, 10) == expected


def test_the_age_bands_are_those_of_the_plan() -> None:
    from locum.site_client.readiness.people import band_of

    assert [band_of(age) for age in (0, 17, 18, 39, 40, 64, 65, 89, 90, None)] == [
        AGE_BANDS[0], AGE_BANDS[0], AGE_BANDS[1], AGE_BANDS[1], AGE_BANDS[2], AGE_BANDS[2], AGE_BANDS[3], AGE_BANDS[3],
        AGE_BANDS[4], "unknown",
    ]  # fmt: skip
