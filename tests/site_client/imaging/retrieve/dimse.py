"""A small PACS of pynetdicom that can be told to misbehave: it lies about counts, aborts, stalls, refuses."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any

import pydicom
from pydicom.dataset import Dataset
from pydicom.uid import ExplicitVRLittleEndian
from pynetdicom import AE, evt
from pynetdicom.sop_class import (
    CTImageStorage,
    StudyRootQueryRetrieveInformationModelFind,
    StudyRootQueryRetrieveInformationModelGet,
    StudyRootQueryRetrieveInformationModelMove,
    Verification,
)

from tests.orthanc import Study

MODELS = (
    StudyRootQueryRetrieveInformationModelFind,
    StudyRootQueryRetrieveInformationModelGet,
    StudyRootQueryRetrieveInformationModelMove,
)


@dataclass
class Peer:
    """A PACS of pynetdicom, and its manners.

    Attributes:
        said: a study's number of images as it is told; None tells none.
        listed: the images of a study at instance level, by their indices.
        gives: what it does for a C-GET or C-MOVE, number by number: the images, or a status, or 'abort' after some.
        fetches: how often it was asked to give.
        most: associations that stood at the same time.
    """

    port: int
    studies: list[Study]
    said: Callable[[Study], int | None] = lambda study: study.slices
    listed: Callable[[Study], Sequence[int]] = lambda study: range(study.slices)
    gives: list[Callable[[list[Dataset]], Iterator[Any]]] = field(default_factory=list)
    find_status: int | None = None
    fetches: int = 0
    standing: int = 0
    most: int = 0

    def source(self, **keys: Any) -> dict[str, Any]:
        place = {"host": "127.0.0.1", "port": self.port, "title": "PEER"}
        return {"kind": "dimse", **place, "rate": 100_000, "timeout": 5, **keys}

    def find(self, event: evt.Event) -> Iterator[tuple[int, Dataset | None]]:
        if self.find_status is not None:
            yield self.find_status, None
            return
        asked = event.identifier
        if asked.QueryRetrieveLevel == "STUDY":
            for study in self.studies:
                said = self.said(study)
                yield (
                    0xFF00,
                    answer(StudyInstanceUID=study.uid, StudyDate=study.day, NumberOfStudyRelatedInstances=said),
                )
        for study in self.studies if asked.get("StudyInstanceUID") else ():
            if study.uid != asked.StudyInstanceUID:
                continue
            if asked.QueryRetrieveLevel == "SERIES":
                series = answer(SeriesInstanceUID=study.series_uid, Modality=study.modality)
                series.update(answer(BodyPartExamined=study.body_part, NumberOfSeriesRelatedInstances=self.said(study)))
                yield 0xFF00, series
            if asked.QueryRetrieveLevel == "IMAGE":
                for index in self.listed(study):
                    yield 0xFF00, answer(SOPInstanceUID=study.sop(index), SOPClassUID=CTImageStorage)

    def get(self, event: evt.Event) -> Iterator[Any]:
        asked = event.identifier
        manner = self.gives[min(self.fetches, len(self.gives) - 1)] if self.gives else all_of
        self.fetches += 1
        named = asked.get("SOPInstanceUID") or ()
        uids = [named] if isinstance(named, str) else list(named)
        files = [file for study in self.studies if study.uid == asked.StudyInstanceUID for file in study.files()]
        every = [pydicom.dcmread(BytesIO(file)) for file in files]
        images = [image for image in every if not uids or image.SOPInstanceUID in uids]
        for step in manner(images):
            if step == "abort":
                event.assoc.abort()
                return
            yield step


def answer(**keys: Any) -> Dataset:
    """An answer to a question, without the keys that are None."""
    given = Dataset()
    for keyword, value in keys.items():
        if value is not None:
            setattr(given, keyword, value)
    return given


def all_of(images: list[Dataset]) -> Iterator[Any]:
    yield len(images)
    for image in images:
        yield 0xFF00, image


def some_then(count: int, last: Any) -> Callable[[list[Dataset]], Iterator[Any]]:
    """Give so many images and then end in some way."""

    def give(images: list[Dataset]) -> Iterator[Any]:
        yield len(images)
        for image in images[:count]:
            yield 0xFF00, image
        if callable(last):
            last()
        else:
            yield last

    return give


@contextmanager
def peer(
    *studies: Study,
    title: str = "PEER",
    knows: str = "LOCUM",
    models: Sequence[str] = MODELS,
    room: int = 10,
    **manners: Any,
) -> Iterator[Peer]:
    entity = AE(title)
    entity.require_called_aet, entity.require_calling_aet = True, [knows]
    for model in (Verification, *models):
        entity.add_supported_context(model)
    entity.add_supported_context(CTImageStorage, ExplicitVRLittleEndian, scu_role=True, scp_role=True)
    entity.maximum_associations = room
    found = Peer(0, list(studies), **manners)

    def stands(_: evt.Event) -> None:
        found.standing += 1
        found.most = max(found.most, found.standing)

    def left(_: evt.Event) -> None:
        found.standing -= 1

    handlers = [
        (evt.EVT_C_ECHO, lambda event: 0), (evt.EVT_C_FIND, found.find), (evt.EVT_C_GET, found.get),
        (evt.EVT_C_MOVE, lambda event: iter([(None, None)])),
        (evt.EVT_ACCEPTED, stands), (evt.EVT_RELEASED, left), (evt.EVT_ABORTED, left),
    ]  # fmt: skip
    server = entity.start_server(("127.0.0.1", 0), block=False, evt_handlers=handlers)
    found.port = server.server_address[1]
    try:
        yield found
    finally:
        server.shutdown()
