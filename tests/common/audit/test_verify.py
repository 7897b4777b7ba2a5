"""Whoever changes a log, forges a signature or leaves something out is found by `verify`, and where."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ed25519

from locum.common.audit import bundle as bundles
from locum.common.audit.verify import TITLES, verify
from locum.common.canonical import canonical_json, sha256_hex
from locum.common.cohort import Told
from locum.common.envelope import Proposal, seal_proposal
from locum.common.identity import certificate_pem, fingerprint_of, new_key
from locum.common.log.entries import Entry, ReadinessEntry, RoundEntry, SiteEntry, moment, written
from locum.common.log.note import with_lines
from locum.common.plan import Plan
from tests.audits import (
    RUN,
    Failure,
    Federation,
    edited,
    failure,
    leaves_of,
    lines_of,
    meddled,
    members_of,
    model_of,
    sha,
    with_leaves,
)
from tests.plans import plan, secured

#: Where entries stand in the log of three sites and two rounds.
PROPOSED, NORTH, STARTED, READY, ROSTER = 4, 5, 8, 9, 12
ROUND_1, METRICS_1, ROUND_2, METRICS_2, TEST, END = 13, 14, 15, 16, 17, 18

PRIVACY = {"epsilon": 4.0, "delta": 1e-6, "clip": 1.0, "metrics_epsilon": 1.0}


def private(**changes: Any) -> Plan:
    """A secured plan with differential privacy."""
    return secured(
        **{
            "protection__differential_privacy": PRIVACY,
            "release__training_loss": False,
            "release__per_site": [],
            **changes,
        }
    )


@pytest.fixture(scope="module")
def open_hand(tmp_path_factory: pytest.TempPathFactory) -> Federation:
    """A federation whose run shows each site's update."""
    return Federation(tmp_path_factory.mktemp("plain"), plan())


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory) -> Federation:
    """A federation whose run sums securely, with differential privacy."""
    return Federation(tmp_path_factory.mktemp("masked"), private())


@pytest.fixture(scope="module")
def true(open_hand: Federation) -> Path:
    """A true bundle."""
    return open_hand.bundle(name="true.zip")


def caught(path: Path, check: int, entry: int | None, **options: Any) -> Failure:
    """The failure, which is at this check and this entry."""
    found = failure(path, **options)
    assert found is not None, "verify finds nothing wrong"
    assert (found.check, found.entry) == (check, entry), found
    return found


# --- what is true


@pytest.mark.parametrize("of", [plan, secured, private])
def test_a_true_bundle_holds(of: Callable[[], Plan], tmp_path: Path) -> None:
    federation = Federation(tmp_path, of())
    verdict = verify(federation.bundle(), authority=federation.fingerprint)
    assert [(result.number, result.told) for result in verdict.results if result.state != "holds"] == []
    assert [result.number for result in verdict.results] == list(range(1, 21)) == list(TITLES)


def test_a_bundle_without_the_model_holds_and_says_so(open_hand: Federation) -> None:
    path = open_hand.bundle(name="without.zip", model_safetensors=None)
    verdict = verify(path)
    assert verdict.holds
    assert "was left out" in verdict.results[17].told


def test_checkpoints_may_stand_apart_and_an_edited_entry_is_named_as_closely_as_they_stand(
    open_hand: Federation,
) -> None:
    leaves = [written(entry) for entry in open_hand.history()]
    notes = open_hand.witnessed(open_hand.checkpoints(leaves, every=4))
    path = open_hand.bundle(notes=notes, name="sparse.zip")
    assert verify(path).holds
    found = caught(
        with_leaves(path, lambda lines: lines.__setitem__(6, edited(lines[6], at="2026-05-04T08:05:59Z"))), 5, 4
    )
    assert "one of the entries 4 to 7" in found.means


def test_an_independent_look_at_the_roots_agrees(true: Path) -> None:
    """Plain hashlib and json, by the recursion of RFC 6962, section 2.1: nothing of ours."""

    def tree(leaves: list[bytes]) -> bytes:
        if len(leaves) < 2:
            return hashlib.sha256(b"\0" + leaves[0]).digest()
        half = 1 << (len(leaves) - 1).bit_length() - 1
        return hashlib.sha256(b"\1" + tree(leaves[:half]) + tree(leaves[half:])).digest()

    import base64

    with zipfile.ZipFile(true) as archive:
        leaves = archive.read("entries.jsonl").split(b"\n")[:-1]
        notes = [json.loads(line)["checkpoint"] for line in archive.read("checkpoints.jsonl").splitlines()]
        model = hashlib.sha256(archive.read("model.safetensors")).hexdigest()
    assert [note.split("\n")[1] for note in notes] == [str(number) for number in range(1, len(leaves) + 1)]
    for size, note in enumerate(notes, start=1):
        assert base64.b64decode(note.split("\n")[2]) == tree(leaves[:size])
    assert json.loads(leaves[-1])["model"] == model
    assert verify(true).holds


def test_verify_needs_neither_torch_nor_flower_nor_a_network(true: Path) -> None:
    code = (
        "import socket, sys\n"
        "def refused(*given): raise AssertionError('a network was asked for')\n"
        "socket.socket.connect = socket.getaddrinfo = refused\n"
        "from locum.common.cli import main\n"
        f"code = main(['audit', 'verify', {str(true)!r}])\n"
        "heavy = {'torch', 'monai', 'flwr', 'grpc', 'numpy', 'matplotlib', 'jinja2', 'pydicom'} & set(sys.modules)\n"
        "print(sorted(heavy), code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[] None"


# --- somebody without keys meddles with the log


def _edit(lines: list[bytes], number: int, **fields: Any) -> None:
    lines[number] = edited(lines[number], **fields)


MEDDLING: dict[str, tuple[Callable[[list[bytes]], Any], int]] = {
    "an edited entry": (lambda lines: _edit(lines, ROUND_2, attempt=2), ROUND_2),
    "an edited first entry": (lambda lines: _edit(lines, 0, at="2026-05-04T08:00:01Z"), 0),
    "an edited last entry": (lambda lines: _edit(lines, END, at="2026-05-04T09:00:00Z"), END),
    "a removed entry": (lambda lines: lines.pop(METRICS_1), METRICS_1),
    "two entries exchanged": (lambda lines: lines.insert(ROUND_1, lines.pop(METRICS_1)), ROUND_1),
    "an inserted entry": (lambda lines: lines.insert(ROUND_2, lines[ROUND_1]), ROUND_2),
    "an entry at the end": (lambda lines: lines.append(lines[STARTED]), END + 1),
    "a truncated log": (lambda lines: lines.pop(), END),
    "half a log": (lambda lines: lines.__delitem__(slice(ROSTER, None)), ROSTER),
}


@pytest.mark.parametrize("what", MEDDLING)
def test_meddling_with_the_log_is_found_at_its_entry(true: Path, what: str) -> None:
    change, entry = MEDDLING[what]
    caught(with_leaves(true, change), 5, entry)


@pytest.mark.parametrize(
    "change",
    [
        lambda leaf: leaf.replace(b'"attempt":1', b'"attempt": 1'),
        lambda leaf: leaf.replace(b'"attempt":1', b'"attempt":1.0'),
        lambda leaf: leaf.replace(b'"attempt":1', b'"attempt":"1"'),
        lambda leaf: leaf.replace(b'"attempt":1', b'"attempt":1,"attempt":1'),
        lambda leaf: leaf.replace(b'"attempt":1,', b""),
        lambda leaf: leaf[:-1] + b',"zeal":1}',
        lambda leaf: leaf.replace(b'"kind":"round"', b'"kind":"rounds"'),
        lambda leaf: leaf + b" ",
        lambda leaf: b"{}",
        lambda leaf: b"\xff",
        lambda leaf: leaf.replace(b'"attempt":1', b'"attempt":' + b"9" * 40),
    ],
)
def test_an_entry_that_is_spelt_in_another_way_is_found_at_once(true: Path, change: Callable[[bytes], bytes]) -> None:
    caught(with_leaves(true, lambda lines: lines.__setitem__(ROUND_1, change(lines[ROUND_1]))), 4, ROUND_1)


def test_an_entry_of_a_sites_own_log_is_none_of_the_coordinators(true: Path) -> None:
    ledger = canonical_json({"at": "2026-05-04T08:00:00Z", "kind": "ledger", "rows": 1, "head": sha("head")})
    caught(with_leaves(true, lambda lines: lines.insert(3, ledger)), 4, 3)


def test_the_first_entry_of_another_log_is_no_second_one(true: Path) -> None:
    caught(with_leaves(true, lambda lines: lines.append(lines[0])), 4, END + 1)


# --- checkpoints


def test_a_checkpoint_that_the_log_key_did_not_sign_is_forged(open_hand: Federation) -> None:
    """Whoever edits an entry and makes all roots anew has no log key."""
    entries = open_hand.history()
    entries[ROUND_2] = open_hand.round(2, 20, attempt=3)
    true, others = (
        open_hand.checkpoints(map(written, entries), key=key) for key in (None, ed25519.Ed25519PrivateKey.generate())
    )
    notes = open_hand.witnessed([*true[:ROUND_2], *others[ROUND_2:]])
    caught(open_hand.bundle(entries, notes=notes, name="forged.zip"), 6, ROUND_2)


def test_two_checkpoints_of_one_size_are_two_histories(open_hand: Federation) -> None:
    entries, other = open_hand.history(), open_hand.history()
    other[ROUND_2] = open_hand.round(2, 20, attempt=3)
    one, two = (open_hand.checkpoints(map(written, told)) for told in (entries, other))
    notes = [*one[: ROUND_2 + 1], *two[ROUND_2:]]
    caught(open_hand.bundle(entries, notes=notes, name="two.zip"), 5, ROUND_2 + 1)


def test_a_checkpoint_of_more_entries_than_there_are_tells_that_the_end_was_cut_off(open_hand: Federation) -> None:
    entries = open_hand.history()
    notes = open_hand.witnessed(open_hand.checkpoints(map(written, entries)))
    found = caught(open_hand.bundle(entries[:-1], notes=notes, name="cut.zip"), 5, END)
    assert "cut off" in found.means


def test_lines_that_are_no_checkpoints_are_told(true: Path) -> None:
    for line in (b"{}", b'{"checkpoint":1}', b"no json", b'{"checkpoint": "a"}'):
        change = lambda members, line=line: members.update({bundles.CHECKPOINTS: line + b"\n"})  # noqa: E731
        caught(meddled(true, change), 5, None)


# --- witnesses


def test_a_site_that_was_shown_another_history_is_a_witness_against_the_log(open_hand: Federation) -> None:
    """A fork: two sites have cosigned other roots of the same size."""
    entries, other = open_hand.history(), open_hand.history()
    other[ROUND_2] = open_hand.round(2, 20, attempt=3)
    shown, fork = (open_hand.checkpoints(map(written, told))[-1] for told in (entries, other))
    lines = [open_hand.cosigned(shown, "north"), open_hand.cosigned(fork, "riverside")]
    notes = [*open_hand.checkpoints(map(written, entries))[:-1], with_lines(shown, lines)]
    found = caught(open_hand.bundle(entries, notes=notes, name="fork.zip"), 7, END)
    assert "riverside" in found.told
    assert "another history" in found.means


def test_a_forged_cosignature_is_found(open_hand: Federation) -> None:
    *before, last = open_hand.checkpoints(map(written, open_hand.history()))
    lines = [open_hand.cosigned(last, "north"), open_hand.cosigned(last, "st-anne", key=new_key())]
    found = caught(open_hand.bundle(notes=[*before, with_lines(last, lines)], name="forged-line.zip"), 7, END)
    assert "st-anne" in found.told


def test_too_few_witnesses_are_told(open_hand: Federation) -> None:
    *before, last = open_hand.checkpoints(map(written, open_hand.history()))
    path = open_hand.bundle(notes=[*before, with_lines(last, [open_hand.cosigned(last, "north")])], name="one.zip")
    assert "1 sites have cosigned" in caught(path, 7, END).told
    assert verify(path, witnesses=1).holds
    caught(path, 7, END, witnesses=2)


def test_a_cosignature_of_the_time_before_the_end_does_not_count_for_it(open_hand: Federation) -> None:
    notes = open_hand.checkpoints(map(written, open_hand.history()))
    lines = [open_hand.cosigned(notes[-2], site) for site in open_hand.sites]
    path = open_hand.bundle(notes=[*notes[:-2], with_lines(notes[-2], lines), notes[-1]], name="early.zip")
    caught(path, 7, END)


def test_a_revoked_site_is_no_witness_any_more(open_hand: Federation) -> None:
    entries = [*open_hand.history(), SiteEntry(at=moment(open_hand.at(100)), site="north", event="revoked")]
    notes = open_hand.checkpoints(map(written, entries))
    late = [
        *notes[:-1],
        with_lines(notes[-1], [open_hand.cosigned(notes[-1], s, minutes=120) for s in open_hand.sites]),
    ]
    assert "revoked before" in caught(open_hand.bundle(entries, notes=late, name="late.zip"), 7, END + 1).told
    lines = [open_hand.cosigned(notes[END], site, minutes=90) for site in open_hand.sites]
    early = [*notes[:END], with_lines(notes[END], lines), notes[-1]]
    assert verify(open_hand.bundle(entries, notes=early, name="in-time.zip")).holds


@pytest.mark.parametrize("logged", [False, True])
def test_a_key_that_took_no_part_is_no_witness_of_the_run(open_hand: Federation, *, logged: bool) -> None:
    """The authority can certify what it likes: keys of its own under the sites' names, told in the log or not."""
    keys = {site: new_key() for site in open_hand.sites}
    certificates = {
        site: open_hand.authority.issue_site(site, key.public_key(), now=open_hand.at(0)) for site, key in keys.items()
    }
    entries = open_hand.history()
    for site, certificate in certificates.items() if logged else ():
        digest = fingerprint_of(certificate)
        entries.append(SiteEntry(at=moment(open_hand.at(100)), site=site, event="enrolled", certificate=digest))
    *before, last = open_hand.checkpoints(map(written, entries))
    lines = [open_hand.cosigned(last, site, key=key) for site, key in keys.items()]
    pems = b"".join(map(certificate_pem, [*open_hand.certificates.values(), *certificates.values()]))
    notes = [*before, with_lines(last, lines)]
    path = open_hand.bundle(entries, notes=notes, name="made-up.zip", certificates_pem=pems)
    assert "0 sites have cosigned" in caught(path, 7, END).told
    assert verify(path, witnesses=1).holds is logged


def test_who_gave_to_the_model_is_counted_among_its_witnesses(open_hand: Federation) -> None:
    """A last roster of few sites does not make these few the witnesses of what others gave."""
    few = ("north", "riverside")
    said = [
        open_hand.said("resumed", 28),
        *(open_hand.readiness(site, 28.5) for site in few),
        open_hand.roster(29, round=2, model=sha256_hex(model_of(2)), sites=few, excluded={"st-anne": "AWAY"}),
        open_hand.metrics(2, 30, "test", sites=few, per_site={}),
        open_hand.end(31, status="completed with losses"),
    ]
    entries = [*open_hand.history()[:TEST], *said]
    *before, last = open_hand.checkpoints(map(written, entries))
    statement = open_hand.statement(entries, [*before, last], roster=few)
    summary = members_of(open_hand.bundle(entries, name="few.zip"))[1]["run.json"].replace(b',\n  "st-anne"', b"")
    one, two = ([open_hand.cosigned(last, site) for site in sites] for sites in (few[:1], few))
    for lines in (one, two):
        notes = [*before, with_lines(last, lines)]
        path = open_hand.bundle(entries, notes=notes, name="few.zip", statement_json=statement, run_json=summary)
        assert verify(path).holds is (lines is two), verify(path).first
    wide = open_hand.bundle(entries, notes=[*before, with_lines(last, two)], name="few.zip")
    assert "2 needed" in verify(wide).results[6].told


def test_a_key_that_was_shown_out_does_not_come_back(open_hand: Federation) -> None:
    certificate = open_hand.authority.issue_site("north", new_key().public_key(), now=open_hand.at(0))
    old, new = fingerprint_of(open_hand.certificates["north"]), fingerprint_of(certificate)
    out, between, back = (
        SiteEntry(at=moment(open_hand.at(5.5)), site="north", event=event, certificate=of)
        for event, of in (("revoked", old), ("enrolled", new), ("enrolled", old))
    )
    entries = _with(open_hand.history(), STARTED, out, between, back, open_hand.history()[STARTED])
    *before, last = open_hand.checkpoints(map(written, entries))
    lines = [open_hand.cosigned(last, site) for site in ("riverside", "st-anne")]
    pems = b"".join(map(certificate_pem, [*open_hand.certificates.values(), certificate]))
    path = open_hand.bundle(entries, notes=[*before, with_lines(last, lines)], name="back.zip", certificates_pem=pems)
    assert "a key that was shown out" in caught(path, 9, STARTED + 2).told


def test_a_revocation_on_a_day_that_does_not_exist_is_told(open_hand: Federation) -> None:
    out = SiteEntry(at="2026-02-31T00:00:00Z", site="north", event="revoked")
    verdict = verify(open_hand.bundle([*open_hand.history(), out], name="no-day.zip"))
    assert not verdict.holds
    assert verdict.results[7].entry == END + 1


def test_a_site_that_was_shown_out_takes_part_in_nothing(open_hand: Federation) -> None:
    out = SiteEntry(at=moment(open_hand.at(5.5)), site="north", event="revoked")
    entries = _with(open_hand.history(), STARTED, out, open_hand.history()[STARTED])
    *before, last = open_hand.checkpoints(map(written, entries))
    lines = [open_hand.cosigned(last, site) for site in ("riverside", "st-anne")]
    path = open_hand.bundle(entries, notes=[*before, with_lines(last, lines)], name="out.zip")
    assert "was shown out before" in caught(path, 11, ROUND_1 + 1).told


def test_a_cosignature_after_the_certificate_had_expired_does_not_count(tmp_path: Path) -> None:
    federation = Federation(tmp_path, plan(), days=1)
    leaves = [written(entry) for entry in federation.history()]
    assert verify(federation.bundle(name="in-time.zip")).holds  # long after: as of its time it still verifies
    notes = federation.witnessed(federation.checkpoints(leaves), minutes=60 * 25)
    found = caught(federation.bundle(notes=notes, name="late.zip"), 7, END)
    assert "no certificate of it was valid at 2026-05-05" in found.told


# --- a coordinator that lies


def _with(entries: list[Entry], number: int, *others: Entry) -> list[Entry]:
    """The entries with others in place of one."""
    return [*entries[:number], *others, *entries[number + 1 :]]


Lie = Callable[[Federation, list[Entry]], list[Entry]]

LIES: dict[str, tuple[Lie, int, int | None]] = {
    "a clock set back": (
        lambda f, e: _with(e, ROUND_2, f.round(2, -30)), 8, ROUND_2),
    "a day that does not exist": (
        lambda f, e: _with(e, ROUND_2, f.round(2, 20, at="2026-02-31T00:00:00Z")), 8, ROUND_2),
    "a certificate that is not in the bundle": (
        lambda f, e: _with(e, 2, e[2].model_copy(update={"certificate": sha("another")})), 9, 2),
    "a certificate of another site": (
        lambda f, e: _with(e, 2, e[2].model_copy(update={"certificate": e[1].certificate})), 9, 2),
    "a certificate that is younger than its entry": (
        lambda f, e: _with(e, 0, e[0], SiteEntry(at="2026-05-04T06:00:00Z", site="north", event="enrolled",
                                                 certificate=e[1].certificate)), 8, 1),
    "a site that is revoked without having been there": (
        lambda f, e: _with(e, 1, SiteEntry(at=moment(f.at(1)), site="nobody", event="revoked"), e[1]), 9, 1),
    "another proposal": (
        lambda f, e: _with(e, PROPOSED, e[PROPOSED].model_copy(update={"statement": sha("another")})), 10, PROPOSED),
    "a plan that nobody proposed": (
        lambda f, e: [entry for entry in e if entry.kind != "proposal"], 10, 4),
    "an approval signed with another key": (
        lambda f, e: _with(e, NORTH, f.approval("north", 5, key=new_key())), 10, NORTH),
    "an approval of another plan": (
        lambda f, e: _with(e, NORTH, f.approval("north", 5, digest=sha("another plan"))), 10, NORTH),
    "an approval under another site's certificate": (
        lambda f, e: _with(e, NORTH, f.approval("north", 5, certificate=e[3].certificate)), 10, NORTH),
    "an approval of another site passed off as this one's": (
        lambda f, e: _with(e, NORTH, f.approval("st-anne", 5).model_copy(update={"site": "north"})), 10, NORTH),
    "a missing approval": (
        lambda f, e: [*e[:NORTH], *e[NORTH + 1:]], 11, ROUND_1 - 1),
    "an approval taken back before the second round": (
        lambda f, e: _with(e, ROUND_1, e[ROUND_1], f.approval("north", 11, "revoke")), 11, ROUND_2 + 1),
    "a run that was never started": (
        lambda f, e: [*e[:STARTED], *e[STARTED + 1:]], 12, STARTED),
    "a run that is started twice": (
        lambda f, e: _with(e, ROUND_2, f.said("started", 16), e[ROUND_2]), 12, ROUND_2),
    "a round of another plan": (
        lambda f, e: _with(e, ROUND_2, f.round(2, 20, plan=sha("another"))), 12, ROUND_2),
    "rounds without a roster": (
        lambda f, e: [*e[:ROSTER], *e[ROSTER + 1:]], 12, ROSTER),
    "a round that is missing": (
        lambda f, e: [*e[:ROUND_1], *e[ROUND_2:]], 12, ROUND_1),
    "a round twice": (
        lambda f, e: _with(e, ROUND_2, f.round(1, 16), e[ROUND_2]), 12, ROUND_2),
    "a round beyond the plan's": (
        lambda f, e: _with(e, METRICS_2, e[METRICS_2], f.round(3, 26)), 12, TEST),
    "a failure shown as a success": (
        lambda f, e: _with(e, TEST, f.said("failed", 28), e[TEST]), 12, END + 1),
    "a failure that is called a pause": (
        lambda f, e: _with(e, TEST, f.said("failed", 28), f.said("paused", 29), e[TEST]), 12, TEST + 1),
    "an end before the last round": (
        lambda f, e: [*e[:ROUND_2], f.metrics(1, 20, "test"), f.end(21, round=1, model=sha256_hex(model_of(1)))],
        12, ROUND_2 + 1),
    "something after the end": (
        lambda f, e: [*e, f.metrics(2, 40, "test")], 12, END + 1),
    "two results": (
        lambda f, e: [*e, f.said("resumed", 40), f.end(41, model=sha256_hex(model_of(1)), round=1)], 12, END + 2),
    "a roster that is too small": (
        lambda f, e: _with(e, ROSTER, f.roster(sites=("north",))), 13, ROSTER),
    "a round below its quorum": (
        lambda f, e: _with(e, ROUND_2, f.round(2, 20, sites=("north",))), 13, ROUND_2),
    "a site in a round that is not in the roster": (
        lambda f, e: _with(e, ROSTER, f.roster(sites=("north", "riverside"))), 13, ROUND_1),
    "a site that is left out without a reason": (
        lambda f, e: _with(e, ROUND_2, f.round(2, 20, sites=("north", "riverside"), refused={})), 13, ROUND_2),
    "a site that counts twice": (
        lambda f, e: _with(e, ROUND_2, f.round(2, 20, sites=("north", "north", "riverside"))), 13, ROUND_2),
    "a model exchanged between two rounds": (
        lambda f, e: _with(e, ROUND_2, f.round(2, 20, start=sha("another"))), 14, ROUND_2),
    "an earlier model, of a plan that never goes back": (
        lambda f, e: _with(e, ROUND_2, f.round(2, 20, start=sha256_hex(model_of(0)))), 14, ROUND_2),
    "metrics of a model that was not made": (
        lambda f, e: _with(e, METRICS_2, f.metrics(2, 25, model=sha("another"))), 14, METRICS_2),
    "another model after a resumption": (
        lambda f, e: _with(e, ROUND_2, f.said("resumed", 16), f.roster(17, round=1, model=sha("another")), e[ROUND_2]),
        14, ROUND_2 + 1),
    "a model swapped at the end": (
        lambda f, e: _with(e, END, f.end(31, model=sha256_hex(model_of(7)))), 14, END),
    "a metric that the plan does not release": (
        lambda f, e: _with(e, METRICS_1, f.metrics(1, 15, overall={"AUC": 0.5, "ages": 50.0})), 15, METRICS_1),
    "a final test of one site, with no word of the others": (
        lambda f, e: _with(e, TEST, f.metrics(2, 30, "test", sites=("north",), per_site={})), 15, TEST),
    "no final test": (
        lambda f, e: [*e[:TEST], *e[TEST + 1:]], 15, None),
    "a final test of another model": (
        lambda f, e: _with(e, TEST, f.metrics(1, 30, "test")), 15, None),
    "a site that was selected although its data are not ready": (
        lambda f, e: _with(e, READY, f.readiness("north", 6.5, ("spacing",))), 19, ROSTER),
    "a cohort question that somebody else signed": (
        lambda f, e: _with(e, STARTED, f.question(6, key=f.keys["north"]), e[STARTED]), 20, STARTED),
    "a cohort question that is another": (
        lambda f, e: _with(e, STARTED, f.question(6, entry={"question": sha("another")}), e[STARTED]), 20, STARTED),
    "an answer to a question that nobody asked": (
        lambda f, e: _with(e, STARTED, f.answer("north", f.question(6), 6.1), e[STARTED]), 20, STARTED),
    "an answer signed with another key": (
        lambda f, e: _with(e, STARTED, f.question(6), f.answer("north", f.question(6), 6.1, key=new_key()), e[STARTED]),
        20, STARTED + 1),
    "an answer under another site's certificate": (
        lambda f, e: _with(e, STARTED, f.question(6), f.answer(
            "north", f.question(6), 6.1, entry={"certificate": fingerprint_of(f.certificates["riverside"])}),
            e[STARTED]), 20, STARTED + 1),
    "an answer of another site passed off as this one's": (
        lambda f, e: _with(e, STARTED, f.question(6), f.answer(
            "riverside", f.question(6), 6.1,
            entry={"site": "north", "certificate": fingerprint_of(f.certificates["north"])}), e[STARTED]),
        20, STARTED + 1),
    "an answer to another question": (
        lambda f, e: _with(e, STARTED, f.question(6), f.answer(
            "north", f.question(6), 6.1, question=f.question(6, name="another").question), e[STARTED]),
        20, STARTED + 1),
    "an answer with a cell that was not asked for": (
        lambda f, e: _with(e, STARTED, f.question(6), f.answer(
            "north", f.question(6), 6.1, cells=(Told(table=0, key=("F",), patients=40),)), e[STARTED]),
        20, STARTED + 1),
    "two answers of one site": (
        lambda f, e: _with(e, STARTED, f.question(6), f.answer("north", f.question(6), 6.1),
                           f.answer("north", f.question(6), 6.2, cells=()), e[STARTED]), 20, STARTED + 2),
    "readiness signed with another key": (
        lambda f, e: _with(e, READY, f.readiness("north", key=new_key())), 19, READY),
    "readiness of another plan": (
        lambda f, e: _with(e, READY, f.readiness("north", plan=sha("another"))), 19, READY),
    "readiness for another run": (
        lambda f, e: _with(e, READY, f.readiness("north", run="20260504-other-ab12")), 19, READY),
    "readiness that was said before any run": (
        lambda f, e: _with(e, READY, f.readiness("north", run=None)), 19, READY),
    "readiness of another site passed off as this one's": (
        lambda f, e: _with(e, READY, f.readiness("riverside", entry={"site": "north"})), 19, READY),
    "a site that was selected and never said what its data are": (
        lambda f, e: [*e[:READY], *e[READY + 1:]], 19, ROSTER - 1),
    "readiness before the run began": (
        lambda f, e: [*e[:STARTED], e[READY], e[STARTED], *e[READY + 1:]], 12, STARTED),
    "a site that has ceased to be ready and is still in the roster": (
        lambda f, e: _with(e, ROUND_2, f.said("resumed", 16), f.readiness("north", 16.5, ("consent",)),
                           f.roster(17, round=1, model=sha256_hex(model_of(1))), e[ROUND_2]), 19, ROUND_2 + 2),
    "a site that was not asked again when the run went on": (
        lambda f, e: _with(e, ROUND_2, f.said("resumed", 16), *_ready(f, 16.5)[:2],
                           f.roster(17, round=1, model=sha256_hex(model_of(1))), e[ROUND_2]), 19, ROUND_2 + 3),
    "what a site said earlier, played again after it has ceased to be ready": (
        lambda f, e: _with(e, ROUND_2, f.said("resumed", 16), f.readiness("north", 16.5, ("consent",)),
                           f.readiness("north", 6.5), e[ROUND_2]), 19, ROUND_2 + 2),
    "losses that are not told": (
        lambda f, e: _with(e, ROUND_2, f.round(2, 20, sites=("north", "riverside"))), 17, END),
    "a site that could not take part, not told": (
        lambda f, e: _with(e, ROSTER, f.roster(excluded={"elsewhere": "NO_DATA"})), 17, END),
    "a spoken privacy of a plan that has none": (
        lambda f, e: _with(e, ROUND_2, f.round(2, 20, spent={"north": f.spent("north", 2, "train", 1.0)})),
        16, ROUND_2),
}  # fmt: skip


@pytest.mark.parametrize("what", LIES)
def test_a_coordinator_that_lies_is_found_at_its_entry(open_hand: Federation, what: str) -> None:
    lie, check, entry = LIES[what]
    caught(open_hand.bundle(lie(open_hand, open_hand.history()), name="lie.zip"), check, entry)


MASKED_LIES: dict[str, tuple[Lie, int, int | None]] = {
    "a sum in the clear": (
        lambda f, e: _with(e, ROUND_2, f.round(2, 20, secured=None)), 13, ROUND_2),
    "uploads of others": (
        lambda f, e: _with(e, ROUND_2, f.round(2, 20, secured=f.secured(2, ("north",)))), 13, ROUND_2),
    "a threshold that is too low": (
        lambda f, e: _with(e, ROUND_2, f.round(2, 20, secured=f.secured(2, f.sites, threshold=2))), 13, ROUND_2),
    "keys of more sites than there are": (
        lambda f, e: _with(e, ROUND_2, f.round(2, 20, secured=f.secured(2, f.sites, sites=9, threshold=7))),
        13, ROUND_2),
    "numbers of single sites": (
        lambda f, e: _with(e, METRICS_1, f.metrics(1, 15, per_site={"north": {"AUC": 0.5}})), 15, METRICS_1),
    "a sum of metrics over a single site": (
        lambda f, e: _with(e, METRICS_1, f.metrics(
            1, 15, sites=("north",), refused=dict.fromkeys(("riverside", "st-anne"), "LATE"),
            spent={"north": f.spent("north", 1, "validation", 0.1)})), 15, METRICS_1),
    "a statement that is used again for a round that is made again": (
        lambda f, e: _with(e, ROUND_2, f.said("resumed", 16), f.roster(17), e[ROUND_1].model_copy(
            update={"at": moment(f.at(18)), "attempt": 2}), e[ROUND_2]), 16, ROUND_2 + 2),
    "a site that does not say what it spent": (
        lambda f, e: _with(e, ROUND_2, f.round(2, 20, spent={})), 16, ROUND_2),
    "metrics without what they cost": (
        lambda f, e: _with(e, METRICS_1, f.metrics(1, 15, spent={})), 16, METRICS_1),
    "a forged statement of what was spent": (
        lambda f, e: _with(e, ROUND_2, _spending(f, key=new_key())), 16, ROUND_2),
    "a statement of another round": (
        lambda f, e: _with(e, ROUND_2, _spending(f, round=1)), 16, ROUND_2),
    "a statement of another run": (
        lambda f, e: _with(e, ROUND_2, _spending(f, run="another")), 16, ROUND_2),
    "a statement of another site": (
        lambda f, e: _with(e, ROUND_2, _spending(f, site="st-anne")), 16, ROUND_2),
    "a budget that grows back": (
        lambda f, e: _with(e, ROUND_2, _spending(f, epsilon=0.1)), 16, ROUND_2),
    "more than the plan allows": (
        lambda f, e: _with(e, ROUND_2, _spending(f, epsilon=4.1)), 16, ROUND_2),
    "a delta beyond the plan's": (
        lambda f, e: _with(e, ROUND_2, _spending(f, delta=1e-5)), 16, ROUND_2),
    "more than the plan allows for metrics": (
        lambda f, e: _with(e, METRICS_2, f.metrics(2, 25, spent=f.spent_all(2, "validation", 1.5))), 16, METRICS_2),
}  # fmt: skip


def _spending(federation: Federation, **lies: Any) -> RoundEntry:
    """The second round, with a lie in what north has spent."""
    fields = {"epsilon": 1.0, **lies}
    said = federation.spent("north", fields.pop("round", 2), "train", fields.pop("epsilon"), **fields)
    return federation.round(2, 20, spent={**federation.spent_all(2, "train", 1.0), "north": said})


@pytest.mark.parametrize("what", MASKED_LIES)
def test_a_coordinator_that_lies_about_secure_sums_and_privacy_is_found(masked: Federation, what: str) -> None:
    lie, check, entry = MASKED_LIES[what]
    caught(masked.bundle(lie(masked, masked.history()), name="lie.zip"), check, entry)


# --- what is no lie


def _ready(federation: Federation, minutes: float) -> list[ReadinessEntry]:
    """What every site says of its data when a run goes on."""
    return [federation.readiness(site, minutes) for site in federation.sites]


TRUTHS: dict[str, Lie] = {
    "cohort questions, an answer and a refusal": lambda f, e: _with(
        e, STARTED, f.question(6), f.answer("north", f.question(6), 6.1), f.question(6.2, name="another"),
        f.answer("riverside", f.question(6), 6.3, cells=(), refused="cohort"), e[STARTED]),
    "a site that gave before it took its approval back": lambda f, e: _with(
        _with(_with(e, END, f.end(31, status="completed with losses")), TEST,
              f.metrics(2, 30, "test", sites=f.sites[1:], per_site={}, refused={"north": "NOT_APPROVED"})),
        METRICS_2, f.approval("north", 19, "revoke"),
        f.metrics(2, 25, sites=f.sites[1:], per_site={}, refused={"north": "NOT_APPROVED"})),
    "a round that is told with losses": lambda f, e: _with(
        _with(e, END, f.end(31, status="completed with losses")), ROUND_2, f.round(2, 20, sites=f.sites[:2])),
    "a round written down only after a crash, with the time at which it was committed": lambda f, e: _with(
        e, ROUND_2, SiteEntry(at=moment(f.at(90)), site="riverside", event="renewed",
                              certificate=fingerprint_of(f.certificates["riverside"])),
        e[ROUND_2], f.said("resumed", 91), *_ready(f, 91.5), f.roster(92, round=2, model=sha256_hex(model_of(2))),
        *[entry.model_copy(update={"at": moment(f.at(93))}) for entry in e[METRICS_2:]])[:22],
    "a round lost in a crash and made again": lambda f, e: [
        *e[:METRICS_2], f.said("resumed", 26), *_ready(f, 26.5),
        f.roster(27, round=1, model=sha256_hex(model_of(1))), f.round(2, 28),
        f.metrics(2, 29), f.metrics(2, 30, "test"), f.end(31)],
    "a clock that is corrected": lambda f, e: _with(e, METRICS_1, f.metrics(1, 6)),
    "an end that is written twice": lambda f, e: [*e, f.said("resumed", 40), *_ready(f, 40.5),
        f.roster(41, round=2, model=sha256_hex(model_of(2))), f.metrics(2, 42, "test"), f.end(43)],
    "other runs between": lambda f, e: _with(
        e, ROUND_2, f.round(9, -99, run="another-run", start=sha("x")), e[ROUND_2]),
    "a test without a site that has no case": lambda f, e: _with(
        e, TEST, f.metrics(2, 30, "test", sites=f.sites[1:], per_site={}, refused={"north": "NO_DATA"})),
}  # fmt: skip


@pytest.mark.parametrize("what", TRUTHS)
def test_what_happens_to_honest_people_holds(open_hand: Federation, what: str) -> None:
    path = open_hand.bundle(TRUTHS[what](open_hand, open_hand.history()), name="truth.zip")
    assert failure(path) is None


def test_a_run_may_go_back_to_an_earlier_model_where_its_plan_says_so(tmp_path: Path) -> None:
    federation = Federation(tmp_path, plan(evaluation__rollback=0.1))
    entries = _with(federation.history(), ROUND_2, federation.round(2, 20, start=sha256_hex(model_of(0))))
    assert failure(federation.bundle(entries)) is None


def test_a_run_that_failed_has_no_end_and_holds(open_hand: Federation) -> None:
    path = open_hand.bundle([*open_hand.history()[:ROUND_2], open_hand.said("failed", 20)], name="failed.zip")
    verdict = verify(path)
    assert verdict.holds
    assert "no end" in verdict.results[16].told
    with_model = {"model_safetensors": model_of(1)}
    path = open_hand.bundle(open_hand.history()[:ROUND_2], name="failed.zip", **with_model)
    assert "a failure is shown as a success" in caught(path, 18, None).means


# --- what lies beside the log


def _another(federation: Federation) -> bytes:
    return secured(name="another").canonical()


PAPERS: dict[str, tuple[Callable[[Federation], dict[str, bytes | None]], int]] = {
    "a plan that was exchanged": (lambda f: {"plan_json": plan(name="another").canonical()}, 3),
    "a proposal by another key": (
        lambda f: {"proposal_json": f.proposal.replace(b'"signature":"', b'"signature":"AAAA')}, 3),
    "a model that was exchanged": (lambda f: {"model_safetensors": model_of(9)}, 18),
    "a card of another model": (lambda f: {"model_card_md": b"# A card\n"}, 18),
    "another final test in run.json": (
        lambda f: {"run_json": b'{"status":"completed","round":2,"sites":["north","riverside","st-anne"],'
                               b'"test":{"overall":{"AUC":0.99,"accuracy":0.9}}}'}, 18),
    "a run.json that cannot be read": (lambda f: {"run_json": b"[]"}, 18),
    "a statement that cannot be read": (lambda f: {"statement_json": b"{}"}, 18),
    "a log key of another authority": (lambda f: {"log_pem": certificate_pem(f.authority.certificate)}, 2),
    "no certificates": (lambda f: {"certificates_pem": b"nothing"}, 2),
    "a certificate that is none of a site's": (
        lambda f: {"certificates_pem": certificate_pem(f.log_certificate)}, 2),
}  # fmt: skip


@pytest.mark.parametrize("what", PAPERS)
def test_an_exchanged_file_is_found(open_hand: Federation, what: str) -> None:
    members, check = PAPERS[what]
    caught(open_hand.bundle(name="papers.zip", **members(open_hand)), check, None)


STATEMENTS: dict[str, dict[str, Any]] = {
    "of another model": {"of": sha("another")},
    "of another run": {"run": "another"},
    "of another plan": {"plan": sha("another")},
    "of another round": {"round": 1},
    "of another status": {"status": "completed with losses"},
    "of other sites": {"roster": ("north", "riverside")},
    "of other epsilons": {"epsilon": {"north": {"epsilon": 1.0, "delta": 1e-6}}},
    "by another key": {"key": ed25519.Ed25519PrivateKey.generate()},
}


@pytest.mark.parametrize("what", STATEMENTS)
def test_a_statement_that_the_log_does_not_bear_out_is_found(open_hand: Federation, what: str) -> None:
    entries = open_hand.history()
    notes = open_hand.checkpoints(map(written, entries))
    statement = open_hand.statement(entries, notes, **dict(STATEMENTS[what]))
    caught(open_hand.bundle(name="statement.zip", statement_json=statement), 18, None)


def test_a_statement_whose_checkpoint_is_older_than_the_end_is_found(open_hand: Federation) -> None:
    entries = open_hand.history()
    notes = open_hand.checkpoints(map(written, entries))
    statement = open_hand.statement(entries, notes[:END])
    caught(open_hand.bundle(name="statement.zip", statement_json=statement), 18, None)


def test_a_statement_on_another_history_of_the_log_is_found(open_hand: Federation) -> None:
    entries = open_hand.history()
    fork = open_hand.checkpoints(map(written, _with(entries, STARTED, open_hand.said("started", 6.5))))
    path = open_hand.bundle(name="fork.zip", statement_json=open_hand.statement(entries, fork))
    assert "none of this log's" in caught(path, 18, None).told


def test_a_statement_with_a_smaller_delta_is_found(masked: Federation) -> None:
    entries = masked.history()
    loss = {site: {"epsilon": 1.0, "delta": 1e-12} for site in masked.sites}
    statement = masked.statement(entries, masked.checkpoints(map(written, entries)), epsilon=loss)
    assert "delta" in caught(masked.bundle(name="delta.zip", statement_json=statement), 18, None).told


# --- the federation


def test_a_bundle_of_another_federation_is_told(tmp_path: Path, open_hand: Federation, true: Path) -> None:
    found = caught(true, 2, None, authority=sha("another"))
    assert "another federation" in found.means
    assert open_hand.fingerprint in found.told
    stranger = Federation(tmp_path, open_hand.plan)
    mixed = open_hand.bundle(name="mixed.zip", entries_jsonl=b"".join(
        leaf + b"\n" for leaf in leaves_of(stranger.bundle())))  # fmt: skip
    caught(mixed, 4, 0)


def test_who_pins_nothing_is_told_what_to_compare(true: Path, open_hand: Federation) -> None:
    verdict = verify(true)
    assert (verdict.pinned, verdict.authority) == (False, open_hand.fingerprint)
    assert verify(true, authority=open_hand.fingerprint).pinned


def test_a_site_with_a_new_key_must_approve_again(tmp_path: Path) -> None:
    federation = Federation(tmp_path, plan())
    key = new_key()
    certificate = federation.authority.issue_site("north", key.public_key(), now=federation.at(5))
    again = SiteEntry(
        at=moment(federation.at(5.5)), site="north", event="enrolled", certificate=fingerprint_of(certificate)
    )
    entries = _with(federation.history(), 7, federation.history()[7], again)
    entries[READY + 1] = federation.readiness("north", key=key)
    pems = b"".join(map(certificate_pem, [*federation.certificates.values(), certificate]))
    found = caught(federation.bundle(entries, certificates_pem=pems), 11, ROUND_1 + 1)
    assert "an earlier key only" in found.told
    anew = federation.approval("north", 5.7, key=key, certificate=fingerprint_of(certificate))
    entries.insert(9, anew)
    assert failure(federation.bundle(entries, certificates_pem=pems)) is None


def test_an_approval_under_an_expired_certificate_counts_for_nothing(tmp_path: Path) -> None:
    federation = Federation(tmp_path, plan(), days=1)
    entries, days = federation.history(), 2 * 24 * 60
    late = [entry.model_copy(update={"at": moment(federation.at(days))}) for entry in entries[NORTH:]]
    path = federation.bundle([*entries[:NORTH], *late])
    assert failure(path) is None  # one that was signed in time, and written down late, counts
    path = federation.bundle([*entries[:NORTH], federation.approval("north", days), *late[1:]])
    assert "had expired" in caught(path, 10, NORTH).told


def test_a_plan_of_an_earlier_version_is_read_and_its_digest_stays(tmp_path: Path) -> None:
    federation = Federation(tmp_path, plan(), older=("deterministic", "admission", "contract.consent"))
    assert federation.digest != federation.plan.digest
    verdict = verify(federation.bundle())
    assert verdict.holds, verdict.first
    assert verdict.plan == federation.digest
    assert verdict.results[18].told == "the version that ran did not ask for it"


def test_a_plan_of_a_later_version_is_told(open_hand: Federation, tmp_path: Path) -> None:
    content = canonical_json({**json.loads(open_hand.content), "zeal": 1})
    proposal = Proposal(digest=sha256_hex(content), plan=json.loads(content), proposed_at=0.0, by="somebody")
    envelope = seal_proposal(proposal, open_hand.log_key)
    path = open_hand.bundle(name="later.zip", proposal_json=envelope, plan_json=content)
    found = caught(meddled(path, lambda _: None, plan=sha256_hex(content)), 3, None)
    assert "verify it with the version that ran" in found.means


# --- what is no bundle


def test_what_is_no_bundle_is_one_clear_message(tmp_path: Path, true: Path) -> None:
    def message(path: Path) -> str:
        found = failure(path)
        assert found is not None
        assert found.check == 1
        return found.told

    nothing = tmp_path / "nothing.zip"
    assert "cannot be read" in message(nothing)
    nothing.write_bytes(b"")
    assert "not a whole zip" in message(nothing)
    nothing.write_bytes(true.read_bytes()[:-100])
    assert "not a whole zip" in message(nothing)
    assert "not a whole zip" in message(Path(__file__))


def _zip(path: Path, members: list[tuple[str, bytes]]) -> Path:
    import warnings

    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, content in members:
            archive.writestr(name, content)
    return path


def _unchanged(true: Path) -> list[tuple[str, bytes]]:
    with zipfile.ZipFile(true) as archive:
        return [(name, archive.read(name)) for name in archive.namelist()]


def test_members_that_are_unknown_twice_or_missing_are_told(tmp_path: Path, true: Path) -> None:
    members = _unchanged(true)
    again = _zip(tmp_path / "a.zip", members)
    assert verify(again).holds
    for changed, words in (
        ([*members, ("entries.jsonl", b"")], "has entries.jsonl twice"),
        ([*members, ("../../evil", b"")], "a member that no bundle has: ../../evil"),
        ([member for member in members if member[0] != "proposal.json"], "has no proposal.json"),
        ([member for member in members if member[0] != "run.json"], "lists other members than there are"),
        ([*members, *[(f"{number}", b"") for number in range(80)]], "is no bundle: it has 92 members"),
        ([(name, b"{}" if name == "manifest.json" else content) for name, content in members], "manifest"),
    ):
        found = caught(_zip(tmp_path / "b.zip", changed), 1, None)
        assert words in found.told, found


def test_a_member_that_is_not_what_the_manifest_says_is_told(tmp_path: Path, true: Path) -> None:
    members = dict(_unchanged(true))
    longer = {**members, "model.safetensors": members["model.safetensors"] + b"1"}
    assert "is longer than the manifest says" in caught(_zip(tmp_path / "a.zip", list(longer.items())), 18, None).told
    other = {**members, "model_card.md": members["model_card.md"][:-1] + b"!"}
    assert "is not what the manifest says" in caught(_zip(tmp_path / "b.zip", list(other.items())), 18, None).told


def test_a_zip_bomb_is_not_unpacked(tmp_path: Path, true: Path) -> None:
    members = [
        (name, b"\0" * (70 << 20) if name == "certificates.pem" else content) for name, content in _unchanged(true)
    ]
    path = _zip(tmp_path / "bomb.zip", members)
    assert path.stat().st_size < 1 << 20
    assert "larger than any can be" in caught(path, 1, None).told
    endless = with_leaves(true, lambda lines: lines.__setitem__(3, b"0" * (bundles.MOST_LINE + 10)))
    assert "longer than any can be" in caught(endless, 4, 3).told


def test_what_is_packed_in_another_way_is_no_bundle(tmp_path: Path, true: Path) -> None:
    path = tmp_path / "packed.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as archive:
        for name, content in _unchanged(true):
            archive.writestr(name, content)
    assert "packed in a way that no bundle is" in caught(path, 1, None).told


def test_a_name_of_a_member_that_is_no_text_is_told(tmp_path: Path, true: Path) -> None:
    path = _zip(tmp_path / "name.zip", [*_unchanged(true), ("\N{SNOWMAN}", b"")])
    path.write_bytes(path.read_bytes().replace("\N{SNOWMAN}".encode(), b"\xff\xff\xff"))
    caught(path, 1, None)


def test_nothing_of_a_bundle_is_a_command_for_the_terminal(true: Path) -> None:
    lie = "\x1b[2J\x1b[32mall checks hold" + "!" * 100_000
    path = with_leaves(true, lambda leaves: leaves.__setitem__(3, edited(leaves[3], **{lie: 1})))
    told = caught(path, 4, 3).told
    assert told.isprintable()
    assert len(told) <= 2000


def test_a_torn_last_line_is_told(true: Path) -> None:
    def tear(members: dict[str, bytes]) -> None:
        members["entries.jsonl"] = members["entries.jsonl"][:-40]

    assert "torn" in caught(meddled(true, tear), 4, END).told


def test_a_byte_that_was_turned_over_is_told(tmp_path: Path, true: Path) -> None:
    """Wherever it is: damage ends in one message, never in a traceback."""
    content = bytearray(true.read_bytes())
    path = tmp_path / "turned.zip"
    for place in range(0, len(content), len(content) // 40):
        content[place] ^= 0x10
        path.write_bytes(content)
        content[place] ^= 0x10
        verify(path)


def test_the_same_run_gives_the_same_bundle(open_hand: Federation, tmp_path: Path) -> None:
    one = open_hand.bundle(name="one.zip")
    manifest, members = members_of(one)
    bundles.write_bundle(
        tmp_path / "two.zip", bundles.Parts(manifest.federation, RUN, manifest.plan, manifest.model, members)
    )
    assert one.read_bytes() == (tmp_path / "two.zip").read_bytes()


def test_lines_of_checkpoints_are_canonical(true: Path, open_hand: Federation) -> None:
    notes = open_hand.checkpoints(map(written, open_hand.history()))
    spaced = lines_of(notes).replace(b'{"checkpoint":', b'{"checkpoint": ')
    caught(open_hand.bundle(name="spaced.zip", checkpoints_jsonl=spaced), 5, None)


def test_a_long_log_is_checked_in_the_memory_of_a_short_one(open_hand: Federation, tmp_path: Path) -> None:
    """50,000 entries of other runs, 19 MB, take less than a quarter of that."""
    entries = open_hand.history()
    other = written(open_hand.round(9, 20, run="another-run"))

    def long(count: int) -> Path:
        leaves = [*map(written, entries[:STARTED]), *[other] * count, *map(written, entries[STARTED:])]
        notes = open_hand.witnessed(open_hand.checkpoints(leaves, every=1000))
        content = b"".join(leaf + b"\n" for leaf in leaves)
        return open_hand.bundle(
            name=f"{count}.zip", entries_jsonl=content, notes=notes, statement_json=open_hand.statement(entries, notes)
        )

    code = (
        "import re, sys\nfrom pathlib import Path\nfrom locum.common.audit.verify import verify\n"
        "assert verify(Path(sys.argv[1])).first is None, verify(Path(sys.argv[1])).first\n"
        "print(re.search(r'VmHWM:\\s+(\\d+) kB', Path('/proc/self/status').read_text())[1])"
    )
    short, longer = (
        int(subprocess.run([sys.executable, "-c", code, str(long(count))], capture_output=True, check=True).stdout)
        for count in (100, 50_000)
    )
    assert longer - short < 5 << 10  # in KiB
