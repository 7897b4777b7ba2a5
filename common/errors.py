"""The errors a person sees: what went wrong, and what to do next.

Rules:
  * An error is raised where the fact is known and carries its remedy.
  * What leaves a site of an error is its :class:`Code` and nothing else; the text stays in the site's own log.
"""

from __future__ import annotations

from enum import IntEnum


class LocumError(Exception):
    """An error with a remedy; the command line prints both and no traceback.

    Attributes:
        message: what went wrong, one sentence.
        remedy: the next thing to do, one sentence.
    """

    def __init__(self, message: str, remedy: str) -> None:
        super().__init__(message, remedy)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return self.message


class PlanError(LocumError):
    """A plan that cannot be accepted; the message names the line and the key."""


class DataError(LocumError):
    """Images, labels or folders that are not as described."""


class RunError(LocumError):
    """A run that cannot start or go on; committed rounds are kept."""


class Code(IntEnum):
    """Why a site did not answer with a result. The only part of a failure that leaves a site."""

    INTERNAL = 100
    PLAN_UNREADABLE = 101
    PLAN_MISMATCH = 102
    POLICY_REFUSED = 103
    NO_DATA = 104
    DATA_UNREADABLE = 105
    LOSS_NOT_FINITE = 106
    UPDATE_REFUSED = 107
    WORKER_DIED = 108
    OUT_OF_MEMORY = 109
    DISK_FULL = 110
    MESSAGE_UNREADABLE = 111
    PLAN_UNBUILDABLE = 112
    NOT_APPROVED = 113
    SECURE_SUM_REFUSED = 114
    SETUP_UNKNOWN = 115
    PRIVACY_REFUSED = 116
    BUDGET_SPENT = 117
    NOT_READY = 118


#: What a code means to the ML team, and what they can do about it without seeing the site's log.
MEANING: dict[Code, tuple[str, str]] = {
    Code.INTERNAL: ("an unexpected error inside the agent", "ask the site for its own log"),
    Code.PLAN_UNREADABLE: ("the bundle holds no readable plan", "propose the plan again"),
    Code.PLAN_MISMATCH: ("the message names another plan than the bundle", "start a new run of this plan"),
    Code.POLICY_REFUSED: (
        "the site's policy forbids this plan",
        "ask the site's steward which clause refused it",
    ),
    Code.NO_DATA: ("the site has no case for this step", "check the site's readiness, or leave the site out"),
    Code.DATA_UNREADABLE: ("a stored image could not be read or transformed", "ask the site to ingest again"),
    Code.LOSS_NOT_FINITE: ("the loss became NaN or infinite", "lower the learning rate or clip gradients"),
    Code.UPDATE_REFUSED: (
        "the site's own checks refused its update",
        "lower the learning rate or raise the norm bound",
    ),
    Code.WORKER_DIED: ("the worker process died", "it is started again; watch the site's memory"),
    Code.OUT_OF_MEMORY: ("the worker ran out of memory", "use a smaller batch or patch"),
    Code.DISK_FULL: ("the site's disk is full", "ask the site to free space"),
    Code.MESSAGE_UNREADABLE: ("the message is not in this protocol's form", "check that versions agree"),
    Code.PLAN_UNBUILDABLE: (
        "the plan's parts cannot be built here",
        "compare package versions with the site",
    ),
    Code.NOT_APPROVED: (
        "the site has not approved this plan, or took its approval back",
        "ask the site's steward to review it: locum site review",
    ),
    Code.SECURE_SUM_REFUSED: (
        "the site refused a step of secure aggregation",
        "ask the site for its own log, which says which check failed",
    ),
    Code.SETUP_UNKNOWN: (
        "the site has no keys of this roster",
        "nothing: the next attempt sets up anew",
    ),
    Code.PRIVACY_REFUSED: (
        "the plan's privacy cannot be kept with this site's data or network",
        "ask the site's steward: locum site ledger --explain says what would do",
    ),
    Code.BUDGET_SPENT: (
        "the site's privacy budget does not allow this any more",
        "go on without the site, or ask its steward",
    ),
    Code.NOT_READY: (
        "the site's data do not meet the plan's contract",
        "ask its steward: locum site readiness says what fails and how to mend it",
    ),
}


class SiteFailure(Exception):
    """A failure at a site, told to the coordinator as a code only.

    Attributes:
        code: what may leave the site.
        detail: free text for the site's own log; it never leaves.
    """

    def __init__(self, code: Code, detail: str = "") -> None:
        super().__init__(code, detail)
        self.code = code
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.code.name}: {self.detail}" if self.detail else self.code.name
