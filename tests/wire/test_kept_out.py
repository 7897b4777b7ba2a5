"""Who must be kept out, over the real door of a coordinator that runs; and what a coordinator cannot do to a site.

What the service Registry keeps out is in `tests/server/test_enrolment.py`, what the SuperLink keeps out in
`test_superlink.py`.
"""

from __future__ import annotations

import base64
import json
import stat
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from flwr.common.constant import TIMESTAMP_HEADER
from flwr.proto.fleet_pb2 import ActivateNodeRequest, PullMessagesRequest
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.node_pb2 import Node
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.primitives.asymmetric import sign_message
from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE

from locum.common.fab import build_bundle
from locum.common.identity import (
    PrivateKey,
    certificate_pem,
    invitation_key,
    key_pem,
    new_key,
    parse_certificate,
    read_invitation,
    utc_now,
)
from locum.common.plan import Plan
from locum.common.proto import locum_pb2 as pb
from locum.common.proto import locum_pb2_grpc as rpc
from locum.server.authority import Authority, load_authority
from locum.server.home import Home, read_config
from locum.server.invitations import invite, make_invitation
from locum.server.registry import Registry
from locum.server.runs import Run
from locum.server.superlink import CONTROL_HEADER, Control, control_secret
from locum.site_client.identity import SiteIdentity, load_identity
from tests.peers import Peer, run_peers
from tests.plans import plan
from tests.wire.federation import Federation, Process, ended, locum, model_of, open_federation, until
from tests.wire.harm import bits, told

LARGE = {"name": "Classifier", "channels": [16, 32, 64]}
CALL = 20.0
FLEET = "/v1/fleet/"
UNAVAILABLE, DENIED = grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.PERMISSION_DENIED
INVALID, UNKNOWN_CALL = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.UNIMPLEMENTED


# --- who calls


@dataclass
class Caller:
    """Somebody with a channel to the door, and a node key that may be anybody's."""

    channel: grpc.Channel
    key: Any
    instance: str

    @property
    def public(self) -> bytes:
        form = serialization.PublicFormat.SubjectPublicKeyInfo
        return bytes(self.key.public_key().public_bytes(serialization.Encoding.PEM, form))

    def headers(self) -> dict[str, str]:
        """The proof of the node key, as an agent sends it."""
        now = datetime.now(UTC).isoformat()
        return {
            "content-type": PROTOBUF_MEDIA_TYPE,
            FLEET_HTTP_PUBLIC_KEY_HEADER: base64.b64encode(self.public).decode(),
            FLEET_HTTP_SIGNATURE_HEADER: base64.b64encode(sign_message(self.key, now.encode())).decode(),
            TIMESTAMP_HEADER: now,
        }

    def fleet(self, path: str, body: bytes = b"", headers: Mapping[str, str] | None = None) -> pb.FleetAnswer:
        call = pb.FleetCall(path=path, headers=headers or self.headers(), body=body, instance=self.instance)
        return rpc.FleetStub(self.channel).Call(call, timeout=CALL)

    def activate(self) -> pb.FleetAnswer:
        request = ActivateNodeRequest(public_key=self.public, heartbeat_interval=30)
        return self.fleet(FLEET + "activate-node", request.SerializeToString())

    def beat(self, node: int, headers: Mapping[str, str] | None = None) -> int:
        """The status of a node's heartbeat."""
        request = SendNodeHeartbeatRequest(node=Node(node_id=node), heartbeat_interval=30)
        return self.fleet(FLEET + "send-node-heartbeat", request.SerializeToString(), headers).status

    def every_call(self, run: str = "run") -> dict[str, object]:
        """What each call that is no enrolment answers: a message, or the status of its refusal."""
        blobs, key = rpc.BlobsStub(self.channel), pb.BlobKey(run=run, sha256="0" * 64, size=1)
        registry, report = rpc.RegistryStub(self.channel), pb.ReportRequest(instance=self.instance)
        return {
            "Fleet.Call": answered(self.activate),
            "Blobs.Stat": answered(lambda: blobs.Stat(key, timeout=CALL)),
            "Blobs.Put": answered(lambda: blobs.Put(iter([pb.PutChunk(key=key, data=b"x")]), timeout=CALL)),
            "Blobs.Get": answered(lambda: list(blobs.Get(pb.GetRequest(key=key), timeout=CALL))),
            "Registry.Report": answered(lambda: registry.Report(report, timeout=CALL)),
            "Registry.Greet": answered(lambda: registry.Greet(pb.GreetRequest(), timeout=CALL)),
        }


def answered(call: Callable[[], object]) -> object:
    """What a call answers, or the status of its refusal."""
    try:
        return call()
    except grpc.RpcError as error:
        return error.code()


@dataclass(frozen=True)
class Scene:
    """A coordinator and its sites: `a`, `b`, `c` take part in a run, `d` and `g` are enrolled and have no agent."""

    federation: Federation

    @contextmanager
    def caller(self, name: str, *, certificate: x509.Certificate | None = None, key: PrivateKey | None = None) -> Any:
        """A site's connection, or that of somebody who has this certificate and key."""
        identity = self.identity(name)
        presented = certificate or identity.certificate
        with self.channel(key_pem(key or identity.key), certificate_pem(presented)) as channel:
            yield Caller(channel, key or identity.key, f"agent of {name}")

    def channel(self, key: bytes | None = None, certificate: bytes | None = None) -> grpc.Channel:
        root = certificate_pem(self.identity("d").authority)
        tls = grpc.ssl_channel_credentials(root, key, certificate)
        return grpc.secure_channel(f"localhost:{self.federation.port}", tls, [("grpc.enable_http_proxy", 0)])

    def identity(self, name: str) -> SiteIdentity:
        return load_identity(self.federation.folder / name)

    def node(self, name: str) -> int:
        """The number of a site's node."""
        with closing(Registry(self.federation.home.registry)) as registry:
            row = registry.site(name)
        assert row is not None
        assert row.node_id is not None
        return row.node_id

    @property
    def authority(self) -> Authority:
        return load_authority(self.federation.home, read_config(self.federation.home))


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    with open_federation(tmp_path_factory.mktemp("kept-out")) as federation:
        for name in "abcdg":
            federation.enrol(name)
        yield Scene(federation)


# --- certificates


def test_without_a_certificate_no_call_is_answered(scene: Scene) -> None:
    with scene.channel() as channel:
        assert set(Caller(channel, new_key(), "nobody").every_call().values()) == {UNAVAILABLE}
        assert answered(lambda: rpc.RegistryStub(channel).Enrol(pb.EnrolRequest(), timeout=CALL)) == UNAVAILABLE


def test_a_foreign_or_expired_certificate_is_kept_out(scene: Scene) -> None:
    identity = scene.identity("d")
    expired = scene.authority.issue_site("d", identity.key.public_key(), now=utc_now() - timedelta(days=91))
    with closing(Registry(scene.federation.home.registry)) as registry:
        registry.renew("d", key=identity.key.public_key(), issue=lambda _: expired)
    forged = Authority(identity.key, identity.certificate, timedelta(days=9)).issue_site("d", identity.key.public_key())
    for certificate in (expired, forged):
        with scene.caller("d", certificate=certificate) as caller:
            assert set(caller.every_call().values()) == {UNAVAILABLE}


def test_a_certificate_that_the_registry_does_not_know_is_kept_out(scene: Scene) -> None:
    key = new_key()
    with scene.caller("d", certificate=scene.authority.issue_site("d", key.public_key()), key=key) as caller:
        assert set(caller.every_call().values()) == {DENIED}


def test_an_invitation_opens_nothing_but_enrolment(scene: Scene) -> None:
    federation, path = scene.federation, scene.federation.folder / "e.json"
    with closing(Registry(federation.home.registry)) as registry:
        invite(registry, make_invitation(scene.authority, read_config(federation.home), "e"), path)
    invitation = read_invitation(path)
    key, certificate = invitation_key(invitation.token_bytes), parse_certificate(invitation.certificate.encode())
    with scene.caller("d", certificate=certificate, key=key) as caller:
        assert set(caller.every_call().values()) == {DENIED}


def test_a_revoked_site_is_out_at_its_next_call_of_an_open_connection(scene: Scene) -> None:
    scene.federation.enrol("f")
    with scene.caller("f") as caller:
        assert caller.activate().status == 200
        locum("server", "revoke", "f", "--home", scene.federation.home.path)
        assert set(caller.every_call().values()) == {DENIED}


# --- the tunnel


@pytest.fixture(scope="module")
def caller(scene: Scene) -> Iterator[Caller]:
    """A site that is enrolled, whose node is up."""
    with scene.caller("d") as opened:
        assert opened.activate().status == 200
        yield opened


@pytest.fixture(scope="module")
def other(scene: Scene) -> Iterator[Caller]:
    """Another one."""
    with scene.caller("g") as opened:
        assert opened.activate().status == 200
        yield opened


def test_the_node_key_must_be_that_of_the_certificate(caller: Caller, other: Caller) -> None:
    thief = Caller(caller.channel, other.key, caller.instance)  # even with the key itself
    assert answered(thief.activate) == DENIED
    both = caller.headers() | {FLEET_HTTP_PUBLIC_KEY_HEADER.title(): other.headers()[FLEET_HTTP_PUBLIC_KEY_HEADER]}
    assert answered(lambda: caller.fleet(FLEET + "activate-node", headers=both)) == DENIED
    none = {name: value for name, value in caller.headers().items() if name != FLEET_HTTP_PUBLIC_KEY_HEADER}
    assert answered(lambda: caller.fleet(FLEET + "activate-node", headers=none)) == DENIED


def test_a_site_does_not_speak_for_another_node(scene: Scene, caller: Caller, other: Caller) -> None:
    assert (caller.beat(scene.node("d")), other.beat(scene.node("g"))) == (200, 200)
    assert (caller.beat(scene.node("g")), other.beat(scene.node("d"))) == (401, 401)


@pytest.mark.parametrize(
    "path",
    [
        *("", "/", "/v1/fleet", "/v1/fleet/", "/v1/control/start-run", "/v1/runtime/pull-task-input", "/docs"),
        *("/v1/fleet/register-node", "/v1/fleet/unregister-node", "/v1/fleet/activate-node/"),
        *("/v1/fleet/../control/start-run", "/v1/fleet/activate-node/../../control/start-run"),
        *("/v1/fleet/%2e%2e/control/start-run", "/v1/fleet/..%2fcontrol/start-run", "/v1/fleet/activate%2dnode"),
        *("/v1/fleet/activate-node?x=/v1/control/start-run", "/v1/fleet/activate-node#", "/v1//fleet/activate-node"),
        *("https://localhost/v1/fleet/activate-node", "//localhost/v1/fleet/activate-node", "v1/fleet/activate-node"),
        *("/v1/fleet/activate-node\r\nlocum-control: x", "/V1/FLEET/ACTIVATE-NODE", " /v1/fleet/activate-node"),
    ],
)
def test_the_tunnel_leads_to_the_calls_of_a_node_and_nowhere_else(caller: Caller, path: str) -> None:
    assert answered(lambda: caller.fleet(path)) == DENIED


def test_headers_that_open_other_doors_are_not_carried(scene: Scene, caller: Caller) -> None:
    # The SuperLink takes no call with the secret twice, so one that were carried would be refused there.
    secret = control_secret(scene.federation.home)
    smuggled = {CONTROL_HEADER: secret, CONTROL_HEADER.upper(): secret, "flwr-task-token": "x", "host": "elsewhere"}
    smuggled |= {"content-encoding": "gzip", "content-length": "5", "transfer-encoding": "chunked", "connection": "x"}
    assert caller.beat(scene.node("d"), caller.headers() | smuggled) == 200


@pytest.mark.parametrize("value", ["a\r\nlocum-control: x", "a\nb", "a\0b", "ü", "\u2028"])
def test_a_header_that_is_none_is_refused(caller: Caller, value: str) -> None:
    headers = caller.headers() | {"accept": value}
    assert answered(lambda: caller.fleet(FLEET + "activate-node", headers=headers)) == INVALID


def test_a_body_that_is_none_is_refused(caller: Caller) -> None:
    for path in ("pull-messages", "push-messages"):
        assert answered(lambda path=path: caller.fleet(FLEET + path, b"\xff\xff\xff")) == INVALID
    large = answered(lambda: caller.fleet(FLEET + "push-object", bytes((1 << 20) + 1)))
    assert large == grpc.StatusCode.RESOURCE_EXHAUSTED


def test_a_site_that_opens_hundreds_of_calls_keeps_no_other_waiting(
    scene: Scene, caller: Caller, other: Caller
) -> None:
    over = threading.Event()
    with ExitStack() as stack:
        pull = PullMessagesRequest(node=Node(node_id=1)).SerializeToString()
        pending = []
        for _ in range(12):  # connections; each takes 32 calls at a time
            crowd = stack.enter_context(scene.caller("d"))
            path, instance = FLEET + "pull-messages", caller.instance
            call = pb.FleetCall(path=path, headers=crowd.headers(), body=pull, instance=instance)
            pending += [rpc.FleetStub(crowd.channel).Call.future(call, timeout=60) for _ in range(16)]
            put = rpc.BlobsStub(crowd.channel).Put
            pending += [put.future(iter(lambda: over.wait() and None, None), timeout=60) for _ in range(16)]
        report = pb.ReportRequest(instance=other.instance, activity="idle")
        for _ in range(20):
            assert isinstance(rpc.RegistryStub(other.channel).Report(report, timeout=CALL), pb.ReportReply)
        assert other.beat(scene.node("g")) == 200
        over.set()
        for call in pending:
            call.cancel()


# --- hints


def test_hints_need_the_secret_and_are_not_on_the_hospitals_port(scene: Scene, caller: Caller) -> None:
    def follow(channel: grpc.Channel, *metadata: tuple[str, str]) -> object:
        stream = rpc.HintsStub(channel).Follow(iter([pb.Sent(nodes=[1])]), metadata=metadata, timeout=CALL)
        return answered(lambda: next(stream))

    secret = (scene.federation.home.superlink / "hints.secret").read_text()
    assert follow(caller.channel, ("locum-hints", secret)) == UNKNOWN_CALL
    port = read_config(scene.federation.home).hints_port
    with grpc.insecure_channel(f"127.0.0.1:{port}", [("grpc.enable_http_proxy", 0)]) as channel:
        for metadata in ((), (("locum-hints", ""),), (("locum-hints", secret[:-1]),), (("locum-hints-bin", b"x"),)):
            assert follow(channel, *metadata) == grpc.StatusCode.UNAUTHENTICATED


# --- runs


@pytest.fixture(scope="module")
def run(scene: Scene) -> Iterator[tuple[Run, Plan]]:
    """A run of `a`, `b` and `c`, in which `c` still trains; its tensors are blobs."""
    federation = scene.federation
    of = plan(name="revoked", rounds=1, network=LARGE, participation={"quorum": 2, "deadline": "600 s"})
    federation.propose(of)
    for name, behaviour in (("a", "value:0.1"), ("b", "value:0.7"), ("c", "slow:900")):
        federation.peer(name, behaviour)
    for name in "abc":
        federation.approve(name, of)
    federation.ready(of, *"abc")
    asked = federation.run(of)
    for name in "ab":
        told(asked, "update", site=name)
    until(lambda: "train" in (federation.folder / "c" / "handled").read_text(), 60, "c does not train")
    yield asked, of
    federation.sites["c"].kill()


def test_blobs_are_for_the_sites_that_have_approved_the_plan(scene: Scene, run: tuple[Run, Plan]) -> None:
    asked, _ = run
    (model,) = (scene.federation.home.spool / asked.id / "down").iterdir()
    key = pb.BlobKey(run=asked.id, sha256=model.name, size=model.stat().st_size)
    with scene.caller("d") as outsider:
        blobs = rpc.BlobsStub(outsider.channel)
        assert answered(lambda: list(blobs.Get(pb.GetRequest(key=key), timeout=CALL))) == DENIED
        assert answered(lambda: blobs.Stat(key, timeout=CALL)) == DENIED
        assert answered(lambda: blobs.Put(iter([pb.PutChunk(key=key)]), timeout=CALL)) == DENIED
    with scene.caller("b") as member:
        blobs = rpc.BlobsStub(member.channel)
        content = b"".join(chunk.data for chunk in blobs.Get(pb.GetRequest(key=key), timeout=CALL))
        assert sha256(content).hexdigest() == model.name
        for name in ("../a", f"{asked.id}/../{asked.id}", "", f"{asked.id}\0"):
            other = pb.BlobKey(run=name, sha256=model.name, size=key.size)
            assert answered(lambda other=other: blobs.Stat(other, timeout=CALL)) == INVALID


def test_a_site_that_is_revoked_in_mid_run_is_out_and_the_run_goes_on(
    scene: Scene, run: tuple[Run, Plan], tmp_path: Path
) -> None:
    asked, of = run
    locum("server", "revoke", "c", "--home", scene.federation.home.path)
    assert ended(asked) == "completed with losses"
    summary = json.loads(asked.summary.read_bytes())
    assert summary["lost"] == {"c": [1]}
    assert summary["history"][0]["excluded"] == {"c": "its certificate was revoked"}
    peers = [Peer("a", 0.1), Peer("b", 0.7)]
    assert bits(model_of(asked)) == bits(run_peers(of, peers, tmp_path).model)


# --- what a coordinator cannot do to a site

_PROJECT = """\
[project]
name = "evil"
version = "1.0.0"
license = {file = "LICENSE"}
dependencies = ["flwr>=1.41.0,<1.42"]

[tool.flwr.app]
publisher = "coordinator"
fab-format-version = 1
flwr-version-target = "1.41.0"
fab-include = ["evil.py", "LICENSE"]

[tool.flwr.app.components]
serverapp = "evil:app"
clientapp = "evil:app"

[tool.flwr.app.config]
run = ""
"""

#: A ServerApp of a coordinator that does what it likes: it gives its run another bundle, and asks a site to run it.
_CODE = """\
import json, sqlite3
from pathlib import Path

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import ServerApp

app = ServerApp()


@app.main()
def main(grid, context):
    folder = Path(context.run_config["run"])
    told = json.loads((folder / "told.json").read_text())
    bundle = folder / "bundle"
    if bundle.exists():
        with sqlite3.connect(told["database"], timeout=30) as database:
            row = (bundle.read_bytes(), grid.run.fab_hash)
            assert database.execute("UPDATE fab SET content = ? WHERE fab_hash = ?", row).rowcount == 1
    content = RecordDict({"locum": ConfigRecord({"json": b"{}"})})
    message = Message(content, told["node"], "query.describe", ttl=90.0)
    (reply,) = grid.send_and_receive([message], timeout=90)
    (folder / "answer.json").write_text(json.dumps([reply.error.code, reply.error.reason]))
"""


def _fab() -> bytes:
    """A bundle that carries code, as `flwr build` makes one."""
    files = {"pyproject.toml": _PROJECT.encode(), "LICENSE": b"none\n", "evil.py": _CODE.encode()}
    listed = "\n".join(f"{name},{sha256(text).hexdigest()},{8 * len(text)}" for name, text in files.items())
    return _zip(b"", {**files, ".info/CONTENT": listed.encode()})


def _zip(content: bytes, members: Mapping[str | zipfile.ZipInfo, bytes], kind: int = zipfile.ZIP_STORED) -> bytes:
    """A zip with more members."""
    buffer = BytesIO(content)
    with zipfile.ZipFile(buffer, "a", kind) as file:
        for name, text in members.items():
            file.writestr(name, text)
    return buffer.getvalue()


def _symlink(name: str) -> zipfile.ZipInfo:
    member = zipfile.ZipInfo(name)
    member.create_system, member.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
    return member


@pytest.fixture(scope="module")
def agent(scene: Scene) -> Path:
    """The folder of a real agent, whose home and whose folder for temporary files are beside it."""
    federation = scene.federation
    home, beside = federation.enrol("hospital"), federation.folder / "beside"
    beside.mkdir()
    command = (sys.executable, "-c", "from locum.common.cli import main; main()", "site", "start", "--home", str(home))
    environment = {"HOME": str(beside), "TMPDIR": str(beside), "FLWR_HOME": str(beside / "flwr")}
    environment["MPLCONFIGDIR"] = str(federation.folder / "fonts")  # a library's list of fonts is made when it is not
    process = Process(command, federation.folder / "hospital.log", environment)
    federation.sites["hospital"] = process.start()
    until((home / "node").exists, 60, "the agent is not connected")
    return home


@contextmanager
def hinting(home: Home, node: int) -> Iterator[None]:
    """Tells the gateway, again and again, that a node has a message."""
    over = threading.Event()

    def hints() -> Iterator[pb.Sent]:
        while not over.wait(0.2):
            yield pb.Sent(nodes=[node])

    secret = (home.superlink / "hints.secret").read_text()
    with grpc.insecure_channel(f"127.0.0.1:{read_config(home).hints_port}") as channel:
        stream = rpc.HintsStub(channel).Follow(hints(), metadata=(("locum-hints", secret),))
        yield
        over.set()
        stream.cancel()


def _files(*folders: Path) -> set[str]:
    """What lies in a site's folders but for what it writes whatever it is sent."""
    found = (path for folder in folders for path in folder.rglob("*") if not path.is_dir())
    own = {"site.log", "agent.json", "node", "agent.lock"}
    return {str(path) for path in found if path.name not in own and path.parent.name != "proposals"}


def test_a_bundle_with_code_a_link_a_way_out_or_a_bomb_is_refused_and_nothing_of_it_is_unpacked(
    scene: Scene, agent: Path, tmp_path: Path
) -> None:
    home, good = scene.federation.home, build_bundle(plan())
    bomb = _zip(b"", {"plan.yaml": bytes(200 << 20)}, zipfile.ZIP_DEFLATED)
    cases: dict[str, tuple[bytes | None, str]] = {
        "code": (None, "'evil.py' has no place in a bundle: it holds a plan and no code"),
        "link": (_zip(good, {_symlink("link"): b"/etc/passwd"}), "'link' has no place in a bundle"),
        "plan-link": (_zip(b"", {_symlink("plan.yaml"): b"/etc/passwd"}), "'plan.yaml' is a symbolic link"),
        "way-out": (_zip(good, {"../../evil.py": _CODE.encode()}), "is a path that leads out of its folder"),
        "bomb": (bomb, "'plan.yaml' would unpack to more than 1 MiB"),
    }
    before = _files(agent, agent.parent / "beside")
    node = scene.node("hospital")
    control = Control(home, read_config(home))
    try:
        for name, (bundle, _) in cases.items():
            folder = tmp_path / name
            folder.mkdir()
            (folder / "told.json").write_text(
                json.dumps({"database": str(home.superlink / "state.sqlite"), "node": node})
            )
            if bundle is not None:
                (folder / "bundle").write_bytes(bundle)
            control.start_run(_fab() + name.encode(), str(folder))
    finally:
        control.close()
    with hinting(home, node):
        for name, (_, words) in cases.items():
            answer = tmp_path / name / "answer.json"
            until(answer.exists, 120, f"{name} was not answered")
            assert json.loads(answer.read_bytes()) == [101, "PLAN_UNREADABLE"]
            assert words in (agent / "site.log").read_text()
    until(lambda: not _files(agent / "journal"), 30, "a message was left in the journal")
    assert _files(agent, agent.parent / "beside") <= before
