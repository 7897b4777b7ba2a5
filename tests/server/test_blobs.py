from __future__ import annotations

import os
import resource
import shutil
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import grpc
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from locum.common.blobs import CHUNK, SERVICE, Blob
from locum.common.errors import Code, SiteFailure
from locum.common.proto.locum_pb2 import BlobKey, BlobState, GetRequest, PutChunk
from locum.common.proto.locum_pb2_grpc import BlobsStub
from locum.server.gateway.blobs import STREAMS_PER_SITE, BlobService
from locum.server.gateway.peers import site_of
from locum.server.gateway.spool import DISK_RESERVE, Spool
from locum.site_client.blobs import BlobClient
from tests.server.blob_wire import (
    PLAN,
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
    serving_process,
    wait_for,
)
from tests.server.door import Door, open_door, registry_service

CONTENT = os.urandom(3 * CHUNK + 1234)
BLOB = blob_of(CONTENT)


@pytest.fixture
def coordinator(tmp_path: Path) -> Iterator[Coordinator]:
    open_run(tmp_path / "spool")
    with serve(tmp_path / "spool") as served:
        yield served


def _key(blob: Blob = BLOB, **changed: object) -> BlobKey:
    return BlobKey(**({"run": RUN, "sha256": blob.sha256, "size": blob.size} | changed))


def _messages(content: bytes = CONTENT, key: BlobKey | None = None, offset: int = 0) -> Iterator[PutChunk]:
    yield PutChunk(key=key or _key(), offset=offset)
    for start in range(offset, len(content), CHUNK):
        yield PutChunk(data=content[start : start + CHUNK])


def _refused(call: Callable[[], Iterable[object]]) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as caught:
        list(call())
    return caught.value.code(), caught.value.details()


def _put(stub: BlobsStub, messages: Iterator[PutChunk]) -> tuple[grpc.StatusCode, str]:
    return _refused(lambda: [stub.Put(messages)])


# --- what is taken and given


def test_the_service_speaks_plain_protobuf(coordinator: Coordinator) -> None:
    model = put_down(coordinator.path, CONTENT)
    with channel(coordinator.port) as opened:
        stub = BlobsStub(opened)
        assert stub.Stat(_key()) == BlobState(have=0, complete=False)
        assert stub.Put(_messages()) == BlobState(have=len(CONTENT), complete=True)
        assert stub.Stat(_key()) == BlobState(have=len(CONTENT), complete=True)
        assert stub.Put(_messages()) == BlobState(have=len(CONTENT), complete=True)
        assert b"".join(chunk.data for chunk in stub.Get(GetRequest(key=_key(model)))) == CONTENT
        assert b"".join(chunk.data for chunk in stub.Get(GetRequest(key=_key(model), offset=999))) == CONTENT[999:]
        assert stub.Stat(_key(size=0)) == BlobState(have=len(CONTENT), complete=True)
    assert coordinator.uploads() == {BLOB.sha256: CONTENT}


def test_an_upload_that_stops_early_goes_on_where_it_stopped(coordinator: Coordinator) -> None:
    with channel(coordinator.port) as opened:
        stub = BlobsStub(opened)
        half = stub.Put(_messages(CONTENT[: 2 * CHUNK]))
        assert half == BlobState(have=2 * CHUNK, complete=False) == stub.Stat(_key())
        for wrong in (0, CHUNK, 2 * CHUNK + 1):
            code, words = _put(stub, _messages(offset=wrong))
            assert code is grpc.StatusCode.FAILED_PRECONDITION
            assert str(2 * CHUNK) in words
        assert stub.Put(_messages(offset=2 * CHUNK)).complete
    assert coordinator.uploads() == {BLOB.sha256: CONTENT}


# --- what is refused


def test_a_blob_whose_digest_lies_is_refused_and_removed(coordinator: Coordinator) -> None:
    lie = _key(sha256="0" * 64)
    with channel(coordinator.port) as opened:
        code, words = _put(BlobsStub(opened), _messages(key=lie))
        assert (code, "digest" in words) == (grpc.StatusCode.INVALID_ARGUMENT, True)
        assert BlobsStub(opened).Stat(lie).have == 0
    assert coordinator.uploads() == {}


def test_more_bytes_than_declared_are_refused_and_removed(coordinator: Coordinator) -> None:
    with channel(coordinator.port) as opened:
        code, words = _put(BlobsStub(opened), _messages(key=_key(size=2 * CHUNK)))
    assert (code, "announced" in words) == (grpc.StatusCode.INVALID_ARGUMENT, True)
    assert coordinator.uploads() == {}


def test_ten_gigabytes_are_refused_before_a_byte_is_written(coordinator: Coordinator, tmp_path: Path) -> None:
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(10_000_000_000)
    told: list[int] = []
    with client(coordinator.port) as blobs, pytest.raises(SiteFailure, match="10000000000 bytes") as refused:
        blobs.upload(RUN, tmp_path / "huge", digest="0" * 64, progress=lambda done, _: told.append(done))
    assert refused.value.code is Code.UPDATE_REFUSED
    assert not (coordinator.path / RUN / "up").exists()
    assert max(told) < 64 << 20


def test_what_would_fill_the_disk_is_refused_before_a_byte_is_written(tmp_path: Path) -> None:
    open_run(tmp_path / "spool", upload_bytes=1 << 50)
    free = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize
    with serve(tmp_path / "spool", quota=1 << 50) as served, channel(served.port) as opened:
        code, words = _put(BlobsStub(opened), _messages(key=_key(size=free + 1)))
        assert (code, "disk" in words) == (grpc.StatusCode.RESOURCE_EXHAUSTED, True)
        code, _ = _put(BlobsStub(opened), _messages(key=_key(size=free - DISK_RESERVE // 2)))
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert served.uploads() == {}


def test_the_quota_counts_all_runs_of_a_site_and_room_that_is_made_is_used(tmp_path: Path) -> None:
    open_run(tmp_path / "spool")
    other = tmp_path / "spool" / "other-run" / "up" / "berlin"
    other.mkdir(parents=True)
    (other / ("1" * 64)).write_bytes(bytes(1000))
    (tmp_path / "update").write_bytes(CONTENT)
    with serve(tmp_path / "spool", quota=len(CONTENT) + 999) as served:
        with channel(served.port) as opened:
            code, words = _put(BlobsStub(opened), _messages())
            assert (code, "1000 bytes" in words) == (grpc.StatusCode.RESOURCE_EXHAUSTED, True)
            assert served.uploads() == {}
        with client(served.port, "lyon") as blobs:
            assert blobs.upload(RUN, tmp_path / "update") == BLOB
        with client(served.port) as blobs:
            sending = threading.Thread(target=blobs.upload, args=(RUN, tmp_path / "update"))
            sending.start()
            served.spool.upload_path("other-run", "berlin", "1" * 64).unlink()
            sending.join(20)
        assert served.uploads() == {BLOB.sha256: CONTENT}


BAD_RUNS = ["", "..", ".", "../run-1", "run-1/../run-1", "run-1/down", "/etc", "Run", "run_1", "r" * 90, "run-1\n", "é"]
BAD_DIGESTS = [
    "",
    "..",
    "../../limit.json",
    "A" * 64,
    "a" * 63,
    "a" * 65,
    "a" * 64 + "\n",
    "g" * 64,
    "0" * 64 + ".part",
]


@pytest.mark.parametrize("key", [_key(run=run) for run in BAD_RUNS] + [_key(sha256=name) for name in BAD_DIGESTS])
def test_a_bad_name_reaches_no_file(coordinator: Coordinator, key: BlobKey) -> None:
    before = sorted(coordinator.path.rglob("*"))
    with channel(coordinator.port) as opened:
        stub = BlobsStub(opened)
        calls = (
            lambda: [stub.Stat(key)],
            lambda: [stub.Put(_messages(key=key))],
            lambda: stub.Get(GetRequest(key=key)),
        )
        assert {_refused(call)[0] for call in calls} == {grpc.StatusCode.INVALID_ARGUMENT}
    assert sorted(coordinator.path.rglob("*")) == before


def test_another_sites_upload_can_neither_be_read_nor_seen(coordinator: Coordinator) -> None:
    with channel(coordinator.port) as opened:
        BlobsStub(opened).Put(_messages())
    with channel(coordinator.port, "lyon") as opened:
        stub = BlobsStub(opened)
        assert stub.Stat(_key()) == BlobState(have=0, complete=False)
        assert _refused(lambda: stub.Get(GetRequest(key=_key())))[0] is grpc.StatusCode.NOT_FOUND
        assert _refused(lambda: [stub.Stat(_key(size=0))])[0] is grpc.StatusCode.NOT_FOUND


def test_only_a_site_that_has_approved_the_plan_may_call(coordinator: Coordinator) -> None:
    model = put_down(coordinator.path, CONTENT)
    with channel(coordinator.port, "paris") as opened:
        stub = BlobsStub(opened)
        calls = (
            lambda: [stub.Stat(_key())],
            lambda: [stub.Put(_messages())],
            lambda: stub.Get(GetRequest(key=_key(model))),
        )
        assert {_refused(call)[0] for call in calls} == {grpc.StatusCode.PERMISSION_DENIED}
    with channel(coordinator.port) as opened:
        code, words = _refused(lambda: [BlobsStub(opened).Stat(_key(run="run-2"))])
        assert (code, words) == (grpc.StatusCode.NOT_FOUND, "the run run-2 does not go on")


def test_a_blob_that_is_not_there_or_not_so_long_is_refused(coordinator: Coordinator) -> None:
    model = put_down(coordinator.path, CONTENT)
    with channel(coordinator.port) as opened:
        stub = BlobsStub(opened)
        missing = GetRequest(key=_key(sha256="0" * 64))
        assert _refused(lambda: stub.Get(missing))[0] is grpc.StatusCode.NOT_FOUND
        for wrong in (GetRequest(key=_key(model, size=7)), GetRequest(key=_key(model), offset=model.size + 1)):
            assert _refused(lambda wrong=wrong: stub.Get(wrong))[0] is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize(
    "messages",
    [
        [],
        [PutChunk()],
        [PutChunk(data=CONTENT)],
        [PutChunk(key=_key(size=0))],
        [PutChunk(key=_key()), PutChunk()],
        [PutChunk(key=_key()), PutChunk(key=_key(), data=b"x")],
        [PutChunk(key=_key()), PutChunk(data=b"x", offset=1)],
        [PutChunk(key=_key(size=2**64 - 1))],
    ],
)
def test_messages_out_of_order_are_refused(coordinator: Coordinator, messages: list[PutChunk]) -> None:
    with channel(coordinator.port) as opened:
        code, words = _put(BlobsStub(opened), iter(messages))
    assert code is grpc.StatusCode.INVALID_ARGUMENT, words


FINE = {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.NOT_FOUND}
NUMBERS = st.integers(0, 2**64 - 1) | st.sampled_from([0, 1, BLOB.size])
KEYS = st.builds(
    BlobKey, run=st.text(max_size=9) | st.just(RUN), sha256=st.text(max_size=9) | st.just(BLOB.sha256), size=NUMBERS
)
FIRST = st.builds(PutChunk, key=KEYS, offset=NUMBERS, data=st.binary(max_size=9))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(first=FIRST, rest=st.lists(st.binary(max_size=9).map(lambda data: PutChunk(data=data)), max_size=3))
def test_no_message_makes_the_service_fail(coordinator: Coordinator, first: PutChunk, rest: list[PutChunk]) -> None:
    with channel(coordinator.port) as opened:
        for call in (
            lambda: [BlobsStub(opened).Put(iter([first, *rest]))],
            lambda: BlobsStub(opened).Get(GetRequest(key=first.key, offset=first.offset)),
            lambda: [BlobsStub(opened).Stat(first.key)],
        ):
            try:
                list(call())
            except grpc.RpcError as error:
                assert error.code() in FINE, error.details()  # noqa: PT017 - most calls may go well


# --- several streams


class _Held:
    """A stream that has sent the first chunk and then waits."""

    def __init__(self, opened: grpc.Channel, key: BlobKey) -> None:
        self._more = threading.Event()
        self.call = BlobsStub(opened).Put.future(self._messages(key))

    def _messages(self, key: BlobKey) -> Iterator[PutChunk]:
        yield PutChunk(key=key, data=CONTENT[:CHUNK])
        self._more.wait(30)

    def end(self) -> None:
        self._more.set()
        self.call.cancel()


def _has(stub: BlobsStub, have: int) -> bool:
    return bool(stub.Stat(_key()).have == have)


def test_two_streams_of_one_blob_do_not_mix_and_a_dead_one_gives_way(coordinator: Coordinator) -> None:
    with line(coordinator.port) as bad, channel(bad.port) as dying, channel(coordinator.port) as opened:
        stub, held = BlobsStub(opened), _Held(dying, _key())
        wait_for(lambda: _has(stub, CHUNK))
        bad.forget()  # the coordinator does not learn that nobody is there any more
        code, words = _put(stub, _messages(offset=CHUNK))
        assert (code, "another stream" in words) == (grpc.StatusCode.ABORTED, True)
        wait_for(lambda: stub.Stat(_key()).complete or _put_quietly(stub))
        held.end()
    assert coordinator.uploads() == {BLOB.sha256: CONTENT}


def _put_quietly(stub: BlobsStub) -> bool:
    try:
        return bool(stub.Put(_messages(offset=CHUNK)).complete)
    except grpc.RpcError as error:
        assert error.code() is grpc.StatusCode.ABORTED  # noqa: PT017
        return False


def test_a_stream_whose_connection_was_reset_gives_way_at_once(coordinator: Coordinator) -> None:
    with line(coordinator.port) as bad, channel(bad.port) as dying, channel(coordinator.port) as opened:
        stub, held = BlobsStub(opened), _Held(dying, _key())
        wait_for(lambda: _has(stub, CHUNK))
        bad.cut()
        wait_for(held.call.done)
        wait_for(lambda: _put_quietly(stub))
        held.end()
    assert coordinator.uploads() == {BLOB.sha256: CONTENT}


def test_a_site_has_a_few_streams_and_others_are_not_kept_waiting(coordinator: Coordinator) -> None:
    with channel(coordinator.port) as opened, channel(coordinator.port, "lyon") as other:
        streams = [_Held(opened, _key(sha256=f"{number:064x}")) for number in range(STREAMS_PER_SITE)]
        wait_for(lambda: len(coordinator.uploads()) == STREAMS_PER_SITE)
        code, words = _put(BlobsStub(opened), _messages())
        assert (code, "streams" in words) == (grpc.StatusCode.RESOURCE_EXHAUSTED, True)
        assert BlobsStub(other).Put(_messages()).complete
        for held in streams:
            held.end()
        wait_for(lambda: _ends(BlobsStub(opened)))


def _ends(stub: BlobsStub) -> bool:
    try:
        return bool(stub.Put(_messages()).complete)
    except grpc.RpcError as error:
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED  # noqa: PT017
        return False


def test_the_end_of_a_run_ends_its_uploads(coordinator: Coordinator) -> None:
    gate = threading.Event()

    def slow() -> Iterator[PutChunk]:
        yield PutChunk(key=_key(), data=CONTENT[:CHUNK])
        gate.wait(20)
        yield PutChunk(data=CONTENT[CHUNK:])

    with channel(coordinator.port) as opened:
        call = BlobsStub(opened).Put.future(slow())
        wait_for(lambda: _has(BlobsStub(opened), CHUNK))
        shutil.rmtree(coordinator.path / RUN)
        gate.set()
        assert _refused(lambda: [call.result()])[0] is grpc.StatusCode.NOT_FOUND
    assert list(coordinator.path.iterdir()) == []


# --- a coordinator that dies, fills and is watched


def test_an_upload_survives_kill_9_of_the_coordinator_and_resumes(tmp_path: Path) -> None:
    open_run(tmp_path / "spool")
    content, port = os.urandom(48 << 20), free_port()
    (tmp_path / "update").write_bytes(content)
    over = threading.Event()
    with line(port) as counted, client(counted.port) as blobs:
        with serving_process(tmp_path / "spool", port) as process:
            sending = threading.Thread(target=lambda: (blobs.upload(RUN, tmp_path / "update"), over.set()))
            sending.start()
            wait_for(lambda: counted.passed > 20 << 20)
            process.send_signal(signal.SIGKILL)
        part = next((tmp_path / "spool" / RUN / "up" / "berlin").iterdir())
        there = part.read_bytes()
        assert part.name.endswith(".part")
        assert content.startswith(there)
        with serving_process(tmp_path / "spool", port):
            assert over.wait(30)
        assert counted.passed < 1.1 * len(content)
    assert part.with_suffix("").read_bytes() == content


def test_a_disk_that_fills_stops_nothing_but_the_upload_until_there_is_room(tmp_path: Path) -> None:
    open_run(tmp_path / "spool")
    (tmp_path / "update").write_bytes(CONTENT)
    port, over = free_port(), threading.Event()
    with serving_process(tmp_path / "spool", port) as process, client(port) as blobs, channel(port) as opened:
        _, hard = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (CHUNK + 1000, hard))
        assert _put(BlobsStub(opened), _messages()) == (
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            "the coordinator's disk is full",
        )
        threading.Thread(target=lambda: (blobs.upload(RUN, tmp_path / "update"), over.set()), daemon=True).start()
        assert not over.wait(0.5)
        assert BlobsStub(opened).Stat(_key()).have == CHUNK + 1000
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (hard, hard))
        assert over.wait(20)
    assert (tmp_path / "spool" / RUN / "up" / "berlin" / BLOB.sha256).read_bytes() == CONTENT


def test_memory_does_not_grow_with_the_blob(tmp_path: Path) -> None:
    open_run(tmp_path / "spool")
    port = free_port()
    with serving_process(tmp_path / "spool", port) as process, client(port) as blobs:
        peaks = []
        for size in (8 << 20, 160 << 20):
            with (tmp_path / "spool" / "file").open("wb") as file:
                file.truncate(size)
            blob = blobs.upload(RUN, tmp_path / "spool" / "file")
            os.link(tmp_path / "spool" / "file", tmp_path / "spool" / RUN / "down" / blob.sha256)
            blobs.download(RUN, blob, tmp_path / "fetched")
            (tmp_path / "spool" / "file").unlink()
            peaks.append(_peak_mib(process.pid))
    assert peaks[1] - peaks[0] < 32


def _peak_mib(process: int) -> float:
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


# --- over mutual TLS, with the registry


def test_over_mutual_tls_a_site_is_its_certificate(tmp_path: Path) -> None:
    def blob_service(server: grpc.Server, door: Door) -> None:
        registry, spool = door.registry, Spool(door.home.spool)
        BlobService(spool, lambda context: site_of(context, registry), registry.approved, 1 << 30).add_to(server)

    (tmp_path / "update").write_bytes(CONTENT)
    with open_door(tmp_path / "coordinator", (registry_service, blob_service)) as door:
        open_run(door.home.spool)
        model = put_down(door.home.spool, CONTENT[::-1])
        identity, other = door.enrol("berlin"), door.enrol("lyon")
        door.registry.propose(PLAN, b"envelope")
        door.registry.record_approval("berlin", PLAN, approved=True, at=1.0, envelope=b"")
        with door.channel(identity) as opened:
            blobs = BlobClient.over(opened, threading.Event())
            assert blobs.upload(RUN, tmp_path / "update") == BLOB
            blobs.download(RUN, model, tmp_path / "model")
            lied = opened.unary_unary(f"/{SERVICE}/Stat", BlobKey.SerializeToString, BlobState.FromString)
            assert lied(_key(), metadata=(("site", "lyon"),)).complete
        assert (tmp_path / "model").read_bytes() == CONTENT[::-1]
        assert (door.home.spool / RUN / "up" / "berlin" / BLOB.sha256).read_bytes() == CONTENT
        with door.channel(other) as opened, pytest.raises(SiteFailure, match="not approved"):
            BlobClient.over(opened, threading.Event()).upload(RUN, tmp_path / "update")
        door.registry.revoke("berlin")
        with door.channel(identity) as opened, pytest.raises(SiteFailure, match="revoked"):
            BlobClient.over(opened, threading.Event()).upload(RUN, tmp_path / "update")
