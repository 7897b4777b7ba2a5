from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from locum.common.blobs import Blob
from locum.common.errors import Code, SiteFailure
from locum.common.messages import BLOB_THRESHOLD, MessageError
from locum.common.secagg.model import name_of, seal_bytes
from locum.common.tensor_files import Mapped, map_tensors, write_tensors
from locum.site_client.blobs import Permit, Progress, Sealed
from locum.site_client.carrier import SiteCarrier

SMALL = {"w": np.arange(8, dtype=np.float32)}
LARGE = {"w": np.arange(BLOB_THRESHOLD, dtype=np.float32)}


class Store:
    """Blobs in a folder: the other end of a connection."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.fetched = folder, 0
        folder.mkdir()

    def upload(
        self, run: str, path: Path, *, digest: str, progress: Progress | None = None, permit: Permit | None = None
    ) -> None:
        if permit is not None:
            permit()
        (self.folder / digest).write_bytes(path.read_bytes())

    def download(
        self, run: str, blob: Blob, target: Path, *, sealed: Sealed | None = None, progress: Progress | None = None
    ) -> None:
        content = (self.folder / (sealed.name if sealed else blob.sha256)).read_bytes()
        content = seal_bytes(content, sealed.key) if sealed else content
        if not target.exists() or target.read_bytes() != content:
            self.fetched += 1
            target.write_bytes(content)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def carrier(store: Store, tmp_path: Path) -> SiteCarrier:
    return SiteCarrier(store, "run", tmp_path / "work", lambda *_: None, lambda: None)


def _offered(store: Store, tensors: dict[str, Any]) -> dict[str, Any]:
    content = save(tensors)
    digest = hashlib.sha256(content).hexdigest()
    (store.folder / digest).write_bytes(content)
    return {"sha256": digest, "size": len(content)}


def test_small_tensors_travel_inside_the_message_and_large_ones_beside_it(carrier: SiteCarrier, store: Store) -> None:
    assert set(carrier.stow(SMALL)) == {"tensors"}
    fields = carrier.stow(LARGE)
    assert set(fields) == {"sha256", "size"}
    assert list(store.folder.iterdir()) == []
    carrier.deliver(fields)
    assert (store.folder / fields["sha256"]).read_bytes() == save(LARGE)


def test_an_update_that_is_a_file_already_is_moved_and_not_copied(carrier: SiteCarrier, tmp_path: Path) -> None:
    path = tmp_path / "update"
    mapped = map_tensors(path, write_tensors(path, LARGE).sha256)
    inode = path.stat().st_ino
    fields = carrier.stow(mapped)
    assert not path.exists()
    assert (tmp_path / "work" / "up" / fields["sha256"]).stat().st_ino == inode


def test_the_same_model_is_fetched_once_and_another_one_takes_its_place(
    carrier: SiteCarrier, store: Store, tmp_path: Path
) -> None:
    first = _offered(store, LARGE)
    for _ in range(2):
        found = carrier.fetch(first)
        assert isinstance(found, Mapped)
        assert np.array_equal(found["w"], LARGE["w"])
    assert store.fetched == 1
    second = _offered(store, {"w": LARGE["w"] + 1})
    carrier.fetch(second)
    assert [path.name for path in (tmp_path / "work" / "down").iterdir()] == [second["sha256"]]


def test_a_model_that_was_damaged_in_a_power_cut_is_fetched_once_more(
    carrier: SiteCarrier, store: Store, tmp_path: Path
) -> None:
    fields = _offered(store, LARGE)
    carrier.fetch(fields)
    path = tmp_path / "work" / "down" / fields["sha256"]
    after = replace(carrier, known=set())  # another process
    assert np.array_equal(after.fetch(fields)["w"], LARGE["w"])
    assert store.fetched == 1
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    after = replace(carrier, known=set())
    assert np.array_equal(after.fetch(fields)["w"], LARGE["w"])
    assert store.fetched == 2
    path.unlink()
    assert np.array_equal(after.fetch(fields)["w"], LARGE["w"])


def test_an_update_that_was_damaged_in_a_power_cut_is_not_held(carrier: SiteCarrier, tmp_path: Path) -> None:
    fields = carrier.stow(LARGE)
    assert carrier.holds(fields)
    assert carrier.holds(carrier.stow(SMALL))
    path = tmp_path / "work" / "up" / str(fields["sha256"])
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    assert not carrier.holds(fields)
    path.unlink()
    assert not carrier.holds(fields)


def test_what_may_not_leave_any_more_is_not_sent(carrier: SiteCarrier, store: Store) -> None:
    def forbid() -> None:
        raise SiteFailure(Code.NOT_APPROVED)

    fields = carrier.stow(LARGE)
    with pytest.raises(SiteFailure):
        replace(carrier, permit=forbid).deliver(fields)
    assert list(store.folder.iterdir()) == []


def test_what_was_delivered_is_removed(carrier: SiteCarrier, tmp_path: Path) -> None:
    carrier.deliver(carrier.stow(LARGE))
    carrier.delivered()
    assert list((tmp_path / "work" / "up").iterdir()) == []


@pytest.mark.parametrize(
    "fields",
    [
        {"sha256": "../../etc/passwd", "size": 1},
        {"sha256": "A" * 64, "size": 1},
        {"sha256": "0" * 64},
        {"sha256": "0" * 64, "size": "1"},
        {"sha256": "0" * 64, "size": 1, "more": 1},
        {"tensors": b"", "more": 1},
    ],
)
def test_fields_that_name_no_blob_are_refused(carrier: SiteCarrier, fields: dict[str, Any]) -> None:
    with pytest.raises(MessageError):
        carrier.fetch(fields)


def test_a_blob_that_is_not_tensors_is_refused_and_not_kept(carrier: SiteCarrier, store: Store, tmp_path: Path) -> None:
    digest = hashlib.sha256(b"not tensors").hexdigest()
    (store.folder / digest).write_bytes(b"not tensors")
    with pytest.raises(MessageError):
        carrier.fetch({"sha256": digest, "size": 11})
    assert list((tmp_path / "work" / "down").iterdir()) == []


def test_a_sealed_model_is_the_signed_one_whether_it_came_inside_or_beside_the_message(
    carrier: SiteCarrier, store: Store, tmp_path: Path
) -> None:
    key = bytes(range(32))
    for tensors in (SMALL, LARGE):
        mapped = map_tensors(tmp_path / "model", write_tensors(tmp_path / "model", tensors).sha256)
        fields = {"tensors": seal_bytes(mapped.path.read_bytes(), key)}
        if tensors is LARGE:
            fields = {"sha256": name_of(key), "size": mapped.size}
            (store.folder / name_of(key)).write_bytes(seal_bytes(mapped.path.read_bytes(), key))
        assert np.array_equal(carrier.open(fields, key, mapped.sha256)["w"], tensors["w"])


def test_a_sealed_model_inside_a_message_that_is_not_the_signed_one_is_refused(carrier: SiteCarrier) -> None:
    with pytest.raises(MessageError, match="signed"):
        carrier.open({"tensors": seal_bytes(save(SMALL), bytes(32))}, bytes(32), "0" * 64)
