"""The parts of a retrieval that need no PACS: multipart, queries, pace, fetching ahead."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from datetime import date
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from locum.common.errors import DataError
from locum.site_client.imaging.retrieve import ahead
from locum.site_client.imaging.retrieve.ahead import fetched
from locum.site_client.imaging.retrieve.arrival import unusable
from locum.site_client.imaging.retrieve.multipart import BrokenOffError, MultipartError, media_type, parts
from locum.site_client.imaging.retrieve.pace import Pace, wait_after
from locum.site_client.imaging.retrieve.peer import Series, SeriesError, Study, Take, Want
from locum.site_client.imaging.retrieve.query import accession_numbers, has_kind, is_named, is_outside, study_keys
from locum.site_client.imaging.sources import Query

_BOUNDARY = "b0"
_PARTS = st.lists(st.binary(max_size=300).filter(lambda part: b"--b0" not in part), max_size=5)


def _message(contents: list[bytes]) -> bytes:
    return b"".join(b"--b0\r\nX: y\r\n\r\n" + content + b"\r\n" for content in contents) + b"--b0--\r\n"


def _chunks(message: bytes, size: int) -> Iterator[bytes]:
    return (message[place : place + size] for place in range(0, len(message), size))


@given(_PARTS, st.integers(1, 700))
def test_parts_are_the_same_however_the_answer_is_cut(contents: list[bytes], size: int) -> None:
    assert list(parts(_chunks(_message(contents), size), _BOUNDARY, 1000)) == contents


@given(_PARTS.filter(bool), st.data())
def test_an_answer_that_is_cut_short_gives_whole_parts_only(contents: list[bytes], data: st.DataObject) -> None:
    message = _message(contents)
    length = data.draw(st.integers(0, len(message) - 5))
    seen = []
    with pytest.raises(BrokenOffError):
        seen += list(_seen(parts(iter([message[:length]]), _BOUNDARY, 1000), seen))
    assert seen == contents[: len(seen)]


def _seen(stream: Iterator[bytes], seen: list[bytes]) -> Iterator[bytes]:
    for part in stream:
        seen.append(part)
        yield from ()


@given(st.lists(st.binary(max_size=40), max_size=20))
def test_any_bytes_end_in_parts_or_a_multipart_error(chunks: list[bytes]) -> None:
    with suppress(MultipartError):
        list(parts(iter(chunks), _BOUNDARY, 100))


def test_a_part_that_is_too_large_is_not_read_to_its_end() -> None:
    read = 0

    def endless() -> Iterator[bytes]:
        nonlocal read
        yield b"--b0\r\n\r\n"
        while True:
            read += 1000
            yield b"x" * 1000

    with pytest.raises(MultipartError, match="more than 5000 bytes in one part"):
        list(parts(endless(), _BOUNDARY, 5000))
    assert read < 10_000


def test_a_preamble_is_passed_over_within_a_bound() -> None:
    assert list(parts(iter([b"This is multipart.\r\n", _message([b"one"])]), _BOUNDARY, 100)) == [b"one"]
    with pytest.raises(MultipartError):
        list(parts((b"x" * 1000 for _ in range(1000)), _BOUNDARY, 100))


def test_the_kind_and_boundary_of_an_answer() -> None:
    assert media_type('multipart/related; type="application/dicom"; boundary="a b"') == ("multipart/related", "a b")
    assert media_type("Multipart/Related; Boundary=x") == ("multipart/related", "x")
    assert media_type("") == ("text/plain", "")


def test_no_more_instances_a_second_than_told() -> None:
    now = 100.0
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds + 0.001  # a sleep always lasts a little too long
        slept.append(seconds)

    pace = Pace(10, clock=lambda: now, sleep=sleep)
    times = []
    for _ in range(50):
        pace.take()
        times.append(now)
    assert all(later - earlier >= 1 - 0.05 for earlier, later in zip(times, times[10:], strict=False))
    assert times[-1] - times[0] == pytest.approx(4.9, abs=0.06)


def test_an_idle_hour_is_not_made_up_for() -> None:
    now = 0.0
    slept: list[float] = []
    pace = Pace(10, clock=lambda: now, sleep=slept.append)
    pace.take()
    now = 3600.0
    for _ in range(5):
        pace.take()
    assert sum(slept) >= 0.5


def test_waits_double_and_a_pacs_is_obeyed_within_reason() -> None:
    assert [wait_after(number, 0) for number in (1, 2, 3, 4)] == [0.5, 1, 2, 4]
    assert wait_after(20, 0) == 60
    assert wait_after(1, 30) == 30
    assert wait_after(1, 1e9) == 600


def test_the_keys_that_are_asked(tmp_path: Path) -> None:
    assert list(study_keys(Query())) == [{}]
    assert list(study_keys(Query(modalities=("CT", "MR"), dates=(date(2024, 1, 2), date(2024, 3, 4))))) == [
        {"ModalitiesInStudy": "CT", "StudyDate": "20240102-20240304"},
        {"ModalitiesInStudy": "MR", "StudyDate": "20240102-20240304"},
    ]
    numbers = tmp_path / "numbers"
    numbers.write_bytes("\ufeffA 1\r\n\r\n  B-2 \r\nA 1\r\n".encode())
    assert list(study_keys(Query(accessions=numbers, modalities=("CT",)))) == [
        {"AccessionNumber": "A 1"},
        {"AccessionNumber": "B-2"},
    ]


@pytest.mark.parametrize("line", ["A*", "A?", "A\\B", "A\tB", "A;B", "A,B", "A" * 65, "A\x00"])
def test_a_line_that_could_name_other_studies_is_refused_by_its_number(tmp_path: Path, line: str) -> None:
    numbers = tmp_path / "numbers"
    numbers.write_text(f"GOOD\n{line}\n", encoding="utf-8")
    with pytest.raises(DataError, match="numbers, line 2: this is no accession number") as raised:
        accession_numbers(numbers)
    assert line not in raised.value.message


@pytest.mark.parametrize(("content", "words"), [(b"", "names no accession number"), (b"\xff\xfeA\x00", "not in UTF-8")])
def test_a_list_that_is_none_is_refused(tmp_path: Path, content: bytes, words: str) -> None:
    numbers = tmp_path / "numbers"
    numbers.write_bytes(content)
    with pytest.raises(DataError, match=words):
        accession_numbers(numbers)


def test_what_a_pacs_answers_beyond_the_query_is_left_out() -> None:
    query = Query(modalities=("CT",), body_parts=("CHEST",), dates=(date(2024, 1, 1), date(2024, 1, 31)))
    assert is_named(query, Study("1", day=date(2024, 1, 31)))
    assert is_named(query, Study("1"))
    assert not is_named(query, Study("1", day=date(2024, 2, 1)))
    assert is_named(query, Study("1", accession="A1", asked="A1"))
    assert is_named(query, Study("1", asked="A1"))
    assert not is_named(query, Study("1", accession="a1", asked="A1"))
    series = Series("1", "2", "CT", "Chest")
    assert has_kind(query, series)
    assert has_kind(query, replace(series, body_part=""))
    assert not has_kind(query, replace(series, modality="MR"))
    assert not is_outside(query, "CT", "chest")
    assert is_outside(query, "CT", "")


WANTS = [Want(Series("1", str(number))) for number in range(4)]


def test_events_come_in_order_with_failures_in_their_place() -> None:
    def fetch(want: Want, take: Take) -> None:
        take(want.series.uid.encode())
        if want is WANTS[2]:
            raise SeriesError("no")

    with fetched(fetch, WANTS, 1) as events:
        seen = [(event.want.series.uid, event.content, str(event.error or "")) for event in events]
    assert seen == [
        entry for uid in "0123" for entry in ((uid, uid.encode(), ""), (uid, None, "no" if uid == "2" else ""))
    ]


def test_whoever_stops_listening_stops_the_threads() -> None:
    before = set(threading.enumerate())

    def endless(want: Want, take: Take) -> None:
        while True:
            take(b"x" * 1000)

    with fetched(endless, WANTS, 2) as events:
        next(events)
    assert set(threading.enumerate()) <= before


def test_what_is_fetched_ahead_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "MOST_BYTES", 10_000)
    waiting, most = 0, 0

    def fetch(want: Want, take: Take) -> None:
        nonlocal waiting, most
        for _ in range(100):
            take(b"x" * 1000)
            waiting += 1
            most = max(most, waiting)

    with fetched(fetch, WANTS[:1], 1) as events:
        for event in events:
            if event.content is not None:
                waiting -= 1
    assert most <= 11


def test_an_error_of_our_own_is_raised_where_events_are_read() -> None:
    def fetch(want: Want, take: Take) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), fetched(fetch, WANTS, 1) as events:
        list(events)


# --- what is kept of an object that nothing reads


def test_of_a_class_that_somebody_made_up_no_number_is_kept() -> None:
    made_up = unusable("sop", "1.2.826.19480905.4711", "study")
    known = unusable("sop", "1.2.840.10008.5.1.4.1.1.104.1", "study")
    assert not re.search(r"\d", made_up.detail)
    assert known.detail.endswith("1.2.840.10008.5.1.4.1.1.104.1")
