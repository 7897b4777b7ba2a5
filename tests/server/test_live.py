from __future__ import annotations

import json
import threading
import time
from pathlib import Path

from locum.common.proto.locum_pb2 import ReportRequest
from locum.server.gateway.live import LEASE_SECONDS, Live, read_live


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def said(instance: str = "one", **fields: object) -> ReportRequest:
    return ReportRequest(instance=instance, clock=time.time() + 600, **{"activity": "idle", **fields})  # type: ignore[arg-type]


def test_a_second_agent_is_refused_until_the_first_is_silent(tmp_path: Path) -> None:
    clock = Clock()
    live = Live(tmp_path / "live.json", clock=clock)
    assert live.claim("berlin", "one")
    clock.now += LEASE_SECONDS - 1
    assert not live.claim("berlin", "two")
    assert not live.report("berlin", said("two"))
    assert live.claim("berlin", "one")
    assert live.claim("paris", "two")
    clock.now += LEASE_SECONDS - 1
    assert not live.claim("berlin", "two")
    clock.now += 2
    assert live.claim("berlin", "two")
    assert not live.claim("berlin", "one")


def test_the_next_agent_in_the_same_folder_takes_over_at_once(tmp_path: Path) -> None:
    live = Live(tmp_path / "live.json", clock=Clock())
    assert live.claim("berlin", "folder:one")
    assert live.claim("berlin", "folder:two")
    assert not live.claim("berlin", "copy:two")


def test_what_was_heard_is_in_the_file_with_the_clocks_offset(tmp_path: Path) -> None:
    path = tmp_path / "live.json"
    live = Live(path)
    live.report("berlin", said(activity="training", run="r1", round=3, done=5, total=9, version="0.1"))
    live.flush(now=True)
    heard = read_live(path)["berlin"]
    assert (heard.activity, heard.run, heard.round, heard.done, heard.total) == ("training", "r1", 3, 5, 9)
    assert abs(heard.clock_offset - 600) < 5
    assert set(json.loads(path.read_bytes())["berlin"]) == {
        *("activity", "run", "round", "done", "total", "instance", "version", "at", "clock_offset", "since"),
    }


def test_since_is_when_the_activity_began(tmp_path: Path) -> None:
    path = tmp_path / "live.json"
    live = Live(path)
    seen = []
    for fields in ({"activity": "training"}, {"activity": "training", "done": 7}, {"activity": "uploading"}):
        live.report("berlin", said(**fields))
        live.flush(now=True)
        seen.append(read_live(path)["berlin"])
    assert seen[0].since == seen[1].since == seen[0].at
    assert seen[2].since == seen[2].at


def test_the_file_is_written_once_a_second_and_only_when_something_changed(tmp_path: Path) -> None:
    clock, path = Clock(), tmp_path / "live.json"
    live = Live(path, clock=clock)
    live.flush()
    assert not path.exists()
    live.report("berlin", said())
    live.flush()
    first = path.read_bytes()
    live.report("berlin", said(activity="training"))
    live.flush()
    assert path.read_bytes() == first
    clock.now += 1
    live.flush()
    assert path.read_bytes() != first
    path.unlink()
    clock.now += 1
    live.flush()
    assert not path.exists()


def test_a_new_gateway_remembers_who_was_heard_and_lets_every_agent_in(tmp_path: Path) -> None:
    path = tmp_path / "live.json"
    before = Live(path)
    before.report("berlin", said("one"))
    before.report("paris", said("one"))
    before.flush(now=True)
    after = Live(path)
    assert after.report("paris", said("another"))
    after.flush(now=True)
    assert read_live(path)["berlin"].instance == "one"
    assert read_live(path)["paris"].instance == "another"


def test_a_damaged_file_is_only_forgotten(tmp_path: Path) -> None:
    path = tmp_path / "live.json"
    for content in (b"", b"{", b'{"berlin": {"activity": 1}}', b"[]"):
        path.write_bytes(content)
        assert read_live(path) == {}
        assert Live(path).claim("berlin", "one")


def test_what_changed_is_kept_through_a_disk_that_cannot_be_written(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    live, stop = Live(folder / "live.json"), threading.Event()
    live.report("berlin", said())
    keeper = threading.Thread(target=live.keep, args=(stop,))
    keeper.start()
    time.sleep(1.3)
    folder.mkdir()
    for _ in range(100):
        if (folder / "live.json").exists():
            break
        time.sleep(0.1)
    stop.set()
    keeper.join()
    assert set(read_live(folder / "live.json")) == {"berlin"}


def test_many_reports_at_once_leave_one_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "live.json"
    live = Live(path)

    def talk(site: str) -> None:
        for number in range(12):
            assert live.report(site, said(done=number))
            live.flush(now=True)

    threads = [threading.Thread(target=talk, args=(f"site-{number}",)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    live.flush(now=True)
    assert {heard.done for heard in read_live(path).values()} == {11}
