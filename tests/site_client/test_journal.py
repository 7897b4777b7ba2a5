from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Message
from flwr.supercore.task_identity import TaskIdentity

from locum.common.messages import TrainResult, TrainTask, pack, unpack
from locum.site_client.fleet import Incoming, RunOf, from_bytes, to_bytes
from locum.site_client.journal import Journal

DIGEST = "0" * 64
RUN = RunOf("20260101-test-0000", b"bundle")


def _message(round_number: int = 1) -> Message:
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 5, 1, 1
    message = Message(pack(TrainTask(plan_digest=DIGEST, round=round_number), {"w": np.arange(3.0)}), 9, "train")
    message.metadata.__dict__["_message_id"] = f"message {round_number}"
    return message


def _reply(message: Message) -> Message:
    result = TrainResult(plan_digest=DIGEST, round=1, weight=1, steps=1, loss=None, seconds=0)
    return Message(pack(result, {"w": np.ones(3)}), reply_to=message)


def test_a_message_is_the_same_after_the_journal() -> None:
    message = _message()
    again = from_bytes(to_bytes(message))
    assert again.metadata.message_id == message.metadata.message_id
    assert again.metadata.run_id == 5
    task, tensors = unpack(again.content, TrainTask)
    assert task.round == 1
    assert np.array_equal(tensors["w"], np.arange(3.0))


def test_what_is_not_answered_is_there_after_a_restart_and_what_is_answered_is_not(tmp_path: Path) -> None:
    journal, message = Journal(tmp_path), _message()
    assert journal.current() is None
    journal.begin(Incoming(message, 5), RUN)
    entry = Journal(tmp_path).current()
    assert entry is not None
    assert (entry.run, entry.reply) == (RUN, None)
    journal.finish(_reply(message))
    entry = Journal(tmp_path).current()
    assert entry is not None
    assert entry.reply is not None
    assert entry.reply.metadata.reply_to_message_id == "message 1"
    Journal(tmp_path).clear()
    assert Journal(tmp_path).current() is None


def test_a_reply_belongs_to_its_message_alone(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.begin(Incoming(_message(1), 5), RUN)
    journal.finish(_reply(_message(1)))
    journal.begin(Incoming(_message(2), 5), RUN)
    entry = journal.current()
    assert entry is not None
    assert (entry.message.metadata.message_id, entry.reply) == ("message 2", None)


@pytest.mark.parametrize("name", ["message", "bundle", "run.json", "reply"])
def test_a_damaged_journal_is_forgotten_and_never_raises(tmp_path: Path, name: str) -> None:
    journal = Journal(tmp_path)
    journal.begin(Incoming(_message(), 5), RUN)
    journal.finish(_reply(_message()))
    (tmp_path / "current" / name).write_bytes(b"\xff\x00damaged")
    entry = Journal(tmp_path).current()
    assert entry is None or name == "bundle"


_WRITER = """
import sys
from tests.site_client.test_journal import *
journal = Journal(Path(sys.argv[1]))
print("ready", flush=True)
number = 0
while True:
    number += 1
    journal.begin(Incoming(_message(number), 5), RUN)
    journal.finish(_reply(_message(number)))
    journal.clear()
"""


def test_kill_9_at_any_moment_leaves_a_whole_message_or_none(tmp_path: Path) -> None:
    generator = random.Random(7)
    for _ in range(6):
        process = subprocess.Popen([sys.executable, "-c", _WRITER, str(tmp_path)], stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(generator.uniform(0.01, 0.15))
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        entry = Journal(tmp_path).current()
        if entry is not None:
            number = entry.message.metadata.message_id
            assert entry.reply is None or entry.reply.metadata.reply_to_message_id == number
