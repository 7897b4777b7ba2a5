"""FHIR R4 in JSON (https://hl7.org/fhir/R4): resources of a file one by one, and the few fields that labels need.

Rules:
  * A field of another form than FHIR has it is an error that names the field and never its value.
  * A bundle is read as a whole, to 256 MiB; of NDJSON one line at a time.
  * A date means all the days that it can mean, as it is written: a year is 365 or 366 of them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from locum.common.errors import DataError

#: The longest bundle, and the longest line, that is read as a whole: bytes.
_LONGEST_BUNDLE, _LONGEST_LINE = 256 << 20, 32 << 20
#: Condition.clinicalStatus of what is over, though it may not be said since when.
_OVER = {"inactive", "remission", "resolved"}
#: A date or a dateTime (FHIR R4, section 2.24.0.1): to the year, the month, the day, or with a time.
_DATE = re.compile(r"(\d{4}(?:-\d\d(?:-\d\d)?)?)(?:T.*)?")
#: The first and the last day that a date can mean, YYYY-MM-DD.
Days = tuple[str, str]
ALWAYS: Days = ("0000-01-01", "9999-12-31")


class WrongField(ValueError):
    """A field of a resource that is not as FHIR has it; the message names the field and not its value."""


def resources(file: Path) -> Iterator[tuple[int, list[str], dict[str, Any]]]:
    """Of each resource in a file: its line (in a bundle the number of the entry), the names it goes by, and itself."""
    try:
        for line, url, resource in _lines(file) if file.suffix.lower() == ".ndjson" else _entries(file):
            if not isinstance(resource, dict) or not isinstance(resource.get("resourceType"), str):
                raise DataError(f"{file}:{line} is no FHIR resource", "export it again as FHIR R4 in JSON")
            kind, name = text(resource, "resourceType"), text(resource, "id")
            yield line, [each for each in (f"{kind}/{name}" if name else "", local(url)) if each], resource
    except WrongField as error:
        raise DataError(f"{file}: a resource's {error} is not as in FHIR R4", "export it again") from None
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}", "mend its access rights") from None


def _lines(file: Path) -> Iterator[tuple[int, str, Any]]:
    with file.open("rb") as stream:
        number = 0
        while content := stream.readline(_LONGEST_LINE + 1):
            number += 1
            if len(content) > _LONGEST_LINE:
                raise DataError(f"{file}:{number} is longer than 32 MiB", "export one resource a line")
            if content.strip():
                yield number, "", _json(file, number, content)


def _entries(file: Path) -> Iterator[tuple[int, str, Any]]:
    if file.stat().st_size > _LONGEST_BUNDLE:
        raise DataError(f"{file} is larger than 256 MiB", "export it as NDJSON, one resource a line")
    whole = _json(file, 1, file.read_bytes())
    if not isinstance(whole, dict) or whole.get("resourceType") != "Bundle":
        yield 1, "", whole
        return
    try:
        entries = many(whole, "entry")
        found = [(text(entry, "fullUrl"), entry["resource"]) for entry in entries if "resource" in entry]
    except WrongField as error:
        raise DataError(f"{file}: Bundle.{error} is not as in FHIR R4", "export it again") from None
    del whole, entries
    yield from ((number, url, resource) for number, (url, resource) in enumerate(found, start=1))


def _json(file: Path, line: int, content: bytes) -> Any:
    try:
        return json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise DataError(f"{file}:{line} is not UTF-8", "export it again as JSON in UTF-8") from None
    except (json.JSONDecodeError, RecursionError):
        raise DataError(f"{file}:{line} is no JSON", "export it again; a line of NDJSON holds one resource") from None


def concepts(resource: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """What a resource says of the patient: of a condition its code, of a report its conclusions.

    Of an observation it is the value where that is coded; its own code where the value is `true`, or where it has none
    and none is missing (the finding is there). A number, a `false` and a panel say nothing of the kind.
    """
    kind = resource["resourceType"]
    if kind == "Condition":
        return [one(resource, "code")]
    if kind == "DiagnosticReport":
        return many(resource, "conclusionCode")
    if "valueCodeableConcept" in resource:
        return [one(resource, "valueCodeableConcept")]
    valued = [
        key for key in resource if key.startswith("value") or key in {"dataAbsentReason", "component", "hasMember"}
    ]
    present = not valued or (valued == ["valueBoolean"] and resource["valueBoolean"] is True)
    return [one(resource, "code")] if present else []


def studies_of(resource: Mapping[str, Any]) -> list[str]:
    """The imaging studies that an observation or a report refers to."""
    keys = {"DiagnosticReport": ["imagingStudy"], "Observation": ["derivedFrom", "partOf", "focus"]}
    found = [each for key in keys.get(resource["resourceType"], []) for each in many(resource, key)]
    return [local(name) for each in found if (name := text(each, "reference")) and _may_be_study(each, name)]


def _may_be_study(reference: Mapping[str, Any], name: str) -> bool:
    kind = text(reference, "type") or ("" if name.startswith("urn:") else local(name).partition("/")[0])
    return kind in {"", "ImagingStudy"}


def course(condition: Mapping[str, Any]) -> tuple[Days, Days]:
    """The days between which a condition began, and those between which it ended; never is 9999-12-31."""
    recorded = days_of(text(condition, "recordedDate"))
    began = _when(condition, "onset") or (ALWAYS[0], recorded[1] if recorded else ALWAYS[1])
    ended = _when(condition, "abatement")
    if ended is None:
        told = any(key.startswith("abatement") for key in condition) or status_of(condition, "clinicalStatus") in _OVER
        ended = (ALWAYS[0] if told else ALWAYS[1], ALWAYS[1])
    return began, ended


def _when(condition: Mapping[str, Any], key: str) -> Days | None:
    period = one(condition, f"{key}Period")
    first = days_of(text(condition, f"{key}DateTime") or text(period, "start"))
    last = days_of(text(period, "end")) or first
    return None if first is None or last is None else (first[0], last[1])


def days_of(date: str) -> Days | None:
    """The days that a FHIR date or dateTime can mean, as it is written: the time zone is not applied."""
    if not date:
        return None
    written = _DATE.fullmatch(date)
    if not written:
        raise WrongField("date")
    day = written[1]
    return day + "-01-01"[len(day) - 4 :], day + "-12-31"[len(day) - 4 :]


def status_of(resource: Mapping[str, Any], key: str) -> str:
    """The code of a status that is a CodeableConcept; empty if it is not stated."""
    codes = [text(coding, "code") for coding in many(one(resource, key), "coding")]
    return codes[0] if codes else ""


def local(reference: str) -> str:
    """A reference without its server and version: such as Patient/1, or a URN."""
    reference = reference.partition("/_history/")[0]
    return reference.lower() if reference.startswith("urn:") else "/".join(reference.split("/")[-2:])


def text(of: Mapping[str, Any], key: str) -> str:
    """A field that is a text, stripped; empty if it is absent. Raises WrongField."""
    value = of.get(key)
    if value is None:
        return ""
    if not isinstance(value, str) or (not value.isascii() and any("\ud800" <= each <= "\udfff" for each in value)):
        raise WrongField(key)
    return value.strip()


def one(of: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """A field that has fields of its own; empty if it is absent. Raises WrongField."""
    value = of.get(key)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise WrongField(key)
    return value


def many(of: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    """A field that is a list, each with fields of its own; empty if it is absent. Raises WrongField."""
    value = of.get(key)
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
        raise WrongField(key)
    return value
