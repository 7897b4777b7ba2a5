"""An entry has one spelling: that of RFC 8785, whatever wrote it."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as some

from locum.common.canonical import canonical_json
from locum.common.log.entries import EntryError, MetricsEntry, RunEntry, read_entry, written

NAMES = some.from_regex(r"[A-Za-z0-9_]{1,40}", fullmatch=True)
NUMBERS = some.none() | some.floats(allow_nan=False, allow_infinity=False) | some.integers(-(2**60), 2**60).map(float)
MATRICES = some.lists(some.lists(some.floats(0, 1e9), max_size=3).map(tuple), max_size=3).map(tuple)


def metrics(**fields: Any) -> MetricsEntry:
    """Metrics of a round."""
    given = {
        "at": "2026-05-04T08:00:00Z", "run": "run", "plan": "0" * 64, "round": 1, "fold": "test", "model": "1" * 64,
        "sites": (), "cases": None, "overall": {}, "per_site": {}, "refused": {}, "spent": {},
    }  # fmt: skip
    return MetricsEntry(**{**given, **fields})


@given(some.dictionaries(NAMES, NUMBERS | MATRICES))
def test_metrics_are_spelt_as_the_standard_says(values: dict[str, Any]) -> None:
    entry = metrics(overall=values)
    assert written(entry) == canonical_json(entry.model_dump(mode="json"))
    assert read_entry(written(entry)) == entry


@given(some.text(some.characters(exclude_categories=["Cs"]), min_size=2, max_size=50))
def test_texts_are_spelt_as_the_standard_says(text: str) -> None:
    entry = metrics(spent={"north": text})
    assert written(entry) == canonical_json(entry.model_dump(mode="json"))
    assert read_entry(written(entry)) == entry


def test_another_spelling_is_an_error() -> None:
    leaf = written(RunEntry(at="2026-05-04T08:00:00Z", run="run", plan="0" * 64, event="started"))
    assert read_entry(leaf)
    for other in (leaf + b" ", leaf.replace(b":", b": "), leaf[1:], b"", b"[]", leaf.replace(b"started", b"begun")):
        with pytest.raises(EntryError):
            read_entry(other)
