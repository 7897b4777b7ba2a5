"""A map from local codes to standard codes and classes: strict, told with its line, and never silent about a code."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from locum.common.errors import DataError
from locum.site_client.imaging.labels.given import Label
from locum.site_client.imaging.reasons import Reason, RefusedError
from locum.site_client.imaging.terminology import Terminology, labelled

HEAD = "name: chest\nversion: '1'\nentries:\n"
MASS = '  - {local: MASS, code: ["SCT:4147007", "RADLEX:RID3874"], meaning: Mass, class: lesion}\n'
NORM = '  - {local: NORM, code: "SCT:17621005", meaning: Normal, class: no_lesion}\n'
OLD = '  - {local: OLD, code: "SCT:1", meaning: Known and no class}\n'


def load(folder: Path, text: str) -> Terminology:
    path = folder / "map.yaml"
    path.write_text(text, encoding="utf-8")
    return Terminology.load(path)


def test_local_and_standard_codes_lead_to_the_same_entry(tmp_path):
    found = load(tmp_path, HEAD + MASS + NORM)
    assert found.lookup("MASS") == found.lookup("SCT:4147007") == found.lookup("RADLEX:RID3874")
    assert found.lookup("mass") is None
    assert found.codes_by_class() == {"lesion": ("RADLEX:RID3874", "SCT:4147007"), "no_lesion": ("SCT:17621005",)}


@pytest.mark.parametrize(
    ("text", "says", "remedy"),
    [
        (HEAD + MASS.replace("class", "clas"), "line 4, entries.0.clas", "did you mean 'class'?"),
        (HEAD + MASS + MASS, "line 5, the file as a whole: entries 1 and 2: the local code 'MASS' stands twice", "map"),
        (HEAD + MASS + NORM.replace("SCT:17621005", "SCT:4147007"), "SCT:4147007 is both 'lesion' and", "mend it"),
        (HEAD + MASS + NORM.replace("NORM", '"SCT:4147007"'), "SCT:4147007 is both", "mend it"),
        (HEAD + NORM.replace("SCT:17621005", "17621005"), "line 4, entries.0.code.0", "SCHEME:CODE"),
        (HEAD + NORM.replace("SCT:17621005", "SCT: 17621005"), "line 4, entries.0.code.0", "SCHEME:CODE"),
        (HEAD + NORM.replace("NORM", "007"), "line 4, entries.0.local: YAML reads this as 7", "mend it"),
        (HEAD + NORM.replace("NORM", '" "'), "line 4, entries.0.local", "mend it"),
        (HEAD + NORM.replace("no_lesion", "''"), "line 4, entries.0.class", "mend it"),
        (HEAD + '  - {local: A, meaning: A, class: a}\n', "entries.0.code: Field required", "mend it"),
        (HEAD.replace("version: '1'\n", "") + MASS, "version: Field required", "mend it"),
        ("name: chest\nversion: '1'\nentries: []\n", "entries", "mend it"),
        ("name: chest\nname: chest\n", "stands twice", "mend that line"),
        ("- MASS\n", "is no terminology map", "entries"),
    ],
)  # fmt: skip
def test_a_wrong_map_is_told_with_its_line(tmp_path, text, says, remedy):
    with pytest.raises(DataError) as caught:
        load(tmp_path, text)
    assert says in caught.value.message
    assert remedy in caught.value.remedy


def test_a_map_that_is_not_there_is_told(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        Terminology.load(tmp_path / "none.yaml")


def test_the_digest_tells_maps_apart_and_forgets_the_order(tmp_path):
    one = load(tmp_path, HEAD + MASS + NORM)
    assert load(tmp_path, HEAD + NORM + MASS).digest == one.digest
    assert load(tmp_path, HEAD + MASS).digest != one.digest
    assert load(tmp_path, HEAD + MASS + NORM.replace("no_lesion", "healthy")).digest != one.digest


def test_a_code_becomes_its_class_with_the_standard_codes(tmp_path):
    known = load(tmp_path, HEAD + MASS + NORM + OLD)
    assert labelled("MASS", None, known) == Label("lesion", ("SCT:4147007", "RADLEX:RID3874"))
    assert labelled("SCT:17621005", None, known) == Label("no_lesion", ("SCT:17621005",))
    assert labelled("MASS", {"MASS": "tumour"}, known) == Label("tumour", ("SCT:4147007", "RADLEX:RID3874"))
    assert labelled("X", {"X": "tumour"}, None) == Label("tumour")
    assert labelled("tumour", None, None) == Label("tumour")


@pytest.mark.parametrize(("code", "reason"), [("NEW", Reason.UNMAPPED_CODE), ("OLD", Reason.NO_LABEL)])
def test_a_code_without_a_class_is_refused(tmp_path, code, reason):
    with pytest.raises(RefusedError) as caught:
        labelled(code, None, load(tmp_path, HEAD + MASS + OLD))
    assert caught.value.reason is reason
    assert code in caught.value.detail


@given(st.text(max_size=40))
def test_what_a_map_does_not_know_is_listed(code):
    known = Terminology.model_validate({"name": "n", "version": "1", "entries": [
        {"local": "MASS", "code": "SCT:4147007", "meaning": "Mass", "class": "lesion"}]})  # fmt: skip
    assert (known.lookup(code) is None) == (known.unmapped([code, "MASS"]) == (code,))
