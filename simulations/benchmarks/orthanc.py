"""A real PACS to measure and test against: Orthanc with its DICOMweb plugin, in a network of its own.

Rules:
  * It runs in a network namespace, because it listens on every address; a few ports of loopback lead to it.
  * That it has DICOMweb is checked: it starts without the plugin and says nothing.
  * TLS is put in front of it, as hospitals do with a proxy: HTTPS of Debian's Orthanc 1.10.1 ends with a segmentation
    fault at the first request.
"""

from __future__ import annotations

import json
import select
import shutil
import socket
import ssl
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, suppress
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
        port: on loopback, of HTTP; `dimse` of DICOM's own protocol.
        secure: the port of HTTPS, if it was given a certificate.
        user: name and password that HTTP asks for, or None.
        process: the namespace it lives in.
    """

    port: int
    dimse: int
    process: subprocess.Popen[bytes]
    secure: int | None = None
    user: tuple[str, str] | None = None

    @property
    def url(self) -> str:
        """Of the DICOMweb service, by HTTPS if it has that."""
        return (
            f"https://localhost:{self.secure}/dicom-web" if self.secure else f"http://localhost:{self.port}/dicom-web"
        )

    def rest(self, method: str, path: str, data: bytes | None = None) -> requests.Response:
        """One request of Orthanc's own interface."""
        return requests.request(method, f"http://localhost:{self.port}{path}", data=data, auth=self.user, timeout=30)

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
        port = int(web.getsockname()[1])
        secure = _tls(stack, setting.certificate, port) if setting.certificate else None
        found = Orthanc(port, dimse.getsockname()[1], process, secure, setting.user)
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


def _tls(stack: ExitStack, certificate: Path, port: int) -> int:
    """Open a port of HTTPS before a port of HTTP."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    listening = stack.enter_context(closing(socket.create_server(("127.0.0.1", 0))))
    threading.Thread(target=_serve_tls, args=(listening, context, port), daemon=True).start()
    return int(listening.getsockname()[1])


def _serve_tls(listening: socket.socket, context: ssl.SSLContext, port: int) -> None:
    while True:
        try:
            plain, _ = listening.accept()
        except OSError:
            return
        threading.Thread(target=_between, args=(plain, context, port), daemon=True).start()


def _between(plain: socket.socket, context: ssl.SSLContext, port: int) -> None:
    """One connection: what comes by TLS goes on without, and back. One thread, because OpenSSL allows one."""
    with (
        suppress(OSError),
        context.wrap_socket(plain, server_side=True) as outer,
        socket.create_connection(("127.0.0.1", port)) as inner,
    ):
        while True:
            ready = [outer] if outer.pending() else select.select([outer, inner], [], [])[0]
            for source, sink in ((outer, inner), (inner, outer)):
                if source in ready:
                    data = source.recv(256 << 10)
                    if not data:
                        return
                    sink.sendall(data)


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
