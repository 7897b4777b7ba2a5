"""A simulation from plan and sites to results: prepare every site, run the rounds, test, compare, report.

The run's folder holds everything: `plan.yaml`, `simulation.json` (what was asked), `sites/`, `checkpoints/`,
`events.jsonl`, `log/`, `run.json`, and at the end `model.safetensors`, `metrics.json`, `report.html` and the model
card, `model_card.md` and `model_card.json`.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from rich.console import Console
from rich.text import Text

from locum.common.durable import replace_file
from locum.common.errors import MEANING, RunError, SiteFailure
from locum.common.fab import build_bundle
from locum.common.plan import Plan
from locum.common.secagg import LEAST_SITES, MOST_SITES
from locum.server.watch import Watch
from locum.simulations.institutions import begin, found_federation, open_agent, open_institution, site_log
from locum.simulations.preparation import Prepared, cores, prepare
from locum.simulations.record import PROPOSAL, begin_log, witness_log
from locum.simulations.sites import Site
from locum.site_client.agent import Agent
from locum.site_client.gate import Policy
from locum.site_client.settings import Settings
from locum.site_client.worker import Worker

_CACHE_BYTES = 6 << 30
_PLAN, _ASKED = "plan.yaml", "simulation.json"
#: What a run's folder holds besides these two.
_FILES = (
    *("events.jsonl", "run.json", "model.safetensors", "metrics.json", "report.html", "model_card.md"),
    *("model_card.json", "statement.json"),
    *("rehearsal.json", "coordinator.log", PROPOSAL),
)
_FOLDERS = ("checkpoints", "ending", "sites", "coordinator", "authority", "log")


#: `local`: agents in this process. `rehearse`: a real coordinator and real agents, on loopback.
Engine = Literal["local", "rehearse"]
ENGINES: tuple[Engine, ...] = get_args(Engine)


@dataclass(frozen=True)
class Simulation:
    """What to simulate.

    Attributes:
        plan: the plan; its seed is the simulation's seed.
        sites: the hospitals.
        folder: the run's folder.
        baselines: whether each site alone and pooled data are trained too.
        privacy_check: whether it is tried to tell from the model whom it was trained on.
        engine: how the rounds are run.
    """

    plan: Plan
    sites: Sequence[Site]
    folder: Path
    baselines: bool = False
    privacy_check: bool = False
    engine: Engine = "local"


def check_sites(plan: Plan, sites: int) -> None:
    """Raises RunError if there are fewer sites, or more, than a secure sum of the plan can have."""
    if not plan.secured or LEAST_SITES <= sites <= MOST_SITES:
        return
    bound = f"at least {LEAST_SITES}" if sites < LEAST_SITES else f"at most {MOST_SITES}"
    remedy = "to try it without, write protection: {secure_aggregation: off} in the plan, which is then another plan"
    raise RunError(f"the plan sums securely, which takes {bound} sites; there are {sites}", f"change --sites; {remedy}")


def open_folder(folder: Path, plan: Plan, asked: Mapping[str, Any], *, force: bool) -> None:
    """Makes the folder of a new run, in place of an earlier run if it holds one.

    Raises:
        RunError: the folder holds something else, or committed rounds without `force`, or cannot be written.
    """
    try:
        _check_free(folder, force=force)
        _clear(folder)
        folder.mkdir(parents=True, exist_ok=True)
        replace_file(folder / _ASKED, json.dumps(asked, indent=1).encode())
        replace_file(folder / _PLAN, plan.to_yaml().encode())
    except OSError as error:
        raise RunError(f"{folder} cannot be written: {error.strerror}", "choose another --out") from error


def _check_free(folder: Path, *, force: bool) -> None:
    if folder.is_dir() and any(folder.iterdir()) and not (folder / _ASKED).is_file():
        raise RunError(f"{folder} is not empty and holds no run", "choose another --out")
    rounds = [path.name for path in (folder / "checkpoints").glob("round-*")]
    if any(name != "round-000000" for name in rounds) and not force:
        raise RunError(f"{folder} already holds a run", f"go on with --resume {folder}, or choose another --out")


def _clear(folder: Path) -> None:
    """Removes an earlier run, and nothing that a run did not write.

    The plan goes first: a run that is half removed is not resumed. _ASKED stays: what is left of it is still a run's.
    """
    for name in (_PLAN, *_FILES):
        (folder / name).unlink(missing_ok=True)
    for name in _FOLDERS:
        shutil.rmtree(folder / name, ignore_errors=True)


def asked_of(folder: Path) -> dict[str, Any]:
    """What a run's folder was asked for; raises RunError if it holds no run."""
    try:
        asked: dict[str, Any] = json.loads((folder / _ASKED).read_bytes())
    except (OSError, json.JSONDecodeError) as error:
        raise RunError(f"{folder} holds no run to resume", "give the --out of an earlier run") from error
    return asked


def simulate(simulation: Simulation, console: Console) -> dict[str, Any]:
    """Runs a simulation to its end, going on from what its folder holds; returns the content of `metrics.json`.

    Raises:
        LocumError: with the remedy; committed rounds stay in the folder.
    """
    tell = _step(console)
    began = time.monotonic()
    plan, folder = simulation.plan, simulation.folder
    with ThreadPoolExecutor(1) as background:
        begun = background.submit(begin, folder / "checkpoints", plan)
        prepared = prepare(simulation.sites, folder, seed=plan.seed, done=lambda site: tell(_told(site)))
        begun.result()
    if simulation.engine == "rehearse":
        _rehearse(simulation, prepared, console)
    with _agents(folder, prepared) as agents:
        if simulation.engine == "local":
            _run(simulation, agents, console)
        try:
            return _finish(simulation, prepared, agents, tell=tell, began=began)
        except SiteFailure as failure:
            what, remedy = MEANING[failure.code]
            reason = f"the run is complete and its model is in {folder}, but testing or a baseline failed: {what}"
            raise RunError(reason, f"{remedy}; then `locum simulate --resume {folder}` tests it again") from failure


def _step(console: Console) -> Callable[[str], None]:
    """Prints what was just done, with the seconds since the start."""
    began = time.monotonic()
    return lambda text: console.print(Text(f"{time.monotonic() - began:6.1f} s  {text}"), soft_wrap=True)


def _told(site: Prepared) -> str:
    counts = site.counts
    quarantined = f", {sum(counts.quarantined.values())} quarantined" if counts.quarantined else ""
    unmatched = f", {counts.labels_without_image} label rows name no image" if counts.labels_without_image else ""
    return f"{site.name}: {counts.cases} cases of {counts.found} files{quarantined}{unmatched}"


@contextmanager
def _agents(folder: Path, prepared: Sequence[Prepared]) -> Iterator[dict[str, Agent]]:
    share, federation = _CACHE_BYTES // len(prepared), found_federation(folder)
    agents = {site.name: open_agent(site, Policy(), federation, cache_bytes=share) for site in prepared}
    try:
        yield agents
    finally:
        for agent in agents.values():
            agent.worker.stop()


def _run(simulation: Simulation, agents: Mapping[str, Agent], console: Console) -> None:
    from locum.simulations.engines.local import run_local

    federation, bundle = found_federation(simulation.folder), build_bundle(simulation.plan)
    sites = [open_institution(simulation.folder / "sites" / name, agents[name], federation) for name in sorted(agents)]
    log = begin_log(simulation.folder, federation, simulation.plan, sites)
    try:
        with Watch(simulation.folder / "events.jsonl", console):
            run_local(dict(enumerate(sites, start=2)), bundle, simulation.folder, min(cores(), len(sites)))
    except RunError as error:
        where = simulation.folder / "sites" / "NAME" / "site.log"
        raise RunError(error.message, f"{error.remedy} (what each site saw is in {where})") from error
    witness_log(simulation.folder, log, federation, sites)
    for site in sites:
        site.releases.seal()


def _rehearse(simulation: Simulation, prepared: Sequence[Prepared], console: Console) -> None:
    from locum.simulations.engines.rehearse import Rehearsal, run_rehearsal

    names = [site.name for site in prepared]
    run_rehearsal(Rehearsal(simulation.folder, simulation.plan, names), lambda run: Watch(run.events, console))


def _finish(
    simulation: Simulation,
    prepared: Sequence[Prepared],
    agents: Mapping[str, Agent],
    *,
    tell: Callable[[str], None],
    began: float,
) -> dict[str, Any]:
    from safetensors.numpy import load_file

    from locum.server.records import RunSummary
    from locum.simulations import checks, report, results
    from locum.simulations.report_data import data_of

    plan, folder = simulation.plan, simulation.folder
    summary = RunSummary.model_validate_json((folder / "run.json").read_bytes())
    model = load_file(folder / "model.safetensors")
    workers = {name: agents[name].worker for name in summary.sites}
    folds = results.folds_of(plan, {name: agent.worker for name, agent in agents.items()})
    tested = {name: worker for name, worker in workers.items() if folds[name]["test"]}
    federated = results.scored(plan, results.outcomes_of(plan, tested, model, round_number=summary.round))
    found = None
    if simulation.baselines:
        members = [site for site in prepared if site.name in workers]
        with _pooled(simulation, members) as worker:
            found = results.baselines(
                plan, workers, worker, tested=tested, parallel=cores(), told=lambda name: tell(f"trained {name}")
            )
    metrics = results.as_metrics(
        plan,
        federated,
        found,
        seconds=time.monotonic() - began,
        round_seconds=[record.seconds for record in summary.history],
        cells=summary.test.cells,
    )
    if simulation.privacy_check:
        tell("trying to tell from the model whom it was trained on")
        metrics["privacy_check"] = checks.privacy_check(
            plan, workers, model, round_number=summary.round, parallel=cores()
        )
    replace_file(folder / "metrics.json", json.dumps(metrics, indent=1).encode())
    count = report.pictures_each(len(workers))
    pictures = report.pictures_of(plan, tested, model, round_number=summary.round, count=count)
    data = data_of(folder, plan, {site.name: site.counts for site in prepared}, folds)
    report.write(folder, plan, summary=summary, metrics=metrics, data=data, pictures=pictures)
    return metrics


@contextmanager
def _pooled(simulation: Simulation, prepared: Sequence[Prepared]) -> Iterator[Worker]:
    """A worker over the stores of all sites: what a hospital would have if images could move."""
    folder = simulation.folder / "sites" / "_pooled"
    folder.mkdir(parents=True, exist_ok=True)
    stores = tuple(site.store for site in prepared)
    settings = Settings("pooled", stores, folder / "run", cache_bytes=_CACHE_BYTES)
    worker = Worker(settings, site_log(folder / "site.log", "pooled"))
    try:
        yield worker
    finally:
        worker.stop()
