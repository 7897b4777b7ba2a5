"""The empirical privacy check of a simulation: at each site where its patients are, and over all sites.

The numbers are `privacy_check` of `metrics.json`; report and model card show them with what they cannot show.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

import numpy as np

from locum.common.messages import Arrays
from locum.common.plan import Plan
from locum.site_client.check import Losses, audit_of, limits_of, of_attack, of_canaries
from locum.site_client.privacy.attacks import Attack, attack
from locum.site_client.privacy.one_run import Audit
from locum.site_client.worker import Worker


def privacy_check(
    plan: Plan, workers: Mapping[str, Worker], model: Arrays, *, round_number: int, parallel: int
) -> dict[str, Any]:
    """The check of a federation's model after a round: `privacy_check` of `metrics.json`; raises SiteFailure."""

    def at_site(worker: Worker) -> tuple[Losses, Audit | None]:
        _, found = worker.call("losses", plan, model, round=round_number)
        seen, _ = worker.call("canaries", plan, model, round=round_number)
        return Losses(found["members"], found["others"]), audit_of(seen["canaries"])

    with ThreadPoolExecutor(parallel) as pool:
        found = dict(zip(workers, pool.map(at_site, workers.values()), strict=True))
    losses = {site: own for site, (own, _) in found.items()}
    return as_metrics(plan, losses, {site: audit for site, (_, audit) in found.items()})


def as_metrics(plan: Plan, losses: Mapping[str, Losses], audits: Mapping[str, Audit | None]) -> dict[str, Any]:
    """The check as plain data, from what was found at each site."""
    whole = _attack(list(losses.values()))
    return {
        "membership": {
            "all": _as_dict(whole),
            "per_site": {site: _as_dict(_attack([own])) for site, own in losses.items()},
        },
        "canaries": {site: _as_dict(audit) for site, audit in audits.items()} if plan.private is not None else None,
        "failed": {site: audit.failed for site, audit in audits.items() if audit is not None and audit.failed},
        "words": {"Membership inference": of_attack(whole), **_of_canaries(plan, audits)},
        "limits": list(limits_of(plan)),
    }


def _attack(parts: Sequence[Losses]) -> Attack | None:
    return attack(*(np.concatenate([getattr(part, side) for part in parts]) for side in ("members", "others")))


def _as_dict(found: Attack | Audit | None) -> dict[str, Any] | None:
    return None if found is None else asdict(found)


def _of_canaries(plan: Plan, audits: Mapping[str, Audit | None]) -> dict[str, str]:
    """In words, a topic for each site; one for all where the plan has no differential privacy."""
    if plan.private is None:
        return {"Canaries": of_canaries(plan, None)}
    return {f"Canaries at {site}": of_canaries(plan, audit) for site, audit in audits.items()}
