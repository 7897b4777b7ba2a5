"""Parts that messages to several sites have in common: who gets them from the gateway without asking the SuperLink."""

from __future__ import annotations

from flwr.proto.fleet_pb2 import PullMessagesResponse
from flwr.proto.message_pb2 import ObjectTree, PullObjectRequest, PullObjectResponse

from locum.server.gateway.fleet import _MAX_BODY, _MOST_PARTS, Parts

SHARED, OWN = "a" * 64, "b" * 64


def _message(*names: str) -> bytes:
    top, *children = (ObjectTree(object_id=name) for name in names)
    top.children.extend(children)
    return PullMessagesResponse(message_object_trees=[top]).SerializeToString()


def _asked(name: str) -> bytes:
    return PullObjectRequest(object_id=name).SerializeToString()


def _given(content: bytes, *, available: bool = True) -> bytes:
    return PullObjectResponse(object_found=True, object_available=available, object_content=content).SerializeToString()


def test_a_part_that_one_site_has_pulled_is_there_for_another_whose_message_has_it() -> None:
    parts = Parts()
    parts.offer("north", _message(OWN, SHARED))
    assert parts.known("north", _asked(SHARED)) is None
    parts.keep(_asked(SHARED), _given(b"model"))
    parts.offer("south", _message("c" * 64, SHARED))
    assert parts.known("south", _asked(SHARED)) == _given(b"model")


def test_a_site_gets_no_part_of_a_message_that_is_not_its_own() -> None:
    parts = Parts()
    parts.offer("north", _message(OWN, SHARED))
    parts.keep(_asked(OWN), _given(b"north's"))
    assert parts.known("south", _asked(OWN)) is None
    parts.offer("south", _message(SHARED))
    assert parts.known("south", _asked(OWN)) is None
    parts.offer("north", _message(SHARED))  # its next message
    assert parts.known("north", _asked(OWN)) is None


def test_what_is_not_there_yet_or_too_large_is_not_kept_and_the_oldest_goes() -> None:
    parts = Parts()
    names = [f"{number:064x}" for number in range(_MOST_PARTS + 1)]
    parts.offer("north", _message(*names, OWN, SHARED))
    parts.keep(_asked(OWN), _given(b"", available=False))
    parts.keep(_asked(SHARED), _given(bytes(_MAX_BODY + 1)))
    for name in names:
        parts.keep(_asked(name), _given(name.encode()))
    kept = [parts.known("north", _asked(name)) is not None for name in (*names, OWN, SHARED)]
    assert kept == [False, *[True] * _MOST_PARTS, False, False]
