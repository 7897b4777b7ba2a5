"""`locum site`: what a data steward sees."""

from __future__ import annotations

import json

import pytest
import yaml
from typer.testing import CliRunner

from locum.common.errors import DataError
from locum.site_client.cli import app


@pytest.fixture
def site_file(hospital, series):
    hospital.write(series())
    hospital.write(series(2, slices=2, over={"PatientID": None}))
    path = hospital.folder / "site.yaml"
    path.write_text(yaml.safe_dump(hospital.site(root=".")))
    return path


def run(*words):
    result = CliRunner().invoke(app, [str(word) for word in words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.stdout


def test_ingest_shows_counts_reasons_and_the_next_step(site_file, hospital):
    shown = run("ingest", site_file, "--store", hospital.store)
    assert "no_patient_id" in shown
    assert "next: locum site catalog" in shown
    assert (hospital.store / "split.key").stat().st_mode & 0o777 == 0o600


def test_ingest_and_catalog_speak_json(site_file, hospital):
    counts = json.loads(run("ingest", site_file, "--store", hospital.store, "--json"))
    assert counts == {
        "found": 7, "stored": 5, "annotations": 0, "cases": 1, "quarantined": {"no_patient_id": 2},
        "labels_without_image": 0,
    }  # fmt: skip
    catalog = json.loads(run("catalog", "--store", hospital.store, "--json"))
    assert catalog["scanners"] == {"CT ACME One": 1}
    assert sum(catalog["folds"].values()) == 1


def test_catalog_shows_what_the_store_holds(site_file, hospital):
    run("ingest", site_file, "--store", hospital.store, "--key-file", hospital.folder / "my.key")
    assert "CT ACME One" in run("catalog", "--store", hospital.store)
    assert (hospital.folder / "my.key").is_file()


def test_an_empty_site_is_an_error_with_a_remedy(hospital):
    path = hospital.folder / "site.yaml"
    path.write_text(yaml.safe_dump(hospital.site(root=".")))
    with pytest.raises(DataError, match="no file was found"):
        run("ingest", path, "--store", hospital.store)


def test_a_store_that_is_not_there_is_an_error_with_a_remedy(hospital):
    with pytest.raises(DataError, match="holds no catalog"):
        run("catalog", "--store", hospital.store)
