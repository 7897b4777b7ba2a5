"""Who gets in and who is kept out, over a real gateway with real certificates."""

from __future__ import annotations

import gc
import json
import logging
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from locum.common.envelope import Approval, Proposal, open_proposal, seal_approval, seal_proposal
from locum.common.errors import LocumError
from locum.common.identity import (
    Invitation,
    Subject,
    certificate_pem,
    certificate_request,
    fingerprint_of,
    invitation_key,
    key_pem,
    load_certificate,
    load_ec_key,
    new_key,
    new_token,
    parse_certificate,
    read_invitation,
    request_mac,
    serial_of,
    token_sha256,
    utc_now,
)
from locum.common.proto import locum_pb2 as pb
from locum.common.proto.locum_pb2_grpc import RegistryStub
from locum.server.authority import Authority, load_log_key, refresh_server_certificate
from locum.server.gateway.live import LEASE_SECONDS, read_live
from locum.server.gateway.peers import Refusal, admit_invitation, admit_site
from locum.server.invitations import make_invitation
from locum.server.registry import RefusedError, Registry
from locum.site_client.enrolment import enrol
from locum.site_client.identity import SiteIdentity
from tests.plans import plan
from tests.server.door import Door, open_door

CALL = 10
DENIED, UNAVAILABLE = grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAVAILABLE


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Door]:
    """One gateway for the tests that leave nothing behind but sites of their own names."""
    with open_door(tmp_path_factory.mktemp("shared") / "coordinator") as opened:
        yield opened


@pytest.fixture
def door(tmp_path: Path) -> Iterator[Door]:
    with open_door(tmp_path / "coordinator") as opened:
        yield opened


_NAMES = iter(f"site{number}" for number in range(10**6))


@pytest.fixture
def name() -> str:
    return next(_NAMES)


def request_of(name: str, key: ec.EllipticCurvePrivateKey, role: str = "site") -> bytes:
    return certificate_request(Subject("Test federation", role, name), key)


def invited_channel(door: Door, invitation: Invitation) -> grpc.Channel:
    certificate = parse_certificate(invitation.certificate.encode())
    return door.channel_as(invitation_key(invitation.token_bytes), certificate)


def ask_enrol(
    door: Door, invitation: Invitation, request: bytes, token: bytes | None = None
) -> grpc.StatusCode | pb.Certificates:
    mac = request_mac(token_sha256(token or invitation.token_bytes), request)
    with invited_channel(door, invitation) as channel:
        return answered(lambda: RegistryStub(channel).Enrol(pb.EnrolRequest(request=request, mac=mac), timeout=CALL))


def answered(call: Callable[[], object]) -> object:
    try:
        return call()
    except grpc.RpcError as error:
        return error.code()


def every_call(channel: grpc.Channel) -> dict[str, object]:
    """What each call of the service answers: a message, or the status of its refusal."""
    stub = RegistryStub(channel)
    calls = {
        "Enrol": lambda: stub.Enrol(pb.EnrolRequest(), timeout=CALL),
        "Renew": lambda: stub.Renew(pb.RenewRequest(), timeout=CALL),
        "Report": lambda: stub.Report(pb.ReportRequest(instance="i", clock=time.time()), timeout=CALL),
        "Proposals": lambda: stub.Proposals(pb.ProposalsRequest(), timeout=CALL),
        "Approve": lambda: stub.Approve(pb.ApproveRequest(), timeout=CALL),
        "Greet": lambda: stub.Greet(pb.GreetRequest(), timeout=CALL),
        "Questions": lambda: stub.Questions(pb.QuestionsRequest(), timeout=CALL),
        "State": lambda: stub.State(pb.StateRequest(), timeout=CALL),
    }
    return {call: answered(ask) for call, ask in calls.items()}


# --- joining ----------------------------------------------------------------------------------------------------------


def test_a_site_joins_with_its_invitation_and_is_known(shared: Door, name: str) -> None:
    identity = shared.enrol(name)
    row = shared.registry.site(name)
    assert row is not None
    assert row.certificate == identity.certificate
    assert identity.site == name
    assert identity.certificate.not_valid_after_utc - utc_now() > timedelta(days=89)
    with shared.channel(identity) as channel:
        reply = RegistryStub(channel).Report(pb.ReportRequest(instance="i", activity="idle", clock=1.0), timeout=CALL)
    assert abs(reply.clock - time.time()) < 60


def test_a_token_is_good_once(shared: Door, name: str) -> None:
    invitation = read_invitation(shared.invite(name))
    first = ask_enrol(shared, invitation, request_of(name, new_key()))
    assert isinstance(first, pb.Certificates)
    assert ask_enrol(shared, invitation, request_of(name, new_key())) == DENIED


def test_the_same_key_is_answered_again_because_the_reply_may_have_been_lost(shared: Door, name: str) -> None:
    invitation, key = read_invitation(shared.invite(name)), new_key()
    replies = [ask_enrol(shared, invitation, request_of(name, key)) for _ in range(2)]
    assert replies[0] == replies[1]
    assert isinstance(replies[0], pb.Certificates)


def test_a_stolen_token_is_good_for_no_other_name_and_no_other_role(shared: Door, name: str) -> None:
    invitation = read_invitation(shared.invite(name))
    for request in (request_of("other", new_key()), request_of(name, new_key(), "server")):
        assert ask_enrol(shared, invitation, request) == DENIED
    foreign = certificate_request(Subject("Another federation", "site", name), new_key())
    assert ask_enrol(shared, invitation, foreign) == DENIED
    assert shared.registry.site("other") is None
    assert shared.registry.site(name) is None


def test_a_request_without_the_token_behind_it_is_refused(shared: Door, name: str) -> None:
    invitation = read_invitation(shared.invite(name))
    assert ask_enrol(shared, invitation, request_of(name, new_key()), token=new_token()) == DENIED
    assert shared.registry.site(name) is None


def test_a_request_that_is_none_is_refused_in_words(shared: Door, name: str) -> None:
    invitation = read_invitation(shared.invite(name))
    for request in (b"", b"nonsense", b"x" * (1 << 20)):
        assert ask_enrol(shared, invitation, request) == grpc.StatusCode.INVALID_ARGUMENT


def test_an_expired_invitation_enrols_nobody(shared: Door, name: str) -> None:
    past = utc_now() - timedelta(hours=25)
    old = make_invitation(shared.authority, shared.config, name, now=past)
    certificate = parse_certificate(old.certificate.encode())
    shared.registry.invite(
        name, token_sha256=token_sha256(old.token_bytes), fingerprint=fingerprint_of(certificate), expires=old.expires
    )
    assert ask_enrol(shared, old, request_of(name, new_key())) == UNAVAILABLE  # TLS ends it
    with pytest.raises(Refusal, match="expired"):
        admit_invitation(old.certificate.encode(), shared.registry, utc_now())
    with pytest.raises(RefusedError, match="expired"):
        shared.registry.redeem(fingerprint_of(certificate), key=new_key().public_key(), issue=lambda: certificate)


def test_a_revoked_invitation_enrols_nobody(shared: Door, name: str) -> None:
    invitation = read_invitation(shared.invite(name))
    assert shared.registry.revoke(name)
    assert ask_enrol(shared, invitation, request_of(name, new_key())) == DENIED


def test_an_invitation_that_the_registry_does_not_know_enrols_nobody(shared: Door, name: str) -> None:
    token = new_token()
    certificate = shared.authority.issue_invitation(name, invitation_key(token).public_key())
    with shared.channel_as(invitation_key(token), certificate) as channel:
        assert set(every_call(channel).values()) == {DENIED}


RACER = """
import sys
from pathlib import Path
from locum.common.errors import LocumError
from locum.site_client.enrolment import enrol
print("ready", flush=True)
sys.stdin.readline()
try:
    enrol(Path(sys.argv[1]), Path(sys.argv[2]))
    print("joined")
except LocumError as error:
    print(error.message)
"""


def test_of_two_hospitals_with_one_invitation_one_joins(shared: Door, name: str, tmp_path: Path) -> None:
    path = shared.invite(name)
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACER, str(path), str(tmp_path / home)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for home in ("a", "b")
    ]
    for racer in racers:
        assert racer.stdout is not None
        assert racer.stdout.readline() == "ready\n"
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.write("go\n")
        racer.stdin.flush()
    ends = sorted(racer.communicate(timeout=60)[0].strip() for racer in racers)
    assert ends == ["joined", "the coordinator refused: this invitation was used already"]


# --- who is kept out --------------------------------------------------------------------------------------------------


def test_without_a_certificate_nothing_is_answered(shared: Door) -> None:
    root = (shared.home.authority / "ca.pem").read_bytes()
    with grpc.secure_channel(shared.address, grpc.ssl_channel_credentials(root)) as channel:
        assert set(every_call(channel).values()) == {UNAVAILABLE}
    with grpc.insecure_channel(shared.address) as channel:
        assert answered(lambda: RegistryStub(channel).Enrol(pb.EnrolRequest(), timeout=CALL)) == UNAVAILABLE


def test_a_certificate_of_another_federation_is_kept_out(shared: Door, name: str, tmp_path: Path) -> None:
    with open_door(tmp_path / "other") as other:
        stranger = other.enrol(name)
    shared.enrol(name)  # the same name is here, too
    with shared.channel_as(stranger.key, stranger.certificate) as channel:
        assert set(every_call(channel).values()) == {UNAVAILABLE}


def test_a_certificate_signed_by_a_site_is_kept_out(shared: Door, name: str) -> None:
    identity, key = shared.enrol(name), new_key()
    forged = Authority(identity.key, identity.certificate, timedelta(days=9)).issue_site("root", key.public_key())
    with shared.channel_as(key, forged) as channel:
        assert set(every_call(channel).values()) == {UNAVAILABLE}


def test_an_expired_certificate_is_kept_out_though_the_registry_knows_it(shared: Door, name: str) -> None:
    identity = shared.enrol(name)
    past = utc_now() - timedelta(days=91)
    expired = shared.authority.issue_site(name, identity.key.public_key(), now=past)
    shared.registry.renew(name, key=identity.key.public_key(), issue=lambda _: expired)
    with shared.channel_as(identity.key, expired) as channel:
        assert set(every_call(channel).values()) == {UNAVAILABLE}


def test_a_certificate_that_expires_under_an_open_connection_ends_it(shared: Door, name: str) -> None:
    identity = shared.enrol(name)
    presented = certificate_pem(identity.certificate)
    ends = identity.certificate.not_valid_after_utc
    assert admit_site(presented, shared.registry, ends - timedelta(seconds=1)).name == name
    with pytest.raises(Refusal, match="expired") as refused:
        admit_site(presented, shared.registry, ends)
    assert refused.value.code == grpc.StatusCode.UNAUTHENTICATED
    with pytest.raises(Refusal, match="not valid before"):
        admit_site(presented, shared.registry, utc_now() - timedelta(hours=2))


def test_a_certificate_that_the_registry_does_not_know_is_kept_out(shared: Door, name: str) -> None:
    key = new_key()
    with shared.channel_as(key, shared.authority.issue_site(name, key.public_key())) as channel:
        assert set(every_call(channel).values()) == {DENIED}


def test_a_revocation_counts_at_the_next_call_of_an_open_connection(shared: Door, name: str) -> None:
    with shared.channel(shared.enrol(name)) as channel:
        assert isinstance(every_call(channel)["Proposals"], pb.ProposalsReply)
        Registry(shared.home.registry).revoke(name)  # by another handle, as the command does it
        assert set(every_call(channel).values()) == {DENIED}


def test_a_revoked_site_comes_back_with_a_new_key_only(shared: Door, name: str, tmp_path: Path) -> None:
    first = shared.enrol(name)
    shared.registry.revoke(name)
    second = enrol(shared.invite(name), tmp_path / "again")
    assert second.key.public_key() != first.key.public_key()
    with shared.channel(second) as channel:
        assert isinstance(every_call(channel)["Proposals"], pb.ProposalsReply)
    with shared.channel(first) as channel:
        assert set(every_call(channel).values()) == {DENIED}
    shared.registry.revoke(name)
    invitation = read_invitation(shared.invite(name))
    assert ask_enrol(shared, invitation, request_of(name, first.key)) == DENIED


def test_a_site_does_not_enrol_and_an_invitation_does_nothing_else(shared: Door, name: str) -> None:
    with shared.channel(shared.enrol(name)) as channel:
        assert every_call(channel)["Enrol"] == DENIED
    invitation = read_invitation(shared.invite(next(_NAMES)))
    with invited_channel(shared, invitation) as channel:
        refused = every_call(channel)
    assert refused.pop("Enrol") == DENIED  # no token behind an empty request
    assert set(refused.values()) == {DENIED}


@pytest.mark.parametrize("role", ["server", "log"])
def test_the_federations_other_certificates_are_no_clients(shared: Door, role: str) -> None:
    certificate = load_certificate(shared.home.authority / f"{role}.pem")
    key = load_ec_key(shared.home.authority / "server.key") if role == "server" else load_log_key(shared.home)
    with shared.channel_as(key, certificate) as channel:
        assert not any(isinstance(answer, pb.ProposalsReply) for answer in every_call(channel).values())


def test_a_registry_that_cannot_be_read_lets_nobody_in(door: Door) -> None:
    identity = door.enrol("berlin")
    invitation = read_invitation(door.invite("paris"))
    with door.channel(identity) as channel:
        assert isinstance(every_call(channel)["Proposals"], pb.ProposalsReply)
        door.home.registry.rename(door.home.registry.with_suffix(".away"))
        refused = every_call(channel)
        assert refused.pop("Enrol") == DENIED
        assert set(refused.values()) == {UNAVAILABLE}
        assert ask_enrol(door, invitation, request_of("paris", new_key())) == UNAVAILABLE
        door.home.registry.write_bytes(os.urandom(4096))
        assert every_call(channel)["Proposals"] == UNAVAILABLE
        door.home.registry.with_suffix(".away").rename(door.home.registry)
        assert isinstance(every_call(channel)["Proposals"], pb.ProposalsReply)


#: What gRPC answers when the gateway's code raised what nobody expected.
TRACEBACKS = {str(grpc.StatusCode.UNKNOWN), str(grpc.StatusCode.INTERNAL)}
CALLS = ["Enrol", "Renew", "Report", "Proposals", "Approve", "Greet", "Questions", "State"]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(CALLS), st.binary(max_size=300))
def test_no_bytes_bring_the_gateway_down(fuzzed: grpc.Channel, call: str, content: bytes) -> None:
    answer = answered(lambda: fuzzed.unary_unary(f"/locum.v1.Registry/{call}")(content, timeout=CALL))
    assert str(answer) not in TRACEBACKS
    assert isinstance(RegistryStub(fuzzed).Proposals(pb.ProposalsRequest(), timeout=CALL), pb.ProposalsReply)


@pytest.mark.slow
def test_a_hundred_thousand_damaged_messages_cost_no_memory_and_no_crash(
    shared: Door, fuzzed: grpc.Channel, silence: None
) -> None:
    generator = random.Random(3)
    invited = read_invitation(shared.invite("nobody"))
    with invited_channel(shared, invited) as enrolling:
        ways = {
            "Enrol": enrolling.unary_unary("/locum.v1.Registry/Enrol"),
            **{call: fuzzed.unary_unary(f"/locum.v1.Registry/{call}") for call in ("Renew", "Report", "Approve")},
        }
        seeds = _seeds(shared, invited)

        def send(number: int) -> None:
            for _ in range(number):
                call = generator.choice(list(ways))
                content = damaged(generator.choice(seeds[call]), generator)
                assert str(answered(lambda: ways[call](content, timeout=CALL))) not in TRACEBACKS  # noqa: B023

        send(20_000)
        before = resident_bytes()
        send(80_000)
    assert resident_bytes() - before < 24 << 20
    assert shared.registry.site("nobody") is None
    assert isinstance(RegistryStub(fuzzed).Proposals(pb.ProposalsRequest(), timeout=CALL), pb.ProposalsReply)


@pytest.fixture
def silence() -> Iterator[None]:
    """No logging: what pytest keeps of it would count as the gateway's memory."""
    logging.disable()
    yield
    logging.disable(logging.NOTSET)


def _seeds(door: Door, invited: Invitation) -> dict[str, list[bytes]]:
    """Messages that are right but for one thing: none of them may be taken undamaged."""
    key = new_key()
    request = request_of("nobody", key)
    wrong_mac = request_mac(bytes(32), request)
    approval = Approval(site="fuzzer", digest=propose(door, name="fuzzed"), at=1.0, decision="approve", steward="A")
    token = token_sha256(invited.token_bytes)
    foreign = request_of("somebody", key)
    return {
        "Enrol": [
            pb.EnrolRequest(request=request, mac=wrong_mac).SerializeToString(),
            pb.EnrolRequest(request=foreign, mac=request_mac(token, foreign)).SerializeToString(),
        ],
        "Renew": [pb.RenewRequest(request=request).SerializeToString()],
        "Report": [pb.ReportRequest(instance="one", activity="idle", round=3, clock=1.5).SerializeToString()],
        "Approve": [pb.ApproveRequest(envelope=seal_approval(approval, key)).SerializeToString()],
    }


def damaged(content: bytes, generator: random.Random) -> bytes:
    """The message with a few bytes changed, cut out or put in."""
    found = bytearray(content)
    for _ in range(generator.randint(1, 4)):
        place = generator.randrange(len(found) + 1)
        found[place : place + generator.randint(0, 2)] = generator.randbytes(generator.randint(0, 3))
    return bytes(found)


def resident_bytes() -> int:
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture(scope="module")
def fuzzed(shared: Door) -> Iterator[grpc.Channel]:
    with shared.channel(shared.enrol("fuzzer")) as channel:
        yield channel


# --- renewal ----------------------------------------------------------------------------------------------------------


def enrolled_ago(door: Door, name: str, days: float) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
    """A site that was enrolled so many days ago."""
    key, past = new_key(), utc_now() - timedelta(days)
    invitation = read_invitation(door.invite(name))
    certificate = door.registry.redeem(
        fingerprint_of(parse_certificate(invitation.certificate.encode())),
        key=key.public_key(),
        issue=lambda: door.authority.issue_site(name, key.public_key(), now=past),
    )
    return key, certificate


def ask_renewal(door: Door, key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate, request: bytes) -> object:
    with door.channel_as(key, certificate) as channel:
        return answered(lambda: RegistryStub(channel).Renew(pb.RenewRequest(request=request), timeout=CALL))


def test_a_certificate_is_renewed_under_its_own_key_and_the_old_one_lasts(shared: Door, name: str) -> None:
    key, old = enrolled_ago(shared, name, 70)
    replies = [ask_renewal(shared, key, old, request_of(name, key)) for _ in range(2)]
    assert isinstance(replies[0], pb.Certificates)
    new = parse_certificate(replies[0].certificate)
    assert replies[1] == replies[0]  # asked again, one certificate is not made twice
    assert new.public_key() == old.public_key()
    assert new.not_valid_after_utc - utc_now() > timedelta(days=89)
    for certificate in (old, new):
        assert shared.registry.certificate_state(serial_of(certificate)) == "active"
        with shared.channel_as(key, certificate) as channel:
            assert isinstance(every_call(channel)["Proposals"], pb.ProposalsReply)


def test_a_certificate_with_time_left_is_not_renewed_but_told_again(shared: Door, name: str) -> None:
    identity = shared.enrol(name)
    reply = ask_renewal(shared, identity.key, identity.certificate, request_of(name, identity.key))
    assert isinstance(reply, pb.Certificates)
    assert parse_certificate(reply.certificate) == identity.certificate


def test_renewal_gives_no_other_key_and_no_other_name(shared: Door, name: str) -> None:
    key, old = enrolled_ago(shared, name, 70)
    for request in (request_of(name, new_key()), request_of("other", key)):
        assert ask_renewal(shared, key, old, request) == DENIED


# --- reports ----------------------------------------------------------------------------------------------------------


def test_a_second_agent_with_the_same_key_is_told_so(shared: Door, name: str) -> None:
    with shared.channel(shared.enrol(name)) as channel:
        stub = RegistryStub(channel)
        stub.Report(pb.ReportRequest(instance="one", clock=1.0), timeout=CALL)
        with pytest.raises(grpc.RpcError) as refused:
            stub.Report(pb.ReportRequest(instance="two", clock=1.0), timeout=CALL)
    assert refused.value.code() == grpc.StatusCode.ALREADY_EXISTS
    assert f"{LEASE_SECONDS:.0f} s" in refused.value.details()


def test_a_greeting_tells_clock_and_version_and_is_noted_nowhere(shared: Door, name: str) -> None:
    identity = shared.enrol(name)
    before = shared.registry.state()
    with shared.channel(identity) as channel:
        stub = RegistryStub(channel)
        greeting = stub.Greet(pb.GreetRequest(), timeout=CALL)
        stub.Report(pb.ReportRequest(instance="one", clock=1.0), timeout=CALL)  # nobody had the lease
        stub.Greet(pb.GreetRequest(), timeout=CALL)
    assert abs(greeting.clock - time.time()) < 60
    assert greeting.version == version("locum")
    assert shared.registry.state() == before
    shared.live.flush(now=True)
    assert [heard.instance for site, heard in read_live(shared.home.live).items() if site == name] == ["one"]


@pytest.mark.parametrize(
    "fields",
    [
        {"instance": "", "clock": 1.0},
        {"instance": "i" * 101, "clock": 1.0},
        {"instance": "i", "activity": "a\nb", "clock": 1.0},
        {"instance": "i", "clock": float("nan")},
        {"instance": "i", "clock": float("inf")},
    ],
)
def test_a_report_that_would_spoil_the_page_is_refused(shared: Door, name: str, fields: dict[str, object]) -> None:
    with shared.channel(shared.enrol(name)) as channel:
        stub = RegistryStub(channel)
        assert answered(lambda: stub.Report(pb.ReportRequest(**fields), timeout=CALL)) == (  # type: ignore[arg-type]
            grpc.StatusCode.INVALID_ARGUMENT
        )


# --- proposals and approvals ------------------------------------------------------------------------------------------


def propose(door: Door, **changes: object) -> str:
    proposed = plan(**changes)
    body = Proposal(digest=proposed.digest, plan=json.loads(proposed.canonical()), proposed_at=time.time(), by="us")
    door.registry.propose(proposed.digest, seal_proposal(body, load_log_key(door.home)))
    return proposed.digest


def say(
    door: Door, caller: SiteIdentity, digest: str, *, at: float, decision: str = "approve", **other: object
) -> object:
    """Sends an approval by `caller`; `other` may change its `site` or the `key` it is signed with."""
    approval = Approval(
        site=str(other.get("site", caller.site)), digest=digest, at=at, decision=decision, steward="Dr. A"  # type: ignore[arg-type]
    )  # fmt: skip
    envelope = seal_approval(approval, other.get("key", caller.key))  # type: ignore[arg-type]
    with door.channel(caller) as channel:
        return answered(lambda: RegistryStub(channel).Approve(pb.ApproveRequest(envelope=envelope), timeout=CALL))


def test_a_site_reads_proposals_and_verifies_them_against_the_root_it_joined_under(shared: Door, name: str) -> None:
    before = shared.registry.state()
    digest = propose(shared, name=f"plan-{name}")
    identity = shared.enrol(name)
    with shared.channel(identity) as channel:
        stub = RegistryStub(channel)
        told = stub.Report(pb.ReportRequest(instance="i", clock=1.0), timeout=CALL).registry_state
        envelopes = stub.Proposals(pb.ProposalsRequest(), timeout=CALL).envelopes
    assert told == before + 1
    assert open_proposal(envelopes[0], identity.log_key).parsed_plan().digest == digest


def test_an_approval_stands_until_it_is_taken_back(shared: Door, name: str) -> None:
    identity, digest, now = shared.enrol(name), propose(shared, name=f"plan-{name}"), time.time()
    assert say(shared, identity, digest, at=now) == pb.ApproveReply()
    assert shared.registry.approved(name, digest)
    assert set(shared.registry.approvals(digest)) == {name}
    assert say(shared, identity, digest, at=now + 1, decision="revoke") == pb.ApproveReply()
    assert not shared.registry.approved(name, digest)


def test_an_older_approval_that_is_sent_again_changes_nothing(shared: Door, name: str) -> None:
    identity, digest, now = shared.enrol(name), propose(shared, name=f"plan-{name}"), time.time()
    for _ in range(2):
        say(shared, identity, digest, at=now)
        say(shared, identity, digest, at=now + 1, decision="revoke")
    assert not shared.registry.approved(name, digest)


def test_an_approval_by_another_sites_key_or_in_another_sites_name_is_refused(shared: Door, name: str) -> None:
    identity, digest, now = shared.enrol(name), propose(shared, name=f"plan-{name}"), time.time()
    other = shared.enrol(next(_NAMES))
    assert say(shared, identity, digest, at=now, key=other.key) == grpc.StatusCode.INVALID_ARGUMENT
    assert say(shared, identity, digest, at=now, site=other.site) == DENIED
    assert say(shared, identity, digest, at=now, site=other.site, key=other.key) == grpc.StatusCode.INVALID_ARGUMENT
    assert shared.registry.approvals(digest) == {}


def test_an_approval_of_what_nobody_proposed_or_from_the_future_is_refused(shared: Door, name: str) -> None:
    identity, digest, now = shared.enrol(name), propose(shared, name=f"plan-{name}"), time.time()
    assert say(shared, identity, "ab" * 32, at=now) == grpc.StatusCode.NOT_FOUND
    assert say(shared, identity, digest, at=now + 90_000) == grpc.StatusCode.INVALID_ARGUMENT
    assert say(shared, identity, digest, at=now + 600) == pb.ApproveReply()  # a clock ten minutes off is a clock


def test_a_request_is_no_approval_and_an_approval_no_proposal(shared: Door, name: str) -> None:
    identity, digest = shared.enrol(name), propose(shared, name=f"plan-{name}")
    _, envelope = shared.registry.proposal(digest)
    with shared.channel(identity) as channel:
        stub = RegistryStub(channel)
        for content in (envelope, request_of(name, identity.key), b""):
            assert answered(
                lambda content=content: stub.Approve(pb.ApproveRequest(envelope=content), timeout=CALL)
            ) == (grpc.StatusCode.INVALID_ARGUMENT)


# --- what is written down ---------------------------------------------------------------------------------------------


def test_no_token_and_no_private_key_is_in_the_log_or_in_the_coordinators_folder(
    door: Door, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    caplog.set_level(logging.DEBUG)
    invitation = read_invitation(door.invite("berlin"))
    identity = enrol(tmp_path / "berlin.invitation.json", tmp_path / "berlin")
    ask_enrol(door, invitation, request_of("berlin", new_key()))  # used: refused and logged
    with pytest.raises(LocumError):
        enrol(tmp_path / "berlin.invitation.json", tmp_path / "again")
    door.live.flush(now=True)
    assert "berlin is enrolled" in caplog.text
    assert "used already" in caplog.text
    kept = b"".join(path.read_bytes() for path in door.home.path.rglob("*") if path.is_file())
    written = caplog.text.encode() + kept
    site_key, invited_key = key_pem(identity.key), key_pem(invitation_key(invitation.token_bytes))
    for secret in (
        invitation.token_bytes,
        invitation.token_bytes.hex().encode(),
        invitation.token.get_secret_value().encode(),
        *site_key.splitlines()[1:-1],
        *invited_key.splitlines()[1:-1],
        identity.key.private_numbers().private_value.to_bytes(48),
    ):
        assert secret not in written
    authority = key_pem(door.authority.key)
    assert authority not in kept.replace((door.home.authority / "ca.key").read_bytes(), b"")
    assert authority.splitlines()[1] not in caplog.text.encode()


def test_the_gateways_certificate_is_replaced_while_it_runs(door: Door) -> None:
    identity = door.enrol("berlin")
    with door.channel(identity) as channel:
        assert isinstance(every_call(channel)["Proposals"], pb.ProposalsReply)
        later = utc_now() + timedelta(days=380)
        assert refresh_server_certificate(door.home, door.authority, door.config.host, now=later)
        assert isinstance(every_call(channel)["Proposals"], pb.ProposalsReply)
