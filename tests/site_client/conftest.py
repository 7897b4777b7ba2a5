"""Small hospitals, written by the simulator and ingested by the real ingest, once for all tests of the site."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from locum.simulations.federations import FederationSpec, federation
from locum.simulations.institutions import Federation, found_federation, open_agent
from locum.simulations.preparation import Prepared, prepare_site
from locum.site_client.agent import Agent
from locum.site_client.gate import Policy
from locum.site_client.settings import Settings
from tests.site_client.enrolled import Hospital, copy_of, enrol_hospital

_SMALL = FederationSpec(sites=2, seed=3, patients=12, shape=(8, 16, 16), spacing=(10.0, 8.0, 8.0))


def _prepared(folder: Path, **changes: Any) -> dict[str, Prepared]:
    hospitals = federation(replace(_SMALL, **changes))
    return {spec.name: prepare_site(spec, folder / spec.name, seed=5) for spec in hospitals}


@pytest.fixture(scope="session")
def hospitals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Prepared]:
    """`north` and `riverside`: 13 CT volumes each, half of them with a lesion."""
    return _prepared(tmp_path_factory.mktemp("classification"))


@pytest.fixture(scope="session")
def masked(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """A hospital with lesion masks, of patients with and without a lesion."""
    return _prepared(tmp_path_factory.mktemp("segmentation"), sites=1, task="segmentation")["north"]


@pytest.fixture(scope="session")
def flat(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """A hospital with radiographs."""
    changes = {"sites": 1, "modality": "DX", "dims": 2, "shape": (1, 16, 16), "spacing": (1.0, 10.0, 10.0)}
    return _prepared(tmp_path_factory.mktemp("flat"), **changes)["north"]


@pytest.fixture
def settings(hospitals: dict[str, Prepared], tmp_path: Path) -> Settings:
    """How `north` works, with an empty folder for its local tensors."""
    return Settings("north", (hospitals["north"].store,), tmp_path / "run")


@pytest.fixture(scope="session")
def trusted(tmp_path_factory: pytest.TempPathFactory) -> Federation:
    """Who signs for the agents of these tests."""
    return found_federation(tmp_path_factory.mktemp("trusted"))


@pytest.fixture(scope="session")
def agent(hospitals: dict[str, Prepared], trusted: Federation) -> Iterator[Agent]:
    """The agent of `north`, with a policy that allows everything; for tests that leave it as they found it."""
    made = open_agent(hospitals["north"], Policy(), trusted, cache_bytes=1 << 28)
    yield made
    made.worker.stop()


@pytest.fixture
def employ(hospitals: dict[str, Prepared], trusted: Federation, tmp_path: Path) -> Iterator[Callable[..., Agent]]:
    """Starts agents with real workers; each has a folder of its own for log and local tensors."""
    agents: list[Agent] = []

    def start(name: str = "north", *, store: Path | None = None, folder: str = "agent", **policy: Any) -> Agent:
        home = tmp_path / f"{folder}-{len(agents)}"
        home.mkdir()
        (home / "store").symlink_to(store or hospitals[name].store)
        site = Prepared(name, home, hospitals[name].counts)
        agents.append(open_agent(site, Policy.model_validate(policy), trusted, cache_bytes=1 << 28))
        return agents[-1]

    yield start
    for agent in agents:
        agent.worker.stop()


@pytest.fixture(scope="session")
def _enrolled(tmp_path_factory: pytest.TempPathFactory) -> Hospital:
    return enrol_hospital(tmp_path_factory.mktemp("federation"))


@pytest.fixture
def hospital(_enrolled: Hospital, tmp_path: Path) -> Hospital:
    """An enrolled site with a folder of its own, to which nothing was proposed yet."""
    return copy_of(_enrolled, tmp_path / "locum-site")
