"""The sites file of a simulation: which hospitals there are, and where their data comes from.

Either `emulate:` (hospitals that write their own DICOM, see :mod:`locum.simulations.federations`) or `sites:` (a list
of site configurations as a hospital would write them; `defaults` are keys that every one of them has; relative paths
start at `root`, which starts at the file's own folder).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from locum.common.errors import DataError
from locum.common.names import suggestion
from locum.common.yaml_source import YamlError, read_yaml
from locum.simulations.federations import FederationSpec, federation
from locum.simulations.hospitals import HospitalSpec

_KEYS = ("root", "emulate", "defaults", "sites")


@dataclass(frozen=True)
class RealSite:
    """A site whose data is already there.

    Attributes:
        name: the site's name.
        configuration: the site's file as a mapping.
        base: the folder at which relative paths start.
    """

    name: str
    configuration: Mapping[str, Any]
    base: Path


Site = RealSite | HospitalSpec


def read_sites(path: Path, *, seed: int, count: int | None, root: Path | None = None) -> tuple[Site, ...]:
    """The sites that a file describes.

    Args:
        path: the sites file.
        seed: the seed of emulated hospitals that name none.
        count: how many emulated hospitals; None leaves what the file says.
        root: where the data lies, instead of what the file says.

    Raises:
        DataError: the file is not as described; the message names the line.
    """
    try:
        source = read_yaml(path)
    except YamlError as error:
        raise DataError(str(error), "mend the YAML at that line") from error
    except OSError as error:
        raise DataError(f"the sites file {path} cannot be read: {error.strerror}", "check its path") from error
    content = source.data
    if not isinstance(content, dict) or ("emulate" in content) == ("sites" in content):
        raise DataError(f"{path.name} has neither 'emulate' nor 'sites', or both", "see configs/sites for examples")
    for key in content:
        if key not in _KEYS:
            line = source.line((key,))
            raise DataError(f"{path.name} line {line}: unknown key '{key}'", suggestion(str(key), _KEYS))
    if "emulate" in content:
        return federation(_emulated(path.name, _mapping(path.name, content, "emulate"), seed, count))
    if count is not None:
        raise DataError(f"--sites counts emulated hospitals, and {path.name} lists real ones", "leave --sites out")
    return _listed(path, content, root)


def _mapping(name: str, content: Mapping[str, Any], key: str) -> dict[str, Any]:
    """The mapping under a key; a key without a value has an empty one."""
    given = content.get(key)
    if given is None:
        return {}
    if not isinstance(given, dict):
        raise DataError(f"{name}: '{key}' is no mapping", "write keys with values below it; see configs/sites")
    return given


def _emulated(name: str, given: Mapping[str, Any], seed: int, count: int | None) -> FederationSpec:
    known = {field.name for field in fields(FederationSpec)}
    values = {"sites": 4, "seed": seed, **given}
    for key in values:
        if key not in known:
            raise DataError(f"{name}: emulate has no key '{key}'", suggestion(str(key), known))
    if count is not None:
        values["sites"] = count
    try:
        return TypeAdapter(FederationSpec).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise DataError(f"{name}: emulate.{place}: {first['msg']}", "mend this value") from error


def _listed(path: Path, content: Mapping[str, Any], root: Path | None) -> tuple[RealSite, ...]:
    base = path.parent / str(content.get("root", ".")) if root is None else root
    defaults, listed = _mapping(path.name, content, "defaults"), content["sites"]
    if not isinstance(listed, list) or not all(isinstance(item, dict) and "name" in item for item in listed):
        raise DataError(f"{path.name}: 'sites' is a list of sites, each with a name", "see configs/sites")
    if not listed:
        raise DataError(f"{path.name}: 'sites' lists no site", "list at least one; see configs/sites")
    for name, count in Counter(str(item["name"]) for item in listed).items():
        if count > 1:
            raise DataError(f"{path.name}: {count} sites are called '{name}'", "give each a name of its own")
    return tuple(RealSite(str(item["name"]), _merged(defaults, item), base) for item in listed)


def _merged(defaults: Mapping[str, Any], item: Mapping[str, Any]) -> dict[str, Any]:
    """The defaults with the site's own keys over them; mappings are merged key by key."""
    both = {**defaults, **item}
    for key, value in item.items():
        if isinstance(value, dict) and isinstance(defaults.get(key), dict):
            both[key] = _merged(defaults[key], value)
    return both
