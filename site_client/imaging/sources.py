"""A site file: where the images are, and what is known of them.

Rules:
  * Unknown keys are fatal; a duplicated key is fatal; every folder, file and column named must exist.
  * Codes are text. YAML reads an unquoted 007 as a number: quote such values; keys stay as written.
  * Relative paths start at `root`; a relative `root` starts at the folder of the file.
  * A row of an .npz carries its own label and fold; `labels` and `masks` are for images in files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from locum.common.errors import DataError
from locum.common.names import installed, suggestion
from locum.common.yaml_source import Source as Document
from locum.common.yaml_source import YamlError, read_yaml
from locum.site_client.imaging.split import FOLDS
from locum.site_client.imaging.tables import Row, read_sheet

_STRICT = ConfigDict(extra="forbid", frozen=True)
_Part = TypeVar("_Part", bound=BaseModel)

#: By what a row of a table names an image.
Key = Literal["accession", "patient", "study", "series", "file"]


def _as_text(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError(f"YAML reads this word as {value}: write it in quotation marks")  # noqa: TRY004 (pydantic)
    return str(value) if isinstance(value, int | float) else value


def _texts(value: object) -> object:
    if not isinstance(value, Mapping):
        return value
    return {_as_text(key): _as_text(cell) for key, cell in value.items()}


#: A mapping of text to text that also takes whole numbers, as YAML gives them.
Texts = Annotated[dict[str, str], BeforeValidator(_texts)]


#: A DICOM modality code (PS3.3 C.7.3.1.1.1), or nothing.
Modality = Annotated[str, Field(pattern=r"^([A-Z]{2,16})?$")]


class DicomSource(BaseModel):
    """A folder of DICOM files, with any names and in any order, with all its sub-folders."""

    model_config = _STRICT
    kind: Literal["dicom"]
    path: Path


class NiftiSource(BaseModel):
    """A folder of .nii or .nii.gz images, and optionally a folder of masks under the same file names.

    `modality` is what the site declares these images to be (a DICOM modality code); the files do not say.
    """

    model_config = _STRICT
    kind: Literal["nifti"]
    images: Path
    masks: Path | None = None
    modality: Modality = ""


class NpzSource(BaseModel):
    """A MedMNIST-style file with arrays {train,val,test}_images and {train,val,test}_labels.

    Attributes:
        modality: what the site declares these images to be (a DICOM modality code).
        part: (k, n): of the official validation and test rows this site takes those with row % n == k.
        classes: label in the file to class of the plan; without it the label itself is the class.
    """

    model_config = _STRICT
    kind: Literal["npz"]
    path: Path
    modality: Modality = ""
    part: tuple[int, int] | None = None
    classes: Texts | None = None

    @model_validator(mode="after")
    def _part_is_one_of_n(self) -> Self:
        if self.part is not None and not 0 <= self.part[0] < self.part[1]:
            raise ValueError(f"part [k, n] needs 0 <= k < n, not {list(self.part)}")
        return self


Source = Annotated[DicomSource | NiftiSource | NpzSource, Field(discriminator="kind")]


class Masks(BaseModel):
    """Masks of DICOM images: <key>.nii.gz or <key>.nii in one folder, on the grid of their image."""

    model_config = _STRICT
    path: Path
    key: Literal["accession", "series", "patient"]


class Labels(BaseModel):
    """A table of labels.

    Attributes:
        key: by what the column `key_column` names an image; a patient's label holds for all its images.
        label_column: the column with the site's own code.
        classes: local code to class of the plan; without it the code itself is the class.
    """

    model_config = _STRICT
    file: Path
    key: Key
    key_column: str
    label_column: str
    classes: Texts | None = None


class Table(BaseModel):
    """A table that says which images are this site's, and optionally their folds and patients.

    Attributes:
        key: as for labels; `index` is the row of the official training part of an .npz.
        where: column to value: the rows of this site.
        fold_column: the column with train, validation or test.
        patient_column: the column with the patient, for images that carry none (NIfTI).
    """

    model_config = _STRICT
    file: Path
    key: Literal["accession", "patient", "study", "series", "file", "index"]
    key_column: str
    where: Texts = Field(default_factory=dict)
    fold_column: str | None = None
    patient_column: str | None = None


class SiteData(BaseModel):
    """The images of one site and what is known of them; all paths are absolute once loaded."""

    model_config = _STRICT
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,40}$")]
    root: Path = Path()
    sources: Annotated[tuple[Source, ...], Field(min_length=1)]
    masks: Masks | None = None
    labels: Labels | None = None
    table: Table | None = None

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        kinds = {source.kind for source in self.sources}
        if self.masks is not None and "dicom" not in kinds:
            raise ValueError("masks is for dicom sources; name a nifti source's masks within it")
        if self.labels is not None and kinds == {"npz"}:
            raise ValueError("an npz source carries its own labels: remove labels, or use the source's classes")
        if self.table is not None and (self.table.key == "index") != (kinds == {"npz"}):
            raise ValueError("table key 'index' is for npz sources, and the only one for them")
        return self


def load_site(source: Path | str | Mapping[str, Any] | Document, *, base: Path | None = None) -> SiteData:
    """Read and check a site file, or the same content as a mapping.

    Args:
        source: path of a YAML file, a mapping, or what was read from a file.
        base: the folder at which a relative `root` starts if no path is given; the working folder unless told.

    Raises:
        DataError: the content is not as described, or a folder, file, column, row or code that it names is absent.
    """
    if isinstance(source, Document):
        document, folder = source, base or Path.cwd()
    elif isinstance(source, Mapping):
        document, folder = Document(dict(source), name="the site's entry"), base or Path.cwd()
    else:
        document, folder = read_site_file(Path(source)), Path(source).parent
    site = _resolve(_validate(_from_dataset(document, folder)), folder.absolute())
    _check_folders(site)
    _check_tables(site)
    return site


def _from_dataset(document: Document, folder: Path) -> Document:
    """A site file with `dataset: {name: NAME, …}` is written by the installed entry point of that name.

    The entry point (group `locum.datasets`) is called with the site's root folder and the other keys as parameters, and
    returns the rest of the site file: sources, masks, labels, table. So a data set with a layout of its own needs no
    more than a function.
    """
    given = document.data.get("dataset") if isinstance(document.data, Mapping) else None
    if given is None:
        return document
    name = given.get("name") if isinstance(given, Mapping) else None
    found = installed("locum.datasets")
    if name not in found:
        raise DataError(f"{document.name}: there is no data set '{name}'", suggestion(str(name), found) if found else
                        "install the package that provides it (entry points of the group locum.datasets)")  # fmt: skip
    root = _root(folder, str(document.data.get("root", ".")))
    parameters = {key: value for key, value in given.items() if key != "name"}
    written = found[name].load()(root, **parameters)
    own = {key: value for key, value in document.data.items() if key != "dataset"}
    return replace(document, data={**written, **own})


def table_rows(table: Table) -> tuple[Row, ...]:
    """The rows of a table that are this site's.

    Raises:
        DataError: as :func:`read_sheet`; a column is absent; no row is this site's; a fold is none of the three.
    """
    sheet = read_sheet(table.file)
    sheet.require([table.key_column, *table.where, *filter(None, [table.fold_column, table.patient_column])])
    rows = tuple(row for row in sheet.rows if all(row.cells[name] == text for name, text in table.where.items()))
    if not rows:
        seen = "; ".join(f"{name}: {_some({row.cells[name] for row in sheet.rows})}" for name in table.where)
        wanted = " and ".join(f"{name} = {text}" for name, text in table.where.items())
        raise DataError(f"{table.file} has no row with {wanted or 'content'}", f"the file has {seen or 'no rows'}")
    _check_folds(table, rows)
    return rows


def label_rows(labels: Labels) -> tuple[Row, ...]:
    """The rows of a label file that hold a label.

    Raises:
        DataError: as :func:`read_sheet`; a column is absent; not one code is named in `classes`.
    """
    sheet = read_sheet(labels.file)
    sheet.require([labels.key_column, labels.label_column])
    rows = tuple(row for row in sheet.rows if row.cells[labels.label_column])
    codes = {row.cells[labels.label_column] for row in rows}
    if labels.classes is not None and codes and codes.isdisjoint(labels.classes):
        raise DataError(
            f"{labels.file}, column '{labels.label_column}': none of its codes ({_some(codes)}) is in labels.classes",
            f"labels.classes names {_some(labels.classes)}; map the codes of the file to the plan's classes",
        )
    return rows


def read_site_file(path: Path) -> Document:
    """A site file as it stands, with the lines of its keys; raises DataError if it is no mapping in YAML."""
    try:
        document = read_yaml(path)
    except OSError as error:
        raise DataError(f"the site file {path} cannot be read: {error.strerror}", "check its path") from None
    except YamlError as error:
        raise DataError(f"the site file {path} is no YAML: {error}", "mend that line") from None
    if not isinstance(document.data, dict):
        raise DataError(f"{path} is not a site file", "it needs at least: name, sources")
    return replace(document, name=str(path))


def _validate(document: Document) -> SiteData:
    try:
        return SiteData.model_validate(document.data)
    except ValidationError as error:
        raise mistake(document, error, _keys_beside) from None


def mistake(
    document: Document, error: ValidationError, keys_beside: Callable[[tuple[int | str, ...]], Iterable[str]]
) -> DataError:
    """The first thing wrong with a site file: its line and key, and for a misspelt key the nearest one beside it."""
    # A misspelt key is two errors, unknown and missing: the first of them helps.
    first = min(error.errors(), key=lambda found: found["type"] != "extra_forbidden")
    # A union adds the kind of its member to the place; the file has no such key.
    place = tuple(part for part in first["loc"] if part not in ("dicom", "nifti", "npz"))
    line = f", line {document.line(place)}" if document.lines else ""
    key = ".".join(str(part) for part in place) or "the file as a whole"
    message = f"{document.name}{line}, {key}: {first['msg'].removeprefix('Value error, ')}"
    misspelt = first["type"] == "extra_forbidden"
    return DataError(
        message, suggestion(str(place[-1]), keys_beside(first["loc"])) if misspelt else "mend it in the site file"
    )


def _keys_beside(location: tuple[int | str, ...]) -> tuple[str, ...]:
    """The keys of the part of a site file in which a key stands."""
    parts: dict[str, type[BaseModel]] = {"masks": Masks, "labels": Labels, "table": Table}
    kinds: dict[str, type[BaseModel]] = {"dicom": DicomSource, "nifti": NiftiSource, "npz": NpzSource}
    inner = [{**parts, **kinds}[str(step)] for step in location[:-1] if str(step) in {**parts, **kinds}]
    return tuple((inner[-1] if inner else SiteData).model_fields)


def _resolve(site: SiteData, folder: Path) -> SiteData:
    root = _root(folder, site.root)
    parts: dict[str, Any] = {"root": root, "sources": tuple(_rooted(source, root) for source in site.sources)}
    for name in ("masks", "labels", "table"):
        part = getattr(site, name)
        parts[name] = None if part is None else _rooted(part, root)
    return site.model_copy(update=parts)


def _root(folder: Path, given: Path | str) -> Path:
    return folder / Path(given).expanduser()


def _rooted(part: _Part, root: Path) -> _Part:
    paths = {name: root / value for name, value in part if isinstance(value, Path)}
    return part.model_copy(update=paths)


def _check_folders(site: SiteData) -> None:
    for source in site.sources:
        if isinstance(source, NpzSource):
            _check_present(source.path, "file", present=source.path.is_file())
        else:
            folders = [source.path] if isinstance(source, DicomSource) else [source.images, source.masks]
            for folder in filter(None, folders):
                _check_present(folder, "folder", present=folder.is_dir())
    if site.masks is not None:
        _check_present(site.masks.path, "folder", present=site.masks.path.is_dir())


def _check_present(path: Path, what: str, *, present: bool) -> None:
    if not present:
        raise DataError(f"the {what} {path} does not exist", "check the path in the site file, and its root")


def _check_tables(site: SiteData) -> None:
    if site.labels is not None:
        label_rows(site.labels)
    if site.table is not None:
        table_rows(site.table)


def _check_folds(table: Table, rows: Iterable[Row]) -> None:
    for row in rows:
        fold = row.cells[table.fold_column] if table.fold_column else ""
        if fold and fold not in FOLDS:
            raise DataError(
                f"{table.file}, line {row.line}, column '{table.fold_column}': '{fold}' is no fold",
                "write train, validation or test, or leave the cell empty",
            )


def _some(texts: Iterable[str]) -> str:
    shown = sorted(set(texts))
    return ", ".join(shown[:8]) + (", …" if len(shown) > 8 else "")
