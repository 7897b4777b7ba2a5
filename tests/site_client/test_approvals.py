"""A site's word on plans: only what is signed counts, and a revocation counts at once."""

from __future__ import annotations

import json
import multiprocessing
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from locum.common.canonical import digest
from locum.common.envelope import open_approval, open_proposal, seal
from locum.common.errors import Code, PlanError, RunError, SiteFailure
from locum.common.proto import locum_pb2 as pb
from locum.common.proto import locum_pb2_grpc as rpc
from locum.server.authority import load_log_key
from locum.site_client import approvals
from locum.site_client.approvals import Approvals, open_approvals
from locum.site_client.gate import Policy, admit_run
from tests.plans import plan
from tests.server.door import open_door
from tests.site_client.enrolled import Hospital

# --- proposals


def test_a_proposal_signed_by_the_federation_is_kept_once(hospital: Hospital) -> None:
    of = plan()
    assert hospital.approvals().receive(hospital.proposal(of)) is True
    assert hospital.approvals().receive(hospital.proposal(of, by="Somebody else")) is False
    (held,) = hospital.approvals().proposals()
    assert (held.digest, held.plan.digest, held.proposal.by) == (of.digest, of.digest, "Team A")


def _without_defaults() -> dict[str, Any]:
    """A plan as a person writes it: it reads as a plan, whose canonical form has another digest."""
    return {key: value for key, value in plan().model_dump(mode="json").items() if key != "seed"}


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda at: at.proposal(plan(), key=Ed25519PrivateKey.generate()), "not signed by the key expected"),
        (lambda at: at.proposal(plan(), digest=plan(seed=7).digest), "does not have the digest"),
        (lambda at: seal("approval", {}, at.log_key), "this is no proposal"),
        (lambda at: at.proposal(plan())[:-1], "no canonical JSON"),
        (lambda at: at.proposal(plan()).replace(b"Team A", b"Team B"), "not signed by the key expected"),
        (lambda _: b"", "no canonical JSON"),
    ],
    ids=["another key", "another digest", "another kind", "cut", "changed", "nothing"],
)
def test_a_proposal_that_the_federation_did_not_sign_for_this_plan_is_refused(
    make: Callable[[Hospital], bytes], sentence: str, hospital: Hospital
) -> None:
    with pytest.raises(PlanError, match=sentence):
        hospital.approvals().receive(make(hospital))
    assert hospital.approvals().proposals() == ()


def test_a_plan_that_this_version_reads_differently_is_refused(hospital: Hospital) -> None:
    content = _without_defaults()
    with pytest.raises(PlanError, match="reads differently"):
        hospital.approvals().receive(hospital.proposal(plan(), plan=content, digest=digest(content)))


def test_a_proposal_that_was_tampered_with_does_not_count(hospital: Hospital) -> None:
    of = hospital.proposed()
    path = hospital.home / "proposals" / f"{of.digest}.json"
    path.write_bytes(path.read_bytes().replace(b'"rounds":2', b'"rounds":9'))
    assert hospital.approvals().proposals() == ()
    assert hospital.approvals().damaged() == (path,)
    with pytest.raises(RunError, match="no proposal"):
        hospital.approvals().approve(of.digest, "Anna")
    assert hospital.approvals().receive(hospital.proposal(of)) is True
    assert hospital.approvals().damaged() == ()


def test_a_proposal_under_the_name_of_another_does_not_count(hospital: Hospital) -> None:
    of, other = hospital.proposed(), plan(seed=9)
    folder = hospital.home / "proposals"
    (folder / f"{of.digest}.json").rename(folder / f"{other.digest}.json")
    assert hospital.approvals().proposals() == ()


def test_a_coordinator_cannot_fill_the_disk_with_proposals(hospital: Hospital, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(approvals, "_MOST_UNDECIDED", 2)
    first, second = hospital.proposed(seed=1), hospital.proposed(seed=2)
    known, third = hospital.approvals(), plan(seed=3)
    with pytest.raises(PlanError, match="2 others wait for a decision"):
        known.receive(hospital.proposal(third))
    assert known.receive(hospital.proposal(first)) is False
    known.approve(first.digest, "Anna")
    assert known.receive(hospital.proposal(third)) is True
    assert {held.digest for held in known.proposals()} == {first.digest, second.digest, third.digest}


def test_a_plan_is_found_by_the_first_digits_of_its_digest(hospital: Hospital) -> None:
    digests = [hospital.proposed(seed=seed).digest for seed in range(3)]
    found = hospital.approvals()
    assert [found.find(whole[:8]) for whole in digests] == digests
    with pytest.raises(RunError, match="no digest") as short:
        found.find(digests[0][:5])
    assert "at least 6" in short.value.remedy
    with pytest.raises(RunError, match="no plan"):
        found.find("0" * 64)


def test_digits_that_fit_several_plans_name_them(hospital: Hospital) -> None:
    folder = hospital.home / "proposals"
    folder.mkdir()
    for end in "ab":
        (folder / f"{'c' * 63}{end}.json").write_bytes(b"")
    with pytest.raises(RunError, match=r"2 plans: c{16}, c{16}"):
        hospital.approvals().find("cccccc")


# --- decisions


def test_an_approval_is_signed_with_the_sites_key_and_stands_until_it_is_revoked(hospital: Hospital) -> None:
    of = hospital.proposed()
    assert not hospital.approvals().standing(of.digest)
    assert hospital.approvals().approve(of.digest, "Anna").stands
    assert hospital.approvals().standing(of.digest)
    (envelope,) = hospital.approvals().decisions()
    signed = open_approval(envelope, hospital.approvals().identity.certificate.public_key())  # type: ignore[arg-type]
    assert (signed.site, signed.digest, signed.decision, signed.steward) == ("north", of.digest, "approve", "Anna")
    hospital.approvals().revoke(of.digest, "Bert")
    assert not hospital.approvals().standing(of.digest)


def test_an_approval_is_of_one_plan_alone(hospital: Hospital) -> None:
    of, other = hospital.proposed(), hospital.proposed(rounds=3)
    hospital.approvals().approve(of.digest, "Anna")
    assert not hospital.approvals().standing(other.digest)
    folder = hospital.home / "approvals"
    (folder / f"{other.digest}.json").write_bytes((folder / f"{of.digest}.json").read_bytes())
    assert not hospital.approvals().standing(other.digest)


def _revoke_there(home: Path, plan_digest: str) -> None:
    open_approvals(home, Policy()).revoke(plan_digest, "Bert")


def test_a_revocation_by_another_process_takes_effect_at_the_next_question(hospital: Hospital) -> None:
    of = hospital.proposed()
    agents = hospital.approvals()
    agents.approve(of.digest, "Anna")
    assert agents.standing(of.digest)
    other = multiprocessing.get_context("spawn").Process(target=_revoke_there, args=(hospital.home, of.digest))
    other.start()
    other.join()
    assert other.exitcode == 0
    assert not agents.standing(of.digest)


@pytest.mark.parametrize("second", ["Anna", "anna", " ANNA "])
def test_two_stewards_are_two_people(second: str, hospital: Hospital) -> None:
    of = hospital.proposed()
    asked = hospital.approvals(stewards=2)
    assert not asked.approve(of.digest, "Anna").stands
    assert not asked.approve(of.digest, second).stands
    assert asked.decisions() == ()
    assert asked.approve(of.digest, "Bert").stands
    (envelope,) = asked.decisions()
    assert open_approval(envelope, asked.identity.key.public_key()).steward == "Bert"


def test_one_steward_takes_back_what_two_approved(hospital: Hospital) -> None:
    of = hospital.proposed()
    asked = hospital.approvals(stewards=2)
    for name in ("Anna", "Bert"):
        asked.approve(of.digest, name)
    assert not asked.revoke(of.digest, "Anna").stands
    assert not asked.approve(of.digest, "Anna").stands
    assert asked.approve(of.digest, "Bert").stands


def test_a_policy_that_asks_for_more_stewards_ends_approvals_of_fewer(hospital: Hospital) -> None:
    of = hospital.proposed()
    hospital.approvals().approve(of.digest, "Anna")
    assert hospital.approvals().standing(of.digest)
    assert not hospital.approvals(stewards=2).standing(of.digest)


def test_a_plan_that_the_policy_forbids_cannot_be_approved(hospital: Hospital) -> None:
    of = hospital.proposed()
    with pytest.raises(RunError, match="most_rounds"):
        hospital.approvals(most_rounds=1).approve(of.digest, "Anna")
    assert not hospital.approvals().standing(of.digest)


@pytest.mark.parametrize("name", ["", "  ", "A" * 101, "Anna\x1b[2J", "An\u202ena"])
def test_a_steward_has_a_name_that_can_be_read(name: str, hospital: Hospital) -> None:
    of = hospital.proposed()
    with pytest.raises(RunError, match="a steward has a name"):
        hospital.approvals().approve(of.digest, name)


def _mutations() -> dict[str, Callable[[bytes, Approvals], bytes]]:
    def other_key(content: bytes, _: Approvals) -> bytes:
        return seal("decisions", json.loads(content)["body"], Ed25519PrivateKey.generate())

    def bare_approval(_: bytes, of: Approvals) -> bytes:
        return next(iter(of.decisions()))

    return {
        "a letter": lambda content, *_: content.replace(b"Anna", b"Anne"),
        "another key": other_key,
        "an approval alone": bare_approval,
        "cut": lambda content, *_: content[:-2],
        "empty": lambda *_: b"",
    }


@pytest.mark.parametrize("how", _mutations())
def test_a_file_of_approvals_that_was_tampered_with_does_not_count(how: str, hospital: Hospital) -> None:
    of = hospital.proposed()
    known = hospital.approvals()
    known.approve(of.digest, "Anna")
    path = hospital.home / "approvals" / f"{of.digest}.json"
    path.write_bytes(_mutations()[how](path.read_bytes(), known))
    assert not known.standing(of.digest)
    assert known.decisions() == ()
    assert known.damaged() == (path,)
    assert known.approve(of.digest, "Anna").stands
    assert known.damaged() == ()


def test_a_revocation_cannot_be_cut_out_of_the_file(hospital: Hospital) -> None:
    of = hospital.proposed()
    known = hospital.approvals()
    for decide in (known.approve, known.revoke, known.approve):
        decide(of.digest, "Anna")
    path = hospital.home / "approvals" / f"{of.digest}.json"
    envelope = json.loads(path.read_bytes())
    envelope["body"]["envelopes"] = envelope["body"]["envelopes"][1:]
    path.write_bytes(json.dumps(envelope, separators=(",", ":"), sort_keys=True).encode())
    assert known.damaged() == (path,)
    assert not known.standing(of.digest)


def test_the_approvals_of_an_old_key_end_with_it(hospital: Hospital, tmp_path: Path) -> None:
    of = hospital.proposed()
    hospital.approvals().approve(of.digest, "Anna")
    with open_door(tmp_path / "coordinator") as door:
        door.enrol("north")
        new = door.site_home("north") / "identity"
    (hospital.home / "identity").rename(tmp_path / "old")
    new.rename(hospital.home / "identity")
    assert not hospital.approvals().standing(of.digest)
    assert hospital.approvals().proposals() == ()


def test_a_clock_that_was_set_back_does_not_undo_a_decision(hospital: Hospital) -> None:
    of = hospital.proposed()
    times = iter([1000.0, 400.0, 400.0, 2000.0])
    known = replace(hospital.approvals(), clock=lambda: next(times))
    told = []
    for decide in (known.approve, known.revoke, known.approve, known.revoke):
        decide(of.digest, "Anna")
        told += [open_approval(envelope, known.identity.key.public_key()).at for envelope in known.decisions()]
    assert told == sorted(set(told))
    assert told[0] == 1000.0
    assert told[-1] == 2000.0


# --- what the coordinator is told


def test_a_standing_approval_is_told_whenever_it_is_asked_for(hospital: Hospital) -> None:
    of = hospital.proposed()
    known = hospital.approvals()
    known.approve(of.digest, "Anna")
    (envelope,) = known.decisions()
    assert hospital.approvals().decisions() == (envelope,)
    known.revoke(of.digest, "Anna")
    (revocation,) = known.decisions()
    assert open_approval(revocation, known.identity.key.public_key()).decision == "revoke"


def test_an_approval_that_was_taken_back_before_it_was_told_is_never_told(hospital: Hospital) -> None:
    of = hospital.proposed()
    known = hospital.approvals()
    known.approve(of.digest, "Anna")
    known.revoke(of.digest, "Anna")
    (only,) = known.decisions()
    assert open_approval(only, known.identity.key.public_key()).decision == "revoke"


def test_a_revocation_is_told_though_one_of_two_stewards_approves_again(hospital: Hospital) -> None:
    of = hospital.proposed()
    known = hospital.approvals(stewards=2)
    for name in ("Anna", "Bert"):
        known.approve(of.digest, name)
    known.revoke(of.digest, "Bert")
    known.approve(of.digest, "Anna")
    (only,) = known.decisions()
    assert open_approval(only, known.identity.key.public_key()).decision == "revoke"


def test_a_coordinator_restored_from_a_backup_learns_standing_approvals_again(tmp_path: Path) -> None:
    with open_door(tmp_path / "coordinator") as door:
        identity = door.enrol("north")
        site, of = Hospital(door.site_home("north"), load_log_key(door.home)), plan()
        door.registry.propose(of.digest, site.proposal(of))
        site.approvals().receive(site.proposal(of))
        door.registry.close()
        shutil.copy(door.home.registry, tmp_path / "backup")
        with closing(door.channel(identity)) as channel:
            known, stub = site.approvals(), rpc.RegistryStub(channel)  # type: ignore[no-untyped-call]
            known.approve(of.digest, "Anna")
            _deliver(stub, known)
            door.registry.close()
            shutil.copy(tmp_path / "backup", door.home.registry)
            assert not door.registry.approved("north", of.digest)
            _deliver(stub, known)
            assert door.registry.approved("north", of.digest)


def test_a_decision_reaches_a_real_registry_and_counts_there(tmp_path: Path) -> None:
    with open_door(tmp_path / "coordinator") as door:
        identity = door.enrol("north")
        site = Hospital(door.site_home("north"), load_log_key(door.home))
        of = plan()
        door.registry.propose(of.digest, site.proposal(of))
        with closing(door.channel(identity)) as channel:
            known, stub = site.approvals(stewards=2), rpc.RegistryStub(channel)  # type: ignore[no-untyped-call]
            for envelope in stub.Proposals(pb.ProposalsRequest(), timeout=10).envelopes:
                known.receive(envelope)
            seen = []
            for decide, name in ((known.approve, "Anna"), (known.approve, "Bert"), (known.revoke, "Anna")):
                decide(of.digest, name)
                _deliver(stub, known)
                seen.append(door.registry.approved("north", of.digest))
    assert seen == [False, True, False]


def _deliver(stub: rpc.RegistryStub, known: Approvals) -> None:
    for envelope in known.decisions():
        stub.Approve(pb.ApproveRequest(envelope=envelope), timeout=10)


# --- several at once, and whatever order


def test_stewards_who_approve_at_once_are_all_kept(hospital: Hospital) -> None:
    of, people = hospital.proposed(), {f"steward {number}" for number in range(8)}
    with ThreadPoolExecutor(len(people)) as pool:
        for job in [pool.submit(hospital.approvals().approve, of.digest, name) for name in people]:
            job.result()
    assert {one.steward for one in hospital.approvals().state(of.digest).approvals} == people


_STEPS = st.lists(st.tuples(st.sampled_from(["approve", "revoke", "deliver"]), st.sampled_from("ABC")), max_size=8)


@given(steps=_STEPS, needed=st.sampled_from([1, 2]))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_plan_stands_only_by_the_approvals_since_the_last_revocation(
    steps: list[tuple[str, str]], needed: int, hospital: Hospital
) -> None:
    of = hospital.proposed()
    (hospital.home / "approvals" / f"{of.digest}.json").unlink(missing_ok=True)
    known, since = hospital.approvals(stewards=needed), set[str]()
    told = False  # what the coordinator believes: the newest word that it has
    for what, steward in steps:
        if what == "deliver":
            for envelope in known.decisions():
                told = open_approval(envelope, known.identity.key.public_key()).decision == "approve"
            assert told == (len(since) >= needed)
            continue
        getattr(known, what)(of.digest, steward)
        since = since | {steward} if what == "approve" else set()
        assert known.standing(of.digest) == (len(since) >= needed)


# --- the gate


def test_a_run_without_approval_is_refused_with_its_own_code(hospital: Hospital) -> None:
    of, known = hospital.proposed(), hospital.approvals()
    now = datetime.now(UTC)
    with pytest.raises(SiteFailure) as refused:
        admit_run(Policy(), of, approved=known.standing(of.digest), now=now)
    assert refused.value.code is Code.NOT_APPROVED
    known.approve(of.digest, "Anna")
    admit_run(Policy(), of, approved=known.standing(of.digest), now=now)


def test_the_folder_holds_whole_files_alone(hospital: Hospital) -> None:
    of = hospital.proposed()
    hospital.approvals().approve(of.digest, "Anna")
    names = {path.name for folder in ("proposals", "approvals") for path in (hospital.home / folder).iterdir()}
    assert names == {f"{of.digest}.json", ".lock"}
    assert open_proposal(
        (hospital.home / "proposals" / f"{of.digest}.json").read_bytes(), hospital.log_key.public_key()
    )


def test_an_approval_over_the_wire_needs_the_sites_own_certificate(tmp_path: Path) -> None:
    with open_door(tmp_path / "coordinator") as door:
        north, south = door.enrol("north"), door.enrol("south")
        site = Hospital(door.site_home("north"), load_log_key(door.home))
        of = plan()
        door.registry.propose(of.digest, site.proposal(of))
        site.approvals().receive(site.proposal(of))
        site.approvals().approve(of.digest, "Anna")
        (envelope,) = site.approvals().decisions()
        with closing(door.channel(south)) as channel, pytest.raises(grpc.RpcError):
            rpc.RegistryStub(channel).Approve(pb.ApproveRequest(envelope=envelope), timeout=10)  # type: ignore[no-untyped-call]
        assert door.registry.approvals(of.digest) == {}
        assert north.site == "north"
