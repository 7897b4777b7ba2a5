"""What a round costs in NVIDIA FLARE's simulator: the other peer beside which `wire.py` measures ours.

FLARE's NumPy recipe of FedAvg as it is delivered, a process for every site, on loopback and without TLS. Its training
is a multiplication by a factor of site and round, and its model is one array, which is what that recipe takes. FLARE
writes the global model to a file in every round. Rules:
  * FLARE's dependencies are not ours: it lives in an environment of its own, and the variable `LOCUM_BENCH_NVFLARE`
    names that environment's Python: `python3 -m venv FOLDER && FOLDER/bin/pip install 'nvflare==2.9.*'`. Without it
    there is no measurement, and the caller is told so.
  * What comes after the last round, and before the first, is not counted: the simulator's start and end take 15 s.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path

import numpy as np

from locum.common.errors import RunError
from locum.simulations.benchmarks.stock_flower import Measured, Processes, periods

_VARIABLE = "LOCUM_BENCH_NVFLARE"
_JOB = "idle"
_LOG = Path("workspace", _JOB, "server", "log.json")

_JOB_SCRIPT = """\
import sys

from nvflare.app_common.np.recipes.fedavg import NumpyFedAvgRecipe
from nvflare.recipe.sim_env import SimEnv

if __name__ == "__main__":
    name, workspace, initial, sites, count = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5])
    recipe = NumpyFedAvgRecipe(
        name=name, initial_ckpt=initial, min_clients=sites, num_rounds=count, train_script="trainer.py"
    )
    recipe.execute(SimEnv(num_clients=sites, workspace_root=workspace))
"""

_TRAINER = """\
import numpy as np
import nvflare.client as flare

flare.init()
site = int(flare.get_site_name().rpartition("-")[2])
while flare.is_running():
    model = flare.receive()
    factor = np.float32(1 + 1e-3 * site + 1e-5 * model.current_round)
    flare.send(flare.FLModel(params={name: factor * array for name, array in model.params.items()}))
"""


def rounds(folder: Path, *, sites: int, megabytes: float, count: int) -> Measured | None:
    """Runs `count` rounds of FLARE's FedAvg in its simulator, without TLS, and measures all but the first.

    Args:
        folder: an empty folder, or one to be made; the simulator's workspace stays there.
        sites: how many clients, all of which take part in every round.
        megabytes: size of the model in 10⁶ bytes, float32.
        count: rounds, the first of which is not measured; at least 2.

    Returns:
        `count - 1` times, from the start of a round to that of the next, and the memory of `server` and `client` (the
        largest); None, with a line on standard error, where `LOCUM_BENCH_NVFLARE` is not set.

    Raises:
        RunError: the simulator failed, made no progress for 15 minutes, or lost a contribution.
    """
    python = os.environ.get(_VARIABLE)
    if not python:
        sys.stderr.write(f"NVIDIA FLARE is not measured: {_VARIABLE} does not name the Python that has nvflare 2.9\n")
        return None
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    with Processes(folder, _role) as processes:
        _run(processes, python, _job(folder, megabytes), sites, count)
    stamps, answers = _read(folder / _LOG)
    if len(stamps) != count + 1 or answers != sites * count:
        raise RunError(f"FLARE lost contributions: {answers} of {sites} sites in {count} rounds", "measure again")
    clients = [size for name, size in processes.peak.items() if name.startswith("site-")]
    return Measured(periods(stamps), {"server": processes.peak["server"], "client": max(clients)})


def _job(folder: Path, megabytes: float) -> Path:
    """Writes the job and its initial model; returns the folder."""
    (folder / "job.py").write_text(_JOB_SCRIPT)
    (folder / "trainer.py").write_text(_TRAINER)
    values = round(megabytes * 1e6 / 4)
    np.save(folder / "initial.npy", np.random.default_rng(0).standard_normal(values, dtype=np.float32))
    return folder


def _run(processes: Processes, python: str, folder: Path, sites: int, count: int) -> None:
    paths = (str(folder / "workspace"), str(folder / "initial.npy"))
    words = [python, str(folder / "job.py"), _JOB, *paths, str(sites), str(count)]
    rest = {name: value for name, value in os.environ.items() if not name.startswith(("NVFLARE_", "PYTHON"))}
    try:
        process = processes.start("server", words, rest)
    except OSError as error:
        raise RunError(f"{_VARIABLE} names no Python: {python}", "let it name the Python that has nvflare") from error
    for _ in processes.watched(folder / _LOG):
        if process.poll() is not None:
            break
    if process.returncode != 0:
        raise RunError(f"FLARE's simulator failed: {processes.told('server')}", "mend what it says")


def _role(name: str, words: Sequence[str]) -> str:
    """`site-1` and so on for the processes of the clients, which the simulator starts."""
    return words[words.index("--client") + 1] if "--client" in words else name


def _read(log: Path) -> tuple[list[float], int]:
    """When each round began and the last ended, in seconds, and how many results the server took in."""
    stamps, answers = [], 0
    for time, message in _records(log):
        if (message.endswith("started.") and message.startswith("Round ")) or message == "Finished FedAvg.":
            stamps.append(time)
        answers += message.startswith("Aggregated ") and message.endswith(" results")
    return stamps, answers


def _records(log: Path) -> Iterator[tuple[float, str]]:
    """Time and message, without its ornaments, of everything that the server's FedAvg told."""
    for line in log.read_text().splitlines():
        record = json.loads(line)
        if record["name"] == "FedAvg":
            time = datetime.strptime(record["asctime"], "%Y-%m-%d %H:%M:%S,%f")
            yield time.timestamp(), record["message"].strip("-=\n ")
