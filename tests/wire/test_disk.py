"""A disk that fills at the coordinator: nothing dies of it, it is told, and the run goes on when there is room."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from locum.server.gateway.spool import DISK_RESERVE
from tests.peers import Peer, run_peers
from tests.plans import plan
from tests.wire.federation import ended, events, model_of, open_federation, until
from tests.wire.harm import bits, told

LARGE = {"name": "Classifier", "channels": [16, 32, 64]}
SIZE = DISK_RESERVE + (64 << 20)


@dataclass(frozen=True)
class Disk:
    """A small disk of its own, in memory, where the coordinator keeps everything."""

    path: Path

    def fill(self, leave: int) -> None:
        """Leaves so many bytes."""
        with (self.path / "ballast").open("ab") as file:
            until(lambda: self._filled(file.fileno(), leave), 30, "the coordinator is always faster")

    def _filled(self, file: int, leave: int) -> bool:
        found = os.statvfs(self.path)
        try:
            os.posix_fallocate(file, 0, found.f_bavail * found.f_frsize - leave)
        except OSError as error:  # the coordinator took what was free when we looked
            assert error.errno == errno.ENOSPC  # noqa: PT017 - any other error is the test's
            return False
        return True

    def empty(self) -> None:
        (self.path / "ballast").unlink()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    path = tmp_path / "coordinator"
    path.mkdir()
    mount = ("mount", "-t", "tmpfs", "-o", f"size={SIZE},mode=700", "tmpfs", str(path))
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("this account cannot mount a disk")
    try:
        yield Disk(path)
    finally:
        subprocess.run(("umount", "-l", str(path)), check=True)


def test_a_disk_that_fills_at_the_coordinator_is_told_and_the_run_goes_on_when_there_is_room(
    tmp_path: Path, disk: Disk
) -> None:
    of = plan(name="disk", rounds=2, network=LARGE, participation={"quorum": 2, "deadline": "300 s"})
    with open_federation(tmp_path) as federation:
        federation.propose(of)
        for name in "ab":
            federation.peer(name, "slow:2")
        for name in "ab":
            federation.approve(name, of)
        federation.ready(of, *"ab")
        gateway = federation.pid_of("gateway")
        run = federation.run(of)

        told(run, "round", round=1)
        disk.fill(DISK_RESERVE // 2)  # what is left is not for uploads
        waits = "a blob waits: the coordinator's disk is too full for this blob"
        for name in "ab":
            log = federation.folder / name / "site.log"
            until(lambda log=log: waits in log.read_text(), 60, f"{name} does not say why it waits")
        disk.empty()

        told(run, "committed", round=1)
        disk.fill(0)
        until(lambda: any("No space left" in event["reason"] for event in events(run, "paused")), 60, "it is not told")
        disk.empty()
        assert ended(run, 180) == "completed"
        assert federation.server.popen is not None
        assert federation.server.popen.poll() is None
        assert federation.pid_of("gateway") == gateway
        found = bits(model_of(run))
    assert found == bits(run_peers(of, [Peer("a"), Peer("b")], tmp_path / "local").model)
