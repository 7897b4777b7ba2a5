"""`locum site doctor`: whether this machine is fit, and why an agent does not connect.

Rules:
  * The checks come in an order in which the first that failed explains the rest: who the site is, what it is told, the
    way to the gateway step by step, then the machine.
  * Nothing is changed, here or at the coordinator: no report, no lease, no enrolment. It may run beside the agent.
  * What is not there is the check that says why; so a check that was skipped tells what to do as well.
  * What it says holds no secret: no key, no token, no name and password of a proxy.
"""

from __future__ import annotations

import json
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from ipaddress import ip_address
from pathlib import Path
from typing import Literal

import grpc
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from locum.common.errors import DataError, LocumError, RunError
from locum.common.identity import (
    IdentityError,
    check_issued,
    check_valid,
    invitation_key,
    parse_certificate,
    read_invitation,
    renewal_due,
    subject_of,
    utc_now,
)
from locum.common.proto import locum_pb2 as pb
from locum.common.proto.locum_pb2_grpc import RegistryStub
from locum.site_client.configuration import FILE, SiteConfiguration, read_configuration
from locum.site_client.enrolment import connection_error, open_channel
from locum.site_client.identity import FOLDER, SiteIdentity, load_identity
from locum.site_client.imaging.catalog import FILE_NAME
from locum.site_client.probe import SECONDS, Peer, connect, handshake, host_and_port, proxy_to, resolve
from locum.site_client.review import printable
from locum.site_client.status import CLOCK_WARNING

Verdict = Literal["ok", "warning", "failed", "skipped"]

_GIB = 1 << 30
_LEAST_DISK = 5 * _GIB
_LEAST_MEMORY_GIB = 2.0
_TORCH_SECONDS = 120.0
_PACKAGES = ("torch", "monai", "flwr")
_INSPECTED = "if that is a proxy that opens TLS, have it let this address pass untouched; else check the address"


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: which.
        verdict: `ok`, `warning` (it works, and may not for long), `failed`, or `skipped` (nothing was found out).
        found: what there is, one sentence.
        remedy: the next thing to do, unless it is ok.
    """

    name: str
    verdict: Verdict
    found: str
    remedy: str = ""


def examine(home: Path, invitation: Path | None = None, proxy: str | None = None) -> Iterator[Check]:
    """Looks at everything, one check after the other.

    Args:
        home: the agent's folder; it need not be there.
        invitation: one that is to be used; then it is the invitation that is looked at, and it stays unused.
        proxy: `http://host:port` of an HTTP proxy, as for `locum site enrol`.
    """
    caller = yield from _identity(home, invitation)
    enrolled = isinstance(caller, Caller) and caller.identity is not None
    configuration = yield from _site_yaml(home / FILE, enrolled=enrolled)
    heard = yield from _way(caller, proxy or configuration.proxy)
    yield _clock(heard)
    yield _versions(heard)
    yield _tried("disk", lambda: _disk((home, *configuration.stores)))
    yield _tried("memory", lambda: _memory(configuration.resources.memory_gib or _LEAST_MEMORY_GIB))
    yield _tried("GPU", lambda: _gpu(configuration.resources.device))


def _tried(name: str, look: Callable[[], Check]) -> Check:
    try:
        return look()
    except (LocumError, OSError) as error:
        return _failed(name, error)


def _failed(name: str, error: LocumError | OSError) -> Check:
    if isinstance(error, LocumError):
        return Check(name, "failed", error.message, error.remedy)
    found = f"{error.filename or 'a file'} cannot be read: {error.strerror}"
    return Check(name, "failed", found, "run this under the agent's account, or mend the permissions")


def _after(name: str, cause: Check) -> Check:
    """A check that waits until the cause is mended."""
    return Check(name, "skipped", f"not looked at: see {cause.name}", cause.remedy)


# --- who calls --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Caller:
    """Who calls the gateway, and whom it is to find there.

    Attributes:
        name: of the site.
        federation: its name.
        address: the gateway's, host:port.
        authority: the certificate of who issues all others.
        certificate: the site's own, or the invitation's.
        key: of that certificate.
        identity: of an enrolled site; None for an invitation.
    """

    name: str
    federation: str
    address: str
    authority: x509.Certificate
    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey = field(repr=False)
    identity: SiteIdentity | None = None


def _identity(home: Path, invitation: Path | None) -> Generator[Check, None, Caller | Check]:
    try:
        if invitation is None and not (home / FOLDER).exists():
            found = f"{home} holds no enrolled site, and no invitation was given"
            check = Check("identity", "skipped", found, "give one of them: --home DIR, or locum site doctor INVITE")
            yield check
            return check
        caller = _enrolled(home) if invitation is None else _invited(invitation)
        yield _standing(caller) if invitation is None else _handed_over(caller, invitation)
    except (LocumError, OSError) as error:
        check = _failed("identity", error)
        yield check
        return check
    return caller


def _enrolled(home: Path) -> Caller:
    identity = load_identity(home)
    member, federation = identity.membership, printable(identity.membership.federation)
    known = (identity.authority, identity.certificate, identity.key)
    return Caller(member.site, federation, member.address, *known, identity)


def _invited(path: Path) -> Caller:
    invitation = read_invitation(path)
    try:
        authority = parse_certificate(invitation.authority.encode())
        certificate = parse_certificate(invitation.certificate.encode())
        check_issued(certificate, authority)
    except IdentityError as error:
        remedy = "ask the coordinator for another invitation"
        raise DataError(f"the certificates of the invitation cannot be used: {error}", remedy) from error
    known = (authority, certificate, invitation_key(invitation.token_bytes))
    return Caller(invitation.site, printable(invitation.federation), invitation.address, *known)


def _standing(caller: Caller) -> Check:
    """How an enrolled site's certificate stands."""
    now, ends = utc_now(), caller.certificate.not_valid_after_utc
    found = f"{caller.name} of {caller.federation}, at {caller.address}"
    try:
        check_valid(caller.certificate, now)
    except IdentityError as error:
        remedy = "if the clock is right: a new invitation, then `locum site enrol INVITE --replace`"
        return Check("identity", "failed", f"{found}: {error}, {_by_the_clock(now)}", remedy)
    found += f"; its certificate is good for {(ends - now).days} days more"
    if renewal_due(caller.certificate, now):
        remedy = "let the agent run and connect: it renews its certificate within an hour"
        return Check("identity", "warning", f"{found} and should have been renewed", remedy)
    return Check("identity", "ok", found)


def _handed_over(caller: Caller, path: Path) -> Check:
    """How an invitation stands."""
    now, another = utc_now(), "if the clock is right: ask the coordinator for another invitation"
    found = f"an invitation for {caller.name} of {caller.federation}, at {caller.address}"
    try:
        check_valid(caller.certificate, now)
    except IdentityError as error:
        return Check("identity", "failed", f"{found}: {error}, {_by_the_clock(now)}", another)
    found += f"; it ends at {caller.certificate.not_valid_after_utc:%Y-%m-%d %H:%M} UTC"
    if path.stat().st_mode & 0o077:
        return Check("identity", "warning", f"{found}, and others can read it", f"chmod 600 {path}: it holds a secret")
    return Check("identity", "ok", found)


def _by_the_clock(now: datetime) -> str:
    return f"and this machine's clock says {now:%Y-%m-%d %H:%M} UTC"


# --- what it is told --------------------------------------------------------------------------------------------------


def _site_yaml(path: Path, *, enrolled: bool) -> Generator[Check, None, SiteConfiguration]:
    """The configuration; of one that cannot be read, what holds without any."""
    try:
        if not enrolled and not path.exists():
            yield Check(FILE, "skipped", f"there is no {path} yet", "`locum site enrol` begins it")
        else:
            configuration = read_configuration(path)
            yield _stores(configuration.stores)
            return configuration
    except (LocumError, OSError) as error:
        yield _failed(FILE, error)
    return SiteConfiguration(stores=())


def _stores(stores: Sequence[Path]) -> Check:
    fill = "fill it: locum site ingest DATA.yaml --store DIR"
    for store in stores:
        if not store.is_dir():
            return Check(FILE, "failed", f"there is no store {store}", fill)
        if not (store / FILE_NAME).is_file():
            return Check(FILE, "warning", f"nothing was ingested into {store} yet", fill)
    return Check(FILE, "ok", f"it can be read, and so can {', '.join(map(str, stores))}")


# --- the way to the gateway -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Heard:
    """What a gateway says that has let the site in.

    Attributes:
        ahead: seconds by which this machine's clock is ahead of the coordinator's.
        version: of Locum at the coordinator.
    """

    ahead: float
    version: str


def _way(caller: Caller | Check, told: str | None) -> Generator[Check, None, Heard | Check]:
    """Name, connection, TLS, gateway: each is tried only if none before it failed."""
    if isinstance(caller, Check):
        yield from (_after(name, caller) for name in (*_STEPS, "gateway"))
        return caller
    cause: Check | None = None
    for name, look in _STEPS.items():
        check = _after(name, cause) if cause else _tried(name, partial(look, caller, told))
        yield check
        cause = cause or (check if check.verdict == "failed" else None)
    if cause is not None:
        yield _after("gateway", cause)
        return cause
    return (yield from _gateway(caller, told))


def _name(caller: Caller, told: str | None) -> Check:
    proxy = proxy_to(caller.address, told)
    host, port = (proxy.host, proxy.port) if proxy else host_and_port(caller.address)
    of = f"{host}, the proxy," if proxy else host
    found = ", ".join(resolve(host, port))
    return Check("name", "ok", f"{of} is {'an address' if found == host else f'at {found}'}")


def _connection(caller: Caller, told: str | None) -> Check:
    proxy = proxy_to(caller.address, told)
    connect(caller.address, proxy).close()
    way = f"through the proxy {proxy}" if proxy else "directly"
    return Check("connection", "ok", f"{caller.address} can be connected to, {way}")


def _tls(caller: Caller, told: str | None) -> Check:
    proxy = proxy_to(caller.address, told)
    with connect(caller.address, proxy) as opened:
        peer = handshake(opened, host_and_port(caller.address)[0], caller.key, caller.certificate)
    _check_issuer(peer.certificate, caller)
    _check_holder(peer.certificate, caller)
    _check_time(peer.certificate)
    _check_agreed(peer)
    return Check("TLS", "ok", f"who answers is the gateway of {caller.federation}, and nothing opens TLS on the way")


def _check_issuer(shown: x509.Certificate, caller: Caller) -> None:
    """Raises RunError, and names who issued the certificate, unless it was the federation's authority."""
    try:
        check_issued(shown, caller.authority)
    except IdentityError as error:
        found = (
            f"who answers at {caller.address} is not this federation's gateway: {_issuer(shown)} issued its certificate"
        )
        raise RunError(found, _INSPECTED) from error


def _issuer(shown: x509.Certificate) -> str:
    try:
        return f"'{printable(shown.issuer.rfc4514_string())}'"
    except ValueError:
        return "somebody without a readable name"


def _check_holder(shown: x509.Certificate, caller: Caller) -> None:
    """Raises RunError unless it is a gateway's, for the host that is called."""
    role, host = subject_of(shown).role, host_and_port(caller.address)[0]
    if role != "server":
        remedy = "tell the coordinator: somebody poses as the gateway"
        raise RunError(f"who answers at {caller.address} has the certificate of a {printable(role)}", remedy)
    names = _hosts(shown)
    if _same_host(host) not in map(_same_host, names):
        remedy = (
            f"let `address` in {FOLDER}/federation.json and `host` in the coordinator's server.yaml be the same name"
        )
        raise RunError(f"the gateway's certificate is for {', '.join(names) or 'no host'}, and not for {host}", remedy)


def _hosts(shown: x509.Certificate) -> list[str]:
    try:
        names = shown.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    return [printable(str(name.value)) for name in names]


def _same_host(host: str) -> str:
    """One way to write a name or an address."""
    try:
        return str(ip_address(host))
    except ValueError:
        return host.lower()


def _check_time(shown: x509.Certificate) -> None:
    now = utc_now()
    try:
        check_valid(shown, now)
    except IdentityError as error:
        remedy = "set this machine's clock if it is wrong; else tell the coordinator"
        raise RunError(f"the gateway cannot be believed: {error}, {_by_the_clock(now)}", remedy) from error


def _check_agreed(peer: Peer) -> None:
    """Raises RunError unless both ends would go on from here."""
    if peer.protocol != "h2":
        raise RunError(
            "the gateway did not agree on HTTP/2 (ALPN h2)", "ask what stands before it: TLS must pass through"
        )
    if peer.refusal:
        remedy = "ask the coordinator whether this site's certificate is still good"
        raise RunError(f"the gateway does not take the certificate from here: {peer.refusal}", remedy)


#: In the order in which they rest upon each other.
_STEPS: Mapping[str, Callable[[Caller, str | None], Check]] = {"name": _name, "connection": _connection, "TLS": _tls}


def _gateway(caller: Caller, told: str | None) -> Generator[Check, None, Heard | Check]:
    if caller.identity is None:
        found = "it answers enrolled sites only; the invitation was not used"
        check = Check("gateway", "skipped", found, "join: locum site enrol INVITE")
        yield check
        return check
    try:
        heard = _greeted(caller.identity, told)
    except grpc.RpcError as error:
        check = _failed("gateway", connection_error(error, caller.address))
        yield check
        return check
    yield Check("gateway", "ok", f"it lets {caller.name} in")
    return heard


def _greeted(identity: SiteIdentity, told: str | None) -> Heard:
    with open_channel(identity, told) as channel:
        before = time.time()
        greeting = RegistryStub(channel).Greet(pb.GreetRequest(), timeout=SECONDS)
        return Heard((before + time.time()) / 2 - greeting.clock, printable(greeting.version))


def _clock(heard: Heard | Check) -> Check:
    if isinstance(heard, Check):
        return _after("clock", heard)
    found = f"it is {abs(heard.ahead):.0f} s {'ahead of' if heard.ahead > 0 else 'behind'} the coordinator's"
    if abs(heard.ahead) > CLOCK_WARNING:
        return Check("clock", "warning", found, "have it set (NTP): approvals and certificates need it")
    return Check("clock", "ok", found)


# --- the machine ------------------------------------------------------------------------------------------------------


def _versions(heard: Heard | Check) -> Check:
    mine = version("locum")
    try:
        here = ", ".join([f"Python {platform.python_version()}", *(f"{name} {version(name)}" for name in _PACKAGES)])
    except PackageNotFoundError as error:
        return Check("versions", "failed", f"{error.name} is not installed", "pip install 'locum[site]'")
    if isinstance(heard, Check):
        return Check("versions", "skipped", f"Locum {mine} here, at the coordinator not known; {here}", heard.remedy)
    if heard.version != mine:
        remedy = "install the coordinator's version: a run with different ones does not begin"
        return Check("versions", "failed", f"Locum {mine} here, {heard.version} at the coordinator; {here}", remedy)
    return Check("versions", "ok", f"Locum {mine} here and at the coordinator; {here}")


def _disk(folders: Sequence[Path]) -> Check:
    """Free space where the folders are or will be, each disk once."""
    disks = {folder.stat().st_dev: folder for folder in map(_existing, reversed(folders))}
    free = {folder: shutil.disk_usage(folder).free for folder in disks.values()}
    found = "; ".join(f"{left / _GIB:.1f} GiB are free in {folder}" for folder, left in free.items())
    if min(free.values()) < _LEAST_DISK:
        remedy = f"free {_LEAST_DISK // _GIB} GiB: a large model and its update take a GiB each, and logs grow"
        return Check("disk", "warning", found, remedy)
    return Check("disk", "ok", found)


def _existing(path: Path) -> Path:
    whole = path.absolute()
    return next(folder for folder in (whole, *whole.parents) if folder.exists())


def _memory(wanted_gib: float) -> Check:
    path = Path("/proc/meminfo")
    available = re.search(r"^MemAvailable: +(\d+) kB", path.read_text() if path.exists() else "", re.MULTILINE)
    if available is None:
        return Check("memory", "skipped", "this system does not tell how much is available", "see for yourself")
    gib = int(available[1]) * 1024 / _GIB
    found = f"{gib:.1f} GiB are available, {wanted_gib:g} GiB are wanted"
    if gib < wanted_gib:
        return Check("memory", "warning", found, f"end other programs, or lower resources.memory_gib in {FILE}")
    return Check("memory", "ok", found)


#: In a process of its own: torch takes seconds to load, and a broken driver can end the process that asks it.
_ASK_TORCH = """
import json, torch
numbers = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
found = [torch.cuda.get_device_properties(number) for number in numbers]
print(json.dumps([[gpu.name, gpu.total_memory] for gpu in found]))
"""


def _gpu(device: str) -> Check:
    if device == "cpu":
        return Check("GPU", "ok", f"{FILE} asks for the CPU")
    return gpu_check(device, _gpus())


def _gpus() -> list[tuple[str, int]]:
    """Name and bytes of every GPU that torch can use; raises RunError."""
    command = [sys.executable, "-P", "-c", _ASK_TORCH]
    try:
        asked = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_TORCH_SECONDS)  # noqa: S603
    except subprocess.TimeoutExpired as error:
        remedy = "look at the GPU with nvidia-smi; a driver that hangs needs a restart of the machine"
        raise RunError(f"torch did not answer within {_TORCH_SECONDS:.0f} s", remedy) from error
    if asked.returncode != 0:
        reason = printable((asked.stderr.strip().splitlines() or [f"exit code {asked.returncode}"])[-1])
        raise RunError(
            f"torch cannot be used: {reason}", "pip install 'locum[site]'; for the GPU, look with nvidia-smi"
        )
    return [(printable(name), size) for name, size in json.loads(asked.stdout.splitlines()[-1])]


def gpu_check(device: str, gpus: Sequence[tuple[str, int]]) -> Check:
    """What `device` of site.yaml (`auto`, `cuda`, `cuda:N`) comes to with these GPUs: name and bytes of each."""
    number = int(device.partition(":")[2] or 0)
    if number < len(gpus):
        name, size = gpus[number]
        return Check("GPU", "ok", f"{device} is {name} with {size / _GIB:.0f} GiB")
    if device == "auto":
        return Check("GPU", "ok", "auto is the CPU: torch finds no GPU")
    remedy = f"look with nvidia-smi, and whether torch was built for CUDA; or write `device: auto` in {FILE}"
    return Check("GPU", "failed", f"{FILE} asks for {device}, and torch finds {len(gpus)} GPUs", remedy)
