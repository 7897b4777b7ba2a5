from __future__ import annotations

import math

import pytest
from opacus.accountants.prv import PRVAccountant

from locum.site_client.privacy.accountant import LEAST_NOISE, Mechanism, epsilon, noise_for

_SETTINGS = [
    (0.7, 0.01, 100), (0.8, 0.02, 200), (0.9, 0.05, 100), (1.0, 0.01, 1000), (1.0, 0.05, 300),
    (1.0, 0.1, 50), (1.1, 0.002, 5000), (1.2, 0.1, 100), (1.3, 0.03, 1000), (1.5, 0.2, 60),
    (1.5, 0.05, 1500), (2.0, 0.1, 500), (2.0, 0.5, 20), (2.5, 0.25, 100), (3.0, 0.02, 3000),
    (3.0, 1.0, 5), (4.0, 0.5, 100), (6.0, 0.3, 500), (8.0, 1.0, 50), (12.0, 0.5, 400),
]  # fmt: skip


@pytest.mark.parametrize(("noise", "rate", "steps"), _SETTINGS)
def test_the_epsilon_is_that_of_another_accountant(noise: float, rate: float, steps: int) -> None:
    other = PRVAccountant()
    other.history = [(noise, rate, steps)]
    expected = other.get_epsilon(1e-5, eps_error=0.005)
    assert epsilon([Mechanism(noise, rate, steps)], 1e-5) == pytest.approx(expected, abs=0.02)


def test_one_step_with_everybody_has_the_analytic_epsilon() -> None:
    """Balle & Wang, ICML 2018, theorem 8: delta of a Gaussian mechanism."""

    def delta(at: float, sigma: float) -> float:
        def cdf(x: float) -> float:
            return 0.5 * math.erfc(-x / math.sqrt(2))

        return cdf(1 / (2 * sigma) - at * sigma) - math.exp(at) * cdf(-1 / (2 * sigma) - at * sigma)

    for sigma in (0.6, 1.0, 3.0, 10.0):
        found = epsilon([Mechanism(sigma, 1.0, 1)], 1e-5)
        assert delta(found, sigma) <= 1e-5
        assert delta(found - 0.01, sigma) > 1e-5


def test_nothing_costs_nothing_and_no_noise_costs_everything() -> None:
    assert epsilon([], 1e-5) == 0.0
    assert epsilon([Mechanism(1.0, 0.1, 0), Mechanism(1.0, 0.0, 5)], 1e-5) == 0.0
    assert epsilon([Mechanism(0.0, 0.1, 1)], 1e-5) == math.inf


def test_the_order_and_the_cutting_up_of_mechanisms_do_not_matter() -> None:
    whole = [Mechanism(1.5, 0.1, 30), Mechanism(3.0, 1.0, 2)]
    parts = [Mechanism(3.0, 1.0, 1), Mechanism(1.5, 0.1, 10), Mechanism(3.0, 1.0, 1), Mechanism(1.5, 0.1, 20)]
    assert epsilon(parts, 1e-5) == epsilon(whole, 1e-5)


def test_more_of_anything_costs_more() -> None:
    base = epsilon([Mechanism(1.5, 0.1, 30)], 1e-5)
    assert base < epsilon([Mechanism(1.5, 0.1, 31)], 1e-5)
    assert base < epsilon([Mechanism(1.5, 0.11, 30)], 1e-5)
    assert base < epsilon([Mechanism(1.49, 0.1, 30)], 1e-5)
    assert base < epsilon([Mechanism(1.5, 0.1, 30), Mechanism(5.0, 1.0, 1)], 1e-5)
    assert base < epsilon([Mechanism(1.5, 0.1, 30)], 1e-6)


def test_absurd_epsilons_are_told_too() -> None:
    assert 1e6 < epsilon([Mechanism(0.1, 0.9, 10**6)], 1e-5) < math.inf


@pytest.mark.parametrize(("asked", "rate", "steps"), [(1.0, 0.01, 1000), (8.0, 0.1, 500), (0.5, 0.2, 200), (3.0, 1, 5)])
def test_the_noise_advised_is_the_least_of_three_digits_that_is_enough(asked: float, rate: float, steps: int) -> None:
    noise = noise_for(asked, 1e-5, rate=rate, steps=steps)
    assert noise == float(f"{noise:.3g}")
    assert epsilon([Mechanism(noise, rate, steps)], 1e-5) <= asked
    less = noise - 10.0 ** (math.floor(math.log10(noise)) - 2)
    assert epsilon([Mechanism(less, rate, steps)], 1e-5) > asked


def test_there_is_a_least_noise() -> None:
    assert noise_for(400.0, 1e-5, rate=1.0, steps=5) == LEAST_NOISE


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5])
def test_a_delta_that_is_none_is_refused(delta: float) -> None:
    with pytest.raises(ValueError, match="delta"):
        epsilon([Mechanism(1.0, 0.1, 1)], delta)


def test_an_epsilon_of_zero_has_no_noise() -> None:
    with pytest.raises(ValueError, match="no noise"):
        noise_for(0.0, 1e-5, rate=0.1, steps=1)


@pytest.mark.parametrize("wrong", [(-1.0, 0.1, 1), (math.nan, 0.1, 1), (1.0, 1.1, 1), (1.0, 0.1, -1)])
def test_a_mechanism_that_is_none_is_refused(wrong: tuple[float, float, int]) -> None:
    with pytest.raises(ValueError, match="no mechanism"):
        Mechanism(*wrong)
