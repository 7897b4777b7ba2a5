from __future__ import annotations

import queue
import threading
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from locum.common.proto import locum_pb2 as pb
from locum.common.proto import locum_pb2_grpc as rpc
from locum.server.gateway.hints import HEADER, Board, HintService

NODE, OTHER = 7, 8


def _parked(board: Board, node: int, seconds: float = 30.0) -> tuple[threading.Thread, threading.Event]:
    gone = threading.Event()
    thread = threading.Thread(target=board.await_message, args=(node, seconds, gone))
    thread.start()
    return thread, gone


def test_a_parked_pull_goes_on_when_its_node_has_a_message_and_not_for_another() -> None:
    board = Board()
    thread, _ = _parked(board, NODE)
    board.sent([OTHER])
    thread.join(0.2)
    assert thread.is_alive()
    board.sent([NODE])
    thread.join(10)
    assert not thread.is_alive()


def test_a_message_that_was_sent_before_the_pull_is_not_waited_for() -> None:
    board = Board()
    board.sent([NODE])
    board.await_message(NODE, 30.0, threading.Event())


def test_a_second_message_is_pulled_at_once_and_an_empty_pull_parks_the_next() -> None:
    board = Board()
    board.sent([NODE])
    board.sent([NODE])
    board.pulled(NODE, found=True)
    board.await_message(NODE, 30.0, threading.Event())
    board.pulled(NODE, found=False)
    thread, gone = _parked(board, NODE)
    thread.join(0.2)
    assert thread.is_alive()
    board.left(gone)
    thread.join(10)
    assert not thread.is_alive()


def test_a_caller_that_is_gone_frees_its_thread() -> None:
    board = Board()
    thread, gone = _parked(board, NODE)
    board.left(gone)
    thread.join(10)
    assert not thread.is_alive()


def test_an_engine_that_connects_again_is_told_what_was_completed_before() -> None:
    board = Board()
    board.completed("first")
    follower = board.follow()
    board.completed("second")
    assert [follower.get(timeout=5), follower.get(timeout=5)] == ["first", "second"]
    board.unfollow(follower)
    board.completed("third")
    assert follower.get(timeout=5) is None
    assert follower.empty()


@pytest.fixture
def hints() -> tuple[Board, int]:
    board = Board()
    server = grpc.server(ThreadPoolExecutor(4))
    rpc.add_HintsServicer_to_server(HintService(board, "secret"), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield board, port
    server.stop(0).wait()


def test_the_stream_carries_both_ways(hints: tuple[Board, int]) -> None:
    board, port = hints
    out: queue.SimpleQueue[pb.Sent] = queue.SimpleQueue()
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        stream = rpc.HintsStub(channel).Follow(iter(out.get, None), metadata=((HEADER, "secret"),))
        out.put(pb.Sent(nodes=[NODE]))
        board.await_message(NODE, 30.0, threading.Event())
        board.completed("reply")
        assert next(stream).reply_to == "reply"
        stream.cancel()


@pytest.mark.parametrize("metadata", [(), ((HEADER, "guess"),), ((HEADER, ""),)])
def test_nobody_follows_without_the_secret(hints: tuple[Board, int], metadata: tuple[tuple[str, str], ...]) -> None:
    _, port = hints
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        stream = rpc.HintsStub(channel).Follow(iter(()), metadata=metadata)
        with pytest.raises(grpc.RpcError) as refused:
            next(stream)
    assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
