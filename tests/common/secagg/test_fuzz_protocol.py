"""Noise at every step of a set-up and a sum: it is refused in words, changes nothing, and an honest sum completes.

What comes is damaged, cut, put in another order, replayed from an earlier step, taken from another run or another
federation, of another kind, or wrong under a signature that is right. Short form: about 1,500 cases. Long form: 60,000.
The cases follow from the seed; keys do not, and no case depends on them.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from typing import Any, TypeVar

import numpy as np
import pytest
from hypothesis import given as examples
from hypothesis import settings
from hypothesis import strategies as st
from safetensors.numpy import save

from locum.common.canonical import canonical_json, sha256_hex
from locum.common.envelope import EnvelopeError, seal
from locum.common.identity import PrivateKey, base64url, parse_certificate, utc_now
from locum.common.messages import (
    BeginTask,
    Header,
    KeysResult,
    KeysTask,
    MaskedResult,
    MessageError,
    PairsResult,
    PairsTask,
    Secured,
    TrainTask,
    UnmaskTask,
    parse_header,
    tensors_from,
)
from locum.common.secagg import keys, site
from locum.common.secagg.aggregator import SecureSum
from locum.common.secagg.roster import _KINDS, Context, SecureRefusal, Statement, verified
from locum.common.secagg.site import Announced, Joined, Offer, Ready, Request, answer_purpose
from locum.common.secagg.upload import SCALARS, UPDATE, Layout
from tests.common.secagg.federation import MODEL, PLAN, RUN, Federation, Upload, body_of, given, quantised

SEED = 20262
NAMES = ("a", "b", "c", "d")
FORMS = [1, pytest.param(40, marks=pytest.mark.slow)]
#: What stands in a document where something else should.
WORDS: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2**53 - 1, 2**53, 1e300, 0.5, "", "a", "b", "x" * 200, "ü\u2028", "\0", "../a"),
    *("0" * 64, "F" * 64, "locum-secagg-1", "AA", "A" * 43, "====", [], {}, [[]], {"a": "b"}, ["a", "b", "c"]),
)
T = TypeVar("T")


class Noise:
    """What is nearly right, from a seed."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def one_of(self, *choices: T) -> T:
        return self.random.choice(choices)

    def bytes(self, content: bytes) -> bytes:
        """Bytes of which some are changed, cut out, put in or moved."""
        found, place = bytearray(content), self.random.randrange(len(content) + 1)
        change = self.one_of("flip", "flip", "cut", "end", "put in", "turn", "others", "twice")
        if change == "flip" and content:
            found[place % len(found)] ^= 1 << self.random.randrange(8)
        elif change == "cut":
            del found[place : place + self.one_of(1, 2, 33)]
        elif change == "end":
            del found[place:]
        elif change == "put in":
            found[place:place] = self.random.randbytes(self.one_of(1, 2, 33))
        elif change == "turn":
            found = found[place:] + found[:place]
        elif change == "others":
            found = bytearray(self.random.randbytes(self.one_of(0, 1, 16, 33, len(content))))
        else:
            found += content
        return bytes(found)

    def text(self, content: str) -> str:
        """The same of a text."""
        return self.bytes(content.encode()).decode(errors=self.one_of("replace", "ignore", "surrogateescape"))

    def document(self, found: Any) -> Any:
        """Plain data with one part of another kind, gone, new, doubled or in another order."""
        if isinstance(found, dict) and found and self.random.random() < 0.8:
            name = self.random.choice(list(found))
            change = self.one_of("into", "into", "into", "gone", "new", "swap")
            if change == "gone":
                return {other: value for other, value in found.items() if other != name}
            if change == "new":
                return {**found, self.one_of("more", "site", "x" * 60, "__class__"): self.one_of(*WORDS)}
            other = self.random.choice(list(found))
            return {**found, name: self.document(found[name]) if change == "into" else found[other]}
        if isinstance(found, list) and found and self.random.random() < 0.8:
            place = self.random.randrange(len(found))
            changed = [*found[:place], self.document(found[place]), *found[place + 1 :]]
            return self.one_of(changed, changed, found[::-1], found + found[:1], found[:place], found * 30)
        if isinstance(found, str) and self.random.random() < 0.5:
            return self.text(found)
        return self.one_of(*WORDS)


# --- scenes


@dataclass
class Scene:
    """A federation, and all that is sent in a set-up and in its first two sums."""

    federation: Federation
    run: str = RUN
    announced: dict[str, Announced] = field(init=False)
    joined: dict[str, Joined] = field(init=False)
    ready: dict[str, Ready] = field(init=False)

    def __post_init__(self) -> None:
        federation = self.federation
        federation.announce(self.run)
        self.announced = {name: found.state for name, found in federation.sites.items()}
        self.offer = federation.offer(self.run)
        pairs = {name: federation.join(name, self.offer) for name in NAMES}
        self.joined = {name: found.state for name, found in federation.sites.items()}
        self.halves = {name: {peer: pairs[peer][name] for peer in NAMES if peer != name} for name in NAMES}
        for name in NAMES:
            federation.begin(name, self.halves[name])
        self.layout = federation.layout(20)
        self.earlier = Summed(federation, self.layout, 1)
        self.ready = {name: found.ready for name, found in federation.sites.items()}
        self.now = Summed(federation, self.layout, 2)

    @cached_property
    def sealed_key(self) -> bytes:
        """A model's key, sealed to a."""
        purpose = site.model_purpose(self.ready["a"].roster, MODEL)
        return keys.seal(keys.public_of(self.ready["a"].models), purpose, bytes(32))

    @cached_property
    def texts(self) -> list[str]:
        """All that is sent as text."""
        offer, sums = self.offer, (self.earlier, self.now)
        found = [offer.roster, *offer.keys.values(), *offer.certificates.values()]
        found += [half for halves in self.halves.values() for half in halves.values()]
        return found + [text for total in sums for text in (total.context, *(up[0] for up in total.uploads.values()))]

    @cached_property
    def bytes(self) -> list[bytes]:
        """All that is sent as bytes."""
        sums = (self.earlier, self.now)
        found = [box for total in sums for request in total.requests.values() for box in request.boxes.values()]
        return found + [answer for total in sums for answer in total.answers.values()] + [self.sealed_key]


@dataclass
class Summed:
    """All that is sent in one sum."""

    federation: Federation
    layout: Layout
    step: int

    def __post_init__(self) -> None:
        federation, about = self.federation, self.federation.context(self.step)
        self.context = federation.signed(about)
        self.values = {name: given(np.full(self.layout.size, 0.1)) for name in NAMES}
        self.uploads = federation.uploads(about, self.layout, self.values)
        self.given = {name: found.ready for name, found in federation.sites.items()}
        self.total = federation.folded(about, self.layout, self.uploads)
        self.requests = {name: federation.request(self.total, name) for name in NAMES}
        self.answers = {name: federation.answer(name, self.requests[name]) for name in NAMES}

    def sum_of(self, *names: str) -> SecureSum:
        """The sum to which these have given."""
        uploads = {name: self.uploads[name] for name in names}
        return self.federation.folded(self.federation.context(self.step), self.layout, uploads)

    def completes(self, total: SecureSum) -> None:
        """Takes the honest answers; the sum is that of the four sites."""
        for name in NAMES:
            total.take(name, self.answers[name])
        assert total.unmask(3) == []
        plain = [quantised(self.layout, self.values[name]) for name in NAMES]
        assert (total.scalars == np.sum([scalars for scalars, _ in plain], axis=0, dtype=np.uint64)).all()
        assert (total.update == np.sum([update for _, update in plain], axis=0, dtype=np.uint32)).all()


@cache
def _scenes() -> tuple[Scene, Scene, Scene]:
    """The one that is attacked; another run of the same sites; other sites of the same names."""
    federation = Federation(NAMES)
    return Scene(federation.copy()), Scene(federation.copy(), "run-2"), Scene(Federation(NAMES))


@dataclass
class Attacker:
    """Takes what is sent and makes something else of it; knows everything that was ever sent, and some keys."""

    noise: Noise
    scene: Scene
    others: tuple[Scene, Scene]
    seen: Counter[str] = field(default_factory=Counter)

    @property
    def texts(self) -> list[str]:
        return [text for scene in (self.scene, *self.others) for text in scene.texts]

    def text(self, honest: str) -> str:
        """Another text, made without a key of the federation."""
        return self.noise.one_of(self.noise.text, self._unsigned, self._sent_text)(honest)

    def _sent_text(self, _honest: str) -> str:
        return self.noise.random.choice(self.texts)

    def _unsigned(self, honest: str) -> str:
        """The document changed; its signature as it was, or by somebody else."""
        if not honest.startswith("{"):
            return self.noise.text(honest)
        if self.noise.random.random() < 0.5:
            return json.dumps(self.noise.document(json.loads(honest)), sort_keys=True, separators=(",", ":"))
        stranger = self.others[1].federation
        strangers: list[PrivateKey] = [stranger.log, stranger.sites["b"].key]
        return self.signed(honest, self.noise.random.choice(strangers))

    def signed(self, honest: str, key: PrivateKey) -> str:
        """The statement changed, and signed with a key."""
        found = json.loads(honest)
        kind = self.noise.one_of(found["kind"], found["kind"], found["kind"], *_KINDS.values())
        body = self.noise.document(found["body"])
        try:
            return seal(kind, body if isinstance(body, dict) else {"body": body}, key).decode()
        except EnvelopeError:
            return honest

    def content(self, honest: bytes) -> bytes:
        """Other bytes."""
        return self.noise.one_of(self.noise.bytes, self.noise.bytes, self._sent_bytes)(honest)

    def _sent_bytes(self, _honest: bytes) -> bytes:
        return self.noise.random.choice([content for scene in (self.scene, *self.others) for content in scene.bytes])

    def among(self, honest: Mapping[str, T], change: Callable[[T], T]) -> dict[str, T]:
        """A mapping with a value changed, gone, doubled, under another name, or two exchanged."""
        found, (one, two) = dict(honest), self.noise.random.sample(sorted(honest), 2)
        what = self.noise.one_of("value", "value", "value", "gone", "more", "name", "swap")
        if what == "value":
            found[one] = change(found[one])
        elif what == "gone":
            del found[one]
        elif what == "more":
            found[self.noise.one_of("x", "", "A", "ü")] = found[one]
        elif what == "name":
            found[self.noise.one_of("x", "")] = found.pop(one)
        else:
            found[one], found[two] = found[two], found[one]
        return found

    def refused(self, step: str, call: Callable[[], object], *, state: Callable[[], object], forged: bool) -> None:
        """Makes the call: only a refusal may come of it, always if it is forged; the state is as it was."""
        before = state()
        try:
            call()
        except SecureRefusal:
            self.seen[f"{step} refused"] += 1
            assert state() == before
        else:
            self.seen[f"{step} accepted"] += 1
            assert not forged, step


@pytest.fixture
def attacker() -> Attacker:
    one, two, three = _scenes()
    return Attacker(Noise(SEED), one, (two, three))


# --- set-up


def _same_offer(one: Offer, other: Offer, federation: Federation) -> bool:
    """Whether two offers say the same; a PEM may hold what is no part of the certificate."""
    if (one.roster, one.keys) != (other.roster, other.keys) or set(one.certificates) != set(other.certificates):
        return False
    try:
        found = [federation.trust.site(name, pem, utc_now()) for name, pem in sorted(one.certificates.items())]
    except SecureRefusal:
        return False
    return found == [parse_certificate(pem.encode()) for _, pem in sorted(other.certificates.items())]


def _says(envelope: str) -> object:
    """What a statement says, whatever its signature."""
    found = json.loads(envelope)
    return found["kind"], found["body"]


@pytest.mark.parametrize("times", FORMS)
def test_no_offer_that_is_wrong_is_joined(attacker: Attacker, times: int) -> None:
    scene, noise = attacker.scene, attacker.noise
    federation, state, offer = scene.federation, scene.announced["a"], scene.offer
    for _ in range(120 * times):
        part = noise.one_of("roster", "keys", "certificates", "signed", "all")
        forged = part != "signed"
        if part == "roster":
            changed = replace(offer, roster=attacker.text(offer.roster))
        elif part == "signed":
            changed = replace(offer, roster=attacker.signed(offer.roster, federation.log))
        elif part == "all":
            changed = noise.one_of(*(other.offer for other in attacker.others))
        else:
            texts: dict[str, Any] = {part: attacker.among(getattr(offer, part), attacker.text)}
            changed = replace(offer, **texts)
        if _same_offer(changed, offer, federation):
            continue

        def call(changed: Offer = changed) -> object:
            key, trust = federation.sites["a"].key, federation.trust
            return site.join(state, changed, trust=trust, least=3, key=key, now=utc_now())

        attacker.refused("join", call, state=state.model_dump_json, forged=forged)
    assert attacker.seen["join refused"] > 60 * times
    site.join(state, offer, trust=federation.trust, least=3, key=federation.sites["a"].key, now=utc_now())


@pytest.mark.parametrize("times", FORMS)
def test_no_half_that_is_wrong_begins_anything(attacker: Attacker, times: int) -> None:
    scene, noise = attacker.scene, attacker.noise
    state, halves = scene.joined["a"], scene.halves["a"]
    key = scene.federation.sites["b"].key
    for _ in range(200 * times):
        changed, signed = attacker.among(halves, attacker.text), noise.random.random() < 0.3
        if signed:
            changed = {**halves, "b": attacker.signed(halves["b"], key)}
        if changed == halves or (signed and _says(changed["b"]) == _says(halves["b"])):
            continue

        def call(changed: dict[str, str] = changed) -> object:
            return site.begin(state, changed)

        attacker.refused("begin", call, state=state.model_dump_json, forged=True)
    assert site.begin(state, halves).chains == _begun(scene).chains


def _begun(scene: Scene) -> Ready:
    return site.begin(scene.joined["a"], scene.halves["a"])


# --- a sum, at a site


@pytest.mark.parametrize("times", FORMS)
def test_no_context_that_is_wrong_spends_anything(attacker: Attacker, times: int) -> None:
    scene, noise = attacker.scene, attacker.noise
    state, honest, log = scene.ready["a"], scene.now.context, scene.federation.log
    for _ in range(200 * times):
        forged = noise.random.random() < 0.7
        changed = attacker.text(honest) if forged else attacker.signed(honest, log)
        if changed == honest:
            continue

        def call(changed: str = changed) -> object:
            return site.mask(state, verified(changed, Context, log.public_key()))

        attacker.refused("mask", call, state=state.model_dump_json, forged=forged)
    assert site.mask(state, verified(honest, Context, log.public_key()))[0].step == 2


@pytest.mark.parametrize("times", FORMS)
def test_no_key_of_a_model_that_is_wrong_is_taken(attacker: Attacker, times: int) -> None:
    state, sealed = attacker.scene.ready["a"], attacker.scene.sealed_key
    for _ in range(100 * times):
        changed, model = attacker.content(sealed), attacker.noise.one_of(MODEL, MODEL, "c" * 64, "", "\n")
        if changed == sealed or changed in attacker.scene.bytes:
            continue

        def call(changed: bytes = changed, model: str = model) -> object:
            return site.model_key(state, model, changed)

        attacker.refused("key", call, state=state.model_dump_json, forged=True)
    assert site.model_key(state, MODEL, sealed) == bytes(32)


def _asked(attacker: Attacker, honest: Request) -> tuple[Request, bool]:
    """Another request than the honest one, and whether it is made without a site's key.

    What b has signed of its own tensors only the aggregator can check: it has them.
    """
    if attacker.noise.random.random() < 0.1:
        header = attacker.signed(honest.headers["b"], attacker.scene.federation.sites["b"].key)
        return replace(honest, headers={**honest.headers, "b": header}), False
    return _forged(attacker, honest), True


def _forged(attacker: Attacker, honest: Request) -> Request:
    noise, scene = attacker.noise, attacker.scene
    part = noise.one_of("headers", "headers", "boxes", "boxes", "survivors", "context", "all")
    if part == "headers":
        return replace(honest, headers=attacker.among(honest.headers, attacker.text))
    if part == "boxes":
        return replace(honest, boxes=attacker.among(honest.boxes, attacker.content))
    if part == "context":
        field, value = noise.one_of(("attempt", 9), ("step", 1), ("step", 3), ("model", "c" * 64), ("roster", "c" * 64))
        changes: dict[str, Any] = {field: value}
        return replace(honest, context=honest.context.model_copy(update=changes))
    if part == "all":
        totals = (scene.earlier, *(other.now for other in attacker.others))
        return noise.one_of(*(total.requests[name] for total in totals for name in NAMES), scene.now.requests["b"])
    survivors = [noise.one_of(*NAMES, "x", "", "A") for _ in range(noise.random.randrange(7))]
    changed = replace(honest, survivors=tuple(noise.one_of(survivors, sorted(set(survivors)))))
    if noise.random.random() < 0.5:
        headers = {name: honest.headers[name] for name in survivors if name in honest.headers}
        boxes = {name: honest.boxes[name] for name in survivors if name in honest.boxes}
        changed = replace(changed, headers=headers, boxes=boxes)
    return changed


@pytest.mark.parametrize("times", FORMS)
def test_no_request_that_is_wrong_is_answered(attacker: Attacker, times: int) -> None:
    now = attacker.scene.now
    honest = now.requests["a"]
    given, _ = site.answer(now.given["a"], honest, least=3, before=None)
    for _ in range(250 * times):
        changed, forged = _asked(attacker, honest)
        state = attacker.noise.one_of(given, now.given["a"])
        if changed == honest:
            continue

        def call(changed: Request = changed, state: Ready = state) -> object:
            return site.answer(state, changed, least=3, before=NAMES)

        attacker.refused("answer", call, state=state.model_dump_json, forged=forged)
    site.answer(given, honest, least=3, before=NAMES)


# --- a sum, at the aggregator


def _snapshot(total: SecureSum) -> object:
    return total.scalars.tobytes(), total.update.tobytes(), total.headers, {**total._shares}


def _other_tensors(noise: Noise, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """An array of another type, shape or content, gone, or new."""
    name = noise.random.choice(sorted(tensors))
    array, found = np.array(tensors[name]), dict(tensors)
    kind = noise.one_of("f4", "f8", "u1", "i8", ">u4", ">u8", "u2", "?", "c8", "S3", "O", "M8[s]")
    change = noise.one_of("type", "view", "shape", "cut", "more", "gone", "name", "swap", "content")
    if change == "type":
        found[name] = array.astype(kind if kind != "M8[s]" else "u2")
    elif change == "view":
        found[name] = array.view("V4") if array.nbytes % 4 == 0 and array.shape[-1] % 4 == 0 else array.view("i1")
    elif change == "shape":
        found[name] = noise.one_of(array.reshape(-1, 1), array[None], array.reshape(-1)[0], array[..., :0])
    elif change == "cut":
        found[name] = noise.one_of(array[1:], array[:-1], array[..., 1:], np.concatenate([array, array]))
    elif change == "more":
        found[noise.one_of("x", "", "scalars ", "Update")] = array
    elif change == "gone":
        del found[name]
    elif change == "name":
        found[noise.one_of("x", "")] = found.pop(name)
    elif change == "swap":
        found[SCALARS], found[UPDATE] = found[UPDATE], found[SCALARS]
    else:
        found[name] = np.frombuffer(noise.random.randbytes(array.nbytes), array.dtype).reshape(array.shape)
    return found


def _uploaded(attacker: Attacker, honest: Upload) -> tuple[Upload, bool]:
    """Another upload of a, and whether it is made without a's key."""
    noise, (header, body, tensors) = attacker.noise, honest
    part = noise.one_of("header", "header", "body", "tensors", "replayed", "signed", "own")
    if part == "header":
        return (attacker.text(header), body, tensors), True
    if part == "body":
        return (header, noise.text(body), tensors), True
    if part == "tensors":
        changed = _other_tensors(noise, tensors)
        return (header, noise.one_of("", "0" * 64, sha256_hex(repr(changed).encode())), changed), True
    if part == "replayed":
        totals = (attacker.scene.earlier, *(other.now for other in attacker.others))
        return noise.one_of(*(total.uploads[name] for total in totals for name in NAMES)), True
    key = attacker.scene.federation.sites["a"].key
    if part == "signed":
        return (attacker.signed(header, key), noise.one_of(body, "0" * 64), tensors), False
    changed = _other_tensors(noise, tensors)
    about = attacker.scene.federation.context(2)
    return (site.header(attacker.scene.ready["a"], about, "0" * 64, key), "0" * 64, changed), False


@pytest.mark.parametrize("times", FORMS)
def test_no_upload_that_is_wrong_is_added(attacker: Attacker, times: int) -> None:
    now = attacker.scene.now
    total = now.sum_of("b", "c", "d")
    for _ in range(250 * times):
        changed, forged = _uploaded(attacker, now.uploads["a"])
        name = attacker.noise.one_of("a", "a", "a", "b", "x", "")
        if name == "a" and changed is now.uploads["a"]:
            continue

        def call(changed: Upload = changed, name: str = name, total: SecureSum = total) -> None:
            total.fold(name, *changed)

        same = changed[:2] == now.uploads["a"][:2]
        attacker.refused("fold", call, state=lambda total=total: _snapshot(total), forged=forged and not same)  # type: ignore[misc]
        if "a" in total.survivors:
            total = now.sum_of("b", "c", "d")
    total.fold("a", *now.uploads["a"])
    now.completes(total)


@pytest.mark.parametrize("times", FORMS)
def test_no_answer_that_is_wrong_unmasks_anything(attacker: Attacker, times: int) -> None:
    now, noise = attacker.scene.now, attacker.noise
    total = now.sum_of(*NAMES)
    purpose = answer_purpose(total.context, total.survivors, "a")
    told = keys.unseal(attacker.scene.federation.private, purpose, now.answers["a"])
    for _ in range(250 * times):
        name, forged = noise.one_of("a", "a", "b", "x", ""), noise.random.random() < 0.7
        sealed = attacker.content(now.answers["a"])
        if not forged:
            wrong = noise.one_of(noise.bytes(told), noise.bytes(told), noise.random.randbytes(len(told)))
            sealed = keys.seal(attacker.scene.federation.roster.answers, purpose, wrong)
        if sealed in now.answers.values():
            continue

        def call(sealed: bytes = sealed, name: str = name) -> None:
            total.take(name, sealed)

        attacker.refused("take", call, state=lambda: _snapshot(total), forged=forged)
        if noise.random.random() < 0.05:
            attacker.refused("unmask", lambda: total.unmask(3), state=lambda: _snapshot(total), forged=True)
    now.completes(total)


# --- the edge where messages are read


def _messages(scene: Scene) -> list[Header]:
    """One message of each type, with what was really sent."""
    offer, now, plan = scene.offer, scene.now, {"plan_digest": PLAN}
    headers = now.requests["a"].headers
    secured = Secured(context=now.context, keys={"a": base64url(scene.sealed_key)})
    return [
        KeysTask(run=RUN, **plan),
        KeysResult(keys=offer.keys["a"], certificate=offer.certificates["a"], **plan),
        PairsTask(run=RUN, roster=offer.roster, keys=offer.keys, certificates=offer.certificates, **plan),
        PairsResult(pairs=scene.halves["a"], **plan),
        BeginTask(run=RUN, pairs=scene.halves["a"], **plan),
        TrainTask(round=1, secured=secured, **plan),
        MaskedResult(upload=headers["a"], **plan),
        UnmaskTask(context=now.context, uploads=headers, **plan),
    ]


@pytest.mark.parametrize("times", FORMS)
def test_messages_are_of_their_type_or_are_refused(attacker: Attacker, times: int) -> None:
    noise, messages = attacker.noise, _messages(attacker.scene)
    seen: Counter[bool] = Counter()
    for _ in range(300 * times):
        message = noise.one_of(*messages)
        content = message.model_dump_json().encode()
        document = json.dumps(noise.document(json.loads(content))).encode()
        kind = noise.one_of(type(message), type(message), type(noise.one_of(*messages)))
        try:
            found = parse_header(noise.one_of(noise.bytes(content), document, content), kind)
        except MessageError:
            seen[False] += 1
        else:
            seen[True] += 1
            assert type(found) is kind
            assert parse_header(found.model_dump_json().encode(), kind) == found
    assert seen[False] > 100 * times


@pytest.mark.parametrize("times", FORMS)
def test_tensors_that_were_damaged_on_their_way_are_not_added(attacker: Attacker, times: int) -> None:
    now = attacker.scene.now
    header, body, tensors = now.uploads["a"]
    content, total = save(dict(tensors)), now.sum_of("b", "c", "d")
    assert sha256_hex(content) == body == body_of(tensors)
    for _ in range(200 * times):
        damaged = attacker.noise.bytes(content)
        if damaged == content:
            continue

        def call(damaged: bytes = damaged) -> None:
            try:
                found = tensors_from(damaged)
            except MessageError as error:
                raise SecureRefusal(str(error)) from error
            total.fold("a", header, sha256_hex(damaged), found)

        attacker.refused("tensors", call, state=lambda: _snapshot(total), forged=True)
    total.fold("a", header, body, tensors)
    now.completes(total)


# --- anything at all

_json = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53) + 1, 2**53 - 1) | st.text(max_size=20) | st.sampled_from(WORDS),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


def _read(envelope: str, kind: type[Statement], key: PrivateKey) -> Statement | None:
    try:
        return verified(envelope, kind, key.public_key())
    except SecureRefusal:
        return None


@settings(deadline=None, max_examples=60)
@examples(st.sampled_from(list(_KINDS)), st.data())
def test_what_is_signed_is_a_statement_of_its_kind_or_is_refused(kind: type[Statement], data: st.DataObject) -> None:
    scene = _scenes()[0]
    key = scene.federation.log
    honest = [json.loads(text) for text in scene.texts if text.startswith("{")]
    body = next(found["body"] for found in honest if found["kind"] == _KINDS[kind])
    changed = body | data.draw(st.dictionaries(st.sampled_from(sorted(body)), _json, max_size=2))
    changed |= data.draw(st.dictionaries(st.text(max_size=8), _json, max_size=1))
    try:
        envelope = seal(_KINDS[kind], changed, key).decode()
    except EnvelopeError:
        return
    found = _read(envelope, kind, key)
    if found is not None:
        assert type(found) is kind
        assert canonical_json(found.model_dump(mode="json")) == canonical_json(changed)
    assert all(_read(envelope, other, key) is None for other in _KINDS if other is not kind)


@settings(deadline=None, max_examples=60)
@examples(st.sampled_from(list(_KINDS)), st.text() | _json.map(json.dumps))
def test_no_text_that_nobody_has_signed_is_a_statement(kind: type[Statement], text: str) -> None:
    assert _read(text, kind, _scenes()[0].federation.log) is None


@settings(deadline=None, max_examples=60)
@examples(st.binary(max_size=1400))
def test_no_bytes_are_a_box_an_answer_or_a_models_key(content: bytes) -> None:
    scene = _scenes()[0]
    request = scene.now.requests["a"]
    boxes = {**request.boxes, "b": content}
    with pytest.raises(SecureRefusal):
        site.answer(scene.now.given["a"], replace(request, boxes=boxes), least=3, before=None)
    with pytest.raises(SecureRefusal):
        scene.now.total.take("a", content)
    with pytest.raises(SecureRefusal):
        site.model_key(scene.ready["a"], MODEL, content)
