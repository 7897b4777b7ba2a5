"""The desk is for one person at one browser of this machine: everybody else, and every other page, gets nothing."""

from __future__ import annotations

import socket
from pathlib import Path
from urllib.parse import urlencode

import pytest

FORM = {"Content-Type": "application/x-www-form-urlencoded"}


@pytest.fixture(scope="module")
def desk(filled, open_desk):
    with open_desk(filled.store) as opened:
        yield opened.enter()


@pytest.fixture
def stranger(desk):
    """Somebody at the same machine without the cookie."""
    return type(desk)(desk.process, desk.link)


PATHS = ("/", "/quarantine", "/cases", "/readiness", "/static/niivue.umd.js", "/decide", "/nothing", "/volumes/x.nii")


def test_the_link_opens_the_desk_once(filled, open_desk):
    with open_desk(filled.store) as opened:
        path = opened.link.removeprefix(opened.base)
        status, headers, _ = opened.ask(path)
        assert status == 200
        assert headers["set-cookie"].endswith("; HttpOnly; SameSite=Strict; Path=/")
        status, headers, _ = opened.ask(path)
        assert (status, "set-cookie" in headers) == (403, False)


def test_another_token_does_not_open_it(filled, open_desk):
    with open_desk(filled.store) as opened:
        for query in ("", "?token=", "?token=wrong", "?token=%00", "?other=1"):
            status, headers, _ = opened.ask(f"/enter{query}")
            assert (status, "set-cookie" in headers) == (403, False)
        assert opened.enter().ask("/")[0] == 200, "and the right one still does"


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "cookie", ["", "locum-desk-{port}=wrong", "locum-desk-{port}=", "other=1", "locum-desk-{port}=\x01;=;"]
)
def test_nothing_is_shown_without_the_cookie(stranger, filled, path, cookie):
    stranger.cookie = cookie.format(port=stranger.port)
    status, _, body = stranger.ask(path)
    assert status == 403
    assert str(filled.store).encode() not in body


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "127.0.0.1",
        "127.0.0.1:1",
        "localhost.evil.example:{port}",
        "[::1]:{port}",
        "127.0.0.2:{port}",
        "",
    ],
)
def test_a_name_that_was_bent_to_this_machine_gets_nothing(desk, host):
    status, _, body = desk.ask("/", headers={"Host": host.format(port=desk.port)})
    assert status in {400, 421}
    assert b"north" not in body


def test_two_hosts_are_refused(desk):
    with socket.create_connection(("127.0.0.1", desk.port), timeout=30) as connection:
        hosts = f"Host: 127.0.0.1:{desk.port}\r\nHost: evil.example\r\n"
        connection.sendall(f"GET / HTTP/1.1\r\n{hosts}Cookie: {desk.cookie}\r\nConnection: close\r\n\r\n".encode())
        assert connection.recv(100).split()[1] in {b"400", b"421"}


def test_it_listens_on_loopback_only(desk):
    listening = {
        (line.split()[1].partition(":")[0])
        for table in ("tcp", "tcp6")
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]
        if int(line.split()[1].partition(":")[2], 16) == desk.port and line.split()[3] == "0A"
    }
    assert listening == {"0100007F"}, "127.0.0.1 in the byte order of /proc/net/tcp"


@pytest.mark.parametrize("path", ["/", "/quarantine", "/nothing", "/static/desk.css", "/static/nothing", "/enter"])
def test_every_answer_forbids_what_pages_need_not(desk, path):
    _, headers, _ = desk.ask(path)
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "script-src 'self';" in policy
    assert not any(word in policy for word in ("unsafe-inline", "unsafe-eval", "http", "*"))
    assert headers["cache-control"] == "no-store"
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "same-origin"
    assert not any(name.startswith("access-control-") for name in headers), "no other origin may read"


def form(desk, **fields: str) -> bytes:
    return urlencode({"csrf": desk.csrf(), "decision": "reject", "by": "x", "unit": "nothing", **fields}).encode()


def test_a_form_without_its_token_changes_nothing(desk):
    for wrong in ("", "x", "\x00"):
        status, _, _ = desk.ask("/decide", method="POST", headers=FORM, body=form(desk, csrf=wrong))
        assert status == 403


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:1"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ],
)
def test_a_form_of_another_page_changes_nothing(desk, headers):
    status, _, _ = desk.ask("/decide", method="POST", headers={**FORM, **headers}, body=form(desk))
    assert status == 403


@pytest.mark.parametrize("kind", ["application/json", "multipart/form-data; boundary=x", "text/plain", ""])
def test_another_kind_of_body_is_refused(desk, kind):
    status, _, _ = desk.ask("/decide", method="POST", headers={"Content-Type": kind}, body=form(desk))
    assert status == 415


def test_what_is_too_large_is_refused(desk):
    large = form(desk, by="x" * 20_000)
    assert desk.ask("/decide", method="POST", headers=FORM, body=large)[0] == 413
    chunked = {**FORM, "Transfer-Encoding": "chunked"}
    assert (
        desk.ask("/decide", method="POST", headers=chunked, body=b"5000\r\n" + b"a" * 0x5000 + b"\r\n0\r\n\r\n")[0]
        == 413
    )
    assert desk.ask("/quarantine?reason=" + "x" * 5000)[0] == 414
    assert desk.ask("/" + "x" * 5000)[0] == 414
    assert desk.ask("/", headers={"X-Large": "x" * 20_000})[0] == 431
    assert desk.ask("/", headers={"X-Large": "x" * 90_000})[0] in {400, 431}
    assert desk.ask("/")[0] == 200, "and it still answers"


@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT", "HEAD", "BREW"])
def test_other_methods_are_refused(desk, method):
    assert desk.ask("/", method=method)[0] in {400, 405}


TRAVERSALS = (
    "/static/../door.py",
    "/static/..%2fdoor.py",
    "/static/%2e%2e/door.py",
    "/static/....//door.py",
    "/static//etc/passwd",
    "/static/layout.html.j2",
    "/static/",
    "/static",
    "/volumes/../catalog.sqlite",
    "/volumes/..%2f..%2fcatalog.sqlite%00.nii",
    "/volumes/%2fetc%2fpasswd.nii",
    "/masks/..%2fcatalog.nii",
    "/reports/..%2fcatalog.sqlite",
    "/reports/..%2fsplit.key",
    "/reports/%2e%2e%2fcatalog.sqlite",
    "/pictures/..%2f..%2fetc%2fpasswd",
    "/quarantine/..%2f..%2fetc%2fpasswd",
    "/cases/..%2f..%2fetc%2fpasswd",
    "//etc/passwd",
    "/%00",
    "/\\..\\..\\etc\\passwd",
)


@pytest.mark.parametrize("path", TRAVERSALS)
def test_no_file_is_opened_by_its_name(desk, filled, path):
    (filled.store / "readiness").mkdir(exist_ok=True)
    status, _, body = desk.ask(path)
    assert status in {400, 404, 409}
    assert not any(word in body for word in (b"root:", b"SQLite format", b"import ", b"{%"))


def test_a_link_in_the_folder_of_reports_is_not_followed(desk, filled):
    (filled.store / "readiness").mkdir(exist_ok=True)
    link = filled.store / "readiness" / "stolen.html"
    link.symlink_to(filled.store / "catalog.sqlite")
    try:
        assert desk.ask("/reports/stolen.html")[0] == 409
    finally:
        link.unlink()


def test_requests_that_are_no_requests_do_not_end_it(desk):
    for raw in (b"\x16\x03\x01\x02\x00", b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"\x00" * 5000, b""):
        with socket.create_connection(("127.0.0.1", desk.port), timeout=30) as connection:
            connection.sendall(raw)
    assert desk.ask("/")[0] == 200


def test_a_second_desk_at_the_same_port_is_told(desk, filled):
    from typer.testing import CliRunner

    from locum.common.errors import RunError
    from locum.site_client.cli import app

    result = CliRunner().invoke(app, ["desk", "--store", str(filled.store), "--port", str(desk.port), "--no-browser"])
    assert isinstance(result.exception, RunError)
    assert f"port {desk.port} cannot be used" in result.exception.message


def test_a_store_without_a_catalog_is_told(tmp_path):
    from typer.testing import CliRunner

    from locum.common.errors import DataError
    from locum.site_client.cli import app

    result = CliRunner().invoke(app, ["desk", "--store", str(tmp_path), "--no-browser"])
    assert isinstance(result.exception, DataError)
