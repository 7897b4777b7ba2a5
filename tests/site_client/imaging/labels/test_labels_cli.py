"""`locum site labels` shows what the labels hold, hides nothing without a class, and shows no text of a report."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from locum.site_client.cli import app

MAP = """name: chest
version: "2"
entries:
  - {local: MASS, code: "SCT:4147007", meaning: Mass, class: lesion}
  - {local: NORM, code: "SCT:17621005", meaning: Normal, class: no_lesion}
"""
TABLE = {"file": "labels.csv", "key": "accession", "key_column": "acc", "label_column": "code"}
REPORTS = {"kind": "reports", "file": "reports.csv", "key": "accession", "key_column": "acc", "text_column": "text",
           "findings": {"lesion": ["mass"]}, "otherwise": "no_lesion"}  # fmt: skip
TEXT = "acc,text\nA1,Zebra: a mass.\nA2,Zebra: no mass.\nA3,Zebra: possible mass.\nA4,Zebra: clear.\n"


@pytest.fixture
def run(hospital):
    def call(labels: dict[str, Any], *options: str, **parts: Any) -> Any:
        site = hospital.site(labels=labels, **parts)
        (hospital.folder / "site.yaml").write_text(yaml.safe_dump(site), encoding="utf-8")
        return CliRunner().invoke(app, ["labels", str(hospital.folder / "site.yaml"), *options])

    return call


def told(result: Any) -> dict[str, Any]:
    assert result.exit_code == 0, result.output + str(result.exception)
    return dict(json.loads(result.output))


def test_a_table_shows_classes_unmapped_codes_and_conflicts(hospital, run):
    hospital.table("labels.csv", "acc,code\nA1,MASS\nA2,NORM\nA3,MASSE\nA4,MASSE\nA1,NORM\nA5,\n")
    hospital.table("map.yaml", MAP)
    found = told(run(TABLE, "--json", terminology="map.yaml"))
    assert (found["kind"], found["counted"]) == ("table", "lines")
    assert found["classes"] == {"lesion": 1, "no_lesion": 2}
    assert found["unmapped"] == {"MASSE": 2}
    assert found["conflicts"] == [{"lines": [2, 6], "labels": ["MASS", "NORM"]}]
    assert found["terminology"]["codes"] == {"lesion": ["SCT:4147007"], "no_lesion": ["SCT:17621005"]}
    assert found["without_image"] is None
    shown = run(TABLE, terminology="map.yaml").output
    assert all(text in shown for text in ("MASSE", "2, 6", "SCT:4147007", "lesion"))
    assert "A1" not in shown


def test_reports_without_a_review_are_warned_of(hospital, run):
    hospital.table("reports.csv", TEXT)
    found = told(run(REPORTS, "--json"))
    assert found["classes"] == {"lesion": 1, "no_lesion": 2, "uncertain": 1}
    assert found["review"] is None
    assert "no sample of the reports was reviewed" in found["warnings"][0]
    result = run(REPORTS)
    assert "warning: no sample" in result.output
    assert "Zebra" not in result.output


def test_a_sample_is_drawn_reviewed_and_measured(hospital, run, series):
    hospital.table("reports.csv", TEXT)
    hospital.write(series(1, accession="A1"))
    hospital.ingest(labels=REPORTS)
    out, store = hospital.folder / "review.csv", ["--store", str(hospital.store)]
    assert run(REPORTS, *store, "--sample", "3", "--out", str(out)).exit_code == 0
    assert "Zebra" in out.read_text(encoding="utf-8-sig")
    again = hospital.folder / "again.csv"
    assert run(REPORTS, *store, "--sample", "3", "--out", str(again)).exit_code == 0
    assert again.read_bytes() == out.read_bytes()
    with out.open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        row["label"] = "lesion" if "a mass" in row["text"] or "possible" in row["text"] else "no_lesion"
    with out.open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    found = told(run(REPORTS | {"reviewed": "review.csv"}, *store, "--json"))
    assert found["review"]["reports"] == 3
    assert found["without_image"] == ["reports.csv:3", "reports.csv:4", "reports.csv:5"]
    assert json.loads((hospital.store / "reports.json").read_text())["review"] == found["review"]
    shown = run(REPORTS | {"reviewed": "review.csv"}, *store).output
    assert "rules on 3 reviewed reports" in shown
    assert "warning" not in shown
    assert "Zebra" not in shown


def test_a_sample_needs_a_key_and_a_place_and_reports(hospital, run):
    hospital.table("reports.csv", TEXT)
    hospital.table("labels.csv", "acc,code\nA1,MASS\n")
    assert "belong together" in run(REPORTS, "--sample", "3").output
    error = run(REPORTS, "--sample", "3", "--out", str(hospital.folder / "x.csv")).exception
    assert "drawn with the site's key" in str(error)
    key = ["--key-file", str(hospital.folder / "site.key")]
    error = run(TABLE, "--sample", "3", "--out", str(hospital.folder / "x.csv"), *key).exception
    assert "only the text of reports" in str(error)


def test_fhir_shows_what_was_read_and_what_maps_to_nothing(run, shared_data: Path):
    labels = {"kind": "fhir", "path": str(shared_data / "fhir_synthea"), "link": "study",
              "classes": {"SCT:162864005": "obese"}, "otherwise": "not_obese"}  # fmt: skip
    found = told(run(labels, "--json"))
    assert found["resources"]["ImagingStudy"] == 22
    assert found["classes"] == {"obese": 3}
    assert sum(found["unmapped"].values()) + 3 == found["resources"]["Condition"]
    assert found["meanings"]["SCT:53741008"] == "Coronary Heart Disease"
    shown = run(labels).output
    assert "more: --json lists all" in shown
    assert all(code in shown for code, number in found["unmapped"].items() if number > 1)


def test_labels_of_reports_in_dicom_are_shown_after_an_ingest(hospital, run):
    error = run({"kind": "sr", "classes": {"SCT:4147007": "lesion"}}).exception
    assert "read at ingest" in str(error)


def test_a_site_without_labels_is_told(hospital, run):
    error = run(None).exception
    assert "names no labels" in str(error)
