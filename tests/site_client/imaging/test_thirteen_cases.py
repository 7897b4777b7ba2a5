"""The thirteen cases: what is stored is right in every voxel, the rest is refused; what other readers do is told."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import nibabel
import numpy as np
import pytest

from tests.site_client.imaging.cases import Case, is_right, thirteen
from tests.site_client.imaging.conftest import Series

CASES = thirteen(Series)


@pytest.mark.parametrize("name", CASES)
def test_every_case_is_right_in_every_voxel_or_refused(hospital, name):
    case: Case = CASES[name]
    case.write(hospital.dicom)
    counts = hospital.ingest()
    stored = [nibabel.load(found.image) for found in hospital.catalog().cases((0.8, 0.1, 0.1))]
    assert set(counts.quarantined) == case.reasons
    assert len(stored) == len(case.truths)
    for truth in case.truths:
        only = Case(case.images, (truth,), placeless=case.placeless)
        assert sum(is_right(np.asarray(image.dataobj), image.affine, only) for image in stored) == 1


def told(project: Path) -> dict[str, tuple[str, ...]]:
    """The table of the documentation: case to what Locum and the readers of MONAI do."""
    page = (project / "docs" / "site-data.md").read_text(encoding="utf-8")
    table = page.split("| case | Locum |", 1)[1].split("\n\n", 1)[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    return {row[0]: tuple(row[1:]) for row in rows}


def test_the_table_of_the_documentation_names_every_case(project):
    table = told(project)
    assert set(table) == set(CASES)
    for name, case in CASES.items():
        assert table[name][0].startswith("right" if case.truths else "refused")
        assert set(re.findall(r"`(\w+)`", table[name][0])) == case.reasons


@pytest.mark.parametrize("name", CASES)
def test_the_reader_of_monai_does_what_the_documentation_tells(project, tmp_path, name):
    transforms = pytest.importorskip("monai.transforms")
    case: Case = CASES[name]
    case.write(tmp_path / "case")
    source = tmp_path / "case" if len(case.images) > 1 else tmp_path / "case" / "IM0000.dcm"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = transforms.LoadImage(reader="PydicomReader")(str(source))
    right = is_right(np.asarray(image), np.asarray(image.affine), case)
    assert told(project)[name][1].startswith("right" if right else "wrong")
