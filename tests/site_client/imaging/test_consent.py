"""Patients who withdraw leave the catalog, the store, the reports and a warm worker."""

from __future__ import annotations

import logging
from pathlib import Path

import pydicom
import pytest

from locum.common.errors import DataError
from locum.simulations.federations import FederationSpec, federation
from locum.simulations.preparation import prepare_site, site_keys
from locum.site_client.imaging.consent import State, withdrawn, withdrawn_patients
from locum.site_client.imaging.ingest import ingest
from locum.site_client.imaging.keys import Keys
from locum.site_client.imaging.known import Known
from locum.site_client.imaging.reasons import Reason
from locum.site_client.imaging.retrieve.arrival import Arrival
from locum.site_client.imaging.retrieve.spool import Spool
from locum.site_client.imaging.sources import Consent, load_site
from locum.site_client.settings import Settings
from locum.site_client.worker import Worker
from tests.plans import initial
from tests.site_client.asking import equal, plan

KEYS = Keys.of(bytes(range(32)))


def listed(tmp_path: Path, content: bytes) -> frozenset[str]:
    (tmp_path / "withdrawn.txt").write_bytes(content)
    return withdrawn(Consent(withdrawn=tmp_path / "withdrawn.txt"), KEYS)


def named(*ids: str) -> frozenset[str]:
    return frozenset(map(KEYS.patient, ids))


@pytest.mark.parametrize(
    ("content", "ids"),
    [
        (b"", ()),
        (b"P1\nP2\n", ("P1", "P2")),
        (b"\xef\xbb\xbfP1\r\nP2", ("P1", "P2")),
        (b"# who\n\n  P1  \n#P2\n\t\n", ("P1",)),
        (b"P1\rP2\r", ("P1", "P2")),
        (b"P1\nP1\nP1", ("P1",)),
        (b"007\n", ("007",)),
        (b"P 1#2\n", ("P 1#2",)),
        ("Müller-1\n患者\n".encode(), ("Müller-1", "Mu\u0308ller-1", "患者")),
        ("Mu\u0308ller-1\n".encode(), ("Müller-1", "Mu\u0308ller-1")),
        (b"x" * 64, ("x" * 64,)),
    ],
)
def test_a_list_is_text_with_an_id_a_line(tmp_path, content, ids):
    assert listed(tmp_path, content) == named(*ids)


def test_without_a_list_nobody_has_withdrawn():
    assert withdrawn(None, KEYS) == frozenset()


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"P1\n" + b"x" * 65, 2),
        (b"P1\nP2\n\nP\t3;x", 4),
        (b"P1\\P2\n", 1),
        (b"P1\nP2\x00\n", 2),
        (b"P1\nM\xfcller\n", 2),
        ("P1\n".encode("utf-16"), 1),
    ],
)
def test_a_line_that_can_be_no_id_is_told_by_its_number_and_not_by_its_text(tmp_path, content, line):
    with pytest.raises(DataError, match=rf"withdrawn\.txt, line {line}: ") as raised:
        listed(tmp_path, content)
    assert "P2" not in raised.value.message
    assert raised.value.remedy


def test_a_list_that_is_gone_is_told(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        withdrawn(Consent(withdrawn=tmp_path / "none.txt"), KEYS)


@pytest.fixture
def two(hospital, series):
    """Two patients, of whom one has two series; the site keeps cleaned DICOM files too."""
    for number, patient in ((1, "P1"), (2, "P1"), (3, "P3")):
        hospital.write(series(number, patient=patient, accession=f"A{number}"))
    hospital.ingest(deidentification={"keep_dicom": True})
    return hospital


def withdraw(hospital, text):
    hospital.table("withdrawn.txt", text)
    return hospital.ingest(consent={"withdrawn": "withdrawn.txt"}, deidentification={"keep_dicom": True})


def files(hospital):
    return {path.name for folder in ("volumes", "masks", "dicom") for path in (hospital.store / folder).glob("*")}


def test_who_withdraws_leaves_catalog_and_store_with_everything(two):
    before = files(two)
    counts = withdraw(two, "P1\n")
    assert (counts.cases, counts.quarantined) == (1, {Reason.CONSENT_WITHDRAWN: 10})
    catalog = two.catalog()
    patients = {row[0] for row in catalog.connection.execute("SELECT patient FROM cases")}
    assert patients == {KEYS.patient("P3")}
    (case,) = catalog.connection.execute("SELECT id FROM cases").fetchone()
    assert withdrawn_patients(catalog.connection) == 1
    catalog.close()
    assert {name.partition(".")[0] for name in files(two)} == {case}
    assert len(before) > len(files(two))


def test_a_retrieval_that_fails_holds_up_no_withdrawal(two):
    folder = {"kind": "dicom", "path": "dicom"}
    query = {"accessions": str(two.table("accessions.txt", "*\n"))}
    web = {"kind": "dicomweb", "url": "http://127.0.0.1:9/dicom-web", "query": query}
    two.table("withdrawn.txt", "P1\n")
    with pytest.raises(DataError, match="accession"):
        two.ingest(consent={"withdrawn": "withdrawn.txt"}, sources=[folder, web])
    catalog = two.catalog()
    (case,) = catalog.connection.execute("SELECT id FROM cases").fetchone()
    counts = catalog.counts()
    catalog.close()
    assert (counts.cases, counts.quarantined) == (1, {Reason.CONSENT_WITHDRAWN: 10})
    assert {name.partition(".")[0] for name in files(two)} == {case}


def test_what_a_pacs_gave_goes_when_the_site_file_names_the_pacs_no_more(two):
    with Spool.opened(two.store, 1, made="before") as spool:
        for patient in ("P1", "P3"):
            spool.put("series", patient, Arrival("sop", Known(KEYS.patient(patient), study=patient), b"cleaned"))
        spool.commit()
    withdraw(two, "P1\n")
    assert [path.parent.name for path in (two.store / "incoming").rglob("*.dcm")] == ["P3"]


def test_no_id_is_written_down(two):
    withdraw(two, "P1\n")
    assert b"P1\n" not in (two.store / "catalog.sqlite").read_bytes()
    assert withdrawn(Consent(withdrawn=two.folder / "withdrawn.txt"), KEYS) == {KEYS.patient("P1")}


def test_who_is_taken_off_the_list_comes_back(two):
    assert withdraw(two, "P1\nP3\n").cases == 0
    assert withdraw(two, "# nobody\n").cases == 3


def test_reports_with_pictures_go_when_somebody_withdraws_and_stay_otherwise(two):
    reports = two.store / "readiness"
    reports.mkdir(exist_ok=True)
    (reports / "plan-1.html").write_text("with pictures")
    withdraw(two, "# nobody\n")
    assert (reports / "plan-1.html").is_file()
    withdraw(two, "P3\n")
    assert not (reports / "plan-1.html").exists()


def test_a_line_that_names_nobody_here_is_told(two):
    withdraw(two, "P1\nP-misspelt\n")
    catalog = two.catalog()
    assert catalog.unmatched_lines() == ("withdrawn.txt:2",)
    catalog.close()


def test_a_wrong_list_stops_the_ingest_before_anything_changes(two):
    before = files(two)
    with pytest.raises(DataError, match="line 1"):
        withdraw(two, "P1\\\n")
    assert files(two) == before


def test_a_table_that_names_the_patient_of_an_image_counts_too(hospital, series):
    import nibabel
    import numpy as np

    (hospital.folder / "images").mkdir()
    for name in ("a", "b"):
        nibabel.save(
            nibabel.Nifti1Image(np.ones((4, 4, 4), np.int16), np.eye(4)), hospital.folder / "images" / f"{name}.nii"
        )
    hospital.table("who.csv", "file,patient\na,Smith\nb,Jones\n")
    hospital.table("withdrawn.txt", "Smith\n")
    parts = {
        "sources": [{"kind": "nifti", "images": "images", "modality": "CT"}],
        "table": {"file": "who.csv", "key": "file", "key_column": "file", "patient_column": "patient"},
        "consent": {"withdrawn": "withdrawn.txt"},
    }
    counts = hospital.ingest(**parts)
    assert (counts.cases, counts.quarantined) == (1, {Reason.CONSENT_WITHDRAWN: 1})


# --- a warm worker


def test_the_state_of_a_store_changes_with_its_cases_and_with_nothing_else(two):
    state = State.of(two.store)
    assert not state.outdated()
    two.ingest(deidentification={"keep_dicom": True})
    assert not state.outdated(), "an ingest that changed nothing"
    withdraw(two, "P3\n")
    assert state.outdated()
    assert state.outdated(), "until somebody looks at the store anew"
    assert not State.of(two.store).outdated()


def test_a_store_that_is_made_later_is_seen(tmp_path, hospital, series):
    state = State.of(hospital.store)
    assert not state.outdated()
    hospital.write(series())
    hospital.ingest()
    assert state.outdated()


def test_a_warm_worker_trains_without_who_has_withdrawn(tmp_path):
    spec = federation(FederationSpec(sites=1, seed=3, patients=12, shape=(8, 16, 16), spacing=(10.0, 8.0, 8.0)))[0]
    site = prepare_site(spec, tmp_path / "site", seed=5)
    raw, of = tmp_path / "site" / "raw", plan(contract__least_patients=1)
    worker = Worker(Settings(site.name, (site.store,), tmp_path / "run"), logging.getLogger("tests"))
    other = Worker(Settings(site.name, (site.store,), tmp_path / "other"), logging.getLogger("tests"))
    try:
        before, _ = worker.call("train", of, initial(of), round=1)
        pid = worker.pid
        files = [path for path in (raw / "dicom").rglob("*") if path.is_file()]
        ids = sorted({str(pydicom.dcmread(path, stop_before_pixels=True).PatientID) for path in files})
        (raw / "withdrawn.txt").write_text("\n".join(ids[::3]))
        data = load_site(raw / "site.yaml").model_copy(update={"consent": Consent(withdrawn=raw / "withdrawn.txt")})
        counts = ingest(data, site.store, keys=site_keys(5, site.name))
        assert counts.cases < site.counts.cases
        after, update = worker.call("train", of, initial(of), round=2)
        fresh, expected = other.call("train", of, initial(of), round=2)
        assert worker.pid == pid, "it is the same process"
        assert after["cases"] == fresh["cases"] < before["cases"]
        assert equal(update, expected), "to the bit what a worker gives that never saw the patients"
    finally:
        worker.stop()
        other.stop()
