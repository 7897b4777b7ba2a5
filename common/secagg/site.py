"""A site's part in secure aggregation, step by step. Nothing is sent and nothing is stored here.

    announce   makes the keys of a set-up and signs the public ones
    join       checks the roster and seals a half of each pair's secret to each peer
    begin      opens the peers' halves; the keys that opened them are gone from the state
    mask       spends the keys of one step and says how an upload is masked
    answer     gives the shares that unmask one sum of survivors

Rules:
  * A state is plain data. Whoever keeps it writes the new one to the disk before anything made with it leaves.
  * A step is spent once: its keys are not in the state that :func:`mask` returns, so that no mask can be used again.
  * A sum is unmasked for one set of survivors; a second set is refused, under another roster too.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from locum.common import canonical
from locum.common.identity import PrivateKey, SiteName, certified_key, parse_certificate
from locum.common.secagg import keys, shares
from locum.common.secagg.keys import SealError
from locum.common.secagg.masks import SEED_BYTES
from locum.common.secagg.roster import (
    Bytes,
    Context,
    Header,
    Pair,
    Roster,
    RunKeys,
    SecureRefusal,
    Trust,
    check_header,
    check_survivors,
    member_keys,
    member_of,
    sign,
    verified,
)

#: A coordinator that has tried so many sums without this site has made a mistake; each costs a derivation a peer.
MOST_SKIPPED = 10_000

Secret = Annotated[Bytes, Field(repr=False)]
Secrets = Annotated[dict[SiteName, Bytes], Field(repr=False)]


class _State(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Announced(_State):
    """After :func:`announce`: the private keys of a set-up."""

    stage: Literal["announced"] = "announced"
    site: SiteName
    run: str
    plan: str
    pairs: Secret
    models: Secret


class Joined(_State):
    """After :func:`join`: the roster, its certificates (PEM), and what was drawn for each peer."""

    stage: Literal["joined"] = "joined"
    announced: Announced
    roster: Roster
    certificates: dict[SiteName, str]
    drawn: Secrets


class Ready(_State):
    """A site that takes part in sums.

    Attributes:
        models: the private key to which models are sealed.
        chains: for each peer, the key from which those of the step after `step` and of all later ones come.
        step: the last step that is spent.
        context: the sum of that step.
        boxes: for each site, the key of the box of shares that it has sealed to this site in that step.
        answered: the survivors for whom that step's shares were given.
    """

    stage: Literal["ready"] = "ready"
    site: SiteName
    roster: Roster
    certificates: dict[SiteName, str]
    models: Secret
    chains: Secrets
    step: int = 0
    context: Context | None = None
    boxes: Secrets = Field(default_factory=dict)
    answered: tuple[SiteName, ...] | None = None


State = Annotated[Announced | Joined | Ready, Field(discriminator="stage")]


# --- set-up


def announce(run: str, plan: str, *, site: str, key: PrivateKey) -> tuple[Announced, str]:
    """New keys for a set-up, and the signed statement of the public ones."""
    state = Announced(site=site, run=run, plan=plan, pairs=keys.new_private(), models=keys.new_private())
    told = RunKeys(
        run=run, plan=plan, site=site, pairs=keys.public_of(state.pairs), models=keys.public_of(state.models)
    )
    return state, sign(told, key)


@dataclass(frozen=True)
class Offer:
    """A roster as the coordinator sends it.

    Attributes:
        roster: its envelope.
        keys: by site, the envelopes of the run keys.
        certificates: by site, PEM.
    """

    roster: str
    keys: Mapping[str, str]
    certificates: Mapping[str, str]


def join(
    state: Announced, offer: Offer, *, trust: Trust, least: int, key: PrivateKey, now: datetime
) -> tuple[Joined, dict[str, str]]:
    """Checks a roster; the new state, and by peer the envelope of this site's half of their secret.

    Args:
        state: of this set-up.
        offer: what the coordinator sent.
        trust: what the site pinned.
        least: the site's own `min_sites`.
        key: the site's key.
        now: the time.

    Raises:
        SecureRefusal: a statement is not signed as it must be, or is not of this run, plan and set-up.
    """
    roster = verified(offer.roster, Roster, trust.log)
    if (roster.run, roster.plan) != (state.run, state.plan) or state.site not in roster.places:
        raise SecureRefusal("the roster is of another run, or does not name this site")
    if len(roster.members) < least:
        raise SecureRefusal(f"a roster of {len(roster.members)} sites; this site's min_sites is {least}")
    if not set(offer.keys) == set(offer.certificates) == set(roster.places):
        raise SecureRefusal("the run keys and certificates are not those of the roster's sites")
    public = {site: _checked(roster, offer, site, trust, now) for site in roster.places}
    if public[state.site].pairs != keys.public_of(state.pairs):
        raise SecureRefusal("the roster holds other keys of this site")
    drawn = {peer: secrets.token_bytes(SEED_BYTES) for peer in roster.places if peer != state.site}
    sealed = {peer: _sealed_half(roster, state.site, public[peer], half) for peer, half in drawn.items()}
    joined = Joined(announced=state, roster=roster, certificates=dict(offer.certificates), drawn=drawn)
    return joined, {peer: sign(pair, key) for peer, pair in sealed.items()}


def _checked(roster: Roster, offer: Offer, site: str, trust: Trust, now: datetime) -> RunKeys:
    """A member's run keys, if certificate and keys are those that the roster means."""
    certificate = trust.site(site, offer.certificates[site], now)
    if member_of(site, certificate, offer.keys[site]) != roster.members[roster.places[site] - 1]:
        raise SecureRefusal(f"the certificate or the run keys of {site} are not those of the roster")
    return member_keys(offer.keys[site], certificate, site=site, run=roster.run, plan=roster.plan)


def _sealed_half(roster: Roster, sender: str, receiver: RunKeys, half: bytes) -> Pair:
    try:
        sealed = keys.seal(receiver.pairs, _pair_purpose(roster, sender, receiver.site), half)
    except SealError as error:
        raise SecureRefusal(f"the run keys of {receiver.site}: {error}") from error
    return Pair(roster=roster.digest, sender=sender, receiver=receiver.site, sealed=sealed)


def _pair_purpose(roster: Roster, sender: str, receiver: str) -> bytes:
    return f"locum secagg pair {roster.digest} {sender} {receiver}".encode()


def begin(state: Joined, pairs: Mapping[str, str]) -> Ready:
    """Opens each peer's half of the secrets (envelopes by sender); raises SecureRefusal."""
    roster, site = state.roster, state.announced.site
    if set(pairs) != set(state.drawn):
        raise SecureRefusal("there is not one half of a secret of each peer")
    certificates = {name: parse_certificate(pem.encode()) for name, pem in state.certificates.items()}
    chains = {}
    for peer, envelope in pairs.items():
        pair = verified(envelope, Pair, certified_key(certificates[peer]))
        if (pair.roster, pair.sender, pair.receiver) != (roster.digest, peer, site):
            raise SecureRefusal(f"a half of a secret of {peer} is of another set-up")
        try:
            half = keys.unseal(state.announced.pairs, _pair_purpose(roster, peer, site), pair.sealed)
        except SealError as error:
            raise SecureRefusal(f"the half of a secret of {peer}: {error}") from error
        if len(half) != SEED_BYTES:
            raise SecureRefusal(f"the half of a secret of {peer} has another length")
        chains[peer] = pair_secret(roster, site, peer, ours=state.drawn[peer], theirs=half)
    return Ready(
        site=site, roster=roster, certificates=state.certificates, models=state.announced.models, chains=chains
    )


def pair_secret(roster: Roster, site: str, peer: str, *, ours: bytes, theirs: bytes) -> bytes:
    """k_ij = HKDF(r_ij ‖ r_ji, salt = roster digest), i being the site whose place comes first."""
    first, second = (ours, theirs) if roster.places[site] < roster.places[peer] else (theirs, ours)
    return keys.derive(first + second, "pair", bytes.fromhex(roster.digest))


# --- a sum


def model_purpose(roster: Roster, model: str) -> bytes:
    """What the content key of a model is sealed for."""
    return f"locum secagg model {roster.digest} {model}".encode()


def model_key(state: Ready, model: str, sealed: bytes) -> bytes:
    """The content key of a model; raises SecureRefusal."""
    try:
        key = keys.unseal(state.models, model_purpose(state.roster, model), sealed)
    except SealError as error:
        raise SecureRefusal(f"the model's key: {error}") from error
    if len(key) != keys.KEY_BYTES:
        raise SecureRefusal("the model's key has another length")
    return key


@dataclass(frozen=True)
class Masking:
    """How one upload is masked: y = q + PRG(own) + Σ PRG(add) − Σ PRG(subtract).

    Attributes:
        add: the self-mask's seed, and those shared with peers of a later place.
        subtract: the seeds shared with peers of an earlier place.
        boxes: by place, the shares of the self-mask's seed and of those of all pairs, sealed to that site.
        commitments: by place, the SHA-256 of the seed shared with that site; at this site's own, of the self-mask's.
    """

    add: tuple[bytes, ...] = field(repr=False)
    subtract: tuple[bytes, ...] = field(repr=False)
    boxes: tuple[bytes, ...]
    commitments: tuple[bytes, ...]


def mask(state: Ready, context: Context) -> tuple[Ready, Masking]:
    """Spends a step; the state to write down, and how its upload is masked. Raises SecureRefusal."""
    check_context(state, context)
    salt, skipped = bytes.fromhex(context.digest), context.step - state.step - 1
    chains = {peer: _ratcheted(chain, skipped) for peer, chain in state.chains.items()}
    places, here = state.roster.places, state.roster.places[state.site]
    own = secrets.token_bytes(SEED_BYTES)
    seeds = {peer: keys.derive(chain, "mask", salt) for peer, chain in chains.items()} | {state.site: own}
    boxes = {peer: keys.derive(chain, f"shares {state.site}", salt) for peer, chain in chains.items()}
    theirs = {peer: keys.derive(chain, f"shares {peer}", salt) for peer, chain in chains.items()}
    to_self = secrets.token_bytes(keys.KEY_BYTES)
    masking = Masking(
        add=tuple(seeds[peer] for peer, place in places.items() if place >= here),
        subtract=tuple(seeds[peer] for peer, place in places.items() if place < here),
        boxes=_boxes(state.roster, seeds, boxes | {state.site: to_self}),
        commitments=tuple(commitment(seeds[peer]) for peer in places),
    )
    spent = state.model_copy(
        update={
            "chains": {peer: _ratcheted(chain, 1) for peer, chain in chains.items()},
            "step": context.step,
            "context": context,
            "boxes": theirs | {state.site: to_self},
            "answered": None,
        }
    )
    return spent, masking


def check_context(state: Ready, context: Context) -> None:
    """Raises SecureRefusal unless a sum is one of this site's roster, and its step is not spent."""
    if context.roster != state.roster.digest:
        raise SecureRefusal("the sum is of another roster")
    if not state.step < context.step <= state.step + MOST_SKIPPED:
        raise SecureRefusal(f"the masks of step {context.step} cannot be used: the last one was {state.step}")


def _ratcheted(chain: bytes, steps: int) -> bytes:
    for _ in range(steps):
        chain = keys.derive(chain, "ratchet")
    return chain


def commitment(seed: bytes) -> bytes:
    """SHA-256 of a seed: hides it, for it is 32 random bytes, and fixes it."""
    return bytes.fromhex(canonical.sha256_hex(seed))


def _boxes(roster: Roster, seeds: Mapping[str, bytes], boxes: Mapping[str, bytes]) -> tuple[bytes, ...]:
    """For each site of the roster, in order, its shares of all seeds, in order, in a box."""
    split = [shares.split(seeds[site], roster.threshold, len(roster.places)) for site in roster.places]
    rows = (b"".join(share[place - 1] for share in split) for place in roster.places.values())
    return tuple(keys.close_box(boxes[site], row) for site, row in zip(roster.places, rows, strict=True))


def header(state: Ready, context: Context, body: str, key: PrivateKey) -> str:
    """The signed header of an upload whose tensors' file has the SHA-256 `body`."""
    return sign(Header(context=context.digest, site=state.site, body=body), key)


@dataclass(frozen=True)
class Request:
    """What the aggregator asks of a survivor.

    Attributes:
        context: the sum.
        survivors: U, in the roster's order.
        headers: the signed headers of their uploads.
        boxes: the boxes that they have sealed to this site.
    """

    context: Context
    survivors: tuple[str, ...]
    headers: Mapping[str, str]
    boxes: Mapping[str, bytes]


def answer(state: Ready, request: Request, *, least: int, before: Sequence[str] | None) -> tuple[Ready, bytes]:
    """The shares that unmask the sum of the survivors, sealed to the aggregator; the state to write down first.

    Args:
        state: after this site's own upload to the sum.
        request: what the aggregator asks.
        least: the site's own `min_sites`.
        before: the survivors for whom this site has let the same sum of the run be unmasked under any roster.

    Raises:
        SecureRefusal: the request is not of the sum that this site has last given to, names sites that have not, or is
            another one than this site has answered.
    """
    roster, survivors = state.roster, request.survivors
    if state.context is None or request.context != state.context:
        raise SecureRefusal("it is not the sum that this site has last given to")
    check_survivors(roster, survivors, least)
    if state.site not in survivors:
        raise SecureRefusal("this site is not among the survivors")
    if any(other is not None and tuple(other) != survivors for other in (state.answered, before)):
        raise SecureRefusal("this sum was unmasked for other survivors")
    if not set(request.headers) == set(request.boxes) == set(survivors):
        raise SecureRefusal("there is not one header and one box of each survivor")
    certificates = {site: parse_certificate(state.certificates[site].encode()) for site in survivors}
    for site in survivors:
        check_header(request.headers[site], certificates[site], site=site, context=state.context)
    rows = {site: _opened(state, site, request.boxes[site]) for site in survivors}
    told = b"".join(rows[site][roster.places[other]] for site in survivors for other in wanted(roster, survivors, site))
    sealed = keys.seal(roster.answers, answer_purpose(state.context, survivors, state.site), told)
    return state.model_copy(update={"answered": survivors}), sealed


def wanted(roster: Roster, survivors: Sequence[str], site: str) -> list[str]:
    """Whose seeds of a survivor's upload are to be known: its own mask's, and those shared with who is gone."""
    return [site, *(other for other in roster.places if other not in survivors)]


def answer_purpose(context: Context, survivors: Sequence[str], site: str) -> bytes:
    """What a site's answer is sealed for."""
    return f"locum secagg answer {context.digest} {canonical.digest(list(survivors))} {site}".encode()


def _opened(state: Ready, site: str, box: bytes) -> dict[int, bytes]:
    """The shares in a peer's box, by place."""
    try:
        row = keys.open_box(state.boxes[site], box)
    except SealError as error:
        raise SecureRefusal(f"the shares of {site}: {error}") from error
    if len(row) != shares.SHARE_BYTES * len(state.roster.places):
        raise SecureRefusal(f"the shares of {site} have another length")
    return {
        place: row[shares.SHARE_BYTES * (place - 1) :][: shares.SHARE_BYTES] for place in state.roster.places.values()
    }
