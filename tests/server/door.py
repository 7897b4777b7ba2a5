"""A gateway with real certificates in a folder, on a free loopback port, in this process.

    with open_door(tmp_path / "coordinator", (registry_service, my_service)) as door:
        identity = door.enrol("berlin")
        with door.channel(identity) as channel: …

`servicers` are functions (server, door) → None that add a service to the server.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from cryptography import x509

from locum.common.identity import PrivateKey, certificate_pem, key_pem
from locum.common.proto.locum_pb2_grpc import add_RegistryServicer_to_server
from locum.server.authority import Authority, door_credentials, initialise, load_authority, load_log_certificate
from locum.server.gateway.legible import Legible
from locum.server.gateway.live import Live
from locum.server.gateway.registry import Federation, RegistryService
from locum.server.gateway.turnstile import Turnstile
from locum.server.home import Home, ServerConfig, read_config
from locum.server.invitations import invite, make_invitation
from locum.server.log import open_log
from locum.server.registry import Registry
from locum.site_client.enrolment import enrol, open_channel
from locum.site_client.identity import SiteIdentity


@dataclass(frozen=True)
class Door:
    """The open gateway, and what is behind it."""

    home: Home
    config: ServerConfig
    authority: Authority
    registry: Registry
    live: Live
    server: grpc.Server

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.config.port}"

    def invite(self, name: str) -> Path:
        """An invitation's file, for a site of this name."""
        path = self.home.path.parent / f"{name}.invitation.json"
        path.unlink(missing_ok=True)
        invite(self.registry, make_invitation(self.authority, self.config, name), path)
        return path

    def site_home(self, name: str) -> Path:
        """Where the site of this name has its folder."""
        return self.home.path.parent / f"site-{name}"

    def enrol(self, name: str) -> SiteIdentity:
        """Enrols a site over the wire, as `locum site enrol` does."""
        return enrol(self.invite(name), self.site_home(name))

    def channel(self, identity: SiteIdentity) -> grpc.Channel:
        """A site's connection, as its agent opens it."""
        return open_channel(identity)

    def channel_as(self, key: PrivateKey, certificate: x509.Certificate) -> grpc.Channel:
        """The connection of somebody with this key and certificate, whatever they are."""
        root = certificate_pem(self.authority.certificate)
        tls = grpc.ssl_channel_credentials(root, key_pem(key), certificate_pem(certificate))
        return grpc.secure_channel(self.address, tls)


Servicer = Callable[[grpc.Server, Door], None]


def registry_service(server: grpc.Server, door: Door) -> None:
    """Adds the service Registry."""
    log = open_log(door.home)
    federation = Federation(door.registry, door.authority, load_log_certificate(door.home), door.live, log)
    add_RegistryServicer_to_server(RegistryService(federation), server)


@contextmanager
def open_door(home: Path, servicers: Sequence[Servicer] = (registry_service,), **configured: Any) -> Iterator[Door]:
    """Starts a gateway in a new home, or in the one that is there; `configured` are fields of its server.yaml."""
    opened = Home(home)
    if not opened.configuration.exists():
        ports = dict(zip(("port", "superlink_port", "hints_port"), free_ports(3), strict=True))
        fields = {"name": "Test federation", "host": "127.0.0.1", "listen": "127.0.0.1"} | ports | configured
        initialise(opened, ServerConfig(**fields))
    config = read_config(opened)
    authority = load_authority(opened, config)
    interceptors = (Turnstile(), Legible())
    server = grpc.server(ThreadPoolExecutor(32), interceptors=interceptors, options=[("grpc.so_reuseport", 0)])
    door = Door(opened, config, authority, Registry(opened.registry), Live(opened.live), server)
    for add in servicers:
        add(server, door)
    server.add_secure_port(door.address, door_credentials(opened, authority, config.host))
    server.start()
    try:
        yield door
    finally:
        server.stop(None).wait()
        door.registry.close()


def free_ports(number: int) -> list[int]:
    """Loopback ports that nobody listens on."""
    with ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(number)]
        for opened in sockets:
            opened.bind(("127.0.0.1", 0))
        return [int(opened.getsockname()[1]) for opened in sockets]
