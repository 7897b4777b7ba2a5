from __future__ import annotations

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from locum.common.messages import MessageError, TrainTask, pack, parse_header, unpack

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


def _record(array: Array, header: bytes = TASK.model_dump_json().encode()) -> RecordDict:
    return RecordDict({"header": ConfigRecord({"json": header}), "tensors": ArrayRecord({"w": array})})


@pytest.mark.parametrize(
    "array",
    [
        Array(dtype="float32", shape=(2,), stype="numpy.ndarray", data=b"\x93NUMPY"),
        Array(dtype="object", shape=(1,), stype="locum.raw", data=b"12345678"),
        Array(dtype="float32", shape=(3,), stype="locum.raw", data=b"12345678"),
        Array(dtype="float32", shape=(-1, -2), stype="locum.raw", data=b"12345678"),
        Array(dtype="float32", shape=(1 << 40,), stype="locum.raw", data=b""),
    ],
)
def test_a_tensor_that_is_not_raw_bytes_of_its_shape_is_refused(array: Array) -> None:
    with pytest.raises(MessageError):
        unpack(_record(array), TrainTask)


@pytest.mark.parametrize(
    "record",
    [
        RecordDict({}),
        RecordDict({"header": ConfigRecord({"json": b"{}"})}),
        RecordDict({"header": MetricRecord({"json": 1}), "tensors": ArrayRecord({})}),
        RecordDict({"header": ConfigRecord({"json": "{}"}), "tensors": ArrayRecord({})}),
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
