"""The tables of de-identification are the standard's, read strictly."""

from __future__ import annotations

from collections import Counter
from importlib.resources import files

import pytest
from pydicom.config import RAISE
from pydicom.datadict import DicomDictionary
from pydicom.valuerep import validate_value

from locum.common.errors import DataError
from locum.site_client.imaging.deid import table
from locum.site_client.imaging.deid.elements import standard_vr
from locum.site_client.imaging.deid.rules import rule_for
from locum.site_client.imaging.deid.table import load_tables
from tests.site_client.imaging.deid.objects import engine, loaded, with_elements

_HEAD = "tag,name,basic," + ",".join(table.COLUMNS) + ",options_from"


def test_table_e_1_1_has_all_rows_of_its_edition():
    tables = load_tables()
    assert tables.edition == "2026c"
    assert len(tables.rows) == 656
    assert Counter(row.basic for row in tables.rows.values()) == {
        "X": 416, "D": 93, "U": 55, "Z": 42, "X/D": 23, "X/Z": 11, "X/Z/D": 8, "Z/D": 6, "X/Z/U*": 2,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("tag", "basic", "options"),
    [
        ("00100010", "Z", {}),
        ("00100020", "Z/D", {}),
        ("00100030", "Z", {}),
        ("00100040", "Z", {"patient_characteristics": "K"}),
        ("00101010", "X", {"patient_characteristics": "K"}),
        ("00080020", "Z", {"modified_dates": "C"}),
        ("0008002a", "X/Z/D", {"modified_dates": "C"}),
        ("00080018", "U", {"retain_uids": "K"}),
        ("00081030", "X", {"clean_descriptors": "C"}),
        ("00081010", "X/Z/D", {"device_identity": "K"}),
        ("00080080", "X/Z/D", {"institution_identity": "K"}),
        ("0040a730", "D", {"clean_structured_content": "C"}),
        ("00700001", "D", {"clean_graphics": "C"}),
        ("00082112", "X/Z/U*", {"retain_uids": "K"}),
        ("private", "X", {"safe_private": "C"}),
        ("60xx3000", "X", {"clean_graphics": "C"}),
    ],
)
def test_rows_say_what_the_standard_says(tag, basic, options):
    row = load_tables().rows[tag]
    assert (row.basic, dict(row.options)) == (basic, options)


def test_the_digest_is_that_of_all_tables():
    assert len(load_tables().digest) == 64
    assert load_tables() is load_tables()


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("00100010,Name,Q,,,,,,,,,,2020", "none of"),
        ("0010001,Name,Z,,,,,,,,,,2020", "no tag"),
        ("0010001g,Name,Z,,,,,,,,,,2020", "no tag"),
        ("00100010,Name,Z,k,,,,,,,,,2020", "none of"),
        ("00100010,Name,Z,,,,,,,,,", "cells"),
        ("00100010,Name,Z,,,,,,,,,,2020\n00100010,Name,Z,,,,,,,,,,2020", "twice"),
    ],
)
def test_a_damaged_table_is_an_error(tmp_path, monkeypatch, line, what):
    (tmp_path / "deid").mkdir()
    for name in ("safe_public.csv", "safe_private.csv", "words.txt"):
        text = files("locum.configs").joinpath("deid", name).read_text(encoding="utf-8")
        (tmp_path / "deid" / name).write_text(text, encoding="utf-8")
    (tmp_path / "deid" / "table_e_1_1.csv").write_text(f"# edition: 2026c\n{_HEAD}\n{line}\n", encoding="utf-8")
    monkeypatch.setattr(table, "files", lambda _: tmp_path)
    load_tables.cache_clear()
    try:
        with pytest.raises(DataError, match=what):
            load_tables()
    finally:
        load_tables.cache_clear()


def test_every_attribute_of_the_dictionary_has_a_rule_that_acts():
    tables, options = load_tables(), frozenset({"modified_dates", "clean_descriptors"})
    for tag in DicomDictionary:
        assert callable(rule_for(tag, tables, options).act)


_VALUES = {"UI": b"1.2.3.4 ", "DA": b"20190923", "TM": b"101112", "DT": b"20190923101112", "DS": b"1.5 ", "IS": b"7 "}
_DUMMY_LENGTHS = {"US": 2, "SS": 2, "UL": 4, "FL": 4, "FD": 8, "SL": 4, "OB": 2, "UN": 2, "OW": 2}


def test_every_dummy_is_a_value_of_its_type():
    rows = [int(tag, 16) for tag, row in load_tables().rows.items() if tag.isalnum() and row.basic.endswith("D")]
    given = {tag: vr for tag in rows if (vr := standard_vr(tag).partition(" or ")[0]) and vr != "SQ"}
    hidden = {tag: (vr.encode(), _VALUES.get(vr, b"Kowalska")) for tag, vr in given.items()}
    cleaned = loaded(engine().file(loaded(with_elements(hidden))))
    for tag, vr in given.items():
        raw = cleaned.get_item(tag).value
        assert b"owalska" not in raw
        assert raw, hex(tag)
        if vr in _DUMMY_LENGTHS:
            assert len(raw) == _DUMMY_LENGTHS[vr]
        else:
            validate_value(vr, raw.decode().strip(" \0"), RAISE)


def test_free_text_without_a_row_goes_unless_it_is_listed():
    tables = load_tables()
    texts = [
        tag
        for tag, entry in DicomDictionary.items()
        if entry[0] in {"LO", "LT", "PN", "SH", "ST", "UC", "UR", "UT", "AE"}
    ]
    kept = [tag for tag in texts if rule_for(tag, tables, ()).act.__name__ not in {"drop", "empty", "dummy"}]
    named = {0x00100010, 0x00100020, 0x00080050}
    assert set(kept) <= set(tables.public) | named
