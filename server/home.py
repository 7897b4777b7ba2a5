"""The coordinator's folder: where everything that it keeps lies, and its configuration.

server.yaml        name, host, ports, quotas
authority/         ca.key ca.pem server.key server.pem log.key log.pem        (keys 0600)
registry.sqlite    invitations, sites, certificates, proposals, approvals
log/               the federation's log: entries, tree, checkpoints with the cosignatures of the sites
superlink/         Flower's own state: FLWR_HOME, database, secrets, loopback certificate
runs/RUN/          plan.yaml, events.jsonl, checkpoints/, run.json and what was wanted of the run
spool/RUN/         blobs: down/SHA256, up/SITE/SHA256, and the unfinished up/SITE/SHA256.part
logs/              of the supervised processes
live.json          what each site said last, for `locum watch` and `locum server status`

Files are written whole or not at all; the processes that share the folder run under one account.
"""

from __future__ import annotations

import getpass
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from locum.common.errors import RunError

DEFAULT = "LOCUM_SERVER_HOME"


class ServerConfig(BaseModel):
    """`server.yaml`: what `locum server init` asked for, and what a coordinator may change.

    Attributes:
        name: the federation's name.
        host: the name or address under which hospitals reach the gateway; it stands in the server's certificate.
        port: the gateway's port, the only one that hospitals need.
        listen: the address that the gateway binds.
        superlink_port: the SuperLink's port, on loopback only.
        hints_port: the port of the hints between gateway and round engine, on loopback only.
        site_quota: bytes that one site may have in the spool.
        certificate_days: how long a site's certificate lasts.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9 _.-]{0,63}$")
    host: str = Field(min_length=1, max_length=253)
    port: int = Field(8443, ge=1, le=65535)
    listen: str = "0.0.0.0"  # noqa: S104 - hospitals must reach it; `--listen` narrows it
    superlink_port: int = Field(ge=1, le=65535)
    hints_port: int = Field(ge=1, le=65535)
    site_quota: int = Field(16 << 30, ge=1 << 20)
    certificate_days: float = Field(90, gt=0, le=825)


@dataclass(frozen=True)
class Home:
    """The paths below the coordinator's folder."""

    path: Path

    @property
    def configuration(self) -> Path:
        """`server.yaml`."""
        return self.path / "server.yaml"

    @property
    def authority(self) -> Path:
        """Keys and certificates."""
        return self.path / "authority"

    def certificate_of(self, site: str) -> Path:
        """A site's certificate in a simulation, which has no registry."""
        return self.authority / "sites" / f"{site}.pem"

    @property
    def registry(self) -> Path:
        """The registry's database."""
        return self.path / "registry.sqlite"

    @property
    def log(self) -> Path:
        """The federation's log."""
        return self.path / "log"

    @property
    def superlink(self) -> Path:
        """Flower's own state."""
        return self.path / "superlink"

    @property
    def runs(self) -> Path:
        """One folder a run."""
        return self.path / "runs"

    @property
    def spool(self) -> Path:
        """Blobs of the runs that go on."""
        return self.path / "spool"

    @property
    def logs(self) -> Path:
        """What the supervised processes write."""
        return self.path / "logs"

    @property
    def live(self) -> Path:
        """What each site said last."""
        return self.path / "live.json"


def default_home() -> Path:
    """The folder that commands use when no `--home` is given."""
    given = os.environ.get(DEFAULT)
    return Path(given) if given else Path("locum-server")


def read_config(home: Home) -> ServerConfig:
    """The configuration of an initialised coordinator; raises RunError."""
    try:
        return ServerConfig.model_validate(yaml.safe_load(home.configuration.read_text()))
    except FileNotFoundError as error:
        reason = f"{home.path} holds no coordinator"
        raise RunError(reason, "give its --home, or make one with `locum server init`") from error
    except (OSError, yaml.YAMLError, ValidationError) as error:
        raise RunError(f"{home.configuration} cannot be read: {error}", "mend this file") from error


def who_types() -> str:
    """Who types, as the operating system knows them."""
    with suppress(OSError, KeyError, ImportError):  # what getpass raises for an account without a name
        return getpass.getuser()
    return f"user {os.getuid()}"
