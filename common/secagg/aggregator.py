"""The aggregator's part in secure aggregation. Nothing is sent and nothing is stored here.

    open_roster   the signed roster of the sites whose run keys were admitted
    SecureSum     one sum: folds uploads, says what to ask of whom, takes answers, unmasks

Rules:
  * What is added to a sum was signed by a member of the roster for this very sum.
  * A sum has one set of survivors. From the first answer on nothing is added, and it is unmasked once or not at all.
  * A seed that shares make counts only if it is the one its site has committed to. A site whose shares make others is
    named.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from math import comb
from random import SystemRandom
from typing import Any

import numpy as np
from cryptography import x509
from numpy.typing import NDArray

from locum.common.identity import PrivateKey
from locum.common.secagg import keys, shares
from locum.common.secagg.keys import SealError
from locum.common.secagg.masks import Masks
from locum.common.secagg.roster import (
    Context,
    Member,
    Roster,
    SecureRefusal,
    check_header,
    check_survivors,
    sign,
    threshold_of,
)
from locum.common.secagg.shares import SHARE_BYTES, ShareError
from locum.common.secagg.site import answer_purpose, commitment, wanted
from locum.common.secagg.upload import BOXES, COMMITMENTS, SCALAR_LANE, SCALARS, UPDATE, UPDATE_LANE, Layout
from locum.common.tensor_files import Arrays, forget_part

#: Sets of answers that are tried until one makes seeds that are those committed to.
_MOST_TRIES = 256
#: Elements that are added at once: few calls to give pages back, and still little memory.
_ELEMENTS = 1 << 20


def open_roster(
    members: Mapping[str, Member], *, run: str, plan: str, answers: bytes, key: PrivateKey
) -> tuple[Roster, str]:
    """The roster of these sites and its envelope, signed with the federation's log key.

    `answers` is the aggregator's public key. Raises ValueError for fewer sites than a sum may have.
    """
    roster = Roster(
        run=run,
        plan=plan,
        answers=answers,
        threshold=threshold_of(len(members)),
        members=tuple(members[site] for site in sorted(members)),
    )
    return roster, sign(roster, key)


@dataclass(frozen=True)
class _Upload:
    """What is kept of an upload that was added: its header, boxes by receiver's place, commitments by place."""

    header: str
    boxes: NDArray[np.uint8]
    commitments: NDArray[np.uint8]


@dataclass
class SecureSum:
    """One sum.

    Attributes:
        context: what it is about.
        layout: what an upload holds.
        certificates: of the roster's sites.
        private: the aggregator's key, to which answers are sealed.
    """

    context: Context
    layout: Layout
    certificates: Mapping[str, x509.Certificate]
    private: bytes = field(repr=False)

    def __post_init__(self) -> None:
        self.scalars = np.zeros(self.layout.scalars, np.uint64)
        self.update: NDArray[Any] = np.zeros(self.layout.size, self.layout.ring.dtype)
        self._uploads: dict[str, _Upload] = {}
        self._shares: dict[str, dict[tuple[str, str], bytes]] = {}
        self._unmasked = False

    @property
    def survivors(self) -> tuple[str, ...]:
        """The sites whose uploads are in the sum, in the roster's order."""
        return tuple(site for site in self.layout.roster.places if site in self._uploads)

    @property
    def headers(self) -> dict[str, str]:
        """Their signed headers."""
        return {site: self._uploads[site].header for site in self.survivors}

    def fold(self, site: str, header: str, body: str, tensors: Arrays) -> None:
        """Adds a site's upload, whose tensors' file has the SHA-256 `body`; raises SecureRefusal and adds nothing."""
        if site not in self.layout.roster.places or site in self._uploads:
            raise SecureRefusal("it is not in the roster, or has given already")
        if self._shares:
            raise SecureRefusal("the sum is closed: it is being unmasked")
        problem = self.layout.problem(tensors)
        if problem is not None:
            raise SecureRefusal(problem)
        if check_header(header, self.certificates[site], site=site, context=self.context).body != body:
            raise SecureRefusal("its tensors are not those that it has signed")
        self._uploads[site] = _Upload(header, np.array(tensors[BOXES]), np.array(tensors[COMMITMENTS]))
        self.scalars += tensors[SCALARS]
        if self.layout.size:
            _add(self.update, tensors[UPDATE])

    def boxes_for(self, site: str) -> NDArray[np.uint8]:
        """The boxes that the survivors have sealed to a site, one a row."""
        place = self.layout.roster.places[site]
        return np.stack([self._uploads[other].boxes[place - 1] for other in self.survivors])

    def take(self, site: str, sealed: bytes) -> None:
        """Takes a survivor's answer; raises SecureRefusal."""
        survivors, roster = self.survivors, self.layout.roster
        if site not in survivors:
            raise SecureRefusal("it is no survivor")
        try:
            told = keys.unseal(self.private, answer_purpose(self.context, survivors, site), sealed)
        except SealError as error:
            raise SecureRefusal(str(error)) from error
        asked = [(giver, other) for giver in survivors for other in wanted(roster, survivors, giver)]
        if len(told) != SHARE_BYTES * len(asked):
            raise SecureRefusal("its answer has another length")
        pieces = (told[start : start + SHARE_BYTES] for start in range(0, len(told), SHARE_BYTES))
        self._shares[site] = dict(zip(asked, pieces, strict=True))

    @property
    def enough(self) -> bool:
        """Whether answers of t sites are here."""
        return len(self._shares) >= self.layout.roster.threshold

    def unmask(self, least: int) -> list[str]:
        """Takes the masks off the sum; returns the sites whose shares were wrong. Raises SecureRefusal."""
        if self._unmasked:
            raise SecureRefusal("it was unmasked already")
        check_survivors(self.layout.roster, self.survivors, least)
        seeds, liars = self._seeds()
        self._unmasked = True
        places = self.layout.roster.places
        # A survivor adds its own mask and those shared with later places, and takes those of earlier ones away.
        taken = [seed for (giver, other), seed in seeds.items() if places[other] >= places[giver]]
        added = [seed for (giver, other), seed in seeds.items() if places[other] < places[giver]]
        Masks(SCALAR_LANE, add=added, subtract=taken).apply(self.scalars)
        Masks(UPDATE_LANE, add=added, subtract=taken).apply(self.update)
        return liars

    def _seeds(self) -> tuple[dict[tuple[str, str], bytes], list[str]]:
        """The seeds that must be known, and the sites whose shares are not of them."""
        threshold = self.layout.roster.threshold
        for chosen in _sets(sorted(self._shares), threshold):
            found = self._combined(chosen)
            if found is not None:
                return found, [site for site in self._shares if site not in chosen and not self._agrees(site, chosen)]
        given = len(self._shares)
        raise SecureRefusal(f"{given} sites have answered, and no {threshold} of them make the seeds committed to")

    def _combined(self, chosen: Sequence[str]) -> dict[tuple[str, str], bytes] | None:
        places = self.layout.roster.places
        found = {}
        for pair in self._shares[chosen[0]]:
            try:
                seed = shares.combine({places[site]: self._shares[site][pair] for site in chosen})
            except ShareError:
                return None
            giver, other = pair
            if commitment(seed) != self._uploads[giver].commitments[places[other] - 1].tobytes():
                return None
            found[pair] = seed
        return found

    def _agrees(self, site: str, chosen: Sequence[str]) -> bool:
        """Whether a site's shares, in the place of one of the chosen, make the same seeds."""
        return self._combined([site, *chosen[1:]]) is not None


def _sets(sites: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    """Sets of sites to try: all of them, or drawn ones where there are too many.

    Drawn, since in order a site that lies would be in the first few hundred of them if its name comes first.
    """
    if comb(len(sites), size) <= _MOST_TRIES:
        yield from combinations(sites, size)
    else:
        yield from (SystemRandom().sample(sites, size) for _ in range(_MOST_TRIES))


def _add(total: NDArray[Any], part: NDArray[Any]) -> None:
    """Adds in the ring, piece by piece; pages of a mapped file are given back as they were read."""
    for piece in _pieces(total.size):
        np.add(total[piece], part[piece], out=total[piece])
        forget_part(part[piece])
    forget_part(part)  # once more: the kernel maps pages around each one that is read, also behind it


def _pieces(size: int) -> Iterator[slice]:
    return (slice(start, start + _ELEMENTS) for start in range(0, size, _ELEMENTS))
