"""What a secure sum costs beside Flower's SecAgg+ (`flower_secagg.py`): seconds of a processor, bytes and memory.

Rules:
  * Both have the same vector, the same sites and the same threshold, in one run, in turn. Every site gives, and the
    mean that comes out is compared with the vector: a wrong sum is an error.
  * Seconds are those of the processor, of all threads. Ours are measured once made in memory, and once written to a
    file, hashed and signed as an agent does; the file's pages are the system's. Flower's update begins and ends as
    bytes, which is taken away again where ours has no file.
  * What is done once a run at our sites (keys, roster, secrets of pairs) is not counted, nor are Flower's key pairs,
    though it makes them anew in each round. Its key agreement is part of sharing and is counted.
  * The server begins with the uploads (files; bytes in memory) and ends with the unmasked sum. Neither side's answers
    are in it; they are a row of their own.
  * Memory is the most that a process of its own had above what it had before, the vector included in that.
"""

from __future__ import annotations

import secrets
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from numpy.typing import NDArray

from locum.common.blobs import Blob
from locum.common.errors import RunError
from locum.common.identity import certificate_pem, new_key, utc_now
from locum.common.secagg import keys, site
from locum.common.secagg.aggregator import SecureSum, open_roster
from locum.common.secagg.masks import Stream
from locum.common.secagg.ring import Ring, Scalar
from locum.common.secagg.roster import Context, Roster, Trust, member_of, threshold_of
from locum.common.secagg.site import Offer, Ready, Request
from locum.common.secagg.upload import UPDATE, Given, Layout, masked
from locum.common.tensor_files import Lazy, Sendable, map_tensors, write_tensors
from locum.server.authority import initialise, load_log_key
from locum.server.home import Home, ServerConfig
from locum.simulations.benchmarks.flower_secagg import MAX_WEIGHT, SecAggPlus
from locum.simulations.benchmarks.memory import above, alone
from locum.simulations.benchmarks.rows import Row

_SIZE, _LARGE, _SITES, _REPEATS = 10_000_000, 100_000_000, (5, 10, 20), 5
_MIB = 1 << 20
_RUN, _DIGEST = "benchmark", "0" * 64
_PIECE = 1 << 20
#: Far above a step of either side's rounding, far below a wrong sum.
_TOLERANCE = 1e-4

Vector = NDArray[np.float32]
T = TypeVar("T")


@dataclass(frozen=True)
class _Uploaded:
    header: str
    path: Path
    blob: Blob


class Locum:
    """Sites that all give the same vector, each with a weight of its own, and their aggregator.

    Attributes:
        names: the sites, in the roster's order.
        layout: of an upload.
    """

    def __init__(self, folder: Path, vector: Vector, *, sites: int) -> None:
        self.names = [f"s{number:02}" for number in range(sites)]
        self._folder, self._vector, self._private = folder, vector, keys.new_private()
        self._keys = {name: new_key() for name in self.names}
        self._trust, pems = _federation(folder / "coordinator", self._keys)
        self._certificates: dict[str, x509.Certificate] = {
            name: self._trust.site(name, pem, utc_now()) for name, pem in pems.items()
        }
        roster = self._set_up(pems)
        lane = (Scalar("weight", 1, 1.0),)
        self.layout = Layout(roster, Ring(32, sites, 1.0), vector.size, lane)
        self._context = Context(roster=roster.digest, step=1, purpose="train", round=1, attempt=1, model=_DIGEST)
        self._given: dict[str, _Uploaded] = {}

    def _set_up(self, pems: dict[str, str]) -> Roster:
        announced = {name: site.announce(_RUN, _DIGEST, site=name, key=key) for name, key in self._keys.items()}
        told = {name: statement for name, (_, statement) in announced.items()}
        members = {name: member_of(name, self._certificates[name], told[name]) for name in self.names}
        log, public = load_log_key(Home(self._folder / "coordinator")), keys.public_of(self._private)
        roster, envelope = open_roster(members, run=_RUN, plan=_DIGEST, answers=public, key=log)
        offer = Offer(envelope, told, pems)
        joined = {
            name: site.join(state, offer, trust=self._trust, least=3, key=self._keys[name], now=utc_now())
            for name, (state, _) in announced.items()
        }
        self._states: dict[str, Ready] = {
            name: site.begin(state, {peer: joined[peer][1][name] for peer in self.names if peer != name})
            for name, (state, _) in joined.items()
        }
        return roster

    def weight(self, name: str) -> float:
        """w'; the first site's is 1/n, the last one's is 1."""
        return self.layout.roster.places[name] / len(self.names)

    def mask(self, name: str, out: NDArray[np.uint32]) -> None:
        """All that a site computes for an upload, into memory; its step is not spent."""
        _, tensors = self._masked(name)
        update, start = tensors[UPDATE], 0
        for piece in update.pieces if isinstance(update, Lazy) else ():
            out[start : start + piece.size] = piece
            start += piece.size

    def upload(self, name: str) -> None:
        """The upload as a file, hashed and signed."""
        self._states[name], tensors = self._masked(name)
        path = self._folder / f"{name}.safetensors"
        blob = write_tensors(path, tensors)
        header = site.header(self._states[name], self._context, blob.sha256, self._keys[name])
        self._given[name] = _Uploaded(header, path, blob)

    def _masked(self, name: str) -> tuple[Ready, Sendable]:
        state, masking = site.mask(self._states[name], self._context)
        weight = self.weight(name)
        given = Given({"w": self._vector}, weight, {"weight": np.array([weight])})
        return state, masked(self.layout, given, masking, Stream(secrets.token_bytes(32)))

    def sent(self, name: str) -> int:
        """Bytes of its file and header."""
        return self._given[name].blob.size + len(self._given[name].header)

    def answer(self, name: str, total: SecureSum) -> bytes:
        """A site's answer; unlike a real one, the site gives another for other survivors."""
        boxes = total.boxes_for(name)
        rows = {giver: boxes[row].tobytes() for row, giver in enumerate(total.survivors)}
        request = Request(total.context, total.survivors, total.headers, rows)
        return site.answer(self._states[name], request, least=3, before=None)[1]

    def fold(self, survivors: Sequence[str]) -> SecureSum:
        """A sum of the files, each mapped when it is its turn."""
        total = SecureSum(self._context, self.layout, self._certificates, self._private)
        for name in survivors:
            given = self._given[name]
            total.fold(name, given.header, given.blob.sha256, map_tensors(given.path, given.blob.sha256))
        return total

    def unmask(self, total: SecureSum, answers: dict[str, bytes]) -> None:
        """Takes the answers, and the masks off the sum."""
        for name, sealed in answers.items():
            total.take(name, sealed)
        total.unmask(3)

    def mean(self, total: SecureSum, part: slice) -> NDArray[np.float64]:
        """Some coordinates of the weighted mean that an unmasked sum stands for."""
        weights = sum(self.weight(name) for name in total.survivors)
        return self.layout.ring.read(total.update[part]) / weights


def _federation(folder: Path, sites: dict[str, ec.EllipticCurvePrivateKey]) -> tuple[Trust, dict[str, str]]:
    """What sites trust, and their certificates (PEM)."""
    home = Home(folder)
    authority = initialise(home, ServerConfig(name="benchmark", host="localhost", superlink_port=2, hints_port=3))
    pems = {name: certificate_pem(authority.issue_site(name, key.public_key())).decode() for name, key in sites.items()}
    return Trust(authority.federation, authority.certificate, load_log_key(home).public_key()), pems


def vector_of(size: int) -> Vector:
    """Numbers between −1 and 1."""
    drawn = np.random.default_rng(0).random(size, np.float32)
    drawn *= 2
    drawn -= 1
    return drawn


def check(mean: Callable[[slice], NDArray[np.float64]], vector: Vector) -> None:
    """Raises RunError unless a mean is that of sites which all gave `vector`."""
    for start in range(0, vector.size, _PIECE):
        part = slice(start, min(start + _PIECE, vector.size))
        if not np.allclose(mean(part), vector[part], rtol=0, atol=_TOLERANCE):
            raise RunError("a secure sum is not the sum of what was given", "this is a defect: do not use the numbers")


# --- seconds


def measure() -> Iterator[Row]:
    """The table of `docs/benchmarks.md`."""
    vector = vector_of(_SIZE)
    for sites in _SITES:
        with tempfile.TemporaryDirectory(prefix="locum-secure-") as folder:
            yield from beside_flower(Path(folder), vector, sites)
    yield from _memory()
    with tempfile.TemporaryDirectory(prefix="locum-secure-") as folder:
        yield from _large(Path(folder), vector_of(_LARGE))


def beside_flower(folder: Path, vector: Vector, sites: int) -> Iterator[Row]:
    """Both sides with `sites` sites, and with one of them gone; raises RunError for a wrong sum."""
    ours = Locum(folder, vector, sites=sites)
    theirs = SecAggPlus(vector, sites=sites, threshold=threshold_of(sites))
    what = f"{vector.size / 1e6:g} M, {sites} sites"
    yield from _clients(what, ours, theirs, np.empty(vector.size, np.uint32))
    yield from _servers(f"{what}: server", ours, theirs, vector, gone=0)
    yield from _servers(f"{what}: server, one site gone", ours, theirs, vector, gone=1)


def _clients(what: str, ours: Locum, theirs: SecAggPlus, out: NDArray[np.uint32]) -> Iterator[Row]:
    clients = dict(enumerate(ours.names, start=1))
    keys_made = _median(_seconds(theirs.set_up, client) for client in clients)
    shared = [_seconds(theirs.share, client) for client in clients]
    masked_like = np.ones(out.size, np.int64)
    out.fill(0)  # its pages are there before anything is measured
    timed = []
    for client, name in clients.items():
        mask, file = _seconds(ours.mask, name, out), _seconds(ours.upload, name)
        flower = _seconds(theirs.collect, client, round(MAX_WEIGHT * ours.weight(name)))
        timed.append((mask, file, flower, _seconds(theirs.serialise, masked_like)))
    mask, file, flower, serial = (_median(column) for column in zip(*timed, strict=True))
    flower += _median(shared)
    yield Row(f"{what}: client, Locum, in memory", mask, "s")
    yield Row(f"{what}: client, Flower, without bytes", flower - serial, "s")
    yield Row(f"{what}: client, Flower / Locum", (flower - serial) / mask, "×")
    yield Row(f"{what}: client, Locum, file written, hashed, signed", file, "s")
    yield Row(f"{what}: client, Flower, made bytes", flower, "s")
    yield Row(f"{what}: client as sent, Flower / Locum", flower / file, "×")
    yield Row(f"{what}: client, Flower's key pairs, not counted above", keys_made, "s")
    sent = ours.sent(ours.names[0]), theirs.sent(1)
    yield Row(f"{what}: upload, Locum", sent[0] / 1e6, "MB")
    yield Row(f"{what}: upload, Flower", sent[1] / 1e6, "MB")


def _servers(what: str, ours: Locum, theirs: SecAggPlus, vector: Vector, *, gone: int) -> Iterator[Row]:
    names = ours.names[: len(ours.names) - gone]
    clients = range(1, len(names) + 1)
    folded = ours.fold(names)
    answers = {name: ours.answer(name, folded) for name in names}
    told = [theirs.answer(client, clients) for client in clients]
    timed = []
    for _ in range(_REPEATS):
        mine, total = _timed(_ours, ours, names, answers)
        flowers, unmasked = _timed(lambda: theirs.unmask(theirs.fold(clients), clients, told))
        timed.append((mine, flowers))
    check(lambda part: ours.mean(total, part), vector)
    mean = theirs.mean(unmasked, len(clients))
    check(lambda part: mean[part], vector)
    yield Row(f"{what}, Locum", _median(mine for mine, _ in timed), "s")
    yield Row(f"{what}, Flower", _median(flowers for _, flowers in timed), "s")
    yield Row(f"{what}, Flower / Locum", _median(flowers / mine for mine, flowers in timed), "×")
    yield Row(f"{what}: a site's answer, Locum", _seconds(ours.answer, names[0], folded), "s")


def _ours(ours: Locum, names: Sequence[str], answers: dict[str, bytes]) -> SecureSum:
    total = ours.fold(names)
    ours.unmask(total, answers)
    return total


def _large(folder: Path, vector: Vector, sites: int = 5) -> Iterator[Row]:
    """Ours alone, with a vector for which Flower's would take minutes."""
    ours = Locum(folder, vector, sites=sites)
    what = f"{vector.size / 1e6:g} M, {sites} sites"
    out = np.ones(vector.size, np.uint32)
    yield Row(f"{what}: client, Locum, in memory", _median(_seconds(ours.mask, name, out) for name in ours.names), "s")
    files = _median(_seconds(ours.upload, name) for name in ours.names)
    yield Row(f"{what}: client, Locum, file written, hashed, signed", files, "s")
    folded = ours.fold(ours.names)
    answers = {name: ours.answer(name, folded) for name in ours.names}
    ours.unmask(folded, answers)
    check(lambda part: ours.mean(folded, part), vector)
    seconds = _median(_seconds(_ours, ours, ours.names, answers) for _ in range(_REPEATS))
    yield Row(f"{what}: server, Locum", seconds, "s")


def _timed(call: Callable[..., T], *arguments: Any) -> tuple[float, T]:
    """Seconds of the processor, of all threads, and what came back."""
    began = time.process_time()
    result = call(*arguments)
    return time.process_time() - began, result


def _seconds(call: Callable[..., Any], *arguments: Any) -> float:
    return _timed(call, *arguments)[0]


def _median(values: Iterable[float]) -> float:
    return float(statistics.median(values))


# --- memory


def _memory() -> Iterator[Row]:
    what = f"{_SIZE / 1e6:g} M"
    yield Row(f"{what}, 5 sites: client, Locum, above the vector, its copy included", alone(_mask_peak, 5), "MiB")
    yield Row(f"{what}, 5 sites: client, Locum, above the vector, as a file", alone(_upload_peak, 5), "MiB")
    yield Row(f"{what}, 5 sites: client, Flower, above the vector", alone(_flower_peak, 5), "MiB")
    for sites in _SITES:
        yield Row(f"{what}, {sites} sites: server, Locum", alone(_server_peak, sites), "MiB")


def _mask_peak(sites: int) -> float:
    with tempfile.TemporaryDirectory(prefix="locum-secure-") as folder:
        ours = Locum(Path(folder), vector_of(_SIZE), sites=sites)
        return above(lambda: ours.mask(ours.names[0], np.empty(_SIZE, np.uint32)))


def _upload_peak(sites: int) -> float:
    with tempfile.TemporaryDirectory(prefix="locum-secure-") as folder:
        ours = Locum(Path(folder), vector_of(_SIZE), sites=sites)
        return above(lambda: ours.upload(ours.names[0]))


def _server_peak(sites: int) -> float:
    with tempfile.TemporaryDirectory(prefix="locum-secure-") as folder:
        ours = Locum(Path(folder), vector_of(_SIZE), sites=sites)
        for name in ours.names:
            ours.upload(name)
        folded = ours.fold(ours.names)
        answers = {name: ours.answer(name, folded) for name in ours.names}
        del folded
        return above(lambda: _ours(ours, ours.names, answers))


def _flower_peak(sites: int) -> float:
    theirs = SecAggPlus(vector_of(_SIZE), sites=sites, threshold=threshold_of(sites))
    for client in range(1, sites + 1):
        theirs.set_up(client)
    for client in range(1, sites + 1):
        theirs.share(client)
    return above(lambda: theirs.collect(1, 200))
