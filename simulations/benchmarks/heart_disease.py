"""FedAvg with differential privacy on the four hospitals of the UCI heart disease data, beside published numbers.

The data of FLamby's Fed-Heart-Disease (Ogier du Terrail et al., NeurIPS 2022, datasets track): its 740 records in four
centres, two thirds for training, logistic regression. Published accuracy of FedAvg with DP-SGD: 0.685 at epsilon 1 and
0.704 at epsilon 5. There is one record a patient, so **the unit is the record**.

Steps, noise, draws and accounting are those of a site: the engine of :mod:`locum.site_client.training.private`, the
sampler, the noise source, the accountant. Values are scaled by constants of medicine and not by the data's own
statistics, which would have to be paid for. Nothing was tuned on the records for testing.
"""

from __future__ import annotations

import copy
import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from locum.common.errors import DataError
from locum.simulations.benchmarks.rows import Row

_DATA = Path("../shared/data/heart_disease_4hospitals")
_CENTRES = ("cleveland", "hungarian", "switzerland", "va")
#: Columns: age, sex, chest pain, resting blood pressure, cholesterol, fasting blood sugar, ECG at rest, largest heart
#: rate, angina by exercise, ST depression. The other three are hardly ever known outside Cleveland.
_USED = 10
#: Of the numbers: column, a usual value, a usual spread. A cholesterol of 0 is unknown, and counts as usual.
_SCALES = ((0, 54.0, 9.0), (3, 130.0, 18.0), (4, 245.0, 50.0), (7, 145.0, 24.0), (9, 1.0, 1.0))
_CHOLESTEROL, _UNKNOWN = 4, -9.0
_TRAINED = 0.66
_EPSILONS, _SEEDS = (1.0, 5.0), 5
#: A noise source gives no noise of 0.
_NEXT_TO_NONE = 1e-6
_ROUNDS, _STEPS, _RATE, _CLIP, _LEARNING = 10, 2, 1.0, 1.0, 0.5


class Records(NamedTuple):
    """Records of one centre: inputs (n × 13) and whether there is disease (n)."""

    inputs: NDArray[np.float32]
    disease: NDArray[np.int64]


@dataclass(frozen=True)
class Centre:
    """One hospital's records, split."""

    train: Records
    test: Records


def measure() -> Iterator[Row]:
    """Accuracy over all centres' test records, and the mean of the centres', over several splits."""
    records = [_read(_DATA / f"processed.{name}.data") for name in _CENTRES]
    for epsilon in (None, *_EPSILONS):
        found = [_accuracies(epsilon, [_split(one, seed) for one in records], seed) for seed in range(_SEEDS)]
        pooled, mean = np.array(found).T
        name = "without privacy" if epsilon is None else f"epsilon {epsilon:g} for a record"
        yield Row(f"{name}: accuracy over all records, mean of {_SEEDS} splits", float(pooled.mean()), "")
        yield Row(f"{name}: standard deviation over the splits", float(pooled.std(ddof=1)), "")
        yield Row(f"{name}: mean of the four centres' accuracies", float(mean.mean()), "")


def _read(path: Path) -> Records:
    if not path.is_file():
        raise DataError(f"there is no {path}", "run from the project's root, with the shared data beside it")
    with path.open() as file:
        rows = np.array([[float(value) for value in row] for row in list(csv.reader(file))[1:]])
    whole = rows[(rows[:, :_USED] != _UNKNOWN).all(axis=1)]
    numbers = [np.where((column == _CHOLESTEROL) & (whole[:, column] == 0), 0, (whole[:, column] - usual) / spread)
               for column, usual, spread in _SCALES]  # fmt: skip
    pain = [whole[:, 2] == kind for kind in (2, 3, 4)]
    ecg = [whole[:, 6] == kind for kind in (1, 2)]
    inputs = np.stack([*numbers, whole[:, 1], whole[:, 5], whole[:, 8], *pain, *ecg], axis=1)
    return Records(inputs.astype(np.float32), (whole[:, 13] > 0).astype(np.int64))


def _split(records: Records, seed: int) -> Centre:
    order = np.random.default_rng(seed).permutation(len(records.disease))
    cut = round(_TRAINED * len(order))
    return Centre(*(Records(records.inputs[rows], records.disease[rows]) for rows in (order[:cut], order[cut:])))


def _accuracies(epsilon: float | None, centres: Sequence[Centre], seed: int) -> tuple[float, float]:
    """Over all test records, and the mean over centres, of the model after the last round."""
    import torch

    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(centres[0].train.inputs.shape[1], 2))
    total = sum(len(one.train.disease) for one in centres)
    for _ in range(_ROUNDS):
        local = [_trained(epsilon, model, one.train) for one in centres]
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parts = zip(local, centres, strict=True)
                parameter.copy_(sum(len(c.train.disease) / total * net.get_parameter(name) for net, c in parts))
    right = [_right(model, one.test) for one in centres]
    return float(np.concatenate(right).mean()), float(np.mean([one.mean() for one in right]))


def _trained(epsilon: float | None, model: Any, records: Records) -> Any:
    """The model after one round at one centre."""
    import torch

    from locum.common import build
    from locum.site_client.privacy.accountant import noise_for
    from locum.site_client.privacy.noise import NoiseSource
    from locum.site_client.privacy.sampling import PoissonSampler
    from locum.site_client.training.private import Engine

    plan, count = _plan(), len(records.disease)
    network = copy.deepcopy(model)
    engine, noise = Engine(plan, network), NoiseSource()
    optimiser = build.optimiser(plan, engine.trainable.values())
    sampler = PoissonSampler([[record] for record in range(count)], _RATE)
    inputs, labels = torch.from_numpy(records.inputs), torch.from_numpy(records.disease)
    delta = min(1e-5, 1 / (10 * count))
    multiplier = _NEXT_TO_NONE if epsilon is None else noise_for(epsilon, delta, rate=_RATE, steps=_ROUNDS * _STEPS)
    for _ in range(_STEPS):
        drawn = [cases[0] for cases in sampler.draw()]
        engine.add({"image": inputs[case][None, None], "label": labels[case][None]} for case in drawn)
        engine.release(noise, multiplier * _CLIP, expected=_RATE * count)
        optimiser.step()
    return network


def _right(model: Any, records: Records) -> NDArray[np.bool_]:
    import torch

    with torch.inference_mode():
        scores = model(torch.from_numpy(records.inputs)[:, None])
    found: NDArray[np.bool_] = scores.argmax(dim=1).numpy() == records.disease
    return found


def _plan() -> Any:
    from locum.common.plan import parse_plan

    content = {
        "name": "heart-disease",
        "purpose": "to measure what privacy costs in accuracy",
        "contract": {"task": "classification", "dimensions": 2, "classes": ["healthy", "disease"]},
        "network": {"name": "DenseNet121", "norm": "instance"},
        "loss": {"name": "CrossEntropyLoss"},
        "optimiser": {"name": "SGD", "lr": _LEARNING},
        "training": {"input_size": [32, 32], "batch_size": 1, "local_steps": _STEPS},
        "rounds": _ROUNDS,
        "protection": {"differential_privacy": {"epsilon": 1, "delta": 1e-5, "clip": _CLIP}},
        "evaluation": {"metrics": ["accuracy"]},
        "release": {"training_loss": False, "metrics": []},
    }
    return parse_plan(json.dumps(content).encode())
