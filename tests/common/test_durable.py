from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from locum.common.durable import create_folder, replace_file

WRITER = """
import sys
from pathlib import Path
from locum.common.durable import replace_file
for number in range(10 ** 9):
    replace_file(Path(sys.argv[1]), bytes([number % 256]) * 200_000)
    print(number, flush=True)
"""


def test_kill_9_at_any_moment_leaves_the_old_file_or_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for attempt in range(5):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE)
        assert writer.stdout is not None
        writer.stdout.readline()
        time.sleep(0.01 * attempt)
        os.kill(writer.pid, signal.SIGKILL)
        writer.wait()
        content = path.read_bytes()
        assert len(content) == 200_000
        assert len(set(content)) == 1


def test_a_failed_write_leaves_the_old_file_and_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "file"
    replace_file(path, b"old")
    code = (
        "import resource, signal, sys\nfrom pathlib import Path\nfrom locum.common.durable import replace_file\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\nresource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "replace_file(Path(sys.argv[1]), b'n' * 5000)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, check=False)
    assert b"OSError" in done.stderr
    assert path.read_bytes() == b"old"
    assert [found.name for found in tmp_path.iterdir()] == ["file"]


def test_a_folder_is_replaced_whole(tmp_path: Path) -> None:
    create_folder(tmp_path / "f", {"a": b"1", "b": b"2"})
    create_folder(tmp_path / "f", {"a": b"3"})
    assert {path.name: path.read_bytes() for path in (tmp_path / "f").iterdir()} == {"a": b"3"}


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OSError, match="file"):
        create_folder(tmp_path / "file" / "f", {"a": b"1"})
