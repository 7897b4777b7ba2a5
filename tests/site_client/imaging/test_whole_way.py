"""From a real PACS to the catalog: images, their segmentation, their labels, consent, and what a person releases."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import highdicom
import nibabel
import numpy as np
import pytest
from highdicom.sr import CodedConcept

from locum.site_client.imaging.catalog import Catalog, Counts
from locum.site_client.imaging.ingest import ingest
from locum.site_client.imaging.keys import Keys
from locum.site_client.imaging.quarantine import Wish, decide, held
from locum.site_client.imaging.reasons import Reason
from locum.site_client.imaging.sources import load_site
from tests.orthanc import PLANTED, Pacs, Study, encoded, one_orthanc, orthanc, start_orthanc

__all__ = ["one_orthanc", "orthanc", "start_orthanc"]

KEYS = Keys.of(bytes(range(32)))
SPLIT = (0.8, 0.1, 0.1)
FINDING = CodedConcept("10200004", "SCT", "Liver")


@dataclass
class Site:
    """A site whose images are in a PACS."""

    folder: Path
    pacs: Pacs

    @property
    def store(self) -> Path:
        return self.folder / "store"

    def ingest(self, *studies: Study, way: str = "dicomweb", **parts: Any) -> Counts:
        wanted = self.folder / "accessions.txt"
        wanted.write_text("".join(f"{study.accession}\n" for study in studies))
        source = self.pacs.source(way, query={"accessions": "accessions.txt"})
        site = {"name": "north", "root": str(self.folder), "sources": [source], **parts}
        return ingest(load_site(site), self.store, keys=KEYS)

    def catalog(self) -> Catalog:
        return Catalog.open(self.store)

    def bytes_of_store(self) -> bytes:
        return b"\n".join(path.read_bytes() for path in sorted(self.store.rglob("*")) if path.is_file())


@pytest.fixture
def site(tmp_path: Path, orthanc: Pacs) -> Site:
    return Site(tmp_path, orthanc)


def segmented(study: Study, mask: np.ndarray) -> bytes:
    """A Segmentation object of a study, as a reader's workstation puts it beside the images."""
    images = [study.image(index) for index in range(study.slices)]
    for image in images:
        image.StudyID, image.StudyTime = "1", "030405"
    segment = highdicom.seg.SegmentDescription(1, "liver", CodedConcept("123037004", "SCT", "Body"), FINDING, "MANUAL")
    made = highdicom.seg.Segmentation(
        source_images=images,
        pixel_array=mask,
        segmentation_type="BINARY",
        segment_descriptions=[segment],
        series_instance_uid=f"{study.uid}.7",
        series_number=7,
        sop_instance_uid=f"{study.uid}.7.1",
        instance_number=1,
        manufacturer="ACME",
        manufacturer_model_name="Pen",
        software_versions="1",
        device_serial_number="SN-Quuxberg",
    )
    return encoded(made)


@pytest.mark.parametrize("way", ["dicomweb", "get", "move"])
def test_what_a_pacs_holds_becomes_cases_with_masks_and_labels(site, way):
    studies = [Study(1100), Study(1101, slices=5)]
    site.pacs.load(*studies)
    truth = {}
    for study in studies:
        mask = np.zeros((study.slices, *study.shape), np.uint8)
        mask[0:2, 4:9, 2:7] = 1
        site.pacs.orthanc.load([segmented(study, mask)])
        planes = np.stack([study.plane(index).astype(int) - 1024 for index in range(study.slices)])
        truth[KEYS.patient(study.patient)] = planes, mask
    rows = "".join(f"{study.accession},MASS\n" for study in studies)
    (site.folder / "labels.csv").write_text(f"acc,code\n{rows}")
    counts = site.ingest(
        *studies,
        way=way,
        labels={"file": "labels.csv", "key": "accession", "key_column": "acc", "label_column": "code"},
        masks={"kind": "seg", "segments": {"SCT:10200004": 1}},
    )
    assert (counts.found, counts.stored, counts.annotations, counts.cases) == (11, 9, 2, 2)
    for case in site.catalog().cases(SPLIT):
        image, drawn = (np.asarray(nibabel.load(path).dataobj).T for path in (case.image, case.mask))
        planes, mask = truth[case.patient]
        backwards = np.array_equal(image, planes[::-1])  # the store runs from head to feet, or the other way
        assert np.array_equal(image[::-1] if backwards else image, planes)
        assert np.array_equal(drawn[::-1] if backwards else drawn, mask)
        assert case.label == "MASS"


def test_the_catalog_knows_what_contracts_ask_and_the_store_holds_no_identifier(site):
    study = Study(1110)
    site.pacs.load(study)
    site.ingest(study)
    (fact,) = site.catalog().facts()
    assert (fact.sex, fact.age, fact.month, fact.body_part) == ("F", 62, "2024-03", "CHEST")
    assert (fact.orientation, fact.slices, fact.patient) == ("axial", 4, KEYS.patient(study.patient))
    assert "PS3.15" in fact.profile
    content = site.bytes_of_store()
    assert [word for word in PLANTED if word.encode() in content] == []


def test_a_second_ingest_fetches_and_stores_nothing_anew(site):
    study = Study(1120)
    site.pacs.load(study)
    first = site.ingest(study)
    stamps = {path: path.stat().st_mtime_ns for path in site.store.rglob("*.nii")}
    assert site.ingest(study) == first
    assert {path: path.stat().st_mtime_ns for path in site.store.rglob("*.nii")} == stamps


def test_who_withdraws_leaves_catalog_store_and_spool_and_comes_back_when_the_line_goes(site):
    studies = [Study(1130), Study(1131)]
    site.pacs.load(*studies)
    assert site.ingest(*studies).cases == 2
    (site.folder / "withdrawn.txt").write_text(f"# by letter\n{studies[0].patient}\n")
    consent = {"withdrawn": "withdrawn.txt"}
    counts = site.ingest(*studies, consent=consent)
    assert (counts.cases, counts.quarantined) == (1, {Reason.CONSENT_WITHDRAWN: 4})
    gone = KEYS.patient(studies[0].patient)
    assert gone not in {case.patient for case in site.catalog().cases(SPLIT)}
    assert len(list(site.store.rglob("*.nii"))) == 1
    assert len(list(site.store.rglob("*.dcm"))) == 4
    (site.folder / "withdrawn.txt").write_text("# nobody\n")
    assert site.ingest(*studies, consent=consent).cases == 2


def test_an_image_that_may_have_text_in_it_becomes_a_case_once_a_person_has_released_it(site):
    study = Study(1140, slices=1, over={"BurnedInAnnotation": "YES"})
    site.pacs.load(study)
    assert site.ingest(study).quarantined == {Reason.BURNED_IN: 1}
    catalog = site.catalog()
    (waiting,) = held(catalog.connection)
    catalog.close()
    decide(site.store, Wish(waiting.unit, "release", by="M. Muster", crop=None))
    counts = site.ingest(study)
    assert (counts.cases, counts.quarantined) == (1, {})


def test_another_key_means_that_everything_is_fetched_and_named_anew_and_folds_stay(site, tmp_path):
    studies = [Study(1150 + number) for number in range(3)]
    site.pacs.load(*studies)
    site.ingest(*studies)
    source = site.pacs.source("dicomweb", query={"accessions": "accessions.txt"})
    data = load_site({"name": "north", "root": str(site.folder), "sources": [source]})
    ingest(data, tmp_path / "new", keys=Keys(names=b"n" * 32, folds=KEYS.folds))
    before, after = site.catalog().cases(SPLIT), Catalog.open(tmp_path / "new").cases(SPLIT)
    assert {case.patient for case in before}.isdisjoint(case.patient for case in after)
    assert sorted(case.fold for case in before) == sorted(case.fold for case in after)
