"""What a round costs between hospitals when training costs nothing, and how much memory it takes.

A real coordinator and real agents on loopback, with mutual TLS, SQLite and blobs on disk (`idle_site.py`). Beside it,
in the same run, stock Flower with its own SuperNodes and FedAvg, and NVIDIA FLARE's simulator where it is installed.
Rounds in the clear and with secure sums are measured one after the other; the peers know nothing like the latter.
What counts is the ratio: absolute times are those of this machine at this moment.

`python -m locum.simulations.benchmarks wire` measures 1, 50 and 400 MB at 3 sites, 16 sites at 50 MB and 50 sites with
a tiny model. `LOCUM_BENCH_WIRE=small` leaves out what takes minutes.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from locum.common.plan import parse_plan
from locum.server.event_file import read_events
from locum.server.runs import Run
from locum.simulations.benchmarks import nvflare_peer, stock_flower
from locum.simulations.benchmarks.idle_site import CONFIGURATION
from locum.simulations.benchmarks.rows import Row
from locum.simulations.engines.rehearse import Rehearsal, run_rehearsal

_MIB = 1 << 20
_SAMPLE_SECONDS = 0.1
_CALM_SECONDS, _IDLE_SECONDS = 3.0, 20.0
#: Channels of each of the five stages that make a network of about so many MB.
_WIDTHS = {0.03: 12, 1: 84, 50: 588, 400: 1668}

_PLAN = """
name: wire
purpose: Measure what a round costs when training costs nothing.
contract: {{task: classification, dimensions: 2, classes: [a, b]}}
network: {{name: Classifier, channels: {channels}, num_groups: 4}}
loss: {{name: CrossEntropyLoss}}
optimiser: {{name: SGD, lr: 0.1}}
training: {{input_size: [32, 32], local_steps: 1}}
rounds: {rounds}
participation: {{quorum: {sites}, deadline: 10 min}}
protection: {{secure_aggregation: "{protection}"}}
evaluation: {{metrics: [accuracy], every_rounds: {rounds}}}
"""


@dataclass
class Watched:
    """The most memory that each process of a run was seen with, in bytes."""

    resident: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    own: dict[str, int] = field(default_factory=lambda: defaultdict(int))

    @contextmanager
    def around(self, home: Path, run: Run) -> Iterator[None]:
        """Looks at gateway, SuperLink, ServerApp and agents while a run goes on."""
        ended = threading.Event()
        thread = threading.Thread(target=self._look, args=(home, run, ended))
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def _look(self, home: Path, run: Run, ended: threading.Event) -> None:
        while not ended.wait(_SAMPLE_SECONDS):
            numbers = json.loads((home / "processes.json").read_bytes())
            numbers |= {"serverapp": run.alive(), "agent": _agent_of(home)}
            for name, number in numbers.items():
                if number is not None:
                    resident, own = _memory(number)
                    self.resident[name] = max(self.resident[name], resident)
                    self.own[name] = max(self.own[name], own)


def _agent_of(home: Path) -> int | None:
    """The process of one of the agents: the one whose folder's name comes first."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if b"locum.simulations.benchmarks.idle_site" in words and str(home.parent / "sites" / "s00").encode() in words:
            return int(path.parent.name)
    return None


def _memory(number: int) -> tuple[int, int]:
    """Resident bytes of a process, and those that are not the file cache's."""
    try:
        lines = Path(f"/proc/{number}/status").read_text().splitlines()
    except OSError:
        return 0, 0
    found = {
        key: int(value.split()[0]) * 1024 for key, _, value in (line.partition(":") for line in lines) if "kB" in value
    }
    return found.get("VmRSS", 0), found.get("RssAnon", 0) + found.get("RssShmem", 0)


@dataclass(frozen=True)
class Measured:
    """One configuration: seconds of each round but the first, and memory.

    `idle` is the share of a core that gateway and SuperLink take together while all sites are there and no run is.
    """

    seconds: tuple[float, ...]
    watched: Watched
    bytes: int
    lost: bool
    idle: float


def rounds(folder: Path, *, sites: int, megabytes: float, count: int, secure: bool = True) -> Measured:
    """Runs `count` rounds of a model of about `megabytes` at `sites` idle sites.

    Args:
        folder: an empty folder.
        sites: how many agents.
        megabytes: one of the sizes of the table above.
        count: rounds, the first of which is not counted.
        secure: whether the sums are secure ones.
    """
    protection = "required" if secure else "off"
    channels = [_WIDTHS[megabytes]] * 5
    plan = parse_plan(_PLAN.format(channels=channels, rounds=count, sites=sites, protection=protection).encode())
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "plan.yaml").write_text(plan.to_yaml())
    _describe(folder)
    watched, seen, idle = Watched(), [], 0.0

    @contextmanager
    def watch(run: Run) -> Iterator[None]:
        nonlocal idle
        with watched.around(folder / "coordinator", run):
            yield
        seen.extend(read_events(run.events))
        idle = _share_of_a_core(folder / "coordinator")

    names = [f"s{number:02}" for number in range(sites)]
    run_rehearsal(Rehearsal(folder, plan, names, _idle_site), watch)
    committed = [event["seconds"] for event in seen if event["event"] == "committed"]
    lost = any(event["event"] in {"refused", "void", "paused"} for event in seen)
    size = (folder / "model.safetensors").stat().st_size
    return Measured(tuple(committed[1:]), watched, size, lost, idle)


def _share_of_a_core(home: Path) -> float:
    """What gateway and SuperLink take for a while."""
    numbers = json.loads((home / "processes.json").read_bytes())

    def used() -> float:
        lines = (Path(f"/proc/{numbers[name]}/stat").read_text() for name in ("gateway", "superlink"))
        ticks = (line.rpartition(")")[2].split() for line in lines)
        return sum(int(found[11]) + int(found[12]) for found in ticks) / os.sysconf("SC_CLK_TCK")

    time.sleep(_CALM_SECONDS)
    before = used()
    time.sleep(_IDLE_SECONDS)
    return (used() - before) / _IDLE_SECONDS


#: Run in another process, which loads torch.
_DESCRIPTION = """
import json, sys
from pathlib import Path
from locum.common import build
from locum.common.plan import load_plan

plan = load_plan(Path(sys.argv[1]))
shared = build.shared_tensors(*build.initial_state(plan))
Path(sys.argv[2]).write_text(json.dumps(build.configuration(plan, shared)))
"""


def _describe(folder: Path) -> None:
    """Writes what every site resolves the folder's plan to."""
    command = [sys.executable, "-c", _DESCRIPTION, str(folder / "plan.yaml"), str(folder / CONFIGURATION)]
    subprocess.run(command, check=True)  # noqa: S603 - our own script


def _idle_site(folder: Path) -> list[str]:
    return [sys.executable, "-m", "locum.simulations.benchmarks.idle_site", str(folder)]


def measure() -> Iterator[Row]:
    """The table of `docs/benchmarks.md`."""
    small = os.environ.get("LOCUM_BENCH_WIRE") == "small"
    for megabytes, count in ((1, 8), (50, 5)) if small else ((1, 12), (50, 6), (400, 5)):
        yield from _beside_peers(megabytes, count)
    for sites, megabytes in () if small else ((16, 50),):
        yield from _both(sites, megabytes, 4)
    yield from _both(50, 0.03, 5)


def _ours(sites: int, megabytes: float, count: int, *, secure: bool) -> Measured:
    with tempfile.TemporaryDirectory(prefix="locum-wire-") as folder:
        return rounds(Path(folder), sites=sites, megabytes=megabytes, count=count, secure=secure)


def _both(sites: int, megabytes: float, count: int) -> Generator[Row, None, float]:
    """Rounds in the clear and with secure sums, and what these add; returns the median in the clear."""
    what = f"{sites} sites, {megabytes:g} MB"
    clear = _ours(sites, megabytes, count, secure=False)
    yield from _rows(f"{what}, in the clear", clear)
    secure = _ours(sites, megabytes, count, secure=True)
    yield from _rows(f"{what}, secure sums", secure)
    before, after = (statistics.median(found.seconds) for found in (clear, secure))
    yield Row(f"{what}: secure sums add to a round", after - before, "s")
    yield Row(f"{what}: secure / in the clear", after / before, "×")
    return before


def _beside_peers(megabytes: float, count: int) -> Iterator[Row]:
    median = yield from _both(3, megabytes, count)
    with tempfile.TemporaryDirectory(prefix="stock-wire-") as folder:
        stock = stock_flower.rounds(Path(folder), sites=3, megabytes=megabytes, count=3)
    yield Row(f"3 sites, {megabytes:g} MB: stock Flower, a round", statistics.median(stock.seconds), "s")
    yield Row(f"3 sites, {megabytes:g} MB: stock Flower / Locum", statistics.median(stock.seconds) / median, "×")
    for name, size in stock.memory.items():
        yield Row(f"3 sites, {megabytes:g} MB: stock Flower, {name}", size / _MIB, "MiB")
    with tempfile.TemporaryDirectory(prefix="nvflare-wire-") as folder:
        flare = nvflare_peer.rounds(Path(folder), sites=3, megabytes=megabytes, count=3)
    if flare is not None:
        yield Row(f"3 sites, {megabytes:g} MB: FLARE simulator, a round", statistics.median(flare.seconds), "s")
        yield Row(f"3 sites, {megabytes:g} MB: FLARE / Locum", statistics.median(flare.seconds) / median, "×")


def _rows(what: str, measured: Measured) -> Iterator[Row]:
    yield Row(f"{what}: a round (median)", statistics.median(measured.seconds), "s")
    yield Row(f"{what}: a round (longest)", max(measured.seconds), "s")
    yield Row(f"{what}: contributions lost", float(measured.lost), "")
    yield Row(f"{what}: gateway and SuperLink while nothing runs", measured.idle * 100, "% of a core")
    yield Row(f"{what}: model", measured.bytes / _MIB, "MiB")
    for name in ("gateway", "superlink", "serverapp", "agent"):
        resident, own = measured.watched.resident[name], measured.watched.own[name]
        yield Row(f"{what}: {name}, resident", resident / _MIB, "MiB")
        yield Row(f"{what}: {name}, without file cache", own / _MIB, "MiB")
