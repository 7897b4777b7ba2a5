"""An agent's site.yaml: what stands in it is checked to the key, and nothing else may stand in it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from locum.common.errors import DataError
from locum.site_client.configuration import read_accounts, read_configuration, read_data, read_policy
from locum.site_client.gate import Policy

_CPU = min(os.sched_getaffinity(0))


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "store").mkdir()
    (tmp_path / "scans").mkdir()
    return tmp_path


def _write(home: Path, text: str) -> Path:
    path = home / "site.yaml"
    path.write_text(text)
    return path


def test_the_shipped_example_is_a_configuration(project: Path, home: Path) -> None:
    found = read_configuration(_write(home, (project / "configs" / "sites" / "agent.yaml").read_text()))
    assert found.policy.stewards == 2
    assert (found.policy.min_sites, found.rehearsal) == (3, False)
    assert found.stores == (home / "store",)


def test_the_shipped_example_has_every_key(project: Path) -> None:
    text = (project / "configs" / "sites" / "agent.yaml").read_text()
    wanted = {"stores", "proxy", "log_level", "rehearsal", "population", "ledger", *Policy.model_fields}
    wanted |= {"threads", "cpus", "memory_gib", "device", "gpu_memory_fraction", "nice"}
    assert [key for key in sorted(wanted) if f"{key}:" not in text] == []


def test_a_store_alone_is_enough_and_limits_nothing(home: Path) -> None:
    found = read_configuration(_write(home, "stores: [store]\n"))
    assert (found.policy, found.proxy, found.log_level, found.data) == (Policy(), None, "info", None)
    made = found.settings("north", home / "run")
    assert (made.site, made.stores, made.memory_bytes, made.nice) == ("north", (home / "store",), None, 0)
    assert made.threads == len(os.sched_getaffinity(0))


def test_the_ledger_lies_beside_the_file_unless_told_and_is_of_the_patients(home: Path) -> None:
    path = _write(home, "stores: [store]\n")
    assert read_configuration(path).accounts == read_accounts(path) == (home / "ledger.sqlite", "patients")
    own = _write(home, "stores: [store]\npopulation: Eyes 2026\nledger: ../shared.sqlite\n")
    assert read_accounts(own) == (home / "../shared.sqlite", "Eyes 2026")
    assert read_accounts(_write(home, "ledger: /srv/l.sqlite\n")).ledger == Path("/srv/l.sqlite")
    with pytest.raises(DataError, match="population"):
        read_accounts(_write(home, 'population: ""\n'))


def test_resources_reach_the_worker(home: Path) -> None:
    text = f"""
stores: [store]
resources: {{threads: 3, cpus: [{_CPU}], memory_gib: 4, device: "cuda:1", gpu_memory_fraction: 0.25, nice: 10}}
"""
    made = read_configuration(_write(home, text)).settings("north", home / "run")
    assert (made.threads, made.cpus, made.memory_bytes, made.cache_bytes) == (3, (_CPU,), 4 << 30, 1 << 30)
    assert (made.device, made.gpu_memory_fraction, made.nice) == ("cuda:1", 0.25, 10)


def test_a_number_of_cpus_is_that_many_and_one_thread_each(home: Path) -> None:
    made = read_configuration(_write(home, "stores: [store]\nresources: {cpus: 1}\n")).settings("north", home)
    assert (made.cpus, made.threads) == ((_CPU,), 1)


def test_one_file_serves_ingest_and_agent(home: Path) -> None:
    text = "name: north\nsources: [{kind: dicom, path: scans}]\npolicy: {most_rounds: 5}\n"
    found = read_configuration(_write(home, text))
    assert found.stores == (home / "store",)
    assert found.data is not None
    assert found.data == read_data(home / "site.yaml")
    assert found.data.sources[0].path == home / "scans"  # type: ignore[union-attr]
    assert found.policy.most_rounds == 5


@pytest.mark.parametrize(
    ("text", "message", "remedy"),
    [
        ("stores: [store]\npolcy: {}\n", "line 2: there is no key 'polcy'", "did you mean 'policy'?"),
        ("stores: [store]\npolicy:\n  steward: 2\n", "line 3, policy.steward: ", "did you mean 'stewards'?"),
        ("stores: [store]\nresources:\n  thread: 2\n", "line 3, resources.thread: ", "did you mean 'threads'?"),
        ("stores: [store]\npolicy: {stewards: 3}\n", "line 2, policy.stewards: Input should be 1 or 2", "mend"),
        (
            "stores: [store]\npolicy: {min_sites: 2}\n",
            "line 2, policy.min_sites: Input should be greater than or equal to 3",
            "mend",
        ),
        ("stores: [store]\npolicy: {hours: 8-18}\n", "policy.hours: '8-18' is no window", "mend"),
        ("stores: [store]\nresources: {cpus: 100000}\n", "100000 CPUs are more than the", "mend"),
        ("stores: [store]\nresources: {cpus: [99999]}\n", "there is no CPU 99999 here", "mend"),
        ("stores: [store]\nresources: {cpus: true}\n", "give the number of CPUs", "mend"),
        ("stores: [store]\nresources: {memory_gib: 0.1}\n", "greater than or equal to 1", "mend"),
        ("stores: [store]\nresources: {gpu_memory_fraction: 2}\n", "less than or equal to 1", "mend"),
        ("stores: [store]\nresources: {device: tpu}\n", "resources.device", "mend"),
        ("stores: [store]\nproxy: https://proxy:3128\n", "line 2, proxy: write the proxy as http://host:port", "mend"),
        ("stores: [store]\nlog_level: loud\n", "line 2, log_level", "mend"),
        ("stores: [store, other]\n", "line 1: there is no store", "locum site ingest"),
        ("stores: []\n", "stores: ", "mend"),
        ("name: north\n", "names neither stores nor sources", "stores: [DIR]"),
        ("name: north\nsources:\n  - {kind: dicom, pth: scans}\n", "line 3, sources.0.pth", "did you mean 'path'?"),
        ("stores: [store]\nlabels: {}\n", "line 1, name: Field required", "mend"),
        ("- 1\n", "is not a site file", ""),
        ("stores: [store]\nstores: [store]\n", "stands twice", "mend"),
    ],
)
def test_what_is_wrong_is_told_by_line_and_key(text: str, message: str, remedy: str, home: Path) -> None:
    with pytest.raises(DataError) as wrong:
        read_configuration(_write(home, text))
    assert message in wrong.value.message
    assert remedy in wrong.value.remedy


def test_a_password_of_the_proxy_is_not_shown(home: Path) -> None:
    found = read_configuration(_write(home, "stores: [store]\nproxy: http://me:hunter2@proxy:3128\n"))
    assert found.proxy == "http://me:hunter2@proxy:3128"
    assert "hunter2" not in repr(found)
    with pytest.raises(DataError) as wrong:
        read_configuration(_write(home, "stores: [store]\nproxy: ftp://me:hunter2@proxy:3128\n"))
    assert "hunter2" not in wrong.value.message


def test_a_policy_can_be_read_where_the_images_are_not(tmp_path: Path) -> None:
    path = _write(tmp_path, "stores: [/nowhere/at/all]\npolicy: {stewards: 2}\n")
    assert read_policy(path).stewards == 2
    with pytest.raises(DataError, match="no store"):
        read_configuration(path)


def test_a_missing_file_says_where_an_example_is(tmp_path: Path) -> None:
    with pytest.raises(DataError) as wrong:
        read_configuration(tmp_path / "site.yaml")
    assert "agent.yaml" in wrong.value.remedy


_LOOSER: dict[str, Any] = {"allow_code": True, "secure_aggregation": "off", "norm_bound": 1e9, "quorum": 1}


@pytest.mark.parametrize("key", _LOOSER)
def test_no_key_loosens_a_plan(key: str, home: Path) -> None:
    with pytest.raises(DataError, match=key):
        read_configuration(_write(home, f"stores: [store]\npolicy: {{{key}: {_LOOSER[key]}}}\n"))
