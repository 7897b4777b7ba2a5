"""`locum site review | approve | revoke | status`: what a steward types, and what a script reads."""

from __future__ import annotations

import fcntl
import io
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from locum.common.cli import main
from tests.site_client.enrolled import NOW, Hospital

Site = Callable[..., tuple[int, str, str]]


@pytest.fixture
def site(hospital: Hospital, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Site:
    """Runs `locum site` in the hospital's folder; returns exit code, output and errors."""
    (hospital.home / "store").mkdir()
    (hospital.home / "site.yaml").write_text("stores: [store]\n")

    def run(*words: str, answer: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr("sys.stdin", io.StringIO(answer))
        code = main(["site", *words, "--home", str(hospital.home)])
        told = capsys.readouterr()
        return code or 0, told.out, told.err

    return run


def _json(told: tuple[int, str, str]) -> Any:
    assert told[0] == 0, told
    return json.loads(told[1])


def _policy(hospital: Hospital, text: str) -> None:
    (hospital.home / "site.yaml").write_text(f"stores: [store]\npolicy: {{{text}}}\n")


def test_proposals_are_listed_with_their_state(site: Site, hospital: Hospital) -> None:
    assert site("review")[1] == "nothing is proposed\n"
    of = hospital.proposed()
    out = site("review")[1]
    assert f"{of.digest[:12]}  test  by Team A, 20" in out
    assert "not approved" in out
    (listed,) = _json(site("review", "--json"))["proposals"]
    assert (listed["digest"], listed["proposed_at"], listed["stands"]) == (of.digest, NOW, False)
    _policy(hospital, "most_rounds: 1")
    assert "forbidden by this site's policy: most_rounds" in site("review")[1]


def test_one_plan_is_reviewed_in_words_and_as_data(site: Site, hospital: Hospital) -> None:
    of = hospital.proposed()
    assert "Privacy\n  NONE in the update" in site("review", of.digest[:6])[1]
    found = _json(site("review", of.digest, "--json"))
    assert found["sections"]["Privacy"][0].startswith("NONE")
    assert (found["digest"], found["approvals"], found["stewards_needed"]) == (of.digest, [], 1)


def test_a_plan_is_shown_before_it_is_approved_and_no_is_no(site: Site, hospital: Hospital) -> None:
    of = hospital.proposed()
    code, out, _ = site("approve", of.digest[:8], "--steward", "Anna", answer="n\n")
    assert code == 130
    assert "NONE towards the coordinator" in out
    assert not hospital.approvals().standing(of.digest)
    code, out, _ = site("approve", of.digest[:8], "--steward", "Anna", answer="y\n")
    assert code == 0
    assert "approved by Anna" in out
    assert hospital.approvals().standing(of.digest)


def test_a_script_approves_and_revokes(site: Site, hospital: Hospital) -> None:
    of = hospital.proposed()
    assert _json(site("approve", of.digest, "--yes", "--json", "--steward", "Anna"))["stands"] is True
    found = _json(site("revoke", of.digest, "--json", "--steward", "Bert"))
    assert (found["stands"], found["approvals"]) == (False, [])
    assert found["revoked_at"] == pytest.approx(time.time(), abs=600)
    code, _, errors = site("approve", of.digest, "--json")
    assert code == 2
    assert "--yes" in errors


def test_the_login_name_signs_unless_another_is_given(
    site: Site, hospital: Hospital, monkeypatch: pytest.MonkeyPatch
) -> None:
    of = hospital.proposed()
    monkeypatch.setenv("LOGNAME", "dr-weber")
    assert _json(site("approve", of.digest, "--yes", "--json"))["approvals"][0]["steward"] == "dr-weber"


def test_a_second_steward_is_asked_for(site: Site, hospital: Hospital) -> None:
    of = hospital.proposed()
    _policy(hospital, "stewards: 2")
    out = site("approve", of.digest, "--yes", "--steward", "Anna")[1]
    assert "waits for another steward" in out
    assert f"locum site approve {of.digest[:12]} --steward NAME" in out
    assert "approved by Anna" in site("approve", of.digest, "--yes", "--steward", "Bert")[1]
    assert hospital.approvals(stewards=2).standing(of.digest)


def test_a_forbidden_plan_is_not_approved_and_the_clause_is_told(site: Site, hospital: Hospital) -> None:
    of = hospital.proposed()
    _policy(hospital, "networks: [UNet]")
    code, _, errors = site("approve", of.digest, "--yes")
    assert code == 1
    assert "(networks): the network is Classifier" in errors


@pytest.mark.parametrize("configuration", [None, "polcy: 1\n", "stores: [gone]\n"])
def test_an_approval_can_be_taken_back_whatever_the_configuration(
    configuration: str | None, site: Site, hospital: Hospital
) -> None:
    of = hospital.proposed()
    assert site("approve", of.digest, "--yes", "--steward", "Anna")[0] == 0
    path = hospital.home / "site.yaml"
    path.write_text(configuration) if configuration else path.unlink()
    assert site("revoke", of.digest[:6])[0] == 0
    assert not hospital.approvals().standing(of.digest)


def test_the_status_tells_identity_plans_and_agent(site: Site, hospital: Hospital) -> None:
    of = hospital.proposed()
    hospital.approvals().approve(of.digest, "Anna")
    found = _json(site("status", "--json"))
    assert (found["site"], found["federation"], found["certificate_valid"]) == ("north", "Test federation", True)
    assert (found["configuration"], found["damaged"], found["agent"]["running"]) == ("ok", [], False)
    assert found["proposals"][0]["stands"] is True
    out = site("status")[1]
    for said in ("site north of Test federation", "certificate valid until 20", "the agent does not run", "by Anna"):
        assert said in out


@pytest.mark.parametrize(
    ("said", "state"),
    [
        (None, "runs, and has not said anything yet"),
        ({"connected": True, "at": NOW}, "runs, connected since 20"),
        ({"connected": False, "problem": "no route\x1b[2J", "at": NOW}, "no route\N{REPLACEMENT CHARACTER}[2J"),
        (
            {"connected": True, "at": NOW, "activity": "training", "round": 3, "run": "r-1"},
            "training in round 3 of r-1",
        ),
        ({"connected": True, "at": NOW, "activity": "downloading", "round": 0, "run": "r-1"}, "downloading for r-1"),
        ({"connected": True, "at": NOW, "activity": "idle", "round": 0, "run": ""}, ", idle"),
    ],
)
def test_the_status_tells_what_a_running_agent_says(
    said: dict[str, Any] | None, state: str, site: Site, hospital: Hospital
) -> None:
    if said is not None:
        (hospital.home / "agent.json").write_text(json.dumps(said))
    with (hospital.home / "agent.lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        found = _json(site("status", "--json"))
    assert found["agent"]["running"] is True
    assert state in found["agent"]["state"]
    assert _json(site("status", "--json"))["agent"]["running"] is False


@pytest.mark.parametrize(
    ("offset", "told"), [(-300.0, "300 s ahead of"), (300.0, "300 s behind"), (59.0, ""), ("soon", ""), (None, "")]
)
def test_an_approval_that_a_wrong_clock_dates_is_told(
    offset: object, told: str, site: Site, hospital: Hospital
) -> None:
    of = hospital.proposed()
    (hospital.home / "agent.json").write_text(json.dumps({"connected": True, "at": NOW, "offset": offset}))
    code, _, errors = site("approve", of.digest, "--yes", "--json")
    assert code == 0
    assert told in errors
    assert bool(told) == ("clock" in errors)


@pytest.mark.parametrize("command", ["review", "status", "start"])
def test_a_folder_that_cannot_be_used_is_told_in_words(command: str, site: Site, hospital: Hospital) -> None:
    for name in ("agent.lock", f"proposals/{'a' * 64}.json"):
        (hospital.home / name).mkdir(parents=True)
    code, _, errors = site(command)
    assert code == 1
    assert "cannot be used: Is a directory" in errors


@pytest.mark.parametrize("word", ["[1]", "not json", "{"])
def test_a_damaged_word_of_the_agent_is_no_word(word: str, site: Site, hospital: Hospital) -> None:
    (hospital.home / "agent.json").write_text(word)
    assert _json(site("status", "--json"))["agent"]["state"] == "does not run"


def test_the_status_names_what_does_not_count_and_what_is_misspelt(site: Site, hospital: Hospital) -> None:
    of = hospital.proposed()
    path = hospital.home / "proposals" / f"{of.digest}.json"
    path.write_bytes(b"{}")
    (hospital.home / "site.yaml").write_text("stores: [store]\npolcy: {}\n")
    out = site("status")[1]
    assert str(path) in out
    assert "there is no key 'polcy'" in out


@pytest.mark.parametrize("command", [["review"], ["approve", "abcdef"], ["revoke", "abcdef"], ["status"]])
def test_who_is_not_enrolled_is_told_how(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["site", *command, "--home", str(tmp_path)]) == 2
    assert "locum site enrol INVITE" in capsys.readouterr().err


def test_the_folder_is_taken_from_the_environment(
    hospital: Hospital, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCUM_SITE_HOME", str(hospital.home))
    assert main(["site", "status"]) in (0, None)
    assert "site north" in capsys.readouterr().out


def test_an_agents_file_can_be_ingested(hospital: Hospital, capsys: pytest.CaptureFixture[str]) -> None:
    (hospital.home / "scans").mkdir()
    path = hospital.home / "site.yaml"
    path.write_text("name: north\nsources: [{kind: dicom, path: scans}]\npolicy: {stewards: 2}\n")
    assert main(["site", "ingest", str(path), "--store", str(hospital.home / "store")]) == 2
    assert "no file was found" in capsys.readouterr().err
