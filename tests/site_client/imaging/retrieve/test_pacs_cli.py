"""`locum site pacs`: what a query names, before anything is fetched, and why a PACS does not answer."""

from __future__ import annotations

import json
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pynetdicom.sop_class import StudyRootQueryRetrieveInformationModelFind
from typer.testing import CliRunner, Result

from locum.site_client.cli import app
from tests.orthanc import PLANTED, Pacs, Study, document, free_port
from tests.site_client.imaging.retrieve.dimse import peer
from tests.site_client.imaging.retrieve.web import web_pacs

CT, MR = Study(500), Study(501, modality="MR", slices=3)


def run(folder: Path, *sources: dict[str, Any], as_json: bool = True) -> Result:
    site = folder / "site.yaml"
    site.write_text(json.dumps({"name": "north", "sources": list(sources)}), encoding="utf-8")
    return CliRunner().invoke(app, ["pacs", str(site), *(["--json"] if as_json else [])])


def numbers(folder: Path, *lines: str) -> dict[str, str]:
    path = folder / "numbers.txt"
    path.write_text("\n".join(lines), encoding="utf-8")
    return {"accessions": str(path)}


def test_it_counts_what_would_be_fetched(orthanc: Pacs, tmp_path: Path, way: str) -> None:
    orthanc.load(CT, replace(CT, series=2, body_part="HEAD", slices=2), MR)
    orthanc.orthanc.load([document(CT)])
    query = {**numbers(tmp_path, CT.accession, MR.accession, "ACC-none"), "modalities": ["CT", "MR"]}
    found = json.loads(run(tmp_path, orthanc.source(way, query=query, rate=2)).stdout)["pacs"][0]
    assert found["problem"] == ""
    assert (found["studies"], found["series"], found["images"]) == (2, {"CT": 2, "MR": 1}, {"CT": 6, "MR": 3})
    assert found["nowhere"] == 1
    assert found["seconds"] == 4.5


def test_nothing_is_fetched(tmp_path: Path) -> None:
    with web_pacs(CT) as pacs:
        assert run(tmp_path, pacs.source()).exit_code == 0
    assert sorted(set(pacs.asked)) == ["studies", f"studies/{CT.uid}/series"]
    assert [path.name for path in tmp_path.iterdir()] == ["site.yaml"]


def test_it_says_it_to_a_person(tmp_path: Path) -> None:
    with web_pacs(CT, replace(MR, body_part=""), said=lambda study: study.slices if study is CT else None) as pacs:
        shown = run(tmp_path, pacs.source(rate=2, query={"body_parts": ["CHEST"]}), as_json=False)
    assert shown.exit_code == 0
    assert f"127.0.0.1:{pacs.port}: 2 studies" in shown.stdout
    assert "1 studies have series without a number of images" in shown.stdout
    assert "1 series do not say their modality or body part" in shown.stdout
    assert "at 2 images a second: 0 min 2 s at least" in shown.stdout
    assert not [word for word in PLANTED if word in shown.stdout]


def test_what_is_wrong_is_told_with_its_remedy(orthanc: Pacs, tmp_path: Path) -> None:
    shown = run(tmp_path, orthanc.source("get") | {"calling": "STRANGER"}, as_json=False)
    assert shown.exit_code == 1
    assert "does not know this site's AE title STRANGER" in shown.stdout
    assert "next: have its administrator add STRANGER" in shown.stdout


def test_a_service_or_a_port_that_is_missing_is_told_before_anything_is_fetched(orthanc: Pacs, tmp_path: Path) -> None:
    with peer(CT, models=[StudyRootQueryRetrieveInformationModelFind]) as pacs:
        assert "does not offer C-GET to LOCUM" in run(tmp_path, pacs.source()).stdout
    with socket.create_server(("", orthanc.listen)):
        assert "cannot be opened" in run(tmp_path, orthanc.source("move")).stdout


def test_every_pacs_is_asked_although_one_is_down(tmp_path: Path) -> None:
    down = {"kind": "dimse", "host": "127.0.0.1", "port": free_port(), "title": "PEER"}
    with web_pacs(CT) as pacs:
        shown = run(tmp_path, down, pacs.source())
    first, second = json.loads(shown.stdout)["pacs"]
    assert shown.exit_code == 1
    assert "Connection refused" in first["problem"]
    assert (second["problem"], second["studies"]) == ("", 1)


def test_a_query_that_names_nothing_is_a_failure(tmp_path: Path) -> None:
    with web_pacs(CT) as pacs:
        shown = run(tmp_path, pacs.source(query={"modalities": ["PT"]}), as_json=False)
    assert shown.exit_code == 1
    assert "next: check the query in the site file" in shown.stdout


def test_a_site_without_a_pacs_is_told(tmp_path: Path) -> None:
    (tmp_path / "dicom").mkdir()
    shown = run(tmp_path, {"kind": "dicom", "path": "dicom"})
    assert shown.exit_code == 1
    assert "has no PACS among its sources" in str(shown.exception)


@pytest.mark.parametrize("as_json", [True, False])
def test_a_study_whose_series_cannot_be_listed_is_counted(tmp_path: Path, as_json: bool) -> None:
    with web_pacs(CT, MR) as pacs:
        pacs.twists.append(
            lambda request: (
                request.place == f"studies/{CT.uid}/series" and (request.reply(b"", "text/plain", 500) or True)
            )
        )
        shown = run(tmp_path, pacs.source(), as_json=as_json)
    assert '"unlisted": 1' in shown.stdout or "1 studies do not list their series" in shown.stdout
