"""A cohort question is data with one digest; what is wrong with it is told by line; no answer passes for another."""

from __future__ import annotations

import re
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import yaml
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from locum.common.cohort import (
    ANSWER,
    QUESTION,
    Answer,
    Question,
    Told,
    check_fits,
    load_query,
    open_answer,
    open_question,
    parse_query,
    seal_answer,
    seal_question,
    vendor_of,
)
from locum.common.envelope import EnvelopeError, seal
from locum.common.errors import DataError

KEY = Ed25519PrivateKey.generate()
ASKED: dict[str, Any] = {"name": "lungs", "study": "nodules", "purpose": "to count"}


def query(**changes: Any) -> Any:
    return parse_query(yaml.safe_dump({**ASKED, **changes}).encode())


def test_the_digest_is_of_what_is_asked_and_not_of_how_it_is_written() -> None:
    one = parse_query(b"name: lungs\nstudy: nodules\npurpose: to count\nwhere: {vendor: [Siemens Healthineers]}\n")
    other = parse_query(b"purpose: to count\nstudy: nodules\nname: lungs\nwhere:\n  vendor: [SIEMENS]\n  sex: []\n")
    assert one == other
    assert one.digest == other.digest
    assert one.digest != query(where={"vendor": ["GE"]}).digest != query(edition=2).digest
    edges = query(describe={"EchoTime": [0, 2, 10]})
    assert edges.digest == query(describe={"EchoTime": [0.0, 2.0, 10.0]}).digest


@pytest.mark.parametrize(
    ("line", "number", "told"),
    [
        ("wher: {}", 4, "did you mean 'where'"),
        ("where: {modalty: [CT]}", 4, "did you mean 'modality'"),
        ("where: {parameters: {EchoTime: {lest: 3}}}", 4, "did you mean 'least'"),
        ("where: {sex: [X]}", 4, "got 'X'"),
        ("where: {code: ['chest']}", 4, "got 'chest'"),
        ("where: {months: {first: 2024-05, last: 2024-01}}", 4, "'first' is after 'last'"),
        ("where: {spacing: {least: 3, most: 2}}", 4, "'least' is larger than 'most'"),
        ("where: {parameters: {'x.y': {least: 3}}}", 4, "string_pattern_mismatch|should match pattern"),
        ("group_by: [sex, age, vendor]", 4, "at most 2"),
        ("group_by: [sex, sex]", 4, "stands there twice"),
        ("group_by: [code]", 1, "name the codes"),
        ("group_by: [height]", 4, "got 'height'"),
        ("describe: {EchoTime: [3, 2]}", 4, "edges of bins grow"),
        ("describe: {EchoTime: [3]}", 4, "at least 2"),
        ("describe: {EchoTime: [.nan, 2]}", 4, "valid number"),
        ("edition: 0", 4, "greater than or equal to 1"),
    ],
)
def test_what_is_wrong_is_told_with_its_line(tmp_path: Path, line: str, number: int, told: str) -> None:
    path = tmp_path / "ask.yaml"
    path.write_text(f"name: lungs\nstudy: nodules\npurpose: to count\n{line}\n")
    with pytest.raises(DataError) as caught:
        load_query(path)
    assert f"ask.yaml line {number}: " in caught.value.message
    assert re.search(told, caught.value.message)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("- a\n", "a question is a mapping"),
        ("name: a\n", "line 1: study: this key is missing — add 'study'"),
        ("name: &a b\n", "anchors"),
        ("name: a\nname: b\n", "stands twice"),
        ("name: [\n", "ask.yaml line"),
    ],
)
def test_what_is_no_question_is_refused_in_words(tmp_path: Path, content: str, told: str) -> None:
    path = tmp_path / "ask.yaml"
    path.write_text(content)
    with pytest.raises(DataError) as caught:
        load_query(path)
    assert told in caught.value.message
    with pytest.raises(DataError, match="there is no question at"):
        load_query(tmp_path / "none.yaml")


def test_an_answer_has_all_cells_that_whoever_asks_knows() -> None:
    asked = query(
        group_by=["sex", "year"], where={"months": {"first": "2019-05", "last": "2020-04"}, "sex": ["F", "M"]}
    )
    assert asked.tables[0].keys == (("F", "2019"), ("F", "2020"), ("M", "2019"), ("M", "2020"))
    assert query(group_by=["vendor"]).tables[0].keys is None
    assert query().tables[0].keys == ((),)
    described = query(describe={"EchoTime": [0, 2, 10]}, where={"vendor": ["ge medical"]}).tables
    assert [table.name for table in described] == ["protocol", "patients"]
    assert described[0].keys is None
    assert described[0].dimensions[1].values == ("0 to 2", "2 to 10")
    with pytest.raises(DataError, match="an answer has at most"):
        query(group_by=["code", "age"], where={"code": [f"SCT:{number}" for number in range(200)]})


def test_one_cell_has_one_name_wherever_it_is_asked_about() -> None:
    by_sex, women = query(group_by=["sex"]), query(where={"sex": ["F"]}, name="women", study="another", edition=3)
    assert by_sex.predicate(by_sex.tables[0], ("F",)) == women.predicate(women.tables[0], ())
    assert by_sex.predicate(by_sex.tables[0], ("M",)) != women.predicate(women.tables[0], ())


def test_a_maker_has_one_name_at_all_sites() -> None:
    assert {vendor_of(text) for text in ("SIEMENS", "Siemens Healthineers", "siemens_x")} == {"SIEMENS"}
    assert {vendor_of(text) for text in ("GE MEDICAL SYSTEMS", "GE", "General Electric")} == {"GE"}
    assert vendor_of("") == ""


# --- what is signed


def answer(asked: Any, **changes: Any) -> Answer:
    fields = {"site": "north", "question": asked.digest, "at": time.time(), "least_cell": 10, "cells": ()}
    return Answer.model_validate({**fields, **changes})


def test_a_question_and_an_answer_are_read_back_and_neither_is_the_other() -> None:
    asked = query()
    fields = {"digest": asked.digest, "query": asked.model_dump(mode="json"), "by": "Team A"}
    question = Question(**fields, asked_at=1.0, until=2.0)
    sealed = seal_question(question, KEY)
    assert open_question(sealed, KEY.public_key()) == (question, asked)
    told = answer(asked, cells=(Told(table=0, key=(), patients=12),))
    assert open_answer(seal_answer(told, KEY), KEY.public_key()) == told
    with pytest.raises(EnvelopeError):
        open_answer(sealed, KEY.public_key())
    with pytest.raises(EnvelopeError):
        open_question(seal_answer(told, KEY), KEY.public_key())
    with pytest.raises(EnvelopeError, match="not signed"):
        open_question(sealed, Ed25519PrivateKey.generate().public_key())
    other = question.model_copy(update={"digest": "ab" * 32})
    with pytest.raises(EnvelopeError, match="digest"):
        open_question(seal_question(other, KEY), KEY.public_key())
    unknown = seal(QUESTION, {**question.model_dump(), "query": {**question.query, "new": 1}}, KEY)
    with pytest.raises(EnvelopeError, match="does not know"):
        open_question(unknown, KEY.public_key())
    with pytest.raises(EnvelopeError, match="other fields"):
        open_answer(seal(ANSWER, {"site": "north"}, KEY), KEY.public_key())


@pytest.mark.parametrize(
    "changes",
    [
        {"cells": [{"table": 0, "key": [], "patients": 9}]},
        {"cells": [{"table": 0, "key": [], "patients": 0}]},
        {"cells": [{"table": 0, "key": [], "patients": 12}, {"table": 0, "key": [], "patients": None}]},
        {"cells": [{"table": 0, "key": [], "patients": 12}], "refused": "cohort"},
    ],
)
def test_an_answer_below_its_least_cell_or_with_two_meanings_is_none(changes: dict[str, Any]) -> None:
    asked = query()
    with pytest.raises(EnvelopeError):
        open_answer(seal(ANSWER, {**answer(asked).model_dump(mode="json"), **changes}, KEY), KEY.public_key())


def test_an_answer_fits_its_own_question_only() -> None:
    asked = query(group_by=["sex"])
    check_fits(answer(asked, cells=(Told(table=0, key=("F",), patients=12),)), asked)
    for cells in ((Told(table=0, key=("X",)),), (Told(table=1, key=("F",)),), (Told(table=0, key=()),)):
        with pytest.raises(EnvelopeError):
            check_fits(answer(asked, cells=cells), asked)
    with pytest.raises(EnvelopeError, match="another question"):
        check_fits(answer(asked), query())


def test_a_question_of_too_many_cells_is_refused_without_making_any() -> None:
    values = {"vendor": [f"V{number}" for number in range(1000)], "label": [f"l{number}" for number in range(1000)]}
    tracemalloc.start()
    with pytest.raises(DataError, match="1000000 cells"):
        query(where=values, group_by=["vendor", "label"])
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 30 << 20


def test_two_bins_never_have_one_name() -> None:
    asked = query(describe={"EchoTime": [1, 1.0000001, 1.0000002, 3]})
    assert asked.tables[0].dimensions[1].values == ("1 to 1.0000001", "1.0000001 to 1.0000002", "1.0000002 to 3")
