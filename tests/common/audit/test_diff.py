"""What a coordinator says it got from a site, and what the site says it let go, are held against each other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from locum.common.audit.diff import compare
from locum.common.errors import DataError
from locum.common.identity import new_key
from locum.common.log.entries import Entry, VoidEntry
from tests.audits import NAME, RUN, Federation, sha
from tests.plans import plan, secured

#: Where entries stand in the site's log of two rounds, and in the coordinator's.
DECISION, TOLD, SAID, TRAIN_1, NUMBERS_1, TRAIN_2, NUMBERS_2, NUMBERS_TEST, COSIGNATURE = 1, 2, 3, 4, 5, 6, 7, 8, 9
READY, ROUND_1, METRICS_1, ROUND_2, TEST, LAST = 9, 13, 14, 15, 17, 18


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Federation:
    """A federation whose run sums securely."""
    return Federation(tmp_path_factory.mktemp("federation"), secured())


@pytest.fixture(scope="module")
def true(federation: Federation) -> Path:
    """A true bundle."""
    return federation.bundle(name="true.zip")


def differences(bundle: Path, log: Path) -> list[tuple[int | None, int | None]]:
    """Where the logs differ: the numbers of the entries, the coordinator's first."""
    return [(each.coordinator, each.site) for each in compare(bundle, log).differences]


@pytest.mark.parametrize("of", [plan, secured])
def test_true_logs_agree(of: Callable[[], Any], tmp_path: Path) -> None:
    federation = Federation(tmp_path, of())
    bundle = federation.bundle()
    for site in federation.sites:
        found = compare(bundle, federation.site_log(site))
        assert (found.differences, found.site, found.run, found.signed) == ((), site, RUN, 10)
        assert found.compared == 2 + 3 + 1 + 1 + 1


def _without(entries: list[Entry], number: int) -> list[Entry]:
    return [*entries[:number], *entries[number + 1 :]]


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (DECISION, [(5, None)]),
        (SAID, [(READY, None)]),
        (TRAIN_1, [(ROUND_1, None)]),
        (TRAIN_2, [(ROUND_2, None)]),
        (NUMBERS_1, [(METRICS_1, None)]),
        (NUMBERS_2, [(TEST, None)]),
        (COSIGNATURE, [(LAST, None)]),
    ],
)
def test_what_the_site_did_not_let_go_is_found(
    federation: Federation, true: Path, number: int, expected: list[tuple[int | None, int | None]]
) -> None:
    log = federation.site_log("north", _without(federation.releases("north"), number))
    assert differences(true, log) == expected


def test_another_upload_than_the_one_that_was_signed_is_found(federation: Federation) -> None:
    entries = federation.history()
    uploads = {site: federation.upload(site, 2) for site in federation.sites} | {"north": sha("another")}
    entries[ROUND_2] = federation.round(2, 20, secured=federation.secured(2, federation.sites, uploads=uploads))
    found = compare(federation.bundle(entries, name="other.zip"), federation.site_log("north"))
    # The cosignature under this other log is another, too.
    assert [(each.coordinator, each.site) for each in found.differences] == [(ROUND_2, TRAIN_2), (LAST, None)]


def test_what_the_coordinator_says_nothing_of_is_found(federation: Federation, true: Path) -> None:
    releases = federation.releases("north")
    extra = federation.released("train", 40, run=RUN, round=3, statements=(sha("a third upload"),))
    assert differences(true, federation.site_log("north", [*releases, extra])) == [(None, len(releases))]
    other = federation.released("train", 40, run="another-run", round=3)
    failed = federation.released("train", 40, run=RUN, round=3, code="NO_DATA")
    assert differences(true, federation.site_log("north", [*releases, other, failed])) == []


def test_an_update_that_was_refused_or_void_is_accounted_for(tmp_path: Path) -> None:
    federation = Federation(tmp_path, plan())
    entries, releases = federation.history(), federation.releases("north")
    entries[ROUND_2] = federation.round(2, 20, sites=federation.sites[1:], refused={"north": "NOT_ADMITTED"})
    entries[LAST] = federation.end(31, status="completed with losses")
    assert [at for at in differences(federation.bundle(entries), federation.site_log("north", releases)) if at[1]] == []
    void = VoidEntry(**federation.of_run(18), round=2, attempt=1, fold="train", refused={"st-anne": "LATE"})
    told = [*federation.history()[:ROUND_2], void, federation.said("failed", 19)]
    cut = [*releases[: TRAIN_2 + 1], releases[COSIGNATURE]]
    found = differences(federation.bundle(told, name="failed.zip"), federation.site_log("north", cut))
    assert [at for at in found if at != (len(told) - 1, None)] == []


def test_a_decision_that_the_coordinator_keeps_to_itself_is_found(federation: Federation, true: Path) -> None:
    releases = federation.releases("north")
    revoked = federation.approval("north", 35, "revoke")
    from locum.common.canonical import sha256_hex
    from locum.common.log.entries import DecisionEntry

    said = DecisionEntry(at=revoked.at, plan=federation.digest, statement=revoked.statement)
    sent = federation.released("decision", 35, sha256=sha256_hex(revoked.statement.encode()))
    kept = federation.site_log("north", [*releases, said])
    assert differences(true, kept) == []  # a first steward's, of two: nobody was told
    assert differences(true, federation.site_log("north", [*releases, said, sent])) == [(None, len(releases) + 1)]


# --- the site's log itself


def test_a_log_that_was_changed_after_it_was_signed_is_told(federation: Federation, true: Path) -> None:
    folder = federation.site_log("north")
    path = folder / "entries.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"round":2', b'"round":1', 1))
    with pytest.raises(DataError, match="was changed between entries 0 and 9"):
        compare(true, folder)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-1]))
    with pytest.raises(DataError, match=r"ends at entry 9, and more of it was signed"):
        compare(true, folder)


def test_a_log_that_another_key_signed_is_told(federation: Federation, true: Path) -> None:
    with pytest.raises(DataError, match="is not signed by north"):
        compare(true, federation.site_log("north", key=new_key()))


def test_a_copy_of_the_entries_alone_can_be_compared(federation: Federation, true: Path, tmp_path: Path) -> None:
    copy = tmp_path / "north.jsonl"
    copy.write_bytes((federation.site_log("north") / "entries.jsonl").read_bytes())
    found = compare(true, copy)
    assert (found.differences, found.signed) == ((), 0)
    copy.write_bytes(copy.read_bytes() + b'{"at":"2026')  # what a crash has cut short was never promised
    assert compare(true, copy).differences == ()


def test_what_is_no_log_of_a_site_of_this_federation_is_told(
    federation: Federation, true: Path, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        compare(true, tmp_path / "nothing")
    other = Federation(tmp_path, federation.plan, name="Elsewhere")
    with pytest.raises(DataError, match=f"of the federation Elsewhere, and the bundle of {NAME}"):
        compare(true, other.site_log("north"))
    coordinators = tmp_path / "coordinators.jsonl"
    coordinators.write_bytes(b'{"at":"2026-05-04T08:00:00Z","head":"' + b"0" * 64 + b'","kind":"ledger","rows":1}\n')
    with pytest.raises(DataError, match="is no log of a site: it begins with 'ledger'"):
        compare(true, coordinators)


def test_a_bundle_that_does_not_hold_is_not_compared(federation: Federation, tmp_path: Path) -> None:
    path = tmp_path / "nothing.zip"
    path.write_bytes(b"no zip")
    with pytest.raises(DataError, match="not a whole zip"):
        compare(path, federation.site_log("north"))
