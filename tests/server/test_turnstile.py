"""Callers that take threads and say nothing, against a real gRPC server that has few."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

import grpc
import pytest

from locum.common.proto import locum_pb2 as pb
from locum.common.proto.locum_pb2_grpc import BlobsStub, add_BlobsServicer_to_server
from locum.server.gateway.legible import Legible
from locum.server.gateway.turnstile import MOST_CALLS, Turnstile
from tests.server.counting import Counting
from tests.wire.federation import until

CALL = 20.0


@contextmanager
def serve(threads: int, patience: float) -> Iterator[int]:
    server = grpc.server(ThreadPoolExecutor(threads), interceptors=(Turnstile(patience=patience), Legible()))
    add_BlobsServicer_to_server(Counting(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield port
    finally:
        server.stop(None).wait()


class Silent:
    """Calls that are opened and never say what they want."""

    def __init__(self, port: int, stack: ExitStack) -> None:
        # Channels with equal options share a connection.
        options = [("grpc.use_local_subchannel_pool", 1)]
        self._channel = stack.enter_context(grpc.insecure_channel(f"127.0.0.1:{port}", options))
        self._over = threading.Event()
        stack.callback(self._over.set)

    def call(self, name: str) -> grpc.Future:
        opened = self._channel.stream_unary(f"/locum.v1.Blobs/{name}")
        return opened.future(iter(lambda: self._over.wait() and None, None), timeout=60)


def _code(call: grpc.Future) -> grpc.StatusCode:
    error = call.exception(CALL)
    assert isinstance(error, grpc.RpcError)
    return error.code()


def test_messages_pass_in_every_kind_of_call() -> None:
    with serve(4, 10.0) as port, grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = BlobsStub(channel)
        for _ in range(3 * MOST_CALLS):  # what has ended counts no more
            assert stub.Stat(pb.BlobKey(size=7)).have == 7
        assert stub.Put(iter([pb.PutChunk(data=b"abc"), pb.PutChunk(data=b"de")])).have == 5
        assert stub.Put(iter(())).have == 0
        assert len(list(stub.Get(pb.GetRequest(offset=3)))) == 3


def test_a_call_without_a_request_is_refused() -> None:
    with serve(4, 10.0) as port, grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        call = channel.stream_unary("/locum.v1.Blobs/Stat").future(iter(()), timeout=CALL)
        assert _code(call) is grpc.StatusCode.INVALID_ARGUMENT


def test_a_caller_has_so_many_calls_at_once_and_gets_them_back() -> None:
    with serve(4 * MOST_CALLS, 600.0) as port, ExitStack() as stack:
        callers = [Silent(port, stack) for _ in range(2)]
        calls = [caller.call("Stat") for caller in callers for _ in range(MOST_CALLS)]
        until(lambda: sum(call.done() for call in calls) == MOST_CALLS, CALL)
        assert {_code(call) for call in calls if call.done()} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
        for call in calls:
            call.cancel()
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            until(lambda: _stat(channel), CALL)


def _stat(channel: grpc.Channel) -> bool:
    """Whether a call is answered; one that is one too many is not."""
    call = BlobsStub(channel).Stat.future(pb.BlobKey(size=7), timeout=CALL)
    return call.exception() is None or _code(call) is not grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.mark.parametrize("name", ["Stat", "Put"])
def test_who_says_nothing_gives_way_to_who_calls_next(name: str) -> None:
    with serve(MOST_CALLS, 0.2) as port, ExitStack() as stack:
        silent = [Silent(port, stack).call(name) for _ in range(MOST_CALLS - 1)]
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            until(lambda: _stat(channel) and all(call.done() for call in silent), CALL)
        assert {_code(call) for call in silent} == {grpc.StatusCode.CANCELLED}
