"""The reviewer's page is true: every command on it is run on a bundle, and says what the page shows."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest

from locum.common.audit.bundle import LIMITS
from locum.common.audit.verify import TITLES
from locum.common.cli import main
from locum.common.identity import certificate_pem
from locum.common.log.entries import written
from tests.audits import Federation, model_of
from tests.plans import secured

PAGE = Path(__file__).resolve().parent.parent / "docs" / "for-reviewers.md"
SITES = ("lakeview", "north", "riverside", "st-anne")
PRIVACY = {"epsilon": 4.0, "delta": 1e-6, "clip": 1.0, "metrics_epsilon": 1.0}

_BLOCK = re.compile(r"^```console\n(.*?)^```", re.MULTILINE | re.DOTALL)
#: What another key makes other: digests, and the sizes of signatures.
_DIGEST = re.compile(r"\b[0-9a-f]{12,64}\b")


def lay_out(folder: Path) -> Federation:
    """What a reviewer has: `run.zip`, `ca.pem`, the model with its statement, and the log of a hospital."""
    plan = secured(
        name="liver-lesions", purpose="finds CT slices with a liver lesion", rounds=7,
        protection__differential_privacy=PRIVACY, release__training_loss=False,
    )  # fmt: skip
    federation = Federation(folder / "federation", plan, sites=SITES)
    entries = federation.history()
    (late,) = [n for n, entry in enumerate(entries) if entry.kind == "round" and entry.round == 7]
    entries[late] = federation.round(7, 70, sites=SITES[1:], refused={"lakeview": "LATE"})
    entries[-1] = federation.end(81, status="completed with losses")
    notes = federation.witnessed(federation.checkpoints(map(written, entries)), minutes=90)
    statement = federation.statement(entries, notes)
    shutil.move(federation.bundle(entries, notes=notes, statement_json=statement), folder / "run.zip")
    (folder / "ca.pem").write_bytes(certificate_pem(federation.authority.certificate))
    (folder / "model.safetensors").write_bytes(model_of(7))
    (folder / "statement.json").write_bytes(statement)
    lines = dict(zip(SITES, notes[-1].splitlines()[-len(SITES) :], strict=True))
    releases = federation.releases("riverside", line=lines["riverside"])
    shutil.move(federation.site_log("riverside", releases), folder / "riverside-log")
    return federation


def blocks() -> list[tuple[str, list[str]]]:
    """The commands of the page, each with the output that is shown below it."""
    found = []
    for content in _BLOCK.findall(PAGE.read_text(encoding="utf-8")):
        command, *shown = content.splitlines()
        assert command.startswith("$ locum audit "), command
        found.append((command.removeprefix("$ locum "), shown))
    return found


def plain(text: str) -> str:
    """A line without what is another one in every federation."""
    return re.sub(r"\s+", " ", _DIGEST.sub("#", text)).strip()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reviewer's folder."""
    made = tmp_path_factory.mktemp("reviewer")
    lay_out(made)
    return made


def test_the_page_answers_ten_questions() -> None:
    questions = re.findall(r"^## \d+\. .+\?$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(questions) == 10
    assert [int(re.findall(r"\d+", question)[0]) for question in questions] == list(range(1, 11))
    answered = re.split(r"^## \d+\. ", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    assert all(_BLOCK.search(answer) for answer in answered)


@pytest.mark.parametrize(("command", "shown"), blocks(), ids=[command for command, _ in blocks()])
def test_a_command_says_what_the_page_shows(
    folder: Path, command: str, shown: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    assert main(shlex.split(command)) in {None, 0}
    told = [plain(line) for line in capsys.readouterr().out.splitlines()]
    at = 0
    for line in shown:
        if line.strip() in {"…", ""}:
            continue
        assert plain(line) in told[at:], f"{line!r} is not in:\n" + "\n".join(told)
        at = told.index(plain(line), at) + 1


def test_every_message_of_the_page_on_the_record_is_one_that_the_program_says() -> None:
    root = PAGE.parent.parent
    listed = (root / "docs" / "audit.md").read_text(encoding="utf-8").split("## When something is wrong")[1]
    messages = re.findall(r"^\| `([^`]+)`", listed, re.MULTILINE)
    code = "".join(path.read_text(encoding="utf-8") for path in (root / "common" / "audit").glob("*.py"))
    assert len(messages) > 5
    assert [message for message in messages if message not in code] == []


def test_the_page_on_the_record_has_every_check_and_every_member() -> None:
    page = (PAGE.parent / "audit.md").read_text(encoding="utf-8")
    assert [title for number, title in TITLES.items() if f"| {number} | **{title}**" not in page] == []
    assert [name for name in LIMITS if f"| `{name}` |" not in page] == []
