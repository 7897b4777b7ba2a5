"""A PACS by DICOMweb (PS3.18): QIDO-RS to ask, WADO-RS to fetch, series by series.

Rules:
  * Nothing compressed by HTTP is taken: an answer that unpacks to any size is one way to fill a machine's memory, and
    Orthanc was measured 50 times slower so. What an image's own transfer syntax compresses stays as it is.
  * Answers to questions are bounded and come in pages; images come as a stream, one in memory at a time.
  * An answer that has no proper end has broken off. dicomweb-client's iter_series would hand its last piece over as an
    image, and end at the first image that it cannot parse: so it asks the questions here, and `multipart.py` reads.
  * No proxy and no netrc of the environment: a PACS is in the house.
"""

from __future__ import annotations

import io
import ssl
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import requests
from dicomweb_client import DICOMwebClient
from requests.auth import HTTPBasicAuth
from urllib3.exceptions import HTTPError

from locum.common.errors import DataError
from locum.site_client.imaging.retrieve.multipart import BrokenOffError, MultipartError, media_type, parts
from locum.site_client.imaging.retrieve.peer import (
    MAX_INSTANCE,
    AwayError,
    Instance,
    Series,
    SeriesError,
    Study,
    Take,
    Want,
    day_of,
    proper_uid,
)
from locum.site_client.imaging.retrieve.query import study_keys
from locum.site_client.imaging.sources import DicomWebSource, Query

#: Studies in one page of answers, and what one answer may weigh.
_PAGE, _MOST_ANSWER = 200, 64 << 20
_CHUNK = 256 << 10
_ACCEPT = {"Accept": 'multipart/related; type="application/dicom"; transfer-syntax=*'}
_STUDY_FIELDS = ("StudyInstanceUID", "StudyDate", "AccessionNumber", "NumberOfStudyRelatedInstances")
_SERIES_FIELDS = ("SeriesInstanceUID", "Modality", "BodyPartExamined", "NumberOfSeriesRelatedInstances")
_INSTANCE_FIELDS = ("SOPInstanceUID", "SOPClassUID")
_TAGS = {
    "StudyInstanceUID": "0020000D",
    "StudyDate": "00080020",
    "AccessionNumber": "00080050",
    "NumberOfStudyRelatedInstances": "00201208",
    "SeriesInstanceUID": "0020000E",
    "Modality": "00080060",
    "BodyPartExamined": "00180015",
    "NumberOfSeriesRelatedInstances": "00201209",
    "SOPInstanceUID": "00080018",
    "SOPClassUID": "00080016",
}
_Answer = Mapping[str, Any]


class DicomWeb:
    """See :class:`locum.site_client.imaging.retrieve.peer.Pacs`."""

    at_once = 1
    when_nothing_comes = "see the log of the PACS, and whether its url is that of WADO-RS too"

    def __init__(self, source: DicomWebSource) -> None:
        self._root = source.url.rstrip("/")
        parts_of = urlsplit(self._root)
        self.name = f"the PACS {parts_of.netloc}"
        self._timeout = source.timeout
        self._session = _session(source)
        self._client = DICOMwebClient(
            self._root, self._session, permissive_uid=True, timeout=source.timeout, chunk_size=_CHUNK
        )
        self._client.set_http_retry_params(retry=False)  # the loop tries again, and knows for how long

    def greet(self) -> None:
        """Ask for one study."""
        with self._told():
            self._client.search_for_studies(limit=1)

    def studies(self, query: Query) -> Iterator[Study]:
        """The studies of each question, page by page."""
        for keys in study_keys(query):
            yield from self._pages(keys)

    def _pages(self, keys: Mapping[str, str]) -> Iterator[Study]:
        before: set[str] = set()
        while True:
            page = self._asked(
                self._client.search_for_studies,
                fields=[*_STUDY_FIELDS],
                limit=_PAGE,
                offset=len(before),
                search_filters=dict(keys),
            )
            studies = [self._study(answer, keys.get("AccessionNumber", "")) for answer in page]
            new = [study for study in studies if study.uid not in before]
            yield from new
            # Some give fewer than asked for, some all at once whatever the offset: a page with nothing new ends it.
            if not new:
                return
            before.update(study.uid for study in new)

    def _study(self, answer: _Answer, asked: str) -> Study:
        return Study(
            proper_uid(_text(answer, "StudyInstanceUID"), self.name),
            _whole(answer, "NumberOfStudyRelatedInstances"),
            day_of(_text(answer, "StudyDate")),
            _text(answer, "AccessionNumber"),
            asked,
        )

    def series(self, study: Study) -> Sequence[Series]:
        """All series of a study."""
        answers = self._asked(self._client.search_for_series, study.uid, fields=[*_SERIES_FIELDS])
        found = [
            Series(
                study.uid,
                proper_uid(_text(answer, "SeriesInstanceUID"), self.name),
                _text(answer, "Modality"),
                _text(answer, "BodyPartExamined"),
                _whole(answer, "NumberOfSeriesRelatedInstances"),
            )
            for answer in answers
        ]
        return list({series.uid: series for series in found}.values())

    def instances(self, series: Series) -> Sequence[Instance]:
        """All instances of a series."""
        answers = self._asked(self._client.search_for_instances, series.study, series.uid, fields=[*_INSTANCE_FIELDS])
        found = [
            Instance(proper_uid(_text(answer, "SOPInstanceUID"), self.name), _text(answer, "SOPClassUID"))
            for answer in answers
        ]
        return list({instance.uid: instance for instance in found}.values())

    def _asked(self, question: Callable[..., Any], *place: str, **keys: Any) -> list[_Answer]:
        with self._told():
            answers = question(*place, **keys)
        if isinstance(answers, list) and all(isinstance(answer, Mapping) for answer in answers):
            return answers
        raise AwayError(f"{self.name} answers a query with something that is no list", _CHECK_URL)

    def fetch(self, want: Want, take: Take) -> None:
        """A series by one request, single instances by one each."""
        place = f"{self._root}/studies/{want.series.study}/series/{want.series.uid}"
        if want.instances is None:
            self._fetch(place, take)
            return
        lost: SeriesError | None = None
        for instance in want.instances:
            try:
                self._fetch(f"{place}/instances/{instance.uid}", take, alone=True)
            except SeriesError as error:
                lost = error  # the others may come none the less
        if lost is not None:
            raise lost

    def _fetch(self, place: str, take: Take, *, alone: bool = False) -> None:
        with self._told():
            response = self._session.get(place, headers=_ACCEPT, stream=True, timeout=self._timeout)
        with response, self._told(alone=alone):
            response.raise_for_status()
            kind, boundary = media_type(response.headers.get("Content-Type", ""))
            chunks = response.iter_content(_CHUNK)
            if kind == "application/dicom":  # not as the standard has it, but seen
                take(b"".join(_bounded(chunks, MAX_INSTANCE)))
            elif kind == "multipart/related":
                for content in parts(chunks, boundary, MAX_INSTANCE):
                    take(content)
            else:
                raise SeriesError(f"the PACS answers with {kind} instead of DICOM")

    def close(self) -> None:
        """Close what is open."""
        self._session.close()

    @contextmanager
    def _told(self, *, alone: bool = False) -> Iterator[None]:
        """Say what went wrong in words of ours; those of the libraries quote addresses, and these hold UIDs.

        An answer with one image `alone` that breaks off says something of that image, not of the PACS.
        """
        try:
            yield
        except requests.HTTPError as error:
            raise self._refusal(error.response) from None
        except requests.exceptions.SSLError as error:
            raise DataError(f"{self.name}: {_why_no_trust(error)}", _TRUST) from None
        except requests.Timeout:
            raise AwayError(
                f"{self.name} did not answer within {self._timeout:g} s", "ask its administrator; see `timeout`"
            ) from None
        except (requests.exceptions.JSONDecodeError, RecursionError):
            raise AwayError(f"{self.name} answers a query with something that is no JSON", _CHECK_URL) from None
        except (BrokenOffError, requests.exceptions.ChunkedEncodingError, requests.ConnectionError) as error:
            if alone:
                raise SeriesError("the PACS breaks off in mid-image") from None
            if isinstance(error, requests.ConnectionError):
                raise self._unreachable(error) from None
            raise AwayError(f"{self.name} broke off in mid-answer", "ingest again: it goes on from there") from None
        except MultipartError as error:
            raise SeriesError(f"the PACS sends malformed multipart: {error}") from None
        except (requests.RequestException, HTTPError) as error:
            raise self._unreachable(error) from None

    def _unreachable(self, error: Exception) -> AwayError:
        return AwayError(
            f"{self.name} cannot be reached, or broke off ({_cause(error)})",
            "check that it runs and that this machine may connect to it, and ingest again: it goes on from there",
        )

    def _refusal(self, response: requests.Response) -> Exception:
        status = response.status_code
        if status in {401, 403, 407}:
            return DataError(
                f"{self.name} does not let this site in (HTTP {status})",
                "check user and password_file, and the rights there",
            )
        if status in {408, 429, 502, 503, 504}:
            wait = _retry_after(response.headers.get("Retry-After", ""))
            return AwayError(f"{self.name} is too busy or away (HTTP {status})", "ingest again later", wait=wait)
        if response.url.startswith(f"{self._root}/studies/"):
            return SeriesError(f"the PACS answers with HTTP {status}")
        if status == 404:
            return DataError(f"{self.name} has no DICOMweb at this address (HTTP 404)", _CHECK_URL)
        return AwayError(f"{self.name} answers with HTTP {status}", "see the log of the PACS")


_CHECK_URL = "check the url in the site file: it ends where DICOMweb begins, such as …/dicom-web"
_TRUST = "name the authority of the PACS's certificate in `authority`, or have its certificate renewed"


def _session(source: DicomWebSource) -> requests.Session:
    session = requests.Session()
    session.trust_env = False
    session.max_redirects = 3
    session.headers["Accept-Encoding"] = "identity"
    paths = ssl.get_default_verify_paths()
    session.verify = str(source.authority or paths.cafile or paths.capath or True)
    if source.certificate is not None and source.key is not None:
        session.cert = (str(source.certificate), str(source.key))
    if source.user is not None and source.password_file is not None:
        session.auth = HTTPBasicAuth(source.user.encode(), _password(source.password_file))
    session.hooks["response"] = [_refuse_compressed, _read_bounded]
    return session


def _password(file: Path) -> bytes:
    try:
        return file.read_bytes().strip(b"\r\n")
    except OSError as error:
        raise DataError(
            f"the password file {file} cannot be read: {error.strerror}", "mend its access rights"
        ) from None


def _refuse_compressed(response: requests.Response, **_: Any) -> None:
    if response.headers.get("Content-Encoding", "identity").lower() not in {"", "identity"}:
        response.close()
        host = urlsplit(response.url).netloc
        raise DataError(
            f"the PACS {host} compresses its answers although it is asked not to",
            "switch HTTP compression off there, or in the proxy before it",
        )


def _read_bounded(response: requests.Response, stream: bool = False, **_: Any) -> None:
    """Read an answer that is not streamed, before requests does without a bound."""
    if not stream:
        chunks = response.raw.stream(_CHUNK, decode_content=False)
        try:
            response.raw = io.BytesIO(b"".join(_bounded(chunks, _MOST_ANSWER)))
        except MultipartError as error:
            host = urlsplit(response.url).netloc
            raise DataError(f"the PACS {host} answers a query with {error}", "narrow the query") from None


def _bounded(chunks: Iterator[bytes], most: int) -> Iterator[bytes]:
    size = 0
    for chunk in chunks:
        size += len(chunk)
        if size > most:
            raise MultipartError(f"more than {most} bytes in one answer")
        yield chunk


def _values(answer: _Answer, keyword: str) -> list[Any]:
    element = answer.get(_TAGS[keyword])
    values = element.get("Value") if isinstance(element, Mapping) else None
    return values if isinstance(values, list) else []


def _text(answer: _Answer, keyword: str) -> str:
    values = _values(answer, keyword)
    return values[0].strip() if values and isinstance(values[0], str) else ""


def _whole(answer: _Answer, keyword: str) -> int | None:
    """A number (IS); some PACSs write it as text (PS3.18 F.2.3 allows both)."""
    values = _values(answer, keyword)
    written = str(values[0]).strip() if values else ""
    return int(written) if written.isdigit() else None


def _retry_after(header: str) -> float:
    """Seconds, from a number or a date (RFC 9110 10.2.3); 0 if it says neither."""
    if header.strip().isdigit():
        return float(header)
    try:
        then = parsedate_to_datetime(header)
        return max(0.0, (then - datetime.now(then.tzinfo)).total_seconds())
    except ValueError:
        return 0.0


def _why_no_trust(error: Exception) -> str:
    """What OpenSSL says of a certificate or a handshake, without its own prefix."""
    told = str(error)
    for sign, words in (
        ("certificate has expired", "its certificate has expired"),
        ("not yet valid", "its certificate is not valid yet"),
        ("Hostname mismatch", "its certificate is of another host"),
        ("IP address mismatch", "its certificate is of another host"),
        ("self-signed", "its certificate is signed by an authority that this site does not know"),
        ("unable to get local issuer", "its certificate is signed by an authority that this site does not know"),
        ("alert", "it refuses the certificate that this site shows, or shows none"),
    ):
        if sign in told:
            return words
    return "no TLS connection can be made"


def _cause(error: BaseException) -> str:
    """The innermost cause that the system gives, such as 'Connection refused'."""
    if isinstance(error, OSError) and error.strerror and not isinstance(error, requests.RequestException):
        return error.strerror
    inner = [error.__cause__, error.__context__, getattr(error, "reason", None), *error.args]
    return next((_cause(cause) for cause in inner if isinstance(cause, BaseException)), type(error).__name__)
