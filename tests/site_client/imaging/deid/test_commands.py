"""`locum site deid`: a folder cleaned, and one file explained."""

from __future__ import annotations

import json
from pathlib import Path

import pydicom
import pytest
from typer.testing import CliRunner

from locum.common.errors import DataError
from locum.site_client.cli import app
from locum.site_client.imaging.deid.folder import clean_folder
from tests.site_client.imaging.deid.objects import KEYS, engine, image, saved


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["deid", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture
def originals(tmp_path: Path) -> Path:
    folder = tmp_path / "in" / "Kowalska Zofia"
    folder.mkdir(parents=True)
    for number in range(3):
        (folder / f"IM{number}").write_bytes(saved(image(SOPInstanceUID=f"1.2.826.0.1.3680043.10.7.1.{number}")))
    (folder / "notes.txt").write_text("no image")
    (folder / "leak").write_bytes(
        saved(image(SOPInstanceUID="1.2.826.0.1.3680043.10.7.5", ImageType=["X", "Y", "KOWALSKA"]))
    )
    return tmp_path / "in"


def test_a_folder_is_cleaned_and_everything_is_counted(originals, tmp_path):
    told = json.loads(run(originals, tmp_path / "out", "--key-file", tmp_path / "k", "--json"))
    assert (told["found"], told["written"], told["skipped"]) == (5, 3, 0)
    assert {entry["reason"] for entry in told["refused"]} == {"not_an_image", "residue"}
    assert told["found"] == told["written"] + told["skipped"] + len(told["refused"])
    written = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert len(written) == 3
    assert not [path for path in written if "Kowalska" in str(path.relative_to(tmp_path / "out"))]
    assert all(pydicom.dcmread(path).PatientIdentityRemoved == "YES" for path in written)


def test_a_second_run_skips_what_is_there_and_goes_on_where_the_first_stopped(originals, tmp_path):
    first = clean_folder(originals, tmp_path / "out", engine(), KEYS)
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    gone = next(iter(before))
    gone.rename(gone.with_name(f".{gone.name}.4711.tmp"))  # as a run that is killed leaves it
    second = clean_folder(originals, tmp_path / "out", engine(), KEYS)
    assert (first.written, second.written, second.skipped) == (3, 1, 2)
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()} == before


def test_two_files_with_one_uid_are_not_written_over_each_other(originals, tmp_path):
    (originals / "other").write_bytes(saved(image(SOPInstanceUID="1.2.826.0.1.3680043.10.7.1.0", Rows=3, Columns=2)))
    tally = clean_folder(originals, tmp_path / "out", engine(), KEYS)
    assert sorted(reason for _, reason, _ in tally.refused) == ["conflicting_instances", "not_an_image", "residue"]


def test_originals_are_never_touched(originals, tmp_path):
    before = {path: path.read_bytes() for path in originals.rglob("*") if path.is_file()}
    clean_folder(originals, tmp_path / "out", engine(), KEYS)
    assert {path: path.read_bytes() for path in originals.rglob("*") if path.is_file()} == before
    for target in (originals, originals / "out", originals.parent):
        with pytest.raises(DataError, match="within each other"):
            clean_folder(originals, target, engine(), KEYS)


def test_one_file_is_explained_for_people_and_for_programs(originals, tmp_path):
    out = run("--explain", originals / "Kowalska Zofia" / "IM0")
    assert "(0010,0010) Patient's Name: the pseudonym of the ID" in out
    assert "(0010,0030) Patient's Birth Date: Basic Profile Z" in out
    assert "keep it at the site" in out
    told = json.loads(
        run("--explain", originals / "Kowalska Zofia" / "leak", "--option", "clean_descriptors", "--json")
    )
    assert told["profile"] == "PS3.15 2026c Basic, clean_descriptors"
    assert told["refused"].startswith("residue: (0008,0008)")
    assert {change["path"] for change in told["changes"]} >= {"(0008,0018)", "(7fe0,0010)"}


def test_what_is_misspelt_is_told(originals, tmp_path):
    with pytest.raises(DataError, match="no such option"):
        run("--option", "modified_date", originals, tmp_path / "out", "--key-file", tmp_path / "k")
    with pytest.raises(DataError, match="no key file"):
        run(originals, tmp_path / "out")
    with pytest.raises(DataError, match="no folder"):
        run(originals / "nowhere", tmp_path / "out", "--key-file", tmp_path / "k")
    with pytest.raises(DataError, match="no file"):
        run("--explain", originals / "nothing")
    assert CliRunner().invoke(app, ["deid"]).exit_code == 2
