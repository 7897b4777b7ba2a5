"""What a site does with cohort questions: notes them, answers those that its policy allows, and keeps its answers.

Rules:
  * A question counts if the federation's log key signed it, it is what its digest says, and its time is not over.
  * A policy that does not allow cohort questions is an answer too: the key of the policy, and no number.
  * Beyond so many questions a day, outside the site's hours, and while an ingest goes on, a question waits.
  * An answer is in the memory before it is anywhere else. It is signed there, and the pulse hands it over through
    `releases.py`, as often as it takes.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from locum.common.canonical import sha256_hex
from locum.common.cohort import MOST_CELLS, Query, Question, Told, open_answer, open_question, seal_answer
from locum.common.envelope import EnvelopeError
from locum.common.errors import LocumError, RunError
from locum.common.identity import fingerprint_of
from locum.site_client import gate
from locum.site_client.cohort.counting import Cohorts, Columns, Members, members
from locum.site_client.cohort.memory import Asked, Cell, Memory, Tables
from locum.site_client.gate import Policy
from locum.site_client.hours import open_at
from locum.site_client.identity import SiteIdentity
from locum.site_client.releases import Statement
from locum.site_client.review import printable

_DAY_SECONDS = 86_400.0
#: A value that an answer can have in a cell's key.
_TELLABLE = re.compile(r"[^\x00-\x1f\x7f]{1,64}")
#: Questions that wait for an answer: more are not taken.
_MOST_WAITING = 200


@dataclass
class Answering:
    """The site's part in cohort questions.

    Attributes:
        memory: of what was asked and answered.
        cohorts: the catalogs.
        policy: what the site allows.
        identity: the site's key, and the key that verifies questions.
        now: seconds since 1970 by the coordinator's clock, by which a question is open.
        left: the SHA-256 of each answer that the site's own log knows of.
        log: what people read.
        local: the site's local time, for its hours and for how many questions a day it answers.
    """

    memory: Memory
    cohorts: Cohorts
    policy: Policy
    identity: Callable[[], SiteIdentity] = field(repr=False)
    now: Callable[[], float]
    left: Callable[[], frozenset[str]]
    log: logging.Logger
    local: Callable[[], datetime] = lambda: datetime.now().astimezone()
    _asked: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None
    _told: str = ""
    _wanted: dict[tuple[str, str], float] = field(default_factory=dict)

    # --- what the pulse calls: never for long

    def receive(self, envelope: bytes) -> None:
        """Notes a question, and has it answered; raises RunError for one that does not count."""
        try:
            question, query = open_question(envelope, self.identity().log_key)
        except EnvelopeError as error:
            raise RunError(f"a question does not count: {error}", "ask the coordinator to ask it again") from error
        if question.until <= self.now():
            return
        if len(self.memory.waiting()) >= _MOST_WAITING:
            raise RunError(f"{_MOST_WAITING} questions wait, and no more are taken", "answer those first")
        if self.memory.receive(question.digest, envelope, now=self.now()):
            by, purpose = printable(question.by), printable(query.purpose)
            self.log.info("%s asks for %s, to know: %s", by, query.study, purpose)
        self._begin()

    def statements(self) -> Iterator[Statement]:
        """The answers that the coordinator shall have: those to questions that are still open, under the site's key."""
        if self.memory.path.exists():
            self._begin()
        for asked in self.memory.questions():
            if asked.answer is not None and self._may_leave(asked) and self._until(asked) > self.now():
                yield Statement(asked.answer, asked.digest, asked.envelope, asked.refused)

    def _may_leave(self, asked: Asked) -> bool:
        """Whether the policy as it is now lets an answer go, or it is gone already."""
        if self.policy.cohort == "on" or asked.refused is not None:
            return True
        return sha256_hex(asked.answer or b"") in self.left()

    def _until(self, asked: Asked) -> float:
        """Until when an answer is wanted; never if another federation asked, or it was signed with an earlier key."""
        own = self.identity()
        known = asked.digest, fingerprint_of(own.certificate)
        if known not in self._wanted:
            self._wanted[known] = _until(asked, own)
        return self._wanted[known]

    def _begin(self) -> None:
        """Starts the thread that counts, or wakes it."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._count, name="cohort", daemon=True)
            self._thread.start()
        self._asked.set()

    def _count(self) -> None:
        while True:
            self._asked.wait()
            self._asked.clear()
            try:
                self.answer_waiting()
            except (LocumError, OSError) as error:
                self._say(str(error))
            except Exception:  # the edge of the thread: the next question is another one
                self.log.exception("a cohort question was not answered; it is tried again")

    def _say(self, problem: str) -> None:
        """Tells what is wrong, once."""
        if problem != self._told:
            self.log.warning("cohort questions are not answered: %s", problem)
        self._told = problem

    # --- answering

    def answer_waiting(self) -> int:
        """Answers what may be answered now; returns how many. Raises LocumError if the memory or a catalog fails."""
        done = 0
        for asked in self.memory.waiting():
            try:
                question, query = open_question(asked.envelope, self.identity().log_key)
            except EnvelopeError:
                continue
            try:
                done += question.until > self.now() and self._answered(question, query)
            except ValueError:  # an answer that cannot be written costs no other
                self.log.exception("cohort question %s cannot be answered", question.digest[:12])
        return done

    def _answered(self, question: Question, query: Query) -> bool:
        """Answers one question, unless it must wait."""
        if self.policy.cohort == "off":
            clause = "cohort"
            self.memory.refuse(
                question.digest, clause, self._sealed(question, (), clause), now=self.local().timestamp()
            )
            return True
        if self.policy.hours is not None and not open_at(self.policy.hours, self.local()):
            self._say("it is outside the site's hours")
            return False
        if self.memory.answered_since(self.local().timestamp() - _DAY_SECONDS) >= self.policy.cohort_questions_a_day:
            self._say(f"{self.policy.cohort_questions_a_day} were answered in 24 hours; the next ones wait")
            return False
        self.memory.check_has(self.left())
        columns = self.cohorts.columns()
        found = _fitting(members(columns, query), query, self.policy.least_cell)

        def seal(numbers: list[list[int | None]]) -> bytes:
            return self._sealed(question, tuple(_cells(query, found, numbers)), None)

        tables = cells_of(query, found, columns)
        now = self.local().timestamp()
        self.memory.answer(question.digest, tables, least=self.policy.least_cell, seal=seal, now=now)
        self._told = ""
        return True

    def _sealed(self, question: Question, cells: tuple[Told, ...], refused: str | None) -> bytes:
        own = self.identity()
        answer = gate.release_answer(self.policy, question.digest, own.site, cells, at=self.now(), refused=refused)
        return seal_answer(answer, own.key)


def cells_of(query: Query, found: Sequence[Members], columns: Columns) -> Tables:
    """The cells of each table, as the memory takes them."""
    cells = [
        [Cell(query.predicate(table, key), people) for key, people in members_of.items()]
        for table, members_of in zip(query.tables, found, strict=True)
    ]
    return Tables(cells, columns.patients)


def _until(asked: Asked, own: SiteIdentity) -> float:
    try:
        open_answer(asked.answer or b"", own.key.public_key())
        return open_question(asked.envelope, own.log_key)[0].until
    except EnvelopeError:
        return 0.0


def _fitting(found: list[Members], query: Query, least: int) -> list[Members]:
    """The cells that fit into an answer: of tables of which only what is told is listed, the largest.

    A value of the catalog that an answer cannot have, such as a label of a whole sentence, has no cell.
    """
    room = MOST_CELLS - sum(len(table.keys or ()) for table in query.tables)
    fitting: list[Members] = []
    for table, cells in zip(query.tables, found, strict=True):
        if table.keys is None:
            cells = {key: people for key, people in cells.items() if all(map(_TELLABLE.fullmatch, key))}  # noqa: PLW2901
            large = sorted((key for key in cells if len(cells[key]) >= least), key=lambda key: (-len(cells[key]), key))
            cut = set(large[room:])
            room -= min(room, len(large))
            cells = {key: people for key, people in cells.items() if key not in cut}  # noqa: PLW2901
        fitting.append(cells)
    return fitting


def _cells(query: Query, found: list[Members], numbers: list[list[int | None]]) -> Iterator[Told]:
    """The cells of an answer."""
    for place, (table, cells, told) in enumerate(zip(query.tables, found, numbers, strict=True)):
        for key, patients in zip(cells, told, strict=True):
            if patients is not None or table.keys is not None:
                yield Told(table=place, key=key, patients=patients)
