"""The Fleet tunnel: carries an agent's calls to the SuperLink's `/v1/fleet/*`, and to nothing else.

Rules:
  * The caller's certificate must be that of an enrolled site, and the node key in the call must be the certificate's.
  * Only the calls of a registered node pass; a site cannot register or remove a node, and no other path is reached.
    Of the headers those pass that prove the node, each once.
  * A site pushes replies of its own node, one at a time, in the few objects that an agent makes of one. Flower itself
    asks neither whose node a message names nor how its objects hang together.
  * A pull waits here until there is something to pull, one of a site at a time. Idle sites cost the SuperLink nothing
    but a heartbeat.
  * What a message to many sites has in common is asked for once: a site gets parts of its own message only, whoever
    pulled them first.
  * Flower gives a message away once. Here it is given again until the agent has confirmed it: what was on its way to an
    agent that died, or over a line that was cut, is not lost with it.
  * A site is one agent: a second one with the same key is refused while the first is alive.

Flower's private parts used: the paths, header names and protobuf messages of its Fleet API (flwr 1.41).
"""

from __future__ import annotations

import base64
import binascii
import logging
import re
import ssl
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import httpx
from flwr.common.constant import TIMESTAMP_HEADER
from flwr.proto.fleet_pb2 import PullMessagesRequest, PullMessagesResponse, PushMessagesRequest, PushMessagesResponse
from flwr.proto.message_pb2 import (
    ObjectTree,
    PullObjectRequest,
    PullObjectResponse,
    PushObjectRequest,
    PushObjectResponse,
)
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from google.protobuf.message import DecodeError

from locum.common.errors import RunError
from locum.common.proto import locum_pb2 as pb
from locum.common.proto import locum_pb2_grpc as rpc
from locum.server.gateway.hints import Board
from locum.server.home import Home, ServerConfig
from locum.server.superlink import CONTROL_HEADER, address, control_secret

log = logging.getLogger("locum.gateway")

_PREFIX = "/v1/fleet/"
_ACTIVATE, _PULL = _PREFIX + "activate-node", _PREFIX + "pull-messages"
_PUSH, _PUSH_OBJECT = _PREFIX + "push-messages", _PREFIX + "push-object"
_PULL_OBJECT, _CONFIRM = _PREFIX + "pull-object", _PREFIX + "confirm-message-received"
#: The calls by which an agent takes the message that a pull has named.
_TAKING = frozenset({_CONFIRM, _PULL_OBJECT, *(_PREFIX + name for name in ("get-run", "get-fab"))})
_ALLOWED = frozenset(
    {
        *(_ACTIVATE, _PULL, _PUSH, _PUSH_OBJECT, *_TAKING),
        *(_PREFIX + name for name in ("deactivate-node", "send-node-heartbeat")),
    }
)
_CARRIED = frozenset(
    {"content-type", "accept", FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER, TIMESTAMP_HEADER}
)
_MAX_BODY = 1 << 20
#: A reply is a message, its record, and the record's one entry.
_MOST_OBJECTS = 3
_OBJECT = re.compile(r"[0-9a-f]{64}")
_PARKED_SECONDS = 50.0
_REMEMBERED = 10_000
#: Parts of messages that are kept for other sites; each is at most `_MAX_BODY`.
_MOST_PARTS = 64
_MOST_AGAIN = 3
_TIMEOUT = httpx.Timeout(30, connect=5)


@dataclass
class _Upload:
    """A reply on its way: the message that it answers, and the objects that are still to come."""

    reply_to: str
    missing: set[str] = field(default_factory=set)


class Uploads:
    """Which replies are complete, from what passes through the tunnel."""

    def __init__(self, board: Board) -> None:
        self._board = board
        self._open: dict[str, _Upload] = {}
        self._lock = threading.Lock()

    def pushed(self, request: bytes, answer: bytes) -> None:
        """A reply was announced; its objects follow."""
        asked, told = PushMessagesRequest.FromString(request), PushMessagesResponse.FromString(answer)
        for message in asked.messages_list:
            upload = _Upload(message.metadata.reply_to_message_id, set(told.objects_to_push))
            self._keep(told.session_id, upload)

    def stored(self, request: bytes, answer: bytes) -> None:
        """One object of a reply has arrived."""
        asked, told = PushObjectRequest.FromString(request), PushObjectResponse.FromString(answer)
        with self._lock:
            upload = self._open.get(asked.session_id)
            if upload is None or not told.stored:
                return
            upload.missing.discard(asked.object_id)
        self._keep(asked.session_id, upload)

    def _keep(self, session: str, upload: _Upload) -> None:
        with self._lock:
            others = {name: other for name, other in self._open.items() if other.reply_to != upload.reply_to}
            self._open = dict(list(others.items())[-_REMEMBERED:])
            if upload.missing:
                self._open[session] = upload
                return
            self._open.pop(session, None)
        self._board.completed(upload.reply_to)


class Parts:
    """Parts of messages as the SuperLink gave them, by their digest, for the sites whose message has the same part."""

    def __init__(self) -> None:
        self._offered: dict[str, frozenset[str]] = {}
        self._kept: OrderedDict[str, bytes] = OrderedDict()
        self._lock = threading.Lock()

    def offer(self, site: str, answer: bytes) -> None:
        """The site gets this answer to a pull, and may ask for the parts that it names."""
        trees = PullMessagesResponse.FromString(answer).message_object_trees
        with self._lock:
            self._offered[site] = frozenset(name for tree in trees for name in _names(tree))

    def known(self, site: str, body: bytes) -> bytes | None:
        """The answer to the site's call for a part, if it is here and the part is of the site's message."""
        name = PullObjectRequest.FromString(body).object_id
        with self._lock:
            return self._kept.get(name) if name in self._offered.get(site, ()) else None

    def keep(self, body: bytes, answer: bytes) -> None:
        """The SuperLink has given a part."""
        if not PullObjectResponse.FromString(answer).object_available or len(answer) > _MAX_BODY:
            return
        with self._lock:
            self._kept[PullObjectRequest.FromString(body).object_id] = answer
            if len(self._kept) > _MOST_PARTS:
                self._kept.popitem(last=False)


class Unconfirmed:
    """The message that each site was given last, until it confirms it: one file a site, so that it outlives us."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._again: Counter[str] = Counter()
        folder.mkdir(exist_ok=True)

    def given(self, site: str, answer: bytes) -> None:
        """The site is about to get this answer to a pull. On a full disk it gets it once, as Flower gives it."""
        beside = self._folder / f".{site}.tmp"
        try:
            beside.write_bytes(answer)
            beside.replace(self._folder / site)
        except OSError as error:
            log.warning("what %s is given cannot be kept: %s", site, error.strerror)
        self._again[site] = 0

    def again(self, site: str) -> bytes | None:
        """The answer that the site has not confirmed; a few times only, for its message may have become unreadable."""
        try:
            answer = (self._folder / site).read_bytes()
        except OSError:
            return None
        self._again[site] += 1
        if self._again[site] > _MOST_AGAIN or _is_over(answer):
            self.settled(site)
            return None
        return answer

    def settled(self, site: str) -> None:
        """The site has its message, or can never take it."""
        (self._folder / site).unlink(missing_ok=True)


def _is_over(answer: bytes) -> bool:
    """Whether nobody waits any more for the reply to a message that was given."""
    try:
        told = PullMessagesResponse.FromString(answer).messages_list
    except DecodeError:
        return True
    return all(time.time() > message.metadata.created_at + message.metadata.ttl for message in told)


class FleetService(rpc.FleetServicer):
    """The gRPC service of the tunnel.

    Args:
        home: the coordinator's folder.
        config: its configuration.
        board: who has a message, and which replies are complete.
        admit: the site behind a call and its node key in PEM, or it aborts the call (UNAUTHENTICATED).
        claim: whether this instance of a site's agent is the one that counts.
        register: makes the SuperLink know a site's node key; raises RunError.
    """

    def __init__(
        self,
        home: Home,
        config: ServerConfig,
        *,
        board: Board,
        admit: Callable[[grpc.ServicerContext], tuple[str, bytes]],
        claim: Callable[[str, str], bool],
        register: Callable[[str, bytes], None],
    ) -> None:
        self._board, self._uploads = board, Uploads(board)
        self._admit, self._claim, self._register = admit, claim, register
        self._unconfirmed = Unconfirmed(home.superlink / "unconfirmed")
        self._parts = Parts()
        self._parked: dict[str, threading.Event] = {}
        self._lock = threading.Lock()
        trust = ssl.create_default_context(cafile=str(home.superlink / "tls-ca.pem"))
        limits = httpx.Limits(max_connections=32, max_keepalive_connections=32, keepalive_expiry=60)
        self._client = httpx.Client(
            base_url=f"https://{address(config)}",
            headers={CONTROL_HEADER: control_secret(home)},
            verify=trust,
            timeout=_TIMEOUT,
            limits=limits,
            trust_env=False,
        )

    def Call(self, request: pb.FleetCall, context: grpc.ServicerContext) -> pb.FleetAnswer:  # noqa: N802
        """One call of an agent to the Fleet API."""
        site, key = self._admit(context)
        _check(request, key, context)
        if not self._claim(site, request.instance):
            context.abort(grpc.StatusCode.ALREADY_EXISTS, f"another agent of {site} is at work; stop it first")
        try:
            if request.path == _ACTIVATE:
                self._register(site, key)
            elif request.path == _PUSH:
                _check_reply(PushMessagesRequest.FromString(request.body), context)
            elif request.path == _PULL and (body := self._waited(site, request.body, context)) is not None:
                self._parts.offer(site, body)
                return pb.FleetAnswer(status=httpx.codes.OK, body=body)
            elif request.path == _PULL_OBJECT and (body := self._parts.known(site, request.body)) is not None:
                return pb.FleetAnswer(status=httpx.codes.OK, body=body)
            answer = self._forward(request)
            if answer.status_code == httpx.codes.OK:
                self._note(site, request, answer.content)
            if _settles(request.path, answer.status_code):
                self._unconfirmed.settled(site)
        except DecodeError:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the body is not what this path takes")
        except (httpx.TransportError, RunError):
            context.abort(grpc.StatusCode.UNAVAILABLE, "the coordinator's SuperLink does not answer; try again")
        return pb.FleetAnswer(status=answer.status_code, body=answer.content)

    def _waited(self, site: str, body: bytes, context: grpc.ServicerContext) -> bytes | None:
        """Waits until there is something to pull; returns what was given already, if it must be given again."""
        given = self._unconfirmed.again(site)
        if given is not None:
            return given
        self._park(site, body, context)
        return self._unconfirmed.again(site)

    def _park(self, site: str, body: bytes, context: grpc.ServicerContext) -> None:
        """Waits for a message; a pull of the same site that waits already goes on, whoever still wants it."""
        gone, node = threading.Event(), _node_of(body)
        with self._lock:
            before, self._parked[site] = self._parked.get(site), gone
        if before is not None:
            self._board.left(before)
        context.add_callback(lambda: self._board.left(gone))
        self._board.await_message(node, _PARKED_SECONDS, gone)

    def _forward(self, request: pb.FleetCall) -> httpx.Response:
        headers = {name.lower(): value for name, value in request.headers.items() if name.lower() in _CARRIED}
        return self._client.post(request.path, content=request.body, headers=headers)

    def _note(self, site: str, request: pb.FleetCall, answer: bytes) -> None:
        if request.path == _PULL:
            found = bool(PullMessagesResponse.FromString(answer).messages_list)
            self._board.pulled(_node_of(request.body), found=found)
            if found:
                self._unconfirmed.given(site, answer)
                self._parts.offer(site, answer)
                self._board.left(self._parked[site])  # if that is another pull by now, the message is for that one
        elif request.path == _PUSH:
            self._uploads.pushed(request.body, answer)
        elif request.path == _PUSH_OBJECT:
            self._uploads.stored(request.body, answer)
        elif request.path == _PULL_OBJECT:
            self._parts.keep(request.body, answer)

    def close(self) -> None:
        """Closes the connections to the SuperLink."""
        self._client.close()


def _settles(path: str, status: int) -> bool:
    """Whether a site that was answered so has confirmed its message, or can never take it (its run has ended)."""
    refused = httpx.codes.is_client_error(status) and status != httpx.codes.UNAUTHORIZED
    return (path == _CONFIRM and status == httpx.codes.OK) or (path in _TAKING and refused)


def _check(request: pb.FleetCall, key: bytes, context: grpc.ServicerContext) -> None:
    if request.path not in _ALLOWED:
        context.abort(grpc.StatusCode.PERMISSION_DENIED, "the tunnel leads to the calls of a node and nowhere else")
    if len(request.body) > _MAX_BODY:
        context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "a call is at most 1 MiB; tensors travel as blobs")
    given = [value for name, value in request.headers.items() if name.lower() == FLEET_HTTP_PUBLIC_KEY_HEADER.lower()]
    if len(given) != 1 or _decoded(given[0]) != key:
        context.abort(grpc.StatusCode.PERMISSION_DENIED, "the node key is not that of the site's certificate")
    if not all(value.isascii() and value.isprintable() for value in request.headers.values()):
        context.abort(grpc.StatusCode.INVALID_ARGUMENT, "a header is printable ASCII")


def _check_reply(asked: PushMessagesRequest, context: grpc.ServicerContext) -> None:
    if not _is_reply(asked):
        context.abort(grpc.StatusCode.INVALID_ARGUMENT, "this is no reply as an agent makes one")


def _is_reply(asked: PushMessagesRequest) -> bool:
    """Whether one reply of the caller's own node is pushed, and its tree is a tree."""
    if (len(asked.messages_list), len(asked.message_object_trees)) != (1, 1):
        return False
    said, names = asked.messages_list[0].metadata, list(_names(asked.message_object_trees[0]))
    whose = said.src_node_id == asked.node.node_id and said.message_id == names[0]
    named = all(_OBJECT.fullmatch(name) for name in (said.reply_to_message_id, *names))
    return whose and named and len(names) == len(set(names)) <= _MOST_OBJECTS


def _names(tree: ObjectTree) -> Iterator[str]:
    yield tree.object_id
    for child in tree.children:
        yield from _names(child)


def _node_of(body: bytes) -> int:
    return int(PullMessagesRequest.FromString(body).node.node_id)


def _decoded(value: str) -> bytes | None:
    try:
        return base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError):
        return None
