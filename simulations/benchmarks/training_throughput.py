"""Training in Locum against a bare PyTorch loop over the same loader, in one run, alternating.

Both train the demo's network on one emulated hospital with the same loader. Ours is the worker's whole round: weights
in, local training, update out.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

import torch

from locum.common import build
from locum.common.plan import Plan, changed, load_plan
from locum.simulations.benchmarks.rows import Row
from locum.simulations.cli import shipped
from locum.simulations.preparation import Prepared, prepare_site
from locum.simulations.sites import read_sites
from locum.site_client.session import Session, open_session, train_round
from locum.site_client.settings import Settings
from locum.site_client.training import data

_STEPS, _REPEATS = 30, 7


def measure() -> list[Row]:
    """Images a second of both, and their ratio: medians of one run."""
    plan = _plan()
    with tempfile.TemporaryDirectory() as folder:
        hospital = read_sites(shipped("sites"), seed=plan.seed, count=None)[0]
        site = prepare_site(hospital, Path(folder), plan.seed)
        session = _session(plan, site)
        train_round(session, build.shared_tensors(session.network, session.roles), 1)
        pairs = [(_ours(session, number), _bare(session, number)) for number in range(2, 2 + _REPEATS)]
    images = _STEPS * plan.training.batch_size
    ours, bare = (statistics.median(column) for column in zip(*pairs, strict=True))
    return [
        Row("locum, a whole round", images / ours, "images/s"),
        Row("bare PyTorch loop over the same loader", images / bare, "images/s"),
        Row("locum / bare", statistics.median(b / a for a, b in pairs), "×"),
    ]


def _plan() -> Plan:
    plan = load_plan(shipped("plans"))
    training = {**plan.model_dump(mode="json")["training"], "local_steps": _STEPS}
    return changed(plan, training=training)


def _session(plan: Plan, site: Prepared) -> Session:
    return open_session(Settings(site.name, (site.store,), site.folder / "run"), plan)


def _ours(session: Session, round_number: int) -> float:
    model = build.shared_tensors(session.network, session.roles)
    began = time.perf_counter()
    train_round(session, model, round_number)
    return time.perf_counter() - began


def _bare(session: Session, round_number: int) -> float:
    plan, network = session.plan, session.network
    prepared = session.dataset("train", augment=True)
    began = time.perf_counter()
    optimiser = torch.optim.AdamW(network.parameters(), **plan.optimiser.parameters)
    criterion = torch.nn.CrossEntropyLoss()
    network.train()
    for batch in data.training_loader(plan, prepared, site="bare", round_number=round_number):
        optimiser.zero_grad(set_to_none=True)
        loss = criterion(network(batch["image"]), batch["label"])
        torch.autograd.backward(loss)
        optimiser.step()
    return time.perf_counter() - began
