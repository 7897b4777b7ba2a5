"""A coordinator on loopback, without certificates, that does to a site what a test tells it to.

with open_coordinator() as coordinator:
    coordinator.give(message, of)
    service.connect = coordinator.channel
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
from flwr.app import Message
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_to_proto, run_to_proto
from flwr.proto.fab_pb2 import Fab, GetFabResponse
from flwr.proto.fleet_pb2 import (
    ActivateNodeResponse,
    DeactivateNodeResponse,
    PullMessagesResponse,
    PushMessagesRequest,
    PushMessagesResponse,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatResponse
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedResponse,
    PullObjectRequest,
    PullObjectResponse,
    PushObjectRequest,
    PushObjectResponse,
)
from flwr.proto.run_pb2 import GetRunResponse
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.run import Run

from locum.common.fab import build_bundle
from locum.common.plan import Plan
from locum.common.proto import locum_pb2 as pb
from locum.common.proto import locum_pb2_grpc as rpc

_NODE = 7


@dataclass
class Coordinator(rpc.RegistryServicer, rpc.FleetServicer):  # type: ignore[misc]
    """What it does, and what it was told.

    Attributes:
        ahead: seconds by which its clock is ahead of this machine's.
        state: of its registry.
        log_size: entries of its log that it says it has signed.
        envelopes: its proposals; `questions` those that are open.
        refuses: decisions that it does not take, with a word.
        answers: what it answers to a call of the node, by the last part of the path; instead of a proper answer.
        heard: every report, decision and call of the node, in order.
        replies: the replies that arrived, whole.
    """

    ahead: float = 0.0
    state: int = 1
    log_size: int = 0
    envelopes: list[bytes] = field(default_factory=list)
    questions: list[bytes] = field(default_factory=list)
    refuses: Callable[[bytes], str] = lambda _: ""
    answers: dict[str, Callable[[bytes], pb.FleetAnswer]] = field(default_factory=dict)
    heard: list[tuple[str, Any]] = field(default_factory=list)
    replies: list[Message] = field(default_factory=list)
    port: int = 0
    _waiting: list[Message] = field(default_factory=list)
    _bundle: bytes = b""
    _objects: dict[str, bytes] = field(default_factory=dict)
    _announced: dict[str, set[str]] = field(default_factory=dict)

    def channel(self) -> grpc.Channel:
        """A site's connection."""
        return grpc.insecure_channel(f"127.0.0.1:{self.port}")

    def give(self, message: Message, of: Plan) -> None:
        """The site's next message, of a run of the plan."""
        self._bundle = build_bundle(of)
        message.metadata.__dict__["_message_id"] = message.object_id
        self._waiting.append(message)

    def parts_of(self, reply: Message) -> list[bytes]:
        """The parts in which a reply arrived."""
        return [self._objects[name] for name in get_all_nested_objects(reply)]

    def named(self, name: str) -> list[Any]:
        """What was heard under a name."""
        return [content for known, content in self.heard if known == name]

    # --- the registry

    def Report(self, request: pb.ReportRequest, context: grpc.ServicerContext) -> pb.ReportReply:  # noqa: N802
        self.heard.append(("report", request))
        return pb.ReportReply(clock=time.time() + self.ahead, registry_state=self.state, log_size=self.log_size)

    def Proposals(self, request: pb.ProposalsRequest, context: grpc.ServicerContext) -> pb.ProposalsReply:  # noqa: N802
        self.heard.append(("proposals", self.state))
        return pb.ProposalsReply(envelopes=self.envelopes)

    def Approve(self, request: pb.ApproveRequest, context: grpc.ServicerContext) -> pb.ApproveReply:  # noqa: N802
        self.heard.append(("decision", request.envelope))
        if word := self.refuses(request.envelope):
            context.abort(grpc.StatusCode.NOT_FOUND, word)
        return pb.ApproveReply()

    def Witness(self, request: pb.WitnessRequest, context: grpc.ServicerContext) -> pb.WitnessReply:  # noqa: N802
        self.heard.append(("witness", request))
        return pb.WitnessReply()

    def Questions(self, request: pb.QuestionsRequest, context: grpc.ServicerContext) -> pb.QuestionsReply:  # noqa: N802
        self.heard.append(("questions", self.state))
        return pb.QuestionsReply(envelopes=self.questions)

    def State(self, request: pb.StateRequest, context: grpc.ServicerContext) -> pb.StateReply:  # noqa: N802
        self.heard.append(("answer", request.envelope))
        if word := self.refuses(request.envelope):
            context.abort(grpc.StatusCode.NOT_FOUND, word)
        return pb.StateReply()

    # --- the node

    def Call(self, request: pb.FleetCall, context: grpc.ServicerContext) -> pb.FleetAnswer:  # noqa: N802
        name = request.path.rpartition("/")[2]
        self.heard.append((name, request.body))
        if name in self.answers:
            return self.answers[name](request.body)
        answer = getattr(self, "_" + name.replace("-", "_"))(request.body)
        return pb.FleetAnswer(status=200, body=answer.SerializeToString())

    def _activate_node(self, _: bytes) -> ActivateNodeResponse:
        return ActivateNodeResponse(node_id=_NODE)

    def _deactivate_node(self, _: bytes) -> DeactivateNodeResponse:
        return DeactivateNodeResponse()

    def _send_node_heartbeat(self, _: bytes) -> SendNodeHeartbeatResponse:
        return SendNodeHeartbeatResponse(success=True)

    def _pull_messages(self, _: bytes) -> PullMessagesResponse:
        if not self._waiting:
            time.sleep(0.05)
            return PullMessagesResponse()
        message = self._waiting.pop()
        self._objects |= {name: part.deflate() for name, part in get_all_nested_objects(message).items()}
        bare = message_to_proto(remove_content_from_message(message))
        return PullMessagesResponse(messages_list=[bare], message_object_trees=[get_object_tree(message)])

    def _get_run(self, _: bytes) -> GetRunResponse:
        run = Run.create_empty(1)
        run.override_config = {"run": "run-1"}
        return GetRunResponse(run=run_to_proto(run))

    def _get_fab(self, _: bytes) -> GetFabResponse:
        return GetFabResponse(fab=Fab(hash_str="", content=self._bundle))

    def _pull_object(self, body: bytes) -> PullObjectResponse:
        content = self._objects.get(PullObjectRequest.FromString(body).object_id, b"no part")
        return PullObjectResponse(object_found=True, object_available=True, object_content=content)

    def _confirm_message_received(self, _: bytes) -> ConfirmMessageReceivedResponse:
        return ConfirmMessageReceivedResponse()

    def _push_messages(self, body: bytes) -> PushMessagesResponse:
        (message,) = PushMessagesRequest.FromString(body).messages_list
        (tree,) = PushMessagesRequest.FromString(body).message_object_trees
        names = _names(tree)
        self._announced[message.metadata.message_id] = set(names)
        return PushMessagesResponse(objects_to_push=names, session_id=message.metadata.message_id)

    def _push_object(self, body: bytes) -> PushObjectResponse:
        request = PushObjectRequest.FromString(body)
        self._objects[request.object_id] = request.object_content
        missing = self._announced[request.session_id]
        missing.discard(request.object_id)
        if not missing:
            whole = inflate_object_from_contents(request.session_id, self._objects, keep_object_contents=True)
            assert isinstance(whole, Message)
            self.replies.append(whole)
        return PushObjectResponse(stored=True)


def _names(tree: Any) -> list[str]:
    return [*(name for child in tree.children for name in _names(child)), tree.object_id]


@contextmanager
def open_coordinator(**told: Any) -> Iterator[Coordinator]:
    """Serves a coordinator on a free port."""
    coordinator = Coordinator(**told)
    server = grpc.server(ThreadPoolExecutor(16), options=[("grpc.so_reuseport", 0)])
    rpc.add_RegistryServicer_to_server(coordinator, server)
    rpc.add_FleetServicer_to_server(coordinator, server)
    coordinator.port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield coordinator
    finally:
        server.stop(None).wait()


def until(holds: Callable[[], Any], seconds: float = 30.0) -> Any:
    """Waits until something holds; fails after a time that means that it never will."""
    end = time.monotonic() + seconds
    while not (found := holds()):
        assert time.monotonic() < end, "it never held"
        threading.Event().wait(0.02)
    return found
