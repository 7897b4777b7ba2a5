"""A site that witnesses the federation's log never vouches for two histories of it, whatever it is shown."""

from __future__ import annotations

import json
import logging
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from locum.common.errors import RunError
from locum.common.identity import fingerprint_of
from locum.common.log.entries import SiteEntry
from locum.common.log.merkle import leaf_hash
from locum.common.log.note import Checkpoint, Line, NoteError, check_cosignature, opened, sign, with_lines
from locum.common.log.origins import site_origin
from locum.server.home import Home
from locum.server.log import FederationLog, open_log
from locum.simulations.institutions import Federation, credentials_of, found_federation
from locum.site_client.fleet import RefusedError
from locum.site_client.secure import Credentials
from locum.site_client.witness import Ask, ForkedError, Seen, Witness, read_seen

_LOG = logging.getLogger("tests.witness")


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Federation:
    return found_federation(tmp_path_factory.mktemp("federation"))


@pytest.fixture(scope="module")
def north(federation: Federation) -> Credentials:
    return credentials_of("north", federation)


def grow(log: FederationLog, *words: str) -> FederationLog:
    """Appends an entry a word; two logs that grow by the same words have the same root."""
    for word in words:
        certificate = leaf_hash(word.encode()).hex()
        entry = SiteEntry(at="2026-05-04T08:00:00Z", site="north", event="enrolled", certificate=certificate)
        log.append(entry)
    log.seal()
    return log


@dataclass
class Shown:
    """A coordinator in this process, which shows the log that it is given and keeps what is handed in."""

    log: FederationLog
    own: Credentials
    lines: list[tuple[int, str]] = field(default_factory=list)

    def __call__(self, size: int, line: str) -> tuple[bytes, Sequence[bytes]]:
        if line:
            self.lines.append((size, line))
            try:
                self.log.cosigned(self.own.site, self.own.key.public_key(), line, size)
            except NoteError as error:
                raise RefusedError(str(error)) from error
        return self.log.show(size)


@dataclass
class Logs:
    """Histories that one coordinator has signed: all begin with the same entry."""

    folder: Path
    federation: Federation

    def new(self, name: str, *words: str) -> FederationLog:
        """A log that begins as every other here, and grows by `words`."""
        folder, home = self.folder / name, Home(self.folder / name)
        folder.mkdir()
        shutil.copytree(self.federation.home.authority, home.authority)
        begun = self.folder / "first"
        if begun.exists():
            shutil.copytree(begun, home.log)
        log = open_log(home)
        if not begun.exists():
            shutil.copytree(home.log, begun)
        return grow(log, *words)

    def fork(self, log: FederationLog, name: str, *words: str) -> FederationLog:
        """Another log that has gone the same way so far."""
        home = Home(self.folder / name)
        home.path.mkdir()
        shutil.copytree(self.federation.home.authority, home.authority)
        shutil.copytree(log.folder, home.log)
        return grow(open_log(home), *words)


@pytest.fixture
def logs(tmp_path: Path, federation: Federation) -> Logs:
    return Logs(tmp_path, federation)


def witness_in(folder: Path, own: Credentials) -> Witness:
    """A witness as an agent opens it."""
    return Witness(folder / "witness", lambda: own, lambda: datetime.now(UTC), _LOG)


def memory(folder: Path, own: Credentials) -> Path:
    return folder / "witness" / f"{fingerprint_of(own.trust.authority)[:16]}.json"


def test_a_log_that_grows_is_signed_and_the_coordinator_keeps_the_signature(
    logs: Logs, north: Credentials, tmp_path: Path
) -> None:
    shown, witness = Shown(logs.new("a", "one"), north), witness_in(tmp_path, north)
    assert witness.look(shown) == 2
    grow(shown.log, "two", "three")
    assert witness.look(shown) == 4
    assert witness.look(shown) == 4
    assert [size for size, _ in shown.lines] == [2, 4]
    name = site_origin("simulation", "north")
    assert shown.log.witnesses() == {name: 4}
    for note in shown.log.store.checkpoints():
        check_cosignature(note, name, north.key.public_key())


def test_nothing_is_signed_where_there_is_no_log_yet(north: Credentials, tmp_path: Path) -> None:
    asked: list[str] = []

    def nothing(_: int, line: str) -> tuple[bytes, Sequence[bytes]]:
        asked.append(line)
        return b"", []

    assert witness_in(tmp_path, north).look(nothing) == 0
    assert asked == [""]


# --- a coordinator that lies


def _refused(folder: Path, own: Credentials, ask: Shown | Ask, told: str) -> None:
    """Looking is refused, in these words, and nothing is signed by it."""
    before = read_seen(memory(folder, own))
    with pytest.raises(ForkedError, match=told):
        witness_in(folder, own).look(ask)
    after = read_seen(memory(folder, own))
    assert (after.note, after.size) == (before.note, before.size)
    assert told in after.problem


def test_a_fork_is_refused_and_told_and_kept_as_evidence(
    logs: Logs, north: Credentials, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    honest = logs.new("a", "one", "two")
    witness_in(tmp_path, north).look(Shown(honest, north))
    forked = Shown(logs.new("b", "one", "another", "three"), north)
    _refused(tmp_path, north, forked, "another history than the 3 entries seen before")
    assert [record.levelname for record in caplog.records if "NOT WHAT IT WAS" in record.message] == ["ERROR"]
    (evidence,) = (tmp_path / "witness").glob("refused-*.json")
    kept = json.loads(evidence.read_bytes())
    assert opened(kept["shown"])[0].size == 4  # the coordinator's own signature under the other history
    assert opened(kept["seen"])[0].size == 3
    assert not [size for size, _ in forked.lines if size > 3]
    grow(forked.log, "more", "and more")
    _refused(tmp_path, north, forked, "another history")
    assert forked.log.witnesses() == {}


def test_another_history_of_the_same_length_is_refused(logs: Logs, north: Credentials, tmp_path: Path) -> None:
    witness_in(tmp_path, north).look(Shown(logs.new("a", "one", "two"), north))
    _refused(tmp_path, north, Shown(logs.new("b", "one", "another"), north), "another history")


def test_a_log_that_has_become_shorter_is_refused(logs: Logs, north: Credentials, tmp_path: Path) -> None:
    witness_in(tmp_path, north).look(Shown(logs.new("a", "one", "two"), north))
    _refused(tmp_path, north, Shown(logs.new("b", "one"), north), "it had 3 entries, and is shown with 2")
    _refused(tmp_path, north, lambda _size, _line: (b"", []), "it had 3 entries, and is shown with 0")


def test_the_true_log_is_signed_again_afterwards_and_the_evidence_stays(
    logs: Logs, north: Credentials, tmp_path: Path
) -> None:
    honest = Shown(logs.new("a", "one", "two"), north)
    witness_in(tmp_path, north).look(honest)
    _refused(tmp_path, north, Shown(logs.new("b", "one", "another", "three"), north), "another history")
    grow(honest.log, "three")
    assert witness_in(tmp_path, north).look(honest) == 4
    assert read_seen(memory(tmp_path, north)).problem == ""
    assert len(list((tmp_path / "witness").glob("refused-*.json"))) == 1


def _resigned(note: bytes, key: Ed25519PrivateKey, **changes: object) -> bytes:
    checkpoint = opened(note.decode())[0]
    fields = {"origin": checkpoint.origin, "size": checkpoint.size, "root": checkpoint.root} | changes
    made = Checkpoint(**fields)  # type: ignore[arg-type]
    return sign(made, checkpoint.origin, key).encode()


_LIES: dict[str, Callable[[bytes, FederationLog], bytes]] = {
    "another key": lambda note, _: _resigned(note, Ed25519PrivateKey.generate()),
    "another size": lambda note, _: note.replace(b"\n3\n", b"\n4\n", 1),
    "another origin": lambda note, log: _resigned(note, log.key, origin="locum.another/log"),
    "no signature": lambda note, _: note.partition(b"\n\n")[0] + b"\n\n",
    "no text": lambda *_: b"\xff\xfe\x00",
    "no note": lambda *_: b"hello\n",
    "a site's signature": lambda note, _: note,
}


@pytest.mark.parametrize("lie", _LIES)
def test_a_checkpoint_that_the_log_key_has_not_signed_is_refused(
    lie: str, logs: Logs, north: Credentials, federation: Federation, tmp_path: Path
) -> None:
    log = logs.new("a", "one", "two")

    def ask(size: int, _line: str) -> tuple[bytes, Sequence[bytes]]:
        note, proof = log.show(size)
        if lie == "a site's signature":  # right in itself, by somebody else than the log
            checkpoint = opened(note.decode())[0]
            return sign(checkpoint, checkpoint.origin, north.key, datetime.now(UTC)).encode(), proof
        return _LIES[lie](note, log), proof

    with pytest.raises(ForkedError):
        witness_in(tmp_path, north).look(ask)
    assert read_seen(memory(tmp_path, north)).note == ""


@pytest.mark.parametrize(
    "spoil",
    [
        lambda proof: proof[:-1],
        lambda proof: [*proof, bytes(32)],
        lambda proof: [bytes(32), *proof[1:]],
        lambda proof: [proof[0][:-1], *proof[1:]],
        lambda _: [],
    ],
)
def test_a_true_log_with_a_wrong_proof_is_refused(
    spoil: Callable[[Sequence[bytes]], Sequence[bytes]], logs: Logs, north: Credentials, tmp_path: Path
) -> None:
    log = logs.new("a", "one", "two")
    witness_in(tmp_path, north).look(Shown(log, north))
    grow(log, "three", "four")

    def ask(size: int, _line: str) -> tuple[bytes, Sequence[bytes]]:
        note, proof = log.show(size)
        return note, spoil(proof)

    with pytest.raises(ForkedError):
        witness_in(tmp_path, north).look(ask)
    assert read_seen(memory(tmp_path, north)).size == 3


def test_two_sites_shown_two_histories_do_not_vouch_for_one_checkpoint_and_one_look_at_the_others_finds_it(
    logs: Logs, federation: Federation, north: Credentials, tmp_path: Path
) -> None:
    east = credentials_of("east", federation)
    one, other = logs.new("a", "one", "two"), logs.new("b", "one", "another")
    for own, log in ((north, one), (east, other)):
        witness_in(tmp_path / own.site, own).look(Shown(log, own))
    (line,) = [text for text in _lines(other) if "east" in text]
    with pytest.raises(NoteError, match="not of this checkpoint"):
        one.cosigned("east", east.key.public_key(), line, 3)
    merged = with_lines(one.store.latest() or "", [line])
    with pytest.raises(NoteError):
        check_cosignature(merged, site_origin("simulation", "east"), east.key.public_key())
    _refused(tmp_path / "east", east, Shown(one, east), "another history")
    _refused(tmp_path / "north", north, Shown(other, north), "another history")


def _lines(log: FederationLog) -> list[str]:
    return [line.text() for line in opened(log.store.latest() or "")[1]]


# --- whatever dies


_DYING = """
import os, signal, sys
from pathlib import Path
from locum.site_client import witness
from tests.site_client import test_witness as tests

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

setattr(witness, sys.argv[3], die)
from locum.simulations.institutions import credentials_of, found_federation
own = credentials_of("north", found_federation(Path(sys.argv[1])))
log = tests.open_log(tests.Home(Path(sys.argv[4])))
tests.witness_in(Path(sys.argv[2]), own).look(tests.Shown(log, own))
"""


@pytest.mark.parametrize(("at", "kept"), [("replace_file", 0), ("cosign", 3)])
def test_kill_9_before_or_after_it_was_written_down_leaves_a_witness_that_signs_one_root_of_each_size(
    at: str, kept: int, logs: Logs, north: Credentials, federation: Federation, tmp_path: Path
) -> None:
    honest = logs.new("a", "one", "two")
    words = (str(federation.home.path), str(tmp_path), at, str(tmp_path / "a"))
    died = subprocess.run([sys.executable, "-c", _DYING, *words], check=False, cwd=Path(__file__).parents[2])
    assert died.returncode == -signal.SIGKILL
    assert read_seen(memory(tmp_path, north)).size == kept
    assert honest.witnesses() == {}
    if kept:  # what may have been signed is what will be
        _refused(tmp_path, north, Shown(logs.new("b", "one", "another"), north), "another history")
    shown = Shown(honest, north)
    assert witness_in(tmp_path, north).look(shown) == 3
    assert honest.witnesses() == {site_origin("simulation", "north"): 3}


def test_a_signature_that_was_lost_on_the_way_is_handed_in_again(
    logs: Logs, north: Credentials, tmp_path: Path
) -> None:
    shown, witness = Shown(logs.new("a", "one"), north), witness_in(tmp_path, north)

    def cut(size: int, line: str) -> tuple[bytes, Sequence[bytes]]:
        if line:
            raise ConnectionError
        return shown(size, line)

    for _ in range(2):
        with pytest.raises(ConnectionError):
            witness.look(cut)
    assert witness.look(shown) == 2
    assert [size for size, _ in shown.lines] == [2]


def test_an_agent_that_starts_anew_hands_its_signature_in_again_and_it_stands_once(
    logs: Logs, north: Credentials, tmp_path: Path
) -> None:
    shown = Shown(logs.new("a", "one"), north)
    for _ in range(3):
        witness_in(tmp_path, north).look(shown)
    assert len(_lines(shown.log)) == 2  # the log's own, and one


def test_a_memory_that_is_damaged_signs_nothing(logs: Logs, north: Credentials, tmp_path: Path) -> None:
    shown = Shown(logs.new("a", "one"), north)
    witness_in(tmp_path, north).look(shown)
    for content in (b"", b"{}x", Seen(note="no note").model_dump_json().encode()):
        memory(tmp_path, north).write_bytes(content)
        with pytest.raises(RunError, match="signs nothing"):
            witness_in(tmp_path, north).look(shown)
    assert len(shown.lines) == 1


def test_a_site_of_two_federations_has_a_memory_of_each(
    logs: Logs, north: Credentials, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    witness_in(tmp_path, north).look(Shown(logs.new("a", "one", "two"), north))
    other = found_federation(tmp_path_factory.mktemp("other"))
    own = credentials_of("north", other)
    log = open_log(other.home)
    log.seal()
    assert witness_in(tmp_path, own).look(Shown(log, own)) == 1
    assert read_seen(memory(tmp_path, north)).size == 3


# --- whatever is shown


@pytest.fixture(scope="module")
def histories(federation: Federation, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], FederationLog]:
    """Logs of 1 to 6 entries on three ways that part at different places, all signed by the log key."""
    logs = Logs(tmp_path_factory.mktemp("histories"), federation)
    ways = {"a": "12345", "b": "12X45", "c": "1Y345"}
    return {
        (way, size): logs.new(f"{way}{size}", *words[: size - 1]) for way, words in ways.items() for size in range(1, 7)
    }


@settings(max_examples=40, deadline=None)
@given(steps=st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 6), st.booleans()), max_size=12))
def test_whatever_histories_are_shown_in_whatever_order_a_witness_signs_one_root_of_each_size(
    steps: list[tuple[str, int, bool]],
    histories: dict[tuple[str, int], FederationLog],
    north: Credentials,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("witness")
    witness, signed = witness_in(folder, north), dict[int, set[bytes]]()
    for way, size, restarts in steps:
        log = histories[way, size]

        def ask(seen: int, line: str, log: FederationLog = log) -> tuple[bytes, Sequence[bytes]]:
            if line:
                for other in histories.values():
                    note = other.store.checkpoint_of(seen)
                    if note is not None and _counts(note, line, north):
                        signed.setdefault(seen, set()).add(opened(note)[0].root)
            return log.show(seen)

        if restarts:
            witness = witness_in(folder, north)
        try:
            witness.look(ask)
        except ForkedError:
            continue
    assert all(len(roots) == 1 for roots in signed.values())
    chain = sorted((size, next(iter(roots))) for size, roots in signed.items())
    ways = [{(size, log.store.root()) for (way, size), log in histories.items() if way == name} for name in "abc"]
    assert any(set(chain) <= way for way in ways)  # and all of one history


def _counts(note: str, line: str, own: Credentials) -> bool:
    try:
        check_cosignature(with_lines(note, [line]), Line.parse(line).name, own.key.public_key())
    except NoteError:
        return False
    return True
