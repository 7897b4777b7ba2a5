from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography import x509
from hypothesis import given, settings
from hypothesis import strategies as st

from locum.common.errors import LocumError, RunError
from locum.common.identity import certified_key, fingerprint_of, new_key, serial_of, utc_now
from locum.server.authority import Authority, initialise
from locum.server.home import Home, ServerConfig
from locum.server.registry import RefusedError, Registry, RegistryError

CONFIG = ServerConfig(name="Test federation", host="127.0.0.1", superlink_port=9091, hints_port=9092)
PLAN, OTHER = "ab" * 32, "ab" * 4 + "cd" * 28


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "coordinator")


@pytest.fixture
def authority(home: Home) -> Authority:
    return initialise(home, CONFIG)


@pytest.fixture
def registry(home: Home, authority: Authority) -> Iterator[Registry]:
    opened = Registry(home.registry)
    yield opened
    opened.close()


def invite(registry: Registry, name: str, number: int = 0, hours: float = 24) -> str:
    fingerprint = f"{name}-{number}"
    expires = utc_now() + timedelta(hours=hours)
    registry.invite(name, token_sha256=bytes(32), fingerprint=fingerprint, expires=expires)
    return fingerprint


def enrol(registry: Registry, authority: Authority, name: str, number: int = 0) -> x509.Certificate:
    key = new_key().public_key()
    return registry.redeem(invite(registry, name, number), key=key, issue=lambda: authority.issue_site(name, key))


def test_an_invitation_enrols_one_site_once(registry: Registry, authority: Authority) -> None:
    fingerprint = invite(registry, "berlin")
    key = new_key().public_key()
    certificate = registry.redeem(fingerprint, key=key, issue=lambda: authority.issue_site("berlin", key))
    assert registry.certificate_state(serial_of(certificate)) == "active"
    site = registry.site("berlin")
    assert site is not None
    assert (site.certificate, site.node_id, site.revoked_at) == (certificate, None, None)
    assert registry.open_invitations() == ()
    with pytest.raises(RefusedError, match="used already"):
        registry.redeem(fingerprint, key=new_key().public_key(), issue=lambda: authority.issue_site("berlin", key))


def test_a_lost_reply_is_answered_again_with_the_same_certificate(registry: Registry, authority: Authority) -> None:
    fingerprint, key, issued = invite(registry, "berlin"), new_key().public_key(), []

    def issue() -> x509.Certificate:
        issued.append(authority.issue_site("berlin", key))
        return issued[-1]

    certificates = {registry.redeem(fingerprint, key=key, issue=issue) for _ in range(3)}
    assert certificates == set(issued)
    assert len(issued) == 1


def test_unknown_expired_superseded_and_revoked_invitations_are_refused(registry: Registry) -> None:
    def redeem(fingerprint: str) -> None:
        registry.redeem(fingerprint, key=new_key().public_key(), issue=lambda: pytest.fail("issued"))

    with pytest.raises(RefusedError, match="not known"):
        redeem("nobody")
    late = invite(registry, "late", hours=-0.01)
    with pytest.raises(RefusedError, match="expired"):
        redeem(late)
    first, second = invite(registry, "berlin", 1), invite(registry, "berlin", 2)
    with pytest.raises(RefusedError, match="revoked"):
        redeem(first)
    assert registry.revoke("berlin")
    with pytest.raises(RefusedError, match="revoked"):
        redeem(second)


def test_a_failing_issue_leaves_the_invitation_open(registry: Registry, authority: Authority) -> None:
    fingerprint = invite(registry, "berlin")

    def fail() -> x509.Certificate:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        registry.redeem(fingerprint, key=new_key().public_key(), issue=fail)
    assert [row.name for row in registry.open_invitations()] == ["berlin"]
    assert registry.sites() == ()


def test_an_enrolled_site_is_invited_only_after_its_revocation(registry: Registry, authority: Authority) -> None:
    first = enrol(registry, authority, "berlin")
    with pytest.raises(RefusedError, match="enrolled already"):
        invite(registry, "berlin", 1)
    assert registry.revoke("berlin")
    assert not registry.revoke("berlin")
    second = enrol(registry, authority, "berlin", 2)
    assert registry.certificate_state(serial_of(first)) == "revoked"
    assert registry.certificate_state(serial_of(second)) == "active"
    assert [site.revoked_at for site in registry.sites()] == [None]


def test_a_site_whose_certificate_expired_is_invited_without_ado(registry: Registry, authority: Authority) -> None:
    key, fingerprint = new_key().public_key(), invite(registry, "berlin")
    past = utc_now() - timedelta(days=91)
    registry.redeem(fingerprint, key=key, issue=lambda: authority.issue_site("berlin", key, now=past))
    enrol(registry, authority, "berlin", 2)


def test_a_key_that_had_a_certificate_does_not_enrol_again(registry: Registry, authority: Authority) -> None:
    first = enrol(registry, authority, "berlin")
    registry.revoke("berlin")
    key = certified_key(first)
    with pytest.raises(RefusedError, match="had a certificate before"):
        registry.redeem(invite(registry, "berlin", 2), key=key, issue=lambda: authority.issue_site("berlin", key))


def test_nodes_are_of_unrevoked_sites_and_of_one_site_each(registry: Registry, authority: Authority) -> None:
    largest = 2**64 - 1
    for name, node in (("berlin", largest), ("paris", 7)):
        enrol(registry, authority, name)
        registry.set_node(name, node)
    assert registry.nodes() == {largest: "berlin", 7: "paris"}
    with pytest.raises(RefusedError, match="another site's"):
        registry.set_node("paris", largest)
    registry.set_node("paris", 7)
    registry.revoke("berlin")
    assert registry.nodes() == {7: "paris"}
    enrol(registry, authority, "berlin", 2)
    assert registry.nodes() == {7: "paris"}


def test_the_registry_survives_its_process(home: Home, registry: Registry, authority: Authority) -> None:
    enrol(registry, authority, "berlin")
    registry.propose(PLAN, b"envelope")
    registry.close()
    again = Registry(home.registry)
    assert [site.name for site in again.sites()] == ["berlin"]
    assert again.proposals() == (b"envelope",)
    again.close()


# --- proposals and approvals ---


def test_proposals_are_found_by_their_first_digits(registry: Registry) -> None:
    assert registry.state() == 0
    assert registry.propose(PLAN, b"one")
    assert registry.propose(OTHER, b"two")
    assert not registry.propose(PLAN, b"again")
    assert registry.state() == 2
    assert registry.proposals() == (b"two", b"one")
    assert registry.proposal("abababababab") == (PLAN, b"one")
    assert registry.proposal(PLAN.upper()) == (PLAN, b"one")
    with pytest.raises(RunError, match=f"2 plans: {PLAN[:16]}, {OTHER[:16]}"):
        registry.proposal("ababab")
    with pytest.raises(RunError, match="no plan"):
        registry.proposal("123456")
    for wrong in ("ababa", "", "%%%%%%", "ababaz", "ab" * 33):
        with pytest.raises(RunError):
            registry.proposal(wrong)


WORDS = st.lists(st.tuples(st.integers(0, 6), st.booleans()), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(words=WORDS, data=st.data())
def test_the_newest_word_stands_in_whatever_order_words_arrive(
    tmp_path_factory: pytest.TempPathFactory, words: list[tuple[int, bool]], data: st.DataObject
) -> None:
    registry = _scratch(tmp_path_factory)
    digest = f"{_counter():064x}"
    for at, approved in data.draw(st.permutations(words)):
        registry.record_approval("berlin", digest, approved=approved, at=at, envelope=b"")
    newest = max(at for at, _ in words)
    assert registry.approved("berlin", digest) == all(approved for at, approved in words if at == newest)
    assert set(registry.approvals(digest)) == ({"berlin"} if registry.approved("berlin", digest) else set())


_SCRATCH: list[Registry] = []
_COUNT = iter(range(1, 10**9))


def _counter() -> int:
    return next(_COUNT)


def _scratch(factory: pytest.TempPathFactory) -> Registry:
    """One registry for all examples; each has a digest of its own."""
    if not _SCRATCH:
        home = Home(factory.mktemp("registry") / "coordinator")
        authority = initialise(home, CONFIG)
        registry = Registry(home.registry)
        enrol(registry, authority, "berlin")
        _SCRATCH.append(registry)
    return _SCRATCH[0]


def test_a_revoked_sites_approvals_do_not_stand_nor_come_back_with_a_new_key(
    registry: Registry, authority: Authority
) -> None:
    enrol(registry, authority, "berlin")
    registry.record_approval("berlin", PLAN, approved=True, at=9e9, envelope=b"signed")
    assert registry.approvals(PLAN)["berlin"].envelope == b"signed"
    registry.revoke("berlin")
    assert not registry.approved("berlin", PLAN)
    with pytest.raises(RefusedError, match="not enrolled"):
        registry.record_approval("berlin", PLAN, approved=True, at=9e9, envelope=b"")
    enrol(registry, authority, "berlin", 2)
    assert registry.approvals(PLAN) == {}
    assert registry.record_approval("berlin", PLAN, approved=True, at=1.0, envelope=b"new key")
    assert registry.approved("berlin", PLAN)


# --- fail closed ---


def _gone(path: Path) -> None:
    for beside in path.parent.glob("registry.sqlite*"):
        beside.unlink()


def _garbage(path: Path) -> None:
    _gone(path)
    path.write_bytes(os.urandom(8192))


def _empty(path: Path) -> None:
    _gone(path)
    path.touch()


def _folder(path: Path) -> None:
    _gone(path)
    path.mkdir()


def _newer(path: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version = 99")
    path.rename(path.with_suffix(".moved"))
    path.with_suffix(".moved").rename(path)


@pytest.mark.parametrize("spoil", [_gone, _garbage, _empty, _folder])
def test_a_registry_that_cannot_be_read_answers_nothing(
    home: Home, registry: Registry, authority: Authority, spoil: Callable[[Path], None]
) -> None:
    certificate = enrol(registry, authority, "berlin")
    assert registry.certificate_state(serial_of(certificate)) == "active"
    spoil(home.registry)
    questions: list[Callable[[Registry], object]] = [
        lambda opened: opened.certificate_state(serial_of(certificate)),
        lambda opened: opened.approved("berlin", PLAN),
        lambda opened: opened.nodes(),
        lambda opened: opened.revoke("berlin"),
    ]
    for opened in (registry, Registry(home.registry)):
        for ask in questions:
            with pytest.raises(RegistryError, match="cannot be used"):
                ask(opened)
    assert spoil is not _gone or not home.registry.exists()


def test_a_registry_of_another_version_is_refused(home: Home, registry: Registry) -> None:
    _newer(home.registry)
    with pytest.raises(RegistryError, match="its form is 99"):
        Registry(home.registry).sites()


def test_a_registry_of_the_version_before_learns_questions_and_loses_nothing(home: Home, registry: Registry) -> None:
    registry.propose("ab" * 32, b"a proposal")
    registry.close()
    with sqlite3.connect(home.registry) as connection:
        for table in ("questions", "answers", "readiness"):
            connection.execute(f"DROP TABLE {table}")
        connection.execute("PRAGMA user_version = 1")
    again = Registry(home.registry)
    assert again.proposals() == (b"a proposal",)
    assert again.ask("cd" * 32, 10.0, b"a question")
    assert again.questions(open_at=5.0) == (b"a question",)
    assert again.questions(open_at=10.0) == ()
    assert Registry(home.registry).state() == 2


def test_the_first_answer_of_a_site_stays_and_no_answer_counts_that_is_not_noted(
    registry: Registry, authority: Authority
) -> None:
    enrol(registry, authority, "north")
    registry.ask("cd" * 32, 10.0, b"a question")

    def full() -> None:
        raise OSError("no space")

    with pytest.raises(LocumError):
        registry.record_answer("north", "cd" * 32, b"lost", noted=full)
    assert registry.answers("cd" * 32) == {}
    noted: list[int] = []
    assert registry.record_answer("north", "cd" * 32, b"one", noted=lambda: noted.append(1))
    assert not registry.record_answer("north", "cd" * 32, b"one", noted=lambda: noted.append(2))
    with pytest.raises(RefusedError, match="another answer"):
        registry.record_answer("north", "cd" * 32, b"two", noted=lambda: noted.append(3))
    with pytest.raises(RefusedError, match="is not enrolled"):
        registry.record_answer("south", "cd" * 32, b"one", noted=lambda: noted.append(4))
    assert (registry.answers("cd" * 32), noted) == ({"north": b"one"}, [1, 2])
    registry.revoke("north")
    assert registry.answers("cd" * 32) == {}


def test_a_registry_that_was_restored_is_read_anew(home: Home, registry: Registry, authority: Authority) -> None:
    registry.close()
    backup = home.registry.read_bytes()
    certificate = enrol(registry, authority, "berlin")
    registry.close()
    beside = home.registry.with_suffix(".restored")
    beside.write_bytes(backup)
    assert registry.certificate_state(serial_of(certificate)) == "active"
    registry.close()
    beside.rename(home.registry)
    assert registry.certificate_state(serial_of(certificate)) == "unknown"


def test_a_registry_is_not_made_twice(home: Home, registry: Registry) -> None:
    with pytest.raises(RegistryError, match="cannot be made"):
        Registry.create(home.registry)


# --- several at once ---

RACER = """
import sys
from datetime import timedelta
from pathlib import Path
from locum.common.identity import new_key
from locum.server.authority import load_authority
from locum.server.home import Home, read_config
from locum.server.registry import RefusedError, Registry
home = Home(Path(sys.argv[1]))
authority, registry = load_authority(home, read_config(home)), Registry(home.registry)
keys = [new_key().public_key() for _ in range(20)]
registry.sites()
print("ready", flush=True)
sys.stdin.readline()
for number in range(20):
    try:
        key = keys[number]
        registry.redeem(f"s{number}-0", key=key, issue=lambda: authority.issue_site(f"s{number}", key))
        print(number, flush=True)
    except RefusedError as refused:
        assert "used already" in refused.message, refused
"""


def test_of_two_processes_that_redeem_at_once_one_wins(home: Home, registry: Registry, authority: Authority) -> None:
    for number in range(20):
        invite(registry, f"s{number}")
    command = [sys.executable, "-c", RACER, str(home.path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    racers = [subprocess.Popen(command, **pipes) for _ in range(2)]  # type: ignore[call-overload]
    for racer in racers:
        assert racer.stdout.readline() == "ready\n"
    for racer in racers:
        racer.stdin.write("go\n")
        racer.stdin.flush()
    wins = [racer.communicate()[0].split() for racer in racers]
    assert [racer.returncode for racer in racers] == [0, 0]
    assert sorted(wins[0] + wins[1], key=int) == [str(number) for number in range(20)]
    assert len(registry.sites()) == 20


def test_threads_share_one_registry(registry: Registry, authority: Authority) -> None:
    certificate = enrol(registry, authority, "berlin")
    failures: list[LocumError] = []

    def ask(number: int) -> None:
        try:
            for at in range(20):
                assert registry.certificate_state(serial_of(certificate)) == "active"
                registry.record_approval("berlin", f"{number:064x}", approved=True, at=at, envelope=b"")
        except LocumError as error:
            failures.append(error)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert all(registry.approved("berlin", f"{number:064x}") for number in range(8))


def test_the_registry_keeps_fingerprints_not_secrets(home: Home, registry: Registry, authority: Authority) -> None:
    certificate = enrol(registry, authority, "berlin")
    columns = {
        row[1] for table in ("invitations", "sites", "certificates")
        for row in sqlite3.connect(home.registry).execute(f"PRAGMA table_info({table})")
    }  # fmt: skip
    assert columns == {
        *("fingerprint", "name", "token_sha256", "expires", "used_at", "used_key", "serial", "revoked_at"),
        *("key", "enrolled_at", "node_id", "not_after", "pem"),
    }
    assert len(fingerprint_of(certificate)) == 64
