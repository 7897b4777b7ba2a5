"""The bundle that a run carries: a plan and no code.

Flower names it FAB (Flower App Bundle): a zip with an application's files. Ours holds the metadata that Flower asks
for, a licence line, `plan.yaml`, and Flower's list of digests. Rules:
  * Everything but `plan.yaml` is fixed, and members are stored as they are. So the bytes of `plan.yaml` determine every
    byte of the bundle, and a bundle is accepted only if it is exactly what we would build around its plan.
  * To accept one, no zip is parsed: the plan stands at a fixed place, and the rest is compared. A zip's directory is
    looked at only to say in words why a bundle is refused.
  * Nothing of a bundle is ever imported, unpacked or written to disk.
"""

from __future__ import annotations

import io
import stat
import struct
import zipfile
import zlib
from collections import Counter

from locum.common.canonical import sha256_hex
from locum.common.errors import PlanError
from locum.common.plan import Plan, parse_plan

_PLAN = "plan.yaml"
_METADATA = "pyproject.toml"
_LICENCE = "LICENSE"
_DIGESTS = ".info/CONTENT"
_NAMES = (_METADATA, _LICENCE, _PLAN, _DIGESTS)

_MAX_PLAN = 1 << 20
_MAX_BUNDLE = _MAX_PLAN + (64 << 10)
_DATE = (2024, 10, 1, 0, 0, 0)  # as Flower's own builder has it
_UNIX = 3
_SHOWN = 80

#: What Flower 1.41 asks of an application (`fab-format-version = 1`), in the form in which its builder writes TOML.
#: A coordinator's SuperLink runs the server app; the client app is named because Flower wants a name. It is no Flower
#: app and nothing runs it: an agent reads the plan and does not look here, a stock SuperNode fails on it.
_METADATA_TEXT = b"""\
[project]
name = "locum-plan"
version = "1.0.0"
description = "A Locum plan: data that installed code carries out."
dependencies = [
    "flwr>=1.41.0,<1.42",
]

[project.license]
file = "LICENSE"

[tool.flwr.app]
publisher = "locum"
fab-format-version = 1
flwr-version-target = "1.41.0"
fab-include = [
    "plan.yaml",
    "LICENSE",
]

[tool.flwr.app.components]
serverapp = "locum.server.app:app"
clientapp = "locum.site_client.agent:Agent"

[tool.flwr.app.config]
run = ""
"""
_FIXED = {_METADATA: _METADATA_TEXT, _LICENCE: b"Apache-2.0\n"}

#: What the standard library raises for bytes that are no zip, or one that lies.
_NO_ZIP = (
    zipfile.BadZipFile,
    zipfile.LargeZipFile,
    zlib.error,
    struct.error,
    EOFError,
    IndexError,
    KeyError,
    NotImplementedError,
    OSError,
    OverflowError,
    RuntimeError,
    ValueError,
)
_MEANS = {_METADATA: ": it may lead to other code", _DIGESTS: " for its members"}
_LIES = "the bundle's directory and its members disagree, or something stands before, between or after them"


def build_bundle(plan: Plan) -> bytes:
    """The bundle of a plan, byte for byte the same for the same plan, and as `flwr build` would make it."""
    return _archive(plan.to_yaml().encode())


def plan_of_bundle(content: bytes) -> Plan:
    """Reads the plan of a bundle and nothing else of it; raises :class:`PlanError`."""
    remedy = "start the run with `locum run`, which builds the bundle from the plan alone"
    if len(content) > _MAX_BUNDLE:
        raise PlanError(f"the bundle is larger than {_MAX_BUNDLE >> 10} KiB", remedy)
    text = _plan_text(content)
    if text is None or _archive(text) != content:
        raise PlanError(_why_not(content), remedy)
    return _parsed(text)


def _parsed(text: bytes) -> Plan:
    try:
        plan = parse_plan(text)
        plan.canonical()  # a number that has no canonical form is no part of a plan
    except (ValueError, RecursionError) as error:
        reason = f"the bundle's plan.yaml cannot be read: {type(error).__name__}"
        raise PlanError(reason, "check it with `locum plan check`") from error
    return plan


# --- the one form of a bundle


def _archive(plan_text: bytes) -> bytes:
    """A zip as `flwr.cli.build` writes it: stored members, one date, a list of digests and sizes (bits) at the end."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as bundle:
        for name, text in _files(plan_text).items():
            member = zipfile.ZipInfo(name, _DATE)
            member.create_system = _UNIX  # else the bytes would depend on the machine
            bundle.writestr(member, text)
    return buffer.getvalue()


def _files(plan_text: bytes) -> dict[str, bytes]:
    files = {**_FIXED, _PLAN: plan_text}
    digests = "\n".join(f"{name},{sha256_hex(text)},{8 * len(text)}" for name, text in files.items())
    return {**files, _DIGESTS: digests.encode()}


def _local_header(name: str) -> int:
    """The length in bytes of what stands before a member's content (PKWARE APPNOTE 4.3.7)."""
    return 30 + len(name)


_PLAN_HEADER = sum(_local_header(name) + len(text) for name, text in _FIXED.items())
_PLAN_BEGINS = _PLAN_HEADER + _local_header(_PLAN)


def _plan_text(content: bytes) -> bytes | None:
    """What stands where a bundle has its plan, as long as its header says; None if nothing can."""
    if len(content) < _PLAN_BEGINS:
        return None
    size = int.from_bytes(content[_PLAN_HEADER + 18 : _PLAN_HEADER + 22], "little")  # compressed = stored
    return content[_PLAN_BEGINS : _PLAN_BEGINS + size] if size <= _MAX_PLAN else None


# --- why a bundle is refused, in one sentence


def _why_not(content: bytes) -> str:
    try:
        bundle = zipfile.ZipFile(io.BytesIO(content))
    except _NO_ZIP:
        return "the bundle is no zip"
    with bundle:
        members = bundle.infolist()
        found = (check(member) for check in _MEMBER_CHECKS for member in members)
        return next(filter(None, found), "") or _set_problem(members) or _text_problem(bundle)


def _shown(member: zipfile.ZipInfo) -> str:
    return f"the bundle's member {member.orig_filename[:_SHOWN]!r}"


def _name_problem(member: zipfile.ZipInfo) -> str:
    name = member.orig_filename
    if name.startswith(("/", "\\")) or ".." in name.replace("\\", "/").split("/"):
        return f"{_shown(member)} is a path that leads out of its folder"
    return "" if name in _NAMES else f"{_shown(member)} has no place in a bundle: it holds a plan and no code"


def _kind_problem(member: zipfile.ZipInfo) -> str:
    if stat.S_ISLNK(member.external_attr >> 16):
        return f"{_shown(member)} is a symbolic link"
    # encrypted, strongly encrypted, masked header (APPNOTE 4.4.4)
    return f"{_shown(member)} is encrypted" if member.flag_bits & 0x2041 else ""


def _size_problem(member: zipfile.ZipInfo) -> str:
    large = max(member.file_size, member.compress_size) > _MAX_PLAN
    return f"{_shown(member)} would unpack to more than 1 MiB" if large else ""


def _compression_problem(member: zipfile.ZipInfo) -> str:
    stored = member.compress_type == zipfile.ZIP_STORED and member.file_size == member.compress_size
    return "" if stored else f"{_shown(member)} is compressed, and a bundle's members are stored as they are"


_MEMBER_CHECKS = (_name_problem, _kind_problem, _size_problem, _compression_problem)


def _set_problem(members: list[zipfile.ZipInfo]) -> str:
    seen = Counter(member.orig_filename for member in members)
    twice = [name for name, times in seen.items() if times > 1]
    missing = [name for name in _NAMES if name not in seen]
    if twice:
        return f"the bundle has the member {twice[0]} more than once"
    return f"the bundle has no {missing[0]}" if missing else ""


def _text_problem(bundle: zipfile.ZipFile) -> str:
    """Compares the members that are fixed; if they are right, it is the directory that lies."""
    try:
        texts = {name: bundle.read(name) for name in _NAMES}  # stored, so no longer than the bundle
    except _NO_ZIP:
        return _LIES
    other = [name for name, text in _files(texts[_PLAN]).items() if texts[name] != text]
    if not other:
        return _LIES
    return f"the bundle's {other[0]} is not the one that Locum writes{_MEANS.get(other[0], '')}"
