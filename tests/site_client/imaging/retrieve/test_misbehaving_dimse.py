"""DIMSE peers that lie, abort, stall or refuse: nothing lost, nothing twice, one clear message."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from io import BytesIO
from typing import Any

import pydicom
import pytest
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset
from pydicom.tag import Tag
from pydicom.uid import ExplicitVRLittleEndian
from pynetdicom import AE
from pynetdicom.dsutils import decode, encode
from pynetdicom.sop_class import (
    CTImageStorage,
    Verification,
)

from locum.common.errors import DataError
from locum.site_client.imaging.reasons import Reason
from locum.site_client.imaging.retrieve.dimse import _COMPRESSED, _MOST_CLASSES, _OF_MODALITY, Dimse, _whole
from locum.site_client.imaging.retrieve.peer import AwayError
from locum.site_client.imaging.sources import DimseSource
from tests.orthanc import PLANTED, Study, free_port
from tests.site_client.imaging.retrieve.conftest import Site, reasons
from tests.site_client.imaging.retrieve.dimse import MODELS, all_of, answer, peer, some_then

STUDY = Study(300, slices=6)


def test_a_peer_that_behaves_is_asked_once(site: Site) -> None:
    with peer(STUDY) as pacs:
        assert reasons(site.retrieve(pacs.source())) == [None] * 6
        assert pacs.fetches == 1
        assert pacs.most == 1


@pytest.mark.parametrize("number", [1, 2])
def test_never_more_associations_than_told(site: Site, number: int) -> None:
    studies = [Study(number, slices=2) for number in range(310, 322)]
    with peer(*studies) as pacs:
        assert reasons(site.retrieve(pacs.source(associations=number))) == [None] * 24
        assert pacs.most == number


def test_an_association_that_is_aborted_in_mid_series_is_a_failure_and_it_goes_on(site: Site) -> None:
    with peer(STUDY, gives=[some_then(3, "abort"), all_of]) as pacs:
        assert reasons(site.retrieve(pacs.source())) == [None] * 6
        assert pacs.fetches == 2
    assert site.waits == [0.5]


def test_a_peer_that_always_aborts_leaves_the_study_incomplete(site: Site) -> None:
    other = Study(301)

    def aborts(images: list[Dataset]) -> Iterator[Any]:
        if images and images[0].StudyInstanceUID == STUDY.uid:
            return some_then(2 if len(images) == 6 else 0, "abort")(images)
        return all_of(images)

    with peer(STUDY, other, gives=[aborts]) as pacs:
        items = site.retrieve(pacs.source())
    by_study = {item.known.study: item.refused for item in items if item.known}
    assert by_study[site.keys.uid(other.uid)] is None
    refused = by_study[site.keys.uid(STUDY.uid)]
    assert refused is not None
    assert refused[0] is Reason.INCOMPLETE_STUDY
    assert refused[1].startswith("images not given: 4 (the PACS PEER at 127.0.0.1")


def test_one_that_stalls_in_mid_series_counts_as_away_and_is_asked_again(site: Site) -> None:
    with peer(STUDY, gives=[some_then(2, lambda: time.sleep(1.5)), all_of]) as pacs:
        assert reasons(site.retrieve(pacs.source(timeout=0.5))) == [None] * 6


def test_fewer_images_than_said_make_the_study_incomplete(site: Site) -> None:
    with peer(STUDY, said=lambda study: study.slices + 2) as pacs:
        items = site.retrieve(pacs.source())
        assert {item.refused for item in items} == {(Reason.INCOMPLETE_STUDY, "images not given: 2")}
        pacs.studies[0] = replace(STUDY, slices=8)
        pacs.said = lambda study: study.slices
        assert reasons(site.retrieve(pacs.source())) == [None] * 8


def test_success_without_all_images_is_not_believed(site: Site) -> None:
    with peer(STUDY, gives=[some_then(4, (0x0000, None)), all_of]) as pacs:
        assert reasons(site.retrieve(pacs.source())) == [None] * 6
        assert pacs.fetches == 2


def test_more_images_than_said_are_taken(site: Site) -> None:
    with peer(STUDY, said=lambda study: 1) as pacs:
        assert reasons(site.retrieve(pacs.source())) == [None] * 6


@pytest.mark.parametrize("lists", [True, False])
def test_without_counts_images_are_counted_one_by_one(site: Site, lists: bool) -> None:
    with peer(STUDY, said=lambda study: None) as pacs:
        if not lists:
            pacs.listed = lambda study: ()
        assert reasons(site.retrieve(pacs.source())) == [None] * 6


@pytest.mark.parametrize("status", [0xA702, 0xC000, 0xFE00])
def test_a_series_that_is_not_given_holds_up_no_other(site: Site, status: int) -> None:
    other = Study(302)

    def refuses(images: list[Dataset]) -> Iterator[Any]:
        if images and images[0].StudyInstanceUID == other.uid:
            return some_then(0, (status, Dataset()))(images)
        return all_of(images)

    with peer(STUDY, other, gives=[refuses]) as pacs:
        items = site.retrieve(pacs.source())
    assert reasons(items) == [None] * 6


def test_a_peer_that_gives_nothing_is_one_error(site: Site) -> None:
    with (
        peer(STUDY, gives=[some_then(0, (0xA702, Dataset()))]) as pacs,
        pytest.raises(
            DataError, match="gives nothing of what it names: the PACS ends C-GET with status A702"
        ) as raised,
    ):
        site.retrieve(pacs.source())
    assert not [word for word in PLANTED if word in raised.value.message + raised.value.remedy]


def test_a_stranger_is_told_that_the_peer_does_not_know_it(site: Site) -> None:
    with (
        peer(STUDY, knows="OTHER") as pacs,
        pytest.raises(DataError, match="does not know this site's AE title LOCUM") as raised,
    ):
        site.retrieve(pacs.source())
    assert "add LOCUM" in raised.value.remedy


def test_a_wrong_title_is_told(site: Site) -> None:
    with peer(STUDY, title="HER-NAME") as pacs, pytest.raises(DataError, match="is not called PEER"):
        site.retrieve(pacs.source())


@pytest.mark.parametrize(
    ("models", "words"),
    [
        (MODELS[1:], "does not offer C-FIND to LOCUM"),
        (MODELS[:1], "does not offer C-GET to LOCUM"),
    ],
)
def test_a_service_that_is_not_offered_is_told(site: Site, models: Sequence[str], words: str) -> None:
    with peer(STUDY, models=models) as pacs, pytest.raises(DataError, match=words):
        site.retrieve(pacs.source())


@pytest.mark.parametrize(
    ("status", "kind"), [(0x0124, DataError), (0x0122, DataError), (0xA700, AwayError), (0xC001, AwayError)]
)
def test_a_question_that_fails_is_one_error(site: Site, status: int, kind: type[Exception]) -> None:
    with peer(STUDY, find_status=status) as pacs, pytest.raises(kind, match="C-FIND"):
        site.retrieve(pacs.source())


def test_a_peer_that_is_down_is_one_error_that_names_it(site: Site) -> None:
    port = free_port()
    source = {"kind": "dimse", "host": "127.0.0.1", "port": port, "title": "PEER"}
    with pytest.raises(AwayError, match=rf"the PACS PEER at 127.0.0.1:{port} cannot be reached \(Connection refused\)"):
        site.retrieve(source)
    assert site.waits == [0.5, 1.0, 2.0, 4.0]


def test_a_server_that_speaks_no_dicom_is_told(site: Site) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        source = {
            "kind": "dimse",
            "host": "127.0.0.1",
            "port": silent.getsockname()[1],
            "title": "PEER",
            "timeout": 0.2,
        }
        with pytest.raises(AwayError, match="takes the connection and then no association"):
            site.retrieve(source)


def test_an_unknown_destination_is_told(site: Site) -> None:
    port = free_port()
    with peer(STUDY) as pacs, pytest.raises(DataError, match="LOCUM is no destination there") as raised:
        site.retrieve(pacs.source(fetch="move", listen=port))
    assert str(port) in raised.value.remedy


def test_a_peer_without_room_for_an_association_is_tried_again(site: Site) -> None:
    with peer(STUDY, room=1) as pacs:
        guest = AE("LOCUM")
        guest.add_requested_context(Verification)
        association = guest.associate("127.0.0.1", pacs.port, ae_title="PEER")
        with pytest.raises(AwayError, match="is too busy for another association"):
            site.retrieve(pacs.source())
        assert site.waits == [0.5, 1.0, 2.0, 4.0]

        def leave(seconds: float) -> None:
            if association.is_established:
                association.release()
            time.sleep(seconds)

        site.sleep = leave
        assert reasons(site.retrieve(pacs.source())) == [None] * 6


def test_a_port_that_is_taken_is_told(site: Site) -> None:
    with peer(STUDY) as pacs, socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(DataError, match=f"the port {port}, to which the PACS moves images, cannot be opened"):
            site.retrieve(pacs.source(fetch="move", listen=port))


def test_nobody_can_send_images_to_the_port_unasked(site: Site) -> None:
    port = free_port()
    source = DimseSource(kind="dimse", host="127.0.0.1", port=1, title="PEER", fetch="move", listen=port)
    with closing(Dimse(source)) as pacs:
        pacs._listen()
        entity = AE("STRANGER")
        entity.add_requested_context(CTImageStorage, ExplicitVRLittleEndian)
        association = entity.associate("127.0.0.1", port, ae_title="LOCUM")
        status = association.send_c_store(pydicom.dcmread(BytesIO(Study(303).files()[0]))).Status
        association.release()
    assert status == 0x0124


def test_what_cannot_be_read_of_an_answer_is_not_told() -> None:
    element = DataElement(Tag("NumberOfSeriesRelatedInstances"), "LO", "many")
    read = decode(BytesIO(encode(_dataset(element), True, True) or b""), True, True)
    assert _whole(read, "NumberOfSeriesRelatedInstances") is None
    assert _whole(answer(NumberOfSeriesRelatedInstances=7), "NumberOfSeriesRelatedInstances") == 7


def _dataset(element: DataElement) -> Dataset:
    dataset = Dataset()
    dataset.add(element)
    return dataset


def test_a_series_without_end_is_given_up(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("locum.site_client.imaging.retrieve.pacs._BESIDES", 20)

    def endless(images: list[Dataset]) -> Iterator[Any]:
        yield 300
        for _ in range(300):
            yield 0xFF00, images[0]

    with peer(STUDY, gives=[endless, all_of]) as pacs:
        assert reasons(site.retrieve(pacs.source())) == [None] * 6


def test_what_a_series_is_guessed_to_hold_fits_into_one_association() -> None:
    assert max(map(len, _OF_MODALITY.values())) <= _MOST_CLASSES
    assert (1 + len(_COMPRESSED)) * _MOST_CLASSES + 3 <= 128
