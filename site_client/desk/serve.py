"""Running the desk: a web server on this machine's loopback address, for one person at a browser.

Rules:
  * It listens at 127.0.0.1 and nowhere else; there is no option for another address.
  * The link with the one-time token goes to the terminal and, through a file that its owner alone can read, to the
    browser: the arguments of a process can be read by everybody on the machine.
"""

from __future__ import annotations

import os
import socket
import tempfile
import webbrowser
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from html import escape
from pathlib import Path

import uvicorn

from locum.common.errors import RunError
from locum.site_client.desk.door import ENTER, Door, Pass
from locum.site_client.desk.pages import Desk, pages
from locum.site_client.desk.pictures import Studio
from locum.site_client.desk.shelf import opened

LOOPBACK = "127.0.0.1"
#: Requests at once; a browser has six.
_AT_ONCE = 64


@dataclass(frozen=True)
class Opening:
    """What the desk is opened with.

    Attributes:
        store: the folder of volumes and catalog.
        site_file: as commands shall name it.
        person: the name that forms begin with.
        port: 0 for any that is free.
    """

    store: Path
    site_file: str
    person: str
    port: int = 0


def serve(opening: Opening, tell: Callable[[str], None]) -> None:
    """Serve until the terminal's Ctrl-C, or until the process is ended.

    Args:
        opening: what to open.
        tell: gets the link, once the desk answers at it.

    Raises:
        DataError: the store holds no catalog that can be read.
        RunError: the port is taken.
    """
    with opened(opening.store):
        pass  # a store without a catalog is told here, and not on a page
    keys = Pass()
    with closing(_listening(opening.port)) as listener, closing(Studio()) as studio:
        port = listener.getsockname()[1]
        inner = pages(Desk(opening.store.absolute(), opening.site_file, opening.person, keys, studio))
        tell(f"http://{LOOPBACK}:{port}{ENTER}?token={keys.token}")
        uvicorn.Server(_settings(Door(inner, port, keys))).run(sockets=[listener])


def _listening(port: int) -> socket.socket:
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((LOOPBACK, port))
        listener.listen(_AT_ONCE)
    except OSError as error:
        listener.close()
        raise RunError(f"port {port} cannot be used: {error.strerror}", "give another with --port, or none") from None
    return listener


def _settings(app: Door) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http="h11",
        ws="none",
        lifespan="off",
        interface="asgi3",
        access_log=False,
        log_level="warning",
        proxy_headers=False,
        server_header=False,
        date_header=False,
        limit_concurrency=_AT_ONCE,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=1,
        h11_max_incomplete_event_size=16 << 10,
    )


@contextmanager
def browser_page() -> Iterator[Callable[[str], None]]:
    """What opens a link in the person's browser, by a file of mode 0600 that goes at the end."""
    with tempfile.TemporaryDirectory(prefix="locum-desk-") as folder:
        page = Path(folder) / "desk.html"

        def show(link: str) -> None:
            content = f'<!doctype html><meta http-equiv="refresh" content="0; url={escape(link)}"><title>Locum</title>'
            descriptor = os.open(page, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "w") as file:
                file.write(content)
            webbrowser.open(page.as_uri())

        yield show
