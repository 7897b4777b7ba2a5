"""Noise at every edge: the gateway's three services over mutual TLS, and what reads files and bundles.

Short form: 2,000 cases. Long form: 110,000. Whatever comes is answered in words or is right; nobody dies of it,
everybody answers afterwards, and memory does not grow. The cases follow from the seed.
"""

from __future__ import annotations

import base64
import gc
import json
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from cryptography.hazmat.primitives import serialization
from flwr.common.constant import TIMESTAMP_HEADER
from flwr.proto import fab_pb2, fleet_pb2, heartbeat_pb2, message_pb2, run_pb2
from flwr.proto.node_pb2 import Node
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.primitives.asymmetric import sign_message
from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from locum.common.envelope import Approval, EnvelopeError, Proposal, open_proposal, seal_approval, seal_proposal
from locum.common.errors import PlanError
from locum.common.fab import build_bundle, plan_of_bundle
from locum.common.identity import (
    certificate_pem,
    certificate_request,
    invitation_key,
    key_pem,
    read_invitation,
)
from locum.common.messages import MessageError, tensors_from
from locum.common.plan import Plan, parse_plan
from locum.common.proto import locum_pb2 as pb
from locum.common.proto import locum_pb2_grpc as rpc
from locum.common.tensor_files import TensorFileError, map_tensors, write_tensors
from locum.server.authority import load_authority, load_log_key
from locum.server.home import read_config
from locum.server.invitations import invite, make_invitation
from locum.server.registry import Registry
from locum.site_client.identity import load_identity
from tests.plans import initial, plan
from tests.wire.federation import Federation, open_federation

SEED = 20261
CALL = 30.0
#: Calls at once; what the gateway keeps a thread is there after the first of them.
AT_ONCE = 8
#: A leak of a quarter of a kilobyte a case would be more in the long form.
MOST_GROWTH = 24 << 20
#: What gRPC answers when a service raised what nobody expected.
TRACEBACKS = {grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL}
FORMS = [1, pytest.param(55, marks=pytest.mark.slow)]

_FLEET = {
    "activate-node": fleet_pb2.ActivateNodeRequest,
    "deactivate-node": fleet_pb2.DeactivateNodeRequest,
    "send-node-heartbeat": heartbeat_pb2.SendNodeHeartbeatRequest,
    "push-messages": fleet_pb2.PushMessagesRequest,
    "push-object": message_pb2.PushObjectRequest,
    "pull-object": message_pb2.PullObjectRequest,
    "confirm-message-received": message_pb2.ConfirmMessageReceivedRequest,
    "get-run": run_pb2.GetRunRequest,
    "get-fab": fab_pb2.GetFabRequest,
}
_LISTS = ("messages_list", "message_object_trees")


# --- noise


class Noise:
    """Bytes, words and messages that are nearly right, from a seed."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.words = ["", "a", "..", "x" * 300, "ü\u2028", "\0", "0" * 64, "f" * 64, "../../etc/passwd", "%2e%2e/"]
        self.numbers = [0, 1, 2, 7, 1 << 16, (1 << 31) - 1]

    def damaged(self, content: bytes) -> bytes:
        """Bytes with a few changed, cut out or put in, or others altogether."""
        if self.random.random() < 0.1:
            return self.random.randbytes(self.random.randrange(300))
        found = bytearray(content)
        for _ in range(self.random.randint(1, 4)):
            place = self.random.randrange(len(found) + 1)
            cut = self.random.choice((0, 0, 1, 1, 2, 40))
            found[place : place + cut] = self.random.randbytes(self.random.choice((0, 1, 1, 2, 9)))
        return bytes(found)

    def sent(self, message: Message) -> bytes:
        """A message as bytes, now and then damaged ones."""
        content = message.SerializeToString()
        return self.damaged(content) if self.random.random() < 0.3 else content

    def filled(self, message: Message, depth: int = 0) -> Message:
        """The message with any fields set to anything that fits."""
        for found in message.DESCRIPTOR.fields:
            if self.random.random() < 0.25:
                continue
            if found.message_type is not None and found.message_type.GetOptions().map_entry:
                continue
            self._fill(message, found, depth)
        return message

    def _fill(self, message: Message, found: FieldDescriptor, depth: int) -> None:
        times = self.random.choice((0, 1, 1, 2)) if found.is_repeated else 1
        for _ in range(times):
            if found.message_type is not None:
                if depth > 4:
                    return
                part = getattr(message, found.name)
                self.filled(part.add() if found.is_repeated else part, depth + 1)
            elif found.is_repeated:
                getattr(message, found.name).append(self.value(found))
            else:
                setattr(message, found.name, self.value(found))

    def value(self, found: FieldDescriptor) -> Any:
        """Anything that fits a field."""
        kind = found.cpp_type
        if kind == FieldDescriptor.CPPTYPE_STRING:
            text = self.random.choice(self.words)
            return text.encode() if found.type == FieldDescriptor.TYPE_BYTES else text.encode().decode()
        if kind == FieldDescriptor.CPPTYPE_BOOL:
            return self.random.random() < 0.5
        if kind in {FieldDescriptor.CPPTYPE_DOUBLE, FieldDescriptor.CPPTYPE_FLOAT}:
            return self.random.choice((0.0, -1.0, 1e300, float("nan"), float("inf"), time.time()))
        large = kind in {FieldDescriptor.CPPTYPE_UINT64, FieldDescriptor.CPPTYPE_INT64}
        if kind == FieldDescriptor.CPPTYPE_ENUM:
            return self.random.choice(found.enum_type.values).number
        return self.random.choice([*self.numbers, (1 << 63) - 1] if large else self.numbers)


def answered(call: Callable[[], object]) -> grpc.StatusCode:
    """The status of a call's answer."""
    try:
        call()
    except grpc.RpcError as error:
        return error.code()
    return grpc.StatusCode.OK


def _tell(*lines: str) -> None:
    """What a run of a test has found; `pytest -rP` shows it."""
    sys.stdout.write("\n  ".join(lines) + "\n")


def resident(number: int | str) -> int:
    """Bytes of memory that a process has."""
    pages = int(Path(f"/proc/{number}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


# --- the gateway


@dataclass
class Door:
    """The gateway of a coordinator that runs, as a site and as somebody who is invited see it."""

    federation: Federation
    plan: Plan
    site: grpc.Channel
    invited: grpc.Channel
    noise: Noise = field(default_factory=lambda: Noise(SEED))
    seen: Counter[tuple[str, grpc.StatusCode]] = field(default_factory=Counter)
    statuses: Counter[int] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.identity = load_identity(self.federation.folder / "fuzz")
        form = serialization.PublicFormat.SubjectPublicKeyInfo
        self.public = self.identity.key.public_key().public_bytes(serialization.Encoding.PEM, form)
        self.csr = certificate_request(self.identity.subject, self.identity.key)
        self._model = b"model" * 100
        self.blob = sha256(self._model).hexdigest()
        folder = self.federation.home.spool / "fuzz-run"
        (folder / "down").mkdir(parents=True)
        (folder / "down" / self.blob).write_bytes(self._model)
        (folder / "limit.json").write_text(json.dumps({"upload_bytes": 4096, "plan": self.plan.digest}))
        self.noise.words += ["fuzz-run", self.blob, "fuzz", "idle", "approve", self.plan.digest, self.csr.decode()]
        asked = fleet_pb2.ActivateNodeRequest(public_key=self.public, heartbeat_interval=30)
        call = pb.FleetCall.FromString(self.call("activate-node", asked.SerializeToString()))
        answer = rpc.FleetStub(self.site).Call(call, timeout=CALL)
        self.node = fleet_pb2.ActivateNodeResponse.FromString(answer.body).node_id
        self.noise.numbers += [len(self._model), 4096, 4097]
        approval = Approval(site="fuzz", digest=self.plan.digest, at=1.0, decision="approve", steward="A")
        self.envelope = seal_approval(approval, self.identity.key)

    def answers(self) -> bool:
        """Whether every service answers."""
        report = rpc.RegistryStub(self.site).Report(pb.ReportRequest(instance="fuzz", activity="idle"), timeout=CALL)
        key = pb.BlobKey(run="fuzz-run", sha256=self.blob, size=len(self._model))
        model = rpc.BlobsStub(self.site).Get(pb.GetRequest(key=key), timeout=CALL)
        beat = heartbeat_pb2.SendNodeHeartbeatRequest(node=Node(node_id=self.node), heartbeat_interval=30)
        call = self.call("send-node-heartbeat", beat.SerializeToString())
        told = rpc.FleetStub(self.site).Call(pb.FleetCall.FromString(call), timeout=CALL)
        return report.clock > 0 and b"".join(part.data for part in model) == self._model and told.status == 200

    # --- cases

    def call(self, name: str, body: bytes) -> bytes:
        """A call of the tunnel, with the site's own proof."""
        now = datetime.now(UTC).isoformat()
        headers = {
            "content-type": PROTOBUF_MEDIA_TYPE,
            FLEET_HTTP_PUBLIC_KEY_HEADER: base64.b64encode(self.public).decode(),
            FLEET_HTTP_SIGNATURE_HEADER: base64.b64encode(sign_message(self.identity.key, now.encode())).decode(),
            TIMESTAMP_HEADER: now,
        }
        return pb.FleetCall(path=f"/v1/fleet/{name}", headers=headers, body=body, instance="fuzz").SerializeToString()

    def fleet(self) -> tuple[str, Callable[[], object]]:
        noise = self.noise
        name = noise.random.choice([*_FLEET, "register-node", "../control/start-run", ""])
        asked = noise.filled(_FLEET.get(name, fleet_pb2.PushMessagesRequest)())
        if noise.random.random() < 0.7:
            self._own(asked)
        body = noise.sent(asked)
        call = pb.FleetCall.FromString(self.call(name, body))
        if noise.random.random() < 0.3:
            for word in noise.random.sample(noise.words, 2):
                call.headers[word] = noise.random.choice(noise.words)
        content = noise.damaged(call.SerializeToString()) if noise.random.random() < 0.3 else call.SerializeToString()
        send = self.site.unary_unary("/locum.v1.Fleet/Call", None, pb.FleetAnswer.FromString)

        def sent() -> None:
            self.statuses[send(content, timeout=CALL).status] += 1

        return "Fleet.Call", sent

    def _own(self, asked: Any) -> None:
        """Lets a call be of the site's own node."""
        if "node" in asked.DESCRIPTOR.fields_by_name:
            asked.node.node_id = self.node
        for message, tree in zip(*(getattr(asked, name, ()) for name in _LISTS), strict=False):
            digest = sha256(self.noise.random.randbytes(4)).hexdigest()
            message.metadata.src_node_id, message.metadata.message_id, tree.object_id = self.node, digest, digest
            message.metadata.reply_to_message_id = digest

    def registry(self) -> tuple[str, Callable[[], object]]:
        noise = self.noise
        kinds: dict[str, type[Message]] = {
            "Enrol": pb.EnrolRequest,
            "Renew": pb.RenewRequest,
            "Report": pb.ReportRequest,
            "Proposals": pb.ProposalsRequest,
            "Approve": pb.ApproveRequest,
            "Greet": pb.GreetRequest,
            "Questions": pb.QuestionsRequest,
            "State": pb.StateRequest,
        }
        name = noise.random.choice(list(kinds))
        asked = noise.filled(kinds[name]())
        if noise.random.random() < 0.7:
            for word, value in {"instance": "fuzz", "envelope": self.envelope, "request": self.csr}.items():
                if word in asked.DESCRIPTOR.fields_by_name:
                    setattr(asked, word, value)
        content = noise.sent(asked)
        channel = self.invited if name == "Enrol" else self.site
        send = channel.unary_unary(f"/locum.v1.Registry/{name}")
        return f"Registry.{name}", lambda: send(content, timeout=CALL)

    def blobs(self) -> tuple[str, Callable[[], object]]:
        noise = self.noise
        name = noise.random.choice(("Stat", "Put", "Get"))
        if name == "Stat":
            content = noise.sent(self._key())
            send = self.site.unary_unary("/locum.v1.Blobs/Stat")
            return "Blobs.Stat", lambda: send(content, timeout=CALL)
        if name == "Get":
            request = pb.GetRequest(key=self._key(), offset=noise.random.choice(noise.numbers))
            asked = noise.sent(request)
            fetch = self.site.unary_stream("/locum.v1.Blobs/Get")
            return "Blobs.Get", lambda: list(fetch(asked, timeout=CALL))
        chunks = [noise.sent(self._chunk(number)) for number in range(noise.random.choice((0, 1, 2, 3)))]
        put = self.site.stream_unary("/locum.v1.Blobs/Put")
        return "Blobs.Put", lambda: put(iter(chunks), timeout=CALL)

    def _key(self) -> pb.BlobKey:
        noise = self.noise
        if noise.random.random() < 0.3:
            return noise.filled(pb.BlobKey())  # type: ignore[return-value]
        size = noise.random.choice((0, 1, 5, len(self._model), 4096, 4097))
        return pb.BlobKey(run="fuzz-run", sha256=noise.random.choice([self.blob, "0" * 64, "1" * 64]), size=size)

    def _chunk(self, number: int) -> pb.PutChunk:
        data = self._model[: self.noise.random.choice((0, 1, 5, 500))]
        if number:
            return pb.PutChunk(data=data)
        return pb.PutChunk(key=self._key(), offset=self.noise.random.choice((0, 0, 0, 1, 500)), data=data)

    def send(self, make: Callable[[], tuple[str, Callable[[], object]]], times: int) -> None:
        """Sends so many cases, some at a time."""
        with ThreadPoolExecutor(AT_ONCE) as pool:
            for _ in range(times // AT_ONCE):
                cases = [make() for _ in range(AT_ONCE)]
                codes = pool.map(answered, [call for _, call in cases])
                self.seen.update((name, code) for (name, _), code in zip(cases, codes, strict=True))


@pytest.fixture(scope="module")
def door(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Door]:
    of = plan(name="fuzz")
    with open_federation(tmp_path_factory.mktemp("fuzz")) as federation, ExitStack() as stack:
        federation.propose(of)
        federation.enrol("fuzz")
        path, config = federation.folder / "nobody.json", read_config(federation.home)
        with closing(Registry(federation.home.registry)) as registry:
            invite(registry, make_invitation(load_authority(federation.home, config), config, "nobody"), path)
            registry.record_approval("fuzz", of.digest, approved=True, at=time.time() + 3600, envelope=b"signed")
        identity, invitation = load_identity(federation.folder / "fuzz"), read_invitation(path)
        token, root = invitation_key(invitation.token_bytes), certificate_pem(identity.authority)
        credentials = (
            (key_pem(identity.key), certificate_pem(identity.certificate)),
            (key_pem(token), invitation.certificate.encode()),
        )
        site, invited = (
            stack.enter_context(grpc.secure_channel(f"localhost:{federation.port}", tls))
            for tls in (grpc.ssl_channel_credentials(root, *pair) for pair in credentials)
        )
        yield Door(federation, of, site, invited)


@pytest.mark.parametrize("times", FORMS)
def test_no_message_brings_the_gateway_down_and_none_stays_in_its_memory(door: Door, times: int) -> None:
    gateway, superlink = door.federation.pid_of("gateway"), door.federation.pid_of("superlink")
    parts = ((door.registry, 400), (door.fleet, 300), (door.blobs, 500))
    assert door.answers()
    for make, share in parts:
        door.send(make, share * times // 5)
    before = resident(gateway)
    for make, share in parts:
        door.send(make, share * times - share * times // 5)
    grown = resident(gateway) - before
    told = [f"{name} {code.name} {number}" for (name, code), number in sorted(door.seen.items(), key=str)]
    _tell(f"{door.seen.total()} cases, gateway {before >> 20} MiB + {grown >> 10} KiB", *told)
    _tell("of the tunnel:", *(f"HTTP {status} {number}" for status, number in sorted(door.statuses.items())))
    assert not {name for name, code in door.seen if code in TRACEBACKS}
    assert grown < MOST_GROWTH
    assert (door.federation.pid_of("gateway"), door.federation.pid_of("superlink")) == (gateway, superlink)
    assert door.answers()


# --- readers


def _plans(noise: Noise) -> Callable[[], None]:
    texts = [plan().to_yaml().encode(), plan().model_dump_json().encode()]

    def case() -> None:
        try:
            parse_plan(noise.damaged(noise.random.choice(texts)))
        except PlanError:
            return

    return case


def _bundles(noise: Noise) -> Callable[[], None]:
    bundle = build_bundle(plan())

    def case() -> None:
        try:
            plan_of_bundle(noise.damaged(bundle))
        except PlanError:
            return

    return case


def _tensor_files(noise: Noise, folder: Path) -> Callable[[], None]:
    path = folder / "tensors"
    write_tensors(path, {"b": np.ones(3, np.int64), "a": np.zeros((2, 2), np.float32), "c": np.zeros((0, 3), np.uint8)})
    content = path.read_bytes()

    def case() -> None:
        path.write_bytes(noise.damaged(content))
        try:
            mapped = map_tensors(path, "0" * 64)
        except TensorFileError:
            return
        assert sum(array.nbytes for array in mapped.values()) < path.stat().st_size
        assert all(np.isfinite(array.astype(np.float64)).size == array.size for array in mapped.values())

    return case


def _inline_tensors(noise: Noise, folder: Path) -> Callable[[], None]:
    write_tensors(folder / "inline", initial(plan()))
    content = (folder / "inline").read_bytes()[:2048]

    def case() -> None:
        try:
            tensors_from(noise.damaged(content))
        except MessageError:
            return

    return case


def _envelopes(noise: Noise, door: Door) -> Callable[[], None]:
    key = load_log_key(door.federation.home)
    body = Proposal(digest=door.plan.digest, plan=door.plan.model_dump(mode="json"), proposed_at=1.0, by="A")
    envelope, public = seal_proposal(body, key), key.public_key()

    def case() -> None:
        damaged = noise.damaged(envelope)
        try:
            open_proposal(damaged, public)
        except EnvelopeError:
            return
        assert damaged == envelope

    return case


@pytest.mark.parametrize("times", FORMS)
def test_no_bytes_are_read_as_what_they_are_not_and_none_stay_in_memory(door: Door, times: int, tmp_path: Path) -> None:
    noise = Noise(SEED + 1)
    cases = (
        (_plans(noise), 150),
        (_bundles(noise), 200),
        (_tensor_files(noise, tmp_path), 250),
        (_inline_tensors(noise, tmp_path), 100),
        (_envelopes(noise, door), 100),
    )
    for case, share in cases:
        for _ in range(share * times // 5):
            case()
    gc.collect()
    before = resident("self")
    for case, share in cases:
        for _ in range(share * times - share * times // 5):
            case()
    gc.collect()
    grown = resident("self") - before
    _tell(f"{800 * times} cases, {before >> 20} MiB + {grown >> 10} KiB")
    assert grown < MOST_GROWTH
