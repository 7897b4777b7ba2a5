"""`locum server start` and `locum server status`."""

from __future__ import annotations

import json
import logging
import signal
import socket
import threading
import time
from typing import Any

import typer

from locum.server.home import Home, ServerConfig, read_config
from locum.server.options import HomeDir, Json

_READY_SECONDS = 60.0


def start(home: HomeDir) -> None:
    """Run the coordinator: SuperLink, SuperExec and gateway, until Ctrl-C or SIGTERM. Restarts what dies."""
    from locum.server.invitations import gateway_address
    from locum.server.supervisor import supervise

    place = Home(home.absolute())
    config = read_config(place)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    threading.Thread(target=_tell_ready, args=(config, gateway_address(config), ended), daemon=True).start()
    supervise(place, config, ended)


def _tell_ready(config: ServerConfig, address: str, ended: threading.Event) -> None:
    began = time.monotonic()
    while not ended.wait(0.1):
        if all(_processes(config).values()):
            typer.echo(f"ready: hospitals connect to {address}")
            return
        if time.monotonic() - began > _READY_SECONDS:
            typer.echo("not ready after a minute: see logs/ in the coordinator's folder", err=True)
            return


def _processes(config: ServerConfig) -> dict[str, bool]:
    """Whether each process answers. The gateway opens its hints' port last; at its door may be another program."""
    return {"gateway": _answers(config.hints_port), "superlink": _answers(config.superlink_port)}


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(0.5)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def status(home: HomeDir, as_json: Json = False) -> None:
    """Show whether the coordinator runs, what every site said last, and the runs that go on."""
    from locum.server.gateway.live import read_live
    from locum.server.registry import Registry
    from locum.server.runs import all_runs

    place = Home(home)
    config = read_config(place)
    heard, now = read_live(place.live), time.time()
    registry = Registry(place.registry)
    try:
        names = [row.name for row in registry.sites() if row.revoked_at is None]
    finally:
        registry.close()
    processes = _processes(config)
    sites = {name: _heard(heard[name], now) if name in heard else None for name in names}
    runs = {run.id: status for run in all_runs(place) if not (status := run.status()).ended}
    if as_json:
        told = {
            name: {"state": found.state, "round": found.round, "rounds": found.rounds} for name, found in runs.items()
        }
        typer.echo(json.dumps({"processes": processes, "sites": sites, "runs": told}, indent=2))
        return
    for name, answers in processes.items():
        typer.echo(f"{name}: {'answers' if answers else 'does not answer; start it with `locum server start`'}")
    for name, word in sites.items():
        typer.echo(
            f"{name}: " + ("never heard" if word is None else f"{word['activity']}, {word['seconds']:.0f} s ago")
        )
    for name, found in runs.items():
        typer.echo(f"run {name}: {found.state}, round {found.round} of {found.rounds}")


def _heard(said: Any, now: float) -> dict[str, Any]:
    return {
        "activity": said.activity,
        "run": said.run,
        "round": said.round,
        "seconds": now - said.at,
        "version": said.version,
        "clock_offset": said.clock_offset,
    }
