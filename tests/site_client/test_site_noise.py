"""Site noise at a site: what is clipped, what is counted, what a steward reads."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from locum.common.errors import Code
from locum.common.plan import Plan
from locum.common.sums import site_noise, weight_cap
from locum.site_client import gate
from locum.site_client.gate import Made, Policy
from locum.site_client.review import plan_in_words
from locum.site_client.vault import Vault
from tests.plans import initial, secured
from tests.site_client.asking import failure
from tests.site_client.circle import NAMES, RUN, Circle

_DONE = {"loss": 0.5, "steps": 2, "cases": 7, "seconds": 1.0}


def noisy(clip: float = 5.0, **changes: Any) -> Plan:
    """A plan of one round with site noise and a spare round."""
    noise = {"epsilon": 8.0, "delta": 1e-6, "clip": clip}
    return secured(**{"rounds": 1, "participation__weighting": "equal", "protection__site_noise": noise, **changes})


@pytest.fixture
def circle(tmp_path: Path) -> Circle:
    return Circle(tmp_path, of=noisy()).set_up()


def _norm(given: Any) -> float:
    squares = sum(
        float((given.weight * array.astype(float) ** 2 * given.weight).sum()) for array in given.update.values()
    )
    return math.sqrt(squares)


@pytest.mark.parametrize("value", [0.0, 0.01, 0.2, 3.0])
def test_an_update_is_clipped_before_it_is_masked(value: float) -> None:
    of = noisy(clip=2.0)
    model = initial(of)
    update = {name: np.full_like(array, value) for name, array in model.items()}
    given = gate.mask_update(Policy(), of, model=model, made=Made(update, _DONE)).given
    whole = value * math.sqrt(sum(array.size for array in model.values()))
    assert _norm(given) == pytest.approx(min(whole, 2.0), rel=1e-6)
    assert given.scalars["weight"].tolist() == [1.0]


def test_without_site_noise_nothing_is_clipped() -> None:
    of = secured()
    model = initial(of)
    update = {name: np.full_like(array, 3.0) for name, array in model.items()}
    given = gate.mask_update(Policy(), of, model=model, made=Made(update, _DONE)).given
    assert given.weight == 7 / weight_cap(of)


def test_the_sum_of_sites_holds_their_updates_and_the_noise_of_each(circle: Circle) -> None:
    total = circle.unmasked(circle.collected(circle.context()))
    noise = site_noise(circle.of, sites=3, size=total.update.size)
    assert noise is not None
    assert total.layout.noise == noise.variance
    off = noise.ring.read(total.update) / 3 - 0.01
    assert abs(off.std() / noise.deviation(3) - 1) < 6 / math.sqrt(2 * off.size)
    assert abs(off.mean()) < 6 * noise.deviation(3) / math.sqrt(off.size)


def test_a_site_gives_no_more_updates_than_the_noise_is_for(circle: Circle) -> None:
    assert circle.of.protection.site_noise is not None
    for step in (1, 2):  # the round and its spare
        circle.collected(circle.context(step, attempt=step))
    before = circle.state_file("north").read_bytes()
    assert failure(circle.give("north", circle.context(3, attempt=3))) == (Code.BUDGET_SPENT, "BUDGET_SPENT")
    assert circle.state_file("north").read_bytes() == before
    assert "the site noise is for 2" in circle.log_of("north")


def test_what_was_given_is_known_after_a_restart_and_after_a_new_set_up(circle: Circle) -> None:
    circle.collected(circle.context())
    for name in NAMES:
        circle.restart(name)
    circle.set_up()
    circle.collected(circle.context(attempt=2))
    circle.restart("north")
    assert failure(circle.give("north", circle.context(2, attempt=3))) == (Code.BUDGET_SPENT, "BUDGET_SPENT")


def test_metrics_have_no_noise_and_cost_none(circle: Circle) -> None:
    for step in (1, 2, 3):
        total = circle.unmasked(circle.collected(circle.context(step, purpose="validation")))
        assert total.layout.noise == 0
    assert circle.agents["north"].secure.vault.noised(RUN) == 0


def test_a_spare_round_more_lets_one_update_more_leave_and_makes_the_noise_larger(tmp_path: Path) -> None:
    spare = {"epsilon": 8.0, "delta": 1e-6, "clip": 5.0, "spare_rounds": 2}
    circle = Circle(tmp_path, of=noisy(protection__site_noise=spare)).set_up()
    for step in (1, 2, 3):
        circle.collected(circle.context(step, attempt=step))
    assert failure(circle.give("north", circle.context(4, attempt=4)))[0] == Code.BUDGET_SPENT
    one, two = (site_noise(of, sites=3, size=1000) for of in (noisy(), circle.of))
    assert one is not None
    assert two is not None
    assert two.deviation(3) > one.deviation(3)


def test_a_line_that_a_crash_cut_off_does_not_hide_the_next(tmp_path: Path) -> None:
    circle = Circle(tmp_path, of=noisy()).set_up()
    vault = circle.agents["north"].secure.vault
    vault.add_noised(RUN, "a" * 64)
    path = circle.state_file("north").parent / "noised.jsonl"
    path.write_bytes(path.read_bytes() + b'"bbb')
    again = Vault(path.parent.parent)
    assert again.noised(RUN) == 1
    again.add_noised(RUN, "c" * 64)
    assert again.noised(RUN) == 2


# --- what a steward reads


def test_a_review_says_what_the_noise_hides_and_what_it_does_not() -> None:
    said = " ".join(plan_in_words(noisy(), Policy())["Privacy"])
    for words in (
        "Noise that hides which site gave what: epsilon 8, delta 1e-06 for this site",
        "clipped to a norm of 5",
        "NOT covered by that noise: the sums of AUC, accuracy, the training loss, the numbers of cases.",
        "NOT a protection of patients",
        "NONE in the update: no differential privacy.",
    ):
        assert words in said, words
    bare = noisy(release={"metrics": [], "training_loss": False, "case_counts": False})
    assert "NOT covered by that noise" not in " ".join(plan_in_words(bare, Policy())["Privacy"])
    assert "Noise" not in " ".join(plan_in_words(secured(), Policy())["Privacy"])
