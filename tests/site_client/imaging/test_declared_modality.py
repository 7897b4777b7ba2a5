from __future__ import annotations

from contextlib import closing
from pathlib import Path

import nibabel
import numpy as np

from locum.site_client.imaging.catalog import Catalog
from locum.site_client.imaging.ingest import ingest
from locum.site_client.imaging.keys import Keys
from locum.site_client.imaging.sources import load_site


def _modalities(folder: Path, declared: str) -> set[str]:
    source = {"kind": "nifti", "images": "images", **({"modality": declared} if declared else {})}
    ingest(load_site({"name": "north", "sources": [source]}, base=folder), folder / "store", keys=Keys.of(bytes(32)))
    with closing(Catalog.open(folder / "store")) as catalog:
        return {fact.modality for fact in catalog.facts()}


def test_a_site_declares_what_a_nifti_file_does_not_say_and_may_change_its_mind(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    nibabel.save(nibabel.Nifti1Image(np.ones((4, 5, 6), np.int16), np.eye(4)), tmp_path / "images" / "a.nii.gz")
    assert _modalities(tmp_path, "") == {""}
    assert _modalities(tmp_path, "MR") == {"MR"}
