"""Over 43 real institutions: small numbers stay, and the drift of protocols shows for each maker."""

from __future__ import annotations

from pathlib import Path

import pytest

from locum.common.cohort import Query
from locum.simulations.benchmarks.cohort import asked_of, counted, drift, everybody, queries, told_by
from locum.simulations.catalogs import Entry, spine_generic, write_catalog
from locum.site_client.cohort.counting import Cohorts


@pytest.fixture(scope="module")
def institutions(shared_data: Path) -> dict[str, list[Entry]]:
    return spine_generic(shared_data / "spine_generic_metadata")


def test_of_43_institutions_only_those_with_ten_patients_tell_how_many(
    institutions: dict[str, list[Entry]], tmp_path: Path
) -> None:
    people = {name: {entry.patient for entry in entries} for name, entries in institutions.items()}
    assert (len(people), sum(map(len, people.values()))) == (43, 267)
    (table,) = asked_of(institutions, everybody(), tmp_path, 10)
    assert table == {(): {name: len(found) for name, found in people.items() if len(found) >= 10}}
    (by_sex,) = asked_of(institutions, counted(), tmp_path, 10)
    assert by_sex == {}


def test_the_drift_of_protocols_shows_for_each_maker(institutions: dict[str, list[Entry]], tmp_path: Path) -> None:
    protocol, _ = asked_of(institutions, drift(), tmp_path, 5)
    echoes = {
        vendor: {echo for maker, echo, _ in protocol if maker == vendor} for vendor in ("GE", "PHILIPS", "SIEMENS")
    }
    assert echoes == {
        "GE": {"1 to 1.5", "1.5 to 2.5"},
        "PHILIPS": {"3.4 to 3.65", "3.65 to 5"},
        "SIEMENS": {"2.5 to 3.4", "3.65 to 5"},
    }
    assert {(maker, repetition) for maker, _, repetition in protocol} == {
        ("GE", "0 to 10"), ("PHILIPS", "0 to 10"), ("SIEMENS", "10 to 3000"),
    }  # fmt: skip
    numbers = [number for by_site in protocol.values() for number in by_site.values()]
    assert min(numbers) >= 5
    assert sum(protocol["SIEMENS", "3.65 to 5", "10 to 3000"].values()) > 120


def test_questions_of_every_kind_are_told_of_a_large_site_and_none_a_second_time_otherwise(tmp_path: Path) -> None:
    """What is measured gives numbers, and the same ones again."""
    makers = ("SIEMENS", "GE MEDICAL SYSTEMS", "Philips")
    entries = [
        Entry(
            f"{number % 1500:016x}", modality="CR", manufacturer=makers[number % 3], body_part="CHEST",
            sex="FM"[number % 2], age=20 + number % 60, month=f"{2006 + number % 5}-05",
            parameters={"KVP": 60.0 + number % 59, "ExposureTime": 1.0 + number % 39},
            codes=("LOCAL:Effusion",) if number % 4 else ("LOCAL:Mass",),
        )
        for number in range(3000)
    ]  # fmt: skip
    write_catalog(tmp_path / "store", entries)
    cohorts = Cohorts((tmp_path / "store",))
    for words, query in queries().items():
        told = told_by(tmp_path / words, cohorts, query, 10)
        assert any(told), words
        assert told_by(tmp_path / words, cohorts, _again(query), 10) == told


def _again(query: Query) -> Query:
    return Query.model_validate({**query.model_dump(), "edition": 2})
