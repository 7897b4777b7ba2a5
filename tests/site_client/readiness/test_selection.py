"""From images to roster, with real agents and real workers: who does not meet the contract does not train."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from locum.common.fab import build_bundle
from locum.common.log.entries import ReadinessEntry, RosterEntry, RoundEntry
from locum.common.plan import Plan
from locum.server.checkpoints import Checkpoints
from locum.server.home import Home
from locum.server.link import Direct
from locum.server.records import Events
from locum.server.rounds import Finished, open_engine, run
from locum.simulations.engines.local import LocalGrid
from locum.simulations.institutions import found_federation, open_agent
from locum.simulations.preparation import Prepared
from locum.site_client.agent import Agent
from locum.site_client.gate import Policy
from tests.server.test_log import of_kind
from tests.site_client.asking import plan


def _changed(site: Prepared, folder: Path, change: str) -> Prepared:
    """A hospital whose catalog says something else of its images."""
    shutil.copytree(site.store, folder / "store")
    with closing(sqlite3.connect(folder / "store" / "catalog.sqlite")) as connection, connection:
        connection.execute(change)
    return Prepared(site.name, folder, site.counts)


@pytest.fixture
def agents(hospitals: dict[str, Prepared], tmp_path: Path) -> Iterator[dict[int, Agent]]:
    """`north`, whose images are of the foot, and `riverside`, whose are of nothing that is stated."""
    federation = found_federation(tmp_path / "run")
    foot = _changed(hospitals["north"], tmp_path / "north", "UPDATE cases SET body_part = 'FOOT'")
    bare = _changed(hospitals["riverside"], tmp_path / "riverside", "UPDATE cases SET body_part = ''")
    made = {
        node: open_agent(site, Policy(least_cell=2), federation, cache_bytes=1 << 28)
        for node, site in enumerate((foot, bare), start=2)
    }
    yield made
    for agent in made.values():
        agent.worker.stop()


def _run(of: Plan, agents: dict[int, Agent], folder: Path) -> Finished:
    grid = LocalGrid(agents, build_bundle(of), 2)
    events = Events(folder / "events.jsonl")
    try:
        return run(open_engine(of, grid, Checkpoints(folder / "checkpoints", of), events, Direct(Home(folder))))
    finally:
        events.close()
        grid.close()


def test_a_site_that_does_not_meet_one_clause_does_not_train_and_the_log_says_why(
    agents: dict[int, Agent], tmp_path: Path
) -> None:
    of = plan(contract__body_parts=["FOOT"], participation__quorum=1, rounds=1)
    finished = _run(of, agents, tmp_path / "run")
    assert (set(finished.roster.nodes), finished.status) == ({"north"}, "completed with losses")
    assert finished.roster.excluded["riverside"].word == "NOT_READY"
    said = {entry.site: entry.statement for entry in of_kind(tmp_path / "run" / "log", ReadinessEntry)}
    assert ('"body_parts":true' in said["north"], '"body_parts":true' in said["riverside"]) == (True, False)
    (roster,) = of_kind(tmp_path / "run" / "log", RosterEntry)
    assert (roster.sites, roster.excluded) == (("north",), {"riverside": "NOT_READY"})
    assert [entry.sites for entry in of_kind(tmp_path / "run" / "log", RoundEntry)] == [("north",)]


def test_both_train_where_the_contract_asks_for_nothing_that_one_has_not(
    agents: dict[int, Agent], tmp_path: Path
) -> None:
    finished = _run(plan(participation__quorum=2, rounds=1), agents, tmp_path / "run")
    assert (set(finished.roster.nodes), finished.status) == ({"north", "riverside"}, "completed")
