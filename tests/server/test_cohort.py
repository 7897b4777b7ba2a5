"""`locum cohort` at a coordinator: what is wrong with a question costs nothing, and a sum says what it lacks."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from locum.common.cli import main
from locum.common.cohort import Answer, Told, load_query, seal_answer
from locum.common.errors import RunError
from locum.server.cohort import find, result
from locum.server.cohort_cli import words
from locum.server.home import Home
from locum.server.registry import Registry
from tests.server.door import open_door

QUERY = "name: people\nstudy: s\npurpose: to count\ngroup_by: [vendor]\n"


@pytest.fixture
def query(tmp_path: Path) -> Path:
    path = tmp_path / "query.yaml"
    path.write_text(QUERY)
    return path


def test_what_is_wrong_is_told_before_anybody_is_asked(
    tmp_path: Path, query: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with open_door(tmp_path / "coordinator") as door:
        at = ["--home", str(door.home.path)]
        query.write_text(QUERY + "wher: {}\n")
        assert main(["cohort", str(query), *at]) == 2
        assert "query.yaml line 5: wher: unknown key 'wher' — did you mean 'where'?" in capsys.readouterr().err
        assert main(["cohort", str(tmp_path / "none.yaml"), *at]) == 2
        assert main(["cohort", *at]) == 2
        assert main(["cohort", "--show", "abc", *at]) == 1
        assert main(["cohort", "--show", "abcdef", *at]) == 1
        assert "no question abcdef was asked" in capsys.readouterr().err
        assert main(["cohort", "--list", *at]) in {0, None}
        assert "nothing was asked yet" in capsys.readouterr().out
        assert door.registry.questions() == ()


def test_a_sum_counts_what_is_told_and_names_who_is_silent_or_refuses(
    tmp_path: Path, query: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with open_door(tmp_path / "coordinator") as door:
        sites = {name: door.enrol(name) for name in ("berlin", "oslo", "paris", "rome")}
        at = ["--home", str(door.home.path)]
        main(["cohort", str(query), "--wait", "0", "--by", "Team A", *at])
        digest = load_query(query).digest
        _say(door.registry, sites["berlin"].key, Answer(
            site="berlin", question=digest, at=time.time(), least_cell=10,
            cells=(Told(table=0, key=("SIEMENS",), patients=30),
                   Told(table=0, key=("[red]GE",), patients=12))))  # fmt: skip
        _say(door.registry, sites["paris"].key, Answer(
            site="paris", question=digest, at=time.time(), least_cell=5,
            cells=(Told(table=0, key=("SIEMENS",), patients=7),)))  # fmt: skip
        _say(door.registry, sites["rome"].key, Answer(
            site="rome", question=digest, at=time.time(), least_cell=10, refused="cohort"))  # fmt: skip
        found = result(door.home, digest)
        assert [(cell.key, cell.least, cell.few) for cell in found.cells(0)] == [
            (("SIEMENS",), 37, 0),
            (("[red]GE",), 12, 4),
        ]
        assert (found.silent, dict(found.refused)) == (("oslo",), {"rome": "cohort"})
        capsys.readouterr()
        page = tmp_path / "page.html"
        main(["cohort", "--show", digest[:10], "--html", str(page), *at])
        shown = capsys.readouterr().out
        assert "[red]GE" in shown
        assert "≥ 12 (1 not told)" in shown
        assert "fewer than 5 or 10 patients" in shown
        assert "[red]GE" in page.read_text()
        main(["cohort", "--show", digest[:10], "--json", *at])
        assert json.loads(capsys.readouterr().out)["refused"] == {"rome": "cohort"}
        assert main(["cohort", "--show", digest, "--html", str(tmp_path / "no" / "page"), *at]) == 1


def test_a_question_that_is_closed_says_how_to_ask_it_again(tmp_path: Path, query: Path) -> None:
    with open_door(tmp_path / "coordinator") as door:
        door.enrol("berlin")
        main(["cohort", str(query), "--wait", "0", "--days", "0.001", "--home", str(door.home.path)])
        found = result(door.home, find(door.home, load_query(query).digest[:6]))
        over = found.question.model_copy(update={"until": 1.0})
        assert any("another `edition`" in line for line in words(type(found)(over, found.query, {}, {}, found.silent)))


def test_an_answer_that_was_changed_in_the_registry_is_not_shown(tmp_path: Path, query: Path) -> None:
    with open_door(tmp_path / "coordinator") as door:
        door.enrol("berlin")
        main(["cohort", str(query), "--wait", "0", "--home", str(door.home.path)])
        digest = load_query(query).digest
        door.registry.record_answer("berlin", digest, b"{}", noted=lambda: None)
        with pytest.raises(RunError, match="the answer of berlin is damaged"):
            result(Home(door.home.path), digest)


def _say(registry: Registry, key: object, answer: Answer) -> None:
    registry.record_answer(answer.site, answer.question, seal_answer(answer, key), noted=lambda: None)  # type: ignore[arg-type]
