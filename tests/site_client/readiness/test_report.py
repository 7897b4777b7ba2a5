"""`locum site readiness`: what the steward sees, on the terminal and in a browser without a network."""

from __future__ import annotations

import json
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from locum.common.cli import main
from locum.common.envelope import open_readiness
from locum.common.plan import Plan
from locum.simulations.preparation import Prepared
from locum.site_client.identity import load_identity
from locum.site_client.readiness.outbox import statements
from tests.browser import browser, program
from tests.site_client.asking import plan
from tests.site_client.enrolled import Hospital


def _plan_file(folder: Path, of: Plan) -> Path:
    path = folder / "plan.yaml"
    path.write_text(of.to_yaml())
    return path


def _run(*words: object) -> int:
    return main(["site", "readiness", *map(str, words)]) or 0


def test_a_site_that_is_ready_ends_with_0_and_one_that_is_not_with_1_and_says_how_to_mend_it(
    hospitals: dict[str, Prepared], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store, out = hospitals["north"].store, tmp_path / "out"
    assert _run(_plan_file(tmp_path, plan()), "--store", store, "--out", out) == 0
    said = capsys.readouterr().out
    assert "test: ready; the statement is NOT SIGNED" in said
    of = plan(contract__consent="required")
    assert _run(_plan_file(tmp_path, of), "--store", store, "--out", out, "--json") == 1
    told = json.loads(capsys.readouterr().out)
    assert (told["ready"], told["signed"], told["envelope"]) == (False, False, None)
    (clause,) = [one for one in told["clauses"] if not one["met"]]
    assert clause["clause"] == "consent"
    assert "Name the list in site.yaml" in clause["remedy"]
    assert Path(told["report"]).parent == out


def test_the_report_lies_in_the_store_where_the_desk_finds_it(hospitals: dict[str, Prepared], tmp_path: Path) -> None:
    from locum.site_client.desk import shelf

    store, of = shutil.copytree(hospitals["north"].store, tmp_path / "store"), plan()
    _run(_plan_file(tmp_path, of), "--store", store)
    with shelf.opened(store) as opened_store:
        assert opened_store is not None
    assert [path.name for path in (store / "readiness").glob("*.html")] == [f"test-{of.digest[:12]}.html"]
    numbers = json.loads((store / "readiness" / f"test-{of.digest[:12]}.json").read_bytes())
    assert numbers["statement"]["plan"] == of.digest


@pytest.mark.skipif(program() is None, reason="no Chromium here")
def test_the_page_opens_without_a_network_and_shows_what_fails_with_its_remedy_and_pictures(
    masked: Prepared, tmp_path: Path
) -> None:
    from tests.site_client.asking import segmentation_plan

    store = shutil.copytree(masked.store, tmp_path / "store")
    with closing(sqlite3.connect(store / "catalog.sqlite")) as connection, connection:
        connection.execute("UPDATE cases SET label = '<script>alert(1)</script>'")
    of = segmentation_plan(contract__body_parts=["FOOT"])
    _run(_plan_file(tmp_path, of), "--store", store)
    (page,) = (store / "readiness").glob("*.html")
    with browser() as tab:
        tab.open(page.as_uri())
        text = tab.text
        assert "NOT ready: this site cannot be selected" in text
        assert "Set Body Part Examined at the PACS" in text
        assert "<script>alert(1)</script>" in text
        assert tab.run("document.scripts.length") == 0
        shown = tab.run("[...document.images].filter(one => one.naturalWidth > 0).length")
        assert shown == tab.run("document.images.length") > 0
        assert [address for address in tab.asked if not address.startswith(("file:", "data:"))] == []
        assert tab.said == []


def test_a_broken_image_is_a_gap_in_the_report_and_no_failure(hospitals: dict[str, Prepared], tmp_path: Path) -> None:
    store = shutil.copytree(hospitals["north"].store, tmp_path / "store")
    for image in (store / "volumes").iterdir():
        image.write_bytes(b"no image")
    assert _run(_plan_file(tmp_path, plan()), "--store", store) == 0
    (page,) = (store / "readiness").glob("*.html")
    assert "its file cannot be read" in page.read_text()


# --- letting a statement go


def test_a_released_statement_is_signed_and_waits_for_the_agent(
    hospital: Hospital, hospitals: dict[str, Prepared], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    of = hospital.proposed()
    words = (of.digest[:12], "--home", hospital.home, "--store", hospitals["north"].store, "--out", tmp_path)
    assert _run(*words) == 0
    assert list(statements(hospital.home)) == []
    assert _run(*words, "--release") == 0
    assert "released: the agent hands it over" in capsys.readouterr().out
    (envelope,) = statements(hospital.home)
    said = open_readiness(envelope, load_identity(hospital.home).key.public_key())
    assert (said.site, said.run, said.plan, said.ready) == ("north", None, of.digest, True)


def test_a_statement_of_a_site_that_nobody_enrolled_is_not_released(
    hospitals: dict[str, Prepared], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    home = tmp_path / "nowhere"
    path = _plan_file(tmp_path, plan())
    assert _run(path, "--home", home, "--store", hospitals["north"].store, "--out", tmp_path, "--release") == 2
    assert "not signed cannot be released" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("nosuch.yaml",), "there is no plan at nosuch.yaml"),
        (("abcdef123456",), "next:"),
    ],
)
def test_what_cannot_be_found_is_told_with_the_next_step(
    words: tuple[str, ...],
    message: str,
    hospital: Hospital,
    hospitals: dict[str, Prepared],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert _run(*words, "--home", hospital.home, "--store", hospitals["north"].store) == 2
    assert message in capsys.readouterr().err
