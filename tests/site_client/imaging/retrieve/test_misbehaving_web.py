"""DICOMweb servers that lie, break off, stall or answer anything: nothing lost, nothing twice, one clear message."""

from __future__ import annotations

import gzip
import socket
import time
from dataclasses import replace

import pytest
import requests

from locum.common.errors import DataError
from locum.site_client.imaging.reasons import Reason
from locum.site_client.imaging.retrieve.peer import AwayError
from locum.site_client.imaging.sources import load_site
from tests.orthanc import PLANTED, Authority, Study, free_port
from tests.site_client.imaging.retrieve.conftest import Site, reasons
from tests.site_client.imaging.retrieve.web import BOUNDARY, Request, Twist, web_pacs

STUDY = Study(200, slices=6)


def is_series(request: Request) -> bool:
    """Whether a whole series is asked for."""
    return request.place.count("/") == 3 and request.place.startswith("studies/")


def is_image(request: Request, study: Study = STUDY, index: int | None = None) -> bool:
    """Whether a single image is asked for."""
    if index is None:
        return "/instances/" in request.place
    return request.place.endswith(f"/instances/{study.sop(index)}")


def once(twist: Twist) -> Twist:
    """A twist of the first request that it takes."""
    done: list[bool] = []

    def first(request: Request) -> bool:
        if done or not twist(request):
            return False
        done.append(True)
        return True

    return first


def breaks_off(request: Request) -> bool:
    """Sends three images and half of a fourth, and closes the connection as if it were done."""
    if not is_series(request):
        return False
    files = STUDY.files()
    request.reply_parts([*files[:3], files[3][: len(files[3]) // 2]], ends=False)
    return True


def test_a_server_that_behaves_is_asked_once_for_each_series(site: Site) -> None:
    with web_pacs(STUDY, replace(STUDY, series=2, slices=2)) as pacs:
        assert reasons(site.retrieve(pacs.source())) == [None] * 8
        assert len([place for place in pacs.asked if place.count("/") == 3]) == 2
        assert not [place for place in pacs.asked if "instances" in place]


def test_broken_off_in_mid_series_it_goes_on_with_what_is_missing(site: Site) -> None:
    with web_pacs(STUDY, twists=[once(breaks_off)]) as pacs:
        assert reasons(site.retrieve(pacs.source())) == [None] * 6
        assert len([place for place in pacs.asked if "/instances/" in place]) == 3
    assert site.waits == [0.5]


def test_half_an_image_is_never_taken_for_a_whole_one(site: Site) -> None:
    with web_pacs(STUDY, twists=[breaks_off, lambda request: is_image(request) and _error(request, 500)]) as pacs:
        items = site.retrieve(pacs.source())
    assert [item.refused for item in items] == [
        (Reason.INCOMPLETE_STUDY, "images not given: 3 (the PACS answers with HTTP 500)")
    ] * 3
    assert {item.size for item in items} == {item.path.stat().st_size for item in items}


def _error(request: Request, status: int, **headers: str) -> bool:
    request.reply(b"no", "text/plain", status, **headers)
    return True


def test_a_busy_server_is_left_alone_as_long_as_it_asks(site: Site) -> None:
    busy = [once(lambda request: _error(request, 503, Retry_After="7")) for _ in range(2)]
    later = once(lambda request: is_series(request) and _error(request, 429, Retry_After="3"))
    with web_pacs(STUDY, twists=[*busy, later]) as pacs:
        assert reasons(site.retrieve(pacs.source())) == [None] * 6
    assert site.waits == [7.0, 7.0, 3.0]


def test_a_server_that_stays_busy_is_one_error_and_what_came_stays(site: Site) -> None:
    away: list[bool] = []

    def goes_away(request: Request) -> bool:
        return bool(away) and _error(request, 503)

    def leaves(request: Request) -> bool:
        if is_series(request):
            away.append(True)
            request.reply_parts(STUDY.files()[:3], ends=False)
        return is_series(request)

    with web_pacs(STUDY, twists=[goes_away, leaves]) as pacs:
        with pytest.raises(AwayError, match=rf"^the PACS 127.0.0.1:{pacs.port} is too busy or away \(HTTP 503\)$"):
            site.retrieve(pacs.source())
        assert len(site.items()) == 2
        assert site.waits == [0.5, 1.0, 2.0, 4.0]
        pacs.twists.clear()
        before = {item.name: item for item in site.items()}
        after = {item.name: item for item in site.retrieve(pacs.source())}
    assert reasons(list(after.values())) == [None] * 6
    assert {name: after[name].mtime_ns for name in before} == {name: item.mtime_ns for name, item in before.items()}


def test_a_server_that_is_down_is_one_error_that_names_it(site: Site) -> None:
    port = free_port()
    source = {"kind": "dicomweb", "url": f"http://127.0.0.1:{port}/dicom-web"}
    with pytest.raises(AwayError, match=rf"127.0.0.1:{port} cannot be reached, or broke off \(Connection refused\)"):
        site.retrieve(source)
    assert site.waits == [0.5, 1.0, 2.0, 4.0]


def test_a_server_that_says_nothing_counts_as_away(site: Site) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        source = {"kind": "dicomweb", "url": f"http://127.0.0.1:{silent.getsockname()[1]}/dicom-web", "timeout": 0.1}
        with pytest.raises(AwayError, match=r"did not answer within 0.1 s"):
            site.retrieve(source)


def test_one_that_stalls_in_mid_series_is_asked_again(site: Site) -> None:
    def stalls(request: Request) -> bool:
        if is_series(request):
            request.reply_parts(STUDY.files()[:2], ends=False)
            request.wfile.flush()
            time.sleep(0.6)
        return is_series(request)

    with web_pacs(STUDY, twists=[once(stalls)]) as pacs:
        assert reasons(site.retrieve(pacs.source(timeout=0.2))) == [None] * 6


@pytest.mark.parametrize("told", [True, False])
def test_fewer_images_than_said_make_the_study_incomplete_until_they_come(site: Site, told: bool) -> None:
    whole = Study(201)
    with web_pacs(STUDY, whole, said=lambda study: study.slices + (study is STUDY)) as pacs:
        if not told:
            pacs.listed = lambda study: range(study.slices) if study is whole else ()
        items = site.retrieve(pacs.source())
        lacking = (Reason.INCOMPLETE_STUDY, "images not given: 1")
        by_study = {item.known.study: item.refused for item in items if item.known}
        assert by_study == {site.keys.uid(STUDY.uid): lacking, site.keys.uid(whole.uid): None}
        pacs.studies[0] = grown = replace(STUDY, slices=7)
        pacs.said = pacs.listed = lambda study: 7 if study is grown else study.slices  # type: ignore[assignment]
        pacs.listed = lambda study: range(study.slices)
        assert reasons(site.retrieve(pacs.source())) == [None] * 11


def test_a_study_that_has_more_than_its_series_is_incomplete(site: Site) -> None:
    with web_pacs(STUDY) as pacs:
        pacs.twists.append(lambda request: request.place == "studies" and _one_study(request, said=9))
        items = site.retrieve(pacs.source())
    assert {item.refused for item in items} == {(Reason.INCOMPLETE_STUDY, "images not given: 3")}


def _one_study(request: Request, said: int) -> bool:
    offset = "offset=0" in request.path
    values = {"0020000D": {"vr": "UI", "Value": [STUDY.uid]}, "00201208": {"vr": "IS", "Value": [said]}}
    request.reply_json([values] if offset else [])
    return True


def test_more_images_than_said_are_taken(site: Site) -> None:
    with web_pacs(STUDY, said=lambda study: study.slices - 2) as pacs:
        assert reasons(site.retrieve(pacs.source())) == [None] * 6
        site.told.clear()
        assert reasons(site.retrieve(pacs.source())) == [None] * 6
        assert site.told == []


def test_without_counts_images_are_counted_one_by_one(site: Site) -> None:
    with web_pacs(STUDY, said=lambda study: None) as pacs:
        assert reasons(site.retrieve(pacs.source())) == [None] * 6
        pacs.studies[0] = replace(STUDY, slices=8)
        pacs.asked.clear()
        assert reasons(site.retrieve(pacs.source())) == [None] * 8
        assert len([place for place in pacs.asked if "/instances/" in place]) == 2


def test_without_counts_and_lists_a_series_is_taken_as_it_comes(site: Site) -> None:
    with web_pacs(STUDY, said=lambda study: None, listed=lambda study: ()) as pacs:
        assert reasons(site.retrieve(pacs.source())) == [None] * 6


def test_an_image_that_always_breaks_off_holds_up_no_other(site: Site) -> None:
    other = Study(202)

    def stumbles(request: Request) -> bool:
        if is_image(request, index=2):
            request.reply_parts([STUDY.files()[2][:200]], ends=False)
        return is_image(request, index=2)

    def series_breaks(request: Request) -> bool:
        if is_series(request) and request.place.endswith(STUDY.series_uid):
            request.reply_parts([*STUDY.files()[:2], STUDY.files()[2][:200]], ends=False)
            return True
        return False

    with web_pacs(STUDY, other, twists=[stumbles, series_breaks]) as pacs:
        items = site.retrieve(pacs.source())
    by_study = {item.known.study: item.refused for item in items if item.known}
    assert by_study[site.keys.uid(other.uid)] is None
    assert by_study[site.keys.uid(STUDY.uid)] == (
        Reason.INCOMPLETE_STUDY,
        "images not given: 1 (the PACS breaks off in mid-image)",
    )
    assert len(items) == 5 + 4


@pytest.mark.parametrize(("length", "reason"), [(90, Reason.UNREADABLE), (400, Reason.INCOMPLETE_HEADER)])
def test_a_damaged_image_is_recorded_and_asked_for_again(site: Site, length: int, reason: Reason) -> None:
    damaged = STUDY.files()[2][:length]

    def damages(request: Request) -> bool:
        if is_series(request):
            files = STUDY.files()
            request.reply_parts([*files[:2], damaged, *files[3:]])
        return is_series(request)

    with web_pacs(STUDY, twists=[damages]) as pacs:
        items = site.retrieve(pacs.source())
        broken = [item for item in items if item.refused]
        assert reasons(broken) == [reason]
        assert len(items) == 6
        # It is held to be of the series and the patient of its neighbours, so that the series is spoilt.
        assert {item.known for item in items} == {broken[0].known}
        assert reasons(site.retrieve(pacs.source())) == [None] * 6


@pytest.mark.parametrize("garbage", [b"", b"\0" * 4000, b"DICM" * 99, b"\0" * 128 + b"DICM" + b"\xff" * 300])
def test_garbage_for_an_image_is_a_reason_and_no_crash(site: Site, garbage: bytes) -> None:
    def spoils(request: Request) -> bool:
        if is_series(request):
            request.reply_parts([*STUDY.files()[:5], garbage])
        return is_series(request)

    with web_pacs(STUDY, twists=[spoils]) as pacs:
        assert reasons(site.retrieve(pacs.source())).count(None) == 5
        assert {*reasons(site.items())} & {Reason.UNREADABLE, Reason.INCOMPLETE_HEADER}


def test_images_of_another_series_are_passed_over(site: Site) -> None:
    other = Study(203)

    def mixes(request: Request) -> bool:
        if is_series(request):
            request.reply_parts([*STUDY.files(), *other.files()])
        return is_series(request)

    with web_pacs(STUDY, twists=[mixes]) as pacs:
        items = site.retrieve(pacs.source())
    assert reasons(items) == [None] * 6
    assert {item.known.study for item in items if item.known} == {site.keys.uid(STUDY.uid)}


def test_a_series_without_end_is_given_up(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("locum.site_client.imaging.retrieve.pacs._BESIDES", 20)
    sent: list[int] = []

    def endless(request: Request) -> bool:
        if is_series(request):
            for _ in range(100):
                request.reply_parts(STUDY.files()[:1], ends=False) if not sent else request.wfile.write(
                    f"--{BOUNDARY}\r\n\r\n".encode() + STUDY.files()[0] + b"\r\n"
                )
                sent.append(1)
        return is_series(request)

    with web_pacs(STUDY, twists=[endless]) as pacs:
        assert reasons(site.retrieve(pacs.source())) == [None] * 6
        assert [place.count("/instances/") for place in pacs.asked][-5:] == [1] * 5


def test_an_image_that_comes_twice_is_there_once(site: Site) -> None:
    def stutters(request: Request) -> bool:
        if is_series(request):
            request.reply_parts([file for file in STUDY.files() for _ in range(2)])
        return is_series(request)

    with web_pacs(STUDY, twists=[stutters]) as pacs:
        assert reasons(site.retrieve(pacs.source())) == [None] * 6
    assert [step.done for step in site.told] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("level", ["query", "series"])
def test_what_http_compresses_is_refused_unread(site: Site, level: str) -> None:
    bomb = gzip.compress(b"\0" * (8 << 20))

    def compresses(request: Request) -> bool:
        if is_series(request) or level == "query":
            request.reply(bomb, "application/dicom+json", Content_Encoding="gzip")
            return True
        return False

    with (
        web_pacs(STUDY, twists=[compresses]) as pacs,
        pytest.raises(DataError, match="compresses its answers although it is asked not to") as raised,
    ):
        site.retrieve(pacs.source())
    assert raised.value.remedy == "switch HTTP compression off there, or in the proxy before it"


def test_an_answer_to_a_query_is_bounded(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("locum.site_client.imaging.retrieve.dicomweb._MOST_ANSWER", 1000)
    with (
        web_pacs(*(Study(number) for number in range(210, 240))) as pacs,
        pytest.raises(DataError, match="answers a query with more than 1000 bytes in one answer"),
    ):
        site.retrieve(pacs.source())


def test_an_image_is_bounded(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("locum.site_client.imaging.retrieve.dicomweb.MAX_INSTANCE", 100_000)
    large = Study(204, slices=2, shape=(256, 256))
    with web_pacs(STUDY, large) as pacs:
        items = site.retrieve(pacs.source())
    assert reasons(items) == [None] * 6


@pytest.mark.parametrize(
    ("kind", "body", "words"),
    [
        ("text/html", b"<html>please log in", "text/html instead of DICOM"),
        ("multipart/related", b"--x\r\n\r\n", "malformed multipart: no boundary"),
        (
            f"multipart/related; boundary={BOUNDARY}",
            f"--{BOUNDARY}\r\n".encode() + b"h" * 70_000,
            "malformed multipart",
        ),
    ],
)
def test_a_server_that_gives_no_dicom_is_one_error(site: Site, kind: str, body: bytes, words: str) -> None:
    def answers(request: Request) -> bool:
        if is_series(request) or is_image(request):
            request.reply(body, kind)
            return True
        return False

    with (
        web_pacs(STUDY, twists=[answers]) as pacs,
        pytest.raises(DataError, match="gives nothing of what it names") as raised,
    ):
        site.retrieve(pacs.source())
    assert words in raised.value.message
    assert not [word for word in PLANTED if word in raised.value.message + raised.value.remedy]


@pytest.mark.parametrize(
    "body", [b"<html>", b"[" * 100_000, b'"text"', b"7", b'[{"0020000D": {"Value": ["../../x"]}}]']
)
def test_an_answer_that_is_no_list_of_studies_is_one_error(site: Site, body: bytes) -> None:
    def answers(request: Request) -> bool:
        request.reply(body, "application/dicom+json")
        return True

    with (
        web_pacs(STUDY, twists=[answers]) as pacs,
        pytest.raises(AwayError, match="answers a query with something that is no"),
    ):
        site.retrieve(pacs.source())


@pytest.mark.parametrize(
    ("status", "kind", "words"),
    [
        (401, DataError, r"does not let this site in \(HTTP 401\)"),
        (403, DataError, r"does not let this site in \(HTTP 403\)"),
        (404, DataError, r"has no DICOMweb at this address \(HTTP 404\)"),
        (500, AwayError, r"answers with HTTP 500"),
    ],
)
def test_a_refusal_is_told_with_its_remedy(site: Site, status: int, kind: type[Exception], words: str) -> None:
    with (
        web_pacs(STUDY, twists=[lambda request: _error(request, status)]) as pacs,
        pytest.raises(kind, match=words),
    ):
        site.retrieve(pacs.source())


def test_a_study_whose_series_cannot_be_listed_holds_up_no_other(site: Site) -> None:
    other = Study(205)

    def fails(request: Request) -> bool:
        return request.place == f"studies/{STUDY.uid}/series" and _error(request, 500)

    with web_pacs(STUDY, other, twists=[fails]) as pacs:
        assert reasons(site.retrieve(pacs.source())) == [None] * 4


@pytest.mark.parametrize("manner", ["pages", "ignores the offset"])
def test_studies_come_page_by_page(site: Site, monkeypatch: pytest.MonkeyPatch, manner: str) -> None:
    monkeypatch.setattr("locum.site_client.imaging.retrieve.dicomweb._PAGE", 3)
    studies = [Study(number, slices=1) for number in range(220, 228)]

    def ignores(request: Request) -> bool:
        if manner == "pages" or request.place != "studies" or "offset=0" in request.path:
            return False
        request.path = "/dicom-web/studies"
        return False

    with web_pacs(*studies, twists=[ignores]) as pacs:
        assert len(site.retrieve(pacs.source())) == 8


def test_no_study_at_all_is_an_error_and_removes_nothing(site: Site) -> None:
    with web_pacs(STUDY) as pacs:
        before = site.retrieve(pacs.source())
        pacs.studies.clear()
        with pytest.raises(DataError, match="names no image for the query"):
            site.retrieve(pacs.source())
    assert site.items() == before


def test_a_password_is_shown_and_not_told(site: Site) -> None:
    seen: list[str] = []

    def looks(request: Request) -> bool:
        seen.append(request.headers["Authorization"])
        return False

    secret = site.store.parent / "password"
    secret.write_text("sesame\n", encoding="utf-8")
    with web_pacs(STUDY, twists=[looks]) as pacs:
        site.retrieve(pacs.source(user="locum", password_file=str(secret)))
        assert set(seen) == {requests.auth._basic_auth_str("locum", "sesame")}
        pacs.twists = [lambda request: _error(request, 401)]
        with pytest.raises(DataError) as raised:
            site.retrieve(pacs.source(user="locum", password_file=str(secret)))
    assert "sesame" not in raised.value.message + raised.value.remedy


def test_no_proxy_of_the_environment_is_used(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{free_port()}")
    with web_pacs(STUDY) as pacs:
        assert reasons(site.retrieve(pacs.source())) == [None] * 6


def test_an_authority_must_be_there(authority: Authority, site: Site) -> None:
    with pytest.raises(DataError, match="does not exist"):
        load_site({"name": "n", "sources": [{"kind": "dicomweb", "url": "https://x", "authority": "/none.pem"}]})
