from __future__ import annotations

import sys
from pathlib import Path

import pytest

from locum.common.errors import DataError
from locum.site_client.imaging.sources import load_site

MODULE = """
def site(root, release):
    return {"sources": [{"kind": "nifti", "images": f"release-{release}", "modality": "MR"}]}


def newest(root):
    return {"sources": [{"kind": "nifti", "images": max(folder.name for folder in root.iterdir())}]}
"""


@pytest.fixture
def installed_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package beside the others, with one entry point, as pip would leave it."""
    (tmp_path / "our_trial.py").write_text(MODULE)
    info = tmp_path / "our_trial-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: our-trial\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[locum.datasets]\nour_trial = our_trial:site\nnewest = our_trial:newest\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])


@pytest.mark.usefixtures("installed_dataset")
def test_an_installed_data_set_writes_the_site_file(tmp_path: Path) -> None:
    (tmp_path / "release-3").mkdir()
    site = load_site({"name": "north", "dataset": {"name": "our_trial", "release": 3}}, base=tmp_path)
    assert site.sources[0].images == tmp_path / "release-3"  # type: ignore[union-attr]


@pytest.mark.usefixtures("installed_dataset")
def test_a_data_set_in_the_home_folder_is_looked_for_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home" / "scans" / "release-4").mkdir(parents=True)
    site = load_site({"name": "north", "root": "~/scans", "dataset": {"name": "newest"}}, base=tmp_path)
    assert site.sources[0].images == tmp_path / "home" / "scans" / "release-4"  # type: ignore[union-attr]


@pytest.mark.usefixtures("installed_dataset")
def test_a_misspelt_data_set_is_told_with_the_one_that_was_meant(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        load_site({"name": "north", "dataset": {"name": "our_trail"}}, base=tmp_path)
    assert "did you mean 'our_trial'" in caught.value.remedy


def test_a_data_set_that_is_not_installed_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no data set 'gone'"):
        load_site({"name": "north", "dataset": {"name": "gone"}}, base=tmp_path)
