"""The site's word on plans: what was proposed, what its stewards approved, and what they took back.

proposals/DIGEST.json   a proposal as the coordinator sent it, signed with the federation's log key
approvals/DIGEST.json   this site's decisions on the plan

Rules:
  * What lies in the folder counts only if its signature is right, each time it is read: a file that was changed by
    anything else is as if it were not there.
  * Nothing is remembered between two questions, so a revocation by another process counts at the next message.
  * An approval is the plan's digest signed with the site's key, under a steward's name. It stands while as many
    different stewards as the policy asks for have approved since the last revocation. One revocation ends it.
  * An approval is in the site's own log before it counts; if it cannot be written there, it does not count. A
    revocation counts first.
  * The coordinator is told only what stands: the newest approval once they are enough, or the revocation. What it has
    heard is not remembered here: it keeps the newest word, and may have been restored from a backup.
  * A coordinator cannot fill the disk: of proposals that nobody has decided on, a number is kept, and no more taken.
"""

from __future__ import annotations

import fcntl
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from locum.common.durable import replace_file
from locum.common.envelope import (
    Approval,
    Digest,
    EnvelopeError,
    open_approval,
    open_proposal,
    seal,
    seal_approval,
    unseal,
)
from locum.common.errors import PlanError, RunError
from locum.common.identity import SiteName
from locum.site_client import gate
from locum.site_client.gate import Policy
from locum.site_client.identity import SiteIdentity, load_identity
from locum.site_client.releases import open_releases
from locum.site_client.review import Held, Review, Standing

_KIND = "decisions"
_NAME = re.compile(r"[0-9a-f]{64}")
_LEAST_PREFIX = 6
_LONGEST_NAME = 100
_TICK = 0.001
#: Proposals without a decision that are kept: far more than stewards have before them, and at most 200 MiB.
_MOST_UNDECIDED = 200


class _Decisions(BaseModel):
    """What a file of approvals holds, under the site's signature, so that no decision can be left out unseen.

    Attributes:
        envelopes: the last revocation, if there is one, and the approvals since.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    site: SiteName
    digest: Digest
    envelopes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Approvals:
    """The proposals and approvals in an agent's folder; made by :func:`open_approvals`.

    Every method raises OSError if the folder cannot be read or written.

    Attributes:
        home: the agent's folder.
        policy: what the site allows, and how many stewards must approve.
        identity: the site's key, and the key that verifies proposals.
        decided: writes a decision on the plan with this digest into the site's own log.
        clock: seconds since 1970.
    """

    home: Path
    policy: Policy
    identity: SiteIdentity = field(repr=False)
    decided: Callable[[str, bytes], None]
    clock: Callable[[], float] = time.time

    # --- proposals

    def receive(self, envelope: bytes) -> bool:
        """Keeps a proposal; returns whether it is new here. The first of a plan stays.

        Raises:
            PlanError: it is not signed by the federation, its plan does not have its digest, it is no plan here, or
                too many others wait for a decision.
        """
        held = self._opened(envelope)
        path = self._proposal_file(held.digest)
        if _content(path) == envelope or self._held(path) is not None:
            return False
        if len(self._undecided()) >= _MOST_UNDECIDED:
            reason = f"proposal {held.digest[:12]} is not kept, for {_MOST_UNDECIDED} others wait for a decision"
            raise PlanError(reason, "revoke those that nobody wants: they are decided then")
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, envelope)
        return True

    def proposals(self) -> tuple[Held, ...]:
        """The proposals that count, newest first."""
        found = [held for path in _files(self.home / "proposals") if (held := self._held(path)) is not None]
        return tuple(sorted(found, key=lambda held: (-held.proposal.proposed_at, held.digest)))

    def held(self, digest: str) -> Held:
        """One proposal; raises RunError if none counts."""
        found = self._held(self._proposal_file(digest))
        if found is None:
            reason = f"there is no proposal {digest[:12]} that the federation has signed"
            raise RunError(reason, "see `locum site review` for those there are; the agent fetches new ones")
        return found

    def find(self, prefix: str) -> str:
        """The whole digest of a plan of which something is kept here, from at least 6 first digits; raises RunError."""
        if not re.fullmatch(rf"[0-9a-f]{{{_LEAST_PREFIX},64}}", prefix):
            raise RunError(f"'{prefix}' is no digest", f"give at least {_LEAST_PREFIX} hexadecimal digits of it")
        known = {path.stem for folder in ("proposals", "approvals") for path in _files(self.home / folder)}
        found = sorted(digest for digest in known if digest.startswith(prefix))
        if not found:
            raise RunError(f"no plan {prefix} was proposed here", "see `locum site review` for those there are")
        if len(found) > 1:
            candidates = ", ".join(digest[:16] for digest in found)
            raise RunError(f"{prefix} names {len(found)} plans: {candidates}", "give more digits")
        return found[0]

    def damaged(self) -> tuple[Path, ...]:
        """Files that do not count, because something else than this program or the federation wrote them."""
        proposals = [path for path in _files(self.home / "proposals") if self._held(path) is None]
        approvals = [path for path in _files(self.home / "approvals") if self._decisions(path.stem) is None]
        return (*proposals, *approvals)

    def review(self, digest: str) -> Review:
        """A proposal in words; raises RunError if there is none."""
        return Review(self.held(digest), self.state(digest), self.policy)

    # --- decisions

    def state(self, digest: str) -> Standing:
        """Where a plan stands now."""
        found = self._approvals(self._decisions(digest))
        revoked = found[-1] if found and found[-1].decision == "revoke" else None
        by_steward = {_folded(one.steward): one for one in found if one.decision == "approve"}
        return Standing(tuple(by_steward.values()), revoked, self.policy.stewards)

    def standing(self, digest: str) -> bool:
        """Whether the site approves a plan at this moment."""
        return self.state(digest).stands

    def approve(self, digest: str, steward: str) -> Standing:
        """Signs an approval in a steward's name; a second one of the same steward changes nothing.

        Raises:
            RunError: there is no such proposal, the policy forbids the plan, or the steward has no name.
        """
        held = self.held(digest)
        refusal = next(gate.refusals(self.policy, held.plan), None)
        if refusal is not None:
            reason = f"this site's policy forbids the plan ({refusal.clause}): {refusal.detail}"
            raise RunError(reason, "leave it unapproved, or change the policy in site.yaml")
        name = _name(steward)
        with self._locked():
            if _folded(name) not in {_folded(one.steward) for one in self.state(digest).approvals}:
                self._decide(digest, "approve", name)
        return self.state(digest)

    def revoke(self, digest: str, steward: str) -> Standing:
        """Takes every approval of a plan back, from the next message on; raises RunError if the steward has no name."""
        name = _name(steward)
        with self._locked():
            if self.state(digest).revoked is None:
                self._decide(digest, "revoke", name)
        return self.state(digest)

    def decisions(self) -> tuple[bytes, ...]:
        """What the coordinator shall know, an envelope for each plan: the newest approval that counts, or its end."""
        found = (self._newest(path.stem) for path in _files(self.home / "approvals"))
        return tuple(envelope for envelope in found if envelope is not None)

    # --- files

    def _opened(self, envelope: bytes) -> Held:
        try:
            proposal = open_proposal(envelope, self.identity.log_key)
        except EnvelopeError as error:
            raise PlanError(str(error), "ask the coordinator to propose the plan again") from error
        plan = proposal.parsed_plan()
        if plan.digest != proposal.digest:
            reason = f"the plan of proposal {proposal.digest[:12]} reads differently in this version of Locum"
            raise PlanError(reason, "install the version of Locum that the coordinator has")
        return Held(proposal, plan)

    def _proposal_file(self, digest: str) -> Path:
        return self.home / "proposals" / f"{digest}.json"

    def _held(self, path: Path) -> Held | None:
        try:
            held = self._opened(path.read_bytes())
        except (FileNotFoundError, PlanError):
            return None
        return held if held.digest == path.stem else None

    def _decisions(self, digest: str) -> _Decisions | None:
        """What is kept of a plan; None if there is no file, or one that this site did not write."""
        try:
            content = self._approval_file(digest).read_bytes()
            known = _Decisions.model_validate(unseal(content, _KIND, self.identity.key.public_key()))
        except (FileNotFoundError, EnvelopeError, ValidationError):
            return None
        return known if (known.site, known.digest) == (self.identity.site, digest) else None

    def _approval_file(self, digest: str) -> Path:
        return self.home / "approvals" / f"{digest}.json"

    def _approvals(self, known: _Decisions | None) -> list[Approval]:
        """The decisions in a file that was found whole."""
        if known is None:
            return []
        key = self.identity.key.public_key()
        return [open_approval(envelope.encode(), key) for envelope in known.envelopes]

    def _decide(self, digest: str, decision: Literal["approve", "revoke"], steward: str) -> None:
        known = self._decisions(digest) or _Decisions(site=self.identity.site, digest=digest)
        before = self._approvals(known)
        at = max([self.clock(), *(one.at + _TICK for one in before)])  # a clock set back must not undo a decision
        made = Approval(site=self.identity.site, digest=digest, at=at, decision=decision, steward=steward)
        envelope = seal_approval(made, self.identity.key)
        kept = known.envelopes if decision == "approve" else ()
        after = known.model_copy(update={"envelopes": (*kept, envelope.decode())})
        if decision == "approve":
            self.decided(digest, envelope)
            self._write(after)
        else:
            self._write(after)
            self.decided(digest, envelope)

    def _write(self, decisions: _Decisions) -> None:
        path = self._approval_file(decisions.digest)
        replace_file(path, seal(_KIND, decisions.model_dump(mode="json"), self.identity.key))

    def _newest(self, digest: str) -> bytes | None:
        """The newest decision that says whether the plan stands; None if none says it."""
        known, wanted = self._decisions(digest), "approve" if self.standing(digest) else "revoke"
        if known is None:
            return None
        told = zip(self._approvals(known), known.envelopes, strict=True)
        return next((envelope.encode() for one, envelope in reversed(list(told)) if one.decision == wanted), None)

    def _undecided(self) -> list[Path]:
        return [path for path in _files(self.home / "proposals") if not self._approval_file(path.stem).exists()]

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """One change at a time, over all processes."""
        folder = self.home / "approvals"
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / ".lock").open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def open_approvals(home: Path, policy: Policy) -> Approvals:
    """The approvals of an enrolled site; raises DataError if it is not enrolled."""

    def decided(plan: str, envelope: bytes) -> None:
        open_releases(home).decided(plan, envelope)

    return Approvals(home, policy, load_identity(home), decided)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.json") if _NAME.fullmatch(path.stem))


def _content(path: Path) -> bytes | None:
    """What a file holds; None if there is none."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _name(steward: str) -> str:
    """A steward's name as it is signed; raises RunError."""
    name = " ".join(steward.split())
    if not name or len(name) > _LONGEST_NAME or not name.isprintable():
        raise RunError("a steward has a name of up to 100 characters", "give it with --steward NAME")
    return name


def _folded(name: str) -> str:
    """A name as it is compared: two spellings of one person are one steward."""
    return " ".join(name.casefold().split())
