"""Who fits a question: as somebody counts who goes through the cases one by one."""

from __future__ import annotations

import sqlite3
from collections import defaultdict
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from locum.common.cohort import Query, vendor_of
from locum.common.errors import DataError
from locum.simulations.catalogs import KEYS, Entry, write_catalog
from locum.site_client.cohort.counting import Cohorts, members, read_columns

_CODES = ("SCT:1", "SCT:2", "RADLEX:RID1")
_entries = st.lists(
    st.builds(
        Entry,
        patient=st.sampled_from([f"p{number}" for number in range(6)] + [""]),
        modality=st.sampled_from(["CT", "MR"]),
        manufacturer=st.sampled_from(["SIEMENS", "Siemens Healthineers", "GE MEDICAL SYSTEMS", ""]),
        body_part=st.sampled_from(["CHEST", "HEAD", ""]),
        sex=st.sampled_from(["F", "M", "O", ""]),
        age=st.one_of(st.none(), st.sampled_from([0, 17, 18, 39, 40, 64, 65, 89, 90])),
        month=st.sampled_from(["2019-12", "2020-01", "2021-07", ""]),
        label=st.sampled_from([None, "a", "b"]),
        spacing=st.sampled_from([(0.5, 0.5, 3.0), (1.0, 1.0)]),
        parameters=st.dictionaries(st.sampled_from(["EchoTime", "KVP"]), st.sampled_from([1.0, 2.0, 5.0])),
        codes=st.lists(st.sampled_from(_CODES), unique=True).map(tuple),
    ),
    max_size=25,
)
_bounds = st.sampled_from([{"least": 1.0}, {"most": 2.0}, {"least": 1.5, "most": 5.0}])
_some: dict[str, Any] = {
    "modality": st.just(["CT"]),
    "body_part": st.just(["CHEST", "HEAD"]),
    "sex": st.just(["F", "O"]),
    "age": st.just(["18-39", "90+"]),
    "vendor": st.just(["siemens"]),
    "label": st.just(["a"]),
    "code": st.just(["SCT:1", "RADLEX:RID1"]),
    "months": st.sampled_from([{"first": "2020-01"}, {"first": "2019-12", "last": "2020-06"}]),
    "spacing": _bounds,
    "parameters": st.dictionaries(st.sampled_from(["EchoTime", "KVP"]), _bounds, min_size=1),
}
_where = st.fixed_dictionaries({}, optional=_some)
_by = st.lists(
    st.sampled_from(["sex", "age", "vendor", "modality", "body_part", "year", "label", "code"]), unique=True, max_size=2
)
_describe = st.sampled_from([{}, {"EchoTime": [1.0, 2.0, 5.0]}, {"EchoTime": [0.0, 9.0], "KVP": [0.0, 2.0, 9.0]}])


def _band(age: int | None) -> str:
    ends = {17: "0-17", 39: "18-39", 64: "40-64", 89: "65-89", 200: "90+"}
    return "" if age is None else next(name for end, name in ends.items() if age <= end)


def _values(entry: Entry, by: str) -> tuple[str, ...]:
    if by == "code":
        return entry.codes
    found = {
        "sex": entry.sex,
        "age": _band(entry.age),
        "vendor": vendor_of(entry.manufacturer),
        "modality": entry.modality,
        "body_part": entry.body_part,
        "year": entry.month[:4],
        "label": entry.label or "",
    }[by]
    return (found,) if found else ()


def _is_within(number: float | None, bounds: Any) -> bool:
    if bounds is None:
        return True
    least = -1e9 if bounds.least is None else bounds.least
    return number is not None and least <= number <= (1e9 if bounds.most is None else bounds.most)


def _fits(entry: Entry, query: Query) -> bool:
    where = query.where
    for by in ("modality", "body_part", "sex", "age", "vendor", "label", "code"):
        wanted = getattr(where, by)
        if wanted and not set(wanted) & set(_values(entry, by)):
            return False
    if (where.months.first or where.months.last) and not (
        entry.month and (where.months.first or "") <= entry.month <= (where.months.last or "9")
    ):
        return False
    spaced = all(_is_within(each, where.spacing) for each in entry.spacing)
    return spaced and all(_is_within(entry.parameters.get(key), bounds) for key, bounds in where.parameters.items())


def _keys(entry: Entry, query: Query, table: Any) -> Iterator[tuple[str, ...]]:
    keys: list[tuple[str, ...]] = [()]
    for dimension in table.dimensions:
        if dimension.edges:
            number = entry.parameters.get(dimension.by)
            pairs = zip(dimension.edges, dimension.edges[1:], dimension.values, strict=False)
            values = [name for low, high, name in pairs if number is not None and low <= number < high]
        else:
            values = [
                value for value in _values(entry, dimension.by) if not dimension.values or value in dimension.values
            ]
        keys = [(*key, value) for key in keys for value in values]
    yield from keys


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(stores=st.lists(_entries, min_size=1, max_size=2), where=_where, by=_by, describe=_describe)
def test_a_patient_counts_once_in_each_cell_that_one_case_of_hers_fits(
    tmp_path_factory: pytest.TempPathFactory, stores: list[list[Entry]], where: Any, by: list[str], describe: Any
) -> None:
    if "code" in by:
        where = {**where, "code": ["SCT:1", "SCT:2"]}
    query = Query.model_validate(
        {"name": "a", "study": "b", "purpose": "c", "where": where, "group_by": by, "describe": describe}
    )
    folder = tmp_path_factory.mktemp("stores")
    for number, entries in enumerate(stores):
        write_catalog(folder / str(number), entries)
    columns = Cohorts(tuple(folder / str(number) for number in range(len(stores)))).columns()
    for table, cells in zip(query.tables, members(columns, query), strict=True):
        expected: dict[tuple[str, ...], set[str]] = defaultdict(set)
        for entry in (entry for entries in stores for entry in entries if entry.patient and _fits(entry, query)):
            for key in _keys(entry, query, table):
                expected[key].add(f"{KEYS.place(entry.patient):.17g}")
        found = {key: {columns.patients[each] for each in people} for key, people in cells.items()}
        assert {key: people for key, people in found.items() if people} == expected
        if table.keys is not None:
            assert tuple(found) == table.keys


def test_what_was_ingested_since_counts_and_who_left_does_not(tmp_path: Path) -> None:
    query = Query(name="a", study="b", purpose="c")
    cohorts = Cohorts((tmp_path,))
    for number in (3, 7, 2):
        write_catalog(tmp_path, [Entry(f"p{each}") for each in range(number)])
        (cells,) = members(cohorts.columns(), query)
        assert len(cells[()]) == number
    assert cohorts.columns() is cohorts.columns()


def test_a_catalog_that_is_missing_or_half_made_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no catalog"):
        Cohorts((tmp_path,)).columns()
    write_catalog(tmp_path, [Entry("p")])
    import sqlite3

    with sqlite3.connect(tmp_path / "catalog.sqlite") as connection:
        connection.execute("UPDATE meta SET value = 'false' WHERE name = 'complete'")
    with pytest.raises(DataError, match="did not finish"):
        Cohorts((tmp_path,)).columns()


def test_a_patient_is_the_same_person_after_the_key_for_names_was_renewed(tmp_path: Path) -> None:
    write_catalog(tmp_path, [Entry("p1"), Entry("p2")])
    before = read_columns([tmp_path]).patients
    with closing(sqlite3.connect(tmp_path / "catalog.sqlite")) as connection, connection:
        connection.execute("UPDATE cases SET patient = 'renewed ' || patient")
    assert read_columns([tmp_path]).patients == before
