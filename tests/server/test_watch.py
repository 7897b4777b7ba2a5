"""What a person sees of a run, on a terminal and without one, and that looking leaves the run alone."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from locum.common.activity import Activity
from locum.server.event_file import EventReader
from locum.server.gateway.live import Heard
from locum.server.home import Home
from locum.server.records import Events
from locum.server.runs import Run, create_run
from locum.server.site_states import SILENT_SECONDS, SiteEvents, SiteRow, duration, site_rows
from locum.server.watch import Screen, State, watch_run
from tests.peers import Failing, Mute, Peer
from tests.plans import plan
from tests.server.coordinator import approved_run, enrol, go_on, new_home, say

LOCUM = [sys.executable, "-c", "import sys; from locum.common.cli import main; sys.exit(main())"]
NOW = 1_000_000.0
IDLE = Heard("idle", "", 0, 0, 0, "1", "0.1.0", NOW - 2, 0.0, NOW - 60)


def _row(heard: Heard | None, events: SiteEvents | None = None, *, approved: bool = True) -> SiteRow:
    told = {} if events is None else {"a": events}
    rows = site_rows("run", told, {} if heard is None else {"a": heard}, approved={"a"} if approved else set(),
                     members=["a"], now=NOW)  # fmt: skip
    assert len(rows) == 1
    return rows[0]


# --- each site in words


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"activity": "training", "run": "run", "round": 3}, "training round 3"),
        ({"activity": "uploading", "run": "run", "done": 43, "total": 100}, "uploading 43 %"),
        ({"activity": "downloading", "run": "run", "done": 2_500_000}, "downloading 2.5 MB"),
        ({"activity": "describing", "run": "run"}, "looking at its data"),
        ({"activity": "training", "run": "other", "round": 9}, "works on another run, other"),
        ({}, "idle"),
        ({"clock_offset": 620.0}, "idle (its clock is 10 min ahead)"),
        ({"clock_offset": -7300.0}, "idle (its clock is 2 h behind)"),
        ({"activity": "dream_of_sheep", "run": "run"}, "dream of sheep"),
    ],
)
def test_a_site_that_was_just_heard_is_told_by_what_it_says(changes: dict[str, Any], words: str) -> None:
    assert _row(replace(IDLE, **changes)).words == words


def test_a_site_that_does_nothing_says_why() -> None:
    four = replace(IDLE, activity="training", run="run", round=3, at=NOW - 240)
    clock = time.strftime("%H:%M", time.localtime(four.at))
    assert _row(four).words == f"silent for 4 min: last heard {clock}"
    assert _row(None).words == "not heard yet"
    assert _row(IDLE, approved=False).words == "has not approved"
    assert _row(IDLE, SiteEvents(), approved=False).words == "has withdrawn its approval"
    assert _row(IDLE, SiteEvents(left_out="no case")).words == "left out: no case"
    assert _row(IDLE, SiteEvents(state="done")).words == "has delivered"
    refused = _row(IDLE, SiteEvents(state="refused", note="its norm is above the bound"))
    assert refused.words == "does not count in this round: its norm is above the bound"
    assert refused.look == "trouble"


def test_a_silence_of_days_is_told_with_its_date() -> None:
    at = NOW - 5 * 86400
    assert _row(replace(IDLE, at=at)).words.endswith(time.strftime("%d %b %H:%M", time.localtime(at)))


HEARD = st.builds(
    Heard,
    activity=st.one_of(st.sampled_from(Activity.__args__), st.text(max_size=6)),  # type: ignore[attr-defined]
    run=st.sampled_from(["", "run", "other"]),
    round=st.integers(0, 9),
    done=st.integers(0, 99),
    total=st.integers(0, 99),
    instance=st.just("1"),
    version=st.just("0"),
    at=st.floats(0, 2 * NOW),
    clock_offset=st.floats(-1e9, 1e9),
    since=st.just(0.0),
)
EVENTS = st.builds(
    SiteEvents,
    state=st.sampled_from(["ready", "asked", "done", "refused"]),
    note=st.text(),
    left_out=st.text(max_size=3),
)
NAMES = st.sampled_from("abcdef")


@given(st.dictionaries(NAMES, EVENTS), st.dictionaries(NAMES, HEARD), st.none() | st.sets(NAMES), st.sets(NAMES))
def test_every_site_has_one_row_with_words_that_a_terminal_may_have(
    told: dict[str, SiteEvents], heard: dict[str, Heard], approved: set[str] | None, members: set[str]
) -> None:
    rows = site_rows("run", told, heard, approved=approved, members=members, now=NOW)
    assert sorted(row.site for row in rows) == sorted({*told, *members})
    assert [row.look != "trouble" for row in rows] == sorted(row.look != "trouble" for row in rows)
    for row in rows:
        assert row.words
        assert row.words.isprintable()
        said = heard.get(row.site)
        if said is not None and NOW - said.at > SILENT_SECONDS:
            assert row.look == "trouble"


@given(st.floats(0, 1e9))
def test_a_length_of_time_is_told_in_one_unit_and_never_far_off(seconds: float) -> None:
    number, unit = duration(seconds).split()
    size = {"s": 1, "min": 60, "h": 3600, "days": 86400}[unit]
    assert abs(float(number) * size - seconds) <= size / 2


# --- events on a screen


def _shown(path: Path, *, terminal: bool = False) -> str:
    out = StringIO()
    console = Console(file=out, force_terminal=terminal, width=100, height=30)
    with Screen(EventReader(path), console, lambda _: "") as screen:
        screen.look()
    return out.getvalue()


def test_text_of_a_site_is_neither_markup_nor_control(tmp_path: Path) -> None:
    events = Events(tmp_path / "events.jsonl")
    evil = "[/red][bold]x[/] \x1b[2J\x07 ]8;;"
    events.emit("roster", cases={"a": None}, excluded={"b": evil}, notices={"a": evil})
    events.emit("refused", round=1, site="a", reason=evil)
    events.emit("paused", reason=evil + "\nmore", missing=["a"])
    events.close()
    shown = _shown(tmp_path / "events.jsonl")
    assert shown.count("[/red][bold]x[/]") == 4
    assert "\x1b" not in shown
    assert "\x07" not in shown
    assert "\x1b[2J" not in _shown(tmp_path / "events.jsonl", terminal=True)


def test_the_set_up_of_keys_and_why_a_round_was_void_are_shown(tmp_path: Path) -> None:
    events = Events(tmp_path / "events.jsonl")
    four = {"sites": ["a", "b", "c", "d"], "threshold": 3, "roster": "0" * 64}
    events.emit("keys", **four, excluded={})
    events.emit("keys", **four, excluded={"e": "no answer by the deadline"})
    lost = "the sum of 4 sites could not be unmasked: 3 must answer"
    events.emit("void", round=2, attempt=1, admitted=4, reason=f"{lost}\n  a: no answer by the deadline")
    events.emit("void", round=2, attempt=2, admitted=1, reason="")
    events.emit("void", round=2, attempt=1, admitted=3, reason="the sum of the metrics failed its check", fold="test")
    events.emit("rolled back", round=5, to=2)
    events.close()
    assert _shown(tmp_path / "events.jsonl").strip().splitlines() == [
        "secure sums: 4 sites, of which 3 must answer to unmask a sum",
        "secure sums: 4 sites, of which 3 must answer to unmask a sum; without e (no answer by the deadline)",
        f"round 2 is void (attempt 1): {lost}; a: no answer by the deadline; tried again",
        "round 2 is below its quorum (attempt 2); tried again",
        "the metrics of the test fold after round 2 have no sum: the sum of the metrics failed its check",
        "validation has collapsed after round 5: the next one starts from the model of round 2",
    ]


def test_an_event_of_a_later_version_is_passed_over() -> None:
    assert State().apply({"event": "a-new-thing", "at": 1.0}) == []


# --- a run, watched by the command


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    return new_home(tmp_path_factory.mktemp("coordinator") / "home")


def _watch(home: Home, *words: str, **how: Any) -> subprocess.Popen[bytes]:
    return subprocess.Popen([*LOCUM, "watch", *words, "--home", str(home.path)], **how)


class Terminal:
    """A command on a terminal of its own, and what it has shown so far."""

    def __init__(self, home: Home, *words: str) -> None:
        self.ours, theirs = pty.openpty()
        environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "120", "LINES": "30"}
        self.process = _watch(home, *words, stdin=theirs, stdout=theirs, stderr=theirs, env=environment,
                              start_new_session=True, preexec_fn=_take_terminal)  # fmt: skip
        os.close(theirs)
        self._shown = bytearray()

    @property
    def text(self) -> str:
        for _ in range(64):
            if not select.select([self.ours], [], [], 0.02)[0]:
                break
            try:
                self._shown += os.read(self.ours, 65536)
            except OSError:  # the other end is closed
                break
        return self._shown.decode(errors="replace")

    def wait_for(self, condition: Callable[[str], bool], seconds: float = 60) -> str:
        end = time.monotonic() + seconds
        while not condition(text := self.text):
            assert time.monotonic() < end, text
        return text

    def ended(self) -> int:
        self.wait_for(lambda _: self.process.poll() is not None)
        return self.process.wait()


def _take_terminal() -> None:
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_on_a_terminal_a_run_is_shown_until_it_ends_with_losses(home: Home) -> None:
    run = approved_run(home, plan(rounds=3, name="shown"), ["north", "riverside", "st-anne"])
    enrol(home, "late")
    say(home, north={"activity": "training", "run": run.id, "round": 2},
        riverside={"activity": "uploading", "run": run.id, "done": 43, "total": 100},
        late={"at": time.time() - 240})  # fmt: skip
    terminal = Terminal(home, run.id)
    terminal.wait_for(lambda text: "waiting" in text and "uploading 43 %" in text)
    slow = [Mute("north", 0.7), Peer("riverside"), Failing("st-anne", 109, "")]
    engine = threading.Thread(target=go_on, args=(run, slow))
    engine.start()
    code = terminal.ended()
    engine.join()
    text = terminal.text
    assert code == 3
    for words in ("training round 2", "late", "has not approved", "round   2/3", "loss 0.5000", "AUC 1.000",
                  "round 1: st-anne does not count: the worker ran out of memory",
                  "st-anne missed rounds 1–3 of 3", f"locum pull {run.id}"):  # fmt: skip
        assert words in text, words
    assert "Traceback" not in text
    assert text.rfind("\x1b[?25h") > text.rfind("\x1b[?25l"), "the cursor stays hidden"


def test_ctrl_c_leaves_the_run_alone_and_says_so(home: Home) -> None:
    run = create_run(home, plan(name="left"))
    terminal = Terminal(home)  # the newest
    terminal.wait_for(lambda text: f"{run.id}: waiting" in text)
    os.write(terminal.ours, b"\x03")
    assert terminal.ended() == 130
    text = terminal.text
    assert "the run goes on without you" in text
    assert "Traceback" not in text
    assert text.rfind("\x1b[?25h") > text.rfind("\x1b[?25l"), "the cursor stays hidden"
    assert run.status().state == "waiting"


def test_json_prints_every_event_and_last_the_status(home: Home) -> None:
    run = create_run(home, plan(name="lines"))
    process = _watch(home, run.id, "--json", stdout=subprocess.PIPE)
    go_on(run, [Peer("a"), Peer("b")])
    out, _ = process.communicate(timeout=60)
    lines = [json.loads(line) for line in out.splitlines()]
    written = [json.loads(line) for line in run.events.read_bytes().splitlines()]
    assert lines[:-1] == written
    assert (lines[-1]["event"], lines[-1]["state"], lines[-1]["round"]) == ("status", "completed", 2)
    assert process.returncode == 0


def test_who_reads_json_may_go_at_any_time(home: Home) -> None:
    run = create_run(home, plan(name="gone"))
    go_on(run, [Peer("a"), Peer("b")], rounds=1)
    process = _watch(home, run.id, "--json", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    with (run.events).open("ab") as file:
        file.write(b'{"at": 1.0, "event": "resumed"}\n')
    assert process.wait(timeout=60) == 130
    assert process.stderr is not None
    assert process.stderr.read() == b""


# --- without a terminal


def _lines(run: Run, home: Home, meanwhile: Callable[[], None]) -> str:
    out = StringIO()
    thread = threading.Thread(target=meanwhile)
    thread.start()
    watch_run(run, home, Console(file=out, width=200))
    thread.join()
    return out.getvalue()


def test_without_a_terminal_pauses_silences_and_returns_are_lines(home: Home) -> None:
    run = approved_run(home, plan(name="quiet", rounds=1), ["quiet-a", "quiet-b"])
    say(home, **{"quiet-a": {}, "quiet-b": {}})

    def meanwhile() -> None:
        with run.hold():
            events = Events(run.events)
            events.emit("started", plan="quiet", digest=run.plan.digest, rounds=1, round=0)
            events.emit("roster", cases={"quiet-a": None, "quiet-b": None}, excluded={}, notices={})
            time.sleep(1.5)
            say(home, **{"quiet-a": {}, "quiet-b": {"at": time.time() - 60}})
            events.emit("paused", reason="round 1 stayed below its quorum of 2", missing=["quiet-b"])
            time.sleep(1.5)
            say(home, **{"quiet-a": {}, "quiet-b": {}})
            events.emit("resumed")
            time.sleep(1.5)
            events.close()
            run.fail("the sites do not agree", "install the same versions")

    shown = _lines(run, home, meanwhile)
    assert "paused: round 1 stayed below its quorum of 2; missing: quiet-b" in shown
    assert f"{run.id}: paused" in shown
    assert "quiet-b: silent for" in shown
    assert "quiet-b: idle" in shown
    assert "going on" in shown
    assert "\x1b" not in shown


def test_a_table_of_many_sites_fits_the_terminal(home: Home) -> None:
    names = [f"site-{number:02}" for number in range(50)]
    run = approved_run(home, plan(name="many"), names)
    say(home, **{name: {"activity": "training", "run": run.id, "round": 1} for name in names[:-1]})
    terminal = Terminal(home, run.id)
    shown = terminal.wait_for(lambda text: "more" in text)
    assert "site-49" in shown  # it was never heard, and trouble comes first
    assert "training round 1" in shown.split("more")[-1]
    run.want("stop")
    assert terminal.ended() == 4
    assert "is stopped after round 0 of 2" in terminal.text
