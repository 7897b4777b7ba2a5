"""Joining from the hospital's side: what is kept, what is refused, and how the connection goes."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace as changed
from datetime import timedelta
from pathlib import Path

import grpc
import pytest
import typer
from pydantic import SecretStr

from locum.common.cli import main
from locum.common.errors import DataError, LocumError, RunError
from locum.common.identity import (
    IdentityError,
    Invitation,
    base64url,
    certificate_pem,
    fingerprint_of,
    key_pem,
    new_key,
    new_token,
    parse_certificate,
    read_invitation,
    save_key,
    token_sha256,
    utc_now,
    write_invitation,
)
from locum.common.proto import locum_pb2 as pb
from locum.common.proto.locum_pb2_grpc import RegistryServicer, RegistryStub, add_RegistryServicer_to_server
from locum.site_client import enrolment
from locum.site_client.enrol_cli import enrol as command
from locum.site_client.enrolment import connection_error, enrol, needs_renewal, open_channel, renew
from locum.site_client.identity import FOLDER, Membership, SiteIdentity, load_identity, save_identity
from locum.site_client.releases import open_releases
from tests.server.door import Door, free_ports, open_door


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Door]:
    with open_door(tmp_path_factory.mktemp("shared") / "coordinator") as opened:
        yield opened


_NAMES = iter(f"hospital{number}" for number in range(10**6))


@pytest.fixture
def name() -> str:
    return next(_NAMES)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "site"


def proposals(identity: SiteIdentity, proxy: str | None = None) -> pb.ProposalsReply:
    with open_channel(identity, proxy) as channel:
        return RegistryStub(channel).Proposals(pb.ProposalsRequest(), timeout=10)


def rewritten(path: Path, **fields: object) -> Path:
    """The invitation with other fields, beside it."""
    other = path.with_suffix(".changed")
    write_invitation(other, Invitation(**(read_invitation(path).model_dump() | fields)))
    return other


# --- the identity's folder --------------------------------------------------------------------------------------------


def test_joining_leaves_a_whole_identity_and_nothing_else(shared: Door, name: str, home: Path) -> None:
    identity = enrol(shared.invite(name), home)
    assert load_identity(home) == identity
    assert {path.name for path in (home / FOLDER).iterdir()} == {
        *("site.key", "site.pem", "authority.pem", "log.pem", "federation.json"),
    }
    assert {path.name for path in home.iterdir()} == {FOLDER, "log", ".enrolling.lock"}
    assert (home / FOLDER).stat().st_mode & 0o777 == 0o700
    assert (home / FOLDER / "site.key").stat().st_mode & 0o777 == 0o600
    assert json.loads((home / FOLDER / "federation.json").read_text()) == {
        "federation": "Test federation",
        "site": name,
        "address": shared.address,
    }
    assert key_pem(identity.key).decode() not in repr(identity)


def test_an_enrolled_site_does_not_join_again_by_accident(shared: Door, name: str, home: Path) -> None:
    enrol(shared.invite(name), home)
    before = (home / FOLDER / "site.key").read_bytes()
    shared.registry.revoke(name)
    again = shared.invite(name)
    with pytest.raises(DataError, match="enrolled already") as refused:
        enrol(again, home)
    assert "--replace" in refused.value.remedy
    identity = enrol(again, home, replace=True)
    assert proposals(identity) is not None
    assert (home / FOLDER / "site.key").read_bytes() != before
    (kept,) = home.glob(f"{FOLDER}.until-*")
    assert (kept / "site.key").read_bytes() == before


def test_an_identity_stays_when_joining_anew_fails(shared: Door, name: str, home: Path) -> None:
    identity = enrol(shared.invite(name), home)
    used = shared.home.path.parent / f"{name}.invitation.json"
    with pytest.raises(RunError, match="used already"):
        enrol(used, home, replace=True)
    assert load_identity(home) == identity


def test_a_lost_reply_is_made_good_by_the_same_command(shared: Door, name: str, home: Path) -> None:
    path = shared.invite(name)
    first = enrol(path, home)
    # As if the machine had died with the reply on its way: the key is there, the certificates are not.
    token = read_invitation(path).token_bytes
    pending = home / f".enrolling-{token_sha256(token).hex()[:16]}"
    (home / FOLDER).rename(pending)
    for left in pending.iterdir():
        if left.name != "site.key":
            left.unlink()
    assert enrol(path, home) == first
    assert list(home.glob(".enrolling-*")) == []


def test_a_key_that_was_half_written_is_made_anew(shared: Door, name: str, home: Path) -> None:
    path = shared.invite(name)
    pending = home / f".enrolling-{token_sha256(read_invitation(path).token_bytes).hex()[:16]}"
    pending.mkdir(parents=True, mode=0o700)
    (pending / "site.key.new").write_bytes(b"-----BEGIN")
    assert proposals(enrol(path, home)) is not None


def test_two_enrolments_in_one_folder_do_not_meet(shared: Door, name: str, home: Path) -> None:
    home.mkdir()
    with (home / ".enrolling.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(RunError, match="another enrolment goes on"):
            enrol(shared.invite(name), home)


@pytest.mark.parametrize("missing", ["site.key", "site.pem", "authority.pem", "log.pem", "federation.json"])
def test_an_identity_with_a_hole_is_named(shared: Door, name: str, home: Path, missing: str) -> None:
    enrol(shared.invite(name), home)
    (home / FOLDER / missing).unlink()
    with pytest.raises(DataError, match=missing.replace(".", r"\.")):
        load_identity(home)


def test_an_identity_that_was_mixed_up_is_refused(shared: Door, name: str, home: Path, tmp_path: Path) -> None:
    mine, other = enrol(shared.invite(name), home), enrol(shared.invite(next(_NAMES)), tmp_path / "other")
    for wrong in (
        changed(mine, certificate=other.certificate),
        changed(mine, membership=other.membership),
        changed(mine, authority=mine.certificate),
        changed(mine, log_certificate=mine.certificate),
    ):
        save_identity(home / FOLDER, wrong)
        with pytest.raises(DataError, match="does not fit together"):
            load_identity(home)


def test_without_an_identity_the_next_step_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no enrolled site") as refused:
        load_identity(tmp_path)
    assert "locum site enrol" in refused.value.remedy


# --- whom the hospital believes ---------------------------------------------------------------------------------------


def test_a_gateway_of_another_federation_is_not_believed(shared: Door, name: str, home: Path, tmp_path: Path) -> None:
    with open_door(tmp_path / "other") as other:
        path = rewritten(shared.invite(name), address=other.address)
        with pytest.raises(RunError, match="not this federation's gateway") as refused:
            enrol(path, home)
    assert "proxy opens TLS" in refused.value.remedy
    assert not (home / FOLDER).exists()


def test_a_gateway_under_another_name_is_not_believed(shared: Door, name: str, home: Path) -> None:
    path = rewritten(shared.invite(name), address=shared.address.replace("127.0.0.1", "localhost"))
    with pytest.raises(RunError, match="not this federation's gateway"):
        enrol(path, home)


def test_a_site_cannot_pose_as_the_gateway(shared: Door, name: str) -> None:
    me, rogue = shared.enrol(name), shared.enrol(next(_NAMES))
    server = grpc.server(ThreadPoolExecutor(2))
    pair = (key_pem(rogue.key), certificate_pem(rogue.certificate))
    port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([pair]))
    server.start()
    moved = changed(me, membership=me.membership.model_copy(update={"address": f"127.0.0.1:{port}"}))
    with pytest.raises(grpc.RpcError) as refused:
        proposals(moved)
    server.stop(None).wait()
    assert "not this federation's gateway" in connection_error(refused.value, "x").message


def test_a_gateway_that_is_away_is_told_with_what_to_check(shared: Door, name: str, home: Path) -> None:
    path = rewritten(shared.invite(name), address=f"127.0.0.1:{free_ports(1)[0]}")
    with pytest.raises(RunError, match="was not reached") as refused:
        enrol(path, home)
    assert "--proxy" in refused.value.remedy


def test_an_invitation_that_expired_or_is_damaged_is_not_even_tried(shared: Door, name: str, home: Path) -> None:
    path = shared.invite(name)
    with pytest.raises(DataError, match="expired"):
        enrol(rewritten(path, expires=utc_now() - timedelta(seconds=1)), home)
    path.with_suffix(".changed").unlink()
    with pytest.raises(DataError, match="certificates cannot be read"):
        enrol(rewritten(path, certificate="PEM"), home)
    assert not home.exists()


def test_a_token_that_does_not_fit_the_certificate_opens_nothing(shared: Door, name: str, home: Path) -> None:
    path = rewritten(shared.invite(name), token=SecretStr(base64url(new_token())))
    with pytest.raises(LocumError):
        enrol(path, home)
    assert shared.registry.site(name) is None


# --- the command ------------------------------------------------------------------------------------------------------


def _enrol(invitation: Path, home: Path, *options: str) -> int:
    return main(["site", "enrol", str(invitation), "--home", str(home), *options]) or 0


def test_what_enrol_makes_is_for_its_account_alone(shared: Door, name: str, home: Path) -> None:
    before = os.umask(0o022)
    try:
        assert _enrol(shared.invite(name), home / "north") == 0
        assert os.umask(0o022) == 0o022
    finally:
        os.umask(before)
    made = [home, *home.rglob("*")]
    assert [str(path) for path in made if path.stat().st_mode & 0o077] == []


def test_a_proxy_that_can_be_none_is_refused_before_the_invitation_is_used(
    shared: Door, name: str, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    invitation = shared.invite(name)
    for proxy in ("proxy.hospital.example:3128", "socks5://proxy:1080", "http://proxy"):
        assert _enrol(invitation, home, "--proxy", proxy) == 2
        assert "http://host:port" in capsys.readouterr().err
    assert not home.exists()
    assert _enrol(invitation, home) == 0


def test_a_folder_that_cannot_be_made_is_told_in_words(
    shared: Door, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert _enrol(shared.invite(name), tmp_path / "file" / "site") == 1
    assert "cannot be used: Not a directory" in capsys.readouterr().err


# --- renewal ----------------------------------------------------------------------------------------------------------


def old_site(door: Door, name: str, home: Path) -> SiteIdentity:
    """A site that enrolled 70 days ago."""
    key, past = new_key(), utc_now() - timedelta(days=70)
    invitation = read_invitation(door.invite(name))
    certificate = door.registry.redeem(
        fingerprint_of(parse_certificate(invitation.certificate.encode())),
        key=key.public_key(),
        issue=lambda: door.authority.issue_site(name, key.public_key(), now=past),
    )
    (home / FOLDER).mkdir(parents=True)
    save_key(home / FOLDER / "site.key", key)
    log = parse_certificate((door.home.authority / "log.pem").read_bytes())
    membership = Membership(federation="Test federation", site=name, address=door.address)
    identity = SiteIdentity(membership, key, certificate, door.authority.certificate, log)
    save_identity(home / FOLDER, identity)
    return load_identity(home)


def test_a_certificate_is_renewed_and_kept(shared: Door, name: str, home: Path) -> None:
    old = old_site(shared, name, home)
    assert needs_renewal(old)
    with open_channel(old) as channel:
        new = renew(old, home, channel, open_releases(home))
    assert not needs_renewal(new)
    assert load_identity(home) == new
    assert new.key.public_key() == old.key.public_key()
    assert proposals(old) is not None
    assert proposals(new) is not None


def test_a_certificate_is_renewed_though_this_machines_clock_is_years_behind(
    shared: Door, name: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, now = old_site(shared, name, home), utc_now()
    monkeypatch.setattr(enrolment, "utc_now", lambda: now - timedelta(days=1000))
    assert not needs_renewal(old)
    assert needs_renewal(old, now)
    with open_channel(old) as channel:
        assert not needs_renewal(renew(old, home, channel, open_releases(home), now), now)


def test_an_answer_that_is_not_this_sites_certificate_is_not_kept(shared: Door, name: str, home: Path) -> None:
    old = old_site(shared, name, home)
    other = shared.enrol(next(_NAMES))

    class Liar(RegistryServicer):  # type: ignore[misc]
        def Renew(self, request: pb.RenewRequest, context: object) -> pb.Certificates:  # noqa: N802
            certificate, log = certificate_pem(other.certificate), certificate_pem(other.log_certificate)
            return pb.Certificates(certificate=certificate, log_certificate=log)

    server = grpc.server(ThreadPoolExecutor(2))
    add_RegistryServicer_to_server(Liar(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel, pytest.raises(IdentityError, match="not that of"):
        renew(old, home, channel, open_releases(home))
    server.stop(None).wait()
    assert load_identity(home) == old


# --- the connection ---------------------------------------------------------------------------------------------------


@contextmanager
def connect_proxy() -> Iterator[tuple[str, list[str]]]:
    """An HTTP proxy that knows CONNECT and nothing else; yields its address and what it was asked."""
    asked: list[str] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=_serve, args=(listener, asked), daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", asked


def _serve(listener: socket.socket, asked: list[str]) -> None:
    while True:
        try:
            client, _ = listener.accept()
        except OSError:
            return
        head = b""
        while b"\r\n\r\n" not in head:
            head += client.recv(4096)
        line = head.split(b"\r\n")[0].decode()
        asked.append(line)
        host, _, port = line.split()[1].rpartition(":")
        upstream = socket.create_connection((host, int(port)))
        client.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        for pair in ((client, upstream), (upstream, client)):
            threading.Thread(target=_pump, args=pair, daemon=True).start()


def _pump(source: socket.socket, target: socket.socket) -> None:
    try:
        while content := source.recv(65536):
            target.sendall(content)
    except OSError:
        pass
    finally:
        target.close()


def test_a_site_joins_and_stays_through_an_http_proxy(shared: Door, name: str, home: Path) -> None:
    with connect_proxy() as (proxy, asked):
        identity = enrol(shared.invite(name), home, proxy=proxy)
        assert proposals(identity, proxy) is not None
    assert len(asked) == 2
    assert all(line.startswith(f"CONNECT {shared.address} HTTP/1") for line in asked)


def test_a_proxy_of_the_environment_does_not_carry_what_is_on_this_machine(
    shared: Door, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{free_ports(1)[0]}")
    assert proposals(shared.enrol(name)) is not None


def test_a_connection_comes_back_with_the_gateway(tmp_path: Path) -> None:
    home = tmp_path / "coordinator"
    with open_door(home) as door:
        identity = door.enrol("berlin")
        channel = open_channel(identity)
        stub = RegistryStub(channel)
        stub.Proposals(pb.ProposalsRequest(), timeout=10)
    with pytest.raises(grpc.RpcError):
        stub.Proposals(pb.ProposalsRequest(), timeout=2)
    with open_door(home):
        began = time.monotonic()
        stub.Proposals(pb.ProposalsRequest(), timeout=30, wait_for_ready=True)
        assert time.monotonic() - began < 30
    channel.close()


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_joins_and_says_what_comes_next(
    shared: Door, name: str, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    app = typer.Typer()
    app.command()(command)
    path = shared.invite(name)
    app([str(path), "--home", str(home)], standalone_mode=False)
    said = capsys.readouterr().out
    assert f"{name} is a site of Test federation" in said
    assert f"next: locum site start --home {home}" in said
    shared.registry.revoke(name)
    app([str(shared.invite(name)), "--home", str(home), "--replace", "--json"], standalone_mode=False)
    told = json.loads(capsys.readouterr().out)
    assert told["site"] == name
    assert told["address"] == shared.address
