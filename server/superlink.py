"""Flower's SuperLink, as it runs here: its own program on loopback, with a lock on what it leaves open.

In open-source Flower the Control API asks nobody who he is: whoever reaches the port starts runs and thereby code. So
the program is started through its own extension hook with one middleware more: every path needs the coordinator's
control secret in a header, but those of the Runtime API by which SuperExec and a ServerApp do their work; these have
Flower's own secret and task tokens, and none of them starts anything. Flower is not changed.

The other half of this module is what the coordinator asks of it: start and stop a run, register a node.
Flower's private parts used (flwr 1.41): the extension hook, the Control API's client, the program's entry point, and
the patience with which its grid waits for the objects of a reply.
"""

from __future__ import annotations

import hmac
import os
import ssl
import sys
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import httpx
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.error import FlowerError
from flwr.supercore.protobuf.client import ProtobufCall, ProtobufClientInterceptor, ProtobufRequestContext

from locum.common.errors import RunError
from locum.server.home import Home, ServerConfig
from locum.server.parent import PARENT, end_with_parent

if TYPE_CHECKING:
    from starlette.middleware import Middleware

CONTROL_HEADER = "locum-control"
_HOOK = "flwr.ee.superlink.extensions"
#: What SuperExec and a ServerApp call. The rest of the Runtime API can give a task's token to other code.
_OPEN = frozenset(
    f"/v1/runtime/{name}"
    for name in (
        *("acquire-task", "send-task-heartbeat", "pull-task-input", "push-task-output", "push-logs", "get-nodes"),
        *("push-messages", "pull-messages", "push-object", "pull-object", "confirm-message-received"),
    )
)

_Scope = MutableMapping[str, Any]
_Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
_Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
_App = Callable[[_Scope, _Receive, _Send], Awaitable[None]]


# --- the lock


class ControlLock:
    """ASGI middleware: answers 401 to every HTTP call that is not open to all and does not carry the secret."""

    def __init__(self, app: _App, secret: bytes) -> None:
        self._app, self._secret = app, secret

    async def __call__(self, scope: _Scope, receive: _Receive, send: _Send) -> None:
        """Lets a call pass, or answers it."""
        if scope["type"] == "lifespan" or self._may_pass(scope):
            await self._app(scope, receive, send)
            return
        await send({"type": "http.response.start", "status": 401, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    def _may_pass(self, scope: _Scope) -> bool:
        if scope["type"] != "http":
            return False
        given = [value for name, value in scope["headers"] if name == CONTROL_HEADER.encode()]
        return scope["path"] in _OPEN or (len(given) == 1 and hmac.compare_digest(given[0], self._secret))


def _extension(secret: bytes) -> ModuleType:
    from starlette.middleware import Middleware

    def get_middleware() -> tuple[Middleware, ...]:
        return (Middleware(ControlLock, secret=secret),)

    module = ModuleType(_HOOK)
    module.__dict__["get_middleware"] = get_middleware
    return module


def main() -> None:
    """`python -m locum.server.superlink SECRET-FILE ARGUMENTS…`: flower-superlink with the lock."""
    from flwr.superlink.cli.flower_superlink import flower_superlink

    end_with_parent()
    secret = Path(sys.argv.pop(1)).read_bytes()
    sys.modules[_HOOK] = _extension(secret)
    sys.argv[0] = "flower-superlink"
    flower_superlink()


# --- how it is started


def command(home: Home, config: ServerConfig) -> list[str]:
    """The command line of the SuperLink: loopback, process isolation, a secret, SQLite, registered nodes only."""
    own = home.superlink
    return [
        *(sys.executable, "-m", "locum.server.superlink", str(own / "control.secret")),
        *("--host", "127.0.0.1", "--port", str(config.superlink_port)),
        *("--ssl-certfile", str(own / "tls.pem"), "--ssl-keyfile", str(own / "tls.key")),
        *("--ssl-ca-certfile", str(own / "tls-ca.pem")),
        *("--isolation", "process", "--superexec-auth-secret-file", str(own / "superexec.secret")),
        *("--database", str(own / "state.sqlite"), "--enable-supernode-auth"),
        "--disable-runtime-dependency-installation",
    ]


def executor_command(home: Home, config: ServerConfig, parent: int) -> list[str]:
    """The command line of the SuperExec, which starts the ServerApp of every run; it ends with its `parent`."""
    own = home.superlink
    return [
        str(Path(sys.executable).with_name("flower-superexec")),
        *("--runtime-api-address", address(config), "--root-certificates", str(own / "tls-ca.pem")),
        *("--superexec-auth-secret-file", str(own / "superexec.secret"), "--parent-pid", str(parent)),
    ]


def environment(home: Home) -> dict[str, str]:
    """What the processes that this one starts find in their environment."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return {
        **os.environ,
        "PATH": path,
        "FLWR_HOME": str(home.superlink),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.5",
        "LOCUM_SERVER_HOME": str(home.path),
        **_past_the_proxy(),
        "MALLOC_ARENA_MAX": "1",  # glibc gives each thread memory of its own and keeps it; this does not cost time here
        PARENT: str(os.getpid()),
    }


def _past_the_proxy() -> dict[str, str]:
    """Keeps calls to loopback off the machine's HTTP proxy, in processes whose clients are Flower's."""
    given = (os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or "").split(",")
    hosts = dict.fromkeys(filter(None, (*given, "127.0.0.1", "localhost")))
    return dict.fromkeys(("no_proxy", "NO_PROXY"), ",".join(hosts))


def address(config: ServerConfig) -> str:
    """Where the SuperLink listens."""
    return f"127.0.0.1:{config.superlink_port}"


# --- how a ServerApp reads from it


def wait_for_objects(seconds: float) -> None:
    """Sets how long Flower's grid in this process waits for the objects of a reply; it would wait for two hours."""
    from flwr.supercore.inflatable.inflatable_utils import pull_objects

    defaults = pull_objects.__kwdefaults__ or {}
    defaults |= {"max_time": seconds, "initial_backoff": seconds / 20}


# --- what the coordinator asks of it


@dataclass(frozen=True)
class _Secret:
    """Adds the control secret to every call."""

    value: str

    def intercept(self, context: ProtobufRequestContext, call_next: ProtobufCall) -> httpx.Response:
        context.request.headers[CONTROL_HEADER] = self.value
        return call_next(context)


def control_secret(home: Home) -> str:
    """The secret that opens the Control and Fleet API; raises OSError."""
    return (home.superlink / "control.secret").read_text()


class _Client(ControlHttpClient):
    """Flower's client of the Control API, which would go to loopback by a proxy that the environment names."""

    def __init__(self, url: str, root: Path, interceptors: tuple[ProtobufClientInterceptor, ...]) -> None:
        self._base_url, self._interceptors, self._retry_invoker = url, interceptors, None
        trust = ssl.create_default_context(cafile=str(root))
        self._client = httpx.Client(verify=trust, timeout=30, trust_env=False)


class Control:
    """The coordinator's hold on its SuperLink. Every method raises RunError if the SuperLink does not answer."""

    def __init__(self, home: Home, config: ServerConfig) -> None:
        from flwr.supercore.interceptors.http.runtime_version import RuntimeVersionHttpInterceptor

        interceptors = (RuntimeVersionHttpInterceptor(component_name="Locum"), _Secret(control_secret(home)))
        self._client = _Client(f"https://{address(config)}", home.superlink / "tls-ca.pem", interceptors)

    def start_run(self, bundle: bytes, run: str) -> int:
        """Starts a Flower run of a bundle for the run named `run`; returns Flower's number of it."""
        from flwr.common.serde import fab_to_proto, user_config_to_proto
        from flwr.proto.control_pb2 import StartRunRequest
        from flwr.supercore.fab import Fab

        from locum.common.canonical import sha256_hex

        request = StartRunRequest(
            fab=fab_to_proto(Fab(sha256_hex(bundle), bundle, {})), override_config=user_config_to_proto({"run": run})
        )
        answer = self._ask(self._client.StartRun, request)
        if not answer.HasField("run_id"):
            raise RunError("the SuperLink did not accept the run", "see superlink.log in the coordinator's logs")
        return int(answer.run_id)

    def stop_run(self, number: int) -> None:
        """Stops a Flower run; one that has ended is left as it is."""
        from flwr.proto.control_pb2 import StopRunRequest

        self._ask(self._client.StopRun, StopRunRequest(run_id=number), tolerated=True)

    def register_node(self, public_key: bytes) -> int | None:
        """Registers a site's key (SEC1 or PEM bytes as Flower has them); None if it is registered already."""
        from flwr.proto.control_pb2 import RegisterNodeRequest

        answer = self._ask(self._client.RegisterNode, RegisterNodeRequest(public_key=public_key), tolerated=True)
        return None if answer is None else int(answer.node_id)

    def nodes(self) -> dict[bytes, int]:
        """The registered nodes' numbers by public key."""
        from flwr.proto.control_pb2 import ListNodesRequest

        answer = self._ask(self._client.ListNodes, ListNodesRequest())
        return {bytes(node.public_key): int(node.node_id) for node in answer.nodes_info if not node.unregistered_at}

    def _ask(self, call: Callable[[Any], Any], request: Any, *, tolerated: bool = False) -> Any:
        try:
            return call(request)
        except httpx.HTTPStatusError as error:
            if tolerated and error.response.status_code in {400, 404, 409, 412}:
                return None
            told = FlowerError.from_json(error.response.text)
            words = told.message if told is not None else f"HTTP {error.response.status_code}"
            raise RunError(f"the SuperLink refused: {words}", "see superlink.log in the coordinator's logs") from error
        except httpx.TransportError as error:
            reason = f"the SuperLink does not answer: {type(error).__name__}"
            raise RunError(reason, "start the coordinator with `locum server start`, or wait a moment") from error

    def close(self) -> None:
        """Closes the connection."""
        self._client.close()


if __name__ == "__main__":
    main()
