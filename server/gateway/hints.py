"""Hints instead of polls: who has a message waiting, and which replies are complete.

The round engine tells the gateway which nodes have a message; the gateway then lets their parked pulls go on. The
gateway tells the engine which replies the SuperLink holds whole. A hint is never needed for a result to be right: a
parked pull goes on by itself after a while, and an engine that connects again is told the replies of the last hour.
"""

from __future__ import annotations

import hmac
import queue
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Iterator

import grpc

from locum.common.proto import locum_pb2 as pb
from locum.common.proto import locum_pb2_grpc as rpc

HEADER = "locum-hints"
_REMEMBERED = 10_000


class Board:
    """What is waiting and what is complete; shared by the Fleet tunnel and the engines' hint streams."""

    def __init__(self) -> None:
        self._waiting: Counter[int] = Counter()
        self._complete: OrderedDict[str, None] = OrderedDict()
        self._followers: list[queue.SimpleQueue[str | None]] = []
        self._changed = threading.Condition()

    def sent(self, nodes: list[int]) -> None:
        """These nodes have a message waiting at the SuperLink."""
        with self._changed:
            self._waiting.update(nodes)
            self._changed.notify_all()

    def await_message(self, node: int, seconds: float, gone: threading.Event) -> None:
        """Returns when the node has a message, or after `seconds`, or when its caller is gone."""
        until = time.monotonic() + seconds
        with self._changed:
            while not self._waiting[node] and not gone.is_set() and (left := until - time.monotonic()) > 0:
                self._changed.wait(left)

    def pulled(self, node: int, *, found: bool) -> None:
        """The node has pulled: it took one message, or there was none."""
        with self._changed:
            self._waiting[node] = max(self._waiting[node] - 1, 0) if found else 0

    def left(self, gone: threading.Event) -> None:
        """A parked caller is gone: wakes it, so that its thread is free again."""
        gone.set()
        with self._changed:
            self._changed.notify_all()

    def completed(self, message_id: str) -> None:
        """The reply to this message is complete."""
        with self._changed:
            self._complete[message_id] = None
            if len(self._complete) > _REMEMBERED:
                self._complete.popitem(last=False)
            for follower in self._followers:
                follower.put(message_id)

    def follow(self) -> queue.SimpleQueue[str | None]:
        """A queue that gets every completed reply, beginning with those that are remembered."""
        follower: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        with self._changed:
            for message_id in self._complete:
                follower.put(message_id)
            self._followers.append(follower)
        return follower

    def unfollow(self, follower: queue.SimpleQueue[str | None]) -> None:
        """Ends a queue."""
        with self._changed:
            self._followers.remove(follower)
        follower.put(None)


class HintService(rpc.HintsServicer):
    """The stream between one round engine and the gateway; loopback only, and only with the secret."""

    def __init__(self, board: Board, secret: str) -> None:
        self._board, self._secret = board, secret

    def Follow(self, request_iterator: Iterator[pb.Sent], context: grpc.ServicerContext) -> Iterator[pb.Replied]:  # noqa: N802
        """Takes in who has a message; sends out which replies are complete."""
        given = dict(context.invocation_metadata()).get(HEADER, "")
        if not hmac.compare_digest(str(given), self._secret):
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "the hints need the coordinator's secret")
        follower = self._board.follow()
        context.add_callback(lambda: self._board.unfollow(follower))
        threading.Thread(target=self._take, args=(request_iterator,), daemon=True).start()
        while (message_id := follower.get()) is not None:
            yield pb.Replied(reply_to=message_id)

    def _take(self, sent: Iterator[pb.Sent]) -> None:
        try:
            for hint in sent:
                self._board.sent(list(hint.nodes))
        except grpc.RpcError:
            return  # the engine is gone; it tells again what it sent when it is back
