"""Plans with differential privacy, for tests."""

from __future__ import annotations

from typing import Any

from locum.common.plan import Plan
from tests.plans import plan

#: An epsilon of 2 in all, of which a round of two costs a good half.
PRIVACY: dict[str, Any] = {"epsilon": 2.0, "delta": 1e-3, "clip": 1.0, "metrics_epsilon": 1.0}


def private(*, secure: bool = False, **changes: Any) -> Plan:
    """The classification plan with differential privacy; what a change names within it, as `epsilon`, is changed."""
    own = {key: changes.pop(key) for key in list(changes) if key in {*PRIVACY, "spare_rounds", "images"}}
    fields = {
        "protection": {
            "secure_aggregation": "required" if secure else "off",
            "differential_privacy": {**PRIVACY, **own},
        },
        "release": {"training_loss": False},
        "participation__quorum": 3 if secure else 2,
    }
    return plan(**{**fields, **changes})
