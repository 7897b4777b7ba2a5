"""A PACS by DIMSE (PS3.4 annex C, PS3.7): C-FIND to ask; C-GET, or C-MOVE to a port of this machine, to fetch.

Rules:
  * At most two associations at once: with four, Orthanc was seen to lose 123 of 500 images without a word.
  * An answer without a Status is a failure: pynetdicom gives an empty one when an association breaks off.
  * An association proposes each object class once uncompressed and once in each compression, so that a PACS can send an
    image as it keeps it; classes that do not fit into the 128 contexts of one (PS3.8 9.3.2.2) are another's.
  * The port for C-MOVE takes in only what is addressed to this site, and only while something is being moved.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from pydicom.dataset import Dataset
from pydicom.uid import (
    HTJ2K,
    JPEG2000,
    UID,
    CTImageStorage,
    EnhancedCTImageStorage,
    EnhancedMRImageStorage,
    EnhancedPETImageStorage,
    ExplicitVRLittleEndian,
    HTJ2KLossless,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
    LegacyConvertedEnhancedCTImageStorage,
    LegacyConvertedEnhancedMRImageStorage,
    LegacyConvertedEnhancedPETImageStorage,
    MRImageStorage,
    PositronEmissionTomographyImageStorage,
    RLELossless,
    SecondaryCaptureImageStorage,
)
from pynetdicom import AE, evt
from pynetdicom.association import Association
from pynetdicom.presentation import build_role
from pynetdicom.sop_class import (
    StudyRootQueryRetrieveInformationModelFind,
    StudyRootQueryRetrieveInformationModelGet,
    StudyRootQueryRetrieveInformationModelMove,
    Verification,
)

from locum.common.errors import DataError
from locum.site_client.imaging import dicom
from locum.site_client.imaging.damage import damage_is
from locum.site_client.imaging.reasons import Reason, RefusedError
from locum.site_client.imaging.retrieve.ahead import StoppedError
from locum.site_client.imaging.retrieve.arrival import TAKEN
from locum.site_client.imaging.retrieve.peer import (
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
from locum.site_client.imaging.sources import DimseSource, Query

_PLAIN = (ExplicitVRLittleEndian, ImplicitVRLittleEndian)
_COMPRESSED = (
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
    JPEG2000Lossless,
    JPEG2000,
    HTJ2KLossless,
    HTJ2K,
    RLELossless,
)
#: Classes of one association: each takes a context for `_PLAIN` and one for each compression, and two are for asking.
_MOST_CLASSES = (128 - 3) // (1 + len(_COMPRESSED))
#: What a series of a modality holds, mostly. What is missing then is asked for by its own class.
_OF_MODALITY = {
    "CT": (CTImageStorage, EnhancedCTImageStorage, LegacyConvertedEnhancedCTImageStorage, SecondaryCaptureImageStorage),
    "MR": (MRImageStorage, EnhancedMRImageStorage, LegacyConvertedEnhancedMRImageStorage, SecondaryCaptureImageStorage),
    "PT": (
        PositronEmissionTomographyImageStorage,
        EnhancedPETImageStorage,
        LegacyConvertedEnhancedPETImageStorage,
        SecondaryCaptureImageStorage,
    ),
    **dict.fromkeys(("CR", "DX", "MG"), (*sorted(dicom.RADIOGRAPHS), SecondaryCaptureImageStorage)),
    **dict.fromkeys(("SEG", "SR", "RTSTRUCT"), tuple(sorted(dicom.ANNOTATIONS))),
}
_STUDY_KEYS = ("StudyInstanceUID", "StudyDate", "AccessionNumber", "NumberOfStudyRelatedInstances")
#: SOP Instance UIDs in one request.
_AT_A_TIME = 100
_PDU = 128 << 10
_FIND, _GET = StudyRootQueryRetrieveInformationModelFind, StudyRootQueryRetrieveInformationModelGet
_MOVE = StudyRootQueryRetrieveInformationModelMove

# Statuses (PS3.7 annex C, PS3.4 C.4).
_SUCCESS, _PENDING, _WARNINGS = 0x0000, (0xFF00, 0xFF01), range(0xB000, 0xC000)
_NO_SUCH_CLASS, _NOT_AUTHORISED, _UNKNOWN_DESTINATION = 0x0122, 0x0124, 0xA801
_OUT_OF_RESOURCES = 0xA700
#: A PACS need not say anything while it moves a series: so many times the usual patience.
_MOVE_PATIENCE = 10


class _Storing:
    """Handles C-STORE; its answer waits until there is room, which holds the PACS back."""

    def __init__(self, take: Take) -> None:
        self._take = take
        self.stopped: Exception | None = None

    def __call__(self, event: evt.Event) -> int:
        try:
            self._take(event.encoded_dataset())
        except (StoppedError, SeriesError) as error:
            self.stopped = error
            return _OUT_OF_RESOURCES
        return _SUCCESS


class Dimse:
    """See :class:`locum.site_client.imaging.retrieve.peer.Pacs`."""

    def __init__(self, source: DimseSource) -> None:
        self.name = f"the PACS {source.title} at {source.host}:{source.port}"
        # A C-MOVE takes two associations: one to ask, and one on which the PACS sends.
        self.at_once: int = source.associations if source.fetch == "get" else 1
        self.when_nothing_comes = (
            f"have {source.calling}, this machine's address and port {source.listen} entered there as a destination"
            if source.fetch == "move"
            else "see the log of the PACS; some offer C-MOVE only: `fetch: move`"
        )
        self._source = source
        self._idle: list[tuple[frozenset[str], Association]] = []
        self._lock = threading.Lock()
        self._server: Any = None
        self._moving: _Storing | None = None

    # --- asking

    def greet(self) -> None:
        """C-ECHO, whether it offers what is needed, and for C-MOVE whether the port is free."""
        moves = self._source.fetch == "move"
        if moves:
            self._listen()
        with self._association() as association:
            self._judge(association.send_c_echo(), "C-ECHO")
            self._require(association, _FIND, "C-FIND")
            self._require(association, _MOVE if moves else _GET, "C-MOVE" if moves else "C-GET")

    def studies(self, query: Query) -> Iterator[Study]:
        """The studies of each question."""
        for keys in study_keys(query):
            for answer in self._find("STUDY", {**dict.fromkeys(_STUDY_KEYS, ""), **keys}):
                yield Study(
                    proper_uid(_text(answer, "StudyInstanceUID"), self.name),
                    _whole(answer, "NumberOfStudyRelatedInstances"),
                    day_of(_text(answer, "StudyDate")),
                    _text(answer, "AccessionNumber"),
                    keys.get("AccessionNumber", ""),
                )

    def series(self, study: Study) -> Sequence[Series]:
        """All series of a study."""
        asked = {
            "StudyInstanceUID": study.uid,
            "SeriesInstanceUID": "",
            "Modality": "",
            "BodyPartExamined": "",
            "NumberOfSeriesRelatedInstances": "",
        }
        found = [
            Series(
                study.uid,
                proper_uid(_text(answer, "SeriesInstanceUID"), self.name),
                _text(answer, "Modality"),
                _text(answer, "BodyPartExamined"),
                _whole(answer, "NumberOfSeriesRelatedInstances"),
            )
            for answer in self._find("SERIES", asked)
        ]
        return list({series.uid: series for series in found}.values())

    def instances(self, series: Series) -> Sequence[Instance]:
        """All instances of a series."""
        asked = {
            "StudyInstanceUID": series.study,
            "SeriesInstanceUID": series.uid,
            "SOPInstanceUID": "",
            "SOPClassUID": "",
        }
        found = [
            Instance(proper_uid(_text(answer, "SOPInstanceUID"), self.name), _text(answer, "SOPClassUID"))
            for answer in self._find("IMAGE", asked)
        ]
        return list({instance.uid: instance for instance in found}.values())

    def _find(self, level: str, keys: dict[str, str]) -> list[Dataset]:
        answers = []
        with self._association() as association:
            self._require(association, _FIND, "C-FIND")
            for status, answer in association.send_c_find(_identifier(level, keys), _FIND):
                if status.get("Status") not in _PENDING:
                    self._judge(status, "C-FIND")
                elif answer is None:
                    raise AwayError(f"{self.name} answers a query with something illegible", "ask its vendor")
                else:
                    answers.append(answer)
        return answers

    # --- fetching

    def fetch(self, want: Want, take: Take) -> None:
        """A series by one request, single instances a hundred at a time."""
        for classes, instances in self._requests(want):
            keys: dict[str, Any] = {"StudyInstanceUID": want.series.study, "SeriesInstanceUID": want.series.uid}
            if instances:
                keys["SOPInstanceUID"] = [instance.uid for instance in instances]
            identifier = _identifier("IMAGE" if instances else "SERIES", keys)
            (self._get if self._source.fetch == "get" else self._move)(identifier, classes, take)

    def _requests(self, want: Want) -> Iterator[tuple[frozenset[str], Sequence[Instance]]]:
        """Requests of which each fits into one association, with the classes that it needs."""
        guess = _OF_MODALITY.get(want.series.modality)
        if want.instances is None and (guess or self._source.fetch == "move"):
            yield frozenset(guess or ()), ()
            return
        instances = self.instances(want.series) if want.instances is None else want.instances
        for some in _groups(instances):
            yield frozenset(instance.sop_class for instance in some) & TAKEN or frozenset(guess or ()), some

    def _get(self, identifier: Dataset, classes: frozenset[str], take: Take) -> None:
        with self._association(classes) as association:
            self._require(association, _GET, "C-GET")
            handler = _Storing(take)
            association.bind(evt.EVT_C_STORE, handler)
            try:
                self._follow(association.send_c_get(identifier, _GET), handler, "C-GET")
            finally:
                association.unbind(evt.EVT_C_STORE, handler)

    def _move(self, identifier: Dataset, _: frozenset[str], take: Take) -> None:
        self._listen()
        with self._association() as association:
            self._require(association, _MOVE, "C-MOVE")
            association.dimse_timeout = self._source.timeout * _MOVE_PATIENCE
            self._moving = _Storing(take)
            try:
                answers = association.send_c_move(identifier, self._source.calling, _MOVE)
                self._follow(answers, self._moving, "C-MOVE")
            finally:
                self._moving = None

    def _follow(self, answers: Iterator[tuple[Dataset, Dataset | None]], storing: _Storing, service: str) -> None:
        for status, _ in answers:
            if storing.stopped is not None:
                raise storing.stopped
            if status.get("Status") not in _PENDING:
                self._judge(status, service)

    def _stored(self, event: evt.Event) -> int:
        """Handle what comes to the port for C-MOVE."""
        moving = self._moving
        return _NOT_AUTHORISED if moving is None else moving(event)

    def _listen(self) -> None:
        if self._server is not None:
            return
        entity = self._entity()
        entity.require_called_aet = True
        for sop_class in sorted(TAKEN):
            entity.add_supported_context(sop_class, [*_PLAIN, *_COMPRESSED])
        try:
            handlers = [(evt.EVT_C_STORE, self._stored)]
            self._server = entity.start_server(("", self._source.listen or 0), block=False, evt_handlers=handlers)
        except OSError as error:
            raise DataError(
                f"the port {self._source.listen}, to which the PACS moves images, cannot be opened: {error.strerror}",
                "name a free one as `listen`, and tell it to the PACS",
            ) from None

    # --- associations

    def _entity(self) -> AE:
        entity = AE(self._source.calling)
        entity.maximum_pdu_size = _PDU
        entity.acse_timeout = entity.dimse_timeout = self._source.timeout
        entity.network_timeout = entity.connection_timeout = self._source.timeout
        return entity

    @contextmanager
    def _association(self, classes: frozenset[str] = frozenset()) -> Iterator[Association]:
        """An association that can carry `classes`, standing or new; after a failure it is not used again."""
        proposed, association = self._standing(classes) or (classes, self._associate(classes))
        try:
            yield association
        except BaseException:
            association.abort()
            raise
        with self._lock:
            self._idle.append((proposed, association))

    def _standing(self, classes: frozenset[str]) -> tuple[frozenset[str], Association] | None:
        """An idle association that fits; if there is none, those that are idle make room for a new one."""
        with self._lock:
            for entry in self._idle:
                if entry[0] >= classes and entry[1].is_established:
                    self._idle.remove(entry)
                    return entry
            for _, association in self._idle:
                _leave(association)
            self._idle.clear()
            return None

    def _associate(self, classes: frozenset[str]) -> Association:
        entity, fetch = self._entity(), _GET if self._source.fetch == "get" else _MOVE
        for model in (Verification, _FIND, fetch):
            entity.add_requested_context(model)
        for sop_class in sorted(classes):
            entity.add_requested_context(sop_class, list(_PLAIN))
            for syntax in _COMPRESSED:
                entity.add_requested_context(sop_class, syntax)
        association = entity.associate(
            self._source.host,
            self._source.port,
            ae_title=self._source.title,
            max_pdu=_PDU,
            ext_neg=[build_role(UID(sop_class), scp_role=True) for sop_class in sorted(classes)],
        )
        if association.is_established:
            return association
        if association.is_rejected:
            raise self._rejection(association.acceptor.primitive)
        raise self._silence()

    def _rejection(self, primitive: Any) -> Exception:
        """What an A-ASSOCIATE-RJ says (PS3.8 9.3.4)."""
        calling, title = self._source.calling, self._source.title
        why = (primitive.result_source, primitive.diagnostic)
        if why == (1, 3):
            return DataError(
                f"{self.name} does not know this site's AE title {calling}",
                f"have its administrator add {calling} with this machine's address, or set `calling`",
            )
        if why == (1, 7):
            return DataError(f"{self.name} is not called {title}", "set `title` to the PACS's own AE title")
        if primitive.result == 2 or primitive.result_source == 3:
            return AwayError(f"{self.name} is too busy for another association", "ingest again later")
        return DataError(f"{self.name} refuses the association", "ask its administrator for the log")

    def _silence(self) -> AwayError:
        """Why no association came about, as far as the network says."""
        try:
            socket.create_connection((self._source.host, self._source.port), self._source.timeout).close()
        except OSError as error:
            what = f"cannot be reached ({error.strerror or 'no answer in time'})"
            return AwayError(f"{self.name} {what}", "check that it runs, its host and port, and the firewall between")
        return AwayError(
            f"{self.name} takes the connection and then no association", "check that this is the port for DICOM"
        )

    def _require(self, association: Association, model: str, service: str) -> None:
        if model not in {context.abstract_syntax for context in association.accepted_contexts}:
            raise self._forbidden(service)

    def _forbidden(self, service: str) -> DataError:
        other = {"C-GET": ", or set `fetch: move`", "C-MOVE": ", or set `fetch: get`"}.get(service, "")
        return DataError(
            f"{self.name} does not offer {service} to {self._source.calling}",
            f"have its administrator allow {service} for {self._source.calling}{other}",
        )

    def _judge(self, status: Dataset, service: str) -> None:
        """Raise what the last answer of a service says, unless it is well."""
        code = status.get("Status")
        if code is None:
            raise AwayError(f"{self.name} broke off in mid-answer ({service})", "ingest again: it goes on from there")
        if code == _SUCCESS or code in _WARNINGS:
            return
        if code in {_NO_SUCH_CLASS, _NOT_AUTHORISED}:
            raise self._forbidden(service)
        if code == _UNKNOWN_DESTINATION:
            raise DataError(
                f"{self.name} does not know where to move images: {self._source.calling} is no destination there",
                f"have {self._source.calling}, this machine's address and port {self._source.listen} entered there",
            )
        if service in {"C-GET", "C-MOVE"}:
            raise SeriesError(f"the PACS ends {service} with status {code:04X}")
        raise AwayError(f"{self.name} ends {service} with status {code:04X}", "see the log of the PACS")

    def close(self) -> None:
        """Release all associations, and close the port."""
        for _, association in self._idle:
            _leave(association)
        self._idle.clear()
        if self._server is not None:
            self._server.shutdown()


def _leave(association: Association) -> None:
    if association.is_established:
        association.release()


def _groups(instances: Iterable[Instance]) -> Iterator[list[Instance]]:
    """Instances in groups that one association and one request can hold."""
    group: list[Instance] = []
    classes: set[str] = set()
    for instance in sorted(instances, key=lambda one: one.sop_class):
        if len(group) == _AT_A_TIME or len(classes | {instance.sop_class}) > _MOST_CLASSES:
            yield group
            group, classes = [], set()
        group.append(instance)
        classes.add(instance.sop_class)
    if group:
        yield group


def _identifier(level: str, keys: dict[str, Any]) -> Dataset:
    identifier = Dataset()
    identifier.QueryRetrieveLevel = level
    if any(isinstance(value, str) and not value.isascii() for value in keys.values()):
        identifier.SpecificCharacterSet = "ISO_IR 192"
    for keyword, value in keys.items():
        setattr(identifier, keyword, value)
    return identifier


def _text(answer: Dataset, keyword: str) -> str:
    try:
        with damage_is(Reason.UNREADABLE):
            return str(answer.get(keyword) or "").strip()
    except RefusedError:
        return ""


def _whole(answer: Dataset, keyword: str) -> int | None:
    written = _text(answer, keyword)
    return int(written) if written.isdigit() else None
