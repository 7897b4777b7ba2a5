"""A service of each kind of call."""

from __future__ import annotations

from collections.abc import Iterator

from locum.common.proto import locum_pb2 as pb
from locum.common.proto.locum_pb2_grpc import BlobsServicer


class Counting(BlobsServicer):  # type: ignore[misc]
    """Answers with how much it was sent."""

    def Stat(self, request: pb.BlobKey, context: object) -> pb.BlobState:  # noqa: N802
        return pb.BlobState(have=request.size)

    def Put(self, requests: Iterator[pb.PutChunk], context: object) -> pb.BlobState:  # noqa: N802
        return pb.BlobState(have=sum(len(chunk.data) for chunk in requests))

    def Get(self, request: pb.GetRequest, context: object) -> Iterator[pb.Chunk]:  # noqa: N802
        yield from (pb.Chunk(data=b"x") for _ in range(request.offset))
