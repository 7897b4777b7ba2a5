"""What the site's tables say of an image: its label, its fold, its patient, and whether it is this site's.

Rules:
  * Nothing is dropped in silence: an image without a label, with an unknown code or with two labels goes to
    quarantine; a line that names no image is listed.
  * If not one line names an image, the key is wrong, and that is an error.
  * Names in a table are keyed as those of the images are, and only keyed names are compared.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import cast

from locum.common.errors import DataError
from locum.site_client.imaging.dicom import read
from locum.site_client.imaging.headers import text
from locum.site_client.imaging.items import Unit, stem
from locum.site_client.imaging.keys import Keys
from locum.site_client.imaging.labels.given import Label
from locum.site_client.imaging.labels.readers import by_reader, majority
from locum.site_client.imaging.reasons import Reason, RefusedError
from locum.site_client.imaging.sheets import Row
from locum.site_client.imaging.sources import Labels, Table, label_rows, table_rows
from locum.site_client.imaging.split import Fold
from locum.site_client.imaging.terminology import Terminology, labelled


class Named:
    """The lines of a table by the name that they give, and which of them have named an image so far."""

    def __init__(self, table: Labels | Table, rows: Iterable[Row], keys: Keys) -> None:
        self._table = table
        self._rows: dict[str, list[Row]] = {}
        self._matched: set[str] = set()
        self._asked: Unit | None = None
        for row in rows:
            self._rows.setdefault(keyed_name(row.cells[table.key_column], table.key, keys), []).append(row)

    def of(self, unit: Unit) -> Sequence[Row]:
        """The lines that name the unit: a line with a blank name is no line of the images without one."""
        name = name_of(unit, self._table.key)
        if not name:
            return ()
        self._asked = unit
        found = self._rows.get(name, ())
        if found:
            self._matched.add(name)
        return found

    def unmatched(self) -> list[str]:
        """'file name:line' of every line that has named none of the units asked for.

        Raises:
            DataError: there were units and lines, and no line named a unit.
        """
        missed = [group for name, group in self._rows.items() if name not in self._matched]
        if self._asked is not None and self._rows and not self._matched:
            kind, file = self._table.key, self._table.file
            theirs, ours = missed[0][0].cells[self._table.key_column], _original_name(self._asked, kind)
            raise DataError(
                f"no line of {file} names an image of this site: by {kind} the file has '{theirs}', the images have "
                f"'{ours}'",
                "check key and key_column in the site file",
            )
        return [f"{self._table.file.name}:{row.line}" for group in missed for row in group]


def _original_name(unit: Unit, kind: str) -> str:
    """What a unit is called in its own file, to show a person at the site what a table should name."""
    keyword = {"accession": "AccessionNumber", "patient": "PatientID", "study": "StudyInstanceUID"}.get(kind)
    keyword = "SeriesInstanceUID" if kind == "series" else keyword
    item = unit.items[0]
    try:
        return text(read(item.path, item.size), keyword) if keyword else name_of(unit, kind)
    except RefusedError:
        return unit.file


class LabelBook:
    """The labels of a table."""

    def __init__(self, labels: Labels, keys: Keys, terms: Terminology | None = None) -> None:
        self._labels = labels
        self._terms = terms
        self._named = Named(labels, label_rows(labels), keys)

    def label(self, unit: Unit) -> Label:
        """The label of an image.

        Raises:
            RefusedError: no_label, conflicting_labels, uncertain_label or unmapped_code.
        """
        rows = self._named.of(unit)
        if not rows:
            raise RefusedError(Reason.NO_LABEL)
        found = [labelled(row.cells[self._labels.label_column], self._labels.classes, self._terms) for row in rows]
        classes = [label.name for label in found]
        name = classes[0] if len(set(classes)) == 1 else self._agreed(classes, rows)
        return Label(name, tuple(sorted({code for label in found if label.name == name for code in label.codes})))

    def unmatched(self) -> list[str]:
        """As :class:`Named` has it."""
        return self._named.unmatched()

    def _agreed(self, classes: list[str], rows: Sequence[Row]) -> str:
        if self._labels.consensus is None:
            codes = {row.cells[self._labels.label_column] for row in rows}
            raise RefusedError(Reason.CONFLICTING_LABELS, ", ".join(sorted(codes)))
        readers = by_reader(
            (row.cells[self._labels.reader_column or ""], name) for row, name in zip(rows, classes, strict=True)
        )
        name = majority(list(readers.values()))
        if name is None:
            raise RefusedError(Reason.UNCERTAIN_LABEL, f"{len(readers)} readers without a majority")
        return name


class Roll:
    """The table that says which images are this site's, their folds and their patients."""

    def __init__(self, table: Table, keys: Keys) -> None:
        self._table = table
        rows = table_rows(table)
        self._named = Named(table, rows, keys)
        column = table.fold_column
        self.folds = frozenset(row.cells[column] for row in rows) - {""} if column else frozenset()

    def has(self, unit: Unit) -> bool:
        """Whether the unit is this site's; the validation and test rows of an .npz are no matter of the table."""
        if not name_of(unit, self._table.key):
            return self._table.key == "index"
        return bool(self._named.of(unit))

    def fold(self, unit: Unit) -> Fold | None:
        """The fold that the table states for the unit.

        Raises:
            DataError: two lines state different folds.
        """
        stated = self._cells(unit, self._table.fold_column)
        if len(stated) > 1:
            raise DataError(
                f"{self._table.file} puts one image in two folds ({', '.join(sorted(stated))}): {self._lines(unit)}",
                "keep one of the lines",
            )
        return cast("Fold", stated.pop()) if stated else None

    def patient(self, unit: Unit) -> str | None:
        """The patient that the table states for the unit, as it stands there.

        Raises:
            DataError: two lines state different patients.
        """
        stated = self._cells(unit, self._table.patient_column)
        if len(stated) > 1:
            raise DataError(f"{self._table.file} gives one image two patients: {self._lines(unit)}", "keep one line")
        return stated.pop() if stated else None

    def unmatched(self) -> list[str]:
        """As :class:`Named` has it."""
        return self._named.unmatched()

    def _cells(self, unit: Unit, column: str | None) -> set[str]:
        return {row.cells[column] for row in self._named.of(unit)} - {""} if column else set()

    def _lines(self, unit: Unit) -> str:
        return "lines " + ", ".join(str(row.line) for row in self._named.of(unit))


def keyed_name(cell: str, kind: str, keys: Keys) -> str:
    """The name in a table's cell as the units of the site have it."""
    if not cell:
        return ""
    if kind == "patient":
        return keys.patient(cell)
    if kind == "accession":
        return keys.accession(cell)
    if kind in {"study", "series"}:
        return keys.uid(cell)
    return stem(cell) if kind == "file" else cell


def name_of(unit: Unit, kind: str) -> str:
    """The name of a unit by which tables of this kind name images."""
    return unit.file if kind in {"file", "index"} else str(getattr(unit.known, kind))
