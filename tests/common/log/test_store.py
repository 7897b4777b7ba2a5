"""The log on a disk: an append is whole after a crash at any byte, and a log that was damaged is told from one that was
cut short.
"""

from __future__ import annotations

import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pymerkle import InmemoryTree

from locum.common.log.entries import EntryError, PolicyEntry, read_entry, written
from locum.common.log.merkle import check_consistency, check_inclusion, leaf_hash
from locum.common.log.note import Checkpoint, NoteError, check_cosignature, check_signature, cosign, opened
from locum.common.log.store import CHECKPOINTS, ENTRIES, TREE, Log, LogError, stored_count, stored_index
from tests.common.log.logs import DIGEST, KEY, ORIGIN, a_policy, a_round, new_log, policies, signed

NORTH, SOUTH = (ec.derive_private_key(number, ec.SECP384R1()) for number in (3, 5))
AT = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def put_back(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).write_bytes(content)


def root_of(log: Log) -> bytes:
    """The root by another implementation, over the entries as they are read."""
    tree = InmemoryTree(algorithm="sha256")
    for entry in log.entries():
        tree.append_entry(entry)
    found: bytes = tree.get_state()
    return found


# --- what it is for


def test_entries_come_back_as_they_went_in_and_with_their_proofs(tmp_path: Path) -> None:
    log = Log(tmp_path / "a" / "log", ORIGIN)
    entries = [*policies(0, 5), a_round(0), a_round(1)]
    assert [log.append(entry) for entry in entries[:3]] == [0, 1, 2]
    assert log.append(*entries[3:]) == 3
    assert log.append() == log.size == 7
    assert [read_entry(line) for line in log.entries()] == entries
    assert [log.entry(index) for index in range(7)] == [written(entry) for entry in entries]
    assert list(log.entries(2, 4)) == [written(entry) for entry in entries[2:4]]
    assert log.root() == root_of(log)
    for index, size in itertools.combinations(range(8), 2):
        check_inclusion(leaf_hash(log.entry(index)), index, size, log.inclusion(index, size), log.root(size))
        check_consistency(index, size, log.consistency(index, size), log.root(index), log.root(size))


def test_a_log_is_the_same_after_it_was_opened_again(tmp_path: Path) -> None:
    log = new_log(tmp_path, *policies(0, 9))
    note = log.checkpoint(signed)
    again = Log(tmp_path, ORIGIN)
    assert (again.size, again.root(), again.latest(), again.repaired) == (9, log.root(), note, ())


def test_the_tree_is_laid_out_as_the_stored_hashes_of_sumdb(tmp_path: Path) -> None:
    log = new_log(tmp_path, *policies(0, 21))
    tree = (tmp_path / TREE).read_bytes()
    assert len(tree) == 32 * stored_count(21)
    # level 0, 0, 1, 0, 0, 1, 2, 0, …: each hash behind those it is made of
    assert [stored_index(0, n) for n in range(8)] == [0, 1, 3, 4, 7, 8, 10, 11]
    assert [stored_index(level, 0) for level in range(4)] == [0, 2, 6, 14]
    assert sorted(
        stored_index(level, index) for level in range(5) for index in range(21 >> level)
    ) == list(range(stored_count(21)))  # fmt: skip
    for index in range(21):
        place = 32 * stored_index(0, index)
        assert tree[place : place + 32] == leaf_hash(log.entry(index))


def test_what_is_not_there_is_an_index_error(tmp_path: Path) -> None:
    log = new_log(tmp_path, *policies(0, 3))
    line = cosign(signed(Checkpoint(ORIGIN, 3, log.root())), "north", NORTH, AT)
    for ask in (
        lambda: log.entry(3), lambda: log.entry(-1), lambda: log.entries(2, 4),
        lambda: log.root(4), lambda: log.root(-1), lambda: log.inclusion(3), lambda: log.inclusion(2, 2),
        lambda: log.consistency(4), lambda: log.consistency(1, 5), lambda: log.add_cosignature(3, line),
    ):  # fmt: skip
        with pytest.raises(IndexError):
            ask()


def test_an_entry_that_could_not_be_read_back_is_not_written(tmp_path: Path) -> None:
    log = new_log(tmp_path, *policies(0, 3))
    wrong = PolicyEntry.model_construct(at="yesterday", policy=DIGEST)
    with pytest.raises(EntryError):
        log.append(a_policy(3), wrong)
    assert log.size == 3
    assert (tmp_path / ENTRIES).read_bytes().count(b"\n") == 3


# --- checkpoints


def test_a_size_is_signed_once(tmp_path: Path) -> None:
    log = new_log(tmp_path, *policies(0, 3))
    note = log.checkpoint(signed)
    assert check_signature(note, ORIGIN, KEY.public_key()) == Checkpoint(ORIGIN, 3, log.root())

    def never(_: Checkpoint) -> str:
        raise AssertionError

    assert log.checkpoint(never) == log.latest() == log.checkpoint_of(3) == note
    assert log.checkpoint_of(2) is None


def test_an_empty_log_can_be_signed(tmp_path: Path) -> None:
    log = new_log(tmp_path)
    assert log.latest() is None
    note = log.checkpoint(signed)
    log.append(a_policy(0))
    assert Log(tmp_path, ORIGIN).latest() == note


def test_what_was_signed_must_be_the_checkpoint(tmp_path: Path) -> None:
    log = new_log(tmp_path, *policies(0, 3))
    with pytest.raises(NoteError, match="another checkpoint"):
        log.checkpoint(lambda asked: signed(Checkpoint(ORIGIN, asked.size + 1, asked.root)))
    assert log.latest() is None


def test_whoever_signs_may_use_the_log_meanwhile(tmp_path: Path) -> None:
    log = new_log(tmp_path, *policies(0, 3))

    def signs(checkpoint: Checkpoint) -> str:
        assert log.append(a_policy(3)) == log.size - 1 == 3
        return signed(checkpoint)

    assert opened(log.checkpoint(signs))[0].size == 3
    assert Log(tmp_path, ORIGIN).size == 4


def test_the_checkpoint_of_an_empty_log_is_compared_too(tmp_path: Path) -> None:
    new_log(tmp_path).checkpoint(signed)
    put_back(tmp_path, {CHECKPOINTS: contents(tmp_path)[CHECKPOINTS].replace(b"47DEQpj8HBSa", b"47DEQpj8HBSb")})
    with pytest.raises(LogError, match="damaged at the checkpoint of no entries"):
        Log(tmp_path, ORIGIN)


def test_lines_of_witnesses_are_kept_with_their_checkpoint_whenever_they_come(tmp_path: Path) -> None:
    log = new_log(tmp_path, *policies(0, 3))
    first = log.checkpoint(signed)
    log.append(a_policy(3))
    second = log.checkpoint(signed)
    assert log.add_cosignature(4, cosign(second, "north", NORTH, AT))
    assert log.add_cosignature(3, cosign(first, "north", NORTH, AT))
    assert log.add_cosignature(4, cosign(second, "south", SOUTH, AT))
    assert not log.add_cosignature(4, cosign(second, "south", SOUTH, AT.replace(year=2027)))
    for opened_log in (log, Log(tmp_path, ORIGIN)):
        notes = list(opened_log.checkpoints())
        assert [opened(note)[0].size for note in notes] == [3, 4]
        assert [[line.name for line in opened(note)[1]] for note in notes] == [
            [ORIGIN, "north"],
            [ORIGIN, "north", "south"],
        ]
        assert check_cosignature(notes[1], "south", SOUTH.public_key()) == AT
        assert opened_log.latest() == notes[1]
    with pytest.raises(NoteError):
        log.add_cosignature(4, "no line")


def test_the_folder_of_another_log_is_refused(tmp_path: Path) -> None:
    new_log(tmp_path, a_policy(0)).checkpoint(signed)
    with pytest.raises(LogError, match=f"is that of {ORIGIN}, not of another"):
        Log(tmp_path, "another")


# --- several who write


APPENDER = """
import sys, threading
from pathlib import Path
from locum.common.log.store import Log
from tests.common.log.logs import ORIGIN, a_round
who, log = int(sys.argv[2]), Log(Path(sys.argv[1]), ORIGIN)
sys.stdout.write("ready\\n"); sys.stdout.flush(); sys.stdin.readline()
for number in range(int(sys.argv[3])):
    first = log.append(*[a_round(number, 3 * who + part + 1) for part in range(3)])
    sys.stdout.write(f"{first}\\n"); sys.stdout.flush()
"""


def appender(project: Path, folder: Path, who: int, times: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", APPENDER, str(folder), str(who), str(times)]
    child = subprocess.Popen(command, cwd=project, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    return child


def attempts(log: Log) -> list[int]:
    return [read_entry(line).attempt for line in log.entries()]


def test_processes_that_append_at_once_never_interleave(project: Path, tmp_path: Path) -> None:
    log = new_log(tmp_path)
    children = [appender(project, tmp_path, who, 60) for who in range(3)]
    for child in children:
        assert child.stdin is not None
        child.stdin.write("go\n")
        child.stdin.flush()
    seen = []
    while any(child.poll() is None for child in children):
        size = log.size
        seen.append((size, log.root(size)))
        log.checkpoint(signed)
    firsts = [int(line) for child in children for line in child.communicate()[0].split()]
    assert sorted(firsts) == list(range(0, 540, 3))
    found = attempts(log)
    assert all(found[at + 1] == found[at] + 1 and found[at + 2] == found[at] + 2 for at in range(0, 540, 3))
    assert all(size % 3 == 0 and root == log.root(size) for size, root in seen)
    again = Log(tmp_path, ORIGIN)
    assert (again.repaired, log.repaired, again.root()) == ((), (), root_of(again))


def test_threads_and_logs_of_one_process_may_append_at_once(tmp_path: Path) -> None:
    first, second = Log(tmp_path, ORIGIN), Log(tmp_path, ORIGIN)

    def appends(log: Log, who: int) -> None:
        for number in range(30):
            log.append(a_round(number, 2 * who + 1), a_round(number, 2 * who + 2))

    threads = [threading.Thread(target=appends, args=(log, who)) for who, log in enumerate([first, first, second])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = attempts(first)
    assert len(found) == 180
    assert all(found[at] % 2 and found[at + 1] == found[at] + 1 for at in range(0, 180, 2))
    assert first.root() == second.root() == root_of(first)


# --- crashes


def test_kill_9_at_any_moment_keeps_what_was_returned_and_nothing_half(project: Path, tmp_path: Path) -> None:
    draw, returned = random.Random(1), 0
    for _ in range(6):
        child = appender(project, tmp_path, 0, 10**6)
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.write("go\n")
        child.stdin.flush()
        child.stdout.readline()
        time.sleep(draw.uniform(0, 0.05))
        os.kill(child.pid, signal.SIGKILL)
        told = [returned, *(int(line) + 3 for line in child.communicate()[0].splitlines(keepends=True) if "\n" in line)]
        log = Log(tmp_path, ORIGIN)
        assert log.size >= told[-1]
        assert attempts(log) == [1, 2, 3] * (log.size // 3)
        assert log.root() == root_of(log)
        log.checkpoint(signed)
        returned = log.size
    assert returned > 18


def test_an_append_that_was_cut_at_any_byte_is_as_if_it_had_not_been_asked_for(tmp_path: Path) -> None:
    log = new_log(tmp_path, *policies(0, 3))
    log.checkpoint(signed)
    before = log.root()
    log.append(*policies(3, 6))
    files = contents(tmp_path)
    entries = files[ENTRIES]
    starts = [0, *(at + 1 for at, byte in enumerate(entries) if byte == 10)]
    for length in range(starts[3], len(entries)):
        # the tree may have been written or not
        tree = files[TREE] if length % 2 else files[TREE][: 32 * stored_count(3)]
        put_back(tmp_path, {**files, ENTRIES: entries[:length], TREE: tree})
        cut = Log(tmp_path, ORIGIN)
        assert (cut.size, cut.root()) == (3, before)
        assert bool(cut.repaired) == (length > starts[3] or tree == files[TREE])
        assert contents(tmp_path)[ENTRIES] == entries[: starts[3]]
    assert cut.append(*policies(3, 6)) == 3
    assert contents(tmp_path) == files


def test_an_open_log_goes_on_behind_another_process_that_died(tmp_path: Path) -> None:
    log = new_log(tmp_path, *policies(0, 3))
    whole = contents(tmp_path)[ENTRIES]
    with (tmp_path / ENTRIES).open("ab") as file:
        file.write(written(a_policy(3)) + b" \n" + written(a_policy(4))[:20])
    assert log.size == 3
    assert contents(tmp_path)[ENTRIES] == whole
    taken = len(written(a_policy(3))) + 22
    assert log.repaired == (f"the last append to {ENTRIES} had been cut short: {taken} bytes were taken away",)
    assert log.append(a_policy(9)) == 3


def test_a_disk_that_lost_a_page_of_the_last_append_has_lost_that_append(tmp_path: Path) -> None:
    log = new_log(tmp_path, *policies(0, 3))
    log.checkpoint(signed)
    before = contents(tmp_path)
    log.append(*policies(3, 6))
    entries = bytearray(contents(tmp_path)[ENTRIES])
    start = len(before[ENTRIES])
    entries[start + 10 : start + 200] = bytes(190)
    put_back(tmp_path, {**before, ENTRIES: bytes(entries)})
    assert Log(tmp_path, ORIGIN).size == 3
    assert contents(tmp_path) == before


def test_a_tree_of_any_length_is_made_right(tmp_path: Path) -> None:
    log = new_log(tmp_path, *policies(0, 11))
    root, files = log.root(), contents(tmp_path)
    for length in range(len(files[TREE]) + 65):
        put_back(tmp_path, {TREE: (files[TREE] + bytes(65))[:length]})
        again = Log(tmp_path, ORIGIN)
        assert again.root() == root
        assert bool(again.repaired) == (length != len(files[TREE]))
        assert contents(tmp_path) == files


def test_an_open_log_makes_its_tree_anew_when_it_was_cut(tmp_path: Path) -> None:
    log = new_log(tmp_path, *policies(0, 11))
    log.checkpoint(signed)
    files = contents(tmp_path)
    for length in range(0, len(files[TREE]), 16):
        put_back(tmp_path, {TREE: files[TREE][:length]})
        assert log.root() == root_of(log)
        assert contents(tmp_path) == files
    put_back(tmp_path, {TREE: b"", ENTRIES: files[ENTRIES].replace(b'"policy":"0', b'"policy":"f', 1)})
    with pytest.raises(LogError, match="damaged between entries 0 and 10"):
        log.append(a_policy(11))
    put_back(tmp_path, files)
    assert log.append(a_policy(11)) == 11
    assert log.root() == root_of(log)


def test_a_tree_that_was_changed_is_made_right(tmp_path: Path) -> None:
    log = new_log(tmp_path, *policies(0, 11))
    log.checkpoint(signed)
    files = contents(tmp_path)
    for at in range(0, len(files[TREE]), 7):
        tree = bytearray(files[TREE])
        tree[at] ^= 1
        put_back(tmp_path, {TREE: bytes(tree)})
        assert Log(tmp_path, ORIGIN).repaired
        assert contents(tmp_path) == files


def test_a_checkpoint_that_was_cut_at_any_byte_was_not_given_out_and_can_be_signed_again(tmp_path: Path) -> None:
    log = new_log(tmp_path, *policies(0, 3))
    first = log.checkpoint(signed)
    log.append(a_policy(3))
    second = log.checkpoint(signed)
    log.add_cosignature(4, cosign(second, "north", NORTH, AT))
    files = contents(tmp_path)
    lines = [0, *(at + 1 for at, byte in enumerate(files[CHECKPOINTS]) if byte == 10)]
    for length in range(lines[1], len(files[CHECKPOINTS])):
        put_back(tmp_path, {CHECKPOINTS: files[CHECKPOINTS][:length]})
        cut = Log(tmp_path, ORIGIN)
        assert cut.latest() == (second if length >= lines[2] else first)
        assert cut.checkpoint(signed) == second
        assert bool(cut.repaired) == (length not in lines)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_whatever_is_lost_at_the_ends_of_the_files_the_log_is_a_beginning_of_what_it_was(
    tmp_path: Path, data: st.DataObject
) -> None:
    folder = tmp_path / "log"
    shutil.rmtree(folder, ignore_errors=True)
    log = new_log(folder)
    for number in range(data.draw(st.integers(1, 5))):
        log.append(*policies(10 * number, 10 * number + data.draw(st.integers(1, 4))))
        if data.draw(st.booleans()):
            log.checkpoint(signed)
    whole = list(log.entries())
    for name, content in contents(folder).items():
        put_back(folder, {name: content[: data.draw(st.integers(0, len(content)))]})
    damaged = contents(folder)
    try:
        again = Log(folder, ORIGIN)
    except LogError:
        assert contents(folder) == damaged
        return
    assert list(again.entries()) == whole[: again.size]
    note = again.latest()
    assert note is None or opened(note)[0].size <= again.size
    assert again.root() == root_of(again) if again.size else True
    assert Log(folder, ORIGIN).repaired == ()


# --- damage


def test_a_log_shorter_than_its_checkpoint_is_refused_at_every_byte(tmp_path: Path) -> None:
    log = new_log(tmp_path, *policies(0, 3))
    log.append(*policies(3, 6))
    log.checkpoint(signed)
    files = contents(tmp_path)
    for length in range(len(files[ENTRIES])):
        damaged = {**files, ENTRIES: files[ENTRIES][:length]}
        put_back(tmp_path, damaged)
        whole = files[ENTRIES][:length].count(b"}\n")
        with pytest.raises(LogError, match=f"damaged at entry {whole}: a checkpoint of 6 entries was signed"):
            Log(tmp_path, ORIGIN)
        assert contents(tmp_path) == damaged
    put_back(tmp_path, files)
    assert Log(tmp_path, ORIGIN).size == 6


@pytest.mark.parametrize("with_tree", [True, False])
def test_an_edited_line_under_a_checkpoint_is_refused_with_its_number(tmp_path: Path, *, with_tree: bool) -> None:
    log = new_log(tmp_path, *policies(0, 5))
    log.checkpoint(signed)
    log.append(*policies(5, 9))
    log.checkpoint(signed)
    log.append(a_policy(9))
    files = contents(tmp_path)
    lines = files[ENTRIES].split(b"\n")
    for number in range(9):
        edited = [*lines[:number], lines[number].replace(b'"policy":"0', b'"policy":"f'), *lines[number + 1 :]]
        damaged = {**files, ENTRIES: b"\n".join(edited)}
        if not with_tree:
            damaged[TREE] = b""
        put_back(tmp_path, damaged)
        where = f"at entry {number}" if with_tree else "between entries " + ("0 and 4" if number < 5 else "5 and 8")
        with pytest.raises(LogError, match=f"was damaged {where}$") as refused:
            Log(tmp_path, ORIGIN)
        assert "restore the folder" in refused.value.remedy
        assert contents(tmp_path) == damaged


def test_no_byte_of_an_entry_under_a_checkpoint_can_be_changed(tmp_path: Path) -> None:
    log = new_log(tmp_path, *policies(0, 4))
    log.checkpoint(signed)
    files = contents(tmp_path)
    length = len(files[ENTRIES]) // 4
    for at in range(length, 2 * length):
        entries = bytearray(files[ENTRIES])
        entries[at] ^= 1
        put_back(tmp_path, {ENTRIES: bytes(entries)})
        with pytest.raises(LogError, match="at entry 1$" if at < 2 * length - 1 else "at entry [13]"):
            Log(tmp_path, ORIGIN)


def test_an_entry_that_the_tree_counts_was_whole_once_and_is_not_taken_away(tmp_path: Path) -> None:
    log = new_log(tmp_path, *policies(0, 4))
    entries = contents(tmp_path)[ENTRIES]
    put_back(tmp_path, {ENTRIES: entries.replace(b"{", b"[", 2).replace(b"[", b"{", 1)})
    damaged = contents(tmp_path)
    with pytest.raises(LogError, match=r"damaged at entry 1$"):
        Log(tmp_path, ORIGIN)
    assert contents(tmp_path) == damaged
    assert log.size == 4


@pytest.mark.parametrize(
    "line",
    [
        b"{}",
        b"[]",
        b"nonsense",
        b'{"checkpoint":"nonsense"}',
        b'{"checkpoint":1}',
        b'{"cosignature":"nonsense","size":3}',
        b'{"cosignature":"\\u2014 a AAAAAAAA","size":4}',
    ],
)
def test_a_line_of_the_checkpoints_that_is_none_is_refused_with_its_number_from_0(tmp_path: Path, line: bytes) -> None:
    new_log(tmp_path, *policies(0, 3)).checkpoint(signed)
    with (tmp_path / CHECKPOINTS).open("ab") as file:
        file.write(line + b"\n")
    with pytest.raises(LogError, match=f"damaged at line 1 of {CHECKPOINTS}"):
        Log(tmp_path, ORIGIN)


def test_checkpoints_that_do_not_grow_are_refused(tmp_path: Path) -> None:
    new_log(tmp_path, *policies(0, 3)).checkpoint(signed)
    content = contents(tmp_path)[CHECKPOINTS]
    put_back(tmp_path, {CHECKPOINTS: content * 2})
    with pytest.raises(LogError, match=f"damaged at line 1 of {CHECKPOINTS}"):
        Log(tmp_path, ORIGIN)


def test_a_log_that_is_damaged_while_it_is_open_takes_no_more(tmp_path: Path) -> None:
    log = new_log(tmp_path, *policies(0, 3))
    log.checkpoint(signed)
    files = contents(tmp_path)
    for name, where in ((ENTRIES, "at entry 2"), (CHECKPOINTS, f"at line 0 of {CHECKPOINTS}")):
        put_back(tmp_path, {name: files[name][:-1]})
        for _ in range(2):
            with pytest.raises(LogError, match=f"damaged {where}, which was there before"):
                log.append(a_policy(3))
        assert contents(tmp_path)[name] == files[name][:-1]
        put_back(tmp_path, files)
    assert log.append(a_policy(3)) == 3


# --- a disk that is full


LIMITED = """
import resource, sys
from pathlib import Path
from locum.common.log.store import Log
from tests.common.log.logs import ORIGIN, policies, signed
log = Log(Path(sys.argv[1]), ORIGIN)
for name, call in {"entries.jsonl": lambda: log.append(*policies(3, 6)),
                   "checkpoints.jsonl": lambda: log.checkpoint(signed)}.items():
    start = (Path(sys.argv[1]) / name).stat().st_size
    # the other files are shorter than this one, or are not written
    for limit in range(start, start + 150):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        try:
            call()
        except OSError:
            assert (Path(sys.argv[1]) / name).stat().st_size == start, limit
        else:
            raise AssertionError(limit)
        assert log.size == 3 and log.latest() is None
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
log.append(*policies(3, 6))
log.checkpoint(signed)
"""


def test_a_file_that_cannot_grow_at_any_byte_loses_nothing(project: Path, tmp_path: Path) -> None:
    new_log(tmp_path, *policies(0, 3))
    subprocess.run([sys.executable, "-c", LIMITED, str(tmp_path)], cwd=project, check=True)
    log = Log(tmp_path, ORIGIN)
    assert (log.size, log.repaired, log.root()) == (6, (), root_of(log))
    assert log.latest() is not None


FULL = """
import errno, sys, traceback
from pathlib import Path
from locum.common.log.store import Log
from tests.common.log.logs import ORIGIN, policies, signed
folder = Path(sys.argv[1]) / "log"
log, filler, number, failed = Log(folder, ORIGIN), Path(sys.argv[1]) / "filler", 0, []
for left in 8 * (0, 1, 2):
    with filler.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            file.truncate(max(0, file.tell() // 4096 - left) * 4096)
    try:
        for number in range(number, number + 2000, 4):
            log.append(*policies(number, number + 4))
    except OSError as error:
        assert error.errno == errno.ENOSPC
        failed.append("_store" in [frame.name for frame in traceback.extract_tb(error.__traceback__)])
    assert log.size == number == Log(folder, ORIGIN).size, (log.size, number)
    assert Log(folder, ORIGIN).root() == log.root()
    filler.unlink()
    log.append(*policies(number, number + 4))
    number += 4
assert len(failed) == 24 and set(failed) == {False, True}, failed  # the entries' file, and the tree's
log.checkpoint(signed)
assert not log.repaired and not Log(folder, ORIGIN).repaired
print(log.size)
"""


def test_a_full_disk_loses_nothing_and_the_log_goes_on_when_there_is_room(project: Path, tmp_path: Path) -> None:
    mount = f"mount -t tmpfs -o size=256k none {tmp_path}"
    if subprocess.run(["unshare", "-rm", "sh", "-c", mount], check=False, capture_output=True).returncode:
        pytest.skip("no small file system can be mounted here")
    code = f'{mount} && exec "$0" -c "$1" {tmp_path}'
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", code, sys.executable, FULL],
        cwd=project,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 96
