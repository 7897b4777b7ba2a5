"""What the SuperLink, Flower's own program as it is started here, answers to whom."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
from flwr.proto.control_pb2 import StartRunRequest
from flwr.proto.runtime_pb2 import AcquireTaskRequest
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor, SuperExecAuthHttpInterceptor
from flwr.supercore.protobuf.client import ProtobufCall, ProtobufRequestContext
from flwr.supercore.routers.runtime.router import router as runtime_router
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.superlink.routers.control.router import router as control_router
from flwr.superlink.routers.fleet.router import router as fleet_router

from locum.common.errors import RunError
from locum.server import superlink
from locum.server.superlink import CONTROL_HEADER, Control, control_secret
from tests.wire.harm import SuperLink, listening, open_superlink

_TASK = "/flwr.proto.Runtime/AcquireTask"


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SuperLink]:
    with open_superlink(tmp_path_factory.mktemp("superlink")) as opened:
        yield opened


def _post(running: SuperLink, path: str, **headers: str) -> httpx.Response:
    """Calls from loopback over TLS, as any program of this machine can."""
    headers = {"content-type": "application/protobuf", **headers}
    return httpx.post(f"https://{superlink.address(running.config)}{path}", headers=headers, verify=_trust(running))


def _trust(running: SuperLink) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=str(running.home.superlink / "tls-ca.pem"))


def test_without_the_secret_every_control_and_fleet_path_answers_401_on_loopback_too(running: SuperLink) -> None:
    routes = [route.path for router in (control_router, fleet_router) for route in router.routes]
    assert {"/v1/control/start-run", "/v1/control/register-node", "/v1/fleet/pull-messages"} <= set(routes)
    odd = ["/", "/health", "/docs", "/openapi.json", "/v1", "/v1/runtime", "//v1/runtime/", "/V1/runtime/acquire-task"]
    for path in (*routes, *odd):
        for headers in ({}, {CONTROL_HEADER: ""}, {CONTROL_HEADER: "x" * 43}):
            answer = _post(running, path, **headers)
            assert (answer.status_code, answer.content) == (401, b""), path


def test_a_path_that_only_begins_like_the_runtimes_leads_to_no_other(running: SuperLink) -> None:
    for path in ("/v1/runtime/../control/list-nodes", "/v1/runtime/%2e%2e/control/list-nodes", "/v1/runtime//"):
        assert _status(running, path) in {401, 404}, path


def _status(running: SuperLink, path: str) -> int:
    """The status of a call whose path is sent as it is; a client would tidy it up."""
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/protobuf\r\nContent-Length: 0\r\n\r\n"
    with (
        socket.create_connection(("127.0.0.1", running.config.superlink_port)) as plain,
        _trust(running).wrap_socket(plain, server_hostname="127.0.0.1") as raw,
    ):
        raw.sendall(head.encode())
        return int(raw.recv(64).split()[1])


def test_with_the_secret_the_control_api_answers(running: SuperLink) -> None:
    control = Control(running.home, running.config)
    assert control.nodes() == {}
    with pytest.raises(RunError, match="refused"):
        control._ask(control._client.StartRun, StartRunRequest())
    control.close()


def test_a_secret_twice_is_no_secret(running: SuperLink) -> None:
    secret = control_secret(running.home)
    with httpx.Client(verify=_trust(running), headers=[(CONTROL_HEADER, secret), (CONTROL_HEADER, secret)]) as client:
        answer = client.post(f"https://127.0.0.1:{running.config.superlink_port}/v1/control/list-nodes")
    assert answer.status_code == 401


def test_a_task_is_given_only_to_who_has_the_superexecs_secret(running: SuperLink) -> None:
    own = running.home.superlink
    right = (own / "superexec.secret").read_bytes()
    assert _acquired(running, right) == 200
    for wrong in (None, b"x" * 32, control_secret(running.home).encode()):
        assert _acquired(running, wrong) in {401, 403}


def test_no_path_of_the_runtime_api_answers_without_its_own_secret(running: SuperLink) -> None:
    version: dict[str, str] = {}
    assert _acquired(running, None, version) in {401, 403}
    for route in runtime_router.routes:
        assert _post(running, route.path, **version).status_code in {401, 403}, route.path


def test_what_a_task_could_start_is_closed_whatever_token_it_has(running: SuperLink) -> None:
    closed = {route.path for route in runtime_router.routes} - superlink._OPEN
    assert {"/v1/runtime/start-automation", "/v1/runtime/create-task"} <= closed
    assert len(superlink._OPEN - {route.path for route in runtime_router.routes}) == 0
    for path in closed:
        answer = _post(running, path)
        assert (answer.status_code, answer.content) == (401, b""), path


def test_loopback_is_reached_past_a_proxy_of_the_machine(running: SuperLink, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "intranet")
    control = Control(running.home, running.config)
    try:
        assert control.nodes() == {}
    finally:
        control.close()
    for _ in range(2):
        assert superlink.environment(running.home)["no_proxy"] == "intranet,127.0.0.1,localhost"


def test_it_listens_on_loopback_and_nowhere_else(running: SuperLink) -> None:
    assert listening(running.number) == {f"127.0.0.1:{running.config.superlink_port}"}


def _acquired(running: SuperLink, secret: bytes | None, seen: dict[str, str] | None = None) -> int:
    """Asks for a task as a SuperExec does; returns the status, and leaves the headers of its version in `seen`."""
    interceptors: list[Any] = [
        RuntimeVersionHttpInterceptor(component_name="SuperExec"),
        _Note({} if seen is None else seen),
    ]
    if secret is not None:
        protected = frozenset({_TASK})
        interceptors.append(SuperExecAuthHttpInterceptor(master_secret=secret, protected_methods=protected))
    client = RuntimeHttpClient.from_server_address(
        server_address=superlink.address(running.config),
        insecure=False,
        root_certificates=(running.home.superlink / "tls-ca.pem").read_bytes(),
        interceptors=interceptors,
    )
    try:
        client.AcquireTask(AcquireTaskRequest())
    except httpx.HTTPStatusError as error:
        return error.response.status_code
    finally:
        client.close()
    return 200


@dataclass(frozen=True)
class _Note:
    """Notes the headers of a call."""

    seen: dict[str, str]

    def intercept(self, context: ProtobufRequestContext, call_next: ProtobufCall) -> httpx.Response:
        self.seen.update({name: value for name, value in context.request.headers.items() if name.startswith("flwr-")})
        return call_next(context)
