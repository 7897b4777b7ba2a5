"""The reviewer's bundle: one zip that holds what a run left behind, and nothing that is not needed to check it.

manifest.json       what this is, and the size and SHA-256 of every other member (canonical JSON)
authority.pem       the federation's root certificate            log.pem   that of the log key
certificates.pem    every certificate that was issued to a site, one after the other
entries.jsonl       the federation's log, an entry a line        checkpoints.jsonl   signed checkpoints, a line each
proposal.json       the plan as it was put before the sites, signed with the log key
plan.json           the plan, canonical JSON
run.json, model_card.md, statement.json, model.safetensors       of a run that has ended; the model may be left out

Rules:
  * Members are read by name, in place and as a stream. Nothing is unpacked onto a disk.
  * Nothing is read beyond the limit of its member, whatever the zip says of its size.
  * A member that is unknown, there twice or missing, and one that is not what the manifest says, is an error.
  * The same run gives the same bytes: no time of writing, no order of a folder.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from locum.common.audit.rules import shown
from locum.common.canonical import canonical_json
from locum.common.errors import DataError
from locum.common.log.entries import Digest, RunName

MANIFEST, ENTRIES, CHECKPOINTS = "manifest.json", "entries.jsonl", "checkpoints.jsonl"
AUTHORITY, LOG_KEY, CERTIFICATES = "authority.pem", "log.pem", "certificates.pem"
PROPOSAL, PLAN = "proposal.json", "plan.json"
SUMMARY, CARD, STATEMENT, MODEL = "run.json", "model_card.md", "statement.json", "model.safetensors"

_MIB = 1 << 20
#: The most bytes of each member. Lines of the log are read one at a time.
LIMITS: Mapping[str, int] = {
    MANIFEST: _MIB,
    AUTHORITY: 64 << 10,
    LOG_KEY: 64 << 10,
    CERTIFICATES: 64 * _MIB,
    ENTRIES: 1 << 40,
    CHECKPOINTS: 1 << 38,
    PROPOSAL: 2 * _MIB,
    PLAN: 2 * _MIB,
    SUMMARY: 256 * _MIB,
    CARD: 16 * _MIB,
    STATEMENT: 16 * _MIB,
    MODEL: 1 << 40,
}
NEEDED = (MANIFEST, AUTHORITY, LOG_KEY, CERTIFICATES, ENTRIES, CHECKPOINTS, PROPOSAL, PLAN)
#: One entry, or one checkpoint with its cosignatures.
MOST_LINE = 4 * _MIB
VERSION: Literal[1] = 1
_CHUNK = 1 << 20
#: More than a bundle ever has, and few enough to be looked at one by one.
_MOST_MEMBERS = 64
_END, _END_BYTES, _MOST_DIRECTORY = b"PK\5\6", 22, 64 << 10
_DAMAGED = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, OSError, ValueError)
#: What we write; of other methods Python reads more at once than it is asked for.
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_REMEDY = "ask the coordinator for the bundle again: locum audit bundle RUN"


class BundleError(DataError):
    """A file that is no bundle, or a damaged one."""


class Member(BaseModel):
    """What a member of the bundle is."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    bytes: int = Field(ge=0)
    sha256: Digest


class Manifest(BaseModel):
    """`manifest.json`.

    Attributes:
        version: of this form.
        federation: the federation's name.
        run: the run that the bundle is of; the log is that of the whole federation.
        plan: the digest of the run's plan.
        model: the SHA-256 of the released model's file, also where the file was left out; null if none was released.
        members: every other member.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    locum: Literal["audit bundle"] = "audit bundle"
    version: Literal[1] = VERSION
    federation: str = Field(min_length=1, max_length=64)
    run: RunName
    plan: Digest
    model: Digest | None
    members: dict[str, Member]


# --- writing

#: Where a member comes from: its bytes, a file, or pieces of it in order.
Source = bytes | Path | Iterable[bytes]


@dataclass(frozen=True)
class Parts:
    """What a bundle is made of."""

    federation: str
    run: str
    plan: str
    model: str | None
    members: Mapping[str, Source] = field(repr=False)


def write_bundle(path: Path, parts: Parts) -> Manifest:
    """Writes a bundle, piece by piece; raises OSError, and then `path` is not a whole zip."""
    written: dict[str, Member] = {}
    with zipfile.ZipFile(path, "w", allowZip64=True) as archive:
        for name in LIMITS:
            if name in parts.members:
                written[name] = _put(archive, name, parts.members[name])
        manifest = Manifest(
            federation=parts.federation, run=parts.run, plan=parts.plan, model=parts.model, members=written
        )
        _put(archive, MANIFEST, canonical_json(manifest.model_dump(mode="json")))
    return manifest


def _put(archive: zipfile.ZipFile, name: str, source: Source) -> Member:
    info = zipfile.ZipInfo(name)  # dated 1980, so that the same content gives the same bytes
    info.compress_type = zipfile.ZIP_STORED if name == MODEL else zipfile.ZIP_DEFLATED
    info.external_attr = 0o644 << 16
    size, sha256 = 0, hashlib.sha256()
    with archive.open(info, "w", force_zip64=True) as target:
        for piece in _pieces(source):
            size += len(piece)
            sha256.update(piece)
            target.write(piece)
    return Member(bytes=size, sha256=sha256.hexdigest())


def _pieces(source: Source) -> Iterator[bytes]:
    if isinstance(source, bytes):
        yield source
    elif isinstance(source, Path):
        with source.open("rb") as file:
            yield from iter(lambda: file.read(_CHUNK), b"")
    else:
        yield from source


# --- reading


@dataclass(frozen=True)
class Bundle:
    """An open bundle. Every method raises BundleError for a member that is damaged."""

    path: Path
    manifest: Manifest
    _archive: zipfile.ZipFile = field(repr=False)

    def has(self, name: str) -> bool:
        """Whether this member is there."""
        return name in self.manifest.members

    def read(self, name: str) -> bytes:
        """A small member, whole, as the manifest says it is."""
        if not self.has(name):
            raise BundleError(f"{self.path} has no {name}", _REMEDY)
        content = b"".join(self._chunks(name))
        self._check(name, len(content), hashlib.sha256(content).hexdigest())
        return content

    def sha256(self, name: str) -> str:
        """The SHA-256 of a member of any size."""
        size, sha256 = 0, hashlib.sha256()
        for chunk in self._chunks(name):
            size += len(chunk)
            sha256.update(chunk)
        self._check(name, size, sha256.hexdigest())
        return sha256.hexdigest()

    def lines(self, name: str) -> Iterator[bytes]:
        """The lines of a member, without their ends, one at a time; at the end it is compared with the manifest."""
        size, sha256, number = 0, hashlib.sha256(), 0
        with self._open(name) as opened, io.BufferedReader(opened, _CHUNK) as file:  # type: ignore[type-var]
            while line := _line(file, self.path, name):
                size += len(line)
                sha256.update(line)
                if not line.endswith(b"\n"):
                    what = "longer than any can be" if len(line) > MOST_LINE else "torn: it has no end"
                    raise BundleError(f"line {number + 1} of {name} is {what}", _REMEDY)
                if size > self._limit(name):
                    raise BundleError(f"{name} is longer than the manifest says", _REMEDY)
                number += 1
                yield line[:-1]
        self._check(name, size, sha256.hexdigest())

    def _chunks(self, name: str) -> Iterator[bytes]:
        left = self._limit(name) + 1
        with self._open(name) as file:
            while chunk := _read(file, min(_CHUNK, left), self.path, name):
                left -= len(chunk)
                if left == 0:
                    raise BundleError(f"{name} is longer than the manifest says", _REMEDY)
                yield chunk

    def _limit(self, name: str) -> int:
        return min(LIMITS[name], self.manifest.members[name].bytes)

    def _check(self, name: str, size: int, sha256: str) -> None:
        expected = self.manifest.members[name]
        if (size, sha256) != (expected.bytes, expected.sha256):
            raise BundleError(f"{name} is not what the manifest says", _REMEDY)

    @contextmanager
    def _open(self, name: str) -> Iterator[IO[bytes]]:
        try:
            file = self._archive.open(name)
        except _DAMAGED as error:
            raise BundleError(f"{name} in {self.path} is damaged", _REMEDY) from error
        with file:
            yield file


@contextmanager
def open_bundle(path: Path) -> Iterator[Bundle]:
    """Opens a bundle and reads its manifest; raises BundleError."""
    _check_zip(path)
    try:
        archive = zipfile.ZipFile(path)
    except _DAMAGED as error:
        raise BundleError(f"{path} is no zip that can be read", _REMEDY) from error
    with archive:
        _check_names(path, archive)
        yield Bundle(path, _manifest(path, archive), archive)


def _check_zip(path: Path) -> None:
    """Looks at the end of the file first: a directory of a million members is not read."""
    try:
        with path.open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - _END_BYTES))
            end = file.read(_END_BYTES)
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error.strerror}", "give the path of a bundle") from error
    if len(end) < _END_BYTES or not end.startswith(_END):
        raise BundleError(f"{path} is no bundle: it is not a whole zip", _REMEDY)
    count, directory = int.from_bytes(end[10:12], "little"), int.from_bytes(end[12:16], "little")
    if count > _MOST_MEMBERS or directory > _MOST_DIRECTORY:
        raise BundleError(f"{path} is no bundle: it has {count} members", _REMEDY)


def _check_names(path: Path, archive: zipfile.ZipFile) -> None:
    names = archive.namelist()
    for name in names:
        if names.count(name) > 1:
            raise BundleError(f"{path} has {name} twice", _REMEDY)
        if name not in LIMITS:
            raise BundleError(f"{path} has a member that no bundle has: {shown(name, 60)}", _REMEDY)
    for name in NEEDED:
        if name not in names:
            raise BundleError(f"{path} has no {name}", _REMEDY)
    for info in archive.infolist():
        if info.file_size > LIMITS[info.filename]:
            raise BundleError(f"{info.filename} is larger than any can be: {info.file_size} bytes", _REMEDY)
        if info.compress_type not in _METHODS:
            raise BundleError(f"{info.filename} is packed in a way that no bundle is", _REMEDY)


def _manifest(path: Path, archive: zipfile.ZipFile) -> Manifest:
    try:
        with archive.open(MANIFEST) as file:
            content = file.read(LIMITS[MANIFEST] + 1)
        manifest = Manifest.model_validate(json.loads(content))
        canonical = canonical_json(manifest.model_dump(mode="json")) == content
    except (*_DAMAGED, ValidationError, RecursionError) as error:
        raise BundleError(f"the manifest of {path} cannot be read", _REMEDY) from error
    if not canonical:
        raise BundleError(f"the manifest of {path} is not in canonical JSON", _REMEDY)
    if set(manifest.members) != set(archive.namelist()) - {MANIFEST}:
        raise BundleError(f"the manifest of {path} lists other members than there are", _REMEDY)
    return manifest


def _line(file: IO[bytes], path: Path, name: str) -> bytes:
    try:
        return file.readline(MOST_LINE + 1)
    except _DAMAGED as error:
        raise BundleError(f"{name} in {path} is damaged", _REMEDY) from error


def _read(file: IO[bytes], size: int, path: Path, name: str) -> bytes:
    try:
        return file.read(size)
    except _DAMAGED as error:
        raise BundleError(f"{name} in {path} is damaged", _REMEDY) from error
