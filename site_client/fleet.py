"""The seam to Flower: this site as a node of a SuperLink, over the gateway's tunnel.

A stock SuperNode installs and imports the bundle that it is sent. This one only carries messages: what a message asks
for is decided and done elsewhere. Nothing here retries; a call that fails says whether trying again can help.

Flower's private parts used (flwr 1.41): its Fleet client, the interceptor by which a call is carried elsewhere, the
wire form of messages and objects, and the headers by which a node proves its key.
"""

from __future__ import annotations

import base64
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from typing import Any, cast

import grpc
import httpx
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import Message
from flwr.app.message import remove_content_from_message
from flwr.common.constant import HEARTBEAT_DEFAULT_INTERVAL, TIMESTAMP_HEADER
from flwr.common.serde import message_from_proto, message_to_proto, run_from_proto
from flwr.proto.fab_pb2 import GetFabRequest
from flwr.proto.fleet_pb2 import ActivateNodeRequest, DeactivateNodeRequest, PullMessagesRequest, PushMessagesRequest
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, ObjectTree
from flwr.proto.message_pb2 import Message as MessageProto
from flwr.proto.node_pb2 import Node
from flwr.proto.run_pb2 import GetRunRequest
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.error import FlowerError
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree, iterate_object_tree
from flwr.supercore.inflatable.inflatable_protobuf_utils import (
    make_pull_object_fn_protobuf,
    make_push_object_fn_protobuf,
)
from flwr.supercore.inflatable.inflatable_utils import (
    ObjectPullError,
    ObjectPushError,
    inflate_object_from_contents,
    pull_objects,
    push_objects,
)
from flwr.supercore.primitives.asymmetric import sign_message
from flwr.supercore.protobuf.client import ProtobufCall, ProtobufClientInterceptor, ProtobufRequestContext
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode.fleet_http_client import FleetHttpClient

from locum.common.proto import locum_pb2 as pb
from locum.common.proto import locum_pb2_grpc as rpc

_CALL_SECONDS = 90.0
_PULL = "/v1/fleet/pull-messages"
_PULL_TRIES, _PULL_WAIT = 8, 0.2
#: What a site takes in before anybody has asked its stewards. A message of ours has three parts, a header and up to
#: 128 KiB of tensors in the largest, and the gateway carries no call of more than 1 MiB.
_MOST_PARTS, _MOST_BYTES = 8, 1 << 20


class AwayError(Exception):
    """The coordinator cannot be reached or is not ready; the same call can succeed later."""


class RefusedError(Exception):
    """The coordinator has understood and said no; the same call will be refused again."""


@dataclass(frozen=True)
class Incoming:
    """A message for this site, and the run that it belongs to (Flower's number of it)."""

    message: Message
    run: int


@dataclass(frozen=True)
class RunOf:
    """What a run is: its name at the coordinator, and its bundle as it was sent."""

    name: str
    bundle: bytes


@dataclass(frozen=True)
class _NodeProof:
    """Signs the time of each call with the node's key, by the coordinator's clock.

    A hospital's clock may be minutes off; the SuperLink takes no proof that is older than some.
    """

    key: ec.EllipticCurvePrivateKey
    offset: Callable[[], float]

    def intercept(self, context: ProtobufRequestContext, call_next: ProtobufCall) -> httpx.Response:
        now = datetime.fromtimestamp(datetime.now(UTC).timestamp() + self.offset(), UTC).isoformat()
        headers = context.request.headers
        headers[FLEET_HTTP_PUBLIC_KEY_HEADER] = base64.b64encode(_public(self.key)).decode("ascii")
        headers[TIMESTAMP_HEADER] = now
        headers[FLEET_HTTP_SIGNATURE_HEADER] = base64.b64encode(sign_message(self.key, now.encode("ascii"))).decode()
        return call_next(context)


@dataclass
class _Tunnel:
    """Carries a call over the gateway instead of HTTP; a pull, which waits there, can be broken off."""

    stub: rpc.FleetStub
    instance: str
    pull: grpc.Future | None = None

    def intercept(self, context: ProtobufRequestContext, _call_next: ProtobufCall) -> httpx.Response:
        request = context.request
        call = pb.FleetCall(
            path=request.url.path, headers=dict(request.headers), body=request.read(), instance=self.instance
        )
        if request.url.path == _PULL:
            self.pull = self.stub.Call.future(call, timeout=_CALL_SECONDS)
            answer = self.pull.result()
        else:
            answer = self.stub.Call(call, timeout=_CALL_SECONDS)
        return httpx.Response(answer.status, content=answer.body, request=request)


class _Client(FleetHttpClient):
    """Flower's Fleet client, without the connection of its own that it never uses: all calls go through a tunnel.

    Made Flower's way, the client reads proxies from the environment, and fails on those that it does not know.
    """

    def __init__(self, interceptors: Sequence[ProtobufClientInterceptor]) -> None:
        self._base_url, self._interceptors, self._retry_invoker = "http://superlink", tuple(interceptors), None
        self._client = httpx.Client(trust_env=False)


class Fleet:
    """This site as one node. Every method raises AwayError or RefusedError.

    Args:
        channel: an open channel to the gateway, with the site's certificate.
        key: the site's private key, which is the node's.
        instance: drawn when the agent starts.
        offset: seconds by which the coordinator's clock is ahead of this one.
    """

    def __init__(
        self, channel: grpc.Channel, key: ec.EllipticCurvePrivateKey, instance: str, offset: Callable[[], float]
    ) -> None:
        self._public = _public(key)
        self._tunnel = _Tunnel(rpc.FleetStub(channel), instance)
        self._client = _Client([_NodeProof(key, offset), self._tunnel])
        self._node: Node | None = None
        self._beat = 0.0
        self._runs: dict[int, RunOf] = {}

    def activate(self) -> int:
        """Takes this site's node up; returns its number."""
        request = ActivateNodeRequest(public_key=self._public, heartbeat_interval=HEARTBEAT_DEFAULT_INTERVAL)
        self._node = Node(node_id=_asked(self._client.ActivateNode, request).node_id)
        TaskIdentity.node_id = self._node.node_id
        return int(self._node.node_id)

    def deactivate(self) -> None:
        """Takes the node down, so that it can be taken up again at once."""
        if self._node is not None:
            _asked(self._client.DeactivateNode, DeactivateNodeRequest(node_id=self._node.node_id))
            self._node = None

    def take_over(self, number: int) -> None:
        """Takes down a node that an agent before this one, with the same key, has left active."""
        _asked(self._client.DeactivateNode, DeactivateNodeRequest(node_id=number))

    @property
    def node(self) -> Node:
        """The active node; raises AwayError before it is."""
        if self._node is None:
            raise AwayError("the node is not active")
        return self._node

    def heartbeat(self) -> None:
        """Tells the SuperLink that the node lives; RefusedError if it is not known there any more."""
        request = SendNodeHeartbeatRequest(node=self.node, heartbeat_interval=HEARTBEAT_DEFAULT_INTERVAL)
        if not _asked(self._client.SendNodeHeartbeat, request).success:
            raise RefusedError("the SuperLink does not know this node")
        self._beat = time.monotonic()

    def pull(self) -> Incoming | None:
        """The next message, or None if there was none within the time that the gateway waits for one."""
        answer = _asked(self._client.PullMessages, PullMessagesRequest(node=self.node))
        if not answer.messages_list:
            return None
        if not answer.message_object_trees:
            raise RefusedError("a message came without its parts")
        head, run = answer.messages_list[0], int(answer.messages_list[0].metadata.run_id)
        TaskIdentity.run_id = run
        contents = self._contents(_parts(answer.message_object_trees[0]), run)
        message = cast("Message", inflate_object_from_contents(head.metadata.message_id, contents))
        message.metadata.__dict__["_message_id"] = head.metadata.message_id
        return Incoming(message, run)

    def _contents(self, names: Sequence[str], run: int) -> dict[str, bytes]:
        """The parts of a message; no more is taken in than a message of ours has."""
        fetched = make_pull_object_fn_protobuf(self._client.PullObject, self.node, run)

        def pull(name: str) -> bytes:
            content = fetched(name)
            if len(content) > _MOST_BYTES:
                raise RefusedError(f"a part of a message has {len(content)} bytes, which is more than any of ours")
            return content

        try:
            found: dict[str, bytes] = guarded(
                lambda: pull_objects(
                    list(names), pull, initial_backoff=_PULL_WAIT, max_tries_per_object=_PULL_TRIES, max_time=None
                )
            )
        except ObjectPullError as error:
            raise RefusedError(f"a message could not be read: {error}") from error
        return found

    def confirm(self, incoming: Incoming) -> None:
        """Tells the SuperLink that a message is safe here, so that it can forget it."""
        request = ConfirmMessageReceivedRequest(
            node=self.node, run_id=incoming.run, message_object_id=incoming.message.metadata.message_id
        )
        _asked(self._client.ConfirmMessageReceived, request)

    def run_of(self, number: int) -> RunOf:
        """A run's name and bundle; asked for once over a connection."""
        if number not in self._runs:
            self._runs = {number: self._fetched(number)}
        return self._runs[number]

    def _fetched(self, number: int) -> RunOf:
        found = run_from_proto(_asked(self._client.GetRun, GetRunRequest(node=self.node, run_id=number)).run)
        fab = _asked(self._client.GetFab, GetFabRequest(node=self.node, run_id=number, hash_str=found.fab_hash)).fab
        return RunOf(str(found.override_config.get("run", "")), bytes(fab.content))

    def push(self, reply: Message) -> None:
        """Delivers a reply, whole. Of a node that is not online Flower makes up an error, though its reply is there."""
        if time.monotonic() - self._beat > HEARTBEAT_DEFAULT_INTERVAL:
            self.heartbeat()
        TaskIdentity.run_id = reply.metadata.run_id
        reply.metadata.__dict__["_message_id"] = reply.object_id
        bare = remove_content_from_message(reply) if reply.has_content() else reply
        request = PushMessagesRequest(
            node=self.node, messages_list=[message_to_proto(bare)], message_object_trees=[get_object_tree(reply)]
        )
        answer = _asked(self._client.PushMessages, request)
        push = make_push_object_fn_protobuf(
            self._client.PushObject, self.node, int(reply.metadata.run_id), answer.session_id
        )
        objects = get_all_nested_objects(reply)
        try:
            guarded(lambda: push_objects(objects, push, object_ids_to_push=set(answer.objects_to_push)))
        except ObjectPushError as error:
            raise AwayError(f"a reply was cut off: {error}") from error

    def interrupt(self) -> None:
        """Breaks off a pull that waits; it raises AwayError."""
        if self._tunnel.pull is not None:
            self._tunnel.pull.cancel()

    def close(self) -> None:
        """Closes Flower's client; the channel stays its owner's."""
        self._client.close()


def _parts(tree: ObjectTree) -> list[str]:
    """The names of a message's parts; raises RefusedError if they are more than any message of ours has."""
    names = [item.object_id for item in islice(iterate_object_tree(tree), _MOST_PARTS + 1)]
    if len(names) > _MOST_PARTS:
        raise RefusedError(f"a message has more than {_MOST_PARTS} parts")
    return names


def deadline(message: Message) -> float:
    """When nobody waits any more for the reply to a message, in seconds since 1970 by the coordinator's clock."""
    return message.metadata.created_at + message.metadata.ttl


def dated(reply: Message, message: Message) -> Message:
    """The reply with the date of the message that it answers: that is by the coordinator's clock, whatever ours says.

    Flower dates a reply by the clock here, and the SuperLink drops one that is from before its message or too late.
    """
    reply.metadata.created_at, reply.metadata.ttl = message.metadata.created_at, message.metadata.ttl
    return reply


def travelling(reply: Message) -> tuple[str, int]:
    """The SHA-256 of a reply as it is pushed, which names its parts by theirs, and the bytes of it and them."""
    parts = get_all_nested_objects(reply)
    return str(reply.object_id), sum(len(part.deflate()) for part in parts.values())


def to_bytes(message: Message) -> bytes:
    """A message whole, for the journal."""
    content: bytes = message_to_proto(message).SerializeToString()
    return content


def from_bytes(content: bytes) -> Message:
    """The message of these bytes; raises google.protobuf.message.DecodeError."""
    return message_from_proto(MessageProto.FromString(content))


def _public(key: ec.EllipticCurvePrivateKey) -> bytes:
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    return key.public_key().public_bytes(serialization.Encoding.PEM, form)


def _asked(call: Callable[[Any], Any], request: Any) -> Any:
    return guarded(lambda: call(request))


_LATER = frozenset(
    {
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.ABORTED,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.ALREADY_EXISTS,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.UNKNOWN,
    }
)


def guarded(call: Callable[[], Any]) -> Any:
    """Calls the gateway, and says of every failure of the way whether it is for now or for good.

    Raises AwayError or RefusedError.
    """
    try:
        return call()
    except grpc.FutureCancelledError as error:
        raise AwayError("the call was broken off") from error
    except grpc.RpcError as error:
        words = f"{error.details() or error.code().name}"
        raise (AwayError if error.code() in _LATER else RefusedError)(words) from error
    except ValueError as error:  # Flower's word for an answer that is not the message it must be
        raise AwayError(f"an answer cannot be read: {error}") from error
    except httpx.HTTPStatusError as error:
        told = FlowerError.from_json(error.response.text)
        words = told.message if told is not None else f"HTTP {error.response.status_code}"
        later = error.response.status_code >= 500 or error.response.status_code == httpx.codes.UNAUTHORIZED
        raise (AwayError if later else RefusedError)(words) from error
