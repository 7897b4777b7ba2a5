from __future__ import annotations

import hashlib
import json
import resource
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.numpy import load, save

from locum.common import messages
from locum.common.tensor_files import (
    DTYPES,
    MAX_HEADER,
    Arrays,
    TensorFileError,
    forget_part,
    map_tensors,
    write_tensors,
)

same_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=12).filter(lambda name: name != "__metadata__")
TENSORS = st.dictionaries(
    NAMES,
    st.sampled_from(sorted(messages.DTYPES)).flatmap(
        lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5))
    ),
    max_size=6,
)


def _anonymous_and_file_pages() -> tuple[int, int]:
    """KiB of this process's memory: its own, and pages of files."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["RssAnon"].split()[0]), int(lines["RssFile"].split()[0])


def _file(tmp_path: Path, header: bytes, data: bytes = b"") -> Path:
    path = tmp_path / "hostile"
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)
    return path


def test_the_types_of_a_file_are_those_of_a_message() -> None:
    assert {dtype.name for dtype in DTYPES.values()} == messages.DTYPES


@same_folder
@given(TENSORS)
def test_a_file_is_byte_for_byte_that_of_safetensors_and_is_read_back(tmp_path: Path, tensors: Arrays) -> None:
    path, expected = tmp_path / "file", save(dict(tensors))
    blob = write_tensors(path, tensors)
    assert path.read_bytes() == expected
    assert blob == (hashlib.sha256(expected).hexdigest(), len(expected))
    found = map_tensors(path, blob.sha256)
    assert (found.path, found.sha256, found.size) == (path, *blob)
    assert set(found) == set(tensors)
    for name, array in tensors.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
        assert found[name].tobytes() == array.tobytes()


@pytest.mark.parametrize("turned", ["T", "[::2]", "[::-1]", ".astype('>f4')", "[:, None]"])
def test_the_layout_in_memory_leaves_no_trace_in_the_file(tmp_path: Path, turned: str) -> None:
    array = np.random.default_rng(0).normal(size=(700, 300)).astype(np.float32)
    view = {
        "T": array.T,
        "[::2]": array[::2],
        "[::-1]": array[::-1],
        ".astype('>f4')": array.astype(">f4"),
        "[:, None]": array[:, None],
    }[turned]
    write_tensors(tmp_path / "file", {"w": view}, flush=True)
    assert (tmp_path / "file").read_bytes() == save({"w": np.ascontiguousarray(view, dtype="<f4")})


def test_what_was_read_cannot_be_written(tmp_path: Path) -> None:
    blob = write_tensors(tmp_path / "file", {"w": np.ones(3)})
    found = map_tensors(tmp_path / "file", blob.sha256)
    with pytest.raises(ValueError, match="read-only"):
        found["w"][0] = 2


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("__metadata__", np.zeros(1)),
        ("\ud800", np.zeros(1)),
        ("n" * 513, np.zeros(1)),
        ("w", np.zeros(1, np.complex64)),
        ("w", np.array(["text"])),
        ("w", np.array([object()])),
        ("w", np.zeros((1,) * 33)),
    ],
)
def test_what_has_no_form_is_not_written(tmp_path: Path, name: str, array: np.ndarray) -> None:
    with pytest.raises(TensorFileError):
        write_tensors(tmp_path / "file", {name: array})
    assert not (tmp_path / "file").exists()


def test_a_file_that_does_not_fit_on_the_disk_is_removed(tmp_path: Path) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(OSError, match="too large"):
            write_tensors(tmp_path / "file", {"w": np.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, hard))
    assert list(tmp_path.iterdir()) == []


def test_memory_is_a_chunk_and_pages_are_given_back(tmp_path: Path) -> None:
    array = np.zeros((16 << 20,), np.float32)
    array += 1
    before, _ = _anonymous_and_file_pages()
    blob = write_tensors(tmp_path / "file", {"v": array[: 8 << 20], "w": array[8 << 20 :]})
    found = map_tensors(tmp_path / "file", blob.sha256)
    _, unread = _anonymous_and_file_pages()
    assert found["v"].sum() + found["w"].sum() == 16 << 20
    grown, read = _anonymous_and_file_pages()
    for mapped in found.values():
        forget_part(mapped)
    _, forgotten = _anonymous_and_file_pages()
    assert grown - before < 8 << 10
    assert read - unread > 60 << 10
    assert forgotten - unread < 4 << 10
    assert found["w"][-1] == 1


def test_pages_of_other_arrays_are_left_alone() -> None:
    array = np.arange(10_000)
    forget_part(array)
    assert array.sum() == 49_995_000


# --- hostile files


def _entry(begin: int = 0, end: int = 8, shape: object = (2,), dtype: object = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


HOSTILE: dict[str, object] = {
    "offsets outside": {"w": _entry(8, 16)},
    "offsets turned": {"w": _entry(8, 0)},
    "negative offsets": {"w": _entry(-8, 0)},
    "overlap": {"v": _entry(), "w": _entry()},
    "hole": {"v": _entry(0, 4, (1,)), "w": _entry(5, 8, (3,), "U8")},
    "shape disagrees": {"w": _entry(shape=[3])},
    "negative shape": {"w": _entry(shape=[-1, -2])},
    "huge shape": {"w": _entry(shape=[1 << 62, 4])},
    "huge empty shape": {"w": _entry(0, 0, [0, 1 << 70])},
    "broadcastable": {"w": _entry(shape=[2, 1, 1, 1, 1, 0])},
    "unknown dtype": {"w": _entry(dtype="BF16")},
    "object dtype": {"w": _entry(dtype="O")},
    "shape of floats": {"w": _entry(shape=[2.0])},
    "shape of booleans": {"w": _entry(shape=[True, True])},
    "metadata": {"__metadata__": {"a": "b"}, "w": _entry()},
    "extra key": {"w": _entry() | {"strides": [1]}},
    "list": [_entry()],
    "number": 1,
    "null": None,
    "no tensors but data": {},
    "long name": {"n" * 600: _entry()},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_header_is_refused(tmp_path: Path, name: str) -> None:
    header = json.dumps(HOSTILE[name], separators=(",", ":")).encode()
    for padded in (header, header + b" " * (-len(header) % 8)):
        with pytest.raises(TensorFileError):
            map_tensors(_file(tmp_path, padded, b"12345678"), "")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 7,
        b"\0" * 8,
        b"\xff" * 16,
        struct.pack("<Q", MAX_HEADER + 1) + b" " * (MAX_HEADER + 1),
        struct.pack("<Q", 100) + b"{}",
        struct.pack("<Q", 2_000_000) + b"[" * 2_000_000,
        struct.pack("<Q", 2_000_000) + b'{"a":' * 400_000,
        struct.pack("<Q", 8) + b"\xff\xfe\xfd    ",
        struct.pack("<Q", 8) + b"{}      " + b"more",
        struct.pack("<Q", 8) + b"{}\0\0\0\0\0\0",
        struct.pack("<Q", 2) + b"{}",
        struct.pack("<Q", 16) + b'{"w":NaN}       ',
    ],
)
def test_a_hostile_beginning_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(TensorFileError):
        map_tensors(tmp_path / "file", "")


def test_a_name_twice_is_refused(tmp_path: Path) -> None:
    entry = json.dumps(_entry(), separators=(",", ":"))
    header = f'{{"w":{entry},"w":{entry}}}'
    with pytest.raises(TensorFileError):
        map_tensors(_file(tmp_path, header.encode() + b" " * (-len(header) % 8), b"12345678"), "")


GOOD = save({"conv.weight": np.ones((3, 2), np.float32), "steps": np.array(3), "bytes": np.zeros(5, np.uint8)})
EDIT = st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 3), st.binary(max_size=4))


@same_folder
@given(st.lists(EDIT, min_size=1, max_size=4))
def test_an_edited_file_is_refused_or_lies_within_itself(tmp_path: Path, edits: list[tuple[int, int, bytes]]) -> None:
    content = GOOD
    for position, removed, added in edits:
        content = content[:position] + added + content[position + removed :]
    (tmp_path / "file").write_bytes(content)
    try:
        found = map_tensors(tmp_path / "file", "")
    except TensorFileError:
        return
    expected = load(content)
    assert {name: (array.dtype, array.shape, array.tobytes()) for name, array in found.items()} == {
        name: (array.dtype, array.shape, array.tobytes()) for name, array in expected.items()
    }
    assert write_tensors(tmp_path / "again", found).size == len(content)
    assert (tmp_path / "again").read_bytes() == content
