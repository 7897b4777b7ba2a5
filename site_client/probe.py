"""One connection to the gateway, made by hand and step by step, so that each step can say what it met.

Rules:
  * The way is the one that gRPC takes: a proxy that was told, else the first of `grpc_proxy`, `https_proxy` and
    `http_proxy` in the environment, written small and beginning with http://; never for what `no_grpc_proxy`, or else
    `no_proxy`, covers, and the environment's never on loopback.
  * The handshake believes nobody: it shows a certificate, takes the other end's, and says nothing more. Whose it is can
    be asked afterwards.
  * A proxy's name and password are in no message.
"""

from __future__ import annotations

import base64
import ipaddress
import os
import re
import socket
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from urllib.parse import SplitResult, unquote, urlsplit

from cryptography import x509

from locum.common.errors import RunError
from locum.common.identity import PrivateKey, certificate_pem, key_pem
from locum.site_client.enrolment import on_loopback
from locum.site_client.review import printable

SECONDS = 10.0
_PROXIES = ("grpc_proxy", "https_proxy", "http_proxy")
_EXCEPTIONS = ("no_grpc_proxy", "no_proxy")
_DEFAULT_PORT = 443
_NO_PROXY = ("the proxy's address cannot be read", "write it as http://host:port")
_MOST_ANSWER = 16 << 10
_STATUS = re.compile(rb"HTTP/\d\.\d (\d{3})[ \r]")
_WANTED = re.compile(rb"(?im)^proxy-authenticate:[ \t]*([A-Za-z0-9-]+)")

_FORBIDDEN = "have it allow CONNECT to this address and port"
_AWAY = "it cannot reach the coordinator: ask whether that runs, and whether the proxy may connect to its port"
#: What to do about a proxy's answer; about any other, the first.
_REMEDIES = {403: _FORBIDDEN, 502: _AWAY, 503: _AWAY, 504: _AWAY}


# --- the way ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Proxy:
    """An HTTP proxy on the way out.

    Attributes:
        host: its name or address.
        port: of it.
        credentials: `name:password`, or empty.
    """

    host: str
    port: int
    credentials: str = field(default="", repr=False)

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def proxy_to(address: str, told: str | None, environment: Mapping[str, str] = os.environ) -> Proxy | None:
    """The proxy that carries a connection to `address` (host:port); None if it goes there directly.

    Raises:
        RunError: the proxy's URL cannot be read, or the one that was told is none that gRPC takes.
    """
    url = told if told is not None else "" if on_loopback(address) else _first(environment, _PROXIES)
    try:
        parsed, port = urlsplit(url), urlsplit(url).port or _DEFAULT_PORT
    except ValueError as error:
        raise RunError(*_NO_PROXY) from error
    if told is not None and parsed.scheme != "http":
        raise RunError(*_NO_PROXY)  # gRPC would go directly, and nobody would know why
    if parsed.scheme != "http" or not parsed.hostname or _excepted(host_and_port(address)[0], environment):
        return None
    return Proxy(parsed.hostname, port, _credentials(parsed))


def host_and_port(address: str) -> tuple[str, int]:
    """The parts of host:port; an IPv6 address loses its brackets."""
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def _first(environment: Mapping[str, str], names: tuple[str, ...]) -> str:
    return next((environment[name] for name in names if name in environment), "")


def _credentials(parsed: SplitResult) -> str:
    return unquote(parsed.netloc.rpartition("@")[0])


def _excepted(host: str, environment: Mapping[str, str]) -> bool:
    entries = _first(environment, _EXCEPTIONS).split(",")
    return any(_covers(entry.strip(), host) for entry in entries if entry)


def _covers(entry: str, host: str) -> bool:
    """The end of a name, or a network that an address is in."""
    if host.lower().endswith(entry.lower()):
        return True
    try:
        return "/" in entry and ipaddress.ip_address(host) in ipaddress.ip_network(entry, strict=False)
    except ValueError:
        return False


# --- the connection ---------------------------------------------------------------------------------------------------


def resolve(host: str, port: int) -> tuple[str, ...]:
    """The addresses of a name; raises RunError."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no name"
        remedy = "check how it is written, and the name servers of this machine (/etc/resolv.conf)"
        raise RunError(f"the name {host} does not resolve: {reason}", remedy) from error
    return tuple(dict.fromkeys(str(item[4][0]) for item in found))


def connect(address: str, proxy: Proxy | None) -> socket.socket:
    """A connection to `address` (host:port), through the proxy if there is one; raises RunError."""
    first = str(proxy or address)
    try:
        opened = socket.create_connection((proxy.host, proxy.port) if proxy else host_and_port(address), SECONDS)
    except TimeoutError as error:
        remedy = f"have the firewall let this machine connect to {first}"
        raise RunError(f"{first} does not answer within {SECONDS:.0f} s", remedy) from error
    except OSError as error:
        raise RunError(f"{first} cannot be connected to: {error.strerror or error}", _unreached(proxy)) from error
    if proxy is not None:
        try:
            _ask(opened, address, proxy)
        except BaseException:
            opened.close()
            raise
    return opened


def _unreached(proxy: Proxy | None) -> str:
    if proxy is not None:
        return "check the proxy's address, in site.yaml or in the environment"
    return (
        "ask whether the coordinator runs, and whether a firewall is on the way; behind a proxy, write it in site.yaml"
    )


def _ask(opened: socket.socket, address: str, proxy: Proxy) -> None:
    """CONNECT (RFC 9110, 9.3.6); raises RunError unless the proxy says that it is connected."""
    lines = [f"CONNECT {address} HTTP/1.1", f"Host: {address}"]
    if proxy.credentials:
        lines.append(f"Proxy-Authorization: Basic {base64.b64encode(proxy.credentials.encode()).decode()}")
    try:
        opened.sendall("\r\n".join([*lines, "", ""]).encode())
        answer = _head(opened)
    except OSError as error:
        remedy = "check that it is an HTTP proxy, and that it allows CONNECT to this address"
        raise RunError(f"the proxy {proxy} does not answer: {error.strerror or error}", remedy) from error
    status = _STATUS.match(answer)
    if status is None:
        raise RunError(f"the proxy {proxy} does not answer in HTTP", "check its address: it must be an HTTP proxy")
    code = int(status[1])
    if not 200 <= code < 300:
        words = f"the proxy {proxy} answers {code} {_phrase(code)} to CONNECT {address}"
        raise _wants_a_name(words, answer, proxy) if code == 407 else RunError(words, _REMEDIES.get(code, _FORBIDDEN))


def _head(opened: socket.socket) -> bytes:
    """The answer up to its empty line, and nothing of what follows it."""
    answer = b""
    while not answer.endswith(b"\r\n\r\n") and len(answer) < _MOST_ANSWER:
        byte = opened.recv(1)
        if not byte:
            break
        answer += byte
    return answer


def _phrase(code: int) -> str:
    try:
        return HTTPStatus(code).phrase
    except ValueError:
        return "(no status that HTTP knows)"


def _wants_a_name(words: str, answer: bytes, proxy: Proxy) -> RunError:
    ways = [found.decode() for found in _WANTED.findall(answer)]
    if ways and "basic" not in [way.lower() for way in ways]:
        remedy = "have it let this address pass without them: the agent knows no other way than Basic"
        return RunError(f"{words}: it wants a name and a password by {' or '.join(ways)}", remedy)
    if proxy.credentials:
        return RunError(f"{words}: it does not take this name and password", "mend them, where the proxy is written")
    remedy = "write them in site.yaml: `proxy: http://NAME:PASSWORD@host:port`, or have it let this address pass"
    return RunError(f"{words}: it wants a name and a password", remedy)


# --- TLS --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Peer:
    """The other end of a handshake, whoever it is.

    Attributes:
        certificate: what it showed.
        protocol: what it chose of what was offered (ALPN), `h2` or nothing.
        refusal: what it said to the certificate that it was shown; empty if it took it.
    """

    certificate: x509.Certificate
    protocol: str | None
    refusal: str


def handshake(opened: socket.socket, host: str, key: PrivateKey, certificate: x509.Certificate) -> Peer:
    """Shakes hands as the agent does, but whoever answers; raises RunError."""
    try:
        with _context(key, certificate).wrap_socket(opened, server_hostname=host) as tls:
            shown = tls.getpeercert(binary_form=True) or b""
            return Peer(x509.load_der_x509_certificate(shown), tls.selected_alpn_protocol(), _refusal(tls))
    except ssl.SSLError as error:
        remedy = "ask what answers at this address, and whether something on the way opens TLS"
        raise RunError(f"no TLS came about: {_reason(error)}", remedy) from error
    except OSError as error:
        remedy = "ask whether a firewall or proxy on the way forbids TLS that it cannot open"
        raise RunError(f"the connection ended within the TLS handshake: {error.strerror or error}", remedy) from error
    except ValueError as error:
        remedy = "ask what answers at this address, and whether something on the way opens TLS"
        raise RunError("who answers shows a certificate that cannot be read", remedy) from error


def _context(key: PrivateKey, certificate: x509.Certificate) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    # OpenSSL takes the key from a file; this one lies in memory only.
    with os.fdopen(os.memfd_create("locum"), "wb") as file:
        file.write(key_pem(key) + certificate_pem(certificate))
        file.flush()
        context.load_cert_chain(f"/proc/self/fd/{file.fileno()}")
    return context


def _refusal(tls: ssl.SSLSocket) -> str:
    """A client's certificate is judged after the handshake (TLS 1.3): a gateway's first word, or its refusal."""
    try:
        return "" if tls.recv(1) else "it closed the connection"
    except TimeoutError:
        return ""
    except ssl.SSLError as error:
        return _reason(error)
    except OSError as error:
        return error.strerror or str(error)


def _reason(error: ssl.SSLError) -> str:
    return printable((error.reason or "without a reason").replace("_", " ").lower())
