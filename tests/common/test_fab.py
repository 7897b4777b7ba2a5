"""The bundle: what Flower takes, and what a site refuses without ever unpacking it."""

from __future__ import annotations

import hashlib
import io
import os
import stat
import struct
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from flwr.cli.build import build_fab_from_files
from flwr.cli.config_utils import get_fab_metadata
from flwr.cli.install import install_from_fab
from flwr.common.config import get_fab_config
from hypothesis import given, settings
from hypothesis import strategies as st

from locum.common import fab
from locum.common.errors import PlanError
from locum.common.fab import build_bundle, plan_of_bundle
from tests.plans import plan

_GOOD = build_bundle(plan())
_DIGEST = plan().digest
_NAMES = ("pyproject.toml", "LICENSE", "plan.yaml", ".info/CONTENT")


def _members() -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(_GOOD)) as bundle:
        return {name: bundle.read(name) for name in bundle.namelist()}


def _zip(files: dict[str, bytes], *, compression: int = zipfile.ZIP_STORED, attributes: int = 0o600 << 16) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as bundle:
        for name, content in files.items():
            member = zipfile.ZipInfo(name, (2024, 10, 1, 0, 0, 0))
            member.external_attr, member.compress_type = attributes, compression
            bundle.writestr(member, content)
    return buffer.getvalue()


# --- what Flower takes


def test_a_bundle_holds_the_plan_and_is_the_same_bytes_each_time() -> None:
    assert build_bundle(plan()) == _GOOD
    assert plan_of_bundle(_GOOD).digest == plan().digest


def test_a_bundle_is_to_the_byte_what_flower_builds_of_its_files() -> None:
    built, metadata = build_fab_from_files({name: _members()[name] for name in _NAMES[:3]})
    assert built == _GOOD
    assert (metadata.fab_format_version, metadata.flwr_version_target) == (1, "1.41.0")


def test_flower_installs_a_bundle_and_reads_its_metadata(tmp_path: Path) -> None:
    installed = install_from_fab(_GOOD, install_dir=tmp_path)
    assert sorted(path.name for path in installed.iterdir()) == ["LICENSE", "plan.yaml", "pyproject.toml"]
    assert get_fab_metadata(_GOOD) == ("locum/locum-plan", "1.0.0")


def test_a_run_can_be_told_its_name_and_the_server_app_is_ours() -> None:
    app = get_fab_config(_GOOD)["tool"]["flwr"]["app"]
    assert app["config"] == {"run": ""}
    assert app["components"]["serverapp"] == "locum.server.app:app"


def test_a_bundle_holds_no_code() -> None:
    assert tuple(_members()) == _NAMES


def test_the_bytes_around_a_plan_depend_on_no_machine_and_no_version() -> None:
    made = hashlib.sha256(fab._archive(b"plan")).hexdigest()
    assert made == "b7bc7e3ad4fcd4273eac52ba9c835864712572e46f71878f55ccd9a807c1fc84"


# --- what a site refuses


def _with(**changes: bytes | None) -> dict[str, bytes]:
    """The members with changes; `plan_yaml` stands for `plan.yaml`, None removes one."""
    known = {name.replace(".", "_").replace("/", "_"): name for name in _NAMES}
    changed = {known[key]: value for key, value in changes.items()}
    return {name: text for name, text in {**_members(), **changed}.items() if text is not None}


def _link() -> bytes:
    return _zip(_members(), attributes=(stat.S_IFLNK | 0o777) << 16)


def _twice() -> bytes:
    buffer = io.BytesIO(_GOOD)
    with zipfile.ZipFile(buffer, "a") as bundle, pytest.warns(UserWarning, match="Duplicate name"):
        bundle.writestr("plan.yaml", b"other")
    return buffer.getvalue()


def _flag_encrypted() -> bytes:
    at = _GOOD.index(b"PK\x01\x02")
    return _GOOD[: at + 8] + b"\x01\x00" + _GOOD[at + 10 :]


def _declared(size: int) -> bytes:
    """The bundle whose directory gives the first member this size."""
    at = _GOOD.index(b"PK\x01\x02")
    return _GOOD[: at + 20] + struct.pack("<II", size, size) + _GOOD[at + 28 :]


def _overlapping() -> bytes:
    """A directory whose entry for plan.yaml leads to the LICENSE's place."""
    with zipfile.ZipFile(io.BytesIO(_GOOD)) as bundle:
        licence, of_plan = (bundle.getinfo(name).header_offset for name in ("LICENSE", "plan.yaml"))
    begin = _GOOD.index(b"PK\x01\x02")
    return _GOOD[:begin] + _GOOD[begin:].replace(struct.pack("<I", of_plan), struct.pack("<I", licence))


def _hidden() -> bytes:
    """A member between the plan and the directory that the directory does not name."""
    with zipfile.ZipFile(io.BytesIO(_GOOD)) as bundle:
        begin = bundle.start_dir
    extra = _zip({"evil.py": b"raise SystemExit"})
    hidden = extra[: extra.index(b"PK\x01\x02")]
    end = _GOOD[-22:-6] + struct.pack("<I", begin + len(hidden)) + _GOOD[-2:]
    return _GOOD[:begin] + hidden + _GOOD[begin:-22] + end


_METADATA = _members()["pyproject.toml"]
_REFUSED: dict[str, tuple[Callable[[], bytes], str]] = {
    "code": (
        lambda: _zip({**_members(), "setup.py": b"raise SystemExit"}),
        "'setup.py' has no place in a bundle: it holds a plan and no code",
    ),
    "pickle": (lambda: _zip({**_members(), "w.pkl": b"\x80\x04"}), "'w.pkl' has no place in a bundle"),
    "upwards": (lambda: _zip({**_members(), "../plan.yaml": b""}), "'../plan.yaml' is a path that leads out"),
    "upwards on windows": (lambda: _zip({**_members(), "..\\a": b""}), "a path that leads out of its folder"),
    "absolute": (lambda: _zip({**_members(), "/etc/cron.d/x": b""}), "'/etc/cron.d/x' is a path that leads out"),
    "folder": (lambda: _zip({**_members(), "plan.yaml/": b""}), "'plan.yaml/' has no place"),
    "nul in a name": (lambda: _GOOD.replace(b"plan.yaml", b"plan.yam\0"), r"'plan.yam\\x00' has no place"),
    "symlink": (_link, "is a symbolic link"),
    "twice": (_twice, "the member plan.yaml more than once"),
    "encrypted": (_flag_encrypted, "'pyproject.toml' is encrypted"),
    "bomb": (
        lambda: _zip(_with(plan_yaml=bytes(64 << 20)), compression=8),
        "'plan.yaml' would unpack to more than 1 MiB",
    ),
    "compressed": (lambda: _zip(_members(), compression=zipfile.ZIP_DEFLATED), "'pyproject.toml' is compressed"),
    "bzip2": (lambda: _zip(_members(), compression=zipfile.ZIP_BZIP2), "'pyproject.toml' is compressed"),
    "declared large": (lambda: _declared((1 << 32) - 2), "'pyproject.toml' would unpack to more than 1 MiB"),
    "declared small": (lambda: _declared(3), "disagree"),
    "no plan": (lambda: _zip(_with(plan_yaml=None)), "has no plan.yaml"),
    "no metadata": (lambda: _zip(_with(pyproject_toml=None)), "has no pyproject.toml"),
    "other app": (
        lambda: _zip(_with(pyproject_toml=_METADATA.replace(b"locum.server.app:app", b"evil.app:app"))),
        "pyproject.toml is not the one that Locum writes: it may lead to other code",
    ),
    "licence": (lambda: _zip(_with(LICENSE=b"mine\n")), "LICENSE is not the one that Locum writes"),
    "digests": (lambda: _zip(_with(_info_CONTENT=b"")), ".info/CONTENT is not the one that Locum writes"),
    "overlapping": (_overlapping, "disagree"),
    "hidden member": (_hidden, "disagree"),
    "something before": (lambda: b"#!/bin/sh\n" + _GOOD, "disagree"),
    "something after": (lambda: _GOOD + b"x", "disagree"),
    "a comment": (lambda: _GOOD[:-2] + b"\x01\x00x", "disagree"),
    "permissions": (lambda: _zip(_members(), attributes=0o777 << 16), "disagree"),
    "no zip": (lambda: b"PK\x03\x04 not a zip", "is no zip"),
    "nothing": (lambda: b"", "is no zip"),
    "cut": (lambda: _GOOD[:-30], "is no zip"),
    "zeros": (lambda: b"\0" * ((10 << 20) + 1), "larger than 1088 KiB"),
}


_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_CHANGES = {"os.mkdir", "os.rename", "os.link", "os.symlink", "os.remove", "os.chmod", "subprocess.Popen", "import"}
_listening: list[list[str]] = []


def _listen(event: str, arguments: tuple[Any, ...]) -> None:
    if _listening and (event in _CHANGES or (event == "open" and arguments[2] & _WRITING)):
        _listening[-1].append(f"{event} {arguments[0]}")


@pytest.fixture(scope="session", autouse=True)
def _hook() -> None:
    sys.addaudithook(_listen)


@contextmanager
def _touching_nothing() -> Iterator[None]:
    """Fails if what runs within writes or makes a file, starts a program, or imports a module."""
    _listening.append([])
    try:
        yield
        assert _listening[-1] == []
    finally:
        _listening.pop()


@pytest.mark.parametrize("which", _REFUSED)
def test_a_bundle_that_is_not_ours_is_refused_in_one_sentence_and_writes_nothing(which: str) -> None:
    make, sentence = _REFUSED[which]
    content = make()
    with _touching_nothing(), pytest.raises(PlanError, match=sentence) as refused:
        plan_of_bundle(content)
    assert "\n" not in refused.value.message


@pytest.mark.parametrize(
    "text",
    [
        b"a: 1",
        b"[1, 2]",
        b"",
        b"\xff\xfe",
        b"a: " + b"[" * 1500 + b"]" * 1500,
        b"seed: " + b"9" * 5000,
        b"seed: !!int many",
        plan().to_yaml().replace("- 4\n", "- 100000000000000000000\n", 1).encode(),
        b"x" * ((1 << 20) + 1),
    ],
)
def test_a_bundle_around_what_is_no_plan_is_refused(text: bytes) -> None:
    content = fab._archive(text)
    with _touching_nothing(), pytest.raises(PlanError):
        plan_of_bundle(content)


@given(st.data())
def test_a_bundle_with_a_changed_byte_is_refused(data: st.DataObject) -> None:
    content = bytearray(_GOOD)
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    with pytest.raises(PlanError):
        plan_of_bundle(bytes(content))


@st.composite
def _mutated(draw: st.DrawFn) -> bytes:
    """A bundle, or a zip of its members and others, with stretches cut out, doubled, or replaced."""
    names = st.sampled_from([*_NAMES, "../x", "/x", "x.py", "plan.yaml/", "PLAN.YAML", ""])
    others = draw(st.dictionaries(names, st.binary(max_size=64), max_size=3))
    kind = draw(st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA]))
    content = draw(st.sampled_from([_GOOD, _zip({**_members(), **others}, compression=kind)]))
    for _ in range(draw(st.integers(1, 4))):
        begin = draw(st.integers(0, len(content)))
        end = draw(st.integers(begin, min(len(content), begin + 64)))
        middle = draw(st.one_of(st.binary(max_size=16), st.just(content[begin:end] * 2)))
        content = content[:begin] + middle + content[end:]
    return content


@given(_mutated())
@settings(max_examples=400, deadline=None)
def test_a_mutated_bundle_is_the_same_plan_or_refused_and_writes_nothing(content: bytes) -> None:
    with _touching_nothing(), suppress(PlanError):
        assert plan_of_bundle(content).digest == _DIGEST
        assert content == _GOOD
