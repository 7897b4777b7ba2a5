"""A small DICOMweb server that can be told to misbehave: it lies about counts, breaks off, stalls, says anything."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from tests.orthanc import Study

BOUNDARY = "a-boundary"
#: Handles a request instead of the server, if it returns True.
Twist = Callable[["Request"], bool]


class Request(BaseHTTPRequestHandler):
    """One request, with the means to answer it."""

    protocol_version = "HTTP/1.1"
    server: Any

    @property
    def place(self) -> str:
        """The path below the root of DICOMweb."""
        return urlsplit(self.path).path.removeprefix("/dicom-web/")

    def do_GET(self) -> None:
        pacs: WebPacs = self.server.pacs
        pacs.asked.append(self.place)
        try:
            if not any(twist(self) for twist in pacs.twists):
                pacs.answer(self)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def reply(self, body: bytes, kind: str, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def reply_json(self, content: Any) -> None:
        self.reply(json.dumps(content).encode(), "application/dicom+json")

    def reply_parts(self, parts: Sequence[bytes], *, ends: bool = True) -> None:
        """Without a length and without chunks, as Orthanc does it: only the closing line tells that it is whole."""
        self.send_response(200)
        self.send_header("Content-Type", f'multipart/related; type="application/dicom"; boundary={BOUNDARY}')
        self.send_header("Connection", "close")
        self.end_headers()
        for part in parts:
            self.wfile.write(f"--{BOUNDARY}\r\nContent-Type: application/dicom\r\n\r\n".encode() + part + b"\r\n")
        if ends:
            self.wfile.write(f"--{BOUNDARY}--\r\n".encode())
        self.close_connection = True

    def log_message(self, format: str, *arguments: object) -> None:  # noqa: A002 (the base class has it)
        """Nothing."""


@dataclass
class WebPacs:
    """The server's content and manners.

    Attributes:
        said: a study's or series' number of images as it is told; None tells none.
        listed: the images of a series at instance level, by their indices.
        twists: asked in turn before the server answers itself.
        asked: the paths of all requests.
    """

    port: int
    studies: list[Study] = field(default_factory=list)
    said: Callable[[Study], int | None] = lambda study: study.slices
    listed: Callable[[Study], Sequence[int]] = lambda study: range(study.slices)
    twists: list[Twist] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)

    def source(self, **keys: Any) -> dict[str, Any]:
        return {"kind": "dicomweb", "url": f"http://127.0.0.1:{self.port}/dicom-web", "rate": 100_000, **keys}

    def answer(self, request: Request) -> None:
        place = request.place
        if place == "studies":
            request.reply_json(self._studies(parse_qs(urlsplit(request.path).query)))
        elif found := re.fullmatch(r"studies/([\d.]+)/series", place):
            request.reply_json([self._series(study) for study in self.studies if study.uid == found[1]])
        elif found := re.fullmatch(r"studies/[\d.]+/series/([\d.]+)/instances", place):
            study = self._of(found[1])
            request.reply_json([_element({"00080018": study.sop(n), "00080016": study.image(n).SOPClassUID})
                                for n in self.listed(study)])  # fmt: skip
        elif found := re.fullmatch(r"studies/[\d.]+/series/([\d.]+)/instances/([\d.]+)", place):
            request.reply_parts([self.content(self._of(found[1]), found[2])])
        else:
            request.reply_parts(self._of(place.rpartition("/")[2]).files())

    def content(self, study: Study, sop: str) -> bytes:
        return study.files()[int(sop.rpartition(".")[2]) - 1 - study.first]

    def _of(self, series: str) -> Study:
        return next(study for study in self.studies if study.series_uid == series)

    def _studies(self, query: dict[str, list[str]]) -> list[dict[str, Any]]:
        wanted = query.get("AccessionNumber") or query.get("00080050")
        by_uid: dict[str, list[Study]] = {}
        for study in self.studies:
            if wanted is None or study.accession in wanted:
                by_uid.setdefault(study.uid, []).append(study)
        first = int(query.get("offset", ["0"])[0])
        answers = []
        for uid, series in list(by_uid.items())[first : first + int(query.get("limit", ["1000"])[0])]:
            said = [self.said(study) for study in series]
            numbers = [number for number in said if number is not None]
            answers.append(_element({"0020000D": uid, "00080020": series[0].day,
                                     "00201208": sum(numbers) if len(numbers) == len(said) else None}))  # fmt: skip
        return answers

    def _series(self, study: Study) -> dict[str, Any]:
        return _element({"0020000E": study.series_uid, "00080060": study.modality, "00180015": study.body_part,
                         "00201209": self.said(study)})  # fmt: skip


def _element(values: dict[str, Any]) -> dict[str, Any]:
    return {tag: {"vr": "LO", "Value": [value]} for tag, value in values.items() if value is not None}


@contextmanager
def web_pacs(*studies: Study, **manners: Any) -> Iterator[WebPacs]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Request)
    server.daemon_threads = True
    pacs = WebPacs(server.server_address[1], list(studies), **manners)
    server.pacs = pacs  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield pacs
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
