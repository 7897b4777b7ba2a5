"""Labels from the text of reports: the first class that is affirmed, never a guess, measured on a reviewed sample."""

from __future__ import annotations

import csv
import io
import json
import stat

import pytest

from locum.common.errors import DataError
from locum.common.intervals import wilson
from locum.site_client.imaging.items import Unit
from locum.site_client.imaging.keys import Keys
from locum.site_client.imaging.known import Known
from locum.site_client.imaging.labels.given import Label
from locum.site_client.imaging.labels.reports import FILE_NAME, ReportBook, keep, write_sample
from locum.site_client.imaging.reasons import Reason, RefusedError
from locum.site_client.imaging.sources import ReportLabels
from locum.site_client.imaging.terminology import Terminology

KEYS = Keys.of(bytes(range(32)))
FINDINGS = {"mass": ["mass", "masses"], "effusion": ["pleural effusion", "effusion"]}
MAP = Terminology.model_validate({"name": "n", "version": "1", "entries": [
    {"local": "mass", "code": "SCT:4147007", "meaning": "Mass", "class": "mass"},
    {"local": "effusion", "code": "SCT:1", "meaning": "Of another class", "class": "other"},
]})  # fmt: skip


def unit(accession: str) -> Unit:
    return Unit(key=accession, source=0, items=(), known=Known(accession=KEYS.accession(accession)))


@pytest.fixture
def book(tmp_path):
    def make(reports: dict[str, str] | list[tuple[str, str]], **parts) -> ReportBook:
        out = io.StringIO(newline="")
        writer = csv.writer(out, delimiter=";")
        writer.writerow(["acc", "text"])
        writer.writerows(reports.items() if isinstance(reports, dict) else reports)
        (tmp_path / "reports.csv").write_text(out.getvalue(), encoding="utf-8-sig", newline="")
        labels = {"kind": "reports", "file": tmp_path / "reports.csv", "key": "accession", "key_column": "acc",
                  "text_column": "text", "findings": FINDINGS, "otherwise": "clear"}  # fmt: skip
        return ReportBook(ReportLabels.model_validate(labels | parts), KEYS, MAP)

    return make


def refused(book: ReportBook, accession: str) -> RefusedError:
    with pytest.raises(RefusedError) as caught:
        book.label(unit(accession))
    return caught.value


def test_the_first_class_that_is_affirmed_is_the_label(book):
    found = book({
        "A1": "FINDINGS: There is a pleural effusion.\nA mass lies\nin the left lobe.",
        "A2": "No mass. Small effusion, possible on the left.",
        "A3": "No mass; no effusion.",
        "A4": "CLINICAL HISTORY: mass.\n\nFINDINGS: Clear.",
    })  # fmt: skip
    assert found.label(unit("A1")) == Label("mass", ("SCT:4147007",))
    assert refused(found, "A2").reason is Reason.UNCERTAIN_LABEL
    assert found.label(unit("A3")) == found.label(unit("A4")) == Label("clear")
    assert refused(found, "A5").reason is Reason.NO_LABEL


@pytest.mark.parametrize(
    ("report", "reason"),
    [
        ("Possible mass.", Reason.UNCERTAIN_LABEL),
        ("History of mass.", Reason.UNCERTAIN_LABEL),
        ("Possible mass. There is an effusion.", Reason.UNCERTAIN_LABEL),
        ("No mass. A mass cannot be excluded.", Reason.UNCERTAIN_LABEL),
        ("Family history of mass.", Reason.NO_LABEL),
        ("No mass.", Reason.NO_LABEL),
    ],
)
def test_what_a_report_leaves_open_is_not_guessed(book, report, reason):
    assert refused(book({"A1": report}, otherwise=None), "A1").reason is reason


def test_an_affirmed_class_outweighs_doubt_of_a_later_one(book):
    assert book({"A1": "A mass. Possible effusion."}).label(unit("A1")).name == "mass"
    assert book({"A1": "Possible effusion. A mass."}).label(unit("A1")).name == "mass"


def test_reports_of_one_image_that_differ_are_refused_with_their_lines(book):
    error = refused(book([("A1", "A mass."), ("A2", "A mass."), ("A1", "An effusion.")]), "A1")
    assert error.reason is Reason.CONFLICTING_LABELS
    assert error.detail == "effusion, mass in lines 2, 4"


def test_no_word_of_a_report_is_in_what_is_told(book, tmp_path):
    found = book(
        [("A1", "Zebra has a possible mass."), ("A2", "A mass. Zebra"), ("A2", "An effusion. Zebra"), ("A9", "Zebra")]
    )
    told = [refused(found, "A1").detail, refused(found, "A2").detail, *found.unmatched()]
    keep(found, tmp_path)
    told += [(tmp_path / FILE_NAME).read_text(), str(found.tally())]
    assert told[2] == "reports.csv:5"
    assert not any("zebra" in text.lower() for text in told)


def test_lines_without_an_image_are_listed_and_a_wrong_key_is_an_error(book):
    found = book({"A1": "A mass.", "A2": "Clear."})
    found.label(unit("A1"))
    assert found.unmatched() == ["reports.csv:3"]
    other = book({"A1": "A mass."})
    assert refused(other, "B1").reason is Reason.NO_LABEL


@pytest.mark.parametrize(
    "parts",
    [
        {"findings": {"mass": ["mass"], "lump": ["Mass"]}},
        {"findings": {"mass": [" "]}},
        {"otherwise": "mass"},
        {"findings": {}},
    ],
)
def test_findings_that_cannot_be_told_apart_are_refused(book, parts):
    with pytest.raises(ValueError, match=r"means both|is empty|class of findings|at least 1"):
        book({"A1": "A mass."}, **parts)


# --- how far the rules can be trusted


REPORTS = {
    "A1": "A mass.", "A2": "A mass.", "A3": "A mass.", "A4": "No mass.", "A5": "Possible mass.", "A6": "Clear lungs.",
    "A7": "Small effusion.", "A8": "The growth is large.",
}  # fmt: skip


def test_precision_and_recall_are_measured_on_what_a_person_said(book, tmp_path):
    said = {
        "A1": "mass",
        "A2": "mass",
        "A3": "clear",
        "A4": "clear",
        "A5": "mass",
        "A6": "clear",
        "A7": "",
        "A8": "mass",
    }
    (tmp_path / "reviewed.csv").write_text("acc,label\n" + "".join(f"{a},{c}\n" for a, c in said.items()))
    review = book(REPORTS, reviewed=tmp_path / "reviewed.csv").review()
    assert (review.reports, review.uncertain) == (7, 1)
    mass = review.classes["mass"]
    assert (mass.right, mass.wrong, mass.missed) == (2, 1, 2)
    assert (mass.precision, mass.recall) == (2 / 3, 2 / 4)
    assert (mass.precision_interval, mass.recall_interval) == (wilson(2, 3), wilson(2, 4))
    effusion = review.classes["effusion"]
    assert (effusion.precision, effusion.recall, effusion.recall_interval) == (None, None, None)


def test_what_was_measured_is_kept_for_readiness(book, tmp_path):
    (tmp_path / "reviewed.csv").write_text("acc,label\nA1,mass\n")
    keep(book(REPORTS, reviewed=tmp_path / "reviewed.csv"), tmp_path)
    kept = json.loads((tmp_path / FILE_NAME).read_text())
    assert kept["reports"] == 8
    assert kept["review"]["classes"]["mass"]["precision_interval"] == list(wilson(1, 1))
    keep(book(REPORTS), tmp_path)
    assert json.loads((tmp_path / FILE_NAME).read_text())["review"] is None


@pytest.mark.parametrize(
    ("reviewed", "says", "remedy"),
    [
        ("acc,label\nA1,mas\n", "line 2, column 'label': 'mas' is no class", "did you mean 'mass'?"),
        ("acc,label\nB1,mass\n", "names a report of", "fill the column"),
        ("acc,label\nA1,\n", "names a report of", "fill the column"),
        ("acc,finding\nA1,mass\n", "has no column 'label'", "it has the columns"),
    ],
)
def test_a_review_that_says_nothing_is_told(book, tmp_path, reviewed, says, remedy):
    (tmp_path / "reviewed.csv").write_text(reviewed)
    with pytest.raises(DataError) as caught:
        book(REPORTS, reviewed=tmp_path / "reviewed.csv").review()
    assert says in caught.value.message
    assert remedy in caught.value.remedy


def test_a_sample_is_the_same_at_every_call_and_hides_what_the_rules_say(book):
    sample = list(csv.DictReader(io.StringIO(book(REPORTS).sample(3))))
    assert [tuple(row) for row in sample] == [("acc", "label", "text")] * 3
    assert all(row["label"] == "" and REPORTS[row["acc"]] == row["text"] for row in sample)
    assert list(csv.DictReader(io.StringIO(book(REPORTS).sample(8))))[:3] == sample
    assert {row["acc"] for row in sample} != {"A1", "A2", "A3"}


def test_a_sample_that_was_filled_in_is_a_review(book, tmp_path):
    found = book([("A1", "A mass."), ("A1", "No mass.")])
    rows = list(csv.DictReader(io.StringIO(found.sample(2))))
    for row in rows:
        row["label"] = "mass" if row["text"] == "A mass." else "clear"
    with (tmp_path / "reviewed.csv").open("w", newline="") as out:
        writer = csv.DictWriter(out, ["acc", "label", "text"])
        writer.writeheader()
        writer.writerows(rows)
    review = book([("A1", "A mass."), ("A1", "No mass.")], reviewed=tmp_path / "reviewed.csv").review()
    assert review.reports == 2
    assert review.classes["mass"].precision == review.classes["clear"].recall == 1


def test_a_sample_is_for_its_owner_and_overwrites_nothing(tmp_path):
    file = tmp_path / "sample.csv"
    write_sample("acc,label,text\n", file)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    with pytest.raises(DataError, match="is there already"):
        write_sample("", file)
    assert file.read_text(encoding="utf-8-sig") == "acc,label,text\n"


def test_another_language_is_another_file_of_words(book, tmp_path):
    words = tmp_path / "negation.de.yaml"
    words.write_text(
        "name: verneinung\nversion: '1'\nlanguage: de\nnegated: {before: [kein|keine], after: [ausgeschlossen]}\n"
        "possible: {before: [möglich|möglicher]}\nevidence: {}\nhistorical: {}\nhypothetical: {}\nsomeone_else: {}\n"
        "ends: {certainty: [aber]}\n", encoding="utf-8",
    )  # fmt: skip
    findings = {"erguss": ["Erguss"], "herd": ["Rundherd"]}
    reports = {
        "A1": "Kein Erguss, aber ein Rundherd.",
        "A2": "Ein Rundherd ist ausgeschlossen.",
        "A3": "Möglicher Erguss",
    }
    found = book(reports, findings=findings, words=words, otherwise="frei")
    assert [found.label(unit(name)).name for name in ("A1", "A2")] == ["herd", "frei"]
    assert refused(found, "A3").reason is Reason.UNCERTAIN_LABEL
    words.write_text("name: x\nversion: '1'\nlanguage: de\nnegated: {befor: [kein]}\n")
    with pytest.raises(DataError, match=r"line 4, negated\.befor"):
        book(reports, findings=findings, words=words)
