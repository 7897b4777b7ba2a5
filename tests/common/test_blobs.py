from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from locum.common.blobs import CHUNK, GET_DATA, PUT_DATA, RUN_NAME, SHA256, SITE_NAME, frames, payload
from locum.common.proto.locum_pb2 import BlobKey, Chunk, PutChunk


@pytest.mark.parametrize("size", [0, 1, 127, 128, 16_383, 16_384, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 77])
@pytest.mark.parametrize("offset", [0, 1, CHUNK])
def test_a_frame_is_what_protobuf_writes(tmp_path: Path, size: int, offset: int) -> None:
    content = (bytes(range(256)) * (size // 256 + 1))[:size]
    (tmp_path / "file").write_bytes(content)
    with (tmp_path / "file").open("rb", buffering=0) as file:
        puts = list(frames(file.fileno(), PUT_DATA, offset=offset))
        gets = list(frames(file.fileno(), GET_DATA, offset=offset))
    assert b"".join(PutChunk.FromString(frame).data for frame in puts) == content[offset:]
    assert puts == [PutChunk(data=PutChunk.FromString(frame).data).SerializeToString() for frame in puts]
    assert gets == [Chunk(data=Chunk.FromString(frame).data).SerializeToString() for frame in gets]
    assert b"".join(payload(frame, PUT_DATA) or b"" for frame in puts) == content[offset:]
    assert b"".join(payload(frame, GET_DATA) or b"" for frame in gets) == content[offset:]


@given(st.binary(max_size=40) | st.binary(max_size=40).map(lambda data: PutChunk(data=data).SerializeToString()))
def test_a_payload_is_found_only_where_protobuf_finds_it_too(message: bytes) -> None:
    found = payload(message, PUT_DATA)
    if found is not None:
        assert PutChunk.FromString(message) == PutChunk(data=bytes(found))


def test_a_message_with_more_in_it_is_left_to_protobuf() -> None:
    assert payload(PutChunk(key=BlobKey(run="r"), data=b"x").SerializeToString(), PUT_DATA) is None
    assert payload(PutChunk(data=b"x", offset=3).SerializeToString(), PUT_DATA) is None


@pytest.mark.parametrize("pattern", [RUN_NAME, SITE_NAME, SHA256])
@given(data=st.data())
def test_a_name_is_safe_in_a_path(pattern: re.Pattern[str], data: st.DataObject) -> None:
    name = data.draw(st.from_regex(pattern, fullmatch=True))
    assert name == Path(name).name
    assert name.isascii()
    assert not name.startswith(".")
    for spoilt in ("", f"{name}\n", f"../{name}", f"{name}/", f"{name}\0", f".{name}", f"{name}é"):
        assert not pattern.fullmatch(spoilt)
