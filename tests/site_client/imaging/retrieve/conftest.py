"""A site that retrieves from a PACS, with what it waited and told."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pydicom
import pytest
from pydicom.dataset import Dataset

from locum.site_client.imaging.deid.engine import Deidentifier
from locum.site_client.imaging.ingest import Progress
from locum.site_client.imaging.items import Item
from locum.site_client.imaging.keys import Keys
from locum.site_client.imaging.reasons import Reason
from locum.site_client.imaging.retrieve.pacs import retrieve
from locum.site_client.imaging.retrieve.spool import spooled
from locum.site_client.imaging.sources import load_site
from locum.site_client.imaging.store import exclusive
from tests.orthanc import Study, authority, one_orthanc, orthanc, stack, start_orthanc

__all__ = ["authority", "one_orthanc", "orthanc", "stack", "start_orthanc"]

KEYS = Keys.of(bytes(range(32)))
WAYS = ("dicomweb", "get", "move")


@dataclass
class Site:
    """A site with one store.

    Attributes:
        waits: seconds that a retrieval wanted to wait after failures; none are waited, unless `sleep` does it.
        told: the progress that was told.
    """

    store: Path
    keys: Keys = KEYS
    waits: list[float] = field(default_factory=list)
    told: list[Progress] = field(default_factory=list)
    sleep: Callable[[float], object] | None = None

    def retrieve(self, *sources: Mapping[str, Any], **parts: Any) -> list[Item]:
        site = load_site({"name": "north", "root": str(self.store.parent), "sources": list(sources), **parts})
        clean = Deidentifier(site.deidentification, self.keys)
        with exclusive(self.store):
            retrieve(site, self.store, self.keys, clean, self.told.append, sleep=self.sleep or self.waits.append)
        return self.items()

    def items(self, source: int = 0) -> list[Item]:
        return list(spooled(self.store, source))

    def files(self) -> list[Path]:
        return sorted(path for path in self.store.rglob("*") if path.is_file())

    def content(self, source: int = 0) -> dict[str, tuple[bytes, Any]]:
        """Of each item its file (none is empty), and why it is refused."""
        items = self.items(source)
        return {i.name: (i.path.read_bytes() if i.path.exists() else b"", i.refused) for i in items}

    def images(self) -> list[Dataset]:
        return [pydicom.dcmread(item.path) for item in self.items() if item.refused is None]


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path / "store")


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def accessions(site: Site, *studies: Study) -> dict[str, str]:
    """A query by accession number, as a site file has it."""
    path = site.store.parent / "accessions.txt"
    path.write_text("".join(f"{study.accession}\n" for study in studies), encoding="utf-8")
    return {"accessions": str(path)}


def reasons(items: list[Item]) -> list[Reason | None]:
    return [item.refused[0] if item.refused else None for item in items]
