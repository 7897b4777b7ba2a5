"""A coordinator's folder with real keys and a real registry, sites in it that approve, and runs by the real engine.

No process of the coordinator runs: what is tested here are its files, and the commands over them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

from locum.common.identity import fingerprint_of, new_key, save_key, utc_now
from locum.common.plan import Plan
from locum.server.app import end, write_result
from locum.server.authority import initialise, load_authority
from locum.server.gateway.live import Heard
from locum.server.home import Home, ServerConfig, read_config
from locum.server.link import Direct
from locum.server.proposals import propose
from locum.server.registry import Registry
from locum.server.runs import Run, create_run
from tests.peers import Peer, run_peers

PORTS = {"port": 18443, "superlink_port": 19091, "hints_port": 19092}


def new_home(path: Path) -> Home:
    """A coordinator as `locum server init` leaves it."""
    home = Home(path)
    initialise(home, ServerConfig(name="Test federation", host="127.0.0.1", **PORTS))
    return home


def key_of(home: Home, site: str) -> Path:
    """Where a test keeps the key of a site that it has enrolled."""
    return home.path / "keys" / f"{site}.key"


def enrol(home: Home, *names: str) -> None:
    """Enrols sites as the gateway does, without a network."""
    authority = load_authority(home, read_config(home))
    with closing(Registry(home.registry)) as registry:
        for name in names:
            key_of(home, name).parent.mkdir(exist_ok=True)
            key_of(home, name).unlink(missing_ok=True)
            save_key(key_of(home, name), key := new_key())
            public = key.public_key()
            invitation = fingerprint_of(authority.issue_invitation(name, public))
            expires = utc_now().replace(year=utc_now().year + 1)
            registry.invite(name, token_sha256=b"\0" * 32, fingerprint=invitation, expires=expires)
            registry.redeem(invitation, key=public, issue=lambda n=name, k=public: authority.issue_site(n, k))


def approve(home: Home, digest: str, *names: str, approved: bool = True) -> None:
    """Notes what sites say of a plan, as the gateway does once it has checked who says it."""
    with closing(Registry(home.registry)) as registry:
        for name in names:
            registry.record_approval(name, digest, approved=approved, at=time.time(), envelope=b"signed")


def approved_run(home: Home, plan: Plan, sites: Sequence[str]) -> Run:
    """A run that is wanted, of a plan that `sites` have approved; they are enrolled first."""
    enrol(home, *sites)
    approve(home, propose(home, plan, "team"), *sites)
    return create_run(home, plan, sites=sites, by="team")


def go_on(run: Run, peers: Sequence[Peer], *, rounds: int | None = None) -> None:
    """Lets the real engine go on with a run; to its end, or as if it died after committing `rounds`."""
    with run.hold():
        if rounds is None:
            finished = run_peers(run.plan, list(peers), run.folder)
            log = Direct(Home(run.folder)).log(run.plan)
            write_result(run.folder, finished, log)
            end(run.folder, log)
            return
        try:
            run_peers(run.plan, [_Dying(peer, rounds) for peer in peers], run.folder)
        except DiedError:
            return


class DiedError(RuntimeError):
    """The engine's process is gone."""


class _Dying(Peer):
    """A peer that ends the engine's process once so many rounds are committed and evaluated."""

    def __init__(self, peer: Peer, rounds: int) -> None:
        super().__init__(peer.site, peer.value, peer.weight)
        self.peer, self.rounds = peer, rounds

    def handle(self, message: Any, bundle: bytes) -> Any:
        if message.metadata.message_type == "train" and int(message.metadata.group_id) > self.rounds:
            raise DiedError
        return self.peer.handle(message, bundle)


def say(home: Home, **sites: dict[str, Any]) -> None:
    """Writes `live.json` as the gateway does; a site's fields over `idle, heard now`."""
    calm = Heard("idle", "", 0, 0, 0, "1", "0.1.0", time.time(), 0.0, time.time())
    home.live.write_text(json.dumps({site: {**asdict(calm), **fields} for site, fields in sites.items()}))
