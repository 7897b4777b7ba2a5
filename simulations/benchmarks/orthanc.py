"""A real PACS to measure and test against: Orthanc with its DICOMweb plugin, in a network of its own.

Rules:
  * It runs in a network namespace, because it listens on every address; a few ports of loopback lead to it.
  * That it has DICOMweb is checked: it starts without the plugin and says nothing.
"""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import requests

from locum.common.errors import RunError
from locum.simulations.benchmarks.own_network import Room, enter, own_network, pass_on

PLUGIN = Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so")
TITLE = "ORTHANC"
_HTTP, _DIMSE, _STORE = 8042, 4242, 11112
_SECONDS_TO_START = 30


@dataclass(frozen=True)
class Orthanc:
    """One that runs.

    Attributes:
        port: on loopback, of HTTP (HTTPS with `certificate`); `dimse` of DICOM's own protocol.
        certificate: whether it speaks TLS, and with what (PEM, key included).
        user: name and password that HTTP asks for, or None.
        process: the namespace it lives in.
    """

    port: int
    dimse: int
    process: subprocess.Popen[bytes]
    certificate: Path | None = None
    user: tuple[str, str] | None = None

    @property
    def url(self) -> str:
        """Of the DICOMweb service."""
        return f"{self._root}/dicom-web"

    @property
    def _root(self) -> str:
        return f"http{'s' if self.certificate else ''}://localhost:{self.port}"

    def rest(self, method: str, path: str, data: bytes | None = None) -> requests.Response:
        """One request of Orthanc's own interface."""
        # The certificate is one that a test has made, an expired one among them: it is not looked at here.
        return requests.request(method, self._root + path, data=data, auth=self.user, verify=False, timeout=30)  # noqa: S501

    def load(self, files: Iterable[bytes]) -> None:
        """Give it images."""
        for content in files:
            self.rest("POST", "/instances", content).raise_for_status()

    def empty(self) -> None:
        """Take all images away."""
        for patient in self.rest("GET", "/patients").json():
            self.rest("DELETE", f"/patients/{patient}").raise_for_status()


def missing() -> str:
    """Why Orthanc cannot be started on this machine; empty if it can."""
    if not shutil.which("Orthanc"):
        return "Orthanc is not installed (apt-get install orthanc orthanc-dicomweb)"
    if not PLUGIN.exists():
        return "Orthanc's DICOMweb plugin is not installed (apt-get install orthanc-dicomweb)"
    if own_network() is None:
        return "Orthanc listens on every address, and this account may not make a network namespace"
    return ""


@dataclass(frozen=True)
class Setting:
    """How one is set up.

    Attributes:
        certificate: PEM with key and certificate, for TLS.
        user: name and password that HTTP asks for.
        stations: application entity title to the port of loopback at which it takes images (C-MOVE), or None.
        options: further keys of Orthanc's configuration.
    """

    certificate: Path | None = None
    user: tuple[str, str] | None = None
    stations: Mapping[str, int | None] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)


@contextmanager
def running(setting: Setting | None = None) -> Iterator[Orthanc]:
    """An Orthanc that ends with the context.

    Raises:
        RunError: it cannot be started here.
    """
    setting, entrance = setting or Setting(), own_network()
    if (reason := missing()) or entrance is None:
        raise RunError(reason, "install it, or leave this out")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        web, dimse = (stack.enter_context(closing(socket.create_server(("127.0.0.1", 0)))) for _ in range(2))
        exits = [_way_out(stack, folder, number, port) for number, port in enumerate(_ports(setting))]
        configuration = folder / "orthanc.json"
        configuration.write_text(json.dumps(_configuration(setting, folder)), encoding="utf-8")
        doors = [(web.fileno(), _HTTP), (dimse.fileno(), _DIMSE)]
        log = stack.enter_context((folder / "log").open("wb"))
        process = enter(Room(["Orthanc", str(configuration)], doors, exits), entrance, log.fileno())
        stack.callback(_end, process)
        found = Orthanc(web.getsockname()[1], dimse.getsockname()[1], process, setting.certificate, setting.user)
        _wait(found, folder / "log")
        yield found


def _ports(setting: Setting) -> list[int]:
    return [port for port in setting.stations.values() if port is not None]


def _way_out(stack: ExitStack, folder: Path, number: int, port: int) -> tuple[int, str]:
    path = str(folder / f"out{number}")
    listening = stack.enter_context(closing(socket.socket(socket.AF_UNIX)))
    listening.bind(path)
    listening.listen()
    threading.Thread(
        target=pass_on, args=(listening, lambda: socket.create_connection(("127.0.0.1", port))), daemon=True
    ).start()
    return _STORE + number, path


def _configuration(setting: Setting, folder: Path) -> dict[str, Any]:
    outs = {port: _STORE + number for number, port in enumerate(_ports(setting))}
    stations = {
        f"s{number}": {"AET": title, "Host": "127.0.0.1", "Port": outs.get(port or 0, 9), "AllowEcho": True,
                       "AllowFind": True, "AllowGet": True, "AllowMove": True, "AllowStore": False}
        for number, (title, port) in enumerate(setting.stations.items())
    }  # fmt: skip
    plain = {
        "Name": "test",
        "StorageDirectory": str(folder / "storage"),
        "IndexDirectory": str(folder / "storage"),
        "Plugins": [str(PLUGIN)],
        "HttpPort": _HTTP,
        "HttpCompressionEnabled": False,
        "RemoteAccessAllowed": True,
        "AuthenticationEnabled": setting.user is not None,
        "RegisteredUsers": dict([setting.user]) if setting.user else {},
        "SslEnabled": setting.certificate is not None,
        "SslCertificate": str(setting.certificate or ""),
        "DicomAet": TITLE,
        "DicomPort": _DIMSE,
        "DicomCheckCalledAet": True,
        "DicomAlwaysAllowEcho": False,
        "DicomAlwaysAllowFind": False,
        "DicomAlwaysAllowGet": False,
        "DicomAlwaysAllowMove": False,
        "DicomAlwaysAllowStore": False,
        "DicomModalities": stations,
        "DicomWeb": {"Enable": True, "Root": "/dicom-web/"},
    }
    return plain | dict(setting.options)


def _wait(orthanc: Orthanc, log: Path) -> None:
    """Raise RunError unless it answers, with DICOMweb, within half a minute."""
    ends = time.monotonic() + _SECONDS_TO_START
    while time.monotonic() < ends and orthanc.process.poll() is None:
        try:
            plugins = orthanc.rest("GET", "/plugins").json()
        except (requests.RequestException, ValueError):
            time.sleep(0.05)
            continue
        if "dicom-web" in plugins:
            return
        raise RunError("Orthanc runs without its DICOMweb plugin", "install orthanc-dicomweb of the same release")
    raise RunError(f"Orthanc does not start: {log.read_text(errors='replace')[-500:]}", "see its log")


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.stdin is not None:
        process.stdin.close()
    process.wait(15)
