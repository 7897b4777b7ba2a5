"""What docs/retrieve.md says is so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from locum.site_client.imaging.sources import DicomWebSource, DimseSource, Query


@pytest.fixture(scope="module")
def page(project: Path) -> str:
    return (project / "docs" / "retrieve.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("model", [DicomWebSource, DimseSource, Query])
def test_every_key_is_explained(page: str, model: type[DicomWebSource]) -> None:
    explained = {key for row in re.findall(r"^\| (`.*?) \|", page, re.MULTILINE) for key in re.findall(r"`(\w+)`", row)}
    assert set(model.model_fields) - {"kind"} <= explained


def test_every_message_of_the_page_is_one_of_the_code(page: str, project: Path) -> None:
    rows = page.partition("## What can go wrong")[2].splitlines()
    messages = [row.split("|")[1].strip() for row in rows if row.startswith("| ")][1:]
    assert len(messages) > 15
    files = [*(project / "site_client/imaging/retrieve").glob("*.py"), project / "site_client/imaging/store.py"]
    code = "\n".join(file.read_text(encoding="utf-8") for file in files)
    assert [text for text in messages if text.partition(":")[0] not in code] == []


def test_the_examples_are_site_files(page: str, tmp_path: Path) -> None:
    from locum.common.yaml_source import read_yaml
    from locum.site_client.imaging.sources import SiteData

    examples = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    for number, example in enumerate(examples):
        file = tmp_path / f"{number}.yaml"
        file.write_text(example, encoding="utf-8")
        SiteData.model_validate(read_yaml(file).data)
    assert len(examples) == 2
