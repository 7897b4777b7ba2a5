"""`python -m locum.simulations.benchmarks.idle_site HOME`: an agent whose training costs nothing.

Everything but the worker is the real agent: connection, journal, gates, blobs. The worker's update is the model times a
factor that is another one at every site and in every round, so that nothing on the way can be saved by seeing it twice.
"""

from __future__ import annotations

import json
import signal
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from locum.common.build import metric_of
from locum.common.messages import BLOB_THRESHOLD, Arrays
from locum.common.plan import Plan
from locum.common.tensor_files import map_tensors, write_tensors
from locum.site_client.configuration import FILE, read_configuration
from locum.site_client.start import open_log, open_service

CONFIGURATION = "configuration.json"


@dataclass
class IdleWorker:
    """Answers as a worker does, at once.

    Attributes:
        home: the agent's folder.
        configuration: what the site resolves the plan to.
    """

    home: Path
    configuration: dict[str, str]

    def call(
        self, operation: str, plan: Plan, tensors: Arrays | None = None, **request: Any
    ) -> tuple[dict[str, Any], Arrays]:
        """One answer (see `site_client/operations.py`)."""
        if operation == "describe":
            counts = {"train": 8, "validation": 1, "test": 1}
            return {"configuration": self.configuration, "cases": counts, "missing_classes": [], "able": True,
                    "reason": ""}, {}  # fmt: skip
        if operation == "train":
            factor = 1e-3 * (1 + zlib.crc32(f"{self.home} {request['round']}".encode()) / 2**32)
            return {"steps": 1, "loss": 0.5, "cases": 8}, self._update(tensors or {}, factor)
        lengths = {name: metric_of(name).length(len(plan.contract.classes)) for name in plan.evaluation.metrics}
        return {"cases": 1}, {name: np.ones(length) for name, length in lengths.items()}

    def _update(self, model: Arrays, factor: float) -> Arrays:
        update = {name: array * array.dtype.type(factor) for name, array in model.items()}
        if sum(array.nbytes for array in update.values()) <= BLOB_THRESHOLD:
            return update
        path = self.home / "update.safetensors"
        write_tensors(path, update, named=False)
        return map_tensors(path)

    def stop(self) -> None:
        """There is no process."""


def main() -> None:
    """Runs the agent until it is told to end."""
    home = Path(sys.argv[1])
    configuration = read_configuration(home / FILE)
    service = open_service(home, configuration, open_log(home, home.name, configuration))
    described = json.loads((home.parents[1] / CONFIGURATION).read_bytes())
    service.agent.worker = IdleWorker(home, described)  # type: ignore[assignment]
    signal.signal(signal.SIGTERM, lambda *_: service.end())
    service.pulse.start()
    service.run()


if __name__ == "__main__":
    main()
