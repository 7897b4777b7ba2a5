"""Tables as hospitals write them: read as they were meant, or refused with the line and the next thing to do."""

from __future__ import annotations

import csv
import io
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from locum.common.errors import DataError
from locum.site_client.imaging.sheets import Conflict, conflicts, read_sheet

PLAIN = "acc,finding\nA1,MASS\nA2,NORM\n"
ROWS = [{"acc": "A1", "finding": "MASS"}, {"acc": "A2", "finding": "NORM"}]


def written(folder: Path, content: bytes | str) -> Path:
    path = folder / "labels.csv"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def cells(path: Path) -> list[dict[str, str]]:
    return [row.cells for row in read_sheet(path).rows]


@pytest.mark.parametrize(
    "content",
    [
        PLAIN.encode(),
        PLAIN.encode("utf-8-sig"),
        PLAIN.replace(",", ";").encode("utf-8-sig"),
        PLAIN.replace(",", "\t").encode("utf-16"),
        b"\xfe\xff" + PLAIN.replace(",", "\t").encode("utf-16-be"),
        PLAIN.replace("\n", "\r\n").encode(),
        ("sep=;\n" + PLAIN.replace(",", ";")).encode("utf-8-sig"),
        PLAIN.replace("\n", ",,\n").encode(),
        PLAIN.replace("A2", "\n A2 ").encode(),
        b'"acc",finding\nA1,"MASS"\nA2,"NORM"\n',
    ],
    ids=["plain", "bom", "semicolon", "utf-16", "utf-16-be", "crlf", "sep", "empty columns", "blank line", "quoted"],
)
def test_what_excel_and_hospital_systems_write_is_read(tmp_path, content):
    assert cells(written(tmp_path, content)) == ROWS


@pytest.mark.parametrize(
    ("content", "says", "remedy"),
    [
        ("acc,finding\nA1,Läsion\n".encode("cp1252"), "line 2: the text is not UTF-8, but perhaps Windows-1252", "CSV"),
        (PLAIN.encode("utf-16-le"), "UTF-16 without a byte-order mark", "CSV UTF-8"),
        (PLAIN.encode("utf-16")[:-1], "begins as UTF-16 and does not go on so", "export it again"),
        (b"PK\x03\x04\0\0\0\0", "is no text", "CSV UTF-8"),
        (b"", "has no header line", "first line"),
        (b",,\n1,2,3\n", "has no header line", "first line"),
        (b"acc,acc\n1,2\n", "the column 'acc' twice", "rename"),
        (b"acc,finding\nA1\n", "line 2: 1 cells, but the header has 2", "mend the line"),
        (b"acc,finding\nA1,MASS,small\n", "line 2: 3 cells, but the header has 2", "quotation marks"),
        (b'acc,finding\nA1,"a\nb"\nA2,"open\nA3,MASS\n', "unexpected end of data", "quotation marks"),
        (b'acc,finding\nA1,"MASS"x\n', "line 2", "quotation marks"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_told_with_its_line(tmp_path, content, says, remedy):
    with pytest.raises(DataError) as caught:
        read_sheet(written(tmp_path, content))
    assert says in caught.value.message
    assert remedy in caught.value.remedy


@pytest.mark.parametrize(
    ("content", "remedy"),
    [
        ("acc|finding\nA1|MASS\n", "its cells are separated by '|'"),
        ("Acc,finding\nA1,MASS\n", "write 'Acc', as the file has it"),
        ("number,finding\nA1,MASS\n", "it has the columns: number, finding"),
    ],
)
def test_a_column_that_is_not_there_is_told_with_what_is(tmp_path, content, remedy):
    with pytest.raises(DataError, match="has no column 'acc'") as caught:
        read_sheet(written(tmp_path, content)).require(["acc"])
    assert remedy in caught.value.remedy


def test_a_cell_of_several_lines_is_counted_from_its_first(tmp_path):
    sheet = read_sheet(written(tmp_path, 'acc,report\n"A1","No mass.\nNo nodule."\n\nA2,"Mass, 2 cm"\n'))
    assert [(row.line, row.cells["report"]) for row in sheet.rows] == [(2, "No mass.\nNo nodule."), (5, "Mass, 2 cm")]


def test_names_are_compared_composed(tmp_path):
    apart = unicodedata.normalize("NFD", "Müller-Łódź")
    assert cells(written(tmp_path, f"name\n{apart}\n")) == [{"name": "Müller-Łódź"}]


def test_two_labels_of_one_name_are_listed_with_their_lines(tmp_path):
    text = "acc,finding\nA1,MASS\nA2,NORM\nA1,NORM\nA3,MASS\nA3,MASS\nA2,\n"
    assert conflicts(read_sheet(written(tmp_path, text)).rows, "acc", "finding") == (
        Conflict(lines=(2, 4), labels=("MASS", "NORM")),
    )


def test_every_line_of_a_large_table_is_read(tmp_path):
    lines = "".join(f'A{number:06},"Résumé {number}\nno mass"\n' for number in range(100_000))
    rows = read_sheet(written(tmp_path, "acc,report\n" + lines)).rows
    assert len(rows) == 100_000
    assert (rows[-1].line, rows[-1].cells["acc"]) == (200_000, "A099999")


_CELL = st.text(st.characters(exclude_categories=["Cs", "Cc"]) | st.sampled_from('",;\t\n'), max_size=12)


@given(st.lists(st.tuples(_CELL, _CELL), max_size=8), st.sampled_from(",;\t"), st.sampled_from(["utf-8-sig", "utf-16"]))
def test_what_a_csv_writer_wrote_comes_back(tmp_path_factory, rows, delimiter, encoding):
    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter=delimiter)
    writer.writerows([("first column", "second"), *rows])
    path = written(tmp_path_factory.mktemp("csv"), text.getvalue().encode(encoding))
    expected = [tuple(unicodedata.normalize("NFC", cell.strip()) for cell in row) for row in rows if any(row)]
    assert [tuple(row.values()) for row in cells(path)] == expected
