"""The ledger: what was reserved stays reserved, limits hold whoever asks, and no row can change unseen."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from locum.common.canonical import digest
from locum.site_client.privacy.accountant import Mechanism, epsilon
from locum.site_client.privacy.ledger import Ledger, LedgerError, Limit, Row, SpentError, State, Use

USE = Use("patients", "run-1", "a" * 64, 1, "train")
ONE = Mechanism(2.0, 1.0, 1)
DELTA = 1e-5
WIDE = Limit(100.0, DELTA)


def _of(times: int) -> float:
    """The epsilon of the mechanism, so many times."""
    return epsilon([replace(ONE, steps=times)], DELTA)


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    made = Ledger(tmp_path / "ledger.sqlite")
    assert made.begin()
    return made


def _reserve(ledger: Ledger, use: Use = USE, *, lifetime: Limit = WIDE, run: Limit = WIDE) -> int:
    return ledger.reserve(use, ONE, run=run, lifetime=lifetime).id


# --- what counts


def test_a_new_ledger_has_one_row_and_is_its_owners_alone(ledger: Ledger) -> None:
    (row,) = ledger.rows()
    assert (row.id, row.kind, row.population, row.previous) == (1, "opened", None, "0" * 64)
    assert ledger.state() == State(1, row.hash)
    _reserve(ledger)
    assert {path.stat().st_mode & 0o777 for path in ledger.path.parent.glob("ledger.sqlite*")} == {0o600}
    assert not ledger.begin()
    assert len(ledger.rows()) == 2


def test_everything_of_a_population_is_composed_whatever_run_plan_and_fold(ledger: Ledger) -> None:
    others = [replace(USE, run="run-2"), replace(USE, plan="b" * 64), replace(USE, purpose="test")]
    found = [ledger.reserve(use, ONE, run=WIDE, lifetime=WIDE) for use in (USE, *others)]
    assert [one.of_lifetime for one in found] == [_of(1), _of(2), _of(3), _of(4)]
    assert {one.of_run for one in found} == {_of(1)}
    assert ledger.reserve(replace(USE, population="eyes"), ONE, run=WIDE, lifetime=WIDE).of_lifetime == _of(1)


def test_the_lifetime_is_not_passed_and_what_is_refused_leaves_no_row(ledger: Ledger) -> None:
    lifetime = Limit(_of(2), DELTA)
    _reserve(ledger, lifetime=lifetime)
    _reserve(ledger, replace(USE, run="run-2"), lifetime=lifetime)
    before = ledger.state()
    with pytest.raises(SpentError, match=r"all that the population 'patients' has spent would come to epsilon 3"):
        _reserve(ledger, replace(USE, run="run-3"), lifetime=lifetime)
    assert ledger.state() == before
    _reserve(ledger, replace(USE, population="eyes"), lifetime=lifetime)


def test_a_runs_own_limit_is_of_its_fold_and_at_its_own_delta(ledger: Ledger) -> None:
    own = Limit(epsilon([replace(ONE, steps=2)], 1e-3), 1e-3)
    _reserve(ledger, run=own)
    assert ledger.reserve(USE, ONE, run=own, lifetime=WIDE).of_run == own.epsilon
    with pytest.raises(SpentError, match="the train fold in this run would come to epsilon"):
        _reserve(ledger, run=own)
    _reserve(ledger, replace(USE, purpose="test"), run=own)


def test_a_second_commit_changes_nothing(ledger: Ledger) -> None:
    number = _reserve(ledger)
    ledger.commit(number)
    ledger.commit(number)
    assert [(row.kind, row.of) for row in ledger.rows()[2:]] == [("commit", number)]


def test_a_run_without_differential_privacy_is_noted_once(ledger: Ledger) -> None:
    for use in (USE, replace(USE, round=2, purpose="test"), replace(USE, run="run-2")):
        ledger.note_unprotected(use)
    assert [(row.kind, row.run) for row in ledger.rows()[1:]] == [("unprotected", "run-1"), ("unprotected", "run-2")]


def test_a_clock_set_back_changes_nothing(tmp_path: Path) -> None:
    times = iter([100.0, 200.0, 50.0, 60.0, 300.0])
    made = Ledger(tmp_path / "ledger.sqlite", clock=lambda: next(times))
    made.begin()
    found = [made.reserve(replace(USE, run=run), ONE, run=WIDE, lifetime=WIDE).of_lifetime for run in "abcd"]
    assert found == [_of(1), _of(2), _of(3), _of(4)]
    assert [row.at for row in made.rows()] == [100.0, 200.0, 200.0, 200.0, 300.0]


# --- processes


_BEGINS = """
import os, signal, sys
from contextlib import suppress
from pathlib import Path
from locum.site_client.privacy.accountant import Mechanism
from locum.site_client.privacy.ledger import Ledger, Limit, SpentError, Use
ledger, limit = Ledger(Path(sys.argv[1])), Limit(float(sys.argv[3]), 1e-5)
use = Use("patients", sys.argv[2], "a" * 64, 1, "train")
reserve = lambda: ledger.reserve(use, Mechanism(2.0, 1.0, 1), run=limit, lifetime=limit).id
"""
_DIES = "print(reserve(), flush=True); os.kill(os.getpid(), signal.SIGKILL)"
_SPENDS = """
with suppress(SpentError):
    while True:
        ledger.commit(reserve())
"""


def _process(ledger: Ledger, run: str, does: str, most: float = 100.0) -> subprocess.Popen[bytes]:
    ledger.close()
    words = [sys.executable, "-c", _BEGINS + does, str(ledger.path), run, repr(most)]
    return subprocess.Popen(words, stdout=subprocess.PIPE)


def test_a_process_killed_between_reserve_and_commit_leaves_its_reservation(ledger: Ledger) -> None:
    died = _process(ledger, "run-1", _DIES)
    assert (died.communicate()[0], died.returncode) == (b"2\n", -signal.SIGKILL)
    assert [row.kind for row in ledger.rows()] == ["opened", "reserve"]
    assert ledger.reserve(replace(USE, run="run-2"), ONE, run=WIDE, lifetime=WIDE).of_lifetime == _of(2)


def test_two_processes_on_one_ledger_never_pass_the_limit_together(ledger: Ledger) -> None:
    both = [_process(ledger, f"run-{number}", _SPENDS, _of(5)) for number in range(2)]
    for one in both:
        one.communicate()
    assert [one.returncode for one in both] == [0, 0]
    kinds = [row.kind for row in ledger.rows()]
    assert (kinds.count("reserve"), kinds.count("commit")) == (5, 5)


def test_several_agents_that_begin_one_ledger_begin_it_once(tmp_path: Path) -> None:
    made = [Ledger(tmp_path / "ledger.sqlite") for _ in range(3)]
    assert [one.begin() for one in made] == [True, False, False]
    assert {one.state() for one in made} == {made[0].state()}
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


# --- damage


def _edited(ledger: Ledger, *statements: str) -> Ledger:
    """The ledger after somebody with the right tools was at it, as a new process opens it."""
    for number in range(3):
        ledger.commit(_reserve(ledger, replace(USE, run=f"run-{number}")))
    ledger.close()
    with closing(sqlite3.connect(ledger.path)) as connection, connection:
        connection.executescript("DROP TRIGGER no_change; DROP TRIGGER no_removal;" + ";".join(statements))
    return Ledger(ledger.path)


def test_rows_cannot_be_changed_or_removed_by_ordinary_statements(ledger: Ledger) -> None:
    _reserve(ledger)
    with closing(sqlite3.connect(ledger.path)) as connection:
        for statement in (
            "UPDATE ledger SET noise = 9 WHERE id = 2",
            "DELETE FROM ledger",
            "REPLACE INTO ledger SELECT * FROM ledger",
        ):
            with pytest.raises(sqlite3.IntegrityError):
                connection.execute(statement)
    assert len(ledger.rows()) == 2


_SWAP = """
UPDATE ledger SET id = -2 WHERE id = 2;
UPDATE ledger SET id = 2 WHERE id = 4;
UPDATE ledger SET id = 4 WHERE id < 0
"""


@pytest.mark.parametrize(
    ("statement", "told"),
    [
        ("UPDATE ledger SET noise = 9.0 WHERE id = 4", "row 4 .* was changed"),
        ("UPDATE ledger SET at = at + 1 WHERE id = 1", "row 1 .* was changed"),
        ("UPDATE ledger SET steps = 9007199254740993 WHERE id = 2", "row 2 .* was changed"),
        ("DELETE FROM ledger WHERE id = 3", "row 3 .* is missing"),
        ("DELETE FROM ledger WHERE id = 1", "row 1 .* is missing"),
        ("DELETE FROM ledger WHERE id > 5", "row 6 .* is missing"),
        ("DELETE FROM ledger", "row 1 .* is missing"),
        (_SWAP, "row 2 .* was changed"),
    ],
)
def test_a_row_that_was_edited_removed_or_moved_is_named(statement: str, told: str, ledger: Ledger) -> None:
    opened = _edited(ledger, statement)
    for use in (opened.rows, lambda: _reserve(opened), lambda: opened.commit(2), opened.state):
        with pytest.raises(LedgerError, match=told) as found:
            use()
        assert "restore the ledger from a backup" in found.value.remedy


def test_a_row_that_was_edited_and_hashed_anew_no_longer_leads_to_the_next(ledger: Ledger) -> None:
    _reserve(ledger)
    row = ledger.rows()[1]._replace(noise=9.0)
    forged = digest({name: value for name, value in row._asdict().items() if name != "hash"})
    opened = _edited(ledger, f"UPDATE ledger SET noise = 9.0, hash = '{forged}' WHERE id = 2")  # noqa: S608
    with pytest.raises(LedgerError, match=r"row 3 .* does not follow row 2"):
        opened.rows()


def test_what_is_edited_under_a_running_agent_is_seen_at_the_next_use(ledger: Ledger) -> None:
    _reserve(ledger)
    with closing(sqlite3.connect(ledger.path)) as connection, connection:
        connection.executescript("DROP TRIGGER no_change; UPDATE ledger SET noise = 9.0 WHERE id = 2")
    with pytest.raises(LedgerError, match=r"row 2 .* was changed"):
        _reserve(ledger)


def _rewritten(ledger: Ledger, change: Callable[[Row], Row]) -> None:
    """All rows changed and hashed anew: a chain without a fault."""
    previous, rows = "0" * 64, []
    for row in map(change, ledger.rows()):
        made = row._replace(previous=previous, hash="")
        made = made._replace(hash=digest({name: value for name, value in made._asdict().items() if name != "hash"}))
        rows.append(made)
        previous = made.hash
    with closing(sqlite3.connect(ledger.path)) as connection, connection:
        connection.executescript("DROP TRIGGER no_removal; DROP TRIGGER no_replacement; DELETE FROM ledger")
        connection.executemany(f"INSERT INTO ledger VALUES ({','.join('?' * 14)})", rows)  # noqa: S608


def test_a_ledger_that_was_written_anew_is_not_the_one_that_was_known(ledger: Ledger) -> None:
    _reserve(ledger)
    known = ledger.state()
    _rewritten(ledger, lambda row: row._replace(noise=9.0) if row.id == 2 else row)
    with pytest.raises(LedgerError, match=r"row 2 .* is another one than it was"):
        ledger.rows()
    fresh = Ledger(ledger.path)
    assert len(fresh.rows()) == 2  # a chain alone cannot show it
    with pytest.raises(LedgerError, match=r"row 2 .* is another one than it was"):
        fresh.check(known)
    with pytest.raises(LedgerError, match=r"row 3 .* is missing, and so are all up to row 7"):
        fresh.check(State(7, "f" * 64))


@pytest.mark.parametrize("left", [0, 100, 5000])
def test_a_file_that_was_cut_off_is_refused_with_the_remedy(left: int, ledger: Ledger) -> None:
    for number in range(30):
        ledger.note_unprotected(replace(USE, run=f"run-{number}"))
    ledger.close()
    os.truncate(ledger.path, left)
    with pytest.raises(LedgerError, match="cannot be used") as found:
        Ledger(ledger.path).rows()
    assert "restore it from a backup" in found.value.remedy


def test_a_page_of_garbage_is_refused(ledger: Ledger) -> None:
    for number in range(60):
        ledger.note_unprotected(replace(USE, run=f"run-{number}"))
    ledger.close()
    size = ledger.path.stat().st_size
    with ledger.path.open("r+b") as file:
        file.seek(size - 4096)
        file.write(b"\xff" * 4096)
    with pytest.raises(LedgerError):
        Ledger(ledger.path).rows()


def test_a_log_beside_the_file_that_is_torn_loses_only_what_never_counted(ledger: Ledger) -> None:
    for number in range(3):
        _reserve(ledger, replace(USE, run=f"run-{number}"))
    copy = ledger.path.with_name("copy.sqlite")
    copy.write_bytes(ledger.path.read_bytes())
    log = ledger.path.with_name("ledger.sqlite-wal").read_bytes()
    copy.with_name("copy.sqlite-wal").write_bytes(log[:-7])  # the last transaction did not reach the disk whole
    assert [row.run for row in Ledger(copy).rows()] == [None, "run-0", "run-1"]
    assert _reserve(Ledger(copy), replace(USE, run="run-9")) == 4


def test_a_ledger_that_is_gone_is_no_empty_one(ledger: Ledger) -> None:
    ledger.rows()
    ledger.path.unlink()
    with pytest.raises(LedgerError, match="cannot be used"):
        _reserve(ledger)


def test_a_ledger_that_cannot_be_made_says_so(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match="cannot be made"):
        Ledger(tmp_path / "nowhere" / "ledger.sqlite").begin()
