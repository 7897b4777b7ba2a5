"""When a site works for others, and what its gate says at other times."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from locum.common.errors import MEANING, Code, SiteFailure
from locum.site_client import gate
from locum.site_client.gate import Policy, PolicyRefusal
from locum.site_client.hours import Window, open_at, window
from tests.plans import plan

MONDAY = datetime(2026, 11, 23)  # a clock on a wall


def _at(days: int, clock: str) -> datetime:
    hours, minutes = map(int, clock.split(":"))
    return MONDAY + timedelta(days=days, hours=hours, minutes=minutes)


@pytest.mark.parametrize(
    ("hours", "day", "clock", "is_open"),
    [
        ("08:00-18:00", 0, "08:00", True),
        ("08:00-18:00", 0, "17:59", True),
        ("08:00-18:00", 0, "18:00", False),
        ("20:00-06:00", 0, "23:00", True),
        ("20:00-06:00", 0, "05:59", True),
        ("20:00-06:00", 0, "06:00", False),
        ("20:00-06:00", 0, "12:00", False),
        ("Mon-Fri 20:00-06:00", 5, "05:00", True),  # Friday's night reaches into Saturday
        ("Mon-Fri 20:00-06:00", 5, "21:00", False),
        ("Mon-Fri 20:00-06:00", 0, "05:00", False),  # Sunday's night is not one of them
        ("Sat,Sun 00:00-24:00", 6, "23:59", True),
        ("Sat,Sun 00:00-24:00", 7, "00:00", False),
        ("Sun 22:00-02:00", 0, "01:00", True),
        ("Fri-Mon 09:00-10:00", 6, "09:30", True),
        ("Fri-Mon 09:00-10:00", 2, "09:30", False),
    ],
)
def test_a_window_of_hours_is_read_as_a_person_would(hours: str, day: int, clock: str, *, is_open: bool) -> None:
    assert (_at(day, clock) in window(hours)) is is_open


@pytest.mark.parametrize(
    "hours", ["8-18", "08:00", "25:00-26:00", "08:60-09:00", "08:00-08:00", "Mo 08:00-09:00", "24:00-01:00"]
)
def test_what_is_no_window_is_refused_with_an_example(hours: str) -> None:
    with pytest.raises(ValidationError, match="window"):
        Policy.model_validate({"hours": hours})


@pytest.mark.parametrize("hours", [[], 8, [8], {"from": "08:00"}])
def test_hours_are_one_window_or_a_list_of_them(hours: Any) -> None:
    with pytest.raises(ValidationError, match="20:00-06:00"):
        Policy.model_validate({"hours": hours})


_MINUTES = st.integers(0, 1439)
_WINDOWS = st.builds(
    Window, days=st.frozensets(st.integers(0, 6), min_size=1), begins=_MINUTES, ends=st.integers(1, 1440)
).filter(lambda one: one.begins != one.ends)


@given(_WINDOWS, st.integers(0, 7 * 1440 - 1))
def test_a_window_written_out_is_the_same_window(one: Window, minute: int) -> None:
    moment = MONDAY + timedelta(minutes=minute)
    assert window(str(one)) == one
    assert (moment in window(str(one))) == (moment in one)


@given(_WINDOWS)
def test_a_window_is_open_as_long_as_it_says(one: Window) -> None:
    minutes = sum(open_at([one], MONDAY + timedelta(minutes=minute)) for minute in range(7 * 1440))
    length = one.ends - one.begins if one.begins < one.ends else 1440 - one.begins + one.ends
    assert minutes == len(one.days) * length


# --- the gate


@pytest.mark.parametrize(("clock", "admitted"), [("23:00", True), ("12:00", False)])
def test_a_run_outside_the_hours_is_refused_by_that_clause(clock: str, *, admitted: bool) -> None:
    policy = Policy.model_validate({"hours": "20:00-06:00"})
    if admitted:
        gate.admit_run(policy, plan(), approved=True, now=_at(0, clock))
        return
    with pytest.raises(PolicyRefusal) as refused:
        gate.admit_run(policy, plan(), approved=True, now=_at(0, clock))
    assert gate.release_failure(refused.value).reason == "POLICY_REFUSED hours"


def test_a_plan_without_approval_learns_nothing_of_the_policy() -> None:
    policy = Policy.model_validate({"most_rounds": 1, "hours": "20:00-06:00"})
    with pytest.raises(SiteFailure) as refused:
        gate.admit_run(policy, plan(), approved=False, now=_at(0, "12:00"))
    error = gate.release_failure(refused.value)
    assert (error.code, error.reason) == (113, "NOT_APPROVED")


def test_an_approval_does_not_loosen_the_policy() -> None:
    with pytest.raises(PolicyRefusal, match="2 rounds, 1 are allowed"):
        gate.admit_run(Policy(most_rounds=1), plan(), approved=True, now=MONDAY)


def test_every_clause_that_forbids_a_plan_is_told_to_the_steward() -> None:
    policy = Policy.model_validate({"most_rounds": 1, "require_secure_aggregation": True, "networks": ["UNet"]})
    clauses = [refusal.clause for refusal in gate.refusals(policy, plan())]
    assert clauses == ["networks", "most_rounds", "require_secure_aggregation"]


def test_an_emulated_site_needs_no_approval_and_no_hours() -> None:
    gate.admit_plan(Policy.model_validate({"hours": "00:00-00:01", "stewards": 2}), plan())


def test_every_code_tells_the_ml_team_what_to_do() -> None:
    assert set(MEANING) == set(Code)
