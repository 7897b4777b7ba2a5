from __future__ import annotations

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pydantic import ValidationError

from locum.common.canonical import sha256_hex
from locum.common.messages import (
    BeginTask,
    Header,
    KeysTask,
    MaskedResult,
    MessageError,
    PairsTask,
    Secured,
    TrainTask,
    UnmaskTask,
    body_of,
    pack,
    parse_header,
    unpack,
)

TASK = TrainTask(plan_digest="0" * 64, round=1)
DTYPES = st.sampled_from([np.float16, np.float32, np.float64, np.int64, np.int32, np.uint8])


@given(hnp.arrays(DTYPES, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0)))
def test_what_is_packed_is_what_is_unpacked_to_the_bit(array: np.ndarray) -> None:
    header, tensors = unpack(pack(TASK, {"w": array}), TrainTask)
    assert header == TASK
    assert tensors["w"].dtype == array.dtype
    assert tensors["w"].shape == array.shape
    assert tensors["w"].tobytes() == array.tobytes()


def test_a_message_does_not_change_with_the_array_it_was_made_of() -> None:
    array = np.ones(3, np.float32)
    record = pack(TASK, {"w": array})
    array[:] = 7
    assert np.array_equal(unpack(record, TrainTask)[1]["w"], np.ones(3))


def _record(tensors: object, header: object = TASK.model_dump_json().encode(), **more: object) -> RecordDict:
    return RecordDict({"locum": ConfigRecord({"json": header, "tensors": tensors, **more})})


def _safetensors(header: str, data: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header.encode() + data


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x04\x95",
        b"\x93NUMPY",
        _safetensors('{"w":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}}', b"12345678"),
        _safetensors('{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', b"1234"),
        _safetensors('{"w":{"dtype":"F32","shape":[-2],"data_offsets":[0,8]}}', b"12345678"),
        _safetensors('{"w":{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,0]}}', b""),
        _safetensors('{"w":{"dtype":"O","shape":[1],"data_offsets":[0,8]}}', b"12345678"),
        _safetensors('{"w":{"dtype":"BOOL","shape":[8],"data_offsets":[0,8]}}', b"12345678"),
        _safetensors('{"%s":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}' % ("w" * 513), b"12345678"),
    ],
)
def test_a_tensor_that_is_not_raw_bytes_of_its_shape_is_refused(content: bytes) -> None:
    with pytest.raises(MessageError):
        unpack(_record(content), TrainTask)


@given(st.binary(max_size=200), st.integers(0, 200), st.binary(max_size=4))
def test_no_tensor_bytes_raise_anything_else(junk: bytes, place: int, patch: bytes) -> None:
    good = bytes(pack(TASK, {"w": np.ones((2, 3), np.float32)})["locum"]["tensors"])
    for content in (junk, good[:place] + patch + good[place + len(patch) :]):
        try:
            unpack(_record(content), TrainTask)
        except MessageError:
            continue


@pytest.mark.parametrize(
    "record",
    [
        RecordDict({}),
        RecordDict({"locum": ConfigRecord({"json": b"{}"})}),
        RecordDict({"locum": MetricRecord({"json": 1})}),
        RecordDict({"locum": ConfigRecord({"json": "{}"})}),
        RecordDict({"locum": ArrayRecord({})}),
        RecordDict({"locum": ConfigRecord({"json": b"{}"}), "more": ConfigRecord({})}),
        _record("text"),
        _record(1),
        _record(b"", sha256="0" * 64, size=1),
    ],
)
def test_a_record_of_another_form_is_refused(record: RecordDict) -> None:
    with pytest.raises(MessageError):
        unpack(record, TrainTask)


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"\x80\x04\x95",
        b'{"plan_digest": "x", "round": 1}',
        b'{"plan_digest": "%s", "round": 0}' % (b"0" * 64),
        b'{"plan_digest": "%s", "round": 1, "extra": 1}' % (b"0" * 64),
    ],
)
def test_a_header_of_another_form_is_refused(header: bytes) -> None:
    with pytest.raises(MessageError):
        parse_header(header, TrainTask)


@given(st.binary(max_size=100))
def test_no_header_bytes_raise_anything_else(header: bytes) -> None:
    with pytest.raises(MessageError):
        parse_header(header, TrainTask)


# --- secure sums

_DIGEST = "0" * 64


@pytest.mark.parametrize(
    "run", ["", ".", "..", "../run-1", "./run-1", "a/b", "Run-1", "-run", "run 1", "r" * 82, "run\n"]
)
def test_a_run_has_one_name_and_it_leads_to_no_other_folder(run: str) -> None:
    for kind, fields in ((KeysTask, {}), (BeginTask, {"pairs": {}})):
        with pytest.raises(ValidationError):
            kind(plan_digest=_DIGEST, run=run, **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("site", ["", "..", "a/b", "no rth", "n" * 100])
def test_what_is_no_name_of_a_site_is_in_no_header(site: str) -> None:
    for make in (
        lambda: BeginTask(plan_digest=_DIGEST, run="run-1", pairs={site: "x"}),
        lambda: UnmaskTask(plan_digest=_DIGEST, context="x", uploads={site: "x"}),
        lambda: Secured(context="x", keys={site: "x"}),
    ):
        with pytest.raises(ValidationError):
            make()


def test_a_statement_has_an_end() -> None:
    long = "x" * ((64 << 10) + 1)
    for make in (
        lambda: MaskedResult(plan_digest=_DIGEST, upload=long),
        lambda: UnmaskTask(plan_digest=_DIGEST, context=long, uploads={}),
        lambda: PairsTask(plan_digest=_DIGEST, run="run-1", roster=long, keys={}, certificates={}),
        lambda: Secured(context="x", keys={"north": "x" * 5000}),
    ):
        with pytest.raises(ValidationError):
            make()


@pytest.mark.parametrize("cases", [-1, 1.5])
def test_a_number_of_cases_is_a_whole_number(cases: float) -> None:
    with pytest.raises(ValidationError):
        MaskedResult(plan_digest=_DIGEST, upload="x", cases=cases)  # type: ignore[arg-type]


def test_a_header_can_be_made_of_the_digest_of_its_tensors() -> None:
    seen: list[str] = []

    def made(body: str) -> Header:
        seen.append(body)
        return MaskedResult(plan_digest=_DIGEST, upload=body)

    record = pack(made, {"w": np.ones(3)})
    header, _ = unpack(record, MaskedResult)
    assert [header.upload] == seen == [body_of(record)] == [sha256_hex(bytes(record["locum"]["tensors"]))]
    assert body_of(pack(TASK)) == sha256_hex(b"")
