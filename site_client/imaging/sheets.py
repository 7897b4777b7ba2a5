"""Comma-separated files as hospitals write them: labels, and lists of which image is whose.

Rules:
  * UTF-8, with or without a byte-order mark; the delimiter (comma, semicolon, tab) is read from the header line.
  * Cells are text, stripped of blanks at both ends: a code 007 stays 007.
  * Every error names the file, and the line or the column.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from locum.common.errors import DataError

_DELIMITERS = ",;\t"


@dataclass(frozen=True)
class Row:
    """One line of a table.

    Attributes:
        line: its number in the file; the header is line 1.
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
                raise DataError(
                    f"{self.file} has no column '{column}'", f"it has the columns: {', '.join(self.columns)}"
                )


def read_sheet(file: Path) -> Sheet:
    """Read a table.

    Raises:
        DataError: the file is missing, is not UTF-8, is empty, or a line has too many or too few cells.
    """
    try:
        status = file.stat()
        return _sheet(file, status.st_size, status.st_mtime_ns)
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}", "check the path in the site file") from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise DataError(f"{file}, line {line}: the text is not UTF-8", "save it again as 'CSV UTF-8'") from None


@lru_cache(maxsize=2)
def _sheet(file: Path, size: int, mtime_ns: int) -> Sheet:  # noqa: ARG001 (a changed file is another key of the cache)
    return _parse(file, file.read_text(encoding="utf-8-sig"))


def _parse(file: Path, text: str) -> Sheet:
    header, _, _ = text.partition("\n")
    delimiter = max(_DELIMITERS, key=header.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        columns = tuple(cell.strip() for cell in next(reader, []))
        rows = tuple(_row(file, columns, reader.line_num, cells) for cells in reader if any(cells))
    except csv.Error as error:
        raise DataError(f"{file}, line {reader.line_num}: {error}", "mend the quotation marks") from None
    _check_columns(file, columns)
    return Sheet(file=file, columns=columns, rows=rows)


def _row(file: Path, columns: tuple[str, ...], line: int, cells: list[str]) -> Row:
    if len(cells) != len(columns):
        raise DataError(
            f"{file}, line {line}: {len(cells)} cells, but the header has {len(columns)}",
            "mend the line; put cells that contain the delimiter in quotation marks",
        )
    return Row(line=line, cells={column: cell.strip() for column, cell in zip(columns, cells, strict=True)})


def _check_columns(file: Path, columns: tuple[str, ...]) -> None:
    if not any(columns):
        raise DataError(f"{file} has no header line", "name the columns in the first line")
    twice = sorted({column for column in columns if columns.count(column) > 1})
    if twice:
        raise DataError(f"{file} has the column '{twice[0]}' twice", "rename or remove one of them")
