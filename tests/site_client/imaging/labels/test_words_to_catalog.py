"""Labels from words in an ingest: each image has its class and codes, or its reason; no word of a report is stored."""

from __future__ import annotations

from contextlib import closing
from typing import Any

import pytest

MAP = """name: chest
version: "1"
entries:
  - {local: MASS, code: ["SCT:4147007", "RADLEX:RID3874"], meaning: Mass, class: lesion}
  - {local: NORM, code: "SCT:17621005", meaning: Normal, class: no_lesion}
  - {local: mass, code: "SCT:4147007", meaning: Mass, class: lesion}
  - {local: LIMITED, code: "RADLEX:RID13", meaning: Limited quality}
"""
TABLE = {"file": "labels.csv", "key": "accession", "key_column": "acc", "label_column": "code"}
REPORTS = {"kind": "reports", "file": "reports.csv", "key": "accession", "key_column": "acc", "text_column": "text",
           "findings": {"lesion": ["mass"]}, "otherwise": "no_lesion"}  # fmt: skip


@pytest.fixture
def six(hospital: Any, series: Any) -> Any:
    for number in range(1, 7):
        hospital.write(series(number, patient=f"P{number}", accession=f"A{number}"))
    hospital.table("map.yaml", MAP)
    return hospital


def cases(hospital: Any) -> list[tuple[str, tuple[str, ...]]]:
    with closing(hospital.catalog()) as catalog:
        return sorted((str(facts.label), tuple(sorted(facts.codes))) for facts in catalog.facts())


def reasons(hospital: Any) -> set[tuple[str, str]]:
    with closing(hospital.catalog()) as catalog:
        return {(reason, detail) for _, reason, detail in catalog.quarantine()}


def test_local_codes_become_classes_and_standard_codes_or_go_to_quarantine(six):
    six.table("labels.csv", "\ufeffacc;code\nA1;MASS\nA2;NORM\nA3;MASSE\nA4;LIMITED\nA5;MASS\nA5;NORM\nA9;MASS\n")
    counts = six.ingest(labels=TABLE, terminology="map.yaml")
    assert cases(six) == [("lesion", ("RADLEX:RID3874", "SCT:4147007")), ("no_lesion", ("SCT:17621005",))]
    assert {reason for reason, _ in reasons(six)} == {"unmapped_code", "no_label", "conflicting_labels"}
    assert ("unmapped_code", "MASSE") in reasons(six)
    assert (counts.found, counts.stored, counts.labels_without_image) == (30, 10, 1)


def test_a_changed_map_changes_the_labels_at_the_next_ingest(six):
    six.table("labels.csv", "acc,code\n" + "".join(f"A{number},MASS\n" for number in range(1, 7)))
    six.ingest(labels=TABLE, terminology="map.yaml")
    six.table("map.yaml", MAP.replace("RADLEX:RID3874", "RADLEX:RID3875"))
    six.ingest(labels=TABLE, terminology="map.yaml")
    assert cases(six) == [("lesion", ("RADLEX:RID3875", "SCT:4147007"))] * 6


def test_reports_become_classes_or_go_to_quarantine_and_their_text_stays_where_it_was(six):
    texts = ["A mass.", "No mass.", "Possible mass.", "History of mass.", "The mass is growing.", ""]
    lines = [f"A{number},Zebra Quux: {text}\n" for number, text in enumerate(texts, start=1)]
    six.table("reports.csv", "acc,text\n" + "".join(lines))
    six.ingest(labels=REPORTS, terminology="map.yaml")
    assert [label for label, _ in cases(six)] == ["lesion", "lesion", "no_lesion", "no_lesion"]
    assert reasons(six) == {("uncertain_label", "lesion in line 4"), ("uncertain_label", "lesion in line 5")}
    for path in six.store.rglob("*"):
        assert not path.is_file() or (b"Zebra" not in path.read_bytes() and b"Quux" not in path.read_bytes())
