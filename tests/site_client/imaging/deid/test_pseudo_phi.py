"""The before/after pairs of pseudo_phi_mr: where the reference and this engine differ, and why."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pydicom
from pydicom.dataset import Dataset
from pydicom.tag import BaseTag

from locum.site_client.imaging.deid.table import load_tables
from tests.site_client.imaging.deid.objects import KEYS, engine

#: Why they differ: explanation to a test of (tag, original, reference, ours); texts, None for an absent attribute.
EXPLANATIONS: dict[str, Callable[[BaseTag, str | None, str | None, str | None], bool]] = {
    "UIDs: the reference keeps them, here they are keyed": lambda tag, before, other, ours: (
        before is not None and before.startswith("2.25.") and before == other and ours == KEYS.uid(before)
    ),
    "dates: the reference keeps them, here they move back by one number of days": lambda tag, before, other, ours: (
        before == other and _days_between(ours, before) == KEYS.days("9894340694")
    ),
    "absent attributes: the reference creates them empty, here they stay away": lambda tag, before, other, ours: (
        before is None and not other and ours is None
    ),
    "X of the Basic Profile: the reference empties, here it is removed": lambda tag, before, other, ours: (
        before is not None and other == "" and ours is None and _basic(tag) == "X"
    ),
    "private groups: the reference keeps them, here they go": lambda tag, before, other, ours: (
        tag.is_private and before == other and ours is None
    ),
    "descriptions: the reference keeps them, here they go without clean_descriptors": lambda tag, before, other, ours: (
        before == other and ours is None and _basic(tag) in {"X", "X/D"}
    ),
    "patient and accession: the reference empties, here they get keyed names": lambda tag, before, other, ours: (
        before is not None and other == "" and ours in {KEYS.patient("9894340694"), KEYS.accession("597B9256")}
    ),
    "how it was cleaned: each writes its own method": lambda tag, before, other, ours: (
        before is None and tag in {0x00120062, 0x00120063, 0x00120064} and ours is not None
    ),
    "retired free text without a row: the reference keeps it, here it goes": lambda tag, before, other, ours: (
        tag == 0x00200070 and before == other and ours is None
    ),
}


def _basic(tag: BaseTag) -> str | None:
    row = load_tables().rows.get(f"{tag:08x}")
    return row.basic if row else None


def _days_between(ours: str | None, before: str | None) -> int | None:
    from datetime import date

    if not ours or not before or not re.fullmatch(r"\d{8}", ours) or not re.fullmatch(r"\d{8}", before):
        return None
    first, last = (date(int(day[:4]), int(day[4:6]), int(day[6:])) for day in (ours, before))
    return (last - first).days


def _pairs(folder: Path) -> list[tuple[Dataset, Dataset]]:
    originals = {
        (one := pydicom.dcmread(path)).SOPInstanceUID: one for path in sorted((folder / "identified").iterdir())
    }
    references = [pydicom.dcmread(path) for path in sorted((folder / "reference_deidentified").iterdir())]
    return [(originals[reference.SOPInstanceUID], reference) for reference in references]


def _text(dataset: Dataset, tag: BaseTag) -> str | None:
    if tag not in dataset:
        return None
    value = dataset[tag].value
    return "" if value is None or (dataset[tag].VR == "SQ" and not value) else str(value)


def test_every_difference_from_the_reference_is_explained_by_one_rule(shared_data):
    pairs = _pairs(shared_data / "deid_burned_in/pseudo_phi_mr")
    assert len(pairs) == 4
    cleaner = engine("modified_dates", "device_identity", "patient_characteristics")
    used = set()
    for original, reference in pairs:
        ours = cleaner.clean(original)
        for tag in sorted({*original.keys(), *reference.keys(), *ours.keys()}):
            before, other, after = (_text(dataset, tag) for dataset in (original, reference, ours))
            if other == after:
                continue
            reasons = [why for why, holds in EXPLANATIONS.items() if holds(tag, before, other, after)]
            assert reasons, (tag, before, other, after)
            used.add(reasons[0])
    assert used == set(EXPLANATIONS)


def test_the_page_lists_every_explanation(project):
    page = " ".join((project / "docs/deidentification.md").read_text(encoding="utf-8").split())
    for explanation in EXPLANATIONS:
        subject, _, rest = explanation.partition(": ")
        assert subject in page
        for part in rest.split(", here "):
            assert part in page, part


def test_what_the_reference_removed_is_removed_here(shared_data):
    """Everything that the reference empties is empty, absent or a keyed name here."""
    for original, reference in _pairs(shared_data / "deid_burned_in/pseudo_phi_mr"):
        ours = engine("modified_dates").clean(original)
        for tag in original.keys():  # noqa: SIM118 # a data set iterates over elements
            if _text(original, tag) and _text(reference, tag) == "":
                assert _text(ours, tag) in {None, "", KEYS.patient("9894340694"), KEYS.accession("597B9256")}
