"""What a retrieval from a real Orthanc leaves in the store, by DICOMweb, C-GET and C-MOVE."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.uid import JPEG2000Lossless, RLELossless

from locum.site_client.imaging.keys import Keys
from locum.site_client.imaging.reasons import Reason
from locum.site_client.imaging.retrieve.spool import forget, spooled
from tests.orthanc import PLANTED, Pacs, Study, document, texts
from tests.site_client.imaging.retrieve.conftest import WAYS, Site, accessions, reasons


def test_all_that_a_query_names_comes_and_nothing_else(orthanc: Pacs, site: Site, way: str) -> None:
    named, other = Study(1, slices=5), Study(2)
    orthanc.load(named, replace(named, series=2, slices=3), other)
    items = site.retrieve(orthanc.source(way, query=accessions(site, named)))
    assert reasons(items) == [None] * 8
    assert {item.known.patient for item in items if item.known} == {site.keys.patient(named.patient)}
    assert {image.StudyInstanceUID for image in site.images()} == {site.keys.uid(named.uid)}
    assert {image.SeriesInstanceUID for image in site.images()} == {
        site.keys.uid(named.series_uid),
        site.keys.uid(replace(named, series=2).series_uid),
    }


def test_pixels_come_as_they_were(orthanc: Pacs, site: Site, way: str) -> None:
    study = Study(3)
    orthanc.load(study)
    site.retrieve(orthanc.source(way, query=accessions(site, study)))
    for image in site.images():
        np.testing.assert_array_equal(image.pixel_array, study.plane(int(image.InstanceNumber) - 1))


@pytest.mark.parametrize("syntax", [JPEG2000Lossless, RLELossless])
def test_compressed_images_come_as_the_pacs_keeps_them(orthanc: Pacs, site: Site, way: str, syntax: Any) -> None:
    study = Study(4, shape=(64, 64), syntax=syntax)
    orthanc.load(study)
    site.retrieve(orthanc.source(way, query=accessions(site, study)))
    images = site.images()
    assert [image.file_meta.TransferSyntaxUID for image in images] == [syntax] * study.slices
    for image in images:
        np.testing.assert_array_equal(image.pixel_array, study.plane(int(image.InstanceNumber) - 1))


def test_dicomweb_c_get_and_c_move_retrieve_the_same_of_four_vendors(
    orthanc: Pacs, tmp_path: Path, shared_data: Path
) -> None:
    files = sorted((shared_data / "dicom_vendor_sites").glob("site_*/**/*"))
    images = [path for path in files if path.is_file() and path.suffix not in {".gz", ".txt", ".json"}]
    try:
        orthanc.orthanc.load(path.read_bytes() for path in images)
        orthanc.load(Study(5), Study(6, modality="MR", shape=(64, 64), syntax=JPEG2000Lossless))
        orthanc.orthanc.load([document(Study(5))])
        found = {}
        for way in WAYS:
            site = Site(tmp_path / way / "store")
            site.retrieve(orthanc.source(way))
            found[way] = site.content()
    finally:
        orthanc.orthanc.empty()
    sent = {pydicom.dcmread(path, specific_tags=["SOPInstanceUID"]).SOPInstanceUID for path in images}
    assert len(found["dicomweb"]) == len(sent) + 4 + 4 + 1
    assert found["get"] == found["dicomweb"]
    assert found["move"] == found["dicomweb"]


def test_two_associations_retrieve_the_same_as_one(orthanc: Pacs, tmp_path: Path) -> None:
    studies = [Study(number, slices=3) for number in range(70, 76)]
    orthanc.load(*studies)
    one, two = Site(tmp_path / "1" / "store"), Site(tmp_path / "2" / "store")
    for site, number in ((one, 1), (two, 2)):
        site.store.parent.mkdir()
        site.retrieve(orthanc.source("get", associations=number, query=accessions(site, *studies)))
    assert len(one.items()) == 18
    assert two.content() == one.content()


def test_no_identifier_of_the_original_stands_in_any_file(orthanc: Pacs, site: Site, way: str) -> None:
    study = Study(7)
    orthanc.load(study)
    orthanc.orthanc.load([document(study)])
    site.retrieve(orthanc.source(way, query=accessions(site, study)))
    files = site.files()
    assert len([path for path in files if path.suffix == ".dcm"]) == study.slices
    written = texts(files) + "\n".join(str(path.relative_to(site.store)) for path in files).encode()
    assert [word for word in (*PLANTED, study.day) if word.encode() in written] == []


def test_objects_that_nothing_reads_are_counted_and_not_kept(orthanc: Pacs, site: Site, way: str) -> None:
    study = Study(8, slices=2)
    orthanc.load(study)
    orthanc.orthanc.load([document(study), document(study, series=study.series)])
    items = site.retrieve(orthanc.source(way, query=accessions(site, study)))
    assert sorted(map(str, reasons(items))) == ["None", "None", "document", "document"]
    assert all(item.path.exists() == (item.refused is None) for item in items)


@pytest.mark.parametrize(
    ("query", "wanted"),
    [
        ({}, {10, 11, 12, 13}),
        ({"modalities": ["MR"]}, {12, 13}),
        ({"modalities": ["CT", "MR"]}, {10, 11, 12, 13}),
        ({"body_parts": ["HEAD"]}, {11, 12}),
        ({"modalities": ["CT"], "body_parts": ["HEAD", "CHEST"]}, {10, 11}),
        ({"dates": ["2024-02-01", "2024-02-29"]}, {11, 12}),
        ({"dates": ["2024-02-10", "2024-03-01"], "modalities": ["MR"]}, {12, 13}),
    ],
)
def test_a_query_by(orthanc: Pacs, site: Site, way: str, query: dict[str, Any], wanted: set[int]) -> None:
    orthanc.load(
        Study(10, slices=1, day="20240131"),
        Study(11, slices=1, day="20240201", body_part="HEAD"),
        Study(12, slices=1, day="20240229", modality="MR", body_part="HEAD"),
        Study(13, slices=1, day="20240301", modality="MR", body_part="KNEE"),
    )
    site.retrieve(orthanc.source(way, query=query))
    assert {item.known.study for item in site.items() if item.known} == {
        site.keys.uid(Study(number).uid) for number in wanted
    }


def test_series_of_another_body_part_stay_where_they_are(orthanc: Pacs, site: Site, way: str) -> None:
    study = Study(14, slices=2)
    orthanc.load(study, replace(study, series=2, body_part="HEAD", slices=3))
    items = site.retrieve(orthanc.source(way, query={**accessions(site, study), "body_parts": ["chest"]}))
    assert [item.known.series for item in items if item.known] == [site.keys.uid(study.series_uid)] * 2
    assert reasons(items) == [None, None]


def test_a_narrower_query_removes_what_it_no_longer_names(orthanc: Pacs, site: Site, way: str) -> None:
    study, other = Study(15, slices=2), Study(16)
    orthanc.load(study, replace(study, series=2, body_part="HEAD"), other)
    both = accessions(site, study, other)
    assert len(site.retrieve(orthanc.source(way, query=both))) == 2 + 2 + 4
    assert len(site.retrieve(orthanc.source(way, query={**both, "body_parts": ["CHEST"]}))) == 2 + 4
    assert len(site.retrieve(orthanc.source(way, query=accessions(site, study)))) == 2 + 2
    assert len([path for path in site.files() if path.suffix == ".dcm"]) == 2 + 2


def test_a_second_retrieval_fetches_nothing(orthanc: Pacs, site: Site, way: str) -> None:
    study = Study(17)
    orthanc.load(study)
    source = orthanc.source(way, query=accessions(site, study))
    before = site.retrieve(source)
    assert [(step.stage, step.done, step.total) for step in site.told] == [("retrieving", n, 4) for n in (1, 2, 3, 4)]
    site.told.clear()
    assert site.retrieve(source) == before
    assert site.told == []


def test_a_study_that_grew_is_fetched_for_what_is_missing(orthanc: Pacs, site: Site, way: str) -> None:
    study = Study(18, slices=6)
    orthanc.load(replace(study, slices=2))
    source = orthanc.source(way, query=accessions(site, study))
    before = {item.name: item for item in site.retrieve(source)}
    orthanc.load(study, replace(study, series=2, slices=1))
    site.told.clear()
    after = {item.name: item for item in site.retrieve(source)}
    assert len(site.told) == 5
    assert len(after) == 7
    assert {name: after[name] for name in before} == before


def test_a_study_that_is_gone_from_the_pacs_goes(orthanc: Pacs, site: Site, way: str) -> None:
    gone, kept = Study(19), Study(20)
    orthanc.load(gone, kept)
    source = orthanc.source(way, query=accessions(site, gone, kept))
    assert len(site.retrieve(source)) == 8
    orthanc.remove(gone.accession)
    assert {item.known.study for item in site.retrieve(source) if item.known} == {site.keys.uid(kept.uid)}
    assert not (site.store / "incoming" / "0" / site.keys.uid(gone.uid)).exists()


def test_a_file_that_was_taken_away_is_fetched_again(orthanc: Pacs, site: Site, way: str) -> None:
    study = Study(21)
    orthanc.load(study)
    source = orthanc.source(way, query=accessions(site, study))
    site.retrieve(source)
    before = site.content()
    site.items()[1].path.unlink()
    (site.items()[0].path.parent / "2.25.1.dcm.part").write_bytes(b"half")
    (site.items()[0].path.parent / "2.25.1.dcm").write_bytes(b"of no row")
    site.retrieve(source)
    assert site.content() == before
    assert len([path for path in site.files() if "2.25.1.dcm" in path.name]) == 0


def test_another_profile_or_key_cleans_anew(orthanc: Pacs, site: Site, way: str) -> None:
    study = Study(22)
    orthanc.load(study)
    source = orthanc.source(way, query=accessions(site, study))
    site.retrieve(source)
    plain = site.content()
    site.retrieve(source, deidentification={"options": []})
    basic = site.content()
    assert basic.keys() == plain.keys()
    assert basic != plain
    site.keys = Keys.of(bytes(32))
    site.retrieve(source)
    assert site.content().keys().isdisjoint(plain)
    assert len(site.items()) == study.slices
    assert len([path for path in site.files() if path.suffix == ".dcm"]) == study.slices


def test_two_sources_stay_apart(orthanc: Pacs, site: Site) -> None:
    study = Study(23)
    orthanc.load(study)
    query = accessions(site, study)
    site.retrieve(orthanc.source("dicomweb", query=query), orthanc.source("get", query=query))
    assert len(site.items(0)) == len(site.items(1)) == study.slices
    assert {item.source for item in site.items(1)} == {1}


def test_nothing_of_a_patient_who_has_withdrawn_is_kept(orthanc: Pacs, site: Site, way: str) -> None:
    stays, leaves = Study(24), Study(25)
    orthanc.load(stays, leaves)
    source = orthanc.source(way, query=accessions(site, stays, leaves))
    withdrawn = site.store.parent / "withdrawn.txt"
    withdrawn.write_text(f"{leaves.patient}\n", encoding="utf-8")
    items = site.retrieve(source, consent={"withdrawn": str(withdrawn)})
    refused = [item for item in items if item.refused]
    assert [item.refused for item in refused] == [(Reason.CONSENT_WITHDRAWN, "")] * 4
    assert not any(item.path.exists() for item in refused)
    assert {item.known.patient for item in refused if item.known} == {site.keys.patient(leaves.patient)}
    site.told.clear()
    site.retrieve(source, consent={"withdrawn": str(withdrawn)})
    assert site.told == []
    withdrawn.write_text("", encoding="utf-8")
    assert reasons(site.retrieve(source, consent={"withdrawn": str(withdrawn)})) == [None] * 8


def test_what_was_retrieved_of_a_patient_can_be_forgotten(orthanc: Pacs, site: Site) -> None:
    stays, leaves = Study(26), Study(27)
    orthanc.load(stays, leaves)
    site.retrieve(orthanc.source("dicomweb", query=accessions(site, stays, leaves)))
    forget(site.store, {site.keys.patient(leaves.patient)})
    assert sorted(map(str, reasons(site.items()))) == ["None"] * 4 + ["consent_withdrawn"] * 4
    assert [path.parent.name for path in site.files() if path.suffix == ".dcm"] == [site.keys.uid(stays.uid)] * 4
    left = texts([site.store / "incoming" / "retrieval.sqlite"]).count(site.keys.accession(leaves.accession).encode())
    assert left == 0


def test_a_patient_who_withdraws_later_is_not_fetched_again(orthanc: Pacs, site: Site) -> None:
    study = Study(28)
    orthanc.load(study)
    source = orthanc.source("dicomweb", query=accessions(site, study))
    site.retrieve(source)
    forget(site.store, {site.keys.patient(study.patient)})
    site.told.clear()
    withdrawn = site.store.parent / "withdrawn.txt"
    withdrawn.write_text(f"{study.patient}\n", encoding="utf-8")
    assert reasons(site.retrieve(source, consent={"withdrawn": str(withdrawn)})) == [Reason.CONSENT_WITHDRAWN] * 4
    assert site.told == []


def test_a_store_that_was_never_asked_has_nothing(tmp_path: Path) -> None:
    assert list(spooled(tmp_path, 0)) == []
    forget(tmp_path, {"0123456789abcdef"})


_RETRIEVE = """
import sys
from pathlib import Path
from locum.site_client.imaging.deid.engine import Deidentifier
from locum.site_client.imaging.keys import Keys
from locum.site_client.imaging.retrieve.pacs import retrieve
from locum.site_client.imaging.sources import load_site
from locum.site_client.imaging.store import exclusive

keys, store, site = Keys.of(bytes(range(32))), Path(sys.argv[2]), load_site(Path(sys.argv[1]))
with exclusive(store):
    retrieve(site, store, keys, Deidentifier(site.deidentification, keys), lambda step: print(step.done, flush=True))
"""


def test_killed_at_any_moment_it_goes_on_and_ends_the_same(orthanc: Pacs, tmp_path: Path, way: str) -> None:
    studies = [Study(number, slices=40, shape=(64, 64)) for number in (30, 31, 32)]
    orthanc.load(*studies)
    whole, cut = Site(tmp_path / "whole" / "store"), Site(tmp_path / "cut" / "store")
    for site in (whole, cut):
        site.store.parent.mkdir()
    whole.retrieve(orthanc.source(way, query=accessions(whole, *studies)))
    source = orthanc.source(way, query=accessions(cut, *studies), rate=400)
    script = tmp_path / "retrieve.py"
    script.write_text(_RETRIEVE, encoding="utf-8")
    file = cut.store.parent / "site.yaml"
    file.write_text(_yaml(source), encoding="utf-8")
    fetched = 0
    for after in (70, 30):
        fetched += _killed_after(after, [sys.executable, str(script), str(file), str(cut.store)])
    assert fetched < 120 + 2 * 64
    cut.told.clear()
    cut.retrieve(source)
    assert cut.content() == whole.content()
    assert [step.done for step in cut.told] == list(range(121 - len(cut.told), 121))
    assert not [path for path in cut.files() if path.suffix == ".part"]


def _yaml(source: dict[str, Any]) -> str:
    import json

    return json.dumps({"name": "north", "sources": [source]})


def _killed_after(images: int, command: list[str]) -> int:
    """Start a retrieval, kill it when so many images more have come, and return how many did."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    seen = 0
    for _ in process.stdout:
        seen += 1
        if seen == images:
            os.kill(process.pid, signal.SIGKILL)
            break
    seen += len(process.stdout.readlines())
    process.stdout.close()
    process.wait()
    assert process.returncode in {-signal.SIGKILL, 0}
    return seen


def test_a_full_disk_is_one_clear_error_and_loses_nothing(orthanc: Pacs, tmp_path: Path, way: str) -> None:
    from locum.simulations.benchmarks.own_network import own_network

    entrance = own_network()
    assert entrance is not None
    studies = [Study(number, slices=40, shape=(128, 128)) for number in (33, 34)]
    orthanc.load(*studies)
    whole = Site(tmp_path / "whole" / "store")
    whole.store.parent.mkdir()
    source = orthanc.source(way, query=accessions(whole, *studies))
    whole.retrieve(source)
    script = tmp_path / "retrieve.py"
    script.write_text(_RETRIEVE, encoding="utf-8")
    file = tmp_path / "site.yaml"
    file.write_text(_yaml(source), encoding="utf-8")
    small, out = tmp_path / "small", tmp_path / "out"
    small.mkdir()
    run = f"{sys.executable} {script} {file} {small}/store"
    steps = (
        f"mount -t tmpfs -o size=2200k none {small}; {run} 2>{out}; mount -o remount,size=64m {small}; {run} && "
        f"cp -r {small}/store {tmp_path}/after"
    )
    mounts = ["unshare", *(["-m"] if os.geteuid() == 0 else ["-Urm"])]
    subprocess.run([*mounts, "sh", "-c", steps], check=True, stdout=subprocess.DEVNULL, timeout=120)
    assert "RunError: the store" in out.read_text()
    assert "No space left on device" in out.read_text()
    after = Site(tmp_path / "after")
    assert after.content() == whole.content()
