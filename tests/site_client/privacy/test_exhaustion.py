"""A site whose patients have given enough leaves a run in the middle; the run goes on, with real agents and workers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from locum.common.envelope import open_spent
from locum.common.errors import MEANING, Code
from locum.common.fab import build_bundle
from locum.common.identity import certified_key
from locum.common.plan import Plan
from locum.server.checkpoints import Checkpoints
from locum.server.records import RunSummary
from locum.simulations.engines.local import run_local
from locum.simulations.institutions import (
    Federation,
    begin,
    credentials_of,
    found_federation,
    open_agent,
    open_institution,
)
from locum.simulations.preparation import Prepared
from locum.simulations.record import begin_log
from locum.site_client.gate import Policy
from locum.site_client.imaging.fitting import fitting_cases, patients_of
from locum.site_client.privacy.accountant import epsilon
from locum.site_client.privacy.budget import one_release
from locum.site_client.privacy.ledger import Ledger
from tests.site_client.privacy.private_plans import private

_SPLIT = {"train": 0.6, "validation": 0.2, "test": 0.2}
#: The third one has the images of the first.
_STORES = {"harbour": "north", "north": "north", "riverside": "riverside"}
_SMALL = "riverside"


def _round_and_a_half(of: Plan, store: Path) -> float:
    """A lifetime that one round and its metrics fit into, and no second one."""
    patients = patients_of(fitting_cases([store], of))
    used = [one_release(of, fold, patients[fold])[0] for fold in ("train", "validation")]  # type: ignore[index,arg-type]
    return epsilon(used, Policy().ledger_delta) * 1.001


def _run(folder: Path, of: Plan, hospitals: Mapping[str, Prepared]) -> Federation:
    (folder / "plan.yaml").write_text(of.to_yaml())
    begin(folder / "checkpoints", of)
    federation, sites = found_federation(folder), []
    for name, data in _STORES.items():
        home = folder / "sites" / name
        home.mkdir(parents=True)
        (home / "store").symlink_to(hospitals[data].store)
        lifetime = {"lifetime_epsilon": _round_and_a_half(of, home / "store")} if name == _SMALL else {}
        site = Prepared(name, home, hospitals[data].counts)
        agent = open_agent(site, Policy.model_validate(lifetime), federation, cache_bytes=1 << 28)
        sites.append(open_institution(home, agent, federation))
    begin_log(folder, federation, of, sites)
    try:
        run_local(dict(enumerate(sites, start=2)), build_bundle(of), folder, 2)
    finally:
        for one in sites:
            one.agent.worker.stop()
    return federation


@pytest.fixture(scope="module")
def finished(hospitals: dict[str, Prepared], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Plan, Any]:
    """A private run of three rounds over three sites, at one of which too little is left."""
    folder, of = tmp_path_factory.mktemp("run"), private(rounds=3, contract__split=_SPLIT, delta=0.01)
    return folder, of, _run(folder, of, hospitals)


def _summary(folder: Path) -> RunSummary:
    return RunSummary.model_validate_json((folder / "run.json").read_bytes())


def test_a_site_whose_budget_is_spent_refuses_the_next_round_and_the_run_goes_on(finished: Any) -> None:
    found = _summary(finished[0])
    others = tuple(name for name in _STORES if name != _SMALL)
    assert [record.sites for record in found.history] == [tuple(_STORES), others, others]
    assert [record.excluded for record in found.history[1:]] == [{_SMALL: MEANING[Code.BUDGET_SPENT][0]}] * 2
    assert found.status == "completed with losses"
    assert found.lost == {_SMALL: [2, 3]}
    assert "BUDGET_SPENT: all that the population" in (finished[0] / "sites" / _SMALL / "site.log").read_text()


def test_its_ledger_holds_what_it_gave_and_nothing_of_what_it_refused(finished: Any) -> None:
    rows = Ledger(finished[0] / "sites" / _SMALL / "ledger.sqlite").rows()
    reserved = [(row.purpose, row.round) for row in rows if row.kind == "reserve"]
    assert reserved == [("train", 1), ("validation", 1)]
    assert sum(row.kind == "commit" for row in rows) == 2


def test_the_others_stay_within_the_plans_epsilon_and_their_statements_count_at_the_coordinator(finished: Any) -> None:
    folder, _, federation = finished
    statements = [
        (site, envelope)
        for line in (folder / "log" / "entries.jsonl").read_text().splitlines()
        if (entry := json.loads(line)).get("spent")
        for site, envelope in entry["spent"].items()
    ]
    spent = [
        open_spent(envelope.encode(), certified_key(credentials_of(site, federation).certificate))
        for site, envelope in statements
    ]
    assert all(one.epsilon <= (2.0 if one.purpose == "train" else 1.0) for one in spent)
    trained = [(one.site, one.round) for one in spent if one.purpose == "train"]
    assert trained.count(("north", 3)) == 1
    assert [site for site, _ in trained].count(_SMALL) == 1
    last = {one.round: one.epsilon for one in spent if (one.site, one.purpose) == ("north", "train")}
    assert last[1] < last[2] < last[3]


def test_no_loss_leaves_a_private_run_nor_how_long_it_took_which_tells_who_was_drawn(finished: Any) -> None:
    records = _summary(finished[0]).history
    assert {loss for record in records for loss in record.losses.values()} == {None}
    assert [record.train_seconds for record in records] == [{}] * len(records)
    assert Checkpoints(finished[0] / "checkpoints", finished[1]).rounds()[-1] == 3
