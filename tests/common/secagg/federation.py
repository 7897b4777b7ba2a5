"""A federation in memory: an authority, a coordinator's key, and sites that take their steps when a test says so.

federation = Federation(["a", "b", "c"]).set_up()
layout = federation.layout(10)
total = federation.collected(federation.context(1), layout, {name: given(values) for name in federation.names})
total.take("a", federation.answer("a", federation.request(total, "a")))

Sites and coordinator can be told to misbehave: `offer(rogue=…)` signs a roster that nobody has checked, `resigned`
changes what a statement says under a key of one's choice.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from numpy.typing import NDArray

from locum.common.canonical import sha256_hex
from locum.common.envelope import seal
from locum.common.identity import PrivateKey, Subject, certificate_pem, new_key, parse_certificate, utc_now
from locum.common.secagg import keys, site
from locum.common.secagg.aggregator import SecureSum, open_roster
from locum.common.secagg.masks import Stream
from locum.common.secagg.ring import CHUNK, Bits, Elements, Ring, Scalar, write_scalars
from locum.common.secagg.roster import Context, Roster, Trust, member_keys, member_of, sign
from locum.common.secagg.site import Offer, Ready, Request
from locum.common.secagg.upload import BOXES, COMMITMENTS, Given, Layout, masked
from locum.common.tensor_files import Arrays, in_memory
from locum.server.authority import Authority, _root

RUN, PLAN, MODEL = "run-1", "a" * 64, "b" * 64
_ROUNDING = bytes(32)
#: A header, the digest of the file of the tensors, the tensors.
Upload = tuple[str, str, Arrays]


def authority(federation: str = "test") -> Authority:
    """A new root."""
    key, certificate = _root(Subject(federation, "authority", federation).to_x509(), utc_now())
    return Authority(key, certificate, timedelta(days=90))


@dataclass
class Site:
    """A site: its key, its certificate (PEM) and its state."""

    name: str
    key: ec.EllipticCurvePrivateKey
    certificate: str
    state: Any = None
    statement: str = ""

    @property
    def ready(self) -> Ready:
        assert isinstance(self.state, Ready)
        return self.state


@dataclass
class Federation:
    """Sites and an aggregator; :meth:`set_up` makes the roster.

    `drawn` is what a site rounds by and makes its noise of.
    """

    names: Sequence[str]
    least: int = 3
    root: Authority = field(default_factory=authority)
    log: ed25519.Ed25519PrivateKey = field(default_factory=ed25519.Ed25519PrivateKey.generate)
    private: bytes = field(default_factory=keys.new_private)
    drawn: Callable[[str], Stream] = lambda _name: Stream(_ROUNDING)
    sites: dict[str, Site] = field(init=False)
    roster: Roster = field(init=False)

    def __post_init__(self) -> None:
        self.sites = {name: self.enrol(name) for name in self.names}

    def enrol(self, name: str, root: Authority | None = None) -> Site:
        """A new site with a certificate of the federation's authority, or of another one."""
        key = new_key()
        return Site(name, key, certificate_pem((root or self.root).issue_site(name, key.public_key())).decode())

    def copy(self) -> Federation:
        """The same sites, which go on by themselves."""
        twin = copy(self)
        twin.sites = {name: replace(found) for name, found in self.sites.items()}
        return twin

    @property
    def trust(self) -> Trust:
        return Trust(self.root.federation, self.root.certificate, self.log.public_key())

    def announce(self, run: str = RUN) -> None:
        for found in self.sites.values():
            found.state, found.statement = site.announce(run, PLAN, site=found.name, key=found.key)

    def offer(self, run: str = RUN, *, rogue: Mapping[str, Site] | None = None) -> Offer:
        """The roster of all sites; with those of `rogue`, unchecked, in the place of those of the same names."""
        if rogue is None:
            for found in self.sites.values():
                certificate = self.trust.site(found.name, found.certificate, utc_now())
                member_keys(found.statement, certificate, site=found.name, run=run, plan=PLAN)
        sites = self.sites | dict(rogue or {})
        members = {
            name: member_of(name, parse_certificate(found.certificate.encode()), found.statement)
            for name, found in sites.items()
        }
        self.roster, envelope = open_roster(
            members, run=run, plan=PLAN, answers=keys.public_of(self.private), key=self.log
        )
        statements = {name: found.statement for name, found in sites.items()}
        return Offer(envelope, statements, {name: found.certificate for name, found in sites.items()})

    def join(self, name: str, offer: Offer) -> dict[str, str]:
        found = self.sites[name]
        found.state, pairs = site.join(
            found.state, offer, trust=self.trust, least=self.least, key=found.key, now=utc_now()
        )
        return pairs

    def set_up(self, run: str = RUN) -> Federation:
        for name, halves in self.halves(run).items():
            self.begin(name, halves)
        return self

    def halves(self, run: str = RUN) -> dict[str, dict[str, str]]:
        """By receiver and sender, the halves of secrets of a new set-up; all sites have joined."""
        self.announce(run)
        offer = self.offer(run)
        pairs = {name: self.join(name, offer) for name in self.sites}
        return {name: {peer: pairs[peer][name] for peer in self.sites if peer != name} for name in self.sites}

    def begin(self, name: str, halves: Mapping[str, str]) -> None:
        self.sites[name].state = site.begin(self.sites[name].state, halves)

    # --- a sum

    def context(self, step: int = 1, **changes: Any) -> Context:
        values: dict[str, Any] = {"purpose": "train", "round": step, "attempt": 1, "model": MODEL, **changes}
        return Context(roster=self.roster.digest, step=step, **values)

    def layout(self, size: int = 10, bits: Bits = 32, bound: float = 1.0) -> Layout:
        lane = (Scalar("weight", 1, 1.0), Scalar("cases", 1, 2.0**32))
        return Layout(self.roster, Ring(bits, len(self.names), bound), size, lane)

    def open_sum(self, context: Context, layout: Layout) -> SecureSum:
        certificates = {name: self.trust.site(name, found.certificate, utc_now()) for name, found in self.sites.items()}
        return SecureSum(context, layout, certificates, self.private)

    def upload(self, name: str, context: Context, layout: Layout, given: Given) -> Upload:
        """A site's upload: its header, its body's digest and its tensors."""
        found = self.sites[name]
        found.state, masking = site.mask(found.ready, context)
        tensors = in_memory(masked(layout, given, masking, self.drawn(name)))
        body = body_of(tensors)
        return site.header(found.ready, context, body, found.key), body, tensors

    def signed(self, context: Context) -> str:
        return sign(context, self.log)

    def request(self, total: SecureSum, name: str) -> Request:
        boxes = total.boxes_for(name)
        rows = {giver: boxes[row].tobytes() for row, giver in enumerate(total.survivors)}
        return Request(total.context, total.survivors, total.headers, rows)

    def answer(self, name: str, request: Request, before: Sequence[str] | None = None) -> bytes:
        found = self.sites[name]
        found.state, sealed = site.answer(found.ready, request, least=self.least, before=before)
        return sealed

    def uploads(self, context: Context, layout: Layout, given: Mapping[str, Given]) -> dict[str, Upload]:
        return {name: self.upload(name, context, layout, what) for name, what in given.items()}

    def folded(self, context: Context, layout: Layout, uploads: Mapping[str, Upload]) -> SecureSum:
        """A sum to which these were added."""
        total = self.open_sum(context, layout)
        for name, upload in uploads.items():
            total.fold(name, *upload)
        return total

    def collected(self, context: Context, layout: Layout, given: Mapping[str, Given]) -> SecureSum:
        """A sum to which these have given."""
        return self.folded(context, layout, self.uploads(context, layout, given))

    def unmasked(
        self, layout: Layout, given: Mapping[str, Given], *, step: int = 1, silent: Collection[str] = ()
    ) -> SecureSum:
        """A whole sum of those who give, without the answers of `silent`."""
        total = self.collected(self.context(step), layout, given)
        for name in total.survivors:
            if name not in silent:
                total.take(name, self.answer(name, self.request(total, name)))
        total.unmask(self.least)
        return total


def quantised(layout: Layout, given: Given) -> tuple[NDArray[np.uint64], Elements]:
    """What a site gives, in the ring and without a mask: the scalars' lane and the update."""
    rounding, update = Stream(_ROUNDING), np.empty(layout.size, layout.ring.dtype)
    flat = np.concatenate([given.update[name].reshape(-1) for name in sorted(given.update)] or [np.empty(0)])
    for start in range(0, flat.size, CHUNK):
        draws = np.empty(min(CHUNK, flat.size - start), np.uint32)
        rounding.fill(draws)
        layout.ring.write(flat[start : start + CHUNK], given.weight, draws, update[start : start + CHUNK])
    return write_scalars(layout.lane, given.scalars, len(layout.roster.members)), update


def resigned(envelope: str, key: PrivateKey, kind: str | None = None, **changes: Any) -> str:
    """A statement with other fields, or of another kind, signed with a key."""
    found = json.loads(envelope)
    return seal(kind or found["kind"], found["body"] | changes, key).decode()


def body_of(tensors: Arrays) -> str:
    """The digest that a header names."""
    from safetensors.numpy import save

    return sha256_hex(save(dict(tensors)))


def given(value: NDArray[Any], weight: float = 1.0, cases: float = 10.0) -> Given:
    """An update of one tensor, with its scalars."""
    scalars = {"weight": np.array([weight]), "cases": np.array([cases])}
    return Given({"w": value} if value.size else {}, weight, scalars)


__all__ = [
    "BOXES",
    "COMMITMENTS",
    "MODEL",
    "PLAN",
    "RUN",
    "Federation",
    "Site",
    "Upload",
    "authority",
    "body_of",
    "given",
    "quantised",
    "resigned",
]
