"""Canaries in private training: invented patients whose part the observer knows, to hold the noise against its claim.

They take part in the very steps that patients do (:func:`locum.site_client.training.private.train_privately`): drawn
by the same sampler at the same rate, clipped by the same code, under the same noise. Only a check by the site's own
staff or a simulation brings them along; a round that a coordinator asked for has none, and what is trained with
them is thrown away.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from locum.common.metrics import Floats
from locum.site_client.privacy.accountant import Mechanism
from locum.site_client.privacy.noise import NoiseSource
from locum.site_client.privacy.one_run import evidence
from locum.site_client.privacy.sampling import PoissonSampler

if TYPE_CHECKING:
    from locum.site_client.training.private import Engine

#: Canaries at most; their gradients are long before they are clipped, and as many are added at once.
_MOST, _LONG, _AT_ONCE = 1000, 10.0, 8


class Canaries:
    """As many canaries as a network has numbers, at most a thousand; who is in says a fair coin.

    Attributes:
        included: whether each is in.
        scores: the evidence that each is in, summed over the steps that were watched.
        noise: the source that is held against its claim.
    """

    def __init__(self, numbers: int, mechanism: Mechanism, *, clip: float, noise: NoiseSource | None = None) -> None:
        """Args: numbers of the network that are trained, the mechanism that is claimed, C, the source or a new one."""
        self.noise = noise or NoiseSource()
        rng, count = np.random.default_rng(), min(_MOST, numbers)  # seeded by the operating system
        self.included = rng.random(count) < 0.5
        self.scores: Floats = np.zeros(count)
        self._places = rng.choice(numbers, count, replace=False)
        self._numbers, self._mechanism, self._clip = numbers, mechanism, clip
        self._sampler = PoissonSampler([[one] for one in np.flatnonzero(self.included).tolist()], mechanism.rate)

    def join(self, engine: Engine) -> None:
        """Adds the gradients of those that are in and drawn for this step."""
        drawn = [one for (one,) in self._sampler.draw()]
        for start in range(0, len(drawn), _AT_ONCE):
            places = torch.from_numpy(self._places[drawn[start : start + _AT_ONCE]])
            rows = torch.zeros(len(places), self._numbers)
            rows[torch.arange(len(places)), places] = _LONG * self._clip
            engine.add_rows(rows)

    def watch(self, engine: Engine, *, expected: float) -> None:
        """Looks at what the step has released."""
        gradients = [parameter.grad for parameter in engine.trainable.values()]
        released = torch.cat([gradient.flatten() for gradient in gradients if gradient is not None]).cpu().numpy()
        seen = released[self._places].astype(np.float64) * expected / self._clip
        self.scores += evidence(seen, self._mechanism)
