"""What a site keeps of secure sums: private, whole after a crash, and never less than what was told."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from locum.common.identity import base64url
from locum.common.secagg.site import Announced, Ready
from locum.site_client.vault import Vault
from tests.site_client.circle import NAMES, RUN, Circle, answered

_STATE = Announced(site="north", run=RUN, plan="0" * 64, pairs=b"p" * 96, models=b"m" * 96)


def test_what_is_kept_can_be_read_by_the_agent_alone(tmp_path: Path) -> None:
    vault = Vault(tmp_path / "secagg")
    vault.keep(RUN, _STATE)
    vault.answer(RUN, "train 1 1", NAMES)
    folder = tmp_path / "secagg" / RUN
    assert {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir()} == {
        "state.json": 0o600,
        "answered.jsonl": 0o600,
    }
    assert folder.stat().st_mode & 0o777 == 0o700


def test_a_state_is_what_was_kept_and_none_where_nothing_was(tmp_path: Path) -> None:
    Vault(tmp_path).keep(RUN, _STATE)
    assert Vault(tmp_path).state(RUN) == _STATE
    assert Vault(tmp_path).state("run-2") is None


@pytest.mark.parametrize("content", [b"", b"{", b"{}", b'{"stage": "ready"}', b"\xff"])
def test_a_state_that_cannot_be_read_is_none(content: bytes, tmp_path: Path) -> None:
    Vault(tmp_path).keep(RUN, _STATE)
    (tmp_path / RUN / "state.json").write_bytes(content)
    assert Vault(tmp_path).state(RUN) is None


def test_spent_keys_are_in_no_file(tmp_path: Path) -> None:
    circle = Circle(tmp_path).set_up()
    file = circle.state_file("north")
    before, inode = Vault(file.parent.parent).state(RUN), file.stat().st_ino
    assert isinstance(before, Ready)
    answered(circle.give("north", circle.context()))
    assert file.stat().st_ino != inode
    kept = b"".join(path.read_bytes() for path in file.parent.iterdir())
    spent = [base64url(chain).encode() for chain in before.chains.values()]
    assert len(spent) == 2
    assert [chain for chain in spent if chain in kept] == []


def test_a_file_left_by_a_process_that_died_is_in_nobodys_way(tmp_path: Path) -> None:
    vault = Vault(tmp_path)
    vault.keep(RUN, _STATE)
    (tmp_path / RUN / f".state.json.{os.getpid()}.tmp").write_bytes(b"half of a st")
    vault.keep(RUN, _STATE.model_copy(update={"plan": "1" * 64}))
    found = vault.state(RUN)
    assert isinstance(found, Announced)
    assert found.plan == "1" * 64
    assert [path.name for path in (tmp_path / RUN).iterdir()] == ["state.json"]


def test_the_keys_of_old_runs_are_removed_and_what_was_answered_is_not(tmp_path: Path) -> None:
    vault = Vault(tmp_path)
    for number in range(20):
        vault.keep(f"run-{number}", _STATE)
        os.utime(tmp_path / f"run-{number}" / "state.json", (number, number))
        vault.answer(f"run-{number}", "train 1 1", NAMES)
    assert [number for number in range(20) if vault.state(f"run-{number}")] == list(range(4, 20))
    assert all(Vault(tmp_path).answered(f"run-{number}", "train 1 1") for number in range(20))


# --- what was answered


def test_what_was_answered_outlives_a_restart_and_is_of_its_run_alone(tmp_path: Path) -> None:
    vault = Vault(tmp_path)
    vault.keep(RUN, _STATE)
    assert vault.answered(RUN, "train 1 1") is None
    vault.answer(RUN, "train 1 1", NAMES)
    vault.answer(RUN, "train 2 1", NAMES[:2])
    for one in (vault, Vault(tmp_path)):
        assert one.answered(RUN, "train 1 1") == NAMES
        assert one.answered(RUN, "train 2 1") == NAMES[:2]
        assert one.answered("run-2", "train 1 1") is None


@pytest.mark.parametrize("torn", ['["train 2 1", ["harb', "[", '["train 2 1", ["harbour", "north"]]'])
def test_a_last_line_that_was_cut_off_is_removed_and_the_next_one_is_whole(torn: str, tmp_path: Path) -> None:
    vault = Vault(tmp_path)
    vault.keep(RUN, _STATE)
    vault.answer(RUN, "train 1 1", NAMES)
    with (tmp_path / RUN / "answered.jsonl").open("a") as file:
        file.write(torn)
    again = Vault(tmp_path)
    assert again.answered(RUN, "train 1 1") == NAMES
    assert again.answered(RUN, "train 2 1") is None
    again.answer(RUN, "train 3 1", NAMES)
    assert Vault(tmp_path).answered(RUN, "train 1 1") == NAMES
    assert Vault(tmp_path).answered(RUN, "train 3 1") == NAMES


@contextmanager
def _files_of(most: int) -> Iterator[None]:
    """No file can grow beyond so many bytes, as if the disk were full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_an_answer_that_a_full_disk_did_not_take_whole_is_none(tmp_path: Path) -> None:
    vault = Vault(tmp_path)
    vault.keep(RUN, _STATE)
    vault.answer(RUN, "train 1 1", NAMES)
    size = (tmp_path / RUN / "answered.jsonl").stat().st_size
    with _files_of(size + 7), pytest.raises(OSError, match="too large"):
        vault.answer(RUN, "train 2 1", NAMES)
    assert vault.answered(RUN, "train 2 1") is None
    vault.answer(RUN, "train 3 1", NAMES)
    for one in (vault, Vault(tmp_path)):
        assert (one.answered(RUN, "train 1 1"), one.answered(RUN, "train 2 1")) == (NAMES, None)
        assert one.answered(RUN, "train 3 1") == NAMES
