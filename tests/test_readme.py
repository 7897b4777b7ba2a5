"""The documents are true: what they tell a person to type exists, and what they list is what the code has."""

from __future__ import annotations

import ast
import re
import shlex
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin

import click
import pytest
from pydantic import BaseModel

from locum.common import names
from locum.common.build import check_buildable
from locum.common.cli import locum
from locum.common.errors import Code
from locum.common.plan import Part, Plan, parse_plan
from locum.common.yaml_source import parse_yaml
from locum.server.home import ServerConfig
from locum.server.runs import State
from locum.server.runs_cli import _EXIT, _LEFT
from locum.site_client.configuration import Resources, read_configuration
from locum.site_client.gate import Policy
from locum.site_client.imaging.reasons import Reason
from locum.site_client.imaging.sources import SiteData

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
MAIN = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md"]

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_SPAN = re.compile(r"`([^`\n]+)`")
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
_COMMAND = re.compile(r"^(?:\$ )?(?:sudo -u \S+ )?(?:\.venv/bin/)?((?:locum|make)\b[^#>\n]*)", re.MULTILINE)

each_document = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))


@dataclass(frozen=True)
class Document:
    """A document taken apart: code blocks as (language, content), and its prose without them."""

    blocks: list[tuple[str, str]]
    prose: str

    @property
    def typed(self) -> list[str]:
        """The commands of its code blocks, as a person would type them."""
        shown = (content for language, content in self.blocks if language in {"sh", "console"})
        return [command.strip() for content in shown for command in _COMMAND.findall(content)]

    @property
    def spans(self) -> list[str]:
        """What stands between backticks in its prose."""
        return _SPAN.findall(self.prose)


def _read(path: Path) -> Document:
    text = path.read_text(encoding="utf-8")
    return Document(_FENCE.findall(text), _FENCE.sub("", text))


def _of(name: str) -> Document:
    return _read(ROOT / "docs" / name)


# --- commands


def _command(words: Iterable[str]) -> tuple[click.Command, list[str]]:
    """The command that the words lead to, and the words that are left for it; a word that leads nowhere fails."""
    command: click.Command = locum
    left = list(words)
    while isinstance(command, click.Group) and left:
        word = left.pop(0)
        if word in _options(command):
            if _takes_a_value(command, word):
                left.pop(0)
            continue
        found = command.get_command(click.Context(command), word)
        assert found is not None, f"`locum` has no command '{word}'"
        command = found
    return command, left


def _options(command: click.Command) -> set[str]:
    known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    return known | {"--help", "-h", "--version"}


def _takes_a_value(command: click.Command, option: str) -> bool:
    return any(option in known.opts and not getattr(known, "is_flag", False) for known in command.params)


@each_document
def test_every_locum_command_is_one_that_the_command_line_accepts(path: Path) -> None:
    for line in _read(path).typed:
        program, *words = shlex.split(line)
        if program == "locum":
            command, left = _command(words)
            try:
                command.make_context(line, left)
            except click.UsageError as error:
                pytest.fail(f"{path.name}: `{line}`: {error.format_message()}")


@each_document
def test_every_command_and_option_named_in_a_sentence_exists(path: Path) -> None:
    for span in _read(path).spans:
        if not re.match(r"locum [a-z-]", span):
            continue
        command, left = _command(span.split()[1:])
        unknown = [word for word in left if word.startswith("-") and word not in _options(command)]
        assert unknown == [], f"{path.name}: `{span}`"


@each_document
def test_every_make_target_named_exists(path: Path) -> None:
    document = _read(path)
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    used = {line.split()[1] for line in [*document.typed, *document.spans] if re.match(r"make [a-z]", line)}
    assert used <= targets


def test_the_readme_shows_the_two_commands() -> None:
    assert {"make demo", "make test"} <= set(_read(ROOT / "README.md").typed)


def test_the_documents_hold_commands_of_every_group() -> None:
    typed = {line.split()[1] for path in MAIN for line in _read(path).typed if line.startswith("locum ")}
    assert typed >= set(
        tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["locum.commands"]
    )


def _leaves(command: click.Command, *path: str) -> Iterator[tuple[str, ...]]:
    """Every command that can be typed, as its words."""
    if not isinstance(command, click.Group):
        yield path
        return
    for name in command.list_commands(click.Context(command)):
        inner = command.get_command(click.Context(command), name)
        assert inner is not None
        yield from _leaves(inner, *path, name)


def test_every_command_is_shown_somewhere_as_a_person_types_it() -> None:
    typed = [shlex.split(line)[1:] for path in MAIN for line in _read(path).typed if line.startswith("locum ")]
    shown = {tuple(words[:length]) for words in typed for length in (1, 2, 3)}
    assert [" ".join(words) for words in _leaves(locum) if words not in shown] == []


def test_the_short_form_of_the_quickstart_types_what_the_script_types() -> None:
    script = (ROOT / "docs" / "quickstart.sh").read_text(encoding="utf-8")
    (short,) = [content for _, content in _of("deploy.md").blocks if "--steward" in content]
    assert _paths(short) == _paths(script) - {("simulate",), ("plan", "digest")}


def _paths(content: str) -> set[tuple[str, ...]]:
    """The commands of `locum` in a text, without what is given to them."""
    leaves = set(_leaves(locum))
    found = [tuple(line.split()[:2]) for line in re.findall(r"\blocum ([a-z]+(?: [a-z]+)?)", content)]
    return {words if words in leaves else words[:1] for words in found} & leaves


# --- links


def _anchors(path: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", _read(path).prose, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_document
def test_links_lead_to_files(path: Path) -> None:
    for target in _LINK.findall(_read(path).prose):
        if target.startswith(("https://", "http://")):
            continue
        file, _, anchor = target.partition("#")
        goal = (path.parent / file).resolve() if file else path
        assert goal.exists(), f"{path.name} links to {target}"
        assert not anchor or anchor in _anchors(goal), f"{path.name} links to {target}"


@each_document
def test_no_document_names_a_place_on_one_machine(path: Path) -> None:
    assert not re.search(r"/(work|home|root|tmp|Users)/", path.read_text(encoding="utf-8"))


# --- what the pages list


def _rooms() -> set[str]:
    """The modules that the architecture page lists, as paths without suffix."""
    content = next(content for language, content in _of("architecture.md").blocks if language == "rooms")
    listed, folder = set(), ""
    for line in content.splitlines():
        if not line.startswith(" "):
            folder, _, line = line.partition(" ")  # noqa: PLW2901 - the rest of the line is read as the others are
        listed |= {folder + word for word in line.split(" · ") for word in [word.strip()] if word}
    return listed


def test_the_architecture_page_lists_the_files_that_there_are() -> None:
    folders = ("common", "server", "site_client", "simulations")
    there = {
        str(file.relative_to(ROOT).with_suffix(""))
        for folder in folders
        for file in (ROOT / folder).rglob("*.py")
        if file.stem != "__init__"
    }
    assert _rooms() == there


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if get_origin(annotation) in {Union, UnionType}:
        for inner in get_args(annotation):
            yield from _models(inner)
    elif isinstance(annotation, type) and issubclass(annotation, BaseModel) and annotation is not Part:
        yield annotation


def _keys(model: type[BaseModel]) -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield name
        for inner in _models(field.annotation):
            yield from _keys(inner)


def test_the_plan_page_has_every_key_and_every_name() -> None:
    told = {part for span in _of("plan.md").spans for part in (span, *span.split("."))}
    listed = [*names.NETWORKS, *names.LOSSES, *names.OPTIMISERS, *names.METRICS, *names.STRATEGIES, *names.TRANSFORMS]
    assert [name for name in [*_keys(Plan), *listed, *names.GROUPS] if name not in told] == []


def test_the_site_data_page_has_every_reason_and_every_key() -> None:
    told = set(_of("site-data.md").spans)
    assert [reason for reason in [*Reason, *SiteData.model_fields] if reason not in told] == []


def test_the_agents_page_has_every_key_of_site_yaml() -> None:
    told = set(_of("site.md").spans)
    beside = ["stores", "proxy", "log_level", "policy", "population", "ledger", "resources"]
    keys = [*beside, *Policy.model_fields, *Resources.model_fields]
    assert [key for key in keys if key not in told] == []
    assert {key for key, _ in _top_level("configs/sites/agent.yaml")} | {"proxy", "ledger"} == set(beside)


def _top_level(name: str) -> Iterator[tuple[str, Any]]:
    yield from parse_yaml((ROOT / name).read_bytes()).data.items()


def test_the_deployment_page_has_every_key_of_server_yaml() -> None:
    told = set(_of("deploy.md").spans)
    assert [key for key in ServerConfig.model_fields if key not in told] == []


def test_the_page_on_running_has_every_state_every_exit_code_every_event_and_every_reason() -> None:
    page = _of("running.md")
    told = set(page.spans)
    events = {name for path in ROOT.glob("server/*.py") for name in re.findall(r'emit\(\s*"(\w+)"', path.read_text())}
    assert len(events) > 10
    assert [word for word in [*get_args(State), *events, *(code.name for code in Code)] if word not in told] == []
    codes = {int(code) for code in re.findall(r"^\| (\d+) \|", page.prose, re.MULTILINE)}
    assert codes == {*_EXIT.values(), _LEFT, 0, 1, 2}


def test_every_message_of_the_deployment_page_is_one_that_the_program_says() -> None:
    table = _of("deploy.md").prose.split("## When something is wrong")[1].split("\n## ")[0]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    messages = [message for row in rows for message in _SPAN.findall(row)]
    assert len(messages) > 25
    said = [text for folder in ("common", "server", "site_client") for text in _texts(ROOT / folder)]
    said.append("Hostname Verification Check failed")  # gRPC says this one
    parts = [part.strip() for message in messages for part in message.split("…")]
    assert [part for part in parts if len(part) > 3 and not any(part in text for text in said)] == []


def _texts(folder: Path) -> Iterator[str]:
    """Every text in the code of a folder; what is filled in later is left out of it, in both forms of formatting."""
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield from re.split(r"%\.?\d*[sdf]", node.value)


def test_the_decisions_explain_every_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *(item for extra in project["optional-dependencies"].values() for item in extra)]
    packages = {re.split(r"[\[>=<]", item)[0] for item in asked} - {"locum", "types-pyyaml"}
    text = _of("decisions/0007-dependencies.md").prose
    assert [package for package in sorted(packages) if package not in text] == []


# --- examples


def _examples(name: str) -> list[str]:
    return [content for language, content in _of(name).blocks if language == "yaml"]


def test_the_whole_plan_of_the_plan_page_is_a_plan() -> None:
    (whole,) = [content for content in _examples("plan.md") if content.startswith("locum:")]
    plan = parse_plan(whole.encode())
    assert f"{plan.name}.yaml is a plan: {plan.digest}" in (ROOT / "docs" / "plan.md").read_text(encoding="utf-8")
    assert check_buildable(plan) == []


def test_the_configurations_of_the_agents_page_are_configurations(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    examples = _examples("site.md")
    assert examples
    for number, content in enumerate(examples):
        path = tmp_path / f"{number}.yaml"
        path.write_text(content)
        assert read_configuration(path).policy.stewards == 2


def test_the_site_files_of_the_site_data_page_are_site_files() -> None:
    contents = [parse_yaml(content.encode()).data for content in _examples("site-data.md")]
    read = [SiteData.model_validate(content) for content in contents if "dataset" not in content]
    assert len(read) == 3
