"""Comma-separated files as hospitals write them: labels, and lists of which image is whose.

Rules:
  * UTF-8 with or without a byte-order mark, or UTF-16 with one (Excel's Unicode text). Another encoding is refused:
    which of the many it is, the file does not say.
  * The delimiter (comma, semicolon, tab) is read from the header line, or from Excel's line `sep=;` before it.
  * Cells are text, stripped of blanks at both ends, composed (NFC): a code 007 stays 007.
  * Every error names the file, and the line or the column.
"""

from __future__ import annotations

import codecs
import csv
import io
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from locum.common.errors import DataError

_DELIMITERS = ",;\t"
_QUOTED = re.compile(r'"(?:[^"]|"")*"')
_EXCEL = re.compile(r"sep=(.)\r?\n", re.IGNORECASE)
#: Signs that others use between cells, to tell of.
_FOREIGN = "|:^~"
#: The longest cell: a report can be long, but a quotation mark that is never closed must not eat the file.
_LONGEST = 1 << 20


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a table.

    Attributes:
        line: its number in the file, the first of them if a cell has several; the header is line 1.
        cells: column name to text.
    """

    line: int
    cells: dict[str, str]


@dataclass(frozen=True)
class Sheet:
    """A table read from a file."""

    file: Path
    columns: tuple[str, ...]
    rows: tuple[Row, ...]

    def require(self, columns: Iterable[str]) -> None:
        """Raise DataError that names the first column the file lacks and the columns that it has."""
        for column in columns:
            if column not in self.columns:
                raise DataError(f"{self.file} has no column '{column}'", _columns_remedy(self.columns, column))


@dataclass(frozen=True)
class Conflict:
    """Lines that give one name different labels.

    Attributes:
        lines: their numbers.
        labels: what they say, sorted.
    """

    lines: tuple[int, ...]
    labels: tuple[str, ...]


def read_sheet(file: Path) -> Sheet:
    """Read a table.

    Raises:
        DataError: the file is missing, is in another encoding, is empty, or a line has too many or too few cells.
    """
    try:
        status = file.stat()
        return _sheet(file, status.st_size, status.st_mtime_ns)
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}", "check the path in the site file") from None
    except UnicodeDecodeError as error:
        line = bytes(error.object[: error.start]).count(b"\n") + 1
        raise DataError(
            f"{file}, line {line}: the text is not UTF-8, but perhaps Windows-1252", "save it again as 'CSV UTF-8'"
        ) from None


def conflicts(rows: Iterable[Row], key_column: str, label_column: str) -> tuple[Conflict, ...]:
    """The names that the table gives several labels, by their first line."""
    by_name: dict[str, list[Row]] = {}
    for row in rows:
        by_name.setdefault(row.cells[key_column], []).append(row)
    found = []
    for group in by_name.values():
        labels = {row.cells[label_column] for row in group} - {""}
        if len(labels) > 1:
            found.append(Conflict(tuple(row.line for row in group), tuple(sorted(labels))))
    return tuple(found)


@lru_cache(maxsize=2)
def _sheet(file: Path, size: int, mtime_ns: int) -> Sheet:  # noqa: ARG001 (a changed file is another key of the cache)
    return _parse(file, _decoded(file, file.read_bytes()))


def _decoded(file: Path, content: bytes) -> str:
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        try:
            return content.decode("utf-16")
        except UnicodeDecodeError:
            raise DataError(f"{file}: the text begins as UTF-16 and does not go on so", "export it again") from None
    if b"\0" in content[:4096]:
        raise DataError(f"{file} is no text, or UTF-16 without a byte-order mark", "save it again as 'CSV UTF-8'")
    return content.decode("utf-8-sig")


def _parse(file: Path, text: str) -> Sheet:
    excel = _EXCEL.match(text)
    header, _, _ = _QUOTED.sub("", text[excel.end() if excel else 0 :][:_LONGEST]).partition("\n")
    delimiter = excel[1] if excel else max(_DELIMITERS, key=header.count)
    # Strict: what follows a closing quotation mark is told, not taken for text.
    lines = io.StringIO(text, newline="")
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    before = csv.field_size_limit(_LONGEST)
    try:
        if excel:
            next(reader)
        columns = _columns(file, next(reader, []))
        rows = tuple(_rows(file, columns, reader))
    except csv.Error as error:
        raise DataError(f"{file}, line {reader.line_num}: {error}", "mend the quotation marks") from None
    finally:
        csv.field_size_limit(before)
    return Sheet(file=file, columns=columns, rows=rows)


def _rows(file: Path, columns: tuple[str, ...], reader: Any) -> Iterator[Row]:
    width = len(columns)
    line = reader.line_num + 1
    for cells in reader:
        if len(cells) > width and not any(cells[width:]):
            del cells[width:]  # Excel's empty columns at the right
        if len(cells) != width:
            if any(cells):
                raise _uneven(file, line, cells, columns)
        elif any(cells):
            yield Row(line, dict(zip(columns, map(_clean, cells), strict=True)))
        line = reader.line_num + 1


def _uneven(file: Path, line: int, cells: Sequence[str], columns: Sequence[str]) -> DataError:
    return DataError(
        f"{file}, line {line}: {len(cells)} cells, but the header has {len(columns)}",
        "mend the line; put cells that contain the delimiter in quotation marks",
    )


def _clean(cell: str) -> str:
    text = cell.strip()
    return text if text.isascii() else unicodedata.normalize("NFC", text)


def _columns(file: Path, header: Sequence[str]) -> tuple[str, ...]:
    columns = [_clean(cell) for cell in header]
    while columns and not columns[-1]:
        columns.pop()
    if not columns:
        raise DataError(f"{file} has no header line", "name the columns in the first line")
    twice = sorted({column for column in columns if columns.count(column) > 1})
    if twice:
        raise DataError(f"{file} has the column '{twice[0]}' twice", "rename or remove one of them")
    return tuple(columns)


def _columns_remedy(columns: Sequence[str], wanted: str) -> str:
    """What to do about a column that is not there."""
    foreign = [sign for sign in _FOREIGN if len(columns) == 1 and sign in columns[0]]
    if foreign:
        return f"its cells are separated by '{foreign[0]}': save it with commas, semicolons or tabs"
    same = [column for column in columns if column.lower() == wanted.lower()]
    if same:
        return f"write '{same[0]}', as the file has it"
    return f"it has the columns: {', '.join(columns)}"
