"""Bytes that are no message, over each kind of call, against a real gRPC server."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from locum.common.proto import locum_pb2 as pb
from locum.common.proto.locum_pb2_grpc import BlobsStub, add_BlobsServicer_to_server
from locum.server.gateway.legible import Legible
from tests.server.counting import Counting

GARBAGE = b"\xff\xff\xff"


@pytest.fixture
def channel() -> Iterator[grpc.Channel]:
    server = grpc.server(ThreadPoolExecutor(4), interceptors=(Legible(),))
    add_BlobsServicer_to_server(Counting(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with grpc.insecure_channel(f"127.0.0.1:{port}") as opened:
        yield opened
    server.stop(None).wait()


def test_messages_pass_in_every_kind_of_call(channel: grpc.Channel) -> None:
    stub = BlobsStub(channel)
    assert stub.Stat(pb.BlobKey(size=7)).have == 7
    assert stub.Put(iter([pb.PutChunk(data=b"abc"), pb.PutChunk(data=b"de")])).have == 5
    assert len(list(stub.Get(pb.GetRequest(offset=3)))) == 3


def test_bytes_that_are_no_message_are_refused_in_every_kind_of_call(channel: grpc.Channel) -> None:
    good = pb.PutChunk(data=b"abc").SerializeToString()
    calls = [
        lambda: channel.unary_unary("/locum.v1.Blobs/Stat")(GARBAGE, timeout=10),
        lambda: channel.stream_unary("/locum.v1.Blobs/Put")(iter([good, GARBAGE, good]), timeout=10),
        lambda: list(channel.unary_stream("/locum.v1.Blobs/Get")(GARBAGE, timeout=10)),
    ]
    for call in calls * 3:
        with pytest.raises(grpc.RpcError) as refused:
            call()  # type: ignore[no-untyped-call]
        assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert BlobsStub(channel).Stat(pb.BlobKey(size=7)).have == 7


def test_a_call_that_there_is_not_stays_unknown(channel: grpc.Channel) -> None:
    with pytest.raises(grpc.RpcError) as refused:
        channel.unary_unary("/locum.v1.Blobs/Nothing")(b"", timeout=10)
    assert refused.value.code() == grpc.StatusCode.UNIMPLEMENTED
