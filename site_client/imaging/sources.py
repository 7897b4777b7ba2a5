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
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, ValidationError, model_validator

from locum.common.errors import DataError
from locum.common.names import installed, suggestion
from locum.common.yaml_source import Source as Document
from locum.common.yaml_source import YamlError, read_yaml
from locum.site_client.imaging.sheets import Row, read_sheet
from locum.site_client.imaging.split import FOLDS

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


class Query(BaseModel):
    """What is asked of a PACS; what is left out does not narrow it.

    Attributes:
        modalities: DICOM modality codes.
        body_parts: values of Body Part Examined (PS3.16 annex L).
        dates: the first and the last day of the study, both included.
        accessions: a text file with one accession number a line.
    """

    model_config = _STRICT
    modalities: tuple[Modality, ...] = ()
    body_parts: tuple[str, ...] = ()
    dates: tuple[date, date] | None = None
    accessions: Path | None = None

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.dates is not None and self.dates[0] > self.dates[1]:
            raise ValueError(f"the first day {self.dates[0]} is after the last {self.dates[1]}")
        return self


#: Instances a second that are asked of a PACS, at most.
Rate = Annotated[float, Field(gt=0, le=100_000)]
Timeout = Annotated[float, Field(gt=0, le=3600)]


class DicomWebSource(BaseModel):
    """A PACS by DICOMweb (PS3.18): QIDO-RS to ask, WADO-RS to fetch.

    Attributes:
        url: of the service, such as https://pacs:8043/dicom-web.
        user: with `password_file`, for HTTP basic authentication.
        authority: the certificates by which the server is known, PEM; the system's own unless told.
        certificate: with `key`, what the site shows in TLS, PEM.
        timeout: seconds after which a PACS that says nothing counts as away.
    """

    model_config = _STRICT
    kind: Literal["dicomweb"]
    url: Annotated[str, Field(pattern=r"^https?://[^\s@]+$")]
    query: Query = Query()
    rate: Rate = 200.0
    timeout: Timeout = 60.0
    user: str | None = None
    password_file: Path | None = None
    authority: Path | None = None
    certificate: Path | None = None
    key: Path | None = None

    @model_validator(mode="after")
    def _in_pairs(self) -> Self:
        if (self.user is None) != (self.password_file is None):
            raise ValueError("user and password_file belong together")
        if (self.certificate is None) != (self.key is None):
            raise ValueError("certificate and key belong together")
        return self


#: An application entity title (PS3.5 6.2, AE).
Title = Annotated[str, Field(pattern=r"^[\x21-\x5b\x5d-\x7e]([\x20-\x5b\x5d-\x7e]{0,14}[\x21-\x5b\x5d-\x7e])?$")]


class DimseSource(BaseModel):
    """A PACS by DIMSE (PS3.4): C-FIND to ask, C-GET or C-MOVE to fetch.

    Attributes:
        title: the PACS's application entity title; `calling` this site's, as the PACS knows it.
        fetch: `get` over the same association, or `move` to the `listen` port of this machine.
        associations: at once, at most two: with more a PACS was seen to lose images.
        timeout: seconds after which a PACS that says nothing counts as away.
    """

    model_config = _STRICT
    kind: Literal["dimse"]
    host: str
    port: Annotated[int, Field(ge=1, le=65535)]
    title: Title
    calling: Title = "LOCUM"
    fetch: Literal["get", "move"] = "get"
    listen: Annotated[int, Field(ge=1, le=65535)] | None = None
    associations: Literal[1, 2] = 1
    query: Query = Query()
    rate: Rate = 200.0
    timeout: Timeout = 60.0

    @model_validator(mode="after")
    def _a_port_to_move_to(self) -> Self:
        if (self.fetch == "move") != (self.listen is not None):
            raise ValueError("fetch: move needs the port `listen`, and get has none")
        return self


class BidsSource(BaseModel):
    """A BIDS-like tree: sub-X/[ses-Y/]FOLDER/sub-X_…_SUFFIX.nii[.gz], with JSON sidecars and participants.tsv.

    Attributes:
        suffixes: those of the images that are taken, such as T1w.
        masks: a folder with the same tree (derivatives/labels), and what follows the image's name in a mask's.
        modality: what the site declares the images to be.
    """

    model_config = _STRICT
    kind: Literal["bids"]
    path: Path
    suffixes: Annotated[tuple[str, ...], Field(min_length=1)]
    modality: Modality = "MR"
    masks: Path | None = None
    mask_suffix: str = ""


class DeepLesionSource(BaseModel):
    """DeepLesion's layout: DL_info.csv beside Images_png/PATIENT_STUDY_SERIES/NNN.png, 16 bit, HU = value - 32768.

    A case is the key slice of a lesion, with its neighbours within `context` slices.
    """

    model_config = _STRICT
    kind: Literal["deeplesion"]
    path: Path
    context: Annotated[int, Field(ge=0, le=32)] = 0


#: A source that is a PACS: what it holds is retrieved, de-identified, into the store's own folder first.
PacsSource = DicomWebSource | DimseSource

Source = Annotated[
    DicomSource | NiftiSource | NpzSource | DicomWebSource | DimseSource | BidsSource | DeepLesionSource,
    Field(discriminator="kind"),
]

#: How several readers' masks or labels become one: the majority, or STAPLE (Warfield et al., IEEE TMI 2004).
Consensus = Literal["majority", "staple"]


class Masks(BaseModel):
    """Masks of DICOM images: <key>.nii.gz or <key>.nii in one folder, on the grid of their image.

    With `consensus`, <key>.READER.nii.gz are those of several readers.
    """

    model_config = _STRICT
    kind: Literal["folder"] = "folder"
    path: Path
    key: Literal["accession", "series", "patient"]
    consensus: Consensus | None = None


class ObjectMasks(BaseModel):
    """Masks in DICOM objects: Segmentation (PS3.3 A.51) or RT Structure Set (A.19).

    Attributes:
        path: a folder of such objects; those among the sources are used as well.
        segments: segment or structure to the value it has in the mask: a label, or a code such as SCT:10200004.
        overlap: what a voxel is that two of them claim: refused, or of the one that `segments` names later.
        consensus: how several objects of one image, by several readers, become one mask.
    """

    model_config = _STRICT
    kind: Literal["seg", "rtstruct"]
    path: Path | None = None
    segments: Annotated[dict[str, Annotated[int, Field(ge=1, le=255)]], Field(min_length=1)]
    overlap: Literal["refuse", "later"] = "refuse"
    consensus: Consensus | None = None


class Labels(BaseModel):
    """A table of labels.

    Attributes:
        key: by what the column `key_column` names an image; a patient's label holds for all its images.
        label_column: the column with the site's own code.
        classes: local code to class of the plan; without it the code itself is the class.
        reader_column: the column with the reader; `consensus` then says how their labels become one.
    """

    model_config = _STRICT
    kind: Literal["table"] = "table"
    file: Path
    key: Key
    key_column: str
    label_column: str
    classes: Texts | None = None
    reader_column: str | None = None
    consensus: Literal["majority"] | None = None

    @model_validator(mode="after")
    def _readers_agree_somehow(self) -> Self:
        if (self.reader_column is None) != (self.consensus is None):
            raise ValueError("reader_column and consensus belong together")
        return self


class SrLabels(BaseModel):
    """Labels in structured reports (SR, PS3.16 TID 1500): the finding, or an evaluation, of an image.

    Attributes:
        path: a folder of such objects; those among the sources are used as well.
        concept: the name whose value is the label, as SCHEME:CODE; the finding (DCM:121071) unless told.
        classes: code as SCHEME:CODE to class of the plan; without it the code itself is the class.
        consensus: how several reports of one image, by several readers, become one label.
    """

    model_config = _STRICT
    kind: Literal["sr"]
    path: Path | None = None
    concept: str = "DCM:121071"
    classes: Texts | None = None
    consensus: Literal["majority"] | None = None


class ReportLabels(BaseModel):
    """Labels from the text of reports, by rules for negation (NegEx: Chapman et al., J Biomed Inform 2001).

    Attributes:
        key: as for a table; `text_column` has the report.
        findings: class to the phrases that mean it. The first class with an affirmed phrase is the label.
        otherwise: the class of a report that affirms none, or None: such images go to quarantine.
        reviewed: a table of reports that a person has labelled (the same key, the column `label`): precision and
            recall of the rules are measured on it.
        words: the words by which the rules go, such as those of another language; those that ship for English unless
            told.
    """

    model_config = _STRICT
    kind: Literal["reports"]
    file: Path
    key: Key
    key_column: str
    text_column: str
    findings: Annotated[dict[str, tuple[str, ...]], Field(min_length=1)]
    otherwise: str | None = None
    reviewed: Path | None = None
    words: Path | None = None

    @model_validator(mode="after")
    def _a_phrase_means_one_class(self) -> Self:
        seen: dict[str, str] = {}
        for name, phrases in self.findings.items():
            for phrase in (" ".join(each.lower().split()) for each in phrases):
                if not phrase:
                    raise ValueError(f"a phrase of '{name}' is empty")
                if seen.setdefault(phrase, name) != name:
                    raise ValueError(f"'{phrase}' means both '{seen[phrase]}' and '{name}'")
        if self.otherwise in self.findings:
            raise ValueError(f"'{self.otherwise}' is a class of findings: name another for reports without any")
        return self


class FhirLabels(BaseModel):
    """Labels from FHIR R4 bundles: conditions and observations of the patients of imaging studies.

    Attributes:
        path: a folder of bundles (.json) or of resources a line (.ndjson).
        link: how a study is found: by accession number, study UID, or patient identifier.
        accession: the system of the study's identifier that is the accession number; the identifiers of type ACSN
            (HL7 table 0203) unless told.
        identifier: the system of the patient identifier that is the images' Patient ID; any unless told.
        resources: which resources hold the label.
        classes: code as SYSTEM:CODE (SCT, LOINC, ICD10) to class of the plan.
        otherwise: the class of a study without such a code, or None: such images go to quarantine.
    """

    model_config = _STRICT
    kind: Literal["fhir"]
    path: Path
    link: Literal["accession", "study", "patient"]
    accession: str | None = None
    identifier: str | None = None
    resources: tuple[Literal["Condition", "Observation", "DiagnosticReport"], ...] = ("Condition",)
    classes: Texts | None = None
    otherwise: str | None = None


def _kind_of(given: str) -> Callable[[Any], str]:
    """The kind of a part that may leave it out."""

    def kind(value: Any) -> str:
        return str(value.get("kind", given) if isinstance(value, Mapping) else value.kind)

    return kind


AnyMasks = Annotated[
    Annotated[Masks, Tag("folder")] | Annotated[ObjectMasks, Tag("seg")] | Annotated[ObjectMasks, Tag("rtstruct")],
    Discriminator(_kind_of("folder")),
]
AnyLabels = Annotated[
    Annotated[Labels, Tag("table")]
    | Annotated[SrLabels, Tag("sr")]
    | Annotated[ReportLabels, Tag("reports")]
    | Annotated[FhirLabels, Tag("fhir")],
    Discriminator(_kind_of("table")),
]


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


class Consent(BaseModel):
    """Whose images may not be used.

    Attributes:
        withdrawn: a text file with one patient ID a line; their images leave the catalog and every cache.
    """

    model_config = _STRICT
    withdrawn: Path


#: The options of PS3.15 Annex E (E.3.1 to E.3.11) that a site may add to the Basic Profile.
DeidOption = Literal[
    "modified_dates",
    "retain_uids",
    "device_identity",
    "institution_identity",
    "patient_characteristics",
    "clean_descriptors",
    "clean_structured_content",
    "clean_graphics",
    "safe_private",
]


class Deidentification(BaseModel):
    """How DICOM is cleaned: the Basic Profile of PS3.15 Annex E with options.

    Attributes:
        options: those added to the Basic Profile; none leaves a date or a free text as it was.
        keep_dicom: whether the store keeps the cleaned DICOM files beside the volumes.
    """

    model_config = _STRICT
    options: tuple[DeidOption, ...] = ("modified_dates", "device_identity", "patient_characteristics")
    keep_dicom: bool = False


class SiteData(BaseModel):
    """The images of one site and what is known of them; all paths are absolute once loaded.

    Attributes:
        terminology: the site's map from its own codes to standard codes and classes (`configs/terminology/`).
        consent: whose images may not be used.
        deidentification: how DICOM is cleaned.
        defaced: whether the site declares that faces were removed from heads before the images came here.
    """

    model_config = _STRICT
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,40}$")]
    root: Path = Path()
    sources: Annotated[tuple[Source, ...], Field(min_length=1)]
    masks: AnyMasks | None = None
    labels: AnyLabels | None = None
    table: Table | None = None
    terminology: Path | None = None
    consent: Consent | None = None
    deidentification: Deidentification = Deidentification()
    defaced: bool = False

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        kinds = {source.kind for source in self.sources}
        if self.masks is not None and kinds.isdisjoint({"dicom", "dicomweb", "dimse"}):
            raise ValueError("masks is for DICOM; name a nifti source's masks within it")
        own = [source for source in self.sources if isinstance(source, NiftiSource | BidsSource) and source.masks]
        if own and isinstance(self.masks, ObjectMasks):
            raise ValueError("masks in DICOM objects and a source with masks of its own need a site file each")
        if "retain_uids" in self.deidentification.options and kinds & {"dicomweb", "dimse"}:
            raise ValueError("retain_uids is not for a PACS: what comes from one is filed under keyed UIDs")
        if kinds & {"dicomweb", "dimse"}:
            self._check_pacs()
        if self.labels is not None and kinds == {"npz"}:
            raise ValueError("an npz source carries its own labels: remove labels, or use the source's classes")
        if self.table is not None and (self.table.key == "index") != (kinds == {"npz"}):
            raise ValueError("table key 'index' is for npz sources, and the only one for them")
        return self

    def _check_pacs(self) -> None:
        """What comes from a PACS is cleaned on arrival: what labels and masks are read from must survive that."""
        kept = self.deidentification.options
        if self.table is not None and self.table.patient_column is not None:
            raise ValueError("patient_column is for images that carry no patient: those of a PACS have their own")
        if isinstance(self.labels, SrLabels) and "clean_structured_content" not in kept:
            raise ValueError("labels in SR from a PACS need deidentification.options: [clean_structured_content, …]")
        if isinstance(self.masks, ObjectMasks) and self.masks.kind == "rtstruct" and "clean_descriptors" not in kept:
            raise ValueError("masks in RTSTRUCT from a PACS need deidentification.options: [clean_descriptors, …]")


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
    place = _as_written(first["loc"])
    line = f", line {document.line(place)}" if document.lines else ""
    key = ".".join(str(part) for part in place) or "the file as a whole"
    message = f"{document.name}{line}, {key}: {first['msg'].removeprefix('Value error, ')}"
    misspelt = first["type"] == "extra_forbidden"
    return DataError(
        message, suggestion(str(place[-1]), keys_beside(first["loc"])) if misspelt else "mend it in the site file"
    )


def _as_written(location: tuple[int | str, ...]) -> tuple[int | str, ...]:
    """A place in the file: a union adds the kind of its member, and the file has no such key."""
    kind = {"sources": 2, "masks": 1, "labels": 1}.get(str(location[0])) if location else None
    return tuple(step for number, step in enumerate(location) if number != kind or step not in {**_KINDS, "table": 0})


#: By its `kind`, each part of a site file that has one.
_KINDS: Mapping[str, type[BaseModel]] = {
    "dicom": DicomSource,
    "nifti": NiftiSource,
    "npz": NpzSource,
    "dicomweb": DicomWebSource,
    "dimse": DimseSource,
    "bids": BidsSource,
    "deeplesion": DeepLesionSource,
    "folder": Masks,
    "seg": ObjectMasks,
    "rtstruct": ObjectMasks,
    "sr": SrLabels,
    "reports": ReportLabels,
    "fhir": FhirLabels,
}
_PARTS: Mapping[str, type[BaseModel]] = {
    "table": Table,
    "query": Query,
    "consent": Consent,
    "deidentification": Deidentification,
}


def _keys_beside(location: tuple[int | str, ...]) -> tuple[str, ...]:
    """The keys of the part of a site file in which a key stands."""
    parts = {**_KINDS, **_PARTS}
    # In `labels` the kind `table` is a table of labels, else `table` is the key of the site file.
    steps = ["labels.table" if step == "table" and location[0] == "labels" else str(step) for step in location[:-1]]
    known: dict[str, type[BaseModel]] = {**parts, "labels.table": Labels}
    inner = [known[step] for step in steps if step in known]
    return tuple((inner[-1] if inner else SiteData).model_fields)


def _resolve(site: SiteData, folder: Path) -> SiteData:
    root = _root(folder, site.root)
    parts: dict[str, Any] = {"root": root, "sources": tuple(_rooted(source, root) for source in site.sources)}
    for name in ("masks", "labels", "table", "consent"):
        part = getattr(site, name)
        parts[name] = None if part is None else _rooted(part, root)
    parts["terminology"] = None if site.terminology is None else root / site.terminology.expanduser()
    return site.model_copy(update=parts)


def _root(folder: Path, given: Path | str) -> Path:
    return folder / Path(given).expanduser()


def _rooted(part: _Part, root: Path) -> _Part:
    paths: dict[str, Any] = {name: root / value.expanduser() for name, value in part if isinstance(value, Path)}
    inner = {name: _rooted(value, root) for name, value in part if isinstance(value, Query)}
    return part.model_copy(update=paths | inner)


#: The keys that name a folder; every other path is that of a file.
_FOLDERS = {
    DicomSource: ("path",),
    NiftiSource: ("images", "masks"),
    BidsSource: ("path", "masks"),
    DeepLesionSource: ("path",),
    Masks: ("path",),
    ObjectMasks: ("path",),
    SrLabels: ("path",),
    FhirLabels: ("path",),
}


def _check_folders(site: SiteData) -> None:
    for part in filter(None, (site, *site.sources, site.masks, site.labels, site.table, site.consent)):
        _check_paths(part)


def _check_paths(part: BaseModel) -> None:
    """Raise DataError for the first folder or file of a part that does not exist."""
    folders = _FOLDERS.get(type(part), ())
    for name, value in part:
        if isinstance(value, Query):
            _check_paths(value)
        if isinstance(value, Path) and name != "root":
            folder = name in folders
            present = value.is_dir() if folder else value.is_file()
            _check_present(value, "folder" if folder else "file", present=present)


def _check_present(path: Path, what: str, *, present: bool) -> None:
    if not present:
        raise DataError(f"the {what} {path} does not exist", "check the path in the site file, and its root")


def _check_tables(site: SiteData) -> None:
    if isinstance(site.labels, Labels):
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
