"""`python -m locum.server.gateway HOME`: the gateway's process. One port for hospitals, one on loopback for hints."""

from __future__ import annotations

import logging
import signal
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
from cryptography.hazmat.primitives import serialization

from locum.common.blobs import OPTIONS
from locum.common.errors import LocumError, RunError
from locum.common.proto import locum_pb2_grpc as rpc
from locum.server.adopt import adopt
from locum.server.authority import door_credentials, load_authority, load_log_certificate
from locum.server.gateway.blobs import BlobService
from locum.server.gateway.fleet import FleetService
from locum.server.gateway.hints import Board, HintService
from locum.server.gateway.legible import Legible
from locum.server.gateway.live import Live
from locum.server.gateway.peers import Peer, site_of, site_peer
from locum.server.gateway.registry import Federation, RegistryService
from locum.server.gateway.spool import Spool
from locum.server.gateway.turnstile import Turnstile
from locum.server.home import Home, ServerConfig, read_config
from locum.server.log import open_log
from locum.server.parent import end_with_parent
from locum.server.registry import Registry
from locum.server.superlink import Control

#: Made when they are needed; a caller has a few (see `turnstile.py`).
_THREADS = 1024
_GRACE_SECONDS = 2.0
_OPTIONS = (
    *OPTIONS,
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.max_concurrent_streams", 32),
    ("grpc.so_reuseport", 0),
)


def open_gateway(home: Home, config: ServerConfig) -> Callable[[], None]:
    """Opens both ports; returns what closes them. Raises RunError."""
    registry, authority = Registry(home.registry), load_authority(home, config)
    live, board, stop = Live(home.live), Board(), threading.Event()
    threading.Thread(target=live.keep, args=(stop,), daemon=True).start()

    threads, interceptors = ThreadPoolExecutor(_THREADS, thread_name_prefix="call"), (Turnstile(), Legible())
    door = grpc.server(threads, (), interceptors, _OPTIONS)
    record = open_log(home)
    adopt(registry, record)
    threading.Thread(target=record.keep, args=(stop,), daemon=True).start()
    federation = Federation(registry, authority, load_log_certificate(home), live, record)
    rpc.add_RegistryServicer_to_server(RegistryService(federation), door)
    fleet = FleetService(
        home,
        config,
        board=board,
        admit=lambda context: _node_of(site_peer(context, registry)),
        claim=live.claim,
        register=_Nodes(home, config, registry).ensure,
    )
    rpc.add_FleetServicer_to_server(fleet, door)
    spool = Spool(home.spool)
    blobs = BlobService(spool, lambda context: site_of(context, registry), registry.approved, config.site_quota)
    blobs.add_to(door)

    hints = grpc.server(ThreadPoolExecutor(64, thread_name_prefix="hints"), (), (Legible(),), _OPTIONS)
    rpc.add_HintsServicer_to_server(HintService(board, (home.superlink / "hints.secret").read_text()), hints)
    credentials = door_credentials(home, authority, config.host)
    _bind(lambda: door.add_secure_port(f"{config.listen}:{config.port}", credentials), config.port)
    # Last: whoever finds the hints' port open knows that the door's is ours.
    _bind(lambda: hints.add_insecure_port(f"127.0.0.1:{config.hints_port}"), config.hints_port)
    hints.start()
    door.start()

    def close() -> None:
        stop.set()
        for server in (door.stop(_GRACE_SECONDS), hints.stop(_GRACE_SECONDS)):
            server.wait()
        fleet.close()

    return close


def _bind(bind: Callable[[], int], port: int) -> None:
    try:
        bound = bind()
    except RuntimeError:
        bound = 0
    if not bound:
        raise RunError(f"the port {port} cannot be opened", "stop what holds it, or change it in server.yaml")


def _node_of(peer: Peer) -> tuple[str, bytes]:
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    return peer.name, peer.public_key.public_bytes(serialization.Encoding.PEM, form)


class _Nodes:
    """Makes sites known to the SuperLink as nodes, each when it first calls."""

    def __init__(self, home: Home, config: ServerConfig, registry: Registry) -> None:
        self._home, self._config, self._registry = home, config, registry
        self._lock = threading.Lock()

    def ensure(self, site: str, key: bytes) -> None:
        """Registers a site's node key unless it is, and notes its number; raises RunError."""
        with self._lock:
            control = Control(self._home, self._config)
            try:
                number = control.register_node(key) or control.nodes().get(key)
            finally:
                control.close()
            if number is None:
                raise RunError(f"the SuperLink does not take the key of {site}", "enrol the site again")
            row = self._registry.site(site)
            if row is None or row.node_id != number:
                self._registry.set_node(site, number)


def main() -> None:
    """Serves until it is told to end."""
    end_with_parent()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    home = Home(Path(sys.argv[1]))
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    try:
        close = open_gateway(home, read_config(home))
    except LocumError as error:
        sys.exit(f"error: {error.message}\n next: {error.remedy}")
    logging.getLogger("locum.gateway").info("open")
    ended.wait()
    close()


if __name__ == "__main__":
    main()
