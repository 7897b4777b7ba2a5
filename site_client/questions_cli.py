"""`locum site questions`: who asked this site what about its patients, and what it answered."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from locum.site_client.identity import usable
from locum.site_client.options import Home, Json

if TYPE_CHECKING:
    from pathlib import Path

    from locum.site_client.cohort.memory import Asked


def questions(
    home: Home,
    digest: Annotated[
        str | None,
        typer.Argument(metavar="[DIGEST]", show_default=False, help="A question; without it, all are listed."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Show the cohort questions that came, who asked them and why, and what this site told."""
    from locum.common.errors import RunError

    with usable(home):
        found = [_as_dict(asked) for asked in _asked(home)]
    if digest is not None:
        found = [one for one in found if one["question"].startswith(digest.lower())]
        if not found:
            raise RunError(f"no question {digest} came to this site", "locum site questions lists those that did")
    if as_json:
        typer.echo(json.dumps({"questions": found}, indent=2))
        return
    for one in found:
        typer.echo(_line(one))
        if digest is not None:
            for line in _detail(one):
                typer.echo(line)
    if not found:
        typer.echo("nobody has asked yet")
    elif digest is None:
        typer.echo("next: locum site questions DIGEST")


def _asked(home: Path) -> tuple[Asked, ...]:
    from locum.site_client.cohort.memory import FOLDER, Memory

    return Memory(home / FOLDER).questions()


def _as_dict(asked: Asked) -> dict[str, Any]:
    """A question and its answer, as they were signed."""
    question = json.loads(asked.envelope)["body"]
    answer = json.loads(asked.answer)["body"] if asked.answer is not None else None
    return {
        "question": asked.digest,
        "by": question["by"],
        "asked_at": question["asked_at"],
        "until": question["until"],
        "study": question["query"]["study"],
        "purpose": question["query"]["purpose"],
        "query": question["query"],
        "state": "waits" if answer is None else ("refused" if asked.refused else "answered"),
        "answered_at": asked.answered_at,
        "answer": answer,
    }


def _line(one: dict[str, Any]) -> str:
    from locum.site_client.review import day_and_time, printable

    by, study, purpose = (printable(str(one[key])) for key in ("by", "study", "purpose"))
    told = (
        ""
        if one["answer"] is None
        else f", {sum(cell['patients'] is not None for cell in one['answer']['cells'])} told"
    )
    state = f"{one['state']}{told if one['state'] == 'answered' else ''}"
    return f"{one['question'][:12]}  {day_and_time(one['asked_at'])}  {by}, for {study}: {purpose}: {state}"


def _detail(one: dict[str, Any]) -> list[str]:
    """The question and every cell of the answer."""
    from locum.common.cohort import Query
    from locum.site_client.review import printable

    tables = Query.model_validate(one["query"]).tables
    lines = [printable(json.dumps(one["query"], sort_keys=True))]
    for cell in (one["answer"] or {"cells": ()})["cells"]:
        name = ", ".join([tables[cell["table"]].name, *cell["key"]])
        lines.append(f"  {printable(name)}: {'not told' if cell['patients'] is None else cell['patients']}")
    return lines
