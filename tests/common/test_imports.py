"""Imports go one way, and the light parts stay light."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ALLOWED = {
    "common": {"common"},
    "configs": {"configs"},
    "server": {"server", "common"},
    "site_client": {"site_client", "common"},
    "simulations": {"simulations", "server", "site_client", "common", "configs"},
}
HEAVY = {"torch", "monai", "pydicom", "highdicom", "nibabel"}


def _imported(path: Path) -> Iterator[tuple[str, int]]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports relatively"
            names = [f"{node.module}.{alias.name}" for alias in node.names] if node.module == "locum" else [node.module]
            yield from ((name or "", node.lineno) for name in names)


@pytest.mark.parametrize("folder", sorted(ALLOWED))
def test_imports_go_one_way(project: Path, folder: str) -> None:
    wrong = [
        f"{path.relative_to(project)}:{line} imports {name}"
        for path in sorted((project / folder).rglob("*.py"))
        for name, line in _imported(path)
        if name.split(".")[0] == "locum" and name.split(".")[1] not in ALLOWED[folder]
    ]
    assert wrong == []


def test_nothing_is_imported_by_its_folder_name(project: Path) -> None:
    wrong = [
        f"{path}:{line}" for folder in ALLOWED for path in (project / folder).rglob("*.py")
        for name, line in _imported(path) if name.split(".")[0] in ALLOWED
    ]  # fmt: skip
    assert wrong == []


def test_common_loads_neither_torch_nor_imaging_libraries(project: Path) -> None:
    files = [path.relative_to(project).with_suffix("") for path in (project / "common").rglob("*.py")]
    modules = [".".join(("locum", *file.parts)).removesuffix(".__init__") for file in files]
    code = f"import sys, importlib\nfor name in {modules!r}: importlib.import_module(name)\n"
    code += f"print(sorted({HEAVY!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_help_of_the_command_line_loads_no_heavy_module() -> None:
    code = "import sys\nsys.argv = ['locum', '--help']\nfrom locum.common.cli import main\nmain()\n"
    code += f"print(sorted(({HEAVY!r} | {{'flwr', 'pydantic', 'matplotlib'}}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_every_package_of_the_folders_is_in_the_distribution(project: Path) -> None:
    import tomllib

    listed = set(tomllib.loads((project / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    found = {
        "locum." + ".".join(path.parent.relative_to(project).parts)
        for folder in ALLOWED
        for path in (project / folder).rglob("__init__.py")
    }
    assert found == listed


#: The adapters to Flower's private parts; everything else keeps to what Flower offers an app.
_ADAPTERS = {
    "site_client/fleet.py",
    "server/gateway/fleet.py",
    "server/superlink.py",
    "simulations/engines/local.py",
    "simulations/benchmarks/flower_secagg.py",
}


def test_private_parts_of_flower_are_used_in_its_adapters_only(project: Path) -> None:
    private = re.compile(r"^\s*(?:from|import) flwr\.(?!app\b|serverapp\b|clientapp\b)", re.MULTILINE)
    files = [path for folder in ALLOWED for path in (project / folder).rglob("*.py")]
    users = {str(path.relative_to(project)) for path in files if private.search(path.read_text())}
    assert users == _ADAPTERS
