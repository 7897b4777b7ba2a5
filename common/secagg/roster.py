"""What is signed: a site's run keys, the roster, a pair's secret, the context of a sum, the header of an upload.

Rules:
  * The roster is fixed from its set-up on. Everything of a sum is bound to it by its digest.
  * A site believes a statement if it is signed with the key of the certificate in the roster, and that certificate
    was issued by the authority that the site pinned when it enrolled. The coordinator's statements are signed with the
    federation's log key.
  * The threshold is t = ⌊2n/3⌋ + 1: above (n + c)/2 for the c = min(2t − n − 1, t − 2) sites that may work together
    with the aggregator. Two sets of t sites have an honest site in common, and it answers for one of them only.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import Annotated, Literal, Self, TypeVar

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, ValidationError, model_validator

from locum.common import canonical
from locum.common.envelope import Digest, EnvelopeError, seal, unseal
from locum.common.identity import (
    IdentityError,
    PrivateKey,
    PublicKey,
    SiteName,
    Subject,
    base64url,
    base64url_bytes,
    certified_key,
    check_issued,
    check_valid,
    fingerprint_of,
    parse_certificate,
    subject_of,
)
from locum.common.secagg import LEAST_SITES, MOST_SITES, keys

SUITE: Literal["locum-secagg-1"] = "locum-secagg-1"
Purpose = Literal["train", "validation", "test"]


class SecureRefusal(ValueError):
    """Something that secure aggregation does not go on with; the text says why and holds no secret."""


def _bytes(value: object) -> object:
    return base64url_bytes(value) if isinstance(value, str) else value


#: Bytes that are written in JSON as base64url without padding.
Bytes = Annotated[bytes, BeforeValidator(_bytes), PlainSerializer(base64url, return_type=str, when_used="json")]
PublicBytes = Annotated[Bytes, Field(min_length=keys.PUBLIC_BYTES, max_length=keys.PUBLIC_BYTES)]


class Statement(BaseModel):
    """What is signed."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    suite: Literal["locum-secagg-1"] = SUITE


class RunKeys(Statement):
    """A site's public keys of one set-up: for its peers' secrets, and for the models on their way down."""

    run: str = Field(min_length=1, max_length=100)
    plan: Digest
    site: SiteName
    pairs: PublicBytes
    models: PublicBytes


class Member(BaseModel):
    """A site of the roster: the SHA-256 of its certificate (DER) and of the envelope of its run keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    site: SiteName
    certificate: Digest
    keys: Digest


class Roster(Statement):
    """The sites of every sum until the next set-up, ascending by name, and how many must answer to unmask one.

    Attributes:
        run: the run's name at the coordinator.
        plan: the plan's digest.
        answers: the aggregator's public key, to which the sites' answers are sealed.
        threshold: t.
        members: the sites.
    """

    run: str = Field(min_length=1, max_length=100)
    plan: Digest
    answers: PublicBytes
    threshold: int
    members: tuple[Member, ...] = Field(min_length=LEAST_SITES, max_length=MOST_SITES)

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        names = [member.site for member in self.members]
        if names != sorted(set(names)) or self.threshold != threshold_of(len(names)):
            raise ValueError("the members are not in order, or the threshold is not that of their number")
        return self

    @cached_property
    def places(self) -> dict[str, int]:
        """Each site's place, from 1."""
        return {member.site: place for place, member in enumerate(self.members, start=1)}

    @cached_property
    def digest(self) -> str:
        """The SHA-256 of the roster's canonical JSON: what everything of its sums is bound to."""
        return canonical.digest(self.model_dump(mode="json"))


class Pair(Statement):
    """Half of the secret of two sites: 32 random bytes, sealed to the receiver's run key."""

    roster: Digest
    sender: SiteName
    receiver: SiteName
    sealed: Annotated[Bytes, Field(max_length=keys.SEAL_BYTES + keys.KEY_BYTES)]


class Context(Statement):
    """What one sum is about; its digest is in every mask, so that no mask is of two sums.

    Attributes:
        roster: the roster's digest.
        step: the number of this sum under the roster; it only grows.
        purpose: what is summed: updates, or the metrics of a fold.
        round: the plan's round.
        attempt: the how-many-th try of this round.
        model: the SHA-256 of the model's file, which the sites train or measure.
    """

    roster: Digest
    step: int = Field(ge=1, lt=1 << 53)
    purpose: Purpose
    round: int = Field(ge=0, lt=1 << 53)
    attempt: int = Field(ge=1, lt=1 << 53)
    model: Digest

    @cached_property
    def digest(self) -> str:
        """The SHA-256 of the context's canonical JSON."""
        return canonical.digest(self.model_dump(mode="json"))

    @property
    def sum(self) -> str:
        """Which sum of the run it is, whatever the set-up: a site lets it be unmasked for one set of survivors.

        A round that is tried again trains on other draws and is another sum; the metrics of a model are the same ones
        however often they are asked for.
        """
        return f"train {self.round} {self.attempt}" if self.purpose == "train" else f"{self.purpose} {self.model}"


class Header(Statement):
    """What a site signs of its upload: the SHA-256 of the file of its tensors."""

    context: Digest
    site: SiteName
    body: Digest


_KINDS: dict[type[Statement], str] = {
    RunKeys: "secagg keys",
    Roster: "secagg roster",
    Pair: "secagg pair",
    Context: "secagg context",
    Header: "secagg upload",
}
S = TypeVar("S", bound=Statement)


def sign(statement: Statement, key: PrivateKey) -> str:
    """The signed envelope of a statement, as text."""
    return seal(_KINDS[type(statement)], statement.model_dump(mode="json"), key).decode()


def verified(envelope: str, kind: type[S], key: PublicKey) -> S:
    """A statement whose envelope is signed with a key; raises SecureRefusal.

    What it is read as says what was signed, word for word: no field is filled in, no number read from a text.
    """
    name = _KINDS[kind]
    try:
        body = unseal(_encoded(envelope), name, key)
        found = kind.model_validate(body)
    except ValidationError as error:
        raise SecureRefusal(f"this is no {name} of this version") from error
    except EnvelopeError as error:
        raise SecureRefusal(str(error)) from error
    if canonical.digest(found.model_dump(mode="json")) != canonical.digest(body):
        raise SecureRefusal(f"this is no {name} of this version")
    return found


def _encoded(text: str) -> bytes:
    """UTF-8; raises SecureRefusal for a text that has none."""
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise SecureRefusal("this is no text that UTF-8 can hold") from error


def threshold_of(sites: int) -> int:
    """T: how many of n sites must answer."""
    return 2 * sites // 3 + 1


def tolerated(sites: int) -> int:
    """C: how many of n sites may work together with the aggregator and see no more than the sum."""
    threshold = threshold_of(sites)
    return min(2 * threshold - sites - 1, threshold - 2)


@dataclass(frozen=True)
class Trust:
    """What a party of a federation believes without asking.

    Attributes:
        federation: the federation's name.
        authority: its root certificate, pinned at enrolment.
        log: the key with which the coordinator signs.
    """

    federation: str
    authority: x509.Certificate
    log: PublicKey

    def site(self, name: str, certificate: str, now: datetime) -> x509.Certificate:
        """The certificate (PEM) of a site of this federation; raises SecureRefusal."""
        try:
            found = parse_certificate(_encoded(certificate))
            check_issued(found, self.authority)
            check_valid(found, now)
            if subject_of(found) != Subject(self.federation, "site", name):
                raise SecureRefusal(f"a certificate is not that of the site {name}")
            if not isinstance(certified_key(found), ec.EllipticCurvePublicKey):
                raise SecureRefusal(f"the key of {name} is no site's")
        except IdentityError as error:
            raise SecureRefusal(f"the certificate of {name} cannot be believed: {error}") from error
        return found


def member_keys(envelope: str, certificate: x509.Certificate, *, site: str, run: str, plan: str) -> RunKeys:
    """A site's run keys, signed with the key of its certificate, for this run and plan; raises SecureRefusal."""
    found = verified(envelope, RunKeys, certified_key(certificate))
    if (found.site, found.run, found.plan) != (site, run, plan):
        raise SecureRefusal(f"the run keys of {site} are of another run")
    return found


def member_of(site: str, certificate: x509.Certificate, envelope: str) -> Member:
    """What a roster says of a site."""
    return Member(site=site, certificate=fingerprint_of(certificate), keys=canonical.sha256_hex(_encoded(envelope)))


def check_survivors(roster: Roster, survivors: tuple[str, ...], least: int) -> None:
    """Raises SecureRefusal unless these are different sites of the roster, in its order, and enough of them."""
    places = [roster.places.get(site, 0) for site in survivors]
    if 0 in places or places != sorted(set(places)):
        raise SecureRefusal("the survivors are not different sites of the roster, in its order")
    if len(survivors) < max(roster.threshold, least):
        raise SecureRefusal(f"a sum of {len(survivors)} sites; {max(roster.threshold, least)} are the least")


def check_header(envelope: str, certificate: x509.Certificate, *, site: str, context: Context) -> Header:
    """The header of a site's upload to a sum; raises SecureRefusal."""
    header = verified(envelope, Header, certified_key(certificate))
    if (header.site, header.context) != (site, context.digest):
        raise SecureRefusal(f"the upload of {site} is of another sum")
    return header
