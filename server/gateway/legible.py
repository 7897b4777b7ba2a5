"""Bytes that are no message are refused by us, and not by gRPC.

When gRPC for Python (1.85) cannot parse a request it answers INTERNAL, then tries to answer a second time and keeps
the call's state for ever: 15 KiB for every such request, from whoever may call at all. Here such bytes become a request
like any other, which is answered with INVALID_ARGUMENT before a service sees it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final

import grpc
from google.protobuf.message import DecodeError

_ILLEGIBLE: Final = object()


class Legible:
    """A `grpc.ServerInterceptor`: give it to `grpc.server(…, interceptors=(Legible(),))`."""

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], grpc.RpcMethodHandler | None],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler | None:
        """The method's handler, with a reading of its requests that cannot fail."""
        handler = continuation(handler_call_details)
        return None if handler is None else _tolerant(handler)


def _tolerant(handler: grpc.RpcMethodHandler) -> grpc.RpcMethodHandler:
    kind = f"{_way(handler.request_streaming)}_{_way(handler.response_streaming)}"
    answer = getattr(handler, kind)
    checked = _each if handler.request_streaming else _one
    make = getattr(grpc, f"{kind}_rpc_method_handler")
    return make(
        lambda request, context: answer(checked(request, context), context),
        request_deserializer=_reader(handler.request_deserializer),
        response_serializer=handler.response_serializer,
    )


def _way(streaming: bool) -> str:
    return "stream" if streaming else "unary"


def _reader(read: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    def tolerant(content: bytes) -> Any:
        try:
            return read(content)
        except DecodeError:
            return _ILLEGIBLE

    return tolerant


def _one(request: Any, context: grpc.ServicerContext) -> Any:
    if request is _ILLEGIBLE:
        context.abort(grpc.StatusCode.INVALID_ARGUMENT, "this is no message of this call")
    return request


def _each(requests: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Any]:
    return (_one(request, context) for request in requests)
