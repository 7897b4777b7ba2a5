"""Cohort questions at the coordinator: signed, put before the sites, and what came back, added up.

Rules:
  * A question and every answer stand in the federation's log before they count.
  * A site that says nothing, one that refuses and one that does not tell a number are three things, and each is named.
  * A sum over sites is a lower bound: what is not told counts as nothing. How much more there can be is told beside it,
    as far as cells that are not told are too small; a site can also keep back a larger number, from which one follows.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from locum.common.cohort import (
    Answer,
    Query,
    Question,
    Table,
    open_answer,
    open_question,
    seal_question,
)
from locum.common.envelope import EnvelopeError
from locum.common.errors import DataError, RunError
from locum.common.identity import PublicKey, certified_key
from locum.common.log.entries import QuestionEntry
from locum.server.authority import load_log_certificate, load_log_key
from locum.server.home import Home
from locum.server.log import now, open_log
from locum.server.registry import Registry

#: A question stands whole in an entry of the log.
_MOST_BYTES = 60 << 10
_LEAST_PREFIX = 6
_DAY_SECONDS = 86_400.0


@dataclass(frozen=True)
class Cell:
    """A cell over all sites.

    Attributes:
        sites: by site that answered, its number; None if it does not tell it.
        least: how many patients there are at least.
        few: how many more there are at most, if all who do not tell it have fewer than their least cell.
    """

    key: tuple[str, ...]
    sites: Mapping[str, int | None]
    least: int
    few: int


@dataclass(frozen=True)
class Result:
    """What is known of a question.

    Attributes:
        question: as it was asked; `query` what it asks.
        answers: by site; `refused` those that do not answer, by site the policy's key; `silent` who has said nothing.
    """

    question: Question
    query: Query
    answers: Mapping[str, Answer]
    refused: Mapping[str, str]
    silent: tuple[str, ...]

    def cells(self, table: int) -> tuple[Cell, ...]:
        """The cells of a table: those that were asked for, or those that any site tells."""
        numbers = {site: answer.numbers(table) for site, answer in self.answers.items()}
        keys = self.query.tables[table].keys or sorted({key for told in numbers.values() for key in told})
        return tuple(self._cell(key, {site: told.get(key) for site, told in numbers.items()}) for key in keys)

    def _cell(self, key: tuple[str, ...], sites: Mapping[str, int | None]) -> Cell:
        few = sum(self.answers[site].least_cell - 1 for site, number in sites.items() if number is None)
        return Cell(key, sites, sum(number or 0 for number in sites.values()), few)

    def as_dict(self) -> dict[str, Any]:
        """For a program."""
        return {
            "question": self.question.digest,
            "asked_by": self.question.by,
            "asked_at": self.question.asked_at,
            "until": self.question.until,
            "query": self.question.query,
            "answered": sorted(self.answers),
            "refused": dict(self.refused),
            "silent": list(self.silent),
            "tables": [
                {"name": table.name, "by": [each.by for each in table.dimensions], "cells": list(self._as_dicts(place))}
                for place, table in enumerate(self.query.tables)
            ],
        }

    def _as_dicts(self, table: int) -> Iterator[dict[str, Any]]:
        for cell in self.cells(table):
            told = {"least": cell.least, "not_told": sum(number is None for number in cell.sites.values())}
            yield {"key": list(cell.key), "sites": dict(cell.sites), **told, "few": cell.few}

    def rows(self) -> Iterator[tuple[str, ...]]:
        """Lines of a CSV, the first with names: a line a cell and site; an empty number is not told."""
        yield ("table", "by", "key", "site", "patients")
        for place, table in enumerate(self.query.tables):
            by = "|".join(each.by for each in table.dimensions)
            for cell in self.cells(place):
                for site, number in cell.sites.items():
                    yield (table.name, by, "|".join(cell.key), site, "" if number is None else str(number))


def ask(home: Home, query: Query, *, by: str, days: float) -> str:
    """Puts a question before the sites; one that was asked before stays as it was.

    Returns:
        The question's digest.

    Raises:
        DataError: the log's key cannot be read, or the question or `by` is too long.
        RunError: the registry cannot be written.
        NotLoggedError: the log cannot.
    """
    at = time.time()
    try:
        question = Question(
            digest=query.digest,
            query=query.model_dump(mode="json"),
            asked_at=at,
            until=at + days * _DAY_SECONDS,
            by=by,
        )
    except ValueError as error:
        raise DataError("who asks is told in 1 to 200 characters, for 1 to 365 days", "give another --by") from error
    envelope = seal_question(question, load_log_key(home))
    if len(envelope) > _MOST_BYTES:
        raise DataError(f"the question has {len(envelope)} bytes, {_MOST_BYTES} are the most", "ask for fewer values")
    log = open_log(home)
    entry = QuestionEntry(at=now(), question=query.digest, statement=envelope.decode())
    with closing(Registry(home.registry)) as registry:
        registry.ask(query.digest, question.until, envelope, noted=lambda: log.append_new(entry))
    log.seal()
    return query.digest


def questions(home: Home) -> tuple[Question, ...]:
    """Every question, the newest first; raises RunError."""
    key = _log_key(home)
    with closing(Registry(home.registry)) as registry:
        return tuple(_opened(envelope, key)[0] for envelope in registry.questions())


def find(home: Home, digest: str) -> str:
    """A question's whole digest, by its first six digits or more; raises RunError."""
    if len(digest) < _LEAST_PREFIX:
        raise RunError(f"'{digest}' is too short", f"give at least {_LEAST_PREFIX} digits of the question's digest")
    found = [question.digest for question in questions(home) if question.digest.startswith(digest.lower())]
    if len(found) != 1:
        what = "no question" if not found else f"{len(found)} questions"
        raise RunError(f"{what} {digest} was asked", "locum cohort --list shows them")
    return found[0]


def result(home: Home, digest: str) -> Result:
    """What has come back to a question, every signature checked; raises RunError."""
    with closing(Registry(home.registry)) as registry:
        envelope = registry.question(digest)
        if envelope is None:
            raise RunError(f"no question {digest[:12]} was asked", "locum cohort --list shows them")
        question, query = _opened(envelope, _log_key(home))
        given = registry.answers(digest)
        members = {site.name: site.certificate for site in registry.sites() if site.revoked_at is None}
    said = {site: _answer(content, certified_key(members[site]), site, digest) for site, content in given.items()}
    return Result(
        question,
        query,
        answers={site: answer for site, answer in said.items() if answer.refused is None},
        refused={site: answer.refused for site, answer in said.items() if answer.refused is not None},
        silent=tuple(sorted(set(members) - set(said))),
    )


def _log_key(home: Home) -> PublicKey:
    return certified_key(load_log_certificate(home))


def _opened(envelope: bytes, key: PublicKey) -> tuple[Question, Query]:
    try:
        return open_question(envelope, key)
    except EnvelopeError as error:
        raise RunError(f"a question is damaged: {error}", "restore the registry from a backup") from error


def _answer(envelope: bytes, key: PublicKey, site: str, digest: str) -> Answer:
    try:
        answer = open_answer(envelope, key)
    except EnvelopeError as error:
        raise RunError(f"the answer of {site} is damaged: {error}", "restore the registry from a backup") from error
    if (answer.site, answer.question) != (site, digest):
        raise RunError(f"the answer of {site} is to something else", "restore the registry from a backup")
    return answer


def named(table: Table) -> str:
    """What a table counts, in words."""
    by = ", ".join(each.by.replace("_", " ") for each in table.dimensions)
    return f"patients by {by}" if by else "patients"
