"""Site noise in a run: the noise of the released mean is what was told, and a run goes on beside it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message

from locum.common.errors import Code, RunError
from locum.common.plan import Plan
from locum.common.sums import site_noise
from locum.server.report_words import protection_words
from tests.plans import initial, secured
from tests.secure_peers import SecurePeer, failed, run_secure
from tests.server.test_secure import Oversized, events_of, moved

NOISE = {"epsilon": 20.0, "delta": 1e-6, "clip": 10.0, "spare_rounds": 1}


def of(**changes: Any) -> Plan:
    """A plan of one round with site noise."""
    base = {"rounds": 1, "participation__weighting": "equal", "protection__site_noise": NOISE}
    return secured(**{**base, **changes})


def peers(count: int) -> list[SecurePeer]:
    return [SecurePeer(name, 0.01 * number) for number, name in enumerate("abcdefgh"[:count], start=1)]


@pytest.mark.parametrize("ring", [32, 64])
@pytest.mark.parametrize("sites", [3, 5])
def test_the_model_moves_by_the_mean_and_the_noise_that_is_told(tmp_path: Path, sites: int, ring: int) -> None:
    plan = of(protection__ring=ring)
    finished = run_secure(plan, peers(sites), tmp_path)
    record = finished.history[0].secured
    assert record is not None
    size = sum(array.size for array in initial(plan).values())
    noise = site_noise(plan, sites=sites, size=size)
    assert noise is not None
    assert record.noise == pytest.approx(noise.deviation(sites))
    off = np.concatenate([change.ravel() for change in moved(finished, plan)]) - 0.01 * (sites + 1) / 2
    assert abs(off.std() / record.noise - 1) < 6 / math.sqrt(2 * size)
    assert abs(off.mean()) < 6 * record.noise / math.sqrt(size)


def test_a_sum_without_a_lost_site_has_less_noise_and_not_too_little(tmp_path: Path) -> None:
    class Lost(SecurePeer):
        def train(self, message: Message, bundle: bytes) -> Message:
            return failed(message, Code.WORKER_DIED)

    plan = of()
    finished = run_secure(plan, [*peers(4), Lost("e")], tmp_path)
    record = finished.history[0].secured
    assert record is not None
    noise = site_noise(plan, sites=5, size=sum(array.size for array in initial(plan).values()))
    assert noise is not None
    assert len(record.uploads) == 4
    assert record.noise == pytest.approx(noise.deviation(4))


class LostOnce(SecurePeer):
    """Is not there for the first attempts at a round."""

    times = 1

    def train(self, message: Message, bundle: bytes) -> Message:
        self.times -= 1
        return failed(message, Code.WORKER_DIED) if self.times >= 0 else super().train(message, bundle)


def test_a_round_is_repeated_as_often_as_the_noise_is_for(tmp_path: Path) -> None:
    finished = run_secure(of(), [*peers(2), LostOnce("c")], tmp_path / "spare")
    assert finished.status == "completed"
    assert finished.history[0].attempt == 2
    none = of(protection__site_noise={**NOISE, "spare_rounds": 0})
    with pytest.raises(RunError):
        run_secure(none, [*peers(2), LostOnce("c")], tmp_path / "none")
    reasons = {event["reason"] for event in events_of(tmp_path / "none", "refused")}
    assert any("privacy budget" in reason for reason in reasons)


def test_a_sum_that_no_honest_updates_with_noise_can_have_is_void(tmp_path: Path) -> None:
    plan = of(participation={"quorum": 3, "attempts": 2, "weighting": "equal"})
    with pytest.raises(RunError, match="the sum failed its check: its norm is"):
        run_secure(plan, [*peers(3), Oversized("d")], tmp_path)


def test_the_report_says_what_the_noise_hides_and_how_large_it_was(tmp_path: Path) -> None:
    plan = of()
    finished = run_secure(plan, peers(3), tmp_path)
    said = dict(protection_words(plan, finished.history))
    record = finished.history[0].secured
    assert record is not None
    for words in (
        f"its standard deviation was up to {record.noise:.2g} a number",
        "epsilon 20 at delta 1e-06 for one site",
        "Sums of losses, metrics and counts have no such noise.",
        "no differential privacy of patients",
    ):
        assert words in said["Site noise"], words
    assert "Rounding" not in said
    assert "Site noise" not in dict(protection_words(secured(), ()))
