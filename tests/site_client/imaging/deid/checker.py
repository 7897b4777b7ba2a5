"""What a stranger would look for in a cleaned file: an examination that shares no code with the engine.

It reads the original with pydicom, lists what identifies, and looks for each of it in the bytes of the cleaned file
outside the pixels.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

import pydicom
from pydicom.dataset import Dataset
from pydicom.uid import UID_dictionary

#: Attributes of which the value is an identifier, an address or a telephone number.
IDS = frozenset(
    [
        "PatientID",
        "OtherPatientIDs",
        "AccessionNumber",
        "StudyID",
        "AdmissionID",
        "MedicalRecordLocator",
        "ServiceEpisodeID",
        "RequestedProcedureID",
        "ScheduledProcedureStepID",
        "PerformedProcedureStepID",
        "PatientAddress",
        "PatientTelephoneNumbers",
        "InsurancePlanIdentification",
        "PlacerOrderNumberImagingServiceRequest",
        "FillerOrderNumberImagingServiceRequest",
        "InstitutionName",
        "InstitutionAddress",
        "InstitutionalDepartmentName",
        "ReferringPhysicianAddress",
        "ReferringPhysicianTelephoneNumbers",
        "PersonTelephoneNumbers",
        "PersonAddress",
        "CountryOfResidence",
        "RegionOfResidence",
        "MilitaryRank",
        "BranchOfService",
        "Occupation",
        "ClinicalTrialSubjectID",
        "IssuerOfPatientID",
        "CurrentPatientLocation",
        "PatientComments",
        "AdditionalPatientHistory",
        "StudyComments",
        "ImageComments",
        "RequestingService",
    ]
)


@dataclass
class Secrets:
    """What must not be found: whole words, strings anywhere, UIDs."""

    words: set[str] = field(default_factory=set)
    strings: set[str] = field(default_factory=set)
    uids: set[str] = field(default_factory=set)

    def add_name(self, name: str) -> None:
        self.words |= {part.lower() for part in re.split(r"[\W\d_]+", name) if len(part) > 2 or not part.isascii()}

    def add_id(self, value: str) -> None:
        value = value.strip().lower()
        if len(value) > 4 and len(set(value)) > 1:
            self.strings.add(value)

    def add_day(self, day: str) -> None:
        year, month, date = day[:4], day[4:6], day[6:8]
        self.strings |= {year + month + date, f"{year}-{month}-{date}", f"{date}.{month}.{year}"}
        self.strings |= {f"{month}/{date}/{year}", f"{date}/{month}/{year}", f"{year}.{month}.{date}"}


def secrets_of(dataset: Dataset) -> Secrets:
    """All that identifies in an original, at any depth, in private groups too."""
    found = Secrets()
    for element in _all(dataset):
        if element.VR == "SQ":
            continue
        values = element.value if isinstance(element.value, list | pydicom.multival.MultiValue) else [element.value]
        texts = [str(value) for value in values if value not in (None, "")]
        for text in texts:
            if element.VR == "PN":
                found.add_name(text)
            elif element.VR in {"DA", "DT"} and re.match(r"\d{8}", text):
                found.add_day(text)
            elif element.VR == "UI" and text not in UID_dictionary:
                found.uids.add(text)
            elif element.keyword in IDS:
                found.add_id(text)
    return found


def _all(dataset: Dataset) -> Iterator[pydicom.DataElement]:
    for tag in dataset.keys():  # noqa: SIM118 # a data set iterates over elements
        try:
            element = dataset[tag]
        except (ValueError, TypeError, NotImplementedError, AttributeError):
            continue
        yield element
        if element.VR == "SQ":
            for item in element.value:
                yield from _all(item)


def outside_pixels(content: bytes) -> bytes:
    """A Part 10 file without the value of its pixel data."""
    dataset = pydicom.dcmread(io.BytesIO(content))
    raw = dataset.get_item("PixelData")
    if raw is None or not raw.value:
        return content
    return content[: raw.value_tell] + content[raw.value_tell + len(raw.value) :]


#: Every way in which a name that is not ASCII may stand in a file.
ENCODINGS = ("utf-8", "gb18030", "shift_jis", "euc_kr", "latin-1", "iso8859_5", "iso8859_7", "utf-16-le")


def leaks(content: bytes, secrets: Secrets) -> list[str]:
    """What of an original is found in a cleaned file."""
    rest = outside_pixels(content)
    text = rest.decode("latin-1").lower()
    found = []
    for word in sorted(secrets.words):
        if word.isascii():
            found += [word] if re.search(rf"(?<![a-z]){re.escape(word)}(?![a-z])", text) else []
        else:
            found += (
                [word] if any(_encoded(spelt, code) in rest for spelt in _cases(word) for code in ENCODINGS) else []
            )
    for string in sorted(secrets.strings):
        if re.search(rf"(?<![0-9a-z]){re.escape(string)}(?![0-9a-z])", text):
            found.append(string)
    found += [uid for uid in sorted(secrets.uids) if re.search(rf"(?<![0-9.]){re.escape(uid)}(?![0-9.])", text)]
    return found


def _cases(word: str) -> set[str]:
    return {word, word.upper(), word.title()}


def _encoded(word: str, code: str) -> bytes:
    try:
        content = word.encode(code)
    except UnicodeEncodeError:
        return b"\0no such name\0"
    return content if len(content) > 2 else b"\0no such name\0"
