from __future__ import annotations

import io
import zipfile
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from locum.common.errors import PlanError
from locum.common.fab import build_bundle, plan_of_bundle
from tests.plans import plan


def test_a_bundle_holds_the_plan_and_is_the_same_bytes_each_time() -> None:
    assert build_bundle(plan()) == build_bundle(plan())
    assert plan_of_bundle(build_bundle(plan())).digest == plan().digest


def test_a_bundle_holds_no_code() -> None:
    with zipfile.ZipFile(io.BytesIO(build_bundle(plan()))) as bundle:
        assert sorted(bundle.namelist()) == ["LICENSE", "plan.yaml"]


def _zip(**files: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as bundle:
        for name, content in files.items():
            bundle.writestr(name.replace("__", "."), content)
    return buffer.getvalue()


def test_other_files_of_a_bundle_are_never_looked_at() -> None:
    content = _zip(plan__yaml=plan().to_yaml().encode(), setup__py=b"raise SystemExit", evil__pkl=b"\x80\x04")
    assert plan_of_bundle(content).digest == plan().digest


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"PK\x03\x04 not a zip",
        _zip(other__yaml=b"a: 1"),
        _zip(plan__yaml=b"x" * (2 << 20)),
        b"\0" * ((10 << 20) + 1),
    ],
)
def test_what_is_no_bundle_is_refused(content: bytes) -> None:
    with pytest.raises(PlanError):
        plan_of_bundle(content)


@given(st.data())
def test_a_bundle_with_a_changed_byte_is_the_same_plan_or_refused(data: st.DataObject) -> None:
    content = bytearray(build_bundle(plan()))
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    with suppress(PlanError):
        assert plan_of_bundle(bytes(content)).digest == plan().digest
