"""What the round engine needs of the way to the sites, besides Flower's grid.

In one process (`Direct`) messages carry their tensors and replies are polled. Between hospitals (`server.wire.Wire`)
tensors travel as blobs, the gateway hints which replies are complete, and a run that has too few sites pauses.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from cryptography import x509
from flwr.app import Message
from flwr.serverapp import Grid

from locum.common.errors import LocumError
from locum.common.identity import load_certificate
from locum.common.messages import INLINE, LOCAL, Arrays, Carrier, Sealer
from locum.common.plan import Plan
from locum.server.home import Home
from locum.server.log import open_log
from locum.server.run_log import RunLog
from locum.server.signer import Signer, signer_of

_FIRST_WAIT, _LONGEST_WAIT = 0.001, 0.2


class Link(Protocol):
    """The way between the engine and its sites."""

    def nodes(self, known: Iterable[int]) -> Mapping[int, str | None]:
        """The nodes that may take part, of those that Flower knows; by number, with the name in the certificate."""

    def current(self, sites: Collection[str]) -> dict[str, int]:
        """Of the sites of a roster, the nodes of those that the link knows better than the roster does."""

    def signer(self) -> Signer:
        """What the coordinator signs with; raises LocumError."""

    def log(self, plan: Plan) -> RunLog:
        """What is logged of this run of a plan; the same one in one process. Raises LocumError."""

    def certificate(self, site: str) -> x509.Certificate | None:
        """A site's certificate, if it is known."""

    def outgoing(self, model: Arrays) -> Sealer:
        """How `model` goes out."""

    def incoming(self, site: str) -> Carrier:
        """How the tensors of a site's reply come in."""

    def taken(self, site: str) -> None:
        """What the site sent is folded or refused, and can go."""

    def sent(self, messages: Mapping[str, int]) -> None:
        """These messages (id, node) are on their way."""

    def ready(self, waiting: Mapping[str, str]) -> list[str]:
        """Of messages (with their sites), those whose replies are worth pulling now; returns after a moment at most."""

    def pulled(self, grid: Grid, waiting: Collection[str]) -> Iterator[tuple[str, Message | None]]:
        """The replies to these messages that are there, by message id; None is one that cannot be read."""

    def away(self, sites: Iterable[str]) -> dict[str, str]:
        """Of these sites, those that were not heard from for long, with the reason in words."""

    def wait(self, refusal: LocumError, missing: Collection[str]) -> None:
        """Too few sites for the quorum: returns when trying again is worth it, or raises `refusal`.

        `missing` are the sites that did not contribute; none named: the link says who is not there.
        """


@dataclass
class Direct:
    """Agents in this process: tensors inside the messages, replies polled with a growing pause.

    `home` is the run's folder, in which the authority of the simulation and its log lie.
    """

    home: Home
    _log: RunLog | None = None
    _pause: float = field(default=_FIRST_WAIT)

    def nodes(self, known: Iterable[int]) -> Mapping[int, str | None]:
        """All of them; they say their names themselves."""
        return dict.fromkeys(known)

    def current(self, sites: Collection[str]) -> dict[str, int]:
        """None: a node is one agent of this process."""
        del sites
        return {}

    def signer(self) -> Signer:
        """The simulation's own."""
        return signer_of(self.home, LOCAL)

    def log(self, plan: Plan) -> RunLog:
        """The simulation's own, in the run's folder."""
        if self._log is None or self._log.plan != plan.digest:
            self._log = RunLog(open_log(self.home), LOCAL, plan.digest)
        return self._log

    def certificate(self, site: str) -> x509.Certificate | None:
        """The one that the simulation has issued."""
        path = self.home.certificate_of(site)
        return load_certificate(path) if path.exists() else None

    def outgoing(self, model: Arrays) -> Sealer:
        """Inside the message."""
        del model
        return INLINE

    def incoming(self, site: str) -> Carrier:
        """Inside the message."""
        del site
        return INLINE

    def taken(self, site: str) -> None:
        """Nothing was kept."""

    def sent(self, messages: Mapping[str, int]) -> None:
        """Replies are looked for at once."""
        del messages
        self._pause = _FIRST_WAIT

    def ready(self, waiting: Mapping[str, str]) -> list[str]:
        """All, after a pause that grows."""
        time.sleep(self._pause)
        self._pause = min(self._pause * 1.5, _LONGEST_WAIT)
        return list(waiting)

    def pulled(self, grid: Grid, waiting: Collection[str]) -> Iterator[tuple[str, Message | None]]:
        """All that are there, at once."""
        for reply in grid.pull_messages(waiting) if waiting else ():
            yield reply.metadata.reply_to_message_id, reply

    def away(self, sites: Iterable[str]) -> dict[str, str]:
        """None: they live in this process."""
        del sites
        return {}

    def wait(self, refusal: LocumError, missing: Collection[str]) -> None:
        """Nobody will come back: the run ends here."""
        del missing
        raise refusal
