"""From all that a site ever told, nobody can show that a group of fewer than its least cell has anybody in it."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from locum.site_client.cohort.memory import Cell as Asking
from locum.site_client.cohort.memory import Memory, Tables
from locum.site_client.cohort.suppression import judged, no_cells
from tests.site_client.cohort.attacker import Cell, People, least, small_groups

K = 10
_SEXES, _MAKERS, _BANDS = "FMO", ("SIEMENS", "GE"), ("young", "old")
_CELLS = [(sex, maker, band) for sex in _SEXES for maker in _MAKERS for band in _BANDS]


class Site:
    """A site's memory, and everything that was asked of it."""

    def __init__(self, folder: Path, k: int = K) -> None:
        self.memory, self.k = Memory(folder), k
        self.asked: list[Cell] = []
        self.numbers: list[list[int | None]] = []

    def ask(self, name: str, *cells: tuple[str, People]) -> list[int | None]:
        """Asks for a table: of each cell its name, and who is in it."""
        self.memory.receive(name, b"{}", now=1.0)
        told: list[list[int | None]] = []

        def seal(numbers: list[list[int | None]]) -> bytes:
            told.extend(numbers)
            return repr(numbers).encode()

        everybody = sorted(frozenset[str]().union(*(people for _, people in cells)))
        place = {person: number for number, person in enumerate(everybody)}
        table = [
            Asking(predicate, np.array(sorted(place[person] for person in people), dtype=np.int64))
            for predicate, people in cells
        ]
        content = self.memory.answer(name, Tables([table], everybody), least=self.k, seal=seal, now=2.0)
        if not told:
            return eval(content.decode())[0]  # type: ignore[no-any-return] # noqa: S307 - of this test
        known = {cell.people for cell in self.asked if cell.told == len(cell.people)}
        for (_, people), number in zip(cells, told[0], strict=True):
            new = number == len(people) and people not in known
            self.asked.append(Cell(people, number if new else None))
        return told[0]


def _people(counts: dict[tuple[str, str, str], int]) -> dict[str, tuple[str, str, str]]:
    """By name, what each patient is."""
    return {f"{'-'.join(kind)}-{index}": kind for kind, number in counts.items() for index in range(number)}


def _who(people: dict[str, tuple[str, str, str]], **wanted: str) -> People:
    places = {"sex": 0, "maker": 1, "band": 2}
    return frozenset(
        name for name, kind in people.items() if all(kind[places[key]] == value for key, value in wanted.items())
    )


_VALUES: dict[str, tuple[str, ...]] = {"sex": tuple(_SEXES), "maker": _MAKERS, "band": _BANDS}
_where = st.dictionaries(st.sampled_from(sorted(_VALUES)), st.integers(0, 2), max_size=2)
_question = st.tuples(_where, st.lists(st.sampled_from(sorted(_VALUES)), unique=True, max_size=2))
_counts = st.fixed_dictionaries({kind: st.one_of(st.integers(0, 14), st.integers(15, 40)) for kind in _CELLS})
_growth = st.lists(st.tuples(st.sampled_from(_CELLS), st.integers(-3, 14)), max_size=3)


def _cells(people: dict[str, tuple[str, str, str]], where: dict[str, int], by: list[str]) -> list[tuple[str, People]]:
    fixed = {key: _VALUES[key][number % len(_VALUES[key])] for key, number in where.items() if key not in by}
    found = []
    for values in itertools.product(*(_VALUES[key] for key in by)):
        wanted = {**fixed, **dict(zip(by, values, strict=True))}
        found.append((repr(sorted(wanted.items())), _who(people, **wanted)))
    return found


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(counts=_counts, rounds=st.lists(st.tuples(_question, _growth), min_size=1, max_size=6), data=st.data())
def test_whoever_has_read_every_answer_cannot_show_that_a_small_group_has_anybody(
    tmp_path_factory: pytest.TempPathFactory, counts: dict[Any, int], rounds: list[Any], data: st.DataObject
) -> None:
    """Totals, margins, two-way tables, complements, the same again, and data that grow and shrink between questions."""
    site = Site(tmp_path_factory.mktemp("site"))
    for number, ((where, by), growth) in enumerate(rounds):
        people = _people(counts)
        told = site.ask(f"question {number}", *_cells(people, where, by))
        assert all(one is None or one >= K for one in told)
        for group in small_groups(site.asked, K):
            assert least(site.asked, group) < 0.5, (sorted(group), site.asked)
        for kind, change in growth:
            counts[kind] = max(0, counts[kind] + change)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(counts=_counts, first=_question, second=_question)
def test_nor_whoever_takes_every_cell_that_was_too_small_before_a_number_was_told_to_be_below_the_least(
    tmp_path_factory: pytest.TempPathFactory, counts: dict[Any, int], first: Any, second: Any
) -> None:
    """Two cells that are not told and the number of both together would tell of each."""
    site = Site(tmp_path_factory.mktemp("site"))
    people = _people(counts)
    one = _cells(people, *first)
    site.ask("one", *one)
    small = {cell: K - 1 for _, cell in one if len(cell) < K}
    for group in small_groups(site.asked, K):
        assert least(site.asked, group, small) < 0.5
    two = _cells(people, *second)
    small |= {cell: K - 1 for _, cell in two if len(cell) < K and cell in small}
    before = len([cell for cell in site.asked if cell.told is not None])
    site.ask("two", *two)
    if len([cell for cell in site.asked if cell.told is not None]) > before:
        for group in small_groups(site.asked, K):
            assert least(site.asked, group, small) < 0.5


# --- attacks by name


def _named(first: int, number: int) -> People:
    return frozenset(f"p{index:04}" for index in range(first, first + number))


@pytest.mark.parametrize("few", range(K))
def test_a_total_is_not_told_beside_cells_of_which_one_is_small_or_empty(tmp_path: Path, few: int) -> None:
    site = Site(tmp_path)
    assert site.ask("by sex", ("F", _named(0, 40)), ("M", _named(40, 30)), ("O", _named(70, few))) == [40, 30, None]
    assert site.ask("all", ("all", _named(0, 70 + few))) == [None]


@pytest.mark.parametrize("few", range(K))
def test_a_cell_is_not_told_beside_the_total_if_the_rest_is_small_or_empty(tmp_path: Path, few: int) -> None:
    site = Site(tmp_path)
    assert site.ask("all", ("all", _named(0, 70 + few))) == [70 + few]
    assert site.ask("women", ("F", _named(0, 70))) == [None]


@pytest.mark.parametrize("few", range(K))
def test_what_a_few_more_patients_change_is_not_told(tmp_path: Path, few: int) -> None:
    """The same in other words, and the same later: the first keeps its number, and the others have none."""
    site = Site(tmp_path)
    assert site.ask("then", ("CT", _named(0, 50))) == [50]
    assert site.ask("now", ("CT", _named(0, 50 + few))) == [50]
    assert site.ask("in other words", ("CT before 2099", _named(0, 50 + few))) == [None]
    assert site.ask("then") == [50]
    assert site.ask("later", ("CT", _named(0, 50 + few + K))) == [50 + few + K]


@pytest.mark.parametrize("few", range(K))
def test_two_small_cells_do_not_follow_from_the_number_of_both(tmp_path: Path, few: int) -> None:
    site = Site(tmp_path)
    assert site.ask("by sex", ("F", _named(0, few)), ("M", _named(few, 9))) == [None, None]
    assert site.ask("all", ("all", _named(0, few + 9))) == [None]
    assert site.ask("more", ("all of them", _named(0, few + 9 + 5))) == [None]


@pytest.mark.parametrize("few", range(K))
def test_a_tracker_of_padding_gets_nothing(tmp_path: Path, few: int) -> None:
    """Denning's individual tracker: pad a small group C with T, ask for T or C, and for T and not C."""
    site = Site(tmp_path)
    group, padding = _named(0, few), _named(100, 60)
    told = site.ask("T", ("T", padding)), site.ask("T or C", ("T or C", padding | group))
    assert told == ([60], [None])
    for number in range(5):
        more = _named(1000 + 100 * number, 20 + number)
        pair = (
            site.ask(f"T{number}", (f"T{number}", more)),
            site.ask(f"T{number} or C", (f"T{number} or C", more | group)),
        )
        assert pair == ([20 + number], [None])


def test_what_follows_by_three_numbers_is_not_told(tmp_path: Path) -> None:
    site = Site(tmp_path)
    a, b, c = _named(0, 30), _named(30, 30), _named(60, 30)
    small = _named(90, 4)
    assert site.ask("one", ("ab", a | b)) == [60]
    assert site.ask("two", ("bc", b | c)) == [60]
    assert site.ask("three", ("ac", a | c)) == [60]
    assert site.ask("four", ("all", a | b | c | small)) == [None]  # twice this less the three is twice the small one
    assert site.ask("five", ("all and more", a | b | c | _named(90, 12))) == [102]


def test_an_odd_sum_that_only_a_small_group_explains_is_not_told(tmp_path: Path) -> None:
    """With whole patients of three groups alone, the sum of these three numbers would be even."""
    site = Site(tmp_path)
    a, b, c = _named(0, 15), _named(20, 15), _named(40, 15)
    assert site.ask("one", ("a or b, or d", a | b | _named(60, 1))) == [31]
    assert site.ask("two", ("b or c", b | c)) == [30]
    assert site.ask("three", ("a or c", a | c)) == [None]


def test_a_number_that_only_small_groups_explain_is_not_told(tmp_path: Path) -> None:
    """Of three groups of eight nothing was asked, and yet the number would show that they have somebody together."""
    site = Site(tmp_path)
    one, two = _named(0, 12), _named(20, 11)
    smalls = [_named(100 + 100 * number, 8) for number in range(3)]
    for number, small in enumerate(smalls):
        assert site.ask(f"around {number}", (f"around {number}", small | _named(1000 + 100 * number, 30))) == [38]
    assert site.ask("pair", ("pair", one | two)) == [23]
    assert site.ask("together", ("together", one | smalls[0] | smalls[1] | smalls[2])) == [None]


def test_tables_over_large_numbers_are_told_whole_but_for_what_follows() -> None:
    """Two margins of the same patients: the last cell of the second says whether anybody is left over."""
    people = 1000
    sex, band = np.arange(people) % 2, np.arange(people) // 2 % 5
    told, tainted = no_cells(people), np.zeros(people, dtype=np.bool_)
    first = np.array([sex == value for value in range(2)])
    assert [verdict.patients for verdict in judged(told, tainted, first, K)] == [500, 500]
    second = np.array([band == value for value in range(5)])
    verdicts = judged(first, tainted, second, K)
    assert [verdict.patients for verdict in verdicts] == [200, 200, 200, 200, None]
    assert verdicts[-1].state == "withheld"
