"""What `configs/deploy/` ships can be installed: units that systemd takes, Containerfiles whose every path exists."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections import defaultdict
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import click
import pytest

from locum.common.cli import locum

_UNITS = ("locum-server.service", "locum-site.service")
_CONTAINERFILES = ("Containerfile.server", "Containerfile.site")

each_unit = pytest.mark.parametrize("name", _UNITS)
each_containerfile = pytest.mark.parametrize("name", _CONTAINERFILES)

#: What a unit of ours takes away from its processes.
_HARDENED = {
    "NoNewPrivileges": "yes",
    "CapabilityBoundingSet": "",
    "ProtectSystem": "strict",
    "ProtectHome": "yes",
    "PrivateTmp": "yes",
    "ProtectKernelTunables": "yes",
    "ProtectKernelModules": "yes",
    "ProtectControlGroups": "yes",
    "RestrictNamespaces": "yes",
    "RestrictSUIDSGID": "yes",
    "LockPersonality": "yes",
    "SystemCallFilter": "@system-service",
    "StateDirectoryMode": "0700",
    "UMask": "0077",
}


@pytest.fixture
def folder(project: Path) -> Path:
    return project / "configs" / "deploy"


def test_everything_for_a_deployment_is_in_the_distribution(project: Path, folder: Path) -> None:
    data = tomllib.loads((project / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    files = [f"deploy/{path.name}" for path in folder.iterdir()]
    assert sorted(files) == sorted(f"deploy/{name}" for name in (*_UNITS, *_CONTAINERFILES))
    assert [file for file in files if not any(fnmatch(file, pattern) for pattern in data["locum.configs"])] == []


def accepts(*words: str) -> None:
    """Fails unless `locum` takes these words."""
    command: click.Command = locum
    left = list(words)
    while isinstance(command, click.Group):
        found = command.get_command(click.Context(command), left.pop(0))
        assert found is not None, words
        command = found
    command.make_context("locum", left)


# --- systemd


def _unit(path: Path) -> dict[str, dict[str, list[str]]]:
    """Sections, keys and their values, in order."""
    sections: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    section = ""
    for line in path.read_text(encoding="utf-8").splitlines():
        if heading := re.fullmatch(r"\[(\w+)\]", line):
            section = heading[1]
        elif line and not line.startswith("#"):
            key, equals, value = line.partition("=")
            assert equals, line
            assert section, line
            sections[section][key].append(value)
    return sections


@each_unit
def test_a_service_has_an_account_of_its_own_and_starts_again_for_ever(folder: Path, name: str) -> None:
    unit = _unit(folder / name)
    service, account = unit["Service"], name.removesuffix(".service")
    assert service["User"] == service["Group"] == service["StateDirectory"] == [account]
    assert service["Restart"] == ["always"]
    assert unit["Unit"]["StartLimitIntervalSec"] == ["0"]
    assert unit["Install"]["WantedBy"] == ["multi-user.target"]


@each_unit
def test_a_service_may_do_no_more_than_it_needs(folder: Path, name: str) -> None:
    service = _unit(folder / name)["Service"]
    assert {key: service[key] for key in _HARDENED} == {key: [value] for key, value in _HARDENED.items()}
    assert "PrivateDevices" in service or "DevicePolicy" in service


@each_unit
def test_a_service_starts_a_command_that_there_is_in_the_folder_that_the_account_has(folder: Path, name: str) -> None:
    service = _unit(folder / name)["Service"]
    (line,) = service["ExecStart"]
    program, *words = shlex.split(line)
    assert program == "/opt/locum/bin/locum"
    accepts(*words)
    home = {"locum-server.service": "LOCUM_SERVER_HOME", "locum-site.service": "LOCUM_SITE_HOME"}[name]
    assert f"{home}=%S/{service['StateDirectory'][0]}" in service["Environment"][0].split()


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="there is no systemd here")
@each_unit
def test_systemd_finds_nothing_wrong_with_a_unit(folder: Path, tmp_path: Path, name: str) -> None:
    installed = Path(sys.executable).with_name("locum")
    unit = tmp_path / name
    unit.write_text((folder / name).read_text().replace("/opt/locum/bin/locum", str(installed)))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(unit)], check=False, capture_output=True, text=True, timeout=60
    )
    told = [line for line in (done.stdout + done.stderr).splitlines() if name in line]
    assert (done.returncode, told) == (0, [])


# --- containers


def _instructions(path: Path) -> list[tuple[str, str]]:
    """The instructions of a Containerfile, continued lines joined."""
    text = "\n".join(line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("#"))
    lines = [line for line in text.replace("\\\n", " ").splitlines() if line.strip()]
    parted = [line.partition(" ") for line in lines]
    return [(word, " ".join(rest.split())) for word, _, rest in parted]


def _stages(path: Path) -> Iterator[list[tuple[str, str]]]:
    stage: list[tuple[str, str]] = []
    for word, rest in _instructions(path):
        if word == "FROM" and any(before == "FROM" for before, _ in stage):
            yield stage
            stage = []
        stage.append((word, rest))
    yield stage


def _of(stage: list[tuple[str, str]], word: str) -> list[str]:
    return [rest for found, rest in stage if found == word]


_KNOWN = {
    *("ARG", "FROM", "WORKDIR", "COPY", "RUN", "ENV", "USER", "VOLUME", "EXPOSE", "STOPSIGNAL", "ENTRYPOINT", "CMD"),
}


@each_containerfile
def test_a_containerfile_copies_what_there_is_and_all_that_the_installation_needs(
    project: Path, folder: Path, name: str
) -> None:
    build, _ = _stages(folder / name)
    assert {word for word, _ in _instructions(folder / name)} <= _KNOWN
    copied = [source for line in _of(build, "COPY") for source in line.split()[:-1]]
    assert [source for source in copied if not (project / source).exists()] == []
    setuptools = tomllib.loads((project / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert set(copied) >= {"pyproject.toml", "README.md", "LICENSE", *setuptools["package-dir"].values()} - {"."}
    assert set(copied) >= {package.split(".")[1] for package in setuptools["packages"]}


@each_containerfile
def test_an_image_is_installed_at_the_pinned_versions(project: Path, folder: Path, name: str) -> None:
    build, _ = _stages(folder / name)
    (run,) = _of(build, "RUN")
    (constraints,) = re.findall(r"-c (\S+)", run)
    assert (project / constraints).is_file()
    extra = name.removeprefix("Containerfile.")
    assert f"'.[{extra}]'" in run
    assert extra in tomllib.loads((project / "pyproject.toml").read_text())["project"]["optional-dependencies"]


@each_containerfile
def test_an_image_runs_without_root_and_holds_no_secret(folder: Path, name: str) -> None:
    build, image = _stages(folder / name)
    words = [word for word, _ in image]
    (user,) = _of(image, "USER")
    assert re.fullmatch(r"[1-9]\d{3,}:[1-9]\d{3,}", user)
    assert words.index("USER") < words.index("ENTRYPOINT")
    assert all(line.startswith("--from=build /opt/locum ") for line in _of(image, "COPY"))
    given = " ".join(_of(build, "ARG") + _of(build, "ENV") + _of(image, "ARG") + _of(image, "ENV"))
    assert not re.search(r"token|secret|password|key|index", given, re.IGNORECASE)
    assert "--mount=type=secret" in _of(build, "RUN")[0]


@each_containerfile
def test_an_image_starts_a_command_that_there_is_in_its_volume(folder: Path, name: str) -> None:
    _, image = _stages(folder / name)
    (entry,), (command,), (volume,) = (_of(image, word) for word in ("ENTRYPOINT", "CMD", "VOLUME"))
    assert entry == '["locum"]'
    accepts(*re.findall(r'"(\w+)"', command))
    (environment,) = _of(image, "ENV")
    (path,) = re.findall(r'"(.+)"', volume)
    assert re.search(rf"LOCUM_(SERVER|SITE)_HOME={path}/\w+", environment)
