"""How many calls a caller may have at once, and how long it may keep one of our threads waiting for its request.

gRPC for Python gives a call a thread before its request has arrived, and the threads are all there is. So:
  * A certificate has `MOST_CALLS` calls at once, over all services and connections, revoked or not: more are refused.
  * A call whose request has not come within `PATIENCE_SECONDS` is ended by whoever calls next.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import grpc

#: A pull, a report, a few blobs, and as many that died on the line and are not noticed yet.
MOST_CALLS = 24
PATIENCE_SECONDS = 10.0


class Turnstile:
    """A `grpc.ServerInterceptor`, the first of its server.

    Args:
        patience: seconds that a request may take to come.
    """

    def __init__(self, *, patience: float = PATIENCE_SECONDS) -> None:
        self._patience = patience
        self._calls: Counter[bytes] = Counter()
        self._silent: dict[grpc.ServicerContext, float] = {}
        self._lock = threading.Lock()

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], grpc.RpcMethodHandler | None],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler | None:
        """The method's handler, whose request is waited for here and not by gRPC."""
        handler = continuation(handler_call_details)
        return None if handler is None else self._counted(handler)

    def _counted(self, handler: grpc.RpcMethodHandler) -> grpc.RpcMethodHandler:
        asked = self._each if handler.request_streaming else self._one
        answer = handler.stream_unary or handler.unary_unary or handler.stream_stream or handler.unary_stream

        def one(requests: Iterator[Any], context: grpc.ServicerContext) -> Any:
            with self._passed(context):
                return answer(asked(requests, context), context)

        def many(requests: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Any]:
            with self._passed(context):
                yield from answer(asked(requests, context), context)

        form = (handler.request_deserializer, handler.response_serializer)
        if handler.response_streaming:
            return grpc.stream_stream_rpc_method_handler(many, *form)
        return grpc.stream_unary_rpc_method_handler(one, *form)

    @contextmanager
    def _passed(self, context: grpc.ServicerContext) -> Iterator[None]:
        """Counts a call while it goes on; ends it at once if its caller has too many."""
        caller = b"".join(context.auth_context().get("x509_pem_cert", ()))
        self._end_silent()
        with self._lock:
            free = self._calls[caller] < MOST_CALLS
            self._calls[caller] += free
        if not free:
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, f"{MOST_CALLS} calls with this certificate are open")
        try:
            yield
        finally:
            with self._lock:
                self._calls[caller] -= 1
                if not self._calls[caller]:
                    del self._calls[caller]

    def _end_silent(self) -> None:
        now = time.monotonic()
        with self._lock:
            overdue = [context for context, since in self._silent.items() if now - since > self._patience]
        for context in overdue:
            context.cancel()

    def _one(self, requests: Iterator[Any], context: grpc.ServicerContext) -> Any:
        found = self._first(requests, context)
        if found is None:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the call came without a request")
        return found

    def _each(self, requests: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Any]:
        found = self._first(requests, context)
        if found is not None:
            yield found
            yield from requests

    def _first(self, requests: Iterator[Any], context: grpc.ServicerContext) -> Any:
        """The first message of a call, which may be ended while it does not come; None if there is none."""
        with self._lock:
            self._silent[context] = time.monotonic()
        try:
            return next(requests, None)
        finally:
            with self._lock:
                del self._silent[context]
