"""`locum site doctor` against real things: a gateway, proxies, somebody who opens TLS, and what is missing."""

from __future__ import annotations

import base64
import json
import socket
import ssl
import struct
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from dataclasses import replace as changed
from datetime import datetime, timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.x509.oid import NameOID

from locum.common.cli import main
from locum.common.identity import (
    PrivateKey,
    certificate_pem,
    key_pem,
    new_key,
    read_invitation,
    utc_now,
)
from locum.common.proto import locum_pb2 as pb
from locum.common.proto.locum_pb2_grpc import RegistryStub, add_RegistryServicer_to_server
from locum.server.authority import load_log_certificate
from locum.server.gateway.live import read_live
from locum.server.gateway.registry import Federation, RegistryService
from locum.server.log import open_log
from locum.site_client.doctor import Check, examine, gpu_check
from locum.site_client.enrolment import enrol, open_channel
from locum.site_client.identity import FOLDER, SiteIdentity, load_identity, save_identity
from locum.site_client.imaging.catalog import FILE_NAME
from locum.site_client.probe import Proxy, proxy_to
from tests.server.door import Door, free_ports, open_door

#: In the order in which the first that failed explains the rest.
NAMES = [
    *("identity", "site.yaml", "name", "connection", "TLS", "gateway"),
    *("clock", "versions", "disk", "memory", "GPU"),
]
WAY = ["name", "connection", "TLS", "gateway", "clock"]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Door]:
    with open_door(tmp_path_factory.mktemp("shared") / "coordinator") as opened:
        yield opened


_NAMES = iter(f"clinic{number}" for number in range(10**6))


@pytest.fixture
def home(shared: Door) -> Path:
    """An enrolled site that is ready to start; its worker uses the CPU."""
    return ready(shared.enrol(next(_NAMES)), shared)


def ready(identity: SiteIdentity, door: Door) -> Path:
    folder = door.site_home(identity.site)
    (folder / "store").mkdir()
    (folder / "store" / FILE_NAME).touch()
    configure(folder)
    return folder


def configure(home: Path, text: str = "resources: {device: cpu}") -> None:
    (home / "site.yaml").write_text(f"stores: [store]\n{text}\n")


def look(home: Path, invitation: Path | None = None, proxy: str | None = None) -> dict[str, Check]:
    return {check.name: check for check in examine(home, invitation, proxy)}


def move(home: Path, address: str) -> None:
    """The site knows its gateway by another address."""
    path = home / FOLDER / "federation.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | {"address": address}))


def verdicts(found: Mapping[str, Check], names: Sequence[str] = WAY) -> list[str]:
    return [found[name].verdict for name in names]


def content_of(folder: Path) -> dict[str, tuple[int, bytes]]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


# --- a site that is well ----------------------------------------------------------------------------------------------


def test_a_site_that_is_well_passes_every_check_in_the_order_of_cause_and_effect(home: Path) -> None:
    found = look(home)
    assert list(found) == NAMES
    assert {name: check for name, check in found.items() if check.verdict != "ok"} == {}
    assert not any(check.remedy for check in found.values())
    assert "good for 89 days more" in found["identity"].found
    assert "directly" in found["connection"].found
    for package in ("locum", "torch", "monai", "flwr"):
        assert version(package) in found["versions"].found


def test_nothing_is_changed_and_an_agent_that_runs_keeps_its_lease(shared: Door, home: Path) -> None:
    identity = load_identity(home)
    with open_channel(identity) as channel:
        stub = RegistryStub(channel)
        stub.Report(pb.ReportRequest(instance="agent:1", activity="training", clock=1.0), timeout=10)
        before, state, row = content_of(home), shared.registry.state(), shared.registry.site(identity.site)
        assert look(home)["gateway"].verdict == "ok"
        stub.Report(pb.ReportRequest(instance="agent:1", activity="training", clock=1.0), timeout=10)
    assert content_of(home) == before
    assert (shared.registry.state(), shared.registry.site(identity.site)) == (state, row)
    shared.live.flush(now=True)
    assert read_live(shared.home.live)[identity.site].instance == "agent:1"


def test_no_lease_is_taken_from_an_agent_that_starts_just_after(home: Path) -> None:
    look(home)
    with open_channel(load_identity(home)) as channel:
        assert RegistryStub(channel).Report(pb.ReportRequest(instance="agent:1", clock=1.0), timeout=10)


# --- before it is enrolled --------------------------------------------------------------------------------------------


def test_an_invitation_is_looked_at_and_stays_good(shared: Door, tmp_path: Path) -> None:
    path, home = shared.invite(next(_NAMES)), tmp_path / "site"
    found = look(home, path)
    assert not home.exists()
    assert verdicts(found) == ["ok", "ok", "ok", "skipped", "skipped"]
    assert (found["identity"].verdict, found["site.yaml"].verdict) == ("ok", "skipped")
    assert "the invitation was not used" in found["gateway"].found
    assert enrol(path, home).site == read_invitation(path).site


def test_an_invitation_that_others_can_read_is_told(shared: Door, tmp_path: Path) -> None:
    path = shared.invite(next(_NAMES))
    path.chmod(0o644)
    check = next(examine(tmp_path, path))
    assert check.verdict == "warning"
    assert "chmod 600" in check.remedy


def test_an_invitation_that_cannot_be_used_is_told(shared: Door, tmp_path: Path) -> None:
    path = tmp_path / "invitation.json"
    path.write_text("{}")
    found = look(tmp_path, path)
    assert found["identity"].verdict == "failed"
    assert verdicts(found) == ["skipped"] * 5


def test_without_a_site_and_an_invitation_the_machine_alone_is_looked_at(tmp_path: Path) -> None:
    found = look(tmp_path / "none")
    assert "no invitation was given" in found["identity"].found
    assert "locum site doctor INVITE" in found["identity"].remedy
    assert verdicts(found, NAMES[:7]) == ["skipped"] * 7
    assert verdicts(found, ["disk", "memory", "GPU"]) == ["ok"] * 3
    assert not (tmp_path / "none").exists()


# --- identity ---------------------------------------------------------------------------------------------------------


def test_a_key_that_others_can_read_is_the_first_thing_told(home: Path) -> None:
    (home / FOLDER / "site.key").chmod(0o644)
    found = look(home)
    assert "can be read by others" in found["identity"].found
    assert "chmod 600" in found["identity"].remedy
    assert {found[name] for name in WAY} == {
        Check(name, "skipped", "not looked at: see identity", found["identity"].remedy) for name in WAY
    }


def test_an_identity_with_a_hole_is_named(home: Path) -> None:
    (home / FOLDER / "authority.pem").unlink()
    check = next(examine(home))
    assert check.verdict == "failed"
    assert "authority.pem" in check.found


def certified(door: Door, home: Path, *, days_ago: int) -> None:
    """The site has a certificate that was issued so long ago."""
    identity = load_identity(home)
    key, past = identity.key.public_key(), utc_now() - timedelta(days=days_ago)
    issued = door.authority.issue_site(identity.site, key, now=past)
    certificate = door.registry.renew(identity.site, key=key, issue=lambda _: issued)
    save_identity(home / FOLDER, changed(identity, certificate=certificate))


def test_a_certificate_that_expired_is_told_and_so_is_that_the_gateway_minds(shared: Door, home: Path) -> None:
    certified(shared, home, days_ago=91)
    found = look(home)
    assert "the certificate expired at" in found["identity"].found
    assert "this machine's clock says" in found["identity"].found
    assert "--replace" in found["identity"].remedy
    assert verdicts(found) == ["ok", "ok", "failed", "skipped", "skipped"]
    assert "the gateway does not take the certificate from here" in found["TLS"].found


def test_a_certificate_that_was_not_renewed_in_time_is_told_before_it_expires(shared: Door, home: Path) -> None:
    certified(shared, home, days_ago=70)
    found = look(home)
    assert found["identity"].verdict == "warning"
    assert "good for 19 days more" in found["identity"].found
    assert found["gateway"].verdict == "ok"


# --- site.yaml --------------------------------------------------------------------------------------------------------


def test_what_is_wrong_with_site_yaml_is_told_and_the_way_is_looked_at_all_the_same(home: Path) -> None:
    def told() -> Check:
        found = {check.name: check for check, _ in zip(examine(home), NAMES[:6], strict=False)}
        assert found["gateway"].verdict == "ok"
        return found["site.yaml"]

    (home / "store" / FILE_NAME).unlink()
    assert (told().verdict, "nothing was ingested" in told().found) == ("warning", True)
    (home / "store").rmdir()
    assert (told().verdict, "there is no store" in told().found) == ("failed", True)
    configure(home, "polcy: {}")
    assert "line 2: there is no key 'polcy'" in told().found
    (home / "site.yaml").unlink()
    assert (told().verdict, "there is no" in told().found) == ("failed", True)


# --- name and connection ----------------------------------------------------------------------------------------------


def test_a_name_that_does_not_resolve_is_told_and_nothing_after_it_is_tried(home: Path) -> None:
    move(home, "no-such-host.invalid:8443")
    found = look(home)
    assert verdicts(found) == ["failed", *["skipped"] * 4]
    assert "the name no-such-host.invalid does not resolve" in found["name"].found


def test_a_name_is_told_with_its_addresses(shared: Door, home: Path) -> None:
    move(home, shared.address.replace("127.0.0.1", "localhost"))
    assert "127.0.0.1" in look(home)["name"].found


def test_when_nobody_listens_the_connection_is_what_failed(home: Path) -> None:
    move(home, f"127.0.0.1:{free_ports(1)[0]}")
    found = look(home)
    assert verdicts(found) == ["ok", "failed", "skipped", "skipped", "skipped"]
    assert "Connection refused" in found["connection"].found
    assert found["TLS"].remedy == found["connection"].remedy


# --- proxies ----------------------------------------------------------------------------------------------------------


@dataclass
class Middle:
    """Something on the way: an HTTP proxy, or somebody who opens TLS, or both.

    Attributes:
        answer: what CONNECT is answered with; nothing is read before TLS if it is empty.
        tls: with which it opens TLS itself; without it, the connection goes on to where CONNECT asks.
        heads: what it was asked.
    """

    answer: bytes = b"HTTP/1.1 200 Connection established\r\n\r\n"
    tls: ssl.SSLContext | None = None
    heads: list[str] = field(default_factory=list)

    def serve(self, near: socket.socket) -> None:
        with near, suppress(OSError):
            near.settimeout(10)
            if self.answer:
                head = b""
                while not head.endswith(b"\r\n\r\n"):
                    head += near.recv(1)
                self.heads.append(head.decode())
                near.sendall(self.answer)
            if self.tls is not None:
                with self.tls.wrap_socket(near, server_side=True) as opened:
                    opened.sendall(b"\0")
                    opened.recv(1)
            elif b" 200 " in self.answer:
                self._carry(near)

    def _carry(self, near: socket.socket) -> None:
        host, _, port = self.heads[-1].split()[1].rpartition(":")
        with socket.create_connection((host, int(port)), 10) as far:
            thread = threading.Thread(target=_pump, args=(far, near), daemon=True)
            thread.start()
            _pump(near, far)
            thread.join(10)


def _pump(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while content := source.recv(65536):
            target.sendall(content)
    with suppress(OSError):
        target.shutdown(socket.SHUT_RDWR)


@contextmanager
def listening(middle: Middle) -> Iterator[str]:
    """Yields host:port, on which `middle` serves."""

    def accept() -> None:
        with suppress(OSError):
            while True:
                near, _ = listener.accept()
                threading.Thread(target=middle.serve, args=(near,), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=accept, daemon=True).start()
        try:
            yield f"127.0.0.1:{listener.getsockname()[1]}"
        finally:
            with suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)


def test_the_proxy_of_site_yaml_carries_every_step(shared: Door, home: Path) -> None:
    middle = Middle()
    with listening(middle) as address:
        configure(home, f"proxy: http://agent:secret@{address}\nresources: {{device: cpu}}")
        found = look(home)
    assert verdicts(found) == ["ok"] * 5
    assert f"through the proxy {address}" in found["connection"].found
    assert "the proxy," in found["name"].found
    right = base64.b64encode(b"agent:secret").decode()
    for head in middle.heads:
        assert head.startswith(f"CONNECT {shared.address} HTTP/1.1\r\n")
        assert f"proxy-authorization: basic {right}".lower() in head.lower()
    assert len(middle.heads) == 3


def test_a_proxy_can_be_tried_before_the_site_is_enrolled(shared: Door, tmp_path: Path) -> None:
    middle = Middle()
    with listening(middle) as address:
        configure(tmp_path)
        (tmp_path / "store").mkdir()
        found = look(tmp_path, shared.invite(next(_NAMES)), f"http://{address}")
    assert verdicts(found)[:3] == ["ok"] * 3
    assert len(middle.heads) == 2


ANSWERS = [
    (b"HTTP/1.1 407 No\r\nProxy-Authenticate: Basic realm=x\r\n\r\n", "407 Proxy Authentication Required", "NAME:PASS"),
    (
        b"HTTP/1.1 407 No\r\nproxy-authenticate: Negotiate\r\nProxy-Authenticate: NTLM\r\n\r\n",
        "Negotiate or NTLM",
        "Basic",
    ),
    (b"HTTP/1.1 403 Forbidden\r\n\r\n", "answers 403 Forbidden to CONNECT", "allow CONNECT"),
    (b"HTTP/1.0 502 \r\n\r\n", "502 Bad Gateway", "cannot reach the coordinator"),
    (b"HTTP/1.1 799 \x1b[31m\r\n\r\n", "799 (no status", "allow CONNECT"),
    (b"SSH-2.0-OpenSSH\r\n\r\n", "does not answer in HTTP", "must be an HTTP proxy"),
]


@pytest.mark.parametrize(("answer", "found", "remedy"), ANSWERS)
def test_what_a_proxy_answers_is_told_in_words(home: Path, answer: bytes, found: str, remedy: str) -> None:
    with listening(Middle(answer)) as address:
        configure(home, f"proxy: http://{address}\nresources: {{device: cpu}}")
        told = look(home)
    assert verdicts(told) == ["ok", "failed", "skipped", "skipped", "skipped"]
    assert found in told["connection"].found
    assert remedy in told["connection"].remedy


def test_a_name_and_password_that_a_proxy_does_not_take_are_told_of_but_not_told(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with listening(Middle(ANSWERS[0][0])) as address:
        configure(home, f"proxy: http://agent:geheim@{address}\nresources: {{device: cpu}}")
        assert main(["site", "doctor", "--home", str(home)]) == 1
    said = "".join(capsys.readouterr())
    assert "it does not take this name and password" in said
    assert "geheim" not in said
    assert base64.b64encode(b"agent:geheim").decode() not in said


def test_a_proxy_that_is_away_is_told(home: Path) -> None:
    port = free_ports(1)[0]
    configure(home, f"proxy: http://127.0.0.1:{port}")
    check = next(check for check in examine(home) if check.name == "connection")
    assert f"127.0.0.1:{port} cannot be connected to" in check.found
    assert "the proxy's address" in check.remedy


@pytest.mark.parametrize("wrong", ["proxy:3128", "https://proxy:3128", "http://proxy:port", "http://[::1"])
def test_a_proxy_that_is_no_http_address_is_told_and_not_passed_over(home: Path, wrong: str) -> None:
    found = look(home, proxy=wrong)
    assert verdicts(found) == ["failed", *["skipped"] * 4]
    assert "http://host:port" in found["name"].remedy


FAR = "gateway.invalid:8443"
#: Environments, with PROXY for a proxy's host:port, and whether a connection to `FAR` goes through that proxy.
ENVIRONMENTS: list[tuple[dict[str, str], str | None, str]] = [
    ({}, None, ""),
    ({"https_proxy": "http://PROXY"}, None, "taken"),
    ({"http_proxy": "http://PROXY/"}, None, "taken"),
    ({"HTTPS_PROXY": "http://PROXY"}, None, ""),
    ({"https_proxy": "", "http_proxy": "http://PROXY"}, None, ""),
    ({"https_proxy": "https://PROXY"}, None, ""),
    ({"https_proxy": "PROXY"}, None, ""),
    ({"grpc_proxy": "http://a%40b:c%3Ad@PROXY", "https_proxy": "http://127.0.0.1:9"}, None, "a@b:c:d"),
    ({"https_proxy": "http://PROXY", "no_proxy": "example.org, .INVALID"}, None, ""),
    ({"https_proxy": "http://PROXY", "no_proxy": "gateway"}, None, "taken"),
    ({"https_proxy": "http://PROXY", "no_proxy": "*"}, None, "taken"),
    ({"https_proxy": "http://PROXY", "no_proxy": "invalid", "no_grpc_proxy": ""}, None, "taken"),
    ({"https_proxy": "http://127.0.0.1:9"}, "http://PROXY", "taken"),
    ({"no_proxy": "gateway.invalid"}, "http://PROXY", ""),
]


@pytest.mark.parametrize(("environment", "told", "taken"), ENVIRONMENTS)
def test_the_proxy_that_counts_is_the_one_that_grpc_takes(
    home: Path, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], told: str | None, taken: str
) -> None:
    for name in ("grpc_proxy", "https_proxy", "http_proxy", "no_grpc_proxy", "no_proxy", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    middle = Middle(b"HTTP/1.1 403 Forbidden\r\n\r\n")
    move(home, FAR)
    with listening(middle) as address, ExitStack() as stack:
        for name, value in environment.items():
            monkeypatch.setenv(name, value.replace("PROXY", address))
        told = told and told.replace("PROXY", address)
        ours = proxy_to(FAR, told)
        channel = stack.enter_context(open_channel(load_identity(home), told))
        with pytest.raises(grpc.RpcError):
            RegistryStub(channel).Greet(pb.GreetRequest(), timeout=5)
        theirs = middle.heads[0] if middle.heads else ""
    host, _, port = address.rpartition(":")
    expected = Proxy(host, int(port), taken.replace("taken", "")) if taken else None
    assert ours == expected
    assert (f"CONNECT {FAR} HTTP/1." in theirs) == (expected is not None)
    if expected is not None and expected.credentials:
        assert base64.b64encode(expected.credentials.encode()).decode() in theirs


def test_networks_are_exceptions_and_what_is_on_this_machine_is_always_one() -> None:
    environment = {"https_proxy": "http://proxy:3128", "no_proxy": "10.0.0.0/8,fd00::/8"}
    assert proxy_to("10.1.2.3:8443", None, environment) is None
    assert proxy_to("[fd00::7]:8443", None, environment) is None
    assert proxy_to("192.0.2.7:8443", None, environment) == Proxy("proxy", 3128)
    assert proxy_to("127.0.0.1:8443", None, environment) is None
    assert proxy_to("localhost:8443", None, environment) is None
    assert proxy_to("localhost:8443", "http://proxy:3128", environment) == Proxy("proxy", 3128)


# --- TLS --------------------------------------------------------------------------------------------------------------


def serving(
    folder: Path, key: PrivateKey, certificate: x509.Certificate, protocols: Sequence[str] = ("h2",)
) -> ssl.SSLContext:
    """TLS with this key and certificate, for any client."""
    path = folder / f"served-{certificate.serial_number}.pem"
    path.write_bytes(key_pem(key) + certificate_pem(certificate))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(path)
    context.set_alpn_protocols(list(protocols))
    return context


def minted(issuer: str, host: str) -> tuple[PrivateKey, x509.Certificate]:
    """A certificate for a host by somebody who issues them on the way, as an inspecting firewall does."""
    authority_key, key, now = new_key(), new_key(), utc_now()
    name = x509.Name(
        [x509.NameAttribute(NameOID.COMMON_NAME, issuer), x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Hospital IT")]
    )
    builder = x509.CertificateBuilder().issuer_name(name).public_key(key.public_key()).serial_number(7)
    builder = builder.subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, host)]))
    builder = builder.not_valid_before(now - timedelta(days=1)).not_valid_after(now + timedelta(days=1))
    return key, builder.sign(authority_key, hashes.SHA256())


def test_a_proxy_that_opens_tls_is_named(shared: Door, home: Path) -> None:
    tls = serving(home, *minted("Inspector\x1b[2J 3000", "127.0.0.1"))
    with listening(Middle(tls=tls)) as address:
        configure(home, f"proxy: http://{address}\nresources: {{device: cpu}}")
        found = look(home)
    assert verdicts(found) == ["ok", "ok", "failed", "skipped", "skipped"]
    assert f"who answers at {shared.address} is not this federation's gateway" in found["TLS"].found
    assert "O=Hospital IT,CN=Inspector\N{REPLACEMENT CHARACTER}[2J 3000" in found["TLS"].found
    assert "untouched" in found["TLS"].remedy


def test_a_firewall_that_opens_tls_without_being_a_proxy_is_named(home: Path) -> None:
    with listening(Middle(b"", serving(home, *minted("Inspector", "127.0.0.1"), ["http/1.1"]))) as address:
        move(home, address)
        assert "CN=Inspector" in look(home)["TLS"].found


def test_the_gateway_of_another_federation_is_named(home: Path, tmp_path: Path) -> None:
    with open_door(tmp_path / "other", name="Another federation") as other:
        move(home, other.address)
        assert "O=Another federation" in look(home)["TLS"].found


def answering(door: Door, home: Path, key: PrivateKey, certificate: x509.Certificate, *protocols: str) -> Check:
    """What is said of TLS when this certificate is shown."""
    with listening(Middle(b"", serving(home, key, certificate, protocols or ("h2",)))) as address:
        move(home, address)
        return look(home)["TLS"]


def issued(door: Door, host: str, *, now: datetime | None = None) -> tuple[PrivateKey, x509.Certificate]:
    key = new_key()
    return key, door.authority.issue_server(host, key.public_key(), now=now)


def test_a_gateways_certificate_for_another_name_is_told_with_both(shared: Door, home: Path) -> None:
    move(home, shared.address.replace("127.0.0.1", "localhost"))
    found = look(home)
    assert verdicts(found)[:3] == ["ok", "ok", "failed"]
    assert "is for 127.0.0.1, and not for localhost" in found["TLS"].found
    assert "server.yaml" in found["TLS"].remedy


def test_a_gateways_certificate_that_expired_is_told_with_the_clock(shared: Door, home: Path) -> None:
    check = answering(shared, home, *issued(shared, "127.0.0.1", now=utc_now() - timedelta(days=400)))
    assert check.verdict == "failed"
    assert "the certificate expired at" in check.found
    assert "clock" in check.remedy


def test_a_site_that_poses_as_the_gateway_is_told(shared: Door, home: Path) -> None:
    other = shared.enrol(next(_NAMES))
    check = answering(shared, home, other.key, other.certificate)
    assert "has the certificate of a site" in check.found


def test_a_gateway_without_http2_is_told(shared: Door, home: Path) -> None:
    assert "HTTP/2" in answering(shared, home, *issued(shared, "127.0.0.1"), "http/1.1").found


class Plain(Middle):
    """Speaks HTTP where TLS is expected."""

    def serve(self, near: socket.socket) -> None:
        with near:
            near.sendall(self.answer)
            near.recv(4096)


class Hasty(Middle):
    """Hangs up when it sees TLS."""

    def serve(self, near: socket.socket) -> None:
        near.recv(1)
        near.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        near.close()


def test_who_speaks_no_tls_or_hangs_up_on_it_is_told(home: Path) -> None:
    for middle, told in ((Plain(), "no TLS came about: wrong version number"), (Hasty(), "within the TLS handshake")):
        with listening(middle) as address:
            move(home, address)
            found = look(home)
        assert verdicts(found)[:3] == ["ok", "ok", "failed"]
        assert told in found["TLS"].found


# --- the gateway ------------------------------------------------------------------------------------------------------


def test_a_site_that_was_revoked_is_told_so(shared: Door, home: Path) -> None:
    shared.registry.revoke(load_identity(home).site)
    found = look(home)
    assert verdicts(found) == ["ok", "ok", "ok", "failed", "skipped"]
    assert "this site's certificate was revoked" in found["gateway"].found
    assert found["versions"].verdict == "skipped"


def test_a_site_that_the_registry_does_not_know_is_told_so(shared: Door, home: Path) -> None:
    identity = load_identity(home)
    certificate = shared.authority.issue_site(identity.site, identity.key.public_key())
    save_identity(home / FOLDER, changed(identity, certificate=certificate))
    assert "not in the registry" in look(home)["gateway"].found


class Elsewhere(RegistryService):
    """A gateway of another version whose clock is an hour ahead."""

    def Greet(self, request: pb.GreetRequest, context: grpc.ServicerContext) -> pb.Greeting:  # noqa: N802
        super().Greet(request, context)
        return pb.Greeting(clock=time.time() + 3600, version="0.0.9\n")


def elsewhere(server: grpc.Server, door: Door) -> None:
    log = open_log(door.home)
    federation = Federation(door.registry, door.authority, load_log_certificate(door.home), door.live, log)
    add_RegistryServicer_to_server(Elsewhere(federation), server)


def test_a_clock_that_is_off_is_a_warning_and_another_version_a_failure(tmp_path: Path) -> None:
    with open_door(tmp_path / "coordinator", (elsewhere,)) as door:
        found = look(ready(door.enrol("north"), door))
    assert found["gateway"].verdict == "ok"
    assert (found["clock"].verdict, found["versions"].verdict) == ("warning", "failed")
    assert found["clock"].found == "it is 3600 s behind the coordinator's"
    assert (
        f"Locum {version('locum')} here, 0.0.9\N{REPLACEMENT CHARACTER} at the coordinator" in found["versions"].found
    )


# --- the machine ------------------------------------------------------------------------------------------------------


def test_memory_that_site_yaml_promises_and_the_machine_has_not_is_told(home: Path) -> None:
    configure(home, "resources: {device: cpu, memory_gib: 1000000}")
    check = look(home)["memory"]
    assert (check.verdict, "1e+06 GiB are wanted" in check.found) == ("warning", True)


def test_a_disk_that_is_nearly_full_is_told() -> None:
    check = next(check for check in examine(Path("/proc")) if check.name == "disk")  # which has no room at all
    assert (check.verdict, check.found) == ("warning", "0.0 GiB are free in /proc")
    assert "GiB" in check.remedy


def test_a_gpu_that_is_asked_for_and_missing_is_a_failure(home: Path) -> None:
    configure(home, "resources: {device: 'cuda:63'}")
    check = look(home)["GPU"]
    assert check.verdict == "failed"
    assert "asks for cuda:63, and torch finds" in check.found


def test_what_the_device_comes_to_is_told() -> None:
    gpus = [("NVIDIA A", 80 << 30), ("NVIDIA B", 24 << 30)]
    assert gpu_check("auto", gpus) == Check("GPU", "ok", "auto is NVIDIA A with 80 GiB")
    assert gpu_check("cuda", gpus).found == "cuda is NVIDIA A with 80 GiB"
    assert gpu_check("cuda:1", gpus).found == "cuda:1 is NVIDIA B with 24 GiB"
    assert gpu_check("cuda:2", gpus).verdict == "failed"
    assert gpu_check("cuda", []).verdict == "failed"
    assert gpu_check("auto", []).verdict == "ok"


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_tells_every_check_and_ends_with_0(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert not main(["site", "doctor", "--home", str(home)])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [["ok", name] for name in NAMES]


def test_a_failure_ends_the_command_with_1_and_says_where_to_begin(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    move(home, f"127.0.0.1:{free_ports(1)[0]}")
    assert main(["site", "doctor", "--home", str(home)]) == 1
    said = capsys.readouterr().out
    assert said.count("next:") == 1  # what was not looked at has the same remedy
    assert said.splitlines()[-1].startswith("begin with connection")


def test_scripts_read_the_same_as_json(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def told() -> tuple[int, dict[str, Any]]:
        code = main(["site", "doctor", "--home", str(home), "--json"])
        return code or 0, json.loads(capsys.readouterr().out)

    code, well = told()
    assert (code, well["ok"], list(well)) == (0, True, ["ok", "checks"])
    assert [check["name"] for check in well["checks"]] == NAMES
    assert all(list(check) == ["name", "verdict", "found", "remedy"] for check in well["checks"])
    (home / "site.yaml").unlink()
    code, ill = told()
    assert (code, ill["ok"]) == (1, False)
    assert ill["checks"][1]["verdict"] == "failed"


def test_neither_a_token_nor_a_key_is_told(shared: Door, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = shared.invite(next(_NAMES))
    main(["site", "doctor", str(path), "--home", str(home)])
    main(["site", "doctor", str(path), "--home", str(home), "--json"])
    main(["site", "doctor", "--home", str(home), "--json"])
    said = "".join(capsys.readouterr())
    assert read_invitation(path).token.get_secret_value() not in said
    assert "PRIVATE" not in said
    assert key_pem(load_identity(home).key).decode().splitlines()[1] not in said
