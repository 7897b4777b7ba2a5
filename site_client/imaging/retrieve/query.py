"""What a query asks of a PACS, in words that every PACS understands.

Rules:
  * Few keys are sent, those that every PACS matches: the rest is compared here, where the answer is known.
  * An accession number with a wildcard (PS3.4 C.2.2.2.4) is refused: it would name the studies of others.
  * What a series does not say is not held against it: its images are asked when they come.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from locum.common.errors import DataError
from locum.site_client.imaging.retrieve.peer import Series, Study
from locum.site_client.imaging.sources import Query

#: SH (PS3.5 6.2): at most 16 characters; PACSs that take more exist, so the bound is that of LO.
_LONGEST = 64


def study_keys(query: Query) -> Iterator[Mapping[str, str]]:
    """The matching keys of each question at study level, by keyword; together they name all that is wanted.

    Raises:
        DataError: as :func:`accession_numbers`.
    """
    days = {} if query.dates is None else {"StudyDate": f"{query.dates[0]:%Y%m%d}-{query.dates[1]:%Y%m%d}"}
    if query.accessions is not None:
        for number in accession_numbers(query.accessions):
            yield {"AccessionNumber": number, **days}
        return
    # Several values in one key are a list only for UIDs (PS3.4 C.2.2.2.2): one question a modality.
    for modality in query.modalities or ("",):
        yield {**({"ModalitiesInStudy": modality} if modality else {}), **days}


def accession_numbers(path: Path) -> Sequence[str]:
    """The numbers of a list, each once, in its order.

    Raises:
        DataError: the list cannot be read or is empty, or a line can be no accession number.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise DataError(f"the list {path} cannot be read: {error.strerror}", "mend its access rights") from None
    except UnicodeDecodeError:
        raise DataError(f"the list {path} is not in UTF-8", "save it as UTF-8 text") from None
    numbers = dict.fromkeys(_number(path, place, line.strip()) for place, line in enumerate(lines, 1) if line.strip())
    if not numbers:
        raise DataError(f"the list {path} names no accession number", "write one a line")
    return tuple(numbers)


def _number(path: Path, place: int, text: str) -> str:
    if len(text) > _LONGEST or any(mark in text for mark in "*?\\\t;,") or not text.isprintable():
        raise DataError(
            f"{path}, line {place}: this is no accession number", "write one number a line, and nothing else in it"
        )
    return text


def is_named(query: Query, study: Study) -> bool:
    """Whether a study is of the days and of the number asked for, as far as its answer says.

    Orthanc for one takes A1 and a1 for the same number.
    """
    other = bool(study.asked and study.accession and study.asked != study.accession)
    return not other and (query.dates is None or study.day is None or query.dates[0] <= study.day <= query.dates[1])


def named(query: Query, studies: Iterable[Study]) -> list[Study]:
    """Those of the studies that the query names, each once."""
    found: dict[str, Study] = {}
    for study in studies:
        if is_named(query, study):
            found.setdefault(study.uid, study)
    return list(found.values())


def has_kind(query: Query, series: Series) -> bool:
    """Whether a series is of the modalities and body parts asked for, as far as its answer says."""
    return all(
        not wanted or not said or said.upper() in {word.upper() for word in wanted}
        for wanted, said in ((query.modalities, series.modality), (query.body_parts, series.body_part))
    )


def is_outside(query: Query, modality: str, body_part: str) -> bool:
    """Whether an image is not of the modalities and body parts asked for: at last it is itself that says so."""
    return any(
        bool(wanted) and said.upper() not in {word.upper() for word in wanted}
        for wanted, said in ((query.modalities, modality), (query.body_parts, body_part))
    )
