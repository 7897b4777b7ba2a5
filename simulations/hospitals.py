"""Simulated hospitals: folders of DICOM, labels and masks as institutions hold them, with known truth.

Rules:
  * What a hospital writes depends on its specification and on nothing else: the same specification writes
    the same bytes. No clock, no random UID.
  * A hospital is read by the same ingestion as a real one; nothing here shortcuts it. The truth lies beside,
    in `truth.json`, for tests and reports.
  * A folder is written once. `DONE` holds the digest of the specification and is written last; a folder
    without it is an aborted one and is written again. A folder that is not ours is never touched.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import math
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from datetime import date, timedelta
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import nibabel as nib
import numpy as np
import yaml
from numpy.typing import NDArray

from locum.common.errors import DataError
from locum.simulations.phantoms import (
    TISSUES,
    Grid,
    Lesion,
    Phantom,
    Scanner,
    Tissue,
    Vector,
    acquire,
    draw_anatomy,
    draw_lesions,
    render,
    vector,
)
from locum.simulations.scans import (
    VENDORS,
    Instance,
    Patient,
    Protocol,
    Storage,
    Study,
    localizer,
    repeated,
    series,
)

Modality = Literal["CT", "MR", "CR", "DX"]
Task = Literal["classification", "segmentation"]

#: Raised when the same specification would write other bytes than before.
_FORMAT = 1
_DONE, _SPEC = "DONE", "hospital.json"
# First words of the seeds, one per purpose, so that no two purposes share random numbers.
_ROSTER, _BODY, _SCAN, _DAMAGE = range(4)


class Damage(StrEnum):
    """What goes wrong with files and labels in real archives."""

    TRUNCATED = "truncated"
    MISSING_SLICE = "missing_slice"
    DUPLICATED_POSITION = "duplicated_position"
    LOCALIZER = "localizer"
    NO_LABEL = "no_label"
    TEXT_FILE = "text_file"
    UNKNOWN_PATIENT = "unknown_patient"


#: Damage after which the study itself is still a good case: ingestion puts a localizer that says so aside.
HARMLESS = frozenset({Damage.LOCALIZER, Damage.TEXT_FILE, Damage.UNKNOWN_PATIENT})
_VOLUME_ONLY = frozenset({Damage.MISSING_SLICE, Damage.DUPLICATED_POSITION, Damage.LOCALIZER})


@dataclass(frozen=True)
class LabelStyle:
    """How a hospital keeps its findings.

    Attributes:
        key_column: its name for the accession number.
        label_column: its name for the finding.
        lesion: its code for a lesion.
        clear: its code for none.
        separator: between the CSV's columns.
        encoding: of the CSV.
        accession: pattern of its accession numbers, with `{n}` for the number.
        patient: pattern of its patient numbers, likewise.
    """

    key_column: str
    label_column: str
    lesion: str
    clear: str
    separator: str
    encoding: str
    accession: str
    patient: str


_LABEL_STYLES = (
    LabelStyle("AccessionNumber", "Finding", "MASS", "NORM", ",", "utf-8", "A{n:07d}", "N-{n:06d}"),
    LabelStyle("Accession No.", "Lesion", "1", "0", ";", "utf-8-sig", "000{n:06d}", "{n:08d}"),
    LabelStyle("acc_no", "sct_code", "4147007", "17621005", ",", "utf-8", "RAD.{n}.1", "STA{n:05d}"),
    LabelStyle("Zugangsnummer", "Befund", "Läsion", "o.B.", "\t", "utf-8", "{n:06d}R", "P{n:07d}"),
)
_FILE_STYLES = ("media", "uid", "dated", "archive")


class _People(NamedTuple):
    """Invented names in one character set (PS3.3 C.12.1.1.2)."""

    charset: str
    families: tuple[str, ...]
    givens: tuple[str, ...]


_PEOPLE = (
    _People("", ("Archer", "Bowman", "Carver", "Dyer", "Falconer"), ("Ada", "Owen", "Ruth", "Hugh", "Iris")),
    _People("ISO_IR 100", ("Müller", "Åkesson", "Núñez", "Lefèvre"), ("Jörg", "Zoë", "Inés", "René")),
    _People("ISO_IR 192", ("Nováková", "Παππά", "山田", "Łukasik"), ("Jiřina", "Ελένη", "太郎", "İpek")),
    _People("ISO_IR 144", ("Иванова", "Петров", "Сидорова", "Кузнецов"), ("Ольга", "Пётр", "Анна", "Юрий")),
)  # fmt: skip


@dataclass(frozen=True)
class HospitalSpec:
    """One simulated institution.

    Attributes:
        name: of the site, [a-z0-9-].
        seed: of everything it draws.
        patients: how many; 0 is an empty hospital.
        prevalence: share of patients with a lesion, 0 to 1.
        modality: CT or MR volumes, or single CR or DX pictures.
        vendor: a key of `scans.VENDORS`.
        shape: voxels (slices, rows, columns).
        spacing: mm (slice, row, column).
        scanner: kernel, noise and intensity of its acquisitions.
        storage: bits and rescaling of its files.
        vessel_contrast: factor on the vessels' brightness: the contrast medium's phase.
        lesion_contrast: factor on the lesions' brightness.
        diameters: mm, range of lesion diameters.
        lesions: most lesions in a patient.
        orientation: of the slices in the patient.
        feet_first: instances are numbered from head to feet.
        follow_ups: share of patients with a second study.
        broken: number of damages.
        habits: which of the label, file and name styles it follows.
        task: classification, or segmentation (writes masks).
    """

    name: str
    seed: int
    patients: int
    prevalence: float
    modality: Modality = "CT"
    vendor: str = "siemens"
    shape: tuple[int, int, int] = (16, 48, 48)
    spacing: Vector = (5.0, 2.5, 2.5)
    scanner: Scanner = field(default_factory=Scanner)
    storage: Storage = field(default_factory=Storage)
    vessel_contrast: float = 1.0
    lesion_contrast: float = 1.0
    diameters: tuple[float, float] = (12.0, 22.0)
    lesions: int = 2
    orientation: Literal["axial", "oblique", "sagittal"] = "axial"
    feet_first: bool = False
    follow_ups: float = 0.1
    broken: int = 0
    habits: int = 0
    task: Task = "classification"

    def __post_init__(self) -> None:
        check_share("prevalence", self.prevalence)
        check_share("follow_ups", self.follow_ups)
        if self.patients < 0 or self.broken < 0 or self.lesions < 1:
            raise DataError(f"hospital {self.name} has a negative number of things", "give counts of at least 0")
        if self.vendor not in VENDORS:
            raise DataError(f"hospital {self.name} names no known vendor: {self.vendor}", f"use {sorted(VENDORS)}")
        if (self.shape[0] == 1) != (self.modality in {"CR", "DX"}):
            raise DataError(
                f"hospital {self.name} has {self.shape[0]} slices of {self.modality}",
                "use CT or MR for volumes and CR or DX for single pictures",
            )

    @property
    def label_style(self) -> LabelStyle:
        """How it keeps its findings."""
        return _LABEL_STYLES[self.habits % len(_LABEL_STYLES)]

    @property
    def file_style(self) -> str:
        """How it names its files."""
        return _FILE_STYLES[self.habits % len(_FILE_STYLES)]

    @property
    def classes(self) -> dict[str, str]:
        """Its label codes and the plan's classes that they mean."""
        return {self.label_style.lesion: "lesion", self.label_style.clear: "no_lesion"}

    @property
    def tissue(self) -> Tissue:
        """What its contrast medium makes of the average scanner's picture."""
        table = TISSUES[self.modality]
        return table._replace(vessel=table.vessel * self.vessel_contrast, lesion=table.lesion * self.lesion_contrast)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the specification, hex."""
        text = json.dumps({"format": _FORMAT, **asdict(self)}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def rng(self, *words: int) -> np.random.Generator:
        """The generator of one purpose."""
        return np.random.default_rng((self.seed, *words))


def check_share(name: str, value: float) -> None:
    """Raise :class:`DataError` unless `value` is in [0, 1]."""
    if not 0 <= value <= 1:
        raise DataError(f"{name} is {value}", "give a share between 0 and 1")


class _Examination(NamedTuple):
    """One study to be written.

    Attributes:
        number: of the study in the hospital, from 0.
        person: of the patient, from 0.
        visit: 0, or 1 for the follow-up.
        study: its identity.
        lesion: the truth.
    """

    number: int
    person: int
    visit: int
    study: Study
    lesion: bool


def write_hospital(spec: HospitalSpec, directory: Path) -> None:
    """Write a hospital's `dicom/`, `labels.csv`, `masks/`, `truth.json` and `site.yaml`.

    A folder that already holds this hospital whole is left alone.

    Raises:
        DataError: the folder holds something that no simulated hospital wrote.
    """
    if _is_complete(spec, directory):
        return
    _clear(directory)
    _write_json(directory / _SPEC, {"digest": spec.digest, **asdict(spec)})
    examinations = _examinations(spec)
    damages = _damages(spec, examinations)
    truths = [_write_examination(spec, directory, made, damages.get(made.number)) for made in examinations]
    _write_labels(spec, directory, examinations, damages)
    _write_json(directory / "truth.json", {"name": spec.name, "digest": spec.digest, "studies": truths})
    _write_site(spec, directory)
    (directory / _DONE).write_text(spec.digest + "\n", encoding="ascii")


def _is_complete(spec: HospitalSpec, directory: Path) -> bool:
    done = directory / _DONE
    return done.is_file() and done.read_text(encoding="ascii").strip() == spec.digest


def _clear(directory: Path) -> None:
    """Make the folder empty if it is ours or empty already."""
    if directory.is_dir() and any(directory.iterdir()) and not (directory / _SPEC).is_file():
        raise DataError(
            f"{directory} is not empty and holds no simulated hospital",
            "give another folder, or empty this one",
        )
    # DONE goes first: a folder that is half removed must not look complete.
    (directory / _DONE).unlink(missing_ok=True)
    for name in ("dicom", "masks"):
        shutil.rmtree(directory / name, ignore_errors=True)
    (directory / "dicom").mkdir(parents=True)


def _examinations(spec: HospitalSpec) -> list[_Examination]:
    """Everybody who was examined, in the order of the visits."""
    rng = spec.rng(_ROSTER)
    lesions = np.zeros(spec.patients, dtype=bool)
    lesions[: round(spec.prevalence * spec.patients)] = True
    rng.shuffle(lesions)
    returns = rng.permutation(spec.patients)[: round(spec.follow_ups * spec.patients)]
    visits = [(person, 0) for person in range(spec.patients)] + [(int(person), 1) for person in sorted(returns)]
    first, start = (
        int(rng.integers(1000, 90000)),
        date(2019, 1, 7) + timedelta(days=int(rng.integers(0, 900))),
    )
    people = [_person(spec, rng, first + person) for person in range(spec.patients)]
    return [
        _Examination(
            number=number,
            person=person,
            visit=visit,
            study=_study(spec, people[person], number=first + number, day=start + timedelta(2 * number)),
            lesion=bool(lesions[person]),
        )
        for number, (person, visit) in enumerate(visits)
    ]


def _study(spec: HospitalSpec, patient: Patient, *, number: int, day: date) -> Study:
    key = f"{spec.digest} {number}"
    return Study(key, patient, spec.label_style.accession.format(n=number), f"{day:%Y%m%d}")


def _person(spec: HospitalSpec, rng: np.random.Generator, number: int) -> Patient:
    people = _PEOPLE[spec.habits % len(_PEOPLE)]
    family, given = rng.choice(people.families), rng.choice(people.givens)
    born = date(1935, 1, 1) + timedelta(days=int(rng.integers(0, 25000)))
    return Patient(
        spec.label_style.patient.format(n=number),
        f"{family}^{given}",
        f"{born:%Y%m%d}",
        str(rng.choice(["F", "M"])),
    )


def _damages(spec: HospitalSpec, examinations: list[_Examination]) -> dict[int, Damage]:
    """Which study suffers what: all kinds in turn, never two on one study."""
    kinds = [kind for kind in Damage if spec.shape[0] > 1 or kind not in _VOLUME_ONLY]
    rng = spec.rng(_DAMAGE)
    first = int(rng.integers(len(kinds)))
    chosen = rng.permutation(len(examinations))[: spec.broken]
    return {int(number): kinds[(first + turn) % len(kinds)] for turn, number in enumerate(chosen)}


def _write_examination(
    spec: HospitalSpec, directory: Path, made: _Examination, damage: Damage | None
) -> dict[str, Any]:
    """Write one study's files and return its truth."""
    grid, phantom = _phantom(spec, made)
    volume = acquire(phantom.volume, spec.scanner, spec.rng(_SCAN, made.number))
    protocol = _protocol(spec)
    instances = _damaged(series(made.study, volume, grid, protocol), damage, made.study)
    if damage is Damage.LOCALIZER:
        instances.append(localizer(made.study, volume, grid, protocol))
    _write_files(directory / "dicom", _paths(spec, made, instances), instances)
    if damage is Damage.TEXT_FILE:
        note = f"{made.study.patient.id}: images sent to the ward\n"
        (directory / "dicom" / f"note {made.number}.txt").write_text(note, encoding="utf-8")
    if spec.task == "segmentation":
        _write_mask(directory / "masks" / f"{made.study.accession}.nii.gz", phantom.mask, _mask_affine(spec, grid))
    return _truth(made, phantom, damage)


def _phantom(spec: HospitalSpec, made: _Examination) -> tuple[Grid, Phantom]:
    """The patient at this visit: same body, same place on the table, lesions grown."""
    rng = spec.rng(_BODY, made.person)
    row, column = _directions(spec)
    grid = Grid(spec.shape, spec.spacing, row, column, centre=vector(rng.normal(0, (12, 12, 60)).round(1)))
    anatomy = draw_anatomy(rng, grid)
    lesions: tuple[Lesion, ...] = ()
    if made.lesion:
        count = int(rng.integers(1, spec.lesions + 1))
        lesions = draw_lesions(rng, anatomy, grid, count=count, diameters=spec.diameters)
    if made.visit:
        lesions = tuple(lesion.grown(rng.uniform(1.0, 1.2)) for lesion in lesions)
    return grid, render(anatomy, lesions, grid, spec.tissue)


def _directions(spec: HospitalSpec) -> tuple[Vector, Vector]:
    """Unit vectors along the rows and columns of a slice (LPS)."""
    if spec.modality in {"CR", "DX"}:
        return (1.0, 0.0, 0.0), (0.0, 1.0, 0.0)
    if spec.orientation == "sagittal":
        return (0.0, 1.0, 0.0), (0.0, 0.0, -1.0)
    tilt, turn = (math.radians(12), math.radians(7)) if spec.orientation == "oblique" else (0.0, 0.0)
    row = (math.cos(turn), math.sin(turn), 0.0)
    column = (-math.sin(turn) * math.cos(tilt), math.cos(turn) * math.cos(tilt), math.sin(tilt))
    return row, column


def _protocol(spec: HospitalSpec) -> Protocol:
    return Protocol(
        modality=spec.modality,
        vendor=VENDORS[spec.vendor],
        storage=spec.storage,
        charset=_PEOPLE[spec.habits % len(_PEOPLE)].charset,
        institution=f"{spec.name} (simulated)",
        kernel=0 if spec.scanner.kernel > 0.4 else 2 if spec.scanner.kernel < -0.2 else 1,
        feet_first=spec.feet_first,
    )


def _damaged(instances: list[Instance], damage: Damage | None, study: Study) -> list[Instance]:
    """The files after what was done to them; the slice in the middle suffers."""
    middle = len(instances) // 2
    before, victim, after = instances[:middle], instances[middle], instances[middle + 1 :]
    match damage:
        case Damage.TRUNCATED:
            return [*before, victim._replace(data=victim.data[: len(victim.data) * 3 // 5]), *after]
        case Damage.MISSING_SLICE:
            return [*before, *after]
        case Damage.DUPLICATED_POSITION:
            return [*instances, repeated(victim, study, len(instances) + 1)]
        case _:
            return instances


def _paths(spec: HospitalSpec, made: _Examination, instances: list[Instance]) -> Iterator[str]:
    """The hospital's own file names."""
    study = made.study
    for instance in instances:
        match spec.file_style:
            case "media":
                yield f"PA{made.person:06d}/ST{made.visit:06d}/SE000001/IM{instance.number:06d}"
            case "uid":
                yield f"{instance.uid}.dcm"
            case "dated":
                day = f"{study.date[:4]}/{study.date[4:6]}/{study.date[6:]}"
                yield f"{day}/{study.accession}/{instance.number:04d}.dcm"
            case _:
                yield f"{study.series_uid[-12:]}/I{10 * instance.number}"


def _write_files(folder: Path, paths: Iterable[str], instances: list[Instance]) -> None:
    made: set[Path] = set()
    for name, instance in zip(paths, instances, strict=True):
        path = folder / name
        if path.parent not in made:
            path.parent.mkdir(parents=True, exist_ok=True)
            made.add(path.parent)
        path.write_bytes(instance.data)


def _mask_affine(spec: HospitalSpec, grid: Grid) -> NDArray[np.float64]:
    """Index (column, row, slice) to RAS mm; a projection lies nowhere in the patient, so it starts at 0."""
    if spec.modality in {"CR", "DX"}:
        _, row, column = spec.spacing
        return np.diag([-column, -row, 1.0, 1.0])
    affine: NDArray[np.float64] = np.diag([-1.0, -1.0, 1.0, 1.0]) @ grid.affine[:, [2, 1, 0, 3]]
    return affine


def _write_mask(path: Path, mask: NDArray[np.uint8], affine: NDArray[np.float64]) -> None:
    """NIfTI with axes (column, row, slice), as segmentation tools save it."""
    path.parent.mkdir(exist_ok=True)
    image = nib.Nifti1Image(mask.transpose(2, 1, 0), affine)
    # A time of 0, for the same mask must be the same bytes.
    path.write_bytes(gzip.compress(image.to_bytes(), compresslevel=1, mtime=0))


def _truth(made: _Examination, phantom: Phantom, damage: Damage | None) -> dict[str, Any]:
    return {
        "accession": made.study.accession,
        "patient": made.study.patient.id,
        "series": made.study.series_uid,
        "class": "lesion" if made.lesion else "no_lesion",
        "damage": damage,
        "usable": damage is None or damage in HARMLESS,
        "lesion_voxels": int(phantom.mask.sum()),
        "lesions": [
            {"centre_lps_mm": lesion.centre, "diameters_mm": lesion.diameters, "contrast": lesion.contrast}
            for lesion in phantom.lesions
        ],
    }


def _write_labels(
    spec: HospitalSpec, directory: Path, examinations: list[_Examination], damages: dict[int, Damage]
) -> None:
    """The radiologists' list, with what the damages do to it."""
    style = spec.label_style
    with (directory / "labels.csv").open("w", encoding=style.encoding, newline="") as file:
        rows = csv.writer(file, delimiter=style.separator, lineterminator="\n")
        rows.writerow([style.key_column, "StudyDate", style.label_column])
        for made in examinations:
            damage, code = damages.get(made.number), style.lesion if made.lesion else style.clear
            if damage is not Damage.NO_LABEL:
                rows.writerow([made.study.accession, made.study.date, code])
            if damage is Damage.UNKNOWN_PATIENT:
                rows.writerow([style.accession.format(n=900000 + made.number), made.study.date, code])


def _write_site(spec: HospitalSpec, directory: Path) -> None:
    """The configuration with which the site's ingestion reads this folder."""
    site: dict[str, Any] = {
        "name": spec.name,
        "sources": [{"kind": "dicom", "path": "dicom"}],
        "labels": {
            "file": "labels.csv",
            "key": "accession",
            "key_column": spec.label_style.key_column,
            "label_column": spec.label_style.label_column,
            "classes": spec.classes,
        },
    }
    if spec.task == "segmentation":
        site["masks"] = {"path": "masks", "key": "accession"}
    text = yaml.safe_dump(site, sort_keys=False, allow_unicode=True)
    (directory / "site.yaml").write_text(text, encoding="utf-8")


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="ascii")
