from __future__ import annotations

import os
import resource
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from locum.common.blobs import CHUNK, Blob
from locum.common.errors import Code, SiteFailure
from locum.common.secagg.model import name_of, seal_bytes
from locum.site_client.blobs import DISK_RESERVE, BlobClient, Sealed, Stopping
from tests.server.blob_wire import (
    RUN,
    Coordinator,
    blob_of,
    channel,
    client,
    free_port,
    line,
    open_run,
    put_down,
    serve,
    wait_for,
)

LARGE = os.urandom(64 << 20)
SMALL = os.urandom(5 * CHUNK + 99)


@pytest.fixture
def coordinator(tmp_path: Path) -> Iterator[Coordinator]:
    open_run(tmp_path / "spool")
    with serve(tmp_path / "spool") as served:
        yield served


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("site")


@pytest.fixture(scope="module")
def shared(folder: Path) -> Iterator[Coordinator]:
    open_run(folder / "spool")
    (folder / "update").write_bytes(SMALL)
    put_down(folder / "spool", SMALL)
    with serve(folder / "spool") as served:
        yield served


# --- what arrives


def test_an_upload_arrives_to_the_byte_and_tells_how_far_it_is(coordinator: Coordinator, tmp_path: Path) -> None:
    (tmp_path / "update").write_bytes(SMALL)
    blob, told = blob_of(SMALL), []
    with client(coordinator.port) as blobs:
        found = blobs.upload(RUN, tmp_path / "update", progress=lambda done, total: told.append((done, total)))
        assert found == blob
        assert blobs.upload(RUN, tmp_path / "update", digest=blob.sha256) == blob
    assert coordinator.uploads() == {blob.sha256: SMALL}
    assert told == sorted(told)
    assert told[0] == (0, blob.size)
    assert told[-1] == (blob.size, blob.size)


def test_a_download_arrives_to_the_byte_and_what_is_there_is_not_fetched_again(
    coordinator: Coordinator, tmp_path: Path
) -> None:
    blob, told = put_down(coordinator.path, SMALL), []
    with line(coordinator.port) as counted, client(counted.port) as blobs:
        blobs.download(RUN, blob, tmp_path / "model", progress=lambda *done: told.append(done))
        passed = counted.passed
        blobs.download(RUN, blob, tmp_path / "model")
        assert counted.passed == passed
    assert {path.name for path in tmp_path.iterdir()} == {"spool", "model"}
    assert (tmp_path / "model").read_bytes() == SMALL
    assert told[-1] == (blob.size, blob.size)


@pytest.mark.parametrize("there", [SMALL[:CHUNK], b"", SMALL[:-1], SMALL, SMALL + b"more", b"damaged" * 9999])
def test_a_download_goes_on_from_whatever_is_there(coordinator: Coordinator, tmp_path: Path, there: bytes) -> None:
    blob = put_down(coordinator.path, SMALL)
    (tmp_path / "model.part").write_bytes(there)
    with client(coordinator.port) as blobs:
        blobs.download(RUN, blob, tmp_path / "model")
    assert (tmp_path / "model").read_bytes() == SMALL


@pytest.mark.parametrize("there", [0, 1, CHUNK, CHUNK + 7, len(SMALL) - 1, len(SMALL)])
def test_a_sealed_model_is_decrypted_as_it_arrives_from_whatever_byte_is_missing(
    coordinator: Coordinator, tmp_path: Path, there: int
) -> None:
    key = bytes(range(32))
    name = name_of(key)
    (coordinator.path / RUN / "down" / name).write_bytes(seal_bytes(SMALL, key))
    (tmp_path / "model.part").write_bytes(SMALL[:there])
    with client(coordinator.port) as blobs:
        blobs.download(RUN, blob_of(SMALL), tmp_path / "model", sealed=Sealed(name, key))
    assert (tmp_path / "model").read_bytes() == SMALL


def test_a_sealed_model_that_is_not_the_signed_one_is_not_kept(coordinator: Coordinator, tmp_path: Path) -> None:
    key = bytes(range(32))
    changed = bytearray(seal_bytes(SMALL, key))
    changed[len(changed) // 2] ^= 1
    (coordinator.path / RUN / "down" / name_of(key)).write_bytes(changed)
    with client(coordinator.port) as blobs, pytest.raises(SiteFailure, match="digest") as refused:
        blobs.download(RUN, blob_of(SMALL), tmp_path / "model", sealed=Sealed(name_of(key), key))
    assert refused.value.code is Code.MESSAGE_UNREADABLE
    assert not (tmp_path / "model").exists()


def test_a_damaged_file_is_not_taken_for_the_blob(coordinator: Coordinator, tmp_path: Path) -> None:
    blob = put_down(coordinator.path, SMALL)
    (tmp_path / "model").write_bytes(SMALL[:-1] + bytes([SMALL[-1] ^ 1]))
    with client(coordinator.port) as blobs:
        blobs.download(RUN, blob, tmp_path / "model")
    assert (tmp_path / "model").read_bytes() == SMALL


# --- cuts


def test_an_upload_over_a_line_that_breaks_sends_no_byte_much_more_than_once(
    coordinator: Coordinator, tmp_path: Path
) -> None:
    (tmp_path / "update").write_bytes(LARGE)
    with line(coordinator.port, [9 << 20, 40 << 20]) as bad, client(bad.port) as blobs:
        blob = blobs.upload(RUN, tmp_path / "update")
        assert bad.cuts == []
        assert bad.passed < 1.1 * blob.size
    assert coordinator.uploads() == {blob.sha256: LARGE}


def test_a_download_over_a_line_that_breaks_fetches_no_byte_much_more_than_once(
    coordinator: Coordinator, tmp_path: Path
) -> None:
    blob = put_down(coordinator.path, LARGE)
    with line(coordinator.port, [9 << 20, 40 << 20]) as bad, client(bad.port) as blobs:
        blobs.download(RUN, blob, tmp_path / "model")
        assert bad.cuts == []
        assert bad.passed < 1.1 * blob.size
    assert (tmp_path / "model").read_bytes() == LARGE


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(cuts=st.lists(st.integers(0, len(SMALL) + 3000), max_size=3, unique=True).map(sorted), up=st.booleans())
def test_a_blob_arrives_wherever_the_line_is_cut(shared: Coordinator, folder: Path, cuts: list[int], up: bool) -> None:
    blob = blob_of(SMALL)
    shutil.rmtree(shared.path / RUN / "up", ignore_errors=True)
    (folder / "model").unlink(missing_ok=True)
    with line(shared.port, cuts) as bad, client(bad.port) as blobs:
        if up:
            blobs.upload(RUN, folder / "update", digest=blob.sha256)
            assert shared.uploads() == {blob.sha256: SMALL}
        else:
            blobs.download(RUN, blob, folder / "model")
            assert (folder / "model").read_bytes() == SMALL


def test_a_coordinator_that_comes_late_is_waited_for(tmp_path: Path) -> None:
    open_run(tmp_path / "spool")
    (tmp_path / "update").write_bytes(SMALL)
    port, over = free_port(), threading.Event()
    with client(port) as blobs:
        threading.Thread(target=lambda: (blobs.upload(RUN, tmp_path / "update"), over.set()), daemon=True).start()
        assert not over.wait(0.5)
        with serve(tmp_path / "spool", port=port) as served:
            assert over.wait(20)
            assert list(served.uploads()) == [blob_of(SMALL).sha256]


# --- ends


@pytest.mark.parametrize("away", [True, False])
def test_a_site_that_is_told_to_end_does_not_wait(coordinator: Coordinator, tmp_path: Path, away: bool) -> None:
    (tmp_path / "update").write_bytes(LARGE)
    stop, ended = threading.Event(), threading.Event()
    with line(free_port() if away else coordinator.port) as bad, channel(bad.port) as opened:

        def send() -> None:
            with pytest.raises(Stopping):
                BlobClient.over(opened, stop).upload(RUN, tmp_path / "update")
            ended.set()

        if not away:
            bad.frozen.set()
        threading.Thread(target=send, daemon=True).start()
        assert not ended.wait(0.3)
        stop.set()
        assert ended.wait(5)


def test_a_line_that_hangs_is_given_up_when_the_site_is_told_to_end(coordinator: Coordinator, tmp_path: Path) -> None:
    blob = put_down(coordinator.path, LARGE)
    stop, ended = threading.Event(), threading.Event()
    with line(coordinator.port) as bad, channel(bad.port) as opened:

        def fetch() -> None:
            with pytest.raises(Stopping):
                BlobClient.over(opened, stop).download(RUN, blob, tmp_path / "model")
            ended.set()

        threading.Thread(target=fetch, daemon=True).start()
        wait_for(lambda: bad.passed > 2 << 20)
        bad.forget()
        time.sleep(0.2)
        stop.set()
        assert ended.wait(5)
    assert not (tmp_path / "model").exists()


def test_what_the_coordinator_does_not_have_cannot_be_fetched(coordinator: Coordinator, tmp_path: Path) -> None:
    with client(coordinator.port) as blobs:
        with pytest.raises(SiteFailure, match="does not have") as missing:
            blobs.download(RUN, Blob("0" * 64, 8), tmp_path / "model")
        with pytest.raises(SiteFailure, match="does not go on"):
            blobs.download("ended", Blob("0" * 64, 8), tmp_path / "model")
    assert missing.value.code is Code.MESSAGE_UNREADABLE
    assert not (tmp_path / "model").exists()


def test_a_model_that_is_not_what_its_digest_says_is_not_kept(coordinator: Coordinator, tmp_path: Path) -> None:
    (coordinator.path / RUN / "down" / ("0" * 64)).write_bytes(SMALL)
    with client(coordinator.port) as blobs, pytest.raises(SiteFailure, match="digest") as refused:
        blobs.download(RUN, Blob("0" * 64, len(SMALL)), tmp_path / "model")
    assert refused.value.code is Code.MESSAGE_UNREADABLE
    assert not (tmp_path / "model").exists()


def test_an_update_that_changed_on_its_way_is_refused(coordinator: Coordinator, tmp_path: Path) -> None:
    (tmp_path / "update").write_bytes(SMALL)
    with client(coordinator.port) as blobs, pytest.raises(SiteFailure, match="digest") as refused:
        blobs.upload(RUN, tmp_path / "update", digest="0" * 64)
    assert refused.value.code is Code.UPDATE_REFUSED
    assert coordinator.uploads() == {}


def test_a_full_disk_at_the_site_is_told_and_leaves_nothing(coordinator: Coordinator, tmp_path: Path) -> None:
    blob = put_down(coordinator.path, SMALL)
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 * CHUNK, hard))
    try:
        with client(coordinator.port) as blobs, pytest.raises(SiteFailure) as full:
            blobs.download(RUN, blob, tmp_path / "model")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert full.value.code is Code.DISK_FULL
    assert [path.name for path in tmp_path.iterdir()] == ["spool"]


def test_a_model_that_would_fill_the_disk_is_not_begun(coordinator: Coordinator, tmp_path: Path) -> None:
    size = shutil.disk_usage(tmp_path).free - DISK_RESERVE + (64 << 20)
    with line(coordinator.port) as counted, client(counted.port) as blobs:
        with pytest.raises(SiteFailure, match="are to stay so") as full:
            blobs.download(RUN, Blob("0" * 64, size), tmp_path / "model")
        assert counted.passed == 0
    assert full.value.code is Code.DISK_FULL
    assert not (tmp_path / "model").exists()


def test_an_upload_is_asked_for_before_each_attempt_and_ends_when_it_may_not_go_on(
    coordinator: Coordinator, tmp_path: Path
) -> None:
    (tmp_path / "update").write_bytes(LARGE)
    asked: list[int] = []

    def permit() -> None:
        asked.append(1)
        if len(asked) > 1:
            raise SiteFailure(Code.NOT_APPROVED)

    with line(coordinator.port, [9 << 20]) as bad, client(bad.port) as blobs:
        with pytest.raises(SiteFailure) as ended:
            blobs.upload(RUN, tmp_path / "update", permit=permit)
        assert bad.passed < 12 << 20
    assert ended.value.code is Code.NOT_APPROVED


def test_an_update_that_is_gone_is_said_at_once(coordinator: Coordinator, tmp_path: Path) -> None:
    with client(coordinator.port) as blobs, pytest.raises(FileNotFoundError):
        blobs.upload(RUN, tmp_path / "update")
