"""`python -m tests.wire.hostile HOME=BEHAVIOUR …`: sites that do harm over the real wire, many in one process.

A behaviour is one of `peer.py`, or one of `MAKES` (a good site whose update is made wrongly), or one of `SENDS` (a site
that sends its training reply by a way of its own). What the coordinator answered is noted in `HOME/answers`.
"""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
from flwr.app import ConfigRecord, Error, Message, RecordDict
from flwr.common.serde import message_to_proto
from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.proto.message_pb2 import ObjectTree, PushObjectRequest
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree

from locum.common.errors import Code
from locum.common.messages import TRAIN, Description, Fields, Tensors, TrainResult, TrainTask
from locum.common.plan import Plan
from locum.common.proto import locum_pb2 as pb
from locum.common.tensor_files import write_tensors
from locum.site_client.blobs import BlobClient
from locum.site_client.carrier import SiteCarrier
from locum.site_client.configuration import FILE, read_configuration
from locum.site_client.fleet import AwayError, Fleet, RefusedError
from locum.site_client.journal import Entry
from locum.site_client.service import Service
from locum.site_client.start import open_log, open_service
from tests.peers import Answer, Peer, Spoiler
from tests.wire.federation import Federation, Process
from tests.wire.peer import BEHAVIOURS, WirePeer

TEN_GIGABYTES = 10 << 30
_PLENTY = 64 << 20


# --- updates that are made wrongly


class Liar(Peer):
    """Says another thing of its update, in the header's own JSON."""

    def __init__(self, site: str, **fields: str) -> None:
        super().__init__(site)
        self.fields = fields

    def train(self, plan: Plan, content: RecordDict) -> Answer:
        answer = super().train(plan, content)
        assert isinstance(answer, RecordDict)
        record = answer["locum"]
        assert isinstance(record, ConfigRecord)
        header = record["json"]
        assert isinstance(header, bytes)
        text = header.decode()
        for name, value in self.fields.items():
            before = text.partition(f'"{name}":')[2].partition(",")[0]
            text = text.replace(f'"{name}":{before}', f'"{name}":{value}')
        record["json"] = text.encode()
        return answer


class Later(Peer):
    """Sends the update of another round."""

    def header(self, plan: Plan, task: TrainTask) -> TrainResult:
        return super().header(plan, task.model_copy(update={"round": task.round + 1}))


class Impostor(Peer):
    """Calls itself by another site's name."""

    def __init__(self, site: str, name: str) -> None:
        super().__init__(site)
        self.name = name

    def description(self, plan: Plan) -> Description:
        return super().description(plan).model_copy(update={"site": self.name})


def _first_as(dtype: type[np.generic]) -> Callable[[Tensors], Tensors]:
    def spoil(model: Tensors) -> Tensors:
        first = next(iter(model))
        return {**model, first: model[first].astype(dtype)}

    return spoil


MAKES: dict[str, Callable[..., Peer]] = {
    "weight_nan": lambda site: Liar(site, weight="NaN"),
    "weight_negative": lambda site: Liar(site, weight="-1.0"),
    "plan": lambda site: Liar(site, plan_digest=f'"{"0" * 64}"'),
    "round": Later,
    "name": Impostor,
    "float64": lambda site: Spoiler(site, _first_as(np.float64)),
    "int32": lambda site: Spoiler(site, _first_as(np.int32)),
    "huge": lambda site: Peer(site, 1e30),
}


# --- replies that are sent by ways of their own


@dataclass
class Sending:
    """What a site has in hand when it sends: its connection, the message it answers, and the good reply."""

    site: Path
    fleet: Fleet
    carrier: SiteCarrier
    entry: Entry
    reply: Message

    # --- blobs

    @property
    def fields(self) -> dict[str, Any]:
        """The blob that the reply names."""
        record = self.reply.content["locum"]
        assert isinstance(record, ConfigRecord)
        return {name: record[name] for name in ("sha256", "size") if name in record}

    def name(self, fields: Fields) -> None:
        """Lets the reply name another blob."""
        record = self.reply.content["locum"]
        assert isinstance(record, ConfigRecord)
        record.update(fields)

    def put(self, digest: str, content: bytes, size: int | None = None) -> None:
        """Uploads as the bytes of a blob what may be none."""
        assert isinstance(self.carrier.blobs, BlobClient)
        put = self.carrier.blobs._calls.put
        key = pb.BlobKey(run=self.entry.run.name, sha256=digest, size=len(content) if size is None else size)

        def chunks() -> Iterator[bytes]:
            yield pb.PutChunk(key=key, offset=0).SerializeToString()
            for start in range(0, len(content), 1 << 18):
                yield pb.PutChunk(data=content[start : start + (1 << 18)]).SerializeToString()

        self.ask(lambda: put(chunks(), timeout=30))

    # --- replies

    def push(self, root: bytes, *children: bytes, tree: ObjectTree | None = None, objects: bool = True) -> None:
        """Announces objects as the reply, whatever they are, and sends them."""
        names = {sha256(content).hexdigest(): content for content in (root, *children)}
        top = next(iter(names))
        self.reply.metadata.__dict__["_message_id"] = top
        leaves = [ObjectTree(object_id=name) for name in names if name != top]
        self.announce([(self.reply, tree or ObjectTree(object_id=top, children=leaves))], names if objects else {})

    def announce(self, replies: list[tuple[Message, ObjectTree]], names: dict[str, bytes]) -> None:
        """Announces replies with their trees, then sends the objects that are given; what is refused fails."""
        node, run = self.fleet.node, int(self.reply.metadata.run_id)
        request = PushMessagesRequest(
            node=node,
            messages_list=[_bare(reply) for reply, _ in replies],
            message_object_trees=[tree for _, tree in replies],
        )
        answer = self.ask(lambda: self.fleet._client.PushMessages(request))
        for name, content in names.items() if answer is not None else ():
            thing = PushObjectRequest(
                node=node, run_id=run, object_id=name, object_content=content, session_id=answer.session_id
            )
            self.ask(lambda thing=thing: self.fleet._client.PushObject(thing))
        if answer is None:
            self.fleet.push(Message(Error(Code.INTERNAL), reply_to=self.entry.message))

    def send(self) -> None:
        """Sends the reply as a good site does."""
        self.fleet.push(self.reply)

    def ask(self, call: Callable[[], Any]) -> Any:
        """Calls, and notes a refusal."""
        try:
            return call()
        except grpc.RpcError as error:
            self.note(f"{error.code().name}: {error.details()}")
        except httpx.HTTPStatusError as error:
            self.note(f"HTTP {error.response.status_code}")
        return None

    def note(self, words: str) -> None:
        with (self.site / "answers").open("a") as file:
            file.write(f"{words}\n")


def _bare(reply: Message) -> Any:
    proto = message_to_proto(reply)
    proto.ClearField("content")
    if reply.has_content():
        proto.content.SetInParent()
    return proto


def _deflated(reply: Message) -> dict[str, bytes]:
    reply.metadata.__dict__["_message_id"] = reply.object_id
    return {name: thing.deflate() for name, thing in get_all_nested_objects(reply).items()}


def _lying(sending: Sending) -> None:
    """Other bytes than the digest says, as many."""
    digest, size = sending.fields["sha256"], sending.fields["size"]
    sending.put(digest, bytes(size))
    sending.send()


def _no_tensors(sending: Sending) -> None:
    """A blob that is what its digest says, and no tensors."""
    content = np.random.default_rng(0).bytes(sending.fields["size"])
    digest = sha256(content).hexdigest()
    sending.put(digest, content)
    sending.name({"sha256": digest, "size": len(content)})
    sending.send()


def _ten_gigabytes(sending: Sending) -> None:
    """Says that it will send ten gigabytes, and begins."""
    digest = "1" * 64
    sending.put(digest, bytes(_PLENTY), size=TEN_GIGABYTES)
    sending.name({"sha256": digest, "size": TEN_GIGABYTES})
    sending.send()


def _foreign(sending: Sending) -> None:
    """Names the blob that the site with the update 1.0 has sent."""
    model = {name: np.ones_like(array) for name, array in sending.carrier.fetch(_model_of(sending.entry)).items()}
    blob = write_tensors(sending.site / "copy", model)
    sending.name({"sha256": blob.sha256, "size": blob.size})
    sending.send()


def _model_of(entry: Entry) -> Fields:
    record = entry.message.content["locum"]
    assert isinstance(record, ConfigRecord)
    return {name: record[name] for name in ("sha256", "size")}


def _outside(sending: Sending) -> None:
    """Names a file above its folder."""
    sending.name({"sha256": "../../../limit.json", "size": 7})
    sending.send()


def _words(sending: Sending) -> None:
    """Names no blob but words and numbers."""
    sending.name({"sha256": [1.0, 2.0], "size": "large", "also": b"\0" * 100})
    sending.send()


def _letters(sending: Sending) -> None:
    """Names a blob in digits that take four bytes each: too long for a file's name."""
    sending.name({"sha256": "\N{MATHEMATICAL MONOSPACE DIGIT ZERO}" * 64, "size": 7})
    sending.send()


def _garbage(sending: Sending) -> None:
    """A reply whose objects have a right digest and a body of no sense."""
    sending.push(b"Message  10\x00" + b"\xff" * 10)


def _another_kind(sending: Sending) -> None:
    """A reply that is no message but an array."""
    sending.push(b"Array  2\x00{}")


def _childless(sending: Sending) -> None:
    """A reply with neither content nor error."""
    empty = Message(RecordDict(), reply_to=sending.entry.message)
    empty.__dict__["_content"] = None
    sending.push(empty.deflate())


def _other_child(sending: Sending) -> None:
    """A reply whose content is not the object that it names."""
    objects = _deflated(sending.reply)
    sending.push(objects.pop(sending.reply.object_id), b"RecordDict  2\x00{}")


def _never(sending: Sending) -> None:
    """Announces a reply, and never sends its objects; then announces another one, which is complete at once."""
    _deflated(sending.reply)
    tree = get_object_tree(sending.reply)
    sending.announce([(sending.reply, tree)], {})
    sending.push(b"Message  10\x00" + b"\xff" * 10)
    sending.note("announced")


def _circle(sending: Sending) -> None:
    """A tree of objects that never ends."""
    objects = _deflated(sending.reply)
    top = sending.reply.object_id
    other = next(name for name in objects if name != top)
    below = ObjectTree(object_id=other, children=[ObjectTree(object_id=top)])
    sending.announce([(sending.reply, ObjectTree(object_id=top, children=[below]))], objects)


def _crowd(sending: Sending) -> None:
    """A tree of thousands of objects."""
    _deflated(sending.reply)
    top = sending.reply.object_id
    leaves = [ObjectTree(object_id=sha256(str(number).encode()).hexdigest()) for number in range(5000)]
    sending.announce([(sending.reply, ObjectTree(object_id=top, children=leaves))], {})


def _several(sending: Sending) -> None:
    """Several replies at once, the second one to a message that nobody has sent, of a megabyte's name."""
    objects = _deflated(sending.reply)
    other = Message(RecordDict(), reply_to=sending.entry.message)
    other.metadata.__dict__.update(_message_id="2" * 64, _reply_to_message_id="x" * 500_000)
    trees = [(sending.reply, get_object_tree(sending.reply)), (other, ObjectTree(object_id="2" * 64))]
    sending.announce(trees, objects)


def _another_node(sending: Sending) -> None:
    """A reply in the name of another node."""
    sending.reply.metadata.__dict__["_src_node_id"] = sending.fleet.node.node_id ^ 1
    objects = _deflated(sending.reply)
    sending.announce([(sending.reply, get_object_tree(sending.reply))], objects)


SENDS: dict[str, Callable[[Sending], None]] = {
    "lying": _lying,
    "no_tensors": _no_tensors,
    "ten_gigabytes": _ten_gigabytes,
    "foreign": _foreign,
    "outside": _outside,
    "words": _words,
    "letters": _letters,
    "garbage": _garbage,
    "another_kind": _another_kind,
    "childless": _childless,
    "other_child": _other_child,
    "never": _never,
    "circle": _circle,
    "crowd": _crowd,
    "several": _several,
    "another_node": _another_node,
}


# --- the process


def _open(home: Path, behaviour: str) -> Service:
    kind, *parameters = behaviour.split(":")
    configuration = read_configuration(home / FILE)
    service = open_service(home, configuration, open_log(home, home.name, configuration))
    peer = Peer(home.name) if kind in SENDS else {**BEHAVIOURS, **MAKES}[kind](home.name, *parameters)
    service.agent = WirePeer(home, peer)  # type: ignore[assignment]
    service.agent.told = service.doing
    if kind in SENDS:
        deliver = service._deliver

        def send(fleet: Fleet, carrier: SiteCarrier, entry: Entry, reply: Message) -> None:
            if entry.message.metadata.message_type != TRAIN:
                deliver(fleet, carrier, entry, reply)
                return
            try:
                SENDS[kind](Sending(home, fleet, carrier, entry, reply))
            except (AwayError, RefusedError) as error:
                Sending(home, fleet, carrier, entry, reply).note(str(error))

        service._deliver = send  # type: ignore[method-assign]
    return service


def main() -> None:
    services = [_open(Path(home), behaviour) for home, behaviour in (word.split("=") for word in sys.argv[1:])]
    signal.signal(signal.SIGTERM, lambda *_: [service.end() for service in services])
    for service in services:
        service.pulse.start()
        threading.Thread(target=service.run, daemon=True).start()
    while not all(service.stop.is_set() for service in services):
        time.sleep(0.2)
    time.sleep(1)


def start_hostile(federation: Federation, behaviours: Mapping[str, str]) -> None:
    """Starts one process with these sites, which are enrolled; behaviours by name."""
    words = [f"{federation.folder / name}={behaviour}" for name, behaviour in behaviours.items()]
    command = (sys.executable, "-m", "tests.wire.hostile", *words)
    federation.sites["hostile"] = Process(command, federation.folder / "hostile.log").start()


def answers(federation: Federation, name: str) -> str:
    """What the coordinator answered to a site's misdeeds."""
    return (federation.folder / name / "answers").read_text()


if __name__ == "__main__":
    main()
