"""Set-up over a federation in memory: a site joins only the roster that it can believe, whoever has signed it."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import timedelta
from functools import cache
from typing import Any

import pytest

from locum.common.canonical import sha256_hex
from locum.common.identity import Subject, base64url, certificate_pem, new_key, utc_now
from locum.common.secagg import MOST_SITES, keys, site
from locum.common.secagg.roster import Pair, Roster, SecureRefusal, sign, threshold_of
from locum.common.secagg.site import Offer
from locum.server.authority import Authority
from tests.common.secagg.federation import PLAN, RUN, Federation, Site, authority, resigned

NAMES = ("a", "b", "c", "d")


@cache
def _announced() -> Federation:
    federation = Federation(NAMES)
    federation.announce()
    return federation


@pytest.fixture
def four() -> Federation:
    """Four sites that have announced their keys."""
    return _announced().copy()


def _refused(
    federation: Federation, offer: Offer, why: str, *, name: str = "a", later: timedelta | None = None
) -> None:
    found = federation.sites[name]
    before = found.state.model_dump_json()
    with pytest.raises(SecureRefusal, match=why):
        site.join(
            found.state,
            offer,
            trust=federation.trust,
            least=federation.least,
            key=found.key,
            now=utc_now() + (later or timedelta()),
        )
    assert found.state.model_dump_json() == before


def _announcing(found: Site, *, run: str = RUN, plan: str = PLAN, name: str | None = None) -> Site:
    """A site with keys of its own making."""
    found.state, found.statement = site.announce(run, plan, site=name or found.name, key=found.key)
    return found


def _certified(root: Authority, subject: Subject) -> Site:
    """A site that calls itself b, with a certificate for any subject."""
    key = new_key()
    certificate = root._issue(subject, key.public_key(), life=timedelta(days=1), now=None)
    return Site("b", key, certificate_pem(certificate).decode())


# --- the promise kept


@pytest.mark.parametrize("sites", [3, 4, 7])
def test_both_sites_of_a_pair_have_one_secret_and_no_two_pairs_the_same(sites: int) -> None:
    federation = Federation("abcdefg"[:sites]).set_up()
    chains = {name: found.ready.chains for name, found in federation.sites.items()}
    assert all(chains[one][other] == chains[other][one] for one in chains for other in chains if one != other)
    assert len({chain for of in chains.values() for chain in of.values()}) == sites * (sites - 1) // 2


def test_a_second_set_up_has_other_secrets(four: Federation) -> None:
    one = set(four.set_up().sites["a"].ready.chains.values())
    assert not one & set(four.set_up().sites["a"].ready.chains.values())


# --- a forged member, in a roster that the coordinator itself has signed


def test_a_member_of_another_authority_is_refused(four: Federation) -> None:
    """Also of one that calls itself by the same name."""
    for name in ("test", "other"):
        forged = _announcing(four.enrol("b", authority(name)))
        _refused(four, four.offer(rogue={"b": forged}), "the certificate of b cannot be believed")


def test_a_member_that_has_certified_itself_with_a_sites_key_is_refused(four: Federation) -> None:
    """A site's certificate is no authority's."""
    mallory = four.sites["d"]
    root = replace(four.root, key=mallory.key, certificate=four.trust.site("d", mallory.certificate, utc_now()))
    forged = _announcing(_certified(root, Subject("test", "site", "b")))
    _refused(four, four.offer(rogue={"b": forged}), "cannot be believed")


@pytest.mark.parametrize(
    "subject",
    [
        Subject("other", "site", "b"),
        Subject("test", "site", "c"),
        Subject("test", "site", "B"),
        Subject("test", "invitation", "b"),
        Subject("test", "server", "b"),
        Subject("test", "log", "b"),
        Subject("test", "authority", "b"),
    ],
)
def test_a_member_with_a_certificate_of_somebody_else_is_refused(four: Federation, subject: Subject) -> None:
    """Of another federation, of another name, of another role."""
    forged = _announcing(_certified(four.root, subject))
    _refused(four, four.offer(rogue={"b": forged}), "a certificate is not that of the site b")


def test_a_certificate_counts_in_its_time_only(four: Federation) -> None:
    offer = four.offer()
    _refused(four, offer, "expired", later=timedelta(days=90))
    _refused(four, offer, "not valid before", later=timedelta(days=-1))


def test_a_member_with_a_key_of_another_kind_is_refused(four: Federation) -> None:
    certificate = four.root.issue_site("b", four.log.public_key())
    forged = Site("b", four.sites["b"].key, certificate_pem(certificate).decode())
    forged.statement = resigned(four.sites["b"].statement, four.log)
    _refused(four, four.offer(rogue={"b": forged}), "is no site's")


def test_run_keys_that_are_not_the_members_own_are_refused(four: Federation) -> None:
    """Whoever had them sealed to could open what was meant for b."""
    b, c = four.sites["b"], four.sites["c"]
    for statement, why in (
        (c.statement, "not signed by the key expected"),
        (resigned(b.statement, c.key), "not signed by the key expected"),
        (resigned(b.statement, four.log), "not signed by the key expected"),
        (resigned(b.statement, b.key, site="c"), "of another run"),
        (resigned(b.statement, b.key, run="run-2"), "of another run"),
        (resigned(b.statement, b.key, plan="c" * 64), "of another run"),
        (resigned(b.statement, b.key, kind="secagg pair"), "no secagg keys"),
        (resigned(b.statement, b.key, more=1), "no secagg keys of this version"),
        (resigned(b.statement, b.key, suite="locum-secagg-2"), "no secagg keys of this version"),
        (resigned(b.statement, b.key, pairs=base64url(bytes(10))), "no secagg keys of this version"),
    ):
        _refused(four, four.offer(rogue={"b": replace(b, statement=statement)}), why)


def test_keys_to_which_nothing_can_be_sealed_are_refused(four: Federation) -> None:
    b = four.sites["b"]
    good = keys.public_of(b.state.pairs)
    for public in (b"\xff" * keys.PUBLIC_BYTES, bytes(keys.PUBLIC_BYTES), good[:-32] + bytes(32)):
        statement = resigned(b.statement, b.key, pairs=base64url(public))
        _refused(four, four.offer(rogue={"b": replace(b, statement=statement)}), "the run keys of b")


def test_other_keys_than_those_that_this_site_has_announced_are_refused(four: Federation) -> None:
    """Also its own ones of an earlier set-up: nobody has their private halves any more."""
    earlier = replace(four.sites["a"])
    four.announce()
    _refused(four, four.offer(rogue={"a": earlier}), "other keys of this site")


# --- what a relay can change


def _swapped(found: dict[str, str]) -> dict[str, str]:
    return {**found, "b": found["c"], "c": found["b"]}


def test_keys_and_certificates_that_the_roster_does_not_mean_are_refused(four: Federation) -> None:
    offer = four.offer()
    statements, certificates = dict(offer.keys), dict(offer.certificates)
    again = certificate_pem(four.root.issue_site("b", four.sites["b"].key.public_key())).decode()
    not_those = "not those of the roster"
    for changed, why in (
        (replace(offer, keys=_swapped(statements)), not_those),
        (replace(offer, certificates=_swapped(certificates)), "not that of the site b"),
        (replace(offer, keys=_swapped(statements), certificates=_swapped(certificates)), "not that of the site b"),
        (replace(offer, certificates={**certificates, "b": again}), not_those),
        (replace(offer, keys={**statements, "b": resigned(statements["b"], four.sites["b"].key)}), not_those),
        (replace(offer, keys={**statements, "b": ""}), not_those),
        (replace(offer, certificates={**certificates, "b": ""}), "cannot be believed"),
        (replace(offer, certificates={**certificates, "b": "\ud800"}), "UTF-8"),
        (replace(offer, certificates={**certificates, "b": certificates["b"] + "\ud800"}), "UTF-8"),
        (replace(offer, keys={**statements, "b": "\ud800"}), "UTF-8"),
    ):
        _refused(four, changed, why)


def test_keys_and_certificates_of_more_or_fewer_than_the_roster_are_refused(four: Federation) -> None:
    offer = four.offer()
    for part in ("keys", "certificates"):
        found = dict(getattr(offer, part))
        for wrong in ({}, {"a": found["a"]}, {**found, "x": found["b"]}, {n: found[n] for n in "abc"}):
            changes: dict[str, Any] = {part: wrong}
            _refused(four, replace(offer, **changes), "not those of the roster's sites")


# --- the roster


def test_a_roster_that_the_coordinator_has_not_signed_is_refused(four: Federation) -> None:
    offer = four.offer()
    stranger = Federation(NAMES)
    for roster in (
        resigned(offer.roster, stranger.log),
        resigned(offer.roster, four.sites["b"].key),
        resigned(offer.roster, four.root.key),
        resigned(offer.roster, four.log, kind="secagg context"),
        offer.roster.replace("run-1", "run-2"),
        offer.roster.replace(":", ": ", 1),
        offer.keys["a"],
        offer.roster[:-1],
        "",
        "\ud800",
    ):
        _refused(four, replace(offer, roster=roster), "signed by the key expected|is no")


def test_a_roster_of_another_run_plan_or_set_up_is_refused(four: Federation) -> None:
    offer = four.offer()
    for changes in ({"run": "run-2"}, {"plan": "c" * 64}):
        _refused(four, replace(offer, roster=resigned(offer.roster, four.log, **changes)), "of another run")
    four.announce()
    _refused(four, replace(four.offer(), roster=offer.roster), "not those of the roster")
    _refused(four, offer, "other keys of this site")


def test_a_roster_that_leaves_out_this_site_is_refused(four: Federation) -> None:
    others = four.copy()
    del others.sites["a"]
    _refused(four, others.offer(), "does not name this site")


def test_a_roster_of_fewer_than_the_sites_own_least_is_refused(four: Federation) -> None:
    offer = four.offer()
    four.least = 5
    _refused(four, offer, "a roster of 4 sites; this site's min_sites is 5")


def _members(offer: Offer) -> list[dict[str, str]]:
    found: list[dict[str, str]] = json.loads(offer.roster)["body"]["members"]
    return found


@pytest.mark.parametrize("threshold", [0, 1, 2, 4, 5, -3])
def test_a_roster_with_another_threshold_is_refused(four: Federation, threshold: int) -> None:
    offer = four.offer()
    _refused(four, replace(offer, roster=resigned(offer.roster, four.log, threshold=threshold)), "no secagg roster")


def test_members_that_are_not_ascending_and_different_are_refused(four: Federation) -> None:
    """A site at two places would hold two shares; an order of the coordinator's choice would be two rosters of one."""
    offer = four.offer()
    a, b, c, d = _members(offer)
    for members in (
        [b, a, c, d],
        [d, c, b, a],
        [a, b, c, d, d],
        [a, a, c, d],
        [a, a, b, c],
        [a, b, c, {**b, "site": "c"}],
    ):
        threshold = threshold_of(len(members))
        roster = resigned(offer.roster, four.log, members=members, threshold=threshold)
        _refused(four, replace(offer, roster=roster), "no secagg roster")


def test_rosters_of_too_few_or_too_many_sites_are_refused(four: Federation) -> None:
    offer = four.offer()
    two = _members(offer)[:2]
    many = [{**two[0], "site": f"s{number:03}"} for number in range(MOST_SITES)]
    for members in (two, two[:1], [], [two[0], *many]):
        changes: dict[str, Any] = {"members": members, "threshold": threshold_of(len(members))}
        _refused(four, replace(offer, roster=resigned(offer.roster, four.log, **changes)), "no secagg roster")


def test_a_roster_with_more_or_other_fields_is_refused(four: Federation) -> None:
    offer = four.offer()
    first, *rest = _members(offer)
    wrong: list[dict[str, Any]] = [
        {"suite": "locum-secagg-2"},
        {"more": 1},
        {"threshold": "3"},
        {"answers": base64url(bytes(keys.PUBLIC_BYTES - 1))},
        {"answers": 7},
        {"members": [{**first, "more": 1}, *rest]},
        {"members": [{**first, "site": "../a"}, *rest]},
        {"members": {"a": first}},
        {"members": None},
    ]
    for changes in wrong:
        _refused(four, replace(offer, roster=resigned(offer.roster, four.log, **changes)), "no secagg roster")


@pytest.mark.parametrize("sites", range(3, MOST_SITES + 1))
def test_two_sets_that_can_unmask_have_an_honest_site_in_common(sites: int) -> None:
    """t > (n + c)/2, and t of the t + c who see shares are not reached by the c who work together."""
    threshold = threshold_of(sites)
    together = min(2 * threshold - sites - 1, threshold - 2)
    assert 2 * threshold > sites + together
    assert together >= 0
    assert 2 * sites / 3 < threshold <= sites


# --- halves of secrets


def _not_begun(federation: Federation, halves: dict[str, str], why: str) -> None:
    state = federation.sites["a"].state
    before = state.model_dump_json()
    with pytest.raises(SecureRefusal, match=why):
        site.begin(state, halves)
    assert state.model_dump_json() == before


def test_a_half_of_another_set_up_is_refused(four: Federation) -> None:
    earlier = four.halves()["a"]
    later = four.halves()["a"]
    _not_begun(four, {**later, "b": earlier["b"]}, "of another set-up")
    forged = resigned(earlier["b"], four.sites["b"].key, roster=four.roster.digest)
    _not_begun(four, {**later, "b": forged}, "not sealed to this key for this purpose")
    four.begin("a", later)


def test_a_half_of_another_sender_or_for_another_receiver_is_refused(four: Federation) -> None:
    halves = four.halves()
    ours, key = halves["a"], four.sites["b"].key
    for half, why in (
        (ours["c"], "not signed by the key expected"),
        (resigned(ours["c"], key), "of another set-up"),
        (resigned(ours["c"], key, sender="b"), "not sealed to this key for this purpose"),
        (halves["c"]["b"], "of another set-up"),
        (resigned(halves["c"]["b"], key, receiver="a"), "not sealed to this key for this purpose"),
        (resigned(ours["b"], four.sites["c"].key), "not signed by the key expected"),
        (resigned(ours["b"], four.log), "not signed by the key expected"),
        (resigned(ours["b"], key, kind="secagg upload"), "no secagg pair"),
        (resigned(ours["b"], key, sealed=base64url(bytes(1168))), "not sealed to this key for this purpose"),
        (resigned(ours["b"], key, sealed=base64url(bytes(1169))), "no secagg pair of this version"),
        (resigned(ours["b"], key, sealed=""), "not sealed to this key for this purpose"),
        ("", "canonical"),
    ):
        _not_begun(four, {**ours, "b": half}, why)
    four.begin("a", ours)


@pytest.mark.parametrize("length", [0, 1, 31])
def test_a_half_of_another_length_is_refused(four: Federation, length: int) -> None:
    ours = four.halves()["a"]
    purpose = site._pair_purpose(four.roster, "b", "a")
    sealed = keys.seal(keys.public_of(four.sites["a"].state.announced.pairs), purpose, bytes(length))
    pair = Pair(roster=four.roster.digest, sender="b", receiver="a", sealed=sealed)
    _not_begun(four, {**ours, "b": sign(pair, four.sites["b"].key)}, "another length")


def test_halves_of_more_or_fewer_than_the_peers_are_refused(four: Federation) -> None:
    halves = four.halves()
    ours = halves["a"]
    why = "not one half of a secret of each peer"
    for wrong in ({}, {"b": ours["b"]}, {**ours, "a": halves["b"]["a"]}, {**ours, "x": ours["b"]}):
        _not_begun(four, wrong, why)


# --- the model's key


def test_a_models_key_counts_for_its_model_and_roster_only(four: Federation) -> None:
    four.set_up()
    state, model = four.sites["a"].ready, "b" * 64
    public = keys.public_of(state.models)
    purpose = site.model_purpose(state.roster, model)
    sealed = keys.seal(public, purpose, bytes(keys.KEY_BYTES))
    assert site.model_key(state, model, sealed) == bytes(keys.KEY_BYTES)
    other = keys.public_of(four.sites["b"].ready.models)
    for wrong in (
        keys.seal(public, site.model_purpose(state.roster, "c" * 64), bytes(keys.KEY_BYTES)),
        keys.seal(other, purpose, bytes(keys.KEY_BYTES)),
        keys.seal(public, purpose, bytes(keys.KEY_BYTES - 1)),
        keys.seal(public, purpose, bytes(keys.KEY_BYTES + 1)),
        keys.seal(public, b"", bytes(keys.KEY_BYTES)),
        sealed[:-1],
        sealed + b"\0",
        b"",
    ):
        with pytest.raises(SecureRefusal, match="the model's key"):
            site.model_key(state, model, wrong)


def test_a_roster_has_one_digest_and_every_field_is_in_it(four: Federation) -> None:
    four.offer()
    roster = four.roster
    body = roster.model_dump(mode="json")
    assert roster.digest == sha256_hex(json.dumps(body, sort_keys=True, separators=(",", ":")).encode())
    changed = [
        Roster.model_validate({**body, "run": "run-2"}),
        Roster.model_validate({**body, "plan": "c" * 64}),
        Roster.model_validate({**body, "answers": base64url(keys.public_of(keys.new_private()))}),
        Roster.model_validate({**body, "members": [{**body["members"][0], "keys": "d" * 64}, *body["members"][1:]]}),
    ]
    assert len({roster.digest, *(other.digest for other in changed)}) == 5
