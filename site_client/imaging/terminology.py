"""A site's map: its own codes, the standard codes that mean the same, and the classes of the plan.

Rules:
  * A map is data: strict YAML, one entry a local code; an unknown key, a code without a scheme or a local code that
    stands twice is fatal, and told with its line.
  * A standard code means one class. A code may have none: it is known, and no class of any plan.
  * Nothing is guessed: codes are compared as they are written, letter by letter.
  * What agrees between sites is class to standard codes; local codes are each site's own, and its digest tells them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from locum.common.canonical import digest
from locum.common.errors import DataError
from locum.common.names import suggestion
from locum.common.plan import Coded, Word
from locum.common.yaml_source import Source, YamlError, read_yaml
from locum.site_client.imaging.labels.given import Label
from locum.site_client.imaging.reasons import Reason, RefusedError

#: The code systems of FHIR that are written with a short scheme here (HL7 FHIR R4, section 4.3; PS3.16 section 8).
SYSTEMS: Mapping[str, str] = {
    "http://snomed.info/sct": "SCT",
    "http://loinc.org": "LOINC",
    "http://hl7.org/fhir/sid/icd-10": "ICD10",
    "http://hl7.org/fhir/sid/icd-10-cm": "ICD10CM",
    "http://fhir.de/CodeSystem/bfarm/icd-10-gm": "ICD10GM",
    "http://hl7.org/fhir/sid/icd-9-cm": "ICD9CM",
    "http://www.radlex.org": "RADLEX",
    "http://radlex.org": "RADLEX",
    "http://dicom.nema.org/resources/ontology/DCM": "DCM",
    "urn:oid:2.16.840.1.113883.6.96": "SCT",
    "urn:oid:2.16.840.1.113883.6.1": "LOINC",
    "urn:oid:2.16.840.1.113883.6.3": "ICD10",
    "urn:oid:2.16.840.1.113883.6.90": "ICD10CM",
    "urn:oid:2.16.840.1.113883.6.256": "RADLEX",
    "urn:oid:1.2.840.10008.2.16.4": "DCM",
}
#: Other designators of the same code systems in DICOM (PS3.16 table 8-1), by that used here.
_DESIGNATORS: Mapping[str, str] = {
    "LN": "LOINC",
    "I10": "ICD10",
    "I10C": "ICD10CM",
    "I9C": "ICD9CM",
}


def scheme_of(designator: str) -> str:
    """The scheme used here for a coding scheme designator of DICOM or a system of FHIR; itself if it is none."""
    return SYSTEMS.get(designator, _DESIGNATORS.get(designator.upper(), designator))


def _listed(value: object) -> object:
    return (value,) if isinstance(value, str) else value


def _text(value: object) -> object:
    if isinstance(value, bool | int | float):
        raise ValueError(f"YAML reads this as {value!r}: write it in quotation marks")  # noqa: TRY004 (pydantic)
    return value.strip() if isinstance(value, str) else value


class Entry(BaseModel):
    """One local code.

    Attributes:
        local: as the site's systems write it.
        codes: the standard codes that mean the same, SCHEME:CODE; written `code`, one or several.
        meaning: in words.
        name: the class of the plan, written `class`; None if the code is none of any class.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    local: Annotated[str, BeforeValidator(_text), StringConstraints(min_length=1, max_length=256)]
    codes: Annotated[tuple[Coded, ...], BeforeValidator(_listed), Field(alias="code", min_length=1)]
    meaning: Annotated[str, StringConstraints(min_length=1, max_length=256)]
    name: Annotated[Word | None, Field(alias="class")] = None


class Terminology(BaseModel):
    """A site's map.

    Attributes:
        name: of the map.
        version: of the map, as its author counts.
        source: where the standard codes were looked up, for a reader.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: Word
    version: Annotated[str, StringConstraints(min_length=1, max_length=64)]
    source: str = ""
    entries: Annotated[tuple[Entry, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _each_once(self) -> Terminology:
        _refuse_twice(self.entries)
        _refuse_two_classes(self.entries)
        return self

    @classmethod
    def load(cls, path: Path) -> Terminology:
        """Read a map.

        Raises:
            DataError: the file cannot be read or is not as described; the message names the line.
        """
        try:
            document = read_yaml(path)
        except OSError as error:
            raise DataError(
                f"the terminology map {path} cannot be read: {error.strerror}", "check its path in the site file"
            ) from None
        except YamlError as error:
            raise DataError(f"the terminology map {path} is no YAML: {error}", "mend that line") from None
        if not isinstance(document.data, dict):
            raise DataError(f"{path} is no terminology map", "it needs: name, version, entries")
        try:
            return cls.model_validate(document.data)
        except ValidationError as error:
            raise _mistake(path, document, error) from None

    def lookup(self, code: str) -> Entry | None:
        """The entry of a local code, or of a standard code written SCHEME:CODE; None if the map has neither."""
        return self._by_local.get(code) or self._by_standard.get(code)

    def codes_by_class(self) -> dict[str, tuple[str, ...]]:
        """Class to the standard codes that mean it, sorted."""
        found: dict[str, set[str]] = {}
        for entry in self.entries:
            if entry.name is not None:
                found.setdefault(entry.name, set()).update(entry.codes)
        return {name: tuple(sorted(codes)) for name, codes in sorted(found.items())}

    def unmapped(self, codes: Iterable[str]) -> tuple[str, ...]:
        """Those codes that the map does not know, sorted."""
        return tuple(sorted({code for code in codes if self.lookup(code) is None}))

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the map's canonical JSON, the entries in the order of their local codes."""
        written = self.model_dump(mode="json", by_alias=True)
        written["entries"] = sorted(written["entries"], key=lambda entry: str(entry["local"]))
        return digest(written)

    @cached_property
    def _by_local(self) -> dict[str, Entry]:
        return {entry.local: entry for entry in self.entries}

    @cached_property
    def _by_standard(self) -> dict[str, Entry]:
        return {code: entry for entry in reversed(self.entries) for code in entry.codes}


def labelled(code: str, classes: Mapping[str, str] | None, terminology: Terminology | None) -> Label:
    """What a code of the site's says: by `classes` if it names the code, else by the map; else the code is the class.

    Raises:
        RefusedError: unmapped_code: there are classes or a map and neither knows the code; no_label: the map knows the
            code as none of any class.
    """
    entry = terminology.lookup(code) if terminology is not None else None
    if classes is not None and code in classes:
        return Label(classes[code], entry.codes if entry is not None else ())
    if entry is not None and entry.name is None:
        raise RefusedError(Reason.NO_LABEL, f"{code} has no class in the map")
    if entry is not None and entry.name is not None:
        return Label(entry.name, entry.codes)
    if classes is None and terminology is None:
        return Label(code)
    raise RefusedError(Reason.UNMAPPED_CODE, code)


def _refuse_twice(entries: Iterable[Entry]) -> None:
    seen: dict[str, int] = {}
    for number, entry in enumerate(entries):
        first = seen.setdefault(entry.local, number)
        if first != number:
            raise ValueError(f"entries {first + 1} and {number + 1}: the local code '{entry.local}' stands twice")


def _refuse_two_classes(entries: Iterable[Entry]) -> None:
    """A standard code under two classes, or a local code that is another entry's standard code, cannot be looked up."""
    names: dict[str, tuple[int, str | None]] = {}
    for number, entry in enumerate(entries):
        for code in {*entry.codes, entry.local}:
            first, name = names.setdefault(code, (number, entry.name))
            if name != entry.name:
                raise ValueError(f"entries {first + 1} and {number + 1}: {code} is both '{name}' and '{entry.name}'")


def _mistake(path: Path, document: Source, error: ValidationError) -> DataError:
    """The first thing wrong with a map: its line and key."""
    # A misspelt key is two errors, unknown and missing: the first of them helps.
    first = min(error.errors(), key=lambda found: found["type"] != "extra_forbidden")
    place = first["loc"]
    key = ".".join(str(part) for part in place) or "the file as a whole"
    text = first["msg"].removeprefix("Value error, ")
    message = f"{path}, line {_line(document, place, text)}, {key}: {text}"
    if first["type"] == "extra_forbidden":
        return DataError(message, suggestion(str(place[-1]), _keys(place)))
    if first["type"] == "string_pattern_mismatch" and "code" in place:
        return DataError(message, "write SCHEME:CODE, such as SCT:4147007 or RADLEX:RID3874")
    return DataError(message, "mend it in the map")


def _line(document: Source, place: tuple[Any, ...], text: str) -> int:
    # What is wrong between two entries has no place of its own: it is told at the second of them.
    if not place and text.startswith("entries "):
        return document.line(("entries", int(text.split()[3].rstrip(":")) - 1))
    return document.line(place)


def _keys(place: tuple[Any, ...]) -> tuple[str, ...]:
    model = Entry if len(place) > 1 else Terminology
    return tuple(field.alias or name for name, field in model.model_fields.items())
