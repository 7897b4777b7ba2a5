"""What a cohort question costs and tells: over 43 institutions, and on a catalog of 112,120 images.

Rules:
  * The institutions are those of the Spine Generic Public Database, the large catalog has the lines of the labels of
    NIH ChestX-ray14. Both are read where they lie.
  * Each site decides by itself, with its own memory. What is summed is what a coordinator would have heard.
  * A query on the large catalog stands beside a bare SELECT of the number of its patients, in the same run, in turns.
  * With a least cell of ten most of these institutions tell nothing, for they have six patients. The patients of this
    data set are volunteers whose data are public: the drift of protocols is shown with a least cell of five.
"""

from __future__ import annotations

import csv
import gzip
import sqlite3
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from locum.common.cohort import Query
from locum.common.errors import DataError
from locum.simulations.benchmarks.rows import Row
from locum.simulations.catalogs import Entry, spine_generic, write_catalog
from locum.site_client.cohort.answering import cells_of
from locum.site_client.cohort.counting import Cohorts, members
from locum.site_client.cohort.memory import Memory

T = TypeVar("T")
_DATA = Path("../shared/data")
_TURNS = 9
_ASKED: Mapping[str, Any] = {"study": "benchmark", "purpose": "to measure"}
#: Bins of the drift, in ms, for T1-weighted series.
_BINS = {"EchoTime": (1.0, 1.5, 2.5, 3.4, 3.65, 5.0), "RepetitionTime": (0.0, 10.0, 3000.0)}


def measure(data: Path = _DATA) -> Iterable[Row]:
    """Measures both; raises DataError if the data are not there."""
    spine, large = data / "spine_generic_metadata", data / "nih_cxr14_labels"
    for path in (spine, large):
        if not path.is_dir():
            raise DataError(f"there is no {path}", "run from the project's root, with the shared data beside it")
    with tempfile.TemporaryDirectory(prefix="locum-cohort-") as made:
        yield from _institutions(spine, Path(made) / "spine")
        yield from _large(large, Path(made) / "large")


# --- 43 institutions


Numbers = dict[tuple[str, ...], dict[str, int]]


def asked_of(sites: Mapping[str, list[Entry]], query: Query, folder: Path, least: int) -> list[Numbers]:
    """Each table of a question: by cell, what each site that tells it tells. The memories lie in the folder."""
    tables: list[Numbers] = [{} for _ in query.tables]
    for name, entries in sites.items():
        store, home = folder / name / "store", folder / name / f"memory-{least}"
        if not store.exists():
            write_catalog(store, entries)
        for table, told in zip(tables, told_by(home, Cohorts((store,)), query, least), strict=True):
            for key, number in told.items():
                table.setdefault(key, {})[name] = number
    return tables


def told_by(home: Path, cohorts: Cohorts, query: Query, least: int) -> list[dict[tuple[str, ...], int]]:
    """What one site tells."""
    columns = cohorts.columns()
    found = members(columns, query)
    numbers: list[list[int | None]] = []

    def seal(made: list[list[int | None]]) -> bytes:
        numbers.extend(made)
        return b"{}"

    memory = Memory(home)
    memory.receive(query.digest, b"{}", now=time.time())
    memory.answer(query.digest, cells_of(query, found, columns), least=least, seal=seal, now=time.time())
    return [
        {key: number for key, number in zip(cells, told, strict=True) if number is not None}
        for cells, told in zip(found, numbers, strict=True)
    ]


def counted() -> Query:
    """How many patients there are, by sex."""
    return Query(name="patients", group_by=("sex",), **_ASKED)


def everybody() -> Query:
    """How many patients there are."""
    return Query(name="everybody", **_ASKED)


def drift() -> Query:
    """Echo and repetition time of T1-weighted series, by maker."""
    return Query.model_validate({"name": "drift", "where": {"label": ["T1w"]}, "describe": _BINS, **_ASKED})


def _institutions(data: Path, folder: Path) -> Iterator[Row]:
    sites = spine_generic(data)
    patients = {name: len({entry.patient for entry in entries}) for name, entries in sites.items()}
    yield Row("institutions", len(sites), "")
    yield Row("their patients", sum(patients.values()), "")
    (table,) = asked_of(sites, everybody(), folder, 10)
    told = table.get((), {})
    yield Row("least cell 10: institutions that tell how many patients they have", len(told), "")
    yield Row("least cell 10: patients at least", sum(told.values()), "")
    yield Row(
        "least cell 10: patients at most, if the others have fewer", sum(told.values()) + 9 * (43 - len(told)), ""
    )
    protocol, _ = asked_of(sites, drift(), folder, 5)
    for key, by_site in sorted(protocol.items()):
        vendor, echo, repetition = key
        words = f"least cell 5: {vendor}, echo time {echo} ms, repetition time {repetition} ms"
        yield Row(f"{words}: patients at {len(by_site)} institutions", sum(by_site.values()), "")


# --- a large catalog


def large_entries(data: Path) -> Iterator[Entry]:
    """A case of each line of the labels of NIH ChestX-ray14 (Wang et al., CVPR 2017)."""
    with gzip.open(data / "Data_Entry_2017_v2020.csv.gz", "rt", encoding="utf-8", newline="") as file:
        for number, line in enumerate(csv.DictReader(file)):
            age = int(line["Patient Age"])
            yield Entry(
                patient=f"{int(line['Patient ID']):016x}",
                modality="CR" if number % 3 else "DX",
                manufacturer=("SIEMENS", "GE MEDICAL SYSTEMS", "Philips")[int(line["Patient ID"]) % 3],
                body_part="CHEST",
                sex=line["Patient Gender"] if "Patient Gender" in line else line["Patient Sex"],
                age=min(age, 90) if age <= 120 else None,
                month=f"{2005 + int(line['Follow-up #']) % 12}-{1 + number % 12:02d}",
                label=line["Finding Labels"].partition("|")[0],
                parameters={"KVP": 60.0 + number % 60, "ExposureTime": 1.0 + number % 40},
                codes=tuple(f"LOCAL:{word.replace(' ', '')}" for word in line["Finding Labels"].split("|")),
            )


def queries() -> dict[str, Query]:
    """Questions of each kind."""
    kinds: dict[str, dict[str, Any]] = {
        "all patients": {},
        "by sex and age": {"group_by": ["sex", "age"]},
        "by maker and year, of two modalities": {"group_by": ["vendor", "year"], "where": {"modality": ["CR", "DX"]}},
        "with one of two codes, by code and sex": {
            "group_by": ["code", "sex"],
            "where": {"code": ["LOCAL:Effusion", "LOCAL:Mass"]},
        },
        "of a range of spacings, months and tube voltages": {
            "where": {
                "spacing": {"most": 2},
                "months": {"first": "2006-03", "last": "2012-10"},
                "parameters": {"KVP": {"least": 70, "most": 110}},
            }
        },
        "tube voltage and exposure time by maker": {
            "describe": {"KVP": [60, 80, 100, 120], "ExposureTime": [0, 10, 20, 50]}
        },
    }
    return {words: Query.model_validate({"name": "large", **_ASKED, **asked}) for words, asked in kinds.items()}


def _large(data: Path, store: Path) -> Iterator[Row]:
    write_catalog(store, large_entries(data))
    cohorts = Cohorts((store,))
    seconds, columns = _timed(cohorts.columns)
    yield Row("cases of the large catalog", len(columns.patient), "")
    yield Row("its patients", len(columns.patients), "")
    yield Row("columns read into memory, once after an ingest", seconds * 1e3, "ms")
    with closing(sqlite3.connect(store / "catalog.sqlite")) as connection:
        select = partial(_selected, connection)
        for words, query in queries().items():
            first, _ = _timed(partial(members, columns, query))
            ours, floor = [], []
            for _ in range(_TURNS):
                ours.append(_timed(lambda query=query: members(cohorts.columns(), query))[0])  # type: ignore[misc]
                floor.append(_timed(select)[0])
            yield Row(f"{words}: the first time", first * 1e3, "ms")
            yield Row(f"{words}: median", statistics.median(ours) * 1e3, "ms")
            yield Row(f"{words}: median / bare SELECT", statistics.median(ours) / statistics.median(floor), "×")
        yield Row("floor: SELECT count(DISTINCT patient), median", statistics.median(floor) * 1e3, "ms")
        home = store.parent / "memory"
        for number, (words, query) in enumerate(queries().items(), start=1):
            seconds, _ = _timed(partial(told_by, home, cohorts, query, 10))
            yield Row(f"question {number}, {words}: counted, held against the memory, written", seconds * 1e3, "ms")


def _selected(connection: sqlite3.Connection) -> int:
    return int(connection.execute("SELECT count(DISTINCT patient) FROM cases").fetchone()[0])


def _timed(call: Callable[[], T]) -> tuple[float, T]:
    start = time.perf_counter()
    found = call()
    return time.perf_counter() - start, found
