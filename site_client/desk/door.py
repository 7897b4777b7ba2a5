"""The desk's door: who may ask, and what a browser may do with the answers.

Rules:
  * A request counts only if its Host is this desk's own address: a name that was bent to 127.0.0.1 (DNS rebinding) gets
    nothing. It counts only with the cookie that the one-time token of the start was exchanged for.
  * A change is a POST of a small form from a page of this desk: Origin, Sec-Fetch-Site and a token in the form say so.
  * Pages run this package's own scripts and load nothing from elsewhere (Content-Security-Policy); nothing is cached,
    no other origin is answered (no CORS).
  * A refusal says nothing of the data, and every refusal is decided before a page is looked for.
"""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from dataclasses import dataclass, field
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import parse_qs

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

ENTER = "/enter"
_MOST_FORM = 16 << 10
_MOST_TARGET = 4 << 10
_MOST_HEADERS = 16 << 10
#: The viewer draws with WebGL, and keeps fonts and pictures of its own in data: and blob: addresses.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self';"
    " frame-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
)
#: A report that the desk shows in a frame: its own styles and pictures, no script, no form.
REPORT_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none';"
    " frame-ancestors 'self'; sandbox allow-same-origin allow-top-navigation-by-user-activation"
)
_HEADERS = {
    b"content-security-policy": _POLICY.encode(),
    b"cache-control": b"no-store",
    b"cross-origin-opener-policy": b"same-origin",
    b"cross-origin-resource-policy": b"same-origin",
    b"permissions-policy": b"camera=(), geolocation=(), microphone=()",
    b"referrer-policy": b"same-origin",  # with none at all, a browser's own forms would have the Origin null
    b"x-content-type-options": b"nosniff",
}


class RefusedRequest(Exception):
    """A request that gets no page: an HTTP status and a sentence."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status
        self.sentence = sentence


@dataclass
class Pass:
    """The secrets of one run of the desk.

    Attributes:
        token: in the link that the start prints; it opens the door once.
        session: in the cookie that a browser then has.
        csrf: in every form.
    """

    token: str | None = field(default_factory=lambda: secrets.token_urlsafe(32))
    session: str = field(default_factory=lambda: secrets.token_urlsafe(32))
    csrf: str = field(default_factory=lambda: secrets.token_urlsafe(32))

    def exchange(self, token: str) -> bool:
        """Whether this is the token, the first time that it is shown."""
        if self.token is None or not hmac.compare_digest(self.token.encode(), token.encode()):
            return False
        self.token = None
        return True


@dataclass(frozen=True)
class Door:
    """ASGI middleware before the pages.

    Attributes:
        app: the pages.
        port: of the desk.
        keys: the secrets of this run.
    """

    app: App
    port: int
    keys: Pass

    @property
    def cookie(self) -> str:
        """The name of the cookie: a browser has one jar for all ports of a machine, and two desks may be open."""
        return f"locum-desk-{self.port}"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Lets a request through, or answers it."""
        if scope["type"] != "http":
            return
        hardened = _hardened(send)
        try:
            if scope["path"] == ENTER:
                await _answer(hardened, 200, self._enter(scope), cookie=f"{self.cookie}={self.keys.session}")
                return
            self._check(scope)
            body = await _form(scope, receive) if scope["method"] == "POST" else b""
            if scope["method"] == "POST":
                self._check_form(body)
        except RefusedRequest as refused:
            await _answer(hardened, refused.status, refused.sentence)
            return
        await self.app(scope, _again(body, receive) if scope["method"] == "POST" else receive, hardened)

    def _enter(self, scope: Scope) -> str:
        """Exchanges the token for the cookie."""
        self._check_address(scope)
        if scope["method"] != "GET":
            raise RefusedRequest(405, "A link is opened with GET.")
        given = parse_qs(scope["query_string"].decode("latin-1")).get("token", [""])[0]
        if not self.keys.exchange(given):
            raise RefusedRequest(403, "This link was used before, or is of another start: start locum site desk again.")
        return ""

    def _check(self, scope: Scope) -> None:
        self._check_address(scope)
        if scope["method"] not in {"GET", "POST"}:
            raise RefusedRequest(405, "The desk knows GET and POST.")
        if not hmac.compare_digest(_cookie(scope, self.cookie).encode(), self.keys.session.encode()):
            raise RefusedRequest(403, "Open the desk by the link that locum site desk printed.")

    def _check_address(self, scope: Scope) -> None:
        if _header(scope, b"host") not in {f"127.0.0.1:{self.port}", f"localhost:{self.port}"}:
            raise RefusedRequest(421, "The desk answers at its own address only.")
        if len(scope["raw_path"]) + len(scope["query_string"]) > _MOST_TARGET:
            raise RefusedRequest(414, "The address is too long.")
        if sum(len(name) + len(value) for name, value in scope["headers"]) > _MOST_HEADERS:
            raise RefusedRequest(431, "The headers are too long.")

    def _check_form(self, body: bytes) -> None:
        try:
            given = parse_qs(body.decode("ascii"), max_num_fields=16).get("csrf", [""])[0]
        except ValueError:
            raise RefusedRequest(400, "This is no form of the desk.") from None
        if not hmac.compare_digest(given.encode(), self.keys.csrf.encode()):
            raise RefusedRequest(403, "The form is not of this desk: open the page again.")


async def _form(scope: Scope, receive: Receive) -> bytes:
    """The body of a POST, of limited size and from one of our own pages."""
    if _header(scope, b"origin") not in {"", f"http://{_header(scope, b'host')}"}:
        raise RefusedRequest(403, "The form comes from another page.")
    if _header(scope, b"sec-fetch-site") not in {"", "same-origin"}:
        raise RefusedRequest(403, "The form comes from another page.")
    if _header(scope, b"content-type").partition(";")[0].strip() != "application/x-www-form-urlencoded":
        raise RefusedRequest(415, "This is no form of the desk.")
    body = bytearray()
    while True:
        message = await receive()
        body += message.get("body", b"")
        if len(body) > _MOST_FORM:
            raise RefusedRequest(413, "The form is too large.")
        if not message.get("more_body", False):
            return bytes(body)


def _again(body: bytes, receive: Receive) -> Receive:
    """What was received, once more for the pages, and then what comes after it."""
    waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receiving() -> Message:
        return waiting.pop() if waiting else await receive()

    return receiving


def _header(scope: Scope, name: bytes) -> str:
    """A header's one value; empty if it is absent, and a value that fits nothing if it is there twice."""
    found = [value for key, value in scope["headers"] if key == name]
    return found[0].decode("latin-1") if len(found) == 1 else "\0" if found else ""


def _cookie(scope: Scope, name: str) -> str:
    try:
        morsel = SimpleCookie(_header(scope, b"cookie")).get(name)
    except CookieError:
        return ""
    return morsel.value if morsel is not None else ""


def _hardened(send: Send) -> Send:
    """Sends an answer with the desk's headers; those that the answer brings itself stay."""

    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            own = {key.lower() for key, _ in message.get("headers", [])}
            added = [(key, value) for key, value in _HEADERS.items() if key not in own]
            message = {**message, "headers": [*message.get("headers", []), *added]}
        await send(message)

    return sending


async def _answer(send: Send, status: int, sentence: str, *, cookie: str = "") -> None:
    # A page that goes on by itself, and no redirection: after one from elsewhere a strict cookie would not be sent.
    onward = '<meta http-equiv="refresh" content="0; url=/">' if status == 200 else ""
    body = (
        f'<!doctype html><html lang="en"><meta charset="utf-8">{onward}<title>Locum</title><p>{sentence}</p>'.encode()
    )
    headers = [(b"content-type", b"text/html; charset=utf-8"), (b"content-length", str(len(body)).encode())]
    if status == 200:
        headers.append((b"set-cookie", f"{cookie}; HttpOnly; SameSite=Strict; Path=/".encode()))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def fields_of(body: bytes) -> Mapping[str, str]:
    """The fields of a form; of one that is there twice the first."""
    return {name: values[0] for name, values in parse_qs(body.decode("ascii"), keep_blank_values=True).items()}
