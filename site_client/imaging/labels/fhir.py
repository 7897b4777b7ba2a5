"""Labels from FHIR R4 (https://hl7.org/fhir/R4): what is coded of the patients of imaging studies.

Rules:
  * A study is found by its accession number, its study UID, or its patient's identifier, all of them keyed as those of
    the images are. Where the patient's identifier is told as well, it must be that of the image.
  * A condition counts if it is active at the study: begun on that day or before, and not over before it. An observation
    or a report counts if it refers to the study, or comes from the same encounter.
  * What is refuted, cancelled or entered in error does not count. What is provisional, or cannot be placed in time,
    leaves the label uncertain: such images go to quarantine.
  * The few fields that matter are read strictly: one of another form is an error with its file and line.
  * Memory does not grow with the data: what matters goes to a private temporary database, with keyed names only.
  * Codes that neither `classes` nor the map knows are counted, and shown to the steward.
"""

from __future__ import annotations

import json
import sqlite3
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any

from locum.common.errors import DataError
from locum.site_client.imaging.items import Unit
from locum.site_client.imaging.keys import Keys, keyed
from locum.site_client.imaging.labels.fhir_fields import (
    ALWAYS,
    Days,
    WrongField,
    concepts,
    course,
    days_of,
    local,
    many,
    one,
    resources,
    status_of,
    studies_of,
    text,
)
from locum.site_client.imaging.labels.given import Label
from locum.site_client.imaging.reasons import Reason, RefusedError
from locum.site_client.imaging.sources import FhirLabels
from locum.site_client.imaging.terminology import Terminology, labelled, scheme_of

#: Statuses of what does not count.
_FALSE = {"entered-in-error", "refuted", "cancelled"}
#: Condition.verificationStatus, Observation.status and DiagnosticReport.status that are as good as sure.
_SURE = {"confirmed", "final", "amended", "corrected", "appended"}
_SCHEMA = """
CREATE TABLE names (name BLOB NOT NULL, person INTEGER NOT NULL, PRIMARY KEY (name, person)) WITHOUT ROWID;
CREATE TABLE persons (person INTEGER PRIMARY KEY, identifiers TEXT NOT NULL);
CREATE TABLE aliases (alias TEXT NOT NULL, person INTEGER NOT NULL, PRIMARY KEY (alias, person)) WITHOUT ROWID;
CREATE TABLE studies (
    study INTEGER PRIMARY KEY, subject BLOB NOT NULL, encounter BLOB, first TEXT, last TEXT,
    place TEXT NOT NULL, named INTEGER NOT NULL DEFAULT 0
);
CREATE TABLE study_keys (key TEXT NOT NULL, study INTEGER NOT NULL, PRIMARY KEY (key, study)) WITHOUT ROWID;
CREATE TABLE study_names (name BLOB NOT NULL, study INTEGER NOT NULL, PRIMARY KEY (name, study)) WITHOUT ROWID;
CREATE TABLE facts (
    fact INTEGER PRIMARY KEY, kind TEXT NOT NULL, subject BLOB NOT NULL, encounter BLOB, class TEXT NOT NULL,
    codes TEXT NOT NULL, sure INTEGER NOT NULL, began_first TEXT NOT NULL, began_last TEXT NOT NULL,
    ended_first TEXT NOT NULL, ended_last TEXT NOT NULL
);
CREATE TABLE fact_studies (fact INTEGER NOT NULL, name BLOB NOT NULL, PRIMARY KEY (fact, name)) WITHOUT ROWID;
"""
_INDEXES = """
CREATE INDEX facts_by_subject ON facts (subject);
CREATE INDEX names_by_person ON names (person);
CREATE INDEX studies_by_subject ON studies (subject);
"""
_STUDIES_BY_KEY = (
    "SELECT study, subject, encounter, first, last FROM studies JOIN study_keys USING (study) WHERE key = ?"
)


@dataclass(frozen=True)
class Summary:
    """What was read.

    Attributes:
        resources: number by type, of those that were looked at.
        classes: codes that were found, by class.
        unmapped: code to the number of resources that carry it, of those that nothing maps to a class.
        meanings: code to what the data call it.
    """

    resources: Counter[str] = field(default_factory=Counter)
    classes: Counter[str] = field(default_factory=Counter)
    unmapped: Counter[str] = field(default_factory=Counter)
    meanings: dict[str, str] = field(default_factory=dict)


class FhirBook:
    """The labels of a folder of FHIR resources."""

    def __init__(self, labels: FhirLabels, keys: Keys, terms: Terminology | None = None) -> None:
        if labels.classes is None and terms is None:
            raise DataError(
                "labels of the kind fhir need to know which codes mean which class",
                "write labels.classes, or name a terminology map in the site file",
            )
        self._labels = labels
        self._keys = keys
        self._terms = terms
        self._asked = self._found = False
        self._contained = count()
        self.summary = Summary()
        # "" is SQLite's private temporary database: what does not fit its cache goes to a file without a name.
        self._base = sqlite3.connect("", isolation_level=None)
        self._base.executescript(f"PRAGMA temp_store = FILE; PRAGMA journal_mode = OFF; {_SCHEMA}")
        self._base.execute("BEGIN")
        for file in _files(labels.path):
            for line, names, resource in resources(file):
                self._take(file, line, names, resource)
        self._base.execute("COMMIT")
        self._base.executescript(_INDEXES)
        # What has named an image is noted in one transaction without an end: nothing of this base is to last.
        self._base.execute("BEGIN")

    def label(self, unit: Unit) -> Label:
        """The label of an image.

        Raises:
            RefusedError: no_label, uncertain_label or conflicting_labels.
        """
        self._asked = True
        if self._labels.link == "patient":
            return self._decided(self._of_patient(unit))
        key = unit.known.accession if self._labels.link == "accession" else unit.known.study
        studies = self._rows(
            _STUDIES_BY_KEY,
            key,
        )
        if not key or not studies:
            raise RefusedError(Reason.NO_LABEL, "no imaging study of FHIR has this name")
        self._found = True
        self._base.executemany("UPDATE studies SET named = 1 WHERE study = ?", [(row[0],) for row in studies])
        self._check_patient(unit, studies)
        return self._decided(fact for study in studies for fact in self._of_study(study))

    def unmatched(self) -> list[str]:
        """'file name:line' (in a bundle the number of the entry) of each imaging study that has named no image.

        Raises:
            DataError: units were asked for, and nothing named one.
        """
        if self._asked and not self._found and self._rows("SELECT 1 FROM studies UNION SELECT 1 FROM persons"):
            raise DataError(
                f"no imaging study and no patient of {self._labels.path} names an image of this site by "
                f"{self._labels.link}",
                "check link, and the keys accession and identifier, in the site file",
            )
        return [place for (place,) in self._rows("SELECT place FROM studies WHERE NOT named ORDER BY study")]

    # --- of a unit

    def _of_study(self, study: Sequence[Any]) -> Iterator[_Fact]:
        """What counts for one imaging study."""
        number, subject, encounter, first, last = study
        days = None if first is None else (first, last)
        person = self._person(subject)
        for fact in self._facts([subject] if person is None else self._names_of(person)):
            if fact.kind == "Condition":
                yield from fact.at(days, same_encounter=encounter is not None and fact.encounter == encounter)
            elif fact.refers:
                found = self._rows(
                    "SELECT 1 FROM fact_studies JOIN study_names USING (name) WHERE fact = ? AND study = ?",
                    fact.number, number,
                )  # fmt: skip
                yield from [fact] if found else []
            elif encounter is not None and fact.encounter == encounter:
                yield fact

    def _of_patient(self, unit: Unit) -> Iterator[_Fact]:
        """What counts for a unit that is found by its patient: by its study if FHIR has it, else by its month."""
        persons = self._rows("SELECT person FROM aliases WHERE alias = ?", unit.known.patient)
        if not unit.known.patient or not persons:
            raise RefusedError(Reason.NO_LABEL, "no patient of FHIR has this identifier")
        if len(persons) > 1:
            raise RefusedError(Reason.CONFLICTING_LABELS, f"{len(persons)} patients of FHIR have this identifier")
        self._found = True
        names = self._names_of(persons[0][0])
        self._base.executemany("UPDATE studies SET named = 1 WHERE subject = ?", [(name,) for name in names])
        studies = [
            study
            for study in self._rows(
                _STUDIES_BY_KEY,
                unit.known.study,
            )
            if study[1] in names
        ]
        if studies:
            return (fact for study in studies for fact in self._of_study(study))
        days = (f"{unit.known.month}-01", f"{unit.known.month}-31") if unit.known.month else None
        facts = (fact for fact in self._facts(names) if fact.kind == "Condition")
        return (seen for fact in facts for seen in fact.at(days, same_encounter=False))

    def _person(self, subject: bytes) -> int | None:
        """The patient that a resource is about; None if FHIR has no such patient."""
        persons = self._rows("SELECT person FROM names WHERE name = ?", subject)
        if len(persons) > 1:
            raise RefusedError(Reason.CONFLICTING_LABELS, f"{len(persons)} patients of FHIR have this identifier")
        return int(persons[0][0]) if persons else None

    def _names_of(self, person: int) -> list[bytes]:
        """The names of a patient that no other patient has."""
        names = self._rows(
            "SELECT name FROM names WHERE person = ? AND NOT EXISTS"
            " (SELECT 1 FROM names AS other WHERE other.name = names.name AND other.person != names.person)",
            person,
        )
        return [name for (name,) in names]

    def _facts(self, names: Iterable[bytes]) -> list[_Fact]:
        """All that is coded of a patient, whichever of its names the resources use."""
        rows = [
            row
            for name in names
            for row in self._rows(
                "SELECT fact, kind, encounter, class, codes, sure, began_first, began_last, ended_first, ended_last,"
                " EXISTS (SELECT 1 FROM fact_studies WHERE fact_studies.fact = facts.fact)"
                " FROM facts WHERE subject = ?",
                name,
            )
        ]
        return [
            _Fact(number, kind, encounter, name, tuple(json.loads(codes)), bool(sure), days[:2], days[2:], bool(refers))
            for number, kind, encounter, name, codes, sure, *days, refers in rows
        ]

    def _check_patient(self, unit: Unit, studies: Iterable[Sequence[Any]]) -> None:
        """Refuse studies of several patients, and of another than the image's where the site file says how to tell."""
        subjects = {study[1] for study in studies}
        if len({self._person(subject) or subject for subject in subjects}) > 1:
            raise RefusedError(Reason.CONFLICTING_LABELS, "studies of several patients in FHIR have this name")
        if self._labels.identifier is None or not unit.known.patient:
            return
        for subject in subjects:
            aliases = self._rows("SELECT alias FROM aliases JOIN names USING (person) WHERE name = ?", subject)
            if aliases and (unit.known.patient,) not in aliases:
                raise RefusedError(Reason.CONFLICTING_LABELS, "the study in FHIR is of another patient than the image")

    def _decided(self, facts: Iterable[_Fact]) -> Label:
        found = list(facts)
        sure = {fact.name for fact in found if fact.sure}
        open_ = {fact.name for fact in found} - sure
        if len(sure) > 1:
            codes = sorted({code for fact in found if fact.sure for code in fact.codes})
            raise RefusedError(Reason.CONFLICTING_LABELS, f"{', '.join(sorted(sure))}: {', '.join(codes)}")
        if open_:
            raise RefusedError(Reason.UNCERTAIN_LABEL, f"{', '.join(sorted(open_))}: provisional, or its time is open")
        if sure:
            return Label(sure.pop(), tuple(sorted({code for fact in found for code in fact.codes})))
        if self._labels.otherwise is None:
            raise RefusedError(Reason.NO_LABEL, "no code of a class")
        return Label(self._labels.otherwise)

    def _rows(self, query: str, *values: Any) -> list[Any]:
        return self._base.execute(query, values).fetchall()

    # --- of a resource

    def _take(self, file: Path, line: int, names: Sequence[str], resource: Mapping[str, Any]) -> None:
        kind = resource["resourceType"]
        take = {"Patient": self._patient, "ImagingStudy": self._study}.get(kind)
        take = self._fact if kind in self._labels.resources else take
        if take is None:
            return
        self.summary.resources[kind] += 1
        try:
            take(resource, [self._name(name) for name in names], f"{file.name}:{line}")
        except WrongField as error:
            raise DataError(f"{file}:{line}, {kind}.{error} is not as in FHIR R4", "export it again") from None

    def _patient(self, patient: Mapping[str, Any], names: Sequence[bytes], place: str) -> None:
        given = [(text(each, "system"), text(each, "value")) for each in many(patient, "identifier")]
        wanted = self._labels.identifier
        values = {value for system, value in given if value and wanted in {None, system}}
        aliases = sorted(self._keys.patient(unicodedata.normalize("NFC", value)) for value in values)
        written = json.dumps(aliases)
        for name in names:
            for (seen,) in self._rows("SELECT identifiers FROM persons JOIN names USING (person) WHERE name = ?", name):
                if seen != written:
                    raise DataError(
                        f"{place}: two patients with different identifiers have one name",
                        "keep the data of each server in a folder of its own",
                    )  # fmt: skip
                return
        number = self._base.execute("INSERT INTO persons (identifiers) VALUES (?)", (written,)).lastrowid
        known_by = [*names, *(self._name(f"identifier:{alias}") for alias in aliases)]
        self._base.executemany("INSERT OR IGNORE INTO names VALUES (?, ?)", [(name, number) for name in known_by])
        self._base.executemany("INSERT OR IGNORE INTO aliases VALUES (?, ?)", [(alias, number) for alias in aliases])

    def _study(self, study: Mapping[str, Any], names: Sequence[bytes], place: str) -> None:
        if text(study, "status") in _FALSE:
            return
        first, last = days_of(text(study, "started")) or (None, None)
        row = (self._subject(study), self._reference(study, "encounter"), first, last, place)
        number = self._base.execute(
            "INSERT INTO studies (subject, encounter, first, last, place) VALUES (?, ?, ?, ?, ?)", row
        ).lastrowid
        self._base.executemany("INSERT OR IGNORE INTO study_names VALUES (?, ?)", [(name, number) for name in names])
        named = [key for each in many(study, "identifier") for key in self._study_keys(each)]
        self._base.executemany("INSERT OR IGNORE INTO study_keys VALUES (?, ?)", [(key, number) for key in named])

    def _study_keys(self, identifier: Mapping[str, Any]) -> Iterator[str]:
        system, value = text(identifier, "system"), text(identifier, "value")
        if value.startswith("urn:oid:") or system == "urn:dicom:uid":
            yield str(self._keys.uid(value.removeprefix("urn:oid:")))
        coded = [text(coding, "code") for coding in many(one(identifier, "type"), "coding")]
        if value and (system == self._labels.accession if self._labels.accession else "ACSN" in coded):
            yield self._keys.accession(unicodedata.normalize("NFC", value.strip()))

    def _fact(self, resource: Mapping[str, Any], names: Sequence[bytes], place: str) -> None:  # noqa: ARG002 (as others)
        kind = str(resource["resourceType"])
        status = status_of(resource, "verificationStatus") if kind == "Condition" else text(resource, "status")
        if status in _FALSE:
            return
        by_class: dict[str, set[str]] = {}
        for code in self._codes(resource):
            for label in self._classed(code):
                by_class.setdefault(label.name, set()).update({code, *label.codes})
        if not by_class:
            return
        began, ended = course(resource) if kind == "Condition" else (ALWAYS, ALWAYS)
        subject, encounter = self._subject(resource), self._reference(resource, "encounter")
        about = [self._name(name) for name in studies_of(resource)]
        sure = status in _SURE or (kind == "Condition" and not status)
        for name, codes in by_class.items():
            self.summary.classes[name] += 1
            row = (kind, subject, encounter, name, json.dumps(sorted(codes)), sure, *began, *ended)
            number = self._base.execute(
                "INSERT INTO facts (kind, subject, encounter, class, codes, sure, began_first, began_last, ended_first,"
                " ended_last) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                row,
            ).lastrowid
            self._base.executemany(
                "INSERT OR IGNORE INTO fact_studies VALUES (?, ?)", [(number, each) for each in about]
            )

    def _codes(self, resource: Mapping[str, Any]) -> list[str]:
        """The codes of a resource that say something of the patient; each once."""
        found = {}
        for concept in concepts(resource):
            for coding in many(concept, "coding"):
                system, code = text(coding, "system"), text(coding, "code")
                if code:
                    scheme = scheme_of(system)
                    found[f"{scheme}:{code}" if ":" not in scheme and scheme else f"{scheme}|{code}"] = coding
        for code, coding in found.items():
            self.summary.meanings.setdefault(code, text(coding, "display"))
        return list(found)

    def _classed(self, code: str) -> Iterator[Label]:
        try:
            yield labelled(code, self._labels.classes, self._terms)
        except RefusedError as error:
            if error.reason is Reason.UNMAPPED_CODE:
                self.summary.unmapped[code] += 1

    def _subject(self, resource: Mapping[str, Any]) -> bytes:
        reference = self._reference(resource, "subject")
        if reference is not None:
            return reference
        identifier = one(one(resource, "subject"), "identifier")
        if self._labels.identifier in {None, text(identifier, "system")} and text(identifier, "value"):
            value = unicodedata.normalize("NFC", text(identifier, "value"))
            return self._name(f"identifier:{self._keys.patient(value)}")
        raise WrongField("subject")

    def _reference(self, resource: Mapping[str, Any], key: str) -> bytes | None:
        reference = text(one(resource, key), "reference")
        if reference.startswith("#"):
            # It stands within the resource, and is known to no other.
            return self._name(f"{reference} {next(self._contained)}")
        return self._name(local(reference)) if reference else None

    def _name(self, name: str) -> bytes:
        return keyed(self._keys.names, "reference", name)[:12]


@dataclass(frozen=True)
class _Fact:
    """A class that a resource gives its patient, and when: the days between which it began, and ended."""

    number: int
    kind: str
    encounter: bytes | None
    name: str
    codes: tuple[str, ...]
    sure: bool
    began: Sequence[str]
    ended: Sequence[str]
    refers: bool

    def at(self, days: Days | None, *, same_encounter: bool) -> Iterator[_Fact]:
        """The condition if it is active on days, or may be: then it is not sure."""
        if same_encounter:
            yield self
        elif days is None:
            yield self._open()
        elif self.began[0] <= days[1] and self.ended[1] >= days[0]:
            certain = self.began[1] <= days[0] and self.ended[0] >= days[1]
            yield self if certain else self._open()

    def _open(self) -> _Fact:
        return replace(self, sure=False)


def _files(folder: Path) -> list[Path]:
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in {".json", ".ndjson"} and path.is_file())
    if not found:
        raise DataError(f"{folder} holds no .json and no .ndjson file", "check labels.path in the site file")
    return found
