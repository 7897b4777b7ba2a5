"""Labels from FHIR: the right study of the right patient, active on its day, and nothing guessed."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from locum.common.errors import DataError
from locum.site_client.imaging.items import Unit
from locum.site_client.imaging.keys import Keys
from locum.site_client.imaging.known import Known
from locum.site_client.imaging.labels.fhir import FhirBook
from locum.site_client.imaging.labels.given import Label
from locum.site_client.imaging.reasons import Reason, RefusedError
from locum.site_client.imaging.sources import FhirLabels
from locum.site_client.imaging.terminology import Terminology

KEYS = Keys.of(bytes(range(32)))
OBESE, HEART = "162864005", "53741008"
CLASSES = {f"SCT:{OBESE}": "obese", f"SCT:{HEART}": "heart"}
SYNTHEA = "https://github.com/synthetichealth/synthea"


def coded(code: str, system: str = "http://snomed.info/sct") -> dict[str, Any]:
    return {"coding": [{"system": system, "code": code, "display": "in words"}]}


def patient(number: int = 1, value: str = "MRN1", **over: Any) -> dict[str, Any]:
    return {"resourceType": "Patient", "id": f"p{number}", "identifier": [{"system": "urn:mrn", "value": value}]} | over


def study(number: int = 1, started: str = "2011-09-30T17:49:34+00:00", **over: Any) -> dict[str, Any]:
    accession = {"type": coded("ACSN", "http://terminology.hl7.org/CodeSystem/v2-0203"), "value": f"A{number}"}
    uid = {"system": "urn:dicom:uid", "value": f"urn:oid:1.2.3.{number}"}
    return {"resourceType": "ImagingStudy", "id": f"s{number}", "status": "available", "started": started,
            "identifier": [uid, accession], "subject": {"reference": "Patient/p1"},
            "encounter": {"reference": "Encounter/e1"}} | over  # fmt: skip


def condition(code: str = OBESE, onset: str = "2011-01-01", **over: Any) -> dict[str, Any]:
    return {"resourceType": "Condition", "code": coded(code), "subject": {"reference": "Patient/p1"},
            "verificationStatus": coded("confirmed"), "clinicalStatus": coded("active"),
            "onsetDateTime": onset} | over  # fmt: skip


def observation(code: str = OBESE, **over: Any) -> dict[str, Any]:
    return {"resourceType": "Observation", "status": "final", "code": coded("1-1", "http://loinc.org"),
            "valueCodeableConcept": coded(code), "subject": {"reference": "Patient/p1"}} | over  # fmt: skip


def report(code: str = OBESE, **over: Any) -> dict[str, Any]:
    return {"resourceType": "DiagnosticReport", "status": "final", "conclusionCode": [coded(code)],
            "subject": {"reference": "Patient/p1"}} | over  # fmt: skip


def unit(patient_id: str = "MRN1", accession: str = "", uid: str = "", month: str = "") -> Unit:
    known = Known(KEYS.patient(patient_id), 0.0, KEYS.accession(accession), KEYS.uid(uid), month=month)
    return Unit(key="k", source=0, items=(), known=known)


@pytest.fixture
def book(tmp_path):
    def make(*resources: dict[str, Any], terms: Terminology | None = None, **parts: Any) -> FhirBook:
        text = "".join(json.dumps(resource) + "\n" for resource in resources)
        (tmp_path / "export.ndjson").write_text(text, encoding="utf-8")
        labels = {"kind": "fhir", "path": tmp_path, "link": "accession", "classes": CLASSES, "otherwise": "neither",
                  "resources": ["Condition", "Observation", "DiagnosticReport"]}  # fmt: skip
        return FhirBook(FhirLabels.model_validate(labels | parts), KEYS, terms)

    return make


def outcome(book: FhirBook, asked: Unit) -> str:
    try:
        return book.label(asked).name
    except RefusedError as error:
        return str(error.reason)


# --- the right study


@pytest.mark.parametrize(
    ("link", "asked"),
    [
        ("accession", unit(accession="A1")),
        ("study", unit(uid="1.2.3.1")),
        ("patient", unit(uid="1.2.3.1")),
        ("patient", unit(month="2011-09")),
    ],
)
def test_a_study_is_found_by_accession_uid_or_patient(book, link, asked):
    found = book(condition(), study(), patient(), link=link)
    assert found.label(asked) == Label("obese", (f"SCT:{OBESE}",))
    assert found.unmatched() == []
    other = unit("MRN9", "A9", "1.2.3.9", "2011-09")
    assert outcome(found, other) == "no_label"


def test_the_accession_number_may_have_a_system_of_its_own(book):
    own = study(identifier=[{"system": "urn:ris", "value": "R-7"}, {"system": "urn:other", "value": "X"}])
    found = book(patient(), own, condition(), accession="urn:ris")
    assert outcome(found, unit(accession="R-7")) == "obese"
    assert outcome(found, unit(accession="X")) == "no_label"


def test_a_study_of_another_patient_than_the_image_is_refused(book):
    found = book(patient(), study(), condition(), identifier="urn:mrn")
    assert outcome(found, unit("MRN1", accession="A1")) == "obese"
    assert outcome(found, unit("MRN2", accession="A1")) == "conflicting_labels"


def test_one_accession_number_of_two_patients_is_refused(book):
    same = study(1, id="s9", subject={"reference": "Patient/p2"})
    found = book(patient(1), patient(2, "MRN2"), study(1), same, condition())
    assert outcome(found, unit(accession="A1")) == "conflicting_labels"
    again = study(1, id="s9", subject={"identifier": {"value": "MRN1"}})
    assert outcome(book(patient(1), study(1), again, condition()), unit(accession="A1")) == "obese"


def test_only_the_identifier_of_the_images_counts(book):
    both = patient(identifier=[{"system": "urn:mrn", "value": "MRN1"}, {"system": "urn:ssn", "value": "999"}])
    found = book(both, study(), condition(), link="patient", identifier="urn:mrn")
    assert outcome(found, unit("999", month="2011-09")) == "no_label"
    assert outcome(found, unit("MRN1", month="2011-09")) == "obese"


def test_two_patients_with_one_identifier_are_no_guess(book):
    found = book(patient(1), patient(2), study(), condition(), link="patient")
    assert outcome(found, unit(month="2011-09")) == "conflicting_labels"


@pytest.mark.parametrize("link", ["patient", "study", "accession"])
def test_an_identifier_that_patients_share_mixes_nothing(book, link):
    shared = {"system": "urn:insurer", "value": "AOK"}
    one, two = ({"system": "urn:mrn", "value": f"MRN{number}"} for number in (1, 2))
    second = {"reference": "Patient/p2"}
    found = book(
        patient(1, identifier=[shared, one]), patient(2, identifier=[shared, two]), study(1), study(2, subject=second),
        condition(), condition(HEART, subject=second), link=link,
    )  # fmt: skip
    assert outcome(found, unit("MRN1", "A1", "1.2.3.1", "2011-09")) == "obese"
    assert outcome(found, unit("MRN2", "A2", "1.2.3.2", "2011-09")) == "heart"
    assert outcome(found, unit("MRN2", month="2011-09")) == ("heart" if link == "patient" else "no_label")
    assert outcome(found, unit("AOK", month="2011-09")).endswith(
        "conflicting_labels" if link == "patient" else "no_label"
    )


def test_one_name_of_two_patients_is_an_error(book):
    with pytest.raises(DataError, match="two patients with different identifiers"):
        book(patient(1, "MRN1"), patient(1, "MRN2"))
    assert outcome(book(patient(), patient(), study(), condition()), unit(accession="A1")) == "obese"


def test_references_hold_with_server_version_and_urn(book, tmp_path):
    entries = [
        {"fullUrl": "urn:uuid:AA", "resource": patient()},
        {"fullUrl": "http://server/fhir/ImagingStudy/s1", "resource": study(subject={"reference": "urn:uuid:aa"})},
        {"resource": condition(subject={"reference": "https://server/fhir/Patient/p1/_history/3"})},
        {"resource": observation(HEART, derivedFrom=[{"reference": "ImagingStudy/s1"}])},
    ]  # fmt: skip
    (tmp_path / "bundle.json").write_text(
        json.dumps({"resourceType": "Bundle", "type": "collection", "entry": entries})
    )
    assert outcome(book(), unit(accession="A1")) == "conflicting_labels"
    assert outcome(book(resources=["Condition"]), unit(accession="A1")) == "obese"
    assert outcome(book(resources=["Observation"]), unit(accession="A1")) == "heart"


def test_a_subject_may_be_named_by_its_identifier(book):
    by_value = {"identifier": {"system": "urn:mrn", "value": "MRN1"}}
    found = book(patient(), study(subject=by_value), condition(subject=by_value), link="patient")
    assert outcome(found, unit(uid="1.2.3.1")) == "obese"


def test_subjects_within_their_resource_are_not_each_others(book):
    inner = {"reference": "#p"}
    assert outcome(book(study(subject=inner), condition(subject=inner)), unit(accession="A1")) == "neither"


# --- the right time


@pytest.mark.parametrize(
    ("over", "result"),
    [
        ({}, "obese"),
        ({"onsetDateTime": "2011-09-30"}, "obese"),
        ({"onsetDateTime": "2011-10-01"}, "neither"),
        ({"onsetDateTime": "2011"}, "uncertain_label"),
        ({"onsetDateTime": "2010"}, "obese"),
        ({"abatementDateTime": "2011-09-30"}, "obese"),
        ({"abatementDateTime": "2011-09-29"}, "neither"),
        ({"abatementDateTime": "2011-09"}, "uncertain_label"),
        ({"abatementString": "long ago"}, "uncertain_label"),
        ({"clinicalStatus": coded("resolved")}, "uncertain_label"),
        ({"clinicalStatus": coded("resolved"), "abatementDateTime": "2012-01-01"}, "obese"),
        ({"onsetDateTime": None, "recordedDate": "2011-05-01"}, "obese"),
        ({"onsetDateTime": None, "recordedDate": "2012-05-01"}, "uncertain_label"),
        ({"onsetDateTime": None, "onsetPeriod": {"start": "2011-01-01", "end": "2011-12-31"}}, "uncertain_label"),
        ({"onsetDateTime": None}, "uncertain_label"),
        ({"onsetDateTime": None, "encounter": {"reference": "Encounter/e1"}}, "obese"),
        ({"verificationStatus": coded("refuted")}, "neither"),
        ({"verificationStatus": coded("entered-in-error")}, "neither"),
        ({"verificationStatus": coded("provisional")}, "uncertain_label"),
        ({"verificationStatus": None}, "obese"),
    ],
)
def test_a_condition_counts_if_it_is_active_at_the_study(book, over, result):
    resource = {key: value for key, value in (condition() | over).items() if value is not None}
    assert outcome(book(patient(), study(), resource), unit(accession="A1")) == result


@pytest.mark.parametrize(
    ("onset", "ended", "result"),
    [
        ("2011-08-31", None, "obese"),
        ("2011-09-13", None, "uncertain_label"),
        ("2011-10-01", None, "neither"),
        ("2011-01-01", "2011-09-13", "uncertain_label"),
        ("2011-01-01", "2011-10-01", "obese"),
        ("2011-01-01", "2011-08-31", "neither"),
    ],
)
def test_of_a_study_that_fhir_does_not_have_the_month_decides(book, onset, ended, result):
    resource = condition(onset=onset) | ({"abatementDateTime": ended} if ended else {})
    found = book(patient(), resource, link="patient")
    assert outcome(found, unit(month="2011-09")) == result
    assert outcome(found, unit()) == "uncertain_label"


@pytest.mark.parametrize(
    ("resource", "result"),
    [
        (observation(derivedFrom=[{"reference": "ImagingStudy/s1"}]), "obese"),
        (observation(partOf=[{"reference": "ImagingStudy/s2"}], encounter={"reference": "Encounter/e1"}), "neither"),
        (observation(encounter={"reference": "Encounter/e1"}), "obese"),
        (observation(encounter={"reference": "Encounter/e2"}), "neither"),
        (observation(), "neither"),
        (report(imagingStudy=[{"reference": "ImagingStudy/s1"}]), "obese"),
        (report(encounter={"reference": "Encounter/e1"}), "obese"),
        (report(encounter={"reference": "Encounter/e1"}, status="preliminary"), "uncertain_label"),
        (report(encounter={"reference": "Encounter/e1"}, status="cancelled"), "neither"),
        (observation(encounter={"reference": "Encounter/e1"}, status="entered-in-error"), "neither"),
    ],
)
def test_observations_and_reports_count_for_their_own_study(book, resource, result):
    assert outcome(book(patient(), study(), resource), unit(accession="A1")) == result


@pytest.mark.parametrize(
    ("value", "result"),
    [
        ({"valueBoolean": True}, "obese"),
        ({"valueBoolean": False}, "neither"),
        ({}, "obese"),
        ({"valueQuantity": {"value": 3}}, "neither"),
        ({"dataAbsentReason": coded("unknown")}, "neither"),
        ({"component": []}, "neither"),
        ({"valueCodeableConcept": coded(HEART)}, "heart"),
    ],
)
def test_an_observation_says_what_its_value_says(book, value, result):
    resource = {key: each for key, each in observation(code=OBESE).items() if key != "valueCodeableConcept"}
    resource |= {"code": coded(OBESE), "encounter": {"reference": "Encounter/e1"}} | value
    assert outcome(book(patient(), study(), resource), unit(accession="A1")) == result


# --- nothing guessed, nothing dropped


def test_two_classes_at_once_are_a_conflict_and_none_is_otherwise(book):
    found = book(patient(), study(), condition(), condition(HEART))
    with pytest.raises(RefusedError) as caught:
        found.label(unit(accession="A1"))
    assert caught.value.reason is Reason.CONFLICTING_LABELS
    assert caught.value.detail == f"heart, obese: SCT:{OBESE}, SCT:{HEART}"
    assert outcome(book(patient(), study()), unit(accession="A1")) == "neither"
    assert outcome(book(patient(), study(), otherwise=None), unit(accession="A1")) == "no_label"


def test_codes_that_nothing_maps_are_counted_with_their_meaning(book):
    own = coded("J18.9", "urn:own")
    found = book(patient(), study(), condition("1"), condition("1"), condition() | {"code": own})
    assert found.summary.unmapped == {"SCT:1": 2, "urn:own|J18.9": 1}
    assert found.summary.meanings["SCT:1"] == "in words"
    assert found.summary.resources == {"Patient": 1, "ImagingStudy": 1, "Condition": 3}


def test_a_map_names_the_classes_and_adds_its_codes(book):
    terms = Terminology.model_validate({"name": "n", "version": "1", "entries": [
        {"local": "OB", "code": [f"SCT:{OBESE}", "ICD10:E66"], "meaning": "Obesity", "class": "obese"},
        {"local": "H", "code": f"SCT:{HEART}", "meaning": "Known, of no class"}]})  # fmt: skip
    found = book(patient(), study(), condition(), condition(HEART), classes=None, terms=terms)
    assert found.label(unit(accession="A1")) == Label("obese", ("ICD10:E66", f"SCT:{OBESE}"))
    assert not found.summary.unmapped
    with pytest.raises(DataError, match="which codes mean which class"):
        book(classes=None)


def test_studies_without_an_image_are_listed_and_a_wrong_link_is_an_error(book):
    found = book(patient(), study(1), study(2))
    assert outcome(found, unit(accession="A1")) == "neither"
    assert found.unmatched() == ["export.ndjson:3"]
    wrong = book(patient(), study(1))
    assert outcome(wrong, unit(accession="B1")) == "no_label"
    with pytest.raises(DataError, match="no imaging study and no patient of"):
        wrong.unmatched()
    other = book(patient(), link="patient")
    assert outcome(other, unit("MRN2", month="2011-09")) == "no_label"
    with pytest.raises(DataError, match="no imaging study and no patient of"):
        other.unmatched()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b'{"resourceType": "Patient"\n', "export.ndjson:1 is no JSON"),
        (b"\n[]\n", "export.ndjson:2 is no FHIR resource"),
        (b'{"resourceType": "Patient", "identifier": "MRN1"}\n', "export.ndjson:1, Patient.identifier is not as"),
        (b'{"resourceType": "Condition", "code": {"coding": [{"code": 7}]}}\n', "Condition.code is not as in FHIR"),
        (b'{"resourceType": "ImagingStudy", "started": "30.9.2011"}\n', "ImagingStudy.date is not as in FHIR"),
        (b'{"resourceType": "ImagingStudy", "subject": {}}\n', "ImagingStudy.subject is not as in FHIR"),
        ('{"resourceType": "Patient", "id": "ü"}'.encode("latin-1"), "export.ndjson:1 is not UTF-8"),
        (b"[" * 100_000, "export.ndjson:1 is no JSON"),
    ],
)
def test_data_of_another_form_is_told_with_its_line(book, tmp_path, content, says):
    labels = FhirLabels.model_validate({"kind": "fhir", "path": tmp_path, "link": "study", "classes": CLASSES})
    with pytest.raises(DataError, match=r"holds no \.json"):
        FhirBook(labels, KEYS)
    (tmp_path / "export.ndjson").write_bytes(content)
    with pytest.raises(DataError) as caught:
        FhirBook(labels, KEYS)
    assert says in caught.value.message
    assert "MRN1" not in caught.value.message
    assert caught.value.remedy


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.sampled_from(["2011", "2011-99-99", "Patient/p1", "#", "urn:uuid:x"])
    | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(
        ["reference", "coding", "code", "system", "value", "start", "end", "type", "identifier"]), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


@given(st.data())
def test_fields_of_any_form_are_read_or_told(tmp_path_factory, data):
    made = [patient(), study(), condition(), observation(), report(imagingStudy=[{"reference": "ImagingStudy/s1"}])]
    for resource in made:
        for key in data.draw(st.lists(st.sampled_from(sorted(resource)), max_size=2)):
            resource[key] = data.draw(_JSON)
    folder = tmp_path_factory.mktemp("fhir")
    (folder / "export.ndjson").write_text("".join(json.dumps(resource) + "\n" for resource in made))
    labels = {"kind": "fhir", "path": folder, "link": data.draw(st.sampled_from(["accession", "study", "patient"])),
              "classes": CLASSES, "resources": ["Condition", "Observation", "DiagnosticReport"]}  # fmt: skip
    try:
        found = FhirBook(FhirLabels.model_validate(labels), KEYS)
    except DataError:
        return
    assert outcome(found, unit("MRN1", "A1", "1.2.3.1")) in {*CLASSES.values(), *map(str, Reason)}


@pytest.mark.parametrize("text", ["\ud800", "p\udcff"])
def test_half_a_character_is_told(book, text):
    with pytest.raises(DataError, match="is not as in FHIR R4"):
        book(patient(id=text))
    with pytest.raises(DataError, match="is not as in FHIR R4"):
        book(patient(value=text))


def test_memory_does_not_grow_with_the_data(tmp_path):
    def peak(patients: int) -> int:
        folder = tmp_path / str(patients)
        folder.mkdir()
        with (folder / "export.ndjson").open("w") as out:
            for number in range(patients):
                subject = {"reference": f"Patient/p{number}"}
                rows = [patient(number, f"MRN{number}"), study(number, subject=subject), condition(subject=subject)]
                out.writelines(json.dumps(row) + "\n" for row in rows)
        labels = FhirLabels.model_validate({"kind": "fhir", "path": folder, "link": "accession", "classes": CLASSES})
        tracemalloc.start()
        found = FhirBook(labels, KEYS)
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert outcome(found, unit("", accession=f"A{patients - 1}")) == "obese"
        return size

    few = peak(50)
    assert peak(2000) < 1.5 * few


# --- real shape: Synthea


@pytest.fixture(scope="module")
def synthea(shared_data: Path) -> list[dict[str, dict[str, Any]]]:
    """Of each imaging study of the six bundles: the study and its patient."""
    found = []
    for path in sorted((shared_data / "fhir_synthea").glob("*.json")):
        resources = [entry["resource"] for entry in json.loads(path.read_text(encoding="utf-8"))["entry"]]
        people = [each for each in resources if each["resourceType"] == "Patient"]
        assert len(people) == 1
        found += [{"study": each, "patient": people[0]} for each in resources if each["resourceType"] == "ImagingStudy"]
    return found


def _mrn(person: dict[str, Any]) -> str:
    return next(each["value"] for each in person["identifier"] if each["system"] == SYNTHEA)


def _uid(imaging: dict[str, Any]) -> str:
    return str(imaging["identifier"][0]["value"]).removeprefix("urn:oid:")


def _images(hospital: Any, series: Any, synthea: list[dict[str, dict[str, Any]]]) -> None:
    """DICOM of each study as its PACS would hold it: the patient's identifier and name, the day, an accession."""
    for number, each in enumerate(synthea, start=1):
        person, day = each["patient"], each["study"]["started"][:10].replace("-", "")
        name = person["name"][0]
        over = {"StudyInstanceUID": _uid(each["study"]), "StudyDate": day, "SpecificCharacterSet": "ISO_IR 192",
                "PatientName": f"{name['family']}^{name['given'][0]}"}  # fmt: skip
        hospital.write(series(number, patient=_mrn(person), accession=f"ZUG-Ä{number}", over=over), f"s{number}")


def _labels(folder: Path, **parts: Any) -> dict[str, Any]:
    return {
        "kind": "fhir",
        "path": str(folder),
        "classes": CLASSES,
        "otherwise": "neither",
        "identifier": SYNTHEA,
    } | parts


def _classes(hospital: Any) -> dict[str, int]:
    rows = hospital.catalog().connection.execute("SELECT label, count(*) FROM cases GROUP BY label ORDER BY label")
    return dict(rows.fetchall())


#: 2 + 4 + 1 studies of the three patients whose obesity began years before; one study was ten years before the heart
#: disease of its patient.
EXPECTED = {"neither": 15, "obese": 7}


def test_the_patients_of_synthea_link_by_pseudonym(hospital, series, synthea, shared_data):
    assert len(synthea) == 22
    assert not all(each["patient"]["name"][0]["given"][0].isascii() for each in synthea)
    _images(hospital, series, synthea)
    counts = hospital.ingest(labels=_labels(shared_data / "fhir_synthea", link="patient"))
    assert (counts.cases, counts.labels_without_image) == (22, 0)
    assert _classes(hospital) == EXPECTED


def test_the_patients_of_synthea_link_by_study(hospital, series, synthea, shared_data):
    _images(hospital, series, synthea)
    counts = hospital.ingest(labels=_labels(shared_data / "fhir_synthea", link="study"))
    assert (counts.cases, counts.labels_without_image) == (22, 0)
    assert _classes(hospital) == EXPECTED


def test_the_patients_of_synthea_link_by_accession(hospital, series, synthea, shared_data, tmp_path):
    # Synthea's studies have no accession number: each gets the one of its image, as a PACS's gateway would write it.
    _images(hospital, series, synthea)
    numbers = {each["study"]["id"]: f"ZUG-Ä{number}" for number, each in enumerate(synthea, start=1)}
    folder = tmp_path / "fhir"
    folder.mkdir()
    for path in sorted((shared_data / "fhir_synthea").glob("*.json")):
        bundle = json.loads(path.read_text(encoding="utf-8"))
        with (folder / f"{path.stem}.ndjson").open("w", encoding="utf-8") as out:
            for entry in bundle["entry"]:
                resource = entry["resource"]
                if resource["resourceType"] == "ImagingStudy":
                    kind = coded("ACSN", "http://terminology.hl7.org/CodeSystem/v2-0203")
                    resource["identifier"].append({"type": kind, "value": numbers[resource["id"]]})
                text = json.dumps(resource, ensure_ascii=False)
                # A bundle's references are its URNs: an export has the type and the id.
                text = text.replace(f"urn:uuid:{_own(bundle, 'Patient')}", f"Patient/{_own(bundle, 'Patient')}")
                out.write(text + "\n")
    counts = hospital.ingest(labels=_labels(folder, link="accession"))
    assert (counts.cases, counts.labels_without_image) == (22, 0)
    assert _classes(hospital) == EXPECTED


def _own(bundle: dict[str, Any], kind: str) -> str:
    return next(str(each["resource"]["id"]) for each in bundle["entry"] if each["resource"]["resourceType"] == kind)
