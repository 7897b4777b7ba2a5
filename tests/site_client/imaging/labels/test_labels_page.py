"""The page on labels shows what the program reads, and the maps that ship are maps."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from locum.common.yaml_source import parse_yaml
from locum.site_client.imaging.labels.negation import rules
from locum.site_client.imaging.sources import FhirLabels, ReportLabels, SiteData, load_site
from locum.site_client.imaging.terminology import Terminology, labelled


@pytest.fixture(scope="module")
def page(project: Path) -> str:
    return (project / "docs" / "labels.md").read_text(encoding="utf-8")


def test_every_example_of_the_page_is_read(page):
    examples = [
        parse_yaml(block.encode()).data for block in re.findall(r"^```yaml\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    ]
    assert len(examples) >= 4
    for example in examples:
        if "entries" in example:
            assert Terminology.model_validate(example).entries
        else:
            site = {"name": "north", "sources": [{"kind": "dicom", "path": "dicom"}]} | example
            assert SiteData.model_validate(site)


def test_the_page_has_every_key_of_reports_fhir_and_maps(page):
    told = set(re.findall(r"`([^`\n]+)`", page))
    keys = {*ReportLabels.model_fields, *FhirLabels.model_fields, *Terminology.model_fields} - {"kind", "entries"}
    assert {*keys, "local", "code", "meaning", "class"} <= told


@pytest.mark.parametrize("name", ["chest", "breast", "icd10"])
def test_the_maps_that_ship_are_maps(project, name):
    found = Terminology.load(project / "configs" / "terminology" / f"{name}.yaml")
    assert found.codes_by_class()
    assert found.source
    assert all(labelled(entry.local, None, found).codes == entry.codes for entry in found.entries if entry.name)


def test_every_file_of_the_folder_is_a_map_or_words(project):
    files = sorted(path.name for path in (project / "configs" / "terminology").iterdir())
    assert files == ["breast.yaml", "chest.yaml", "icd10.yaml", "negation.en.yaml"]
    assert rules(project / "configs" / "terminology" / "negation.en.yaml").words == rules().words


def test_a_site_file_names_its_map(tmp_path, project):
    (tmp_path / "dicom").mkdir()
    source = project / "configs" / "terminology" / "chest.yaml"
    site = {"name": "n", "root": str(tmp_path), "sources": [{"kind": "dicom", "path": "dicom"}]}
    assert load_site(site | {"terminology": str(source)}).terminology == source
