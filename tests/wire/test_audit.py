"""Over real connections: a run's bundle holds, the sites' logs agree with it, and its model leaves with a statement."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from locum.common import build
from locum.common.cli import main
from locum.server.log import open_log
from tests.plans import initial, secured
from tests.wire.federation import Process, ended, open_federation, until

SITES = ("a", "b", "c")


def test_the_bundle_of_a_run_between_hospitals_holds_and_their_logs_agree_with_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    of = secured(rounds=2, name="audited", admission__weight_cap=4e9)
    with open_federation(tmp_path) as federation:
        federation.propose(of)
        configuration = build.configuration(of, initial(of))
        (tmp_path / f"{of.digest}.json").write_text(json.dumps(configuration))
        for name in SITES:
            home = federation.enrol(name)
            command = (sys.executable, "-m", "tests.wire.secure_peer", str(home))
            federation.sites[name] = Process(command, tmp_path / f"{name}.log").start()
        for name in SITES:
            federation.approve(name, of)
        federation.ready(of, *SITES)
        run = federation.run(of)
        assert ended(run) == "completed"
        log = open_log(federation.home)
        until(lambda: set(log.witnesses().values()) == {log.store.size}, 60, "not every site has signed")
        home = federation.home.path
        bundle, pulled = tmp_path / "run.zip", tmp_path / "pulled"
        assert _typed("audit", "bundle", run.id, "--home", home, "--out", bundle) == 0
        assert _typed("pull", run.id, "--home", home, "--out", pulled) == 0
    authority = ("--authority", home / "authority" / "ca.pem")
    capsys.readouterr()
    assert _typed("audit", "verify", bundle, *authority, "--witnesses", 3, "--json") == 0, capsys.readouterr().out
    assert json.loads(capsys.readouterr().out)["run"] == run.id
    assert _typed("audit", "verify-model", pulled / "model.safetensors", pulled / "statement.json", *authority) == 0
    for name in SITES:
        capsys.readouterr()
        assert _typed("audit", "diff", bundle, tmp_path / name / "log", "--json") == 0, capsys.readouterr().out
        told = json.loads(capsys.readouterr().out)
        assert (told["site"], told["differences"]) == (name, [])
        assert told["compared"] >= 2 + 3 + 1 + 1  # updates, measurements, the decision, a cosignature


def _typed(*words: object) -> int:
    return int(main([str(word) for word in words]) or 0)
