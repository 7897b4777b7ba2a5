"""`python -m tests.wire.secure_peer HOME`: a real agent that takes part in secure sums; only its worker is made up.

What the worker gives follows from the site's name (:data:`GIFTS`), the round and the attempt. Its numbers are unlikely,
so that whoever looks for them finds nothing else.

The agent waits while a file `hold-STAGE` is in its folder, and leaves `at-STAGE` there. Stages, for a TYPE of message:
`TYPE`, before it is worked on; `unwritten-TYPE`, when the vault is written and the journal not yet; `unsent-TYPE`, when
the reply is in the journal. What was about to be sent lies in `sent/`, as bytes and in order.
"""

from __future__ import annotations

import json
import shutil
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Message

from locum.common.messages import INLINE, LOCAL, Arrays, Opener, Tensors
from locum.common.plan import Plan
from locum.common.sums import metric_lengths
from locum.site_client.carrier import SiteCarrier
from locum.site_client.configuration import FILE, read_configuration
from locum.site_client.fleet import Fleet, to_bytes
from locum.site_client.identity import load_identity
from locum.site_client.journal import Entry
from locum.site_client.service import Service
from locum.site_client.start import open_log, open_service
from tests.readiness import ready


@dataclass(frozen=True)
class Gift:
    """What a site gives: the largest value of its updates, its number of cases, its loss, each number of its sums."""

    value: float
    cases: int
    loss: float
    metric: float


GIFTS: Mapping[str, Gift] = {
    "a": Gift(0.031415, 3861135791, 0.73519264381, 48271.6180339),
    "b": Gift(0.027182, 1934577113, 0.61803398874, 61973.1414213),
    "c": Gift(0.014142, 2716358927, 0.57721566490, 35729.2236067),
    "d": Gift(0.017320, 1178812649, 0.91596559417, 52813.2645751),
}


def update_of(site: str, model: Arrays, number: int, attempt: int) -> Tensors:
    """A site's update: half of each tensor is one value, the other half goes from one to another."""
    found = {}
    for name, tensor in model.items():
        flat = np.linspace(-GIFTS[site].value, GIFTS[site].value / attempt, tensor.size, dtype=np.float32)
        flat[: tensor.size // 2] = value_of(site, number)
        found[name] = flat.reshape(tensor.shape)
    return found


def value_of(site: str, number: int) -> np.float32:
    """The value that half of a site's update in a round has."""
    return np.float32(GIFTS[site].value * number)


def sums_of(site: str, plan: Plan) -> Tensors:
    """A site's metric sums."""
    return {name: np.full(length, GIFTS[site].metric) for name, length in metric_lengths(plan, "validation").items()}


@dataclass(frozen=True)
class _Worker:
    """Answers as a site's worker does (see `site_client/operations.py`), at once.

    What a plan resolves to lies beside the site's folder, in the file DIGEST.json.
    """

    home: Path

    def call(
        self, operation: str, plan: Plan, tensors: Arrays | None = None, **request: Any
    ) -> tuple[dict[str, Any], Arrays]:
        site = self.home.name
        gift = GIFTS[site]
        if operation == "describe":
            described = json.loads((self.home.parent / f"{plan.digest}.json").read_bytes())
            counts = dict.fromkeys(("train", "validation", "test"), gift.cases)
            return {"configuration": described, "cases": counts, "missing_classes": [], "able": True, "reason": ""}, {}
        if operation == "train":
            done = {"steps": 1, "loss": gift.loss, "cases": gift.cases}
            return done, update_of(site, tensors or {}, request["round"], request["attempt"])
        return {"cases": gift.cases}, sums_of(site, plan)

    def stop(self) -> None:
        """There is no process."""


def _wait(home: Path, stage: str) -> None:
    hold, here = home / f"hold-{stage}", home / f"at-{stage}"
    if hold.exists():
        here.touch()
        while hold.exists():
            time.sleep(0.02)
        here.unlink(missing_ok=True)


def _hold(service: Service) -> None:
    """Lets a service wait where a test wants, and keep what it sends."""
    home, handle, deliver = service.home, service.agent.handle, service._deliver
    sent = home / "sent"
    sent.mkdir(exist_ok=True)

    def held(message: Message, bundle: bytes, carrier: Opener = INLINE, *, run: str = LOCAL) -> Message:
        kind = message.metadata.message_type
        _wait(home, kind)
        reply = handle(message, bundle, carrier, run=run)
        _wait(home, f"unwritten-{kind}")
        return reply

    def kept(fleet: Fleet, carrier: SiteCarrier, entry: Entry, reply: Message) -> None:
        kind = entry.message.metadata.message_type
        _wait(home, f"unsent-{kind}")
        for blob in (home / "work" / "up").glob("*"):
            shutil.copyfile(blob, sent / f"{blob.name}.blob")
        (sent / f"{time.time_ns()}-{kind}").write_bytes(to_bytes(reply))
        deliver(fleet, carrier, entry, reply)

    service.agent.handle = held  # type: ignore[method-assign]
    service._deliver = kept  # type: ignore[method-assign]


def main() -> None:
    home = Path(sys.argv[1])
    configuration = read_configuration(home / FILE)
    service = open_service(home, configuration, open_log(home, home.name, configuration))
    service.agent.worker = _Worker(home)  # type: ignore[assignment]
    service.agent.ready = lambda plan, run: ready(plan, home.name, load_identity(home).key, run)
    _hold(service)
    signal.signal(signal.SIGTERM, lambda *_: service.end())
    service.pulse.start()
    service.run()


if __name__ == "__main__":
    main()
