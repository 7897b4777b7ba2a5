"""The gateway's service Registry: enrolment, reports, proposals and approvals, questions and answers, witnesses.

Rules:
  * `Enrol` is for an invitation's certificate, everything else for an enrolled site's; nobody else is answered.
  * An invitation enrols the site that it names, with one key, once. Who asks again with that key gets the same answer.
  * A site reports and approves for itself only, and an approval counts by its signature, not by the connection.
  * Who joins, whose certificate is renewed, what a site decides and answers stands in the log, or does not count.
  * Tokens, keys and whole requests are never written to the gateway's own log.
"""

from __future__ import annotations

import hmac
import logging
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from typing import Literal, TypeVar

import grpc
from cryptography import x509

from locum.common.cohort import check_fits, open_answer, open_question
from locum.common.envelope import (
    MOST_BYTES,
    READINESS,
    Approval,
    EnvelopeError,
    kind_of,
    open_approval,
    open_readiness,
)
from locum.common.errors import RunError
from locum.common.identity import (
    IdentityError,
    PublicKey,
    Subject,
    certificate_pem,
    certified_key,
    fingerprint_of,
    parse_request,
    renewal_due,
    request_mac,
    serial_of,
    subject_of,
    utc_now,
)
from locum.common.log.entries import AnswerEntry, ApprovalEntry, SiteEntry
from locum.common.log.store import LogError
from locum.common.proto import locum_pb2 as pb
from locum.common.proto.locum_pb2_grpc import RegistryServicer
from locum.server.authority import Authority
from locum.server.gateway.live import LEASE_SECONDS, Live
from locum.server.gateway.peers import Peer, Refusal, invited, refuse, site_of, site_peer
from locum.server.log import FederationLog, NotLoggedError, now
from locum.server.registry import InvitationRow, RefusedError, Registry, RegistryError

log = logging.getLogger("locum.gateway")

_MOST_REQUEST = 16 << 10
_MOST_WORD = 100
_MOST_LINE = 4 << 10
#: An answer stands whole in an entry of the log.
_MOST_ANSWER = 64 << 10
#: All proposals go in one message, the newest first; what is beyond stays behind. A client takes 32 MiB.
_MOST_PROPOSALS = 24 << 20
#: How far ahead of ours a site's clock may be when it dates an approval: one from the far future could not be ended.
_MOST_AHEAD_SECONDS = 86_400.0

_WRONG = grpc.StatusCode.INVALID_ARGUMENT
_Reply = TypeVar("_Reply")


@dataclass(frozen=True)
class Federation:
    """What the service works with."""

    registry: Registry
    authority: Authority
    log_certificate: x509.Certificate
    live: Live
    log: FederationLog


class RegistryService(RegistryServicer):
    """Answers the nine calls; what decides is below, without a connection."""

    def __init__(self, federation: Federation) -> None:
        self._federation = federation

    def Enrol(self, request: pb.EnrolRequest, context: grpc.ServicerContext) -> pb.Certificates:  # noqa: N802
        """A new site: certificate request, proof of the token."""
        invitation = invited(context, self._federation.registry)
        return _answer(context, lambda: enrol(self._federation, invitation, request))

    def Renew(self, request: pb.RenewRequest, context: grpc.ServicerContext) -> pb.Certificates:  # noqa: N802
        """The same key, for longer."""
        peer = site_peer(context, self._federation.registry)
        return _answer(context, lambda: renew(self._federation, peer, request))

    def Report(self, request: pb.ReportRequest, context: grpc.ServicerContext) -> pb.ReportReply:  # noqa: N802
        """What the agent does."""
        site = site_of(context, self._federation.registry)
        return _answer(context, lambda: report(self._federation, site, request))

    def Proposals(self, request: pb.ProposalsRequest, context: grpc.ServicerContext) -> pb.ProposalsReply:  # noqa: N802
        """Every proposal, the newest first."""
        del request
        site_of(context, self._federation.registry)
        return _answer(context, lambda: proposals(self._federation))

    def Approve(self, request: pb.ApproveRequest, context: grpc.ServicerContext) -> pb.ApproveReply:  # noqa: N802
        """A site's word on a plan."""
        peer = site_peer(context, self._federation.registry)
        return _answer(context, lambda: approve(self._federation, peer, request))

    def Greet(self, request: pb.GreetRequest, context: grpc.ServicerContext) -> pb.Greeting:  # noqa: N802
        """To a site that asks whether it would be let in. Nothing is noted: its agent may run meanwhile."""
        del request
        site_of(context, self._federation.registry)
        return pb.Greeting(clock=time.time(), version=version("locum"))

    def Witness(self, request: pb.WitnessRequest, context: grpc.ServicerContext) -> pb.WitnessReply:  # noqa: N802
        """To a site that watches the log: the newest checkpoint, and the proof that the log has only grown."""
        peer = site_peer(context, self._federation.registry)
        return _answer(context, lambda: witness(self._federation, peer, request))

    def Questions(self, request: pb.QuestionsRequest, context: grpc.ServicerContext) -> pb.QuestionsReply:  # noqa: N802
        """Every question that is open, the newest first."""
        del request
        site_of(context, self._federation.registry)
        return _answer(context, lambda: questions(self._federation))

    def State(self, request: pb.StateRequest, context: grpc.ServicerContext) -> pb.StateReply:  # noqa: N802
        """What a site says of its own data."""
        peer = site_peer(context, self._federation.registry)
        return _answer(context, lambda: state(self._federation, peer, request))


def enrol(federation: Federation, invitation: InvitationRow, request: pb.EnrolRequest) -> pb.Certificates:
    """Makes a site of who was invited; raises Refusal, RefusedError, IdentityError or RegistryError."""
    _check_size(request.request, _MOST_REQUEST)
    if not hmac.compare_digest(request_mac(invitation.token_sha256, request.request), request.mac):
        raise Refusal(grpc.StatusCode.PERMISSION_DENIED, "the request is not authenticated by the invitation's token")
    key = _requested(federation, request.request, invitation.name)

    def issue() -> x509.Certificate:
        issued = federation.authority.issue_site(invitation.name, key)
        federation.log.append(_certified(invitation.name, "enrolled", issued))
        return issued

    certificate = federation.registry.redeem(invitation.fingerprint, key=key, issue=issue)
    log.info("%s is enrolled with certificate %s", invitation.name, serial_of(certificate))
    return _certificates(federation, certificate)


def renew(federation: Federation, peer: Peer, request: pb.RenewRequest) -> pb.Certificates:
    """A new certificate of the site's key, once less than a third of the newest one's time is left."""
    _check_size(request.request, _MOST_REQUEST)
    key = _requested(federation, request.request, peer.name)
    if key != peer.public_key:
        raise Refusal(grpc.StatusCode.PERMISSION_DENIED, "a certificate is renewed under the key that it has")

    def issue(newest: x509.Certificate) -> x509.Certificate | None:
        if not renewal_due(newest, utc_now()):
            return None
        issued = federation.authority.issue_site(peer.name, key)
        federation.log.append(_certified(peer.name, "renewed", issued))
        return issued

    certificate = federation.registry.renew(peer.name, key=key, issue=issue)
    log.info("%s has certificate %s", peer.name, serial_of(certificate))
    return _certificates(federation, certificate)


def _certified(site: str, event: Literal["enrolled", "renewed"], certificate: x509.Certificate) -> SiteEntry:
    return SiteEntry(at=now(), site=site, event=event, certificate=fingerprint_of(certificate))


def report(federation: Federation, site: str, said: pb.ReportRequest) -> pb.ReportReply:
    """Notes what an agent does; refuses a second agent of the same site."""
    words = (said.instance, said.activity, said.run, said.version)
    if not all(len(word) <= _MOST_WORD and word.isprintable() for word in words) or not said.instance:
        raise Refusal(_WRONG, f"the words of a report are printable and at most {_MOST_WORD} letters")
    if not math.isfinite(said.clock):
        raise Refusal(_WRONG, "the clock of a report is a finite number")
    if not federation.live.report(site, said):
        sentence = f"another agent with this site's key was heard in the last {LEASE_SECONDS:.0f} s"
        raise Refusal(grpc.StatusCode.ALREADY_EXISTS, sentence)
    state, sealed = federation.registry.state(), federation.log.sealed()
    return pb.ReportReply(clock=time.time(), registry_state=state, log_size=sealed)


def proposals(federation: Federation) -> pb.ProposalsReply:
    """The newest proposals that fit into one message."""
    return pb.ProposalsReply(envelopes=_fitting(federation.registry.proposals()))


def _fitting(envelopes: Iterable[bytes]) -> list[bytes]:
    found, total = [], 0
    for envelope in envelopes:
        total += len(envelope)
        if total > _MOST_PROPOSALS:
            break
        found.append(envelope)
    return found


def approve(federation: Federation, peer: Peer, request: pb.ApproveRequest) -> pb.ApproveReply:
    """Notes a site's approval of a plan or its end; one that is older than what is known changes nothing."""
    _check_size(request.envelope, MOST_BYTES)
    approval = open_approval(request.envelope, peer.public_key)
    _check_approval(federation.registry, peer, approval)
    entry = ApprovalEntry(
        at=now(),
        site=peer.name,
        plan=approval.digest,
        statement=request.envelope.decode(),
        certificate=fingerprint_of(peer.certificate),
    )
    newest = federation.registry.record_approval(
        peer.name,
        approval.digest,
        approved=approval.decision == "approve",
        at=approval.at,
        envelope=request.envelope,
        noted=lambda: federation.log.append_new(entry),
    )
    federation.log.seal()
    log.info("%s: %s %s%s", peer.name, approval.decision, approval.digest[:12], "" if newest else " (older than known)")
    return pb.ApproveReply()


def witness(federation: Federation, peer: Peer, request: pb.WitnessRequest) -> pb.WitnessReply:
    """Keeps what a site signed of the checkpoint that it has seen, and shows it the newest."""
    if request.cosignature:
        _check_size(request.cosignature, _MOST_LINE)
        try:
            line = request.cosignature.decode()
            new = federation.log.cosigned(peer.name, peer.public_key, line, request.size)
        except ValueError as error:  # of UTF-8, or a NoteError
            raise Refusal(_WRONG, f"this is no cosignature of the log: {error}") from error
        if new:
            log.info("%s has witnessed the log up to entry %d", peer.name, request.size)
    checkpoint, proof = federation.log.show(request.size)
    return pb.WitnessReply(checkpoint=checkpoint, proof=proof)


def questions(federation: Federation) -> pb.QuestionsReply:
    """The newest open questions that fit into one message."""
    return pb.QuestionsReply(envelopes=_fitting(federation.registry.questions(open_at=time.time())))


def state(federation: Federation, peer: Peer, request: pb.StateRequest) -> pb.StateReply:
    """Notes what a site says of its own data: an answer to a question, or whether they meet a plan's contract."""
    _check_size(request.envelope, _MOST_ANSWER)
    if kind_of(request.envelope) == READINESS:
        return _ready(federation, peer, request)
    return _answered(federation, peer, request)


def _ready(federation: Federation, peer: Peer, request: pb.StateRequest) -> pb.StateReply:
    """Notes a statement of readiness that a site makes before any run; the newest one counts."""
    said = open_readiness(request.envelope, peer.public_key)
    if said.site != peer.name:
        raise Refusal(grpc.StatusCode.PERMISSION_DENIED, "a site speaks of its own data only")
    if said.run is not None:
        raise Refusal(_WRONG, "what is said for a run is said in it")
    if said.at - time.time() > _MOST_AHEAD_SECONDS:
        raise Refusal(_WRONG, "it is dated more than a day ahead: check the site's clock")
    _check_proposed(federation.registry, said.plan)
    if federation.registry.record_readiness(peer.name, said.plan, at=said.at, envelope=request.envelope):
        log.info("%s says of plan %s: %s", peer.name, said.plan[:12], "ready" if said.ready else "not ready")
    return pb.StateReply()


def _answered(federation: Federation, peer: Peer, request: pb.StateRequest) -> pb.StateReply:
    """Notes a site's answer to an open question; the first one stays."""
    answer = open_answer(request.envelope, peer.public_key)
    if answer.site != peer.name:
        raise Refusal(grpc.StatusCode.PERMISSION_DENIED, "a site answers for itself only")
    envelope = federation.registry.question(answer.question)
    if envelope is None:
        raise Refusal(grpc.StatusCode.NOT_FOUND, f"no question {answer.question[:12]} was asked")
    question, query = open_question(envelope, certified_key(federation.log_certificate))
    if question.until <= time.time():
        raise Refusal(grpc.StatusCode.FAILED_PRECONDITION, f"question {answer.question[:12]} is closed")
    check_fits(answer, query)
    entry = AnswerEntry(
        at=now(),
        site=peer.name,
        question=answer.question,
        statement=request.envelope.decode(),
        certificate=fingerprint_of(peer.certificate),
    )
    noted = partial(federation.log.append_new, entry)
    if federation.registry.record_answer(peer.name, answer.question, request.envelope, noted=noted):
        log.info("%s has answered question %s", peer.name, answer.question[:12])
    return pb.StateReply()


def _check_approval(registry: Registry, peer: Peer, approval: Approval) -> None:
    if approval.site != peer.name:
        raise Refusal(grpc.StatusCode.PERMISSION_DENIED, "a site approves for itself only")
    ahead = approval.at - time.time()
    if ahead > _MOST_AHEAD_SECONDS:
        raise Refusal(_WRONG, f"the approval is dated {ahead / 3600:.0f} h ahead of the coordinator's clock")
    _check_proposed(registry, approval.digest)


def _check_proposed(registry: Registry, plan: str) -> None:
    try:
        registry.proposal(plan)
    except RunError as error:
        raise Refusal(grpc.StatusCode.NOT_FOUND, error.message) from error


def _answer(context: grpc.ServicerContext, call: Callable[[], _Reply]) -> _Reply:
    try:
        return call()
    except (IdentityError, EnvelopeError) as error:
        refuse(context, Refusal(_WRONG, str(error)))
    except (Refusal, RefusedError, RegistryError, LogError, NotLoggedError) as error:
        refuse(context, error)


def _check_size(content: bytes, most: int) -> None:
    if len(content) > most:
        raise Refusal(_WRONG, f"the request is larger than {most} bytes")


def _requested(federation: Federation, content: bytes, name: str) -> PublicKey:
    """The key of a certificate request that asks for this name and no other."""
    request = parse_request(content)
    if subject_of(request) != Subject(federation.authority.federation, "site", name):
        raise Refusal(grpc.StatusCode.PERMISSION_DENIED, f"the certificate asked for is not that of {name}")
    return certified_key(request)


def _certificates(federation: Federation, certificate: x509.Certificate) -> pb.Certificates:
    return pb.Certificates(
        certificate=certificate_pem(certificate),
        authority=certificate_pem(federation.authority.certificate),
        log_certificate=certificate_pem(federation.log_certificate),
    )
