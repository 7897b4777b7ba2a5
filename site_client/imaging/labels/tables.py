"""What the site's tables say of an image: its label, its fold, its patient, and whether it is this site's.

Rules:
  * Nothing is dropped in silence: an image without a label, with an unknown code or with two labels goes to
    quarantine; a line that names no image is listed.
  * If not one line names an image, the key is wrong, and that is an error.
  * A patient in a table becomes the same pseudonym as in the images, and only pseudonyms are compared.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import cast

from locum.common.errors import DataError
from locum.site_client.imaging.items import Unit, stem
from locum.site_client.imaging.keys import pseudonym
from locum.site_client.imaging.reasons import Reason, RefusedError
from locum.site_client.imaging.sources import (
    DicomSource,
    Labels,
    Masks,
    NiftiSource,
    SiteData,
    Table,
    label_rows,
    table_rows,
)
from locum.site_client.imaging.split import Fold
from locum.site_client.imaging.sheets import Row

#: The lines of a table, by the name that they give.
_Named = Mapping[str, Sequence[Row]]


class LabelBook:
    """The labels of a site, by name of the image."""

    def __init__(self, labels: Labels, key: bytes) -> None:
        self._labels = labels
        self._named = _by_name(label_rows(labels), labels, key)

    def label(self, unit: Unit) -> str:
        """The plan's class of an image.

        Raises:
            RefusedError: no_label, conflicting_labels or unmapped_code.
        """
        codes = {row.cells[self._labels.label_column] for row in _rows(self._named, unit, self._labels.key)}
        if not codes:
            raise RefusedError(Reason.NO_LABEL)
        classes = {code_class(code, self._labels.classes) for code in codes}
        if len(classes) > 1:
            raise RefusedError(Reason.CONFLICTING_LABELS, ", ".join(sorted(codes)))
        return classes.pop()

    def unmatched(self, units: Iterable[Unit]) -> list[str]:
        """'file name:line' of every line that names none of the units.

        Raises:
            DataError: there are units and lines, and no line names a unit.
        """
        return _unmatched(self._labels, self._named, tuple(units))


class Roll:
    """The table that says which images are this site's, their folds and their patients."""

    def __init__(self, table: Table, key: bytes) -> None:
        self._table = table
        self._key = key
        rows = table_rows(table)
        self._named = _by_name(rows, table, key)
        column = table.fold_column
        self.folds = frozenset(row.cells[column] for row in rows) - {""} if column else frozenset()

    def has(self, unit: Unit) -> bool:
        """Whether the unit is this site's; the validation and test rows of an .npz are no matter of the table."""
        name = _name_of(unit, self._table.key)
        return name in self._named if name else self._table.key == "index"

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
        """The pseudonym of the patient that the table states for the unit.

        Raises:
            DataError: two lines state different patients.
        """
        stated = self._cells(unit, self._table.patient_column)
        if len(stated) > 1:
            raise DataError(f"{self._table.file} gives one image two patients: {self._lines(unit)}", "keep one line")
        return pseudonym(self._key, stated.pop()) if stated else None

    def unmatched(self, units: Iterable[Unit]) -> list[str]:
        """As :meth:`LabelBook.unmatched`."""
        return _unmatched(self._table, self._named, tuple(units))

    def _cells(self, unit: Unit, column: str | None) -> set[str]:
        rows = _rows(self._named, unit, self._table.key)
        return {row.cells[column] for row in rows} - {""} if column else set()

    def _lines(self, unit: Unit) -> str:
        return "lines " + ", ".join(str(row.line) for row in _rows(self._named, unit, self._table.key))


class MaskFolder:
    """The masks of a site, by name of the image."""

    def __init__(self, site: SiteData, key: bytes) -> None:
        self._site = site
        self._named = _masks_by_name(site.masks, key) if site.masks else {}

    def find(self, unit: Unit) -> Path | None:
        """The mask of an image; None if the site has no masks for images of its source.

        Raises:
            RefusedError: mask_missing.
        """
        source, masks = self._site.sources[unit.source], self._site.masks
        if isinstance(source, NiftiSource) and source.masks is not None:
            path = source.masks / unit.items[0].path.relative_to(source.images)
            return _present(path if path.is_file() else None)
        if isinstance(source, DicomSource) and masks is not None:
            return _present(self._named.get(_name_of(unit, masks.key)))
        return None


def _masks_by_name(masks: Masks, key: bytes) -> dict[str, Path]:
    files = (path for path in sorted(masks.path.iterdir()) if path.name.endswith((".nii", ".nii.gz")))
    return {_table_name(stem(path.name), masks.key, key): path for path in files if stem(path.name)}


def _present(path: Path | None) -> Path:
    if path is None:
        raise RefusedError(Reason.MASK_MISSING)
    return path


def code_class(code: str, classes: Mapping[str, str] | None) -> str:
    """The plan's class of a local code.

    Raises:
        RefusedError: unmapped_code.
    """
    if classes is None:
        return code
    if code not in classes:
        raise RefusedError(Reason.UNMAPPED_CODE, code)
    return classes[code]


def check_folds(folds: Sequence[tuple[str, Fold | None]], site: SiteData) -> None:
    """Raise DataError if the table puts a patient (pseudonym, fold) in two folds."""
    seen: dict[str, Fold] = {}
    for patient, fold in folds:
        if fold is not None and seen.setdefault(patient, fold) != fold:
            raise DataError(
                f"{site.table.file if site.table else site.name}: one patient (pseudonym {patient}) is in the folds "
                f"{seen[patient]} and {fold}",
                "put all images of a patient in one fold, or remove fold_column",
            )


def _by_name(rows: Iterable[Row], table: Labels | Table, key: bytes) -> _Named:
    grouped: dict[str, list[Row]] = {}
    for row in rows:
        grouped.setdefault(_table_name(row.cells[table.key_column], table.key, key), []).append(row)
    return grouped


def _rows(named: _Named, unit: Unit, kind: str) -> Sequence[Row]:
    """The lines that name the unit: a line with a blank name is no line of the images without one."""
    name = _name_of(unit, kind)
    return named.get(name, ()) if name else ()


def _table_name(cell: str, kind: str, key: bytes) -> str:
    if kind == "patient":
        return pseudonym(key, cell)
    return stem(cell) if kind == "file" else cell


def _name_of(unit: Unit, kind: str) -> str:
    return str(getattr(unit, "file" if kind == "index" else kind))


def _unmatched(table: Labels | Table, named: _Named, units: Sequence[Unit]) -> list[str]:
    file, kind = table.file, table.key
    names = {_name_of(unit, kind) for unit in units} - {""}
    missed = [group for name, group in named.items() if name not in names]
    if units and named and len(missed) == len(named):
        example = units[0].patient_id if kind == "patient" else _name_of(units[0], kind)
        raise DataError(
            f"no line of {file} names an image of this site: by {kind} the file has "
            f"'{missed[0][0].cells[table.key_column]}', the images have '{example}'",
            "check key and key_column in the site file",
        )
    return [f"{file.name}:{row.line}" for group in missed for row in group]
