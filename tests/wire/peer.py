"""`python -m tests.wire.peer HOME NAME BEHAVIOUR`: a site with the real connection and an answer that a test chooses.

Behaviours: empty (answers well), or one of `BEHAVIOURS` with its parameters after a colon, such as `slow:5`. A message
of a type whose file `hold-TYPE` is in the site's folder is answered once the file is gone.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Message, RecordDict
from safetensors.numpy import load_file

from locum.common.fab import plan_of_bundle
from locum.common.messages import INLINE, LOCAL, Carrier, Tensors, TrainResult, TrainTask
from locum.common.plan import Plan
from locum.site_client.configuration import FILE, read_configuration
from locum.site_client.identity import load_identity
from locum.site_client.service import Service
from locum.site_client.start import open_log, open_service
from tests.peers import Answer, Peer, Spoiler
from tests.readiness import ready


class _NoWorker:
    """A peer has none."""

    def stop(self) -> None:
        pass


class WirePeer:
    """Lets a peer stand where an agent stands."""

    def __init__(self, home: Path, peer: Peer) -> None:
        self.home, self.peer = home, peer
        self.worker = _NoWorker()
        self.told: Callable[..., None] = lambda *_: None

    def handle(self, message: Message, bundle: bytes, carrier: Carrier = INLINE, *, run: str = LOCAL) -> Message:
        plan = plan_of_bundle(bundle)
        self.peer.model = load_file(self.home.parent / f"{plan.digest}.safetensors")
        key = load_identity(self.home).key
        self.peer.ready = lambda plan: str(ready(plan, self.peer.site, key, run).envelope)
        with (self.home / "handled").open("a") as file:
            file.write(f"{message.metadata.message_type} {message.metadata.group_id}\n")
        while (self.home / f"hold-{message.metadata.message_type}").exists():
            time.sleep(0.02)
        return self.peer.handle(message, bundle, carrier)


class Slow(Peer):
    """Trains for a while."""

    def __init__(self, site: str, seconds: float) -> None:
        super().__init__(site)
        self.seconds = seconds

    def train(self, plan: Plan, content: RecordDict) -> Answer:
        time.sleep(self.seconds)
        return super().train(plan, content)


class Silent(Peer):
    """Never answers a training message."""

    def train(self, plan: Plan, content: RecordDict) -> Answer:
        while True:
            time.sleep(3600)


class Heavy(Peer):
    """Declares a weight."""

    def __init__(self, site: str, weight: float) -> None:
        super().__init__(site, weight=weight)

    def header(self, plan: Plan, task: TrainTask) -> TrainResult:
        return super().header(plan, task)


def _nan(model: Tensors) -> Tensors:
    first = next(iter(model))
    return {**model, first: np.full_like(model[first], np.nan)}


def _first_as(change: Callable[[Any], Any]) -> Callable[[Tensors], Tensors]:
    def spoil(model: Tensors) -> Tensors:
        first = next(iter(model))
        return {**model, first: change(model[first])}

    return spoil


BEHAVIOURS: dict[str, Callable[..., Peer]] = {
    "": Peer,
    "value": lambda site, value: Peer(site, float(value)),
    "slow": lambda site, seconds: Slow(site, float(seconds)),
    "silent": Silent,
    "heavy": lambda site, weight: Heavy(site, float(weight)),
    "nan": lambda site: Spoiler(site, _nan),
    "shape": lambda site: Spoiler(site, _first_as(lambda a: np.concatenate([a, a]))),
    "broadcast": lambda site: Spoiler(site, _first_as(lambda a: np.ones((1,) * a.ndim, a.dtype))),
    "missing": lambda site: Spoiler(site, lambda model: dict(list(model.items())[1:])),
    "extra": lambda site: Spoiler(site, lambda model: {**model, "extra": np.ones(3, np.float32)}),
}


def main() -> None:
    home, name, behaviour = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    kind, *parameters = behaviour.split(":")
    configuration = read_configuration(home / FILE)
    service: Service = open_service(home, configuration, open_log(home, name, configuration))
    peer = WirePeer(home, BEHAVIOURS[kind](name, *parameters))
    service.agent = peer  # type: ignore[assignment]
    peer.told = service.doing
    signal.signal(signal.SIGTERM, lambda *_: service.end())
    service.pulse.start()
    service.run()


if __name__ == "__main__":
    main()
