"""`site.yaml`, an agent's configuration: where the images are, what is allowed, what the worker may take.

Rules:
  * `stores` names catalogs that `locum site ingest` has filled. The keys of a data file (`sources`, `labels`, …: see
    :mod:`locum.site_client.imaging.sources`) may stand in the same file, so that `ingest` reads it too; without
    `stores` the catalog is then `store` beside the file.
  * Unknown keys are fatal, with the line and the nearest key. Nothing here can loosen a plan.
  * Relative paths start at the folder of the file.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator

from locum.common.errors import DataError
from locum.common.names import suggestion
from locum.common.yaml_source import Source as Document
from locum.site_client.gate import Policy
from locum.site_client.imaging.sources import SiteData, load_site, mistake, read_site_file
from locum.site_client.settings import Settings

FILE, LEDGER = "site.yaml", "ledger.sqlite"
_STRICT = ConfigDict(extra="forbid", frozen=True)
_GIB = 1 << 30
_CACHE = 2 * _GIB
_PROXY = re.compile(r"http://([^\s@/]+@)?(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9.-]+):\d{1,5}/?")


def checked_proxy(address: str) -> str:
    """The address of an HTTP proxy; raises ValueError if it can be none."""
    if not _PROXY.fullmatch(address):
        raise ValueError("write the proxy as http://host:port")
    return address


def _cpus_here() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _cpus(value: Any) -> Any:
    """A number of CPUs as the first so many that this process may use; a list as it is."""
    here = _cpus_here()
    if not hasattr(os, "sched_setaffinity"):
        raise ValueError("this system cannot keep a program on some of its CPUs: leave the key out")
    wanted = here[:value] if isinstance(value, int) and not isinstance(value, bool) and value > 0 else value
    if not isinstance(wanted, list) or not wanted:
        raise ValueError("give the number of CPUs, or the list of their numbers")
    if isinstance(value, int) and value > len(here):
        raise ValueError(f"{value} CPUs are more than the {len(here)} there are")
    missing = [cpu for cpu in wanted if cpu not in here]
    if missing:
        raise ValueError(f"there is no CPU {missing[0]} here; there are {', '.join(map(str, here))}")
    return tuple(wanted)


class Resources(BaseModel):
    """What the worker may take of the machine. None: no limit.

    Attributes:
        threads: CPU threads of torch; as many as CPUs unless told.
        cpus: the CPUs it may run on, by number or by how many.
        memory_gib: its memory in GiB, 0.6 of it for the libraries; a quarter of it holds prepared cases.
        device: `auto` (the GPU where there is one), `cpu`, `cuda`, or one GPU such as `cuda:1`.
        gpu_memory_fraction: its share of the GPU's memory.
        nice: how far it steps back for other programs, from 0 to 19.
    """

    model_config = _STRICT

    threads: int | None = Field(None, ge=1, le=1024)
    cpus: Annotated[tuple[int, ...], BeforeValidator(_cpus)] | None = None
    memory_gib: float | None = Field(None, ge=1, le=1 << 20)
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d{1,2})?)$")
    gpu_memory_fraction: float | None = Field(None, gt=0, le=1)
    nice: int = Field(0, ge=0, le=19)


class _Agent(BaseModel):
    """The keys of the file that are the agent's own."""

    model_config = _STRICT

    stores: Annotated[tuple[Path, ...], Field(min_length=1)] | None = None
    policy: Policy = Policy()
    population: str = Field("patients", pattern=r"^[A-Za-z0-9][A-Za-z0-9 _.-]{0,63}$")
    ledger: Path = Path(LEDGER)
    resources: Resources = Resources()
    proxy: str | None = None
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    rehearsal: bool = False

    @field_validator("proxy")
    @classmethod
    def _an_address(cls, value: str | None) -> str | None:
        return None if value is None else checked_proxy(value)


_DATA_KEYS = (*SiteData.model_fields, "dataset")
_KEYS = (*_Agent.model_fields, *_DATA_KEYS)
_PARTS: Mapping[str, type[BaseModel]] = {"policy": Policy, "resources": Resources}


class Accounts(NamedTuple):
    """Where it stands what was spent of whose privacy.

    Attributes:
        ledger: the ledger's file, absolute; agents that share patients share it.
        population: the steward's name for the patients behind this site's stores.
    """

    ledger: Path
    population: str


@dataclass(frozen=True)
class SiteConfiguration:
    """What an agent is told by its hospital.

    Attributes:
        stores: folders of catalogs, absolute.
        policy: what the site allows.
        accounts: where it stands what was spent of whose privacy.
        resources: what the worker may take.
        proxy: the HTTP proxy on the way out, `http://host:port`.
        log_level: how much the agent writes into its log.
        rehearsal: whether updates are rounded by the plan's seed, so that a rehearsal gives the same bits again.
        data: the images that `locum site ingest` reads, if the file says so.
    """

    stores: tuple[Path, ...]
    accounts: Accounts = field(default_factory=lambda: Accounts(Path(LEDGER), "patients"))
    policy: Policy = field(default_factory=Policy)
    resources: Resources = field(default_factory=Resources)
    proxy: str | None = field(default=None, repr=False)  # it may hold a password
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    rehearsal: bool = False
    data: SiteData | None = None

    def settings(self, site: str, run_dir: Path) -> Settings:
        """How the worker of the site named `site` runs."""
        asked = self.resources
        memory = None if asked.memory_gib is None else int(asked.memory_gib * _GIB)
        cpus = asked.cpus or ()
        return Settings(
            site=site,
            stores=self.stores,
            run_dir=run_dir,
            threads=asked.threads or len(cpus) or len(_cpus_here()),
            cache_bytes=_CACHE if memory is None else min(_CACHE, memory // 4),
            device=asked.device,
            cpus=cpus,
            memory_bytes=memory,
            nice=asked.nice,
            gpu_memory_fraction=asked.gpu_memory_fraction,
        )


def read_configuration(path: Path) -> SiteConfiguration:
    """Reads and checks an agent's `site.yaml`; raises DataError with the line and the key."""
    document, own = _read(path)
    data = _data(document, path) if _names_data(document) else None
    return SiteConfiguration(
        stores=_stores(document, own.stores, path),
        accounts=_accounts(own, path),
        policy=own.policy,
        resources=own.resources,
        proxy=own.proxy,
        log_level=own.log_level,
        rehearsal=own.rehearsal,
        data=data,
    )


def read_policy(path: Path) -> Policy:
    """The policy alone: a steward reviews plans at a desk that need not reach the images. Raises DataError."""
    return _read(path)[1].policy


def read_accounts(path: Path) -> Accounts:
    """Where the ledger is, and whose patients it is about here; raises DataError."""
    return _accounts(_read(path)[1], path)


def read_data(path: Path) -> SiteData:
    """The images that a site file names, whether or not it is an agent's too; raises DataError."""
    return _data(_read(path)[0], path)


def _read(path: Path) -> tuple[Document, _Agent]:
    if not path.exists():
        raise DataError(f"there is no {path}", "write one; configs/sites/agent.yaml shows every key it can have")
    document = read_site_file(path)
    unknown = [key for key in document.data if key not in _KEYS]
    if unknown:
        where = f"{document.name}, line {document.line((unknown[0],))}"
        raise DataError(f"{where}: there is no key '{unknown[0]}'", suggestion(unknown[0], _KEYS))
    own = {key: value for key, value in document.data.items() if key in _Agent.model_fields}
    try:
        return document, _Agent.model_validate(own)
    except ValidationError as error:
        raise mistake(document, error, _keys_beside) from None


def _accounts(own: _Agent, path: Path) -> Accounts:
    return Accounts(path.parent.absolute() / own.ledger.expanduser(), own.population)


def _keys_beside(location: tuple[int | str, ...]) -> tuple[str, ...]:
    return tuple(_PARTS.get(str(location[0]), _Agent).model_fields)


def _names_data(document: Document) -> bool:
    return any(key in document.data for key in _DATA_KEYS if key not in {"name", "root"})


def _data(document: Document, path: Path) -> SiteData:
    kept = {key: value for key, value in document.data.items() if key in _DATA_KEYS}
    return load_site(replace(document, data=kept), base=path.parent)


def _stores(document: Document, given: tuple[Path, ...] | None, path: Path) -> tuple[Path, ...]:
    folder = path.parent.absolute()
    if given is None:
        if not _names_data(document):
            raise DataError(
                f"{path} names neither stores nor sources", "add `stores: [DIR]`, a store that was ingested"
            )
        return (folder / "store",)
    stores = tuple(folder / store.expanduser() for store in given)
    for index, store in enumerate(stores):
        if not store.is_dir():
            where = f"{document.name}, line {document.line(('stores', index))}"
            raise DataError(f"{where}: there is no store {store}", "fill it with `locum site ingest`, or mend the path")
    return stores
