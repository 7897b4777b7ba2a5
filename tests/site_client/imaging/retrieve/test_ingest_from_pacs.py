"""From a real Orthanc to the catalog: the same cases as from a folder of the same files, and no name on the way."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

from locum.common.errors import DataError
from locum.site_client.imaging.catalog import Catalog, Counts
from locum.site_client.imaging.ingest import Progress, ingest
from locum.site_client.imaging.sources import load_site
from locum.site_client.imaging.store import exclusive
from tests.orthanc import PLANTED, Pacs, Study, document, texts
from tests.site_client.imaging.retrieve.conftest import KEYS, Site, accessions
from tests.site_client.imaging.retrieve.web import web_pacs

CT, MR = Study(600, slices=6), Study(601, modality="MR", slices=5)


def taken_in(folder: Path, source: Mapping[str, Any], told: list[Progress] | None = None, **parts: Any) -> Counts:
    site = load_site({"name": "north", "root": str(folder), "sources": [source], **parts})
    return ingest(site, folder / "store", keys=KEYS, progress=None if told is None else told.append)


def volumes(folder: Path) -> dict[str, np.ndarray]:
    return {
        case.id: np.asanyarray(nibabel.load(folder / "store" / case.image).dataobj)
        for case in Catalog.open(folder / "store").cases((0.8, 0.1, 0.1))
    }


def test_a_pacs_gives_the_cases_that_a_folder_gives(orthanc: Pacs, site: Site, way: str, tmp_path: Path) -> None:
    orthanc.load(CT, MR)
    orthanc.orthanc.load([document(CT)])
    there = tmp_path / "folder"
    (there / "dicom").mkdir(parents=True)
    for number, content in enumerate([*CT.files(), *MR.files()]):
        (there / "dicom" / f"{number}.dcm").write_bytes(content)
    taken_in(there, {"kind": "dicom", "path": "dicom"})
    told: list[Progress] = []
    counts = taken_in(tmp_path, orthanc.source(way, query=accessions(site, CT, MR)), told)
    assert (counts.found, counts.stored, dict(counts.quarantined)) == (12, 11, {"document": 1})
    assert [step.stage for step in told if step.done == step.total] == ["retrieving", "reading", "storing"]
    ours, theirs = volumes(tmp_path), volumes(there)
    assert len(ours) == 2
    assert ours.keys() == theirs.keys()
    for name, volume in ours.items():
        np.testing.assert_array_equal(volume, theirs[name])


def test_no_identifier_stands_anywhere_below_the_store(orthanc: Pacs, site: Site, way: str, tmp_path: Path) -> None:
    orthanc.load(CT, MR)
    taken_in(tmp_path, orthanc.source(way, query=accessions(site, CT, MR)))
    files = [path for path in site.store.rglob("*") if path.is_file()]
    written = texts(files) + "\n".join(str(path.relative_to(site.store)) for path in files).encode()
    assert len(files) > 11
    assert [word for word in PLANTED if word.encode() in written] == []


def test_an_incomplete_study_is_in_quarantine_until_it_is_complete(tmp_path: Path) -> None:
    with web_pacs(CT, MR, said=lambda study: study.slices + (study is MR)) as pacs:
        counts = taken_in(tmp_path, pacs.source())
        assert (counts.found, counts.stored, dict(counts.quarantined)) == (11, 6, {"incomplete_study": 5})
        pacs.said = lambda study: study.slices
        counts = taken_in(tmp_path, pacs.source())
        assert (counts.found, counts.stored, dict(counts.quarantined)) == (11, 11, {})


def test_an_image_that_is_damaged_spoils_its_series_and_no_other(tmp_path: Path) -> None:
    def spoils(request: Any) -> bool:
        if not request.place.endswith(CT.series_uid):
            return False
        files = CT.files()
        request.reply_parts([*files[:5], files[5][:90]])
        return True

    with web_pacs(CT, MR, twists=[spoils]) as pacs:
        counts = taken_in(tmp_path, pacs.source())
    assert (counts.found, counts.stored, dict(counts.quarantined)) == (11, 5, {"unreadable": 6})


def test_who_withdraws_leaves_the_store_and_what_was_retrieved(orthanc: Pacs, site: Site, tmp_path: Path) -> None:
    orthanc.load(CT, MR)
    source = orthanc.source("dicomweb", query=accessions(site, CT, MR))
    assert taken_in(tmp_path, source).stored == 11
    (tmp_path / "withdrawn.txt").write_text(f"{MR.patient}\n", encoding="utf-8")
    counts = taken_in(tmp_path, source, consent={"withdrawn": "withdrawn.txt"})
    assert (counts.stored, dict(counts.quarantined)) == (6, {"consent_withdrawn": 5})
    assert len(volumes(tmp_path)) == 1
    assert len(list((site.store / "incoming").rglob("*.dcm"))) == 6


def test_two_ingests_at_once_are_refused(tmp_path: Path) -> None:
    with web_pacs(CT) as pacs, exclusive(tmp_path / "store"):
        with pytest.raises(DataError, match="another ingest is writing"):
            taken_in(tmp_path, pacs.source())
        assert pacs.asked == []


def test_what_came_before_a_pacs_went_away_is_used_at_the_next_ingest(tmp_path: Path) -> None:
    with web_pacs(CT, MR) as pacs:
        pacs.twists = [
            lambda request: request.place.endswith(MR.series_uid) and (request.reply(b"", "x/y", 401) or True)
        ]
        with pytest.raises(DataError, match="does not let this site in"):
            taken_in(tmp_path, pacs.source())
        pacs.twists = []
        pacs.asked.clear()
        assert taken_in(tmp_path, pacs.source()).stored == 11
        assert not [place for place in pacs.asked if place.endswith(CT.series_uid)]
