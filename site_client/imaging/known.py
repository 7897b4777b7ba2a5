"""What the site keeps of the patient and the study of an image, taken from the original before it is cleaned.

Rules:
  * Names and numbers stand here as keyed pseudonyms only; ages stop at 90, and of a date the month is kept.
  * It stays in the site's catalog; it is what contracts and cohort counts are asked of.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass

from pydicom.dataset import Dataset

from locum.site_client.imaging.headers import text
from locum.site_client.imaging.keys import Keys

#: Of patients of this age and more the age is not kept (45 CFR 164.514(b)(2)(i)(C)).
OLDEST = 90
_DAY = re.compile(r"(\d{4})\.?(0[1-9]|1[0-2])\.?([0-2]\d|3[01])")
_AGE = re.compile(r"(\d{1,3})([DWMY])")
_PER_YEAR = {"D": 365.25, "W": 52.18, "M": 12.0, "Y": 1.0}


@dataclass(frozen=True, slots=True)
class Known:
    """What is known of the patient and the study of one image.

    Attributes:
        patient: pseudonym; empty if the image has no patient ID.
        place: of the patient in [0, 1), by which folds are cut.
        accession: keyed name of the accession number, or empty; `study` and `series` are keyed UIDs.
        sex: F, M or O (PS3.3 C.7.1.1), or empty.
        age: years at the study, 90 for 90 and more; None if it is not stated.
        month: of the study, YYYY-MM, or empty.
    """

    patient: str = ""
    place: float = 0.0
    accession: str = ""
    study: str = ""
    series: str = ""
    sex: str = ""
    age: int | None = None
    month: str = ""

    def to_json(self) -> str:
        """As text, for a database."""
        return json.dumps(asdict(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, written: str) -> Known:
        """What :meth:`to_json` wrote."""
        return cls(**json.loads(written))


#: Of an image that says nothing of its patient.
NOBODY = Known()


def known_of(dataset: Dataset, keys: Keys) -> Known:
    """What is kept of an original header."""
    patient = text(dataset, "PatientID")
    sex = text(dataset, "PatientSex").upper()
    return Known(
        patient=keys.patient(patient),
        place=keys.place(patient) if patient else 0.0,
        accession=keys.accession(text(dataset, "AccessionNumber")),
        study=keys.uid(text(dataset, "StudyInstanceUID")),
        series=keys.uid(text(dataset, "SeriesInstanceUID")),
        sex=sex if sex in {"F", "M", "O"} else "",
        age=_age(dataset),
        month=_month(text(dataset, "StudyDate") or text(dataset, "SeriesDate") or text(dataset, "AcquisitionDate")),
    )


def _month(day: str) -> str:
    found = _DAY.match(day)
    return f"{found[1]}-{found[2]}" if found else ""


def _age(dataset: Dataset) -> int | None:
    """Years from Patient's Age (AS, PS3.5 6.2), or between birth and study; None if neither says."""
    stated = _AGE.fullmatch(text(dataset, "PatientAge").upper())
    if stated:
        return min(int(int(stated[1]) / _PER_YEAR[stated[2]]), OLDEST)
    born, study = _DAY.match(text(dataset, "PatientBirthDate")), _DAY.match(text(dataset, "StudyDate"))
    if not born or not study:
        return None
    years = int(study[1]) - int(born[1]) - ((study[2], study[3]) < (born[2], born[3]))
    return min(years, OLDEST) if years >= 0 else None
