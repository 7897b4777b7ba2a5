"""Who fits a question, counted over the catalogs of a site.

Rules:
  * One case must fit all of it. A patient counts once, over all stores: those that were made with the same key name a
    patient in the same way.
  * What is not stated fits no value and no range.
  * The columns of the catalogs are read once into memory, and again when a catalog has changed: nothing of them is
    written anywhere, so a patient who left the catalog has left this too.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from locum.common.cohort import Dimension, Query, Range, Table, vendor_of
from locum.common.errors import DataError
from locum.common.plan import AGE_BANDS
from locum.site_client.imaging.catalog import FILE_NAME, Catalog, read_meta

#: The last year of each band; of the last there is none.
_BAND_ENDS = (17, 39, 64, 89)
#: Beyond so many numbers sorting them takes less than a mark for each.
_MOST_MARKS = 1 << 26
_TEXTS = ("modality", "body_part", "sex", "label", "month", "manufacturer")
#: By key of a cell, the numbers of its patients, sorted.
Members = dict[tuple[str, ...], NDArray[np.int64]]
_Rows = NDArray[np.bool_]


@dataclass(frozen=True)
class _Words:
    """A column of words: each word once, and for every case the number of its own; -1 where there is none."""

    words: tuple[str, ...]
    of: NDArray[np.int32]

    def among(self, values: Sequence[str]) -> _Rows:
        """Which cases have one of these values."""
        wanted = set(values)
        return np.array([*(word in wanted for word in self.words), False])[self.of]

    def mapped(self, change: Callable[[str], str]) -> _Words:
        """The same with each word replaced by what `change` makes of it; an empty one is none."""
        made = [change(word) for word in self.words]
        names = tuple(sorted({word for word in made if word}))
        place = {word: number for number, word in enumerate(names)}
        table = np.array([*(place.get(word, -1) for word in made), -1], dtype=np.int32)
        return _Words(names, table[self.of])


@dataclass(frozen=True)
class Columns:
    """The cases of some stores, a column an attribute.

    Attributes:
        stores: where they are from.
        patients: every patient once; `patient` has each case's number there.
    """

    stores: tuple[Path, ...]
    patients: tuple[str, ...]
    patient: NDArray[np.int32]
    texts: Mapping[str, _Words]
    ages: NDArray[np.int16]
    _numbers: dict[str, NDArray[np.float64]] = field(default_factory=dict, repr=False)

    @cached_property
    def vendor(self) -> _Words:
        """The makers."""
        return self.texts["manufacturer"].mapped(vendor_of)

    @cached_property
    def year(self) -> _Words:
        """The years of the studies."""
        return self.texts["month"].mapped(lambda month: month[:4])

    @cached_property
    def age(self) -> _Words:
        """The bands of age."""
        bands = np.searchsorted(_BAND_ENDS, self.ages, side="left").astype(np.int32)
        return _Words(AGE_BANDS, np.where(self.ages < 0, np.int32(-1), bands))

    @cached_property
    def code(self) -> tuple[_Words, NDArray[np.int64]]:
        """Each code of each case: the codes, and of which case each is."""
        return _codes(self.stores)

    @cached_property
    def spacing(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """The least and the largest spacing of each case, in mm; nan where none is stated."""
        texts = [text for (text,) in _selected(self.stores, "spacing")]
        found = {text: json.loads(text) or [np.nan] for text in set(texts)}
        return np.array([min(found[text]) for text in texts]), np.array([max(found[text]) for text in texts])

    def number(self, keyword: str) -> NDArray[np.float64]:
        """A parameter of each case; nan where it is not stated."""
        if keyword not in self._numbers:
            path = f"json_extract(parameters, '$.{keyword}')"  # a keyword is letters
            found = [value if isinstance(value, int | float) else np.nan for (value,) in _selected(self.stores, path)]
            self._numbers[keyword] = np.array(found, dtype=np.float64)
        return self._numbers[keyword]

    def words(self, by: str) -> _Words:
        """A column that patients can be told apart by."""
        return {"vendor": self.vendor, "year": self.year, "age": self.age}[by] if by in _MADE else self.texts[by]


_MADE = frozenset({"vendor", "year", "age"})


@dataclass
class Cohorts:
    """The columns of a site's stores, as they are now."""

    stores: tuple[Path, ...]
    _known: tuple[Any, Columns] | None = None

    def columns(self) -> Columns:
        """Raises DataError if a catalog is missing, damaged, or an ingest has not finished."""
        state = tuple(_state(store) for store in self.stores)
        if self._known is None or self._known[0] != state:
            self._known = state, read_columns(self.stores)
        return self._known[1]


def _state(store: Path) -> tuple[int, ...]:
    """What changes with a catalog."""
    try:
        found = (store / FILE_NAME).stat()
    except OSError as error:
        raise DataError(f"{store} holds no catalog", "run: locum site ingest SITE.yaml --store DIR") from error
    return found.st_ino, found.st_size, found.st_mtime_ns


#: Who a case is of: the place in the split, which stays when the key for names is renewed, to its last digit.
_PERSON = "CASE patient WHEN '' THEN '' ELSE printf('%!.17g', place) END"


def read_columns(stores: Sequence[Path]) -> Columns:
    """Reads the catalogs of stores; raises DataError as :meth:`Cohorts.columns`."""
    for store in stores:
        with closing(Catalog.open(store)) as catalog:
            if not read_meta(catalog.connection, "complete", False):
                raise DataError(f"the last ingest into {store} did not finish", "run it again: it continues")
    rows = list(_selected(stores, f"{_PERSON}, age, {', '.join(_TEXTS)}"))
    patient, age, *texts = zip(*rows, strict=True) if rows else ((),) * (2 + len(_TEXTS))
    people = _numbered(patient)
    ages = np.array([-1 if each is None else each for each in age], dtype=np.int16)
    return Columns(
        tuple(stores),
        people.words,
        people.of,
        {name: _numbered(column) for name, column in zip(_TEXTS, texts, strict=True)},
        ages,
    )


def _selected(stores: Sequence[Path], columns: str) -> Iterator[tuple[Any, ...]]:
    """Columns of all cases, always in the same order."""
    for store in stores:
        with closing(Catalog.open(store)) as catalog:
            yield from catalog.connection.execute(f"SELECT {columns} FROM cases ORDER BY id")  # noqa: S608 (our own)


def _numbered(column: Sequence[str | None]) -> _Words:
    words = tuple(sorted({word for word in column if word}))
    place: dict[str | None, int] = {word: number for number, word in enumerate(words)}
    return _Words(words, np.array([place.get(word, -1) for word in column], dtype=np.int32))


def _codes(stores: Sequence[Path]) -> tuple[_Words, NDArray[np.int64]]:
    codes: list[str] = []
    cases: list[int] = []
    first = 0
    for store in stores:
        with closing(Catalog.open(store)) as catalog:
            names = [name for (name,) in catalog.connection.execute("SELECT id FROM cases ORDER BY id")]
            place = dict(zip(names, range(first, first + len(names)), strict=True))
            for name, code in catalog.connection.execute("SELECT case_id, code FROM codes"):
                if name in place:
                    codes.append(code)
                    cases.append(place[name])
            first += len(names)
    return _numbered(codes), np.array(cases, dtype=np.int64)


# --- who fits


def members(columns: Columns, query: Query) -> list[Members]:
    """The patients of each cell of each table of a question: of all that there can be, or of those that there are."""
    fits = _fits(columns, query)
    return [_of_table(columns, table, query, fits) for table in query.tables]


def _fits(columns: Columns, query: Query) -> _Rows:
    where = query.where
    rows = columns.patient >= 0
    for by in ("modality", "body_part", "label", "sex", "age", "vendor"):
        if values := getattr(where, by):
            rows &= columns.words(by).among(values)
    if where.code:
        codes, cases = columns.code
        having = np.zeros(len(rows), dtype=np.bool_)
        having[cases[codes.among(where.code)]] = True
        rows &= having
    if where.months.first or where.months.last:
        first, last = where.months.first or "0000", where.months.last or "9999-12"
        rows &= columns.texts["month"].among(
            [month for month in columns.texts["month"].words if first <= month <= last]
        )
    if where.spacing is not None:
        least, most = columns.spacing
        rows &= _within(least, where.spacing) & _within(most, where.spacing)
    for keyword, bounds in where.parameters.items():
        rows &= _within(columns.number(keyword), bounds)
    return rows


def _within(numbers: NDArray[np.float64], bounds: Range) -> _Rows:
    least = -np.inf if bounds.least is None else bounds.least
    return (numbers >= least) & (numbers <= (np.inf if bounds.most is None else bounds.most))


def _of_table(columns: Columns, table: Table, query: Query, fits: _Rows) -> Members:
    """The patients of each cell; of a table whose cells are listed all of them, in that order."""
    cases = np.flatnonzero(fits)
    parts: list[_Words] = []
    if any(dimension.by == "code" for dimension in table.dimensions):
        codes, of = columns.code
        kept = fits[of] & (codes.among(query.where.code) if query.where.code else True)
        cases, codes = of[kept], _Words(codes.words, codes.of[kept])
    for dimension in table.dimensions:
        if dimension.by == "code":
            parts.append(codes)
        else:
            words = _binned(columns, dimension) if dimension.edges else columns.words(dimension.by)
            parts.append(_Words(words.words, words.of[cases]))
    found = _grouped(columns.patient[cases], parts)
    if table.keys is None:
        return {key: found[key] for key in sorted(found)}
    nobody = np.zeros(0, dtype=np.int64)
    return {key: found.get(key, nobody) for key in table.keys}


def _binned(columns: Columns, dimension: Dimension) -> _Words:
    numbers = columns.number(dimension.by)
    bins = np.searchsorted(dimension.edges, numbers, side="right").astype(np.int32) - 1
    inside = (numbers >= dimension.edges[0]) & (numbers < dimension.edges[-1])
    return _Words(dimension.values or (), np.where(inside, bins, np.int32(-1)))


def _grouped(patients: NDArray[np.int32], parts: Sequence[_Words]) -> Members:
    """By key, who has a case with it; a case without one of the values is in no cell."""
    place = np.zeros(len(patients), dtype=np.int64)
    there = np.ones(len(patients), dtype=np.bool_)
    for words in parts:
        place = place * (len(words.words) + 1) + words.of
        there &= words.of >= 0
    most, cells = int(patients.max(initial=0)) + 1, 1
    for words in parts:
        cells *= len(words.words) + 1
    pairs = _each_once(place[there] * most + patients[there], cells * most)
    of = pairs // most
    starts = np.flatnonzero(np.diff(of, prepend=-1))
    members = np.split(pairs - of * most, starts[1:])
    return {_key(int(of[start]), parts): who for start, who in zip(starts, members, strict=False)}


def _each_once(numbers: NDArray[np.int64], most: int) -> NDArray[np.int64]:
    """Different numbers below `most`, sorted."""
    if most > _MOST_MARKS:
        return np.unique(numbers)
    marks = np.zeros(most, dtype=np.bool_)
    marks[numbers] = True
    return np.flatnonzero(marks)


def _key(place: int, parts: Sequence[_Words]) -> tuple[str, ...]:
    key: list[str] = []
    for words in reversed(parts):
        place, number = divmod(place, len(words.words) + 1)
        key.append(words.words[number])
    return tuple(reversed(key))
