"""A release is from what a person can clear, of the files that the person saw; a rejection stands."""

from __future__ import annotations

import json
import os
import sqlite3

import pytest
from pydicom.uid import (
    DigitalXRayImageStorageForPresentation,
    EncapsulatedPDFStorage,
    SecondaryCaptureImageStorage,
)
from typer.testing import CliRunner

from locum.common.errors import DataError
from locum.site_client.cli import app
from locum.site_client.imaging import dicom
from locum.site_client.imaging.catalog import Catalog
from locum.site_client.imaging.quarantine import (
    NEXT,
    RELEASABLE,
    Wish,
    decide,
    decision_on,
    handle,
    held,
    number_held,
    unit_of,
)
from locum.site_client.imaging.reasons import Reason
from locum.site_client.imaging.store import exclusive


@pytest.fixture
def found(hospital, series):
    """One series of five images that says that text is burned in, and one that is fit."""
    hospital.write(series(1))
    hospital.write(series(2, patient="P2", accession="A2", over={"BurnedInAnnotation": "YES"}))
    hospital.ingest()
    return hospital


def entries(hospital, **which):
    catalog = hospital.catalog()
    try:
        return held(catalog.connection, **which)
    finally:
        catalog.close()


def only(hospital):
    (one,) = entries(hospital)
    return one


def release(hospital, unit=None, **more):
    return decide(hospital.store, Wish(unit or only(hospital).handle, "release", "Ada", **more))


def test_every_reason_has_a_next_step():
    assert set(NEXT) == set(Reason)


def test_the_documents_tell_the_same_next_steps(project):
    table = (project / "docs" / "site-data.md").read_text().splitlines()
    told = {cells[1].strip(" `"): cells[3].strip() for cells in (line.split("|") for line in table) if len(cells) == 5}
    assert {reason: told.get(reason) for reason in Reason} == dict(NEXT)


def test_no_person_can_clear_a_withdrawal_a_residue_or_a_fault_of_the_image():
    for reason in (
        Reason.CONSENT_WITHDRAWN,
        Reason.RESIDUE,
        Reason.NO_PATIENT_ID,
        Reason.DOCUMENT,
        Reason.DECODE_FAILED,
    ):
        assert reason not in RELEASABLE
    assert RELEASABLE - {Reason.REJECTED} == dicom.RELEASABLE


def test_a_release_lets_the_series_in_at_the_next_ingest(found):
    one = only(found)
    assert (one.reason, one.files, one.releasable, one.decided, one.waiting) == ("burned_in", 5, True, None, False)
    made = release(found)
    assert (made.reasons, made.by, made.decision) == (("burned_in",), "Ada", "release")
    assert only(found).waiting
    assert found.ingest().cases == 2
    assert entries(found) == ()
    assert found.ingest().cases == 2, "and it stays"


def test_a_release_does_not_hold_for_another_file_under_the_same_name(found, series):
    release(found)
    assert found.ingest().cases == 2
    images = series(2, patient="P2", accession="A2", over={"BurnedInAnnotation": "YES"}).images()
    images[3].PixelData = bytes(len(images[3].PixelData))
    found.write(images)
    counts = found.ingest()
    assert (counts.cases, counts.quarantined) == (1, {Reason.BURNED_IN: 5})


def test_a_release_does_not_hold_for_a_file_that_joins_the_series(found, series):
    release(found)
    found.ingest()
    images = series(2, patient="P2", accession="A2", slices=6, over={"BurnedInAnnotation": "YES"}).images()
    (found.dicom / "later").mkdir()
    images[5].save_as(found.dicom / "later" / "IM5", enforce_file_format=True)
    counts = found.ingest()
    assert (counts.cases, counts.quarantined) == (1, {Reason.BURNED_IN: 6})


def test_a_release_holds_when_a_file_is_touched_or_moved(found):
    release(found)
    folder = next(path for path in found.dicom.iterdir() if path.name.endswith("2"))
    for path in folder.iterdir():
        os.utime(path, (1, 1))
    folder.rename(folder.with_name("elsewhere"))
    assert found.ingest().cases == 2


def test_a_release_between_decision_and_ingest_does_not_hold_for_what_came_meanwhile(found, series):
    release(found)
    images = series(2, patient="P2", accession="A2", over={"BurnedInAnnotation": "YES"}).images()
    images[0].PixelData = bytes(len(images[0].PixelData))
    found.write(images)
    assert found.ingest().quarantined == {Reason.BURNED_IN: 5}


def test_a_rejection_stands_whatever_becomes_of_the_files(found, series):
    decide(found.store, Wish(only(found).handle, "reject", "Ada"))
    assert found.ingest().quarantined == {Reason.REJECTED: 5}
    found.write(series(2, patient="P2", accession="A2", over={"BurnedInAnnotation": "NO"}))
    assert found.ingest().quarantined == {Reason.REJECTED: 5}


def test_a_rejection_that_was_a_mistake_can_be_taken_back(found):
    decide(found.store, Wish(only(found).handle, "reject", "Ada"))
    found.ingest()
    release(found)
    assert found.ingest().quarantined == {Reason.BURNED_IN: 5}, "and what was wrong before is wrong again"
    release(found)
    assert found.ingest().cases == 2


def test_a_case_can_be_rejected(found):
    catalog = found.catalog()
    (unit,) = catalog.connection.execute("SELECT unit FROM cases").fetchone()
    catalog.close()
    decide(found.store, Wish(unit, "reject", "Ada"))
    counts = found.ingest()
    assert (counts.cases, counts.quarantined) == (0, {Reason.REJECTED: 5, Reason.BURNED_IN: 5})
    assert list((found.store / "volumes").iterdir()) == []


@pytest.mark.parametrize(
    ("over", "reason"),
    [
        ({"PatientID": ""}, Reason.NO_PATIENT_ID),
        ({"SOPClassUID": EncapsulatedPDFStorage}, Reason.DOCUMENT),
        ({"PhotometricInterpretation": "RGB"}, Reason.COLOUR),
        ({"SeriesInstanceUID": None}, Reason.INCOMPLETE_HEADER),
    ],
)
def test_what_nobody_can_clear_is_refused_with_the_next_step(hospital, series, over, reason):
    images = series(3, slices=1).images()
    for name, value in over.items():
        setattr(images[0], name, value) if value is not None else delattr(images[0], name)
    hospital.write(images, "one")
    hospital.ingest()
    assert only(hospital).reason == reason
    with pytest.raises(DataError, match="nobody can release this") as raised:
        release(hospital)
    assert raised.value.remedy == NEXT[reason]


def test_a_capture_becomes_a_picture_when_a_person_releases_it(hospital, series):
    hospital.write(series(4, slices=1, over={"SOPClassUID": SecondaryCaptureImageStorage, "Modality": "OT"}))
    assert hospital.ingest().quarantined == {Reason.SECONDARY_CAPTURE: 1}
    release(hospital)
    assert hospital.ingest().cases == 1


def test_a_release_of_a_series_leaves_its_localizer_out(hospital, series):
    images = series(5, over={"BurnedInAnnotation": "YES"}).images()
    images[0].ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
    hospital.write(images)
    assert hospital.ingest().quarantined == {Reason.LOCALIZER: 1, Reason.BURNED_IN: 4}
    (unit,) = {one.unit for one in entries(hospital)}
    release(hospital, unit)
    counts = hospital.ingest()
    assert (counts.cases, counts.quarantined) == (1, {Reason.LOCALIZER: 1})


@pytest.fixture
def picture(hospital, series):
    over = {"SOPClassUID": DigitalXRayImageStorageForPresentation, "Modality": "DX"}
    hospital.write(series(6, slices=1, shape=(40, 60), over=over))
    hospital.ingest()
    return hospital


def test_a_box_is_recorded_and_is_all_that_is_kept(picture):
    assert release(picture, crop=(10, 5, 32, 20)).crop == (10, 5, 32, 20)
    picture.ingest()
    (facts,) = picture.catalog().facts()
    assert facts.shape[:2] == (32, 20)


@pytest.mark.parametrize(
    "crop", [(0, 0, 61, 40), (0, 0, 60, 41), (50, 0, 20, 20), (-1, 0, 20, 20), (0, 0, 15, 20), (0, 0, 0, 0)]
)
def test_a_box_that_is_none_is_refused(picture, crop):
    with pytest.raises(DataError, match="box"):
        release(picture, crop=crop)
    assert not only(picture).waiting


@pytest.mark.parametrize("name", ["", "  ", "\n", "a\x00b", "x" * 81, "\u202e"])
def test_a_decision_needs_a_name(found, name):
    with pytest.raises(DataError, match="needs the name"):
        decide(found.store, Wish(only(found).handle, "release", name))


def test_nothing_can_be_decided_while_an_ingest_writes(found):
    with exclusive(found.store), pytest.raises(DataError, match="another ingest is writing"):
        release(found)


def test_a_decision_is_whole_or_not_at_all(found):
    one = only(found)
    with sqlite3.connect(found.store / "catalog.sqlite") as connection:
        connection.execute("CREATE TRIGGER stop BEFORE UPDATE OF mtime_ns ON items BEGIN SELECT RAISE(ABORT, 'x'); END")
    with pytest.raises(DataError):
        release(found)
    catalog = found.catalog()
    assert decision_on(catalog.connection, one.unit) is None
    catalog.close()


def test_what_is_unknown_is_told(found):
    for name in ("0123456789abcdef", "", "../catalog.sqlite", "'; DROP TABLE decisions; --"):
        with pytest.raises(DataError, match="nothing here has the name"):
            decide(found.store, Wish(name, "reject", "Ada"))


def test_a_handle_and_a_key_name_the_same(found):
    one, catalog = only(found), found.catalog()
    assert unit_of(catalog.connection, one.handle) == unit_of(catalog.connection, one.unit) == one.unit
    assert handle(one.unit) == one.handle
    catalog.close()


def test_the_list_comes_in_pages_and_by_reason(found, series):
    for number in range(10, 17):
        found.write(series(number, patient=f"P{number}", slices=1, over={"PatientID": ""}))
    found.ingest()
    catalog = found.catalog()
    assert number_held(catalog.connection) == 8
    assert number_held(catalog.connection, Reason.NO_PATIENT_ID) == 7
    pages = [held(catalog.connection, first=first, most=3) for first in (0, 3, 6)]
    assert [len(page) for page in pages] == [3, 3, 2]
    assert [one for page in pages for one in page] == list(held(catalog.connection))
    catalog.close()


# --- the command


def run(*arguments):
    return CliRunner().invoke(app, ["quarantine", *map(str, arguments)])


def test_a_hospital_without_a_browser_decides_by_command(found):
    listed = json.loads(run("--store", found.store, "--json").output)["held"]
    assert [(one["reason"], one["files"], one["releasable"]) for one in listed] == [("burned_in", 5, True)]
    name = listed[0]["id"]
    assert "Look at it" in run("--store", found.store).output
    told = json.loads(run("release", name, "--store", found.store, "--by", "Ada", "--json").output)
    assert (told["id"], told["decision"], told["reasons"], told["by"], told["crop"]) == (
        name, "release", ["burned_in"], "Ada", None,
    )  # fmt: skip
    assert "takes effect at the next ingest" in run("--store", found.store).output
    assert found.ingest().cases == 2
    assert run("--store", found.store).output == "nothing is in quarantine\n"


def test_the_command_takes_a_box_and_refuses_half_of_one(picture):
    name = only(picture).handle
    assert run("release", name, "--store", picture.store, "--by", "Ada", "--crop", "1,2,3").exit_code == 2
    assert run("release", name, "--store", picture.store, "--by", "Ada", "--crop", "10,5,32,20").exit_code == 0
    catalog = picture.catalog()
    decision = decision_on(catalog.connection, only(picture).unit)
    assert decision is not None
    assert decision.crop == (10, 5, 32, 20)
    catalog.close()


def test_the_command_rejects(found):
    assert "reject by Ada" in run("reject", only(found).handle, "--store", found.store, "--by", "Ada").output
    assert found.ingest().quarantined == {Reason.REJECTED: 5}


def test_a_file_name_cannot_write_to_the_terminal(hospital):
    (hospital.dicom).mkdir()
    (hospital.dicom / "\x1b[31mred\n").write_text("no image")
    hospital.ingest()
    output = run("--store", hospital.store).output
    assert "\x1b" not in output
    assert isinstance(run("--store", hospital.folder).exception, DataError)


def test_the_catalog_can_be_read_while_a_decision_is_made(found):
    catalog = Catalog.open(found.store)
    release(found)
    assert len(held(catalog.connection)) == 1
    catalog.close()
