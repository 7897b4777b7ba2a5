"""`locum audit` as people type it: exit codes, JSON, parts, and the page to print."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from locum.common.cli import main
from locum.common.identity import certificate_pem
from locum.common.log.entries import written
from tests.audits import RUN, Federation, edited, model_of, with_leaves
from tests.pages import Page
from tests.plans import secured

PRIVACY = {"epsilon": 4.0, "delta": 1e-6, "clip": 1.0, "metrics_epsilon": 1.0}
_HOSTILE = "<script>alert('A. Steward')</script>"


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Federation:
    """A federation that was careful, and whose run has ended."""
    of = secured(protection__differential_privacy=PRIVACY, release__training_loss=False, purpose="<b>to try</b> it out")
    return Federation(tmp_path_factory.mktemp("federation"), of)


@pytest.fixture(scope="module")
def true(federation: Federation) -> Path:
    """A true bundle."""
    return federation.bundle(name="true.zip")


@pytest.fixture(scope="module")
def edited_one(true: Path) -> Path:
    """A bundle in which somebody has edited entry 15."""
    return with_leaves(true, lambda lines: lines.__setitem__(15, edited(lines[15], attempt=2)))


def typed(*words: object) -> int:
    """The exit code of `locum audit` with these words."""
    return int(main(["audit", *map(str, words)]) or 0)


def told(capsys: pytest.CaptureFixture[str], *words: object) -> Any:
    """What it prints as JSON."""
    capsys.readouterr()
    typed(*words, "--json")
    return json.loads(capsys.readouterr().out)


def test_verify_says_what_it_checked_and_what_fails(
    true: Path, edited_one: Path, federation: Federation, capsys: pytest.CaptureFixture[str]
) -> None:
    assert typed("verify", true) == 0
    out = capsys.readouterr().out
    assert f"all 20 checks hold: this is the record of {RUN}" in out
    assert f"--fingerprint {federation.fingerprint}" in out
    assert typed("verify", edited_one) == 1
    out = capsys.readouterr().out
    assert "FAILS at check 5, each checkpoint has the root of the entries, at entry 15" in out
    assert "this means: entry 15 was changed" in out
    assert out.splitlines()[5].split()[:2] == ["6", "-"]  # what rests on it is not looked at


def test_verify_as_json_names_the_first_that_fails(
    true: Path, edited_one: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = told(capsys, "verify", true)
    assert (found["holds"], found["first"], len(found["checks"]), found["run"]) == (True, None, 20, RUN)
    found = told(capsys, "verify", edited_one)
    assert (found["holds"], found["first"]["number"], found["first"]["entry"]) == (False, 5, 15)


def test_whom_to_trust_is_given_as_a_file_or_as_a_fingerprint(
    true: Path, federation: Federation, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ca, other = tmp_path / "ca.pem", tmp_path / "other.pem"
    ca.write_bytes(certificate_pem(federation.authority.certificate))
    other.write_bytes(certificate_pem(federation.log_certificate))
    assert typed("verify", true, "--authority", ca) == 0
    assert "note" not in capsys.readouterr().out
    with_colons = ":".join(federation.fingerprint[n : n + 2] for n in range(0, 64, 2)).upper()
    assert typed("verify", true, "--fingerprint", with_colons) == 0
    assert typed("verify", true, "--authority", other) == 1
    assert "this bundle is of another federation" in capsys.readouterr().out
    assert typed("verify", true, "--fingerprint", "12") == 2
    assert typed("verify", true, "--authority", tmp_path / "nothing") == 2
    assert "error: " in capsys.readouterr().err


def test_what_is_no_bundle_fails_check_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("no bundle")
    for command in ("verify", "show"):
        assert typed(command, path) == 1
        assert "FAILS at check 1, the bundle is whole" in capsys.readouterr().out
    assert typed("show", path, "--out", tmp_path / "page.html") == 1
    assert "This record does not hold" in Page((tmp_path / "page.html").read_text()).text


def test_each_part_is_shown_and_another_is_not(true: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert typed("show", true) == 0
    out = capsys.readouterr().out
    for words in ("-- course", "-- rounds", "st-anne", "epsilon 4 at delta 1e-06", "secure, 3 of 3 must answer"):
        assert words in out
    assert typed("show", true, "plan") == 0
    assert "differential_privacy" in capsys.readouterr().out
    assert typed("show", true, "privacy", "--site", "north") == 0
    out = capsys.readouterr().out
    assert "north" in out
    assert "riverside" not in out
    assert typed("show", true, "rounds", "--round", 2) == 0
    assert len(capsys.readouterr().out.strip().splitlines()) == 4
    assert typed("show", true, "secrets") == 2
    assert "ask for one of course" in capsys.readouterr().err


def test_the_record_as_json_has_every_round(true: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = told(capsys, "show", true)
    assert [done["round"] for done in found["rounds"]] == [1, 2]
    assert found["sites"]["north"]["spent"]["train"] == [1.0, 1e-6]
    assert [said["decision"] for said in found["decisions"]] == ["approve"] * 3
    assert found["verdict"]["holds"]
    assert found["plan"]["name"] == "test"


def test_the_page_loads_nothing_and_nothing_of_a_name_is_markup(
    federation: Federation, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entries = federation.history()
    entries[5] = federation.approval("north", 5, steward=_HOSTILE)
    entries[15] = federation.round(2, 20, attempt=2)
    path, out = federation.bundle(entries, name="hostile.zip"), tmp_path / "record.html"
    assert typed("show", path, "--out", out) == 0
    assert f"open {out}" in capsys.readouterr().out
    text = out.read_text()
    page = Page(text)
    assert page.open == []
    assert "script" not in page.tags
    assert all(target.startswith("#") for target in page.loads)
    assert {target.removeprefix("#") for target in page.loads} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    assert "http" not in text.replace("http-equiv", "")
    assert "@import" not in text
    for words in (
        _HOSTILE, "This record holds: all 20 checks pass", "secure: 3 of 3 had to answer", "<b>to try</b> it out",
        "What this does not show", "Whether two stewards approved", "Nobody: every site", "attempt 2",
        "ε = 4 at δ = 1e-06",
    ):  # fmt: skip
        assert words in page.text, words


def test_the_page_of_a_record_that_does_not_hold_says_so_on_top(edited_one: Path, tmp_path: Path) -> None:
    out = tmp_path / "record.html"
    assert typed("show", edited_one, "--out", out) == 1
    text = Page(out.read_text()).text
    assert "This record does not hold. Check 5" in text
    assert text.index("does not hold") < text.index("Who took part")


def test_a_page_that_cannot_be_written_is_told(true: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert typed("show", true, "--out", tmp_path / "nowhere" / "record.html") == 2
    assert "choose another --out" in capsys.readouterr().err


def test_a_model_is_checked_without_a_bundle(
    federation: Federation, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entries = federation.history()
    statement, model = tmp_path / "statement.json", tmp_path / "model.safetensors"
    statement.write_bytes(federation.statement(entries, federation.checkpoints(map(written, entries))))
    model.write_bytes(model_of(2))
    assert typed("verify-model", model, statement, "--fingerprint", federation.fingerprint) == 0
    assert f"run {RUN}, completed, round 2" in capsys.readouterr().out
    assert told(capsys, "verify-model", model, statement)["predicate"]["epsilon"]["north"]["epsilon"] == 1.0
    model.write_bytes(model_of(1))
    assert typed("verify-model", model, statement) == 1
    assert "is about another model" in capsys.readouterr().err


def test_a_difference_is_told_by_the_numbers_of_the_entries(
    federation: Federation, true: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert typed("diff", true, federation.site_log("north")) == 0
    assert "agree on all 8 statements" in capsys.readouterr().out
    fewer = federation.site_log("north", [entry for n, entry in enumerate(federation.releases("north")) if n != 4])
    assert typed("diff", true, fewer) == 1
    assert "coordinator's entry 13: round 1 counts an update that the site did not let go" in capsys.readouterr().out
    found = told(capsys, "diff", true, fewer)
    assert found["differences"] == [
        {"coordinator": 13, "site": None, "what": "round 1 counts an update that the site did not let go"}
    ]


def test_a_bundle_is_made_of_a_coordinators_run_or_a_simulations_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert typed("bundle", "run", "--home", tmp_path) == 1
    assert "holds no coordinator" in capsys.readouterr().err
    assert typed("bundle", "--run-dir", tmp_path) == 1
    assert "holds no simulation with a log" in capsys.readouterr().err
