"""The site's keys: a ring that is whole at any moment, renewed, shared out and restored."""

from __future__ import annotations

import itertools
import json
import os
import signal
import stat
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from locum.common.errors import DataError
from locum.site_client.cli import app
from locum.site_client.imaging.catalog import Catalog
from locum.site_client.imaging.escrow import KeyShare, read_share, restored, shares_of, write_shares
from locum.site_client.imaging.ingest import ingest
from locum.site_client.imaging.keys import (
    KEY_BYTES,
    KeyRing,
    Keys,
    create_ring,
    load_or_create_keys,
    load_ring,
    replace_ring,
)
from locum.site_client.imaging.sources import load_site

RING = KeyRing(b"f" * 32, (b"a" * 32, b"b" * 32), ("2026-01-01T00:00:00Z", "2026-02-01T00:00:00Z"))


def test_a_key_file_of_before_is_a_ring_of_one(tmp_path):
    (tmp_path / "old.key").write_bytes(bytes(range(32)))
    ring = load_ring(tmp_path / "old.key")
    assert ring.keys == load_or_create_keys(tmp_path / "old.key") == Keys.of(bytes(range(32)))


def test_a_new_site_has_a_key_for_names_and_another_for_folds(tmp_path):
    keys = load_or_create_keys(tmp_path / "split.key")
    assert keys.names != keys.folds
    assert load_ring(tmp_path / "split.key").drawn[0].endswith("Z")


def test_renewal_gives_other_names_and_the_same_places():
    before, after = RING.keys, RING.rotated().keys
    assert before.fingerprint != after.fingerprint
    assert before.patient("P1") != after.patient("P1")
    assert before.uid("1.2.3.4.5") != after.uid("1.2.3.4.5")
    assert before.place("P1") == after.place("P1")
    assert RING.rotated().names[:2] == RING.names


def test_a_ring_is_read_as_it_was_written(tmp_path):
    create_ring(tmp_path / "k", RING)
    assert load_ring(tmp_path / "k") == RING
    replace_ring(tmp_path / "k", RING.rotated())
    assert load_ring(tmp_path / "k").names[:2] == RING.names
    assert stat.S_IMODE((tmp_path / "k").stat().st_mode) == 0o600
    assert [path.name for path in tmp_path.iterdir()] == ["k"]


def test_a_key_file_is_never_written_over_by_a_new_one(tmp_path):
    create_ring(tmp_path / "k", RING)
    with pytest.raises(FileExistsError):
        create_ring(tmp_path / "k", KeyRing.new())
    assert load_ring(tmp_path / "k") == RING


_NO_NAMES = {"format": "locum-site-keys", "version": 1, "folds": "00" * 32, "names": []}
_DAMAGED = [
    b"",
    b"{}",
    b"[]",
    b"null",
    b"\xff" * 31,
    b'{"format": "locum-site-keys", "version": 2}',
    RING.to_bytes()[:-40],
    RING.to_bytes().replace(b"6161", b"61", 1),
    json.dumps(_NO_NAMES).encode(),
]


@pytest.mark.parametrize("content", _DAMAGED)
def test_a_damaged_key_file_is_an_error_and_stays(tmp_path, content):
    (tmp_path / "k").write_bytes(content)
    with pytest.raises(DataError, match="no key"):
        load_or_create_keys(tmp_path / "k")
    assert (tmp_path / "k").read_bytes() == content


_ROTATE_FOR_EVER = """
import sys
from pathlib import Path
from locum.site_client.imaging.keys import load_ring, replace_ring, KeyRing
path = Path(sys.argv[1])
print("ready", flush=True)
while True:
    ring = load_ring(path)
    replace_ring(path, KeyRing(ring.folds, ring.names[-3:], ring.drawn[-3:]).rotated())
"""


def test_a_renewal_that_is_killed_leaves_a_whole_key_file(tmp_path):
    path = tmp_path / "k"
    create_ring(path, RING)
    for pause in (0.0, 0.01, 0.02, 0.03, 0.05):
        with subprocess.Popen([sys.executable, "-c", _ROTATE_FOR_EVER, path], stdout=subprocess.PIPE) as child:
            assert child.stdout.readline() == b"ready\n"
            time.sleep(pause)
            child.send_signal(signal.SIGKILL)
        ring = load_ring(path)
        assert ring.folds == RING.folds
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    replace_ring(path, RING)
    assert [left.name for left in tmp_path.iterdir()] == ["k"]


# --- shares


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 6), st.integers(0, 3), st.data())
def test_any_so_many_shares_restore_the_ring(needed, more, data):
    shares = shares_of(RING, needed, needed + more)
    chosen = data.draw(st.permutations(shares))[:needed]
    assert restored(chosen) == RING


def test_fewer_shares_restore_nothing_and_say_how_many_are_needed():
    shares = shares_of(RING, 3, 5)
    for few in itertools.combinations(shares, 2):
        with pytest.raises(DataError, match="too few") as raised:
            restored(few)
        assert "3 of 5" in raised.value.remedy
    with pytest.raises(DataError, match="too few"):
        restored([shares[0], shares[0], shares[0]])


def test_shares_of_two_escrows_are_not_mixed_into_a_wrong_key():
    one, other = shares_of(RING, 2, 3), shares_of(RING, 2, 3)
    with pytest.raises(DataError, match="do not make the key"):
        restored([one[0], other[1]])
    with pytest.raises(DataError, match="not of one key"):
        restored([one[0], shares_of(KeyRing.new(), 2, 3)[1]])


def test_a_misread_share_is_named(tmp_path):
    path, *_ = write_shares(shares_of(RING, 2, 3), tmp_path)
    assert read_share(path).ring == RING.fingerprint
    document = json.loads(path.read_text())
    digit = "0" if document["folds"][5] != "0" else "1"
    document["folds"] = document["folds"][:5] + digit + document["folds"][6:]
    path.write_text(json.dumps(document))
    with pytest.raises(DataError, match="checksum"):
        read_share(path)
    path.write_text("{")
    with pytest.raises(DataError, match="no share"):
        read_share(path)


def test_share_files_are_for_their_owner_only(tmp_path):
    for path in write_shares(shares_of(RING, 2, 3), tmp_path):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert RING.folds.hex() not in path.read_text()
        assert isinstance(read_share(path), KeyShare)


@pytest.mark.parametrize(("needed", "holders"), [(1, 3), (4, 3), (2, 100), (0, 0)])
def test_impossible_shares_are_refused(needed, holders):
    with pytest.raises(DataError, match="cannot be"):
        shares_of(RING, needed, holders)


# --- commands


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["key", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def test_a_lost_key_comes_back_from_two_of_three_holders(tmp_path):
    keys = load_or_create_keys(tmp_path / "store" / "split.key")
    told = json.loads(run("escrow", "--store", tmp_path / "store", "--into", tmp_path / "shares", "--json"))
    os.unlink(tmp_path / "store" / "split.key")  # noqa: PTH108
    run("restore", told["files"][2], told["files"][0], "--store", tmp_path / "store")
    assert load_or_create_keys(tmp_path / "store" / "split.key") == keys


def test_restoring_never_writes_over_a_key(tmp_path):
    load_or_create_keys(tmp_path / "k")
    told = json.loads(run("escrow", "--key-file", tmp_path / "k", "--into", tmp_path / "s", "--json"))
    with pytest.raises(DataError, match="there already"):
        run("restore", *told["files"], "--key-file", tmp_path / "k")


def test_renewal_says_what_follows_and_no_command_prints_a_key(tmp_path):
    keys = load_or_create_keys(tmp_path / "k")
    out = run("rotate", "--key-file", tmp_path / "k", "--yes") + run("show", "--key-file", tmp_path / "k")
    renewed = load_or_create_keys(tmp_path / "k")
    assert "locum site ingest site.yaml --store NEW-STORE --key-file" in out
    assert renewed.fingerprint in out
    assert keys.fingerprint in out
    for key in (keys.names, keys.folds, renewed.names):
        assert key.hex() not in out
    assert (renewed.folds, len(renewed.names)) == (keys.folds, KEY_BYTES)


def test_a_key_that_is_not_there_is_not_drawn_by_showing_it(tmp_path):
    with pytest.raises(DataError, match="no key file"):
        run("show", "--key-file", tmp_path / "k")
    assert not (tmp_path / "k").exists()


# --- what follows a renewal


def test_after_a_renewal_a_new_store_has_other_names_and_the_same_folds(hospital, series, tmp_path):
    for number in range(1, 13):
        hospital.write(series(number, patient=f"P{number}", slices=3, shape=(4 + number, 7)))
    site = load_site(hospital.site())
    before = load_or_create_keys(tmp_path / "site.key")
    ingest(site, tmp_path / "old", keys=before)
    run("rotate", "--key-file", tmp_path / "site.key", "--yes")
    after = load_or_create_keys(tmp_path / "site.key")
    with pytest.raises(DataError, match="made with another key"):
        ingest(site, tmp_path / "old", keys=after)
    ingest(site, tmp_path / "new", keys=after)
    old, new = (_folds(tmp_path / name) for name in ("old", "new"))
    assert {shape: fold for shape, (_, fold) in old.items()} == {shape: fold for shape, (_, fold) in new.items()}
    assert {patient for patient, _ in old.values()}.isdisjoint(patient for patient, _ in new.values())
    assert len({fold for _, fold in new.values()}) > 1


def _folds(store: Path) -> dict[tuple[int, ...], tuple[str, str]]:
    """By the shape of an image, its patient's pseudonym and fold."""
    with closing(Catalog.open(store)) as catalog:
        facts = {fact.id: fact.shape for fact in catalog.facts()}
        return {facts[case.id]: (case.patient, case.fold) for case in catalog.cases((0.5, 0.25, 0.25))}


@pytest.mark.parametrize("uid", ["1.2.840.10008.1948.905.4711", "1.2.840.10008.5.1.4.1.1.2.2019.923"])
def test_a_uid_that_somebody_made_up_below_the_standards_root_is_keyed(uid):
    keys = KeyRing.new().keys
    assert keys.uid(uid).startswith("2.25.")
    assert keys.uid("1.2.840.10008.5.1.4.1.1.2") == "1.2.840.10008.5.1.4.1.1.2"


def test_no_key_is_shown_when_keys_are_printed():
    ring = KeyRing.new()
    for key in (ring.folds, *ring.names):
        assert repr(key)[2:-1] not in repr(ring) + repr(ring.keys)


def test_a_folder_that_is_made_for_a_key_is_its_owners(tmp_path):
    load_or_create_keys(tmp_path / "store" / "split.key")
    assert (tmp_path / "store").stat().st_mode & 0o077 == 0
