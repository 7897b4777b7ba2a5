from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from locum.common.messages import TrainResult
from locum.server.admission import Update
from locum.server.fold import Fold

MODEL = {"w": np.zeros((3, 2), np.float32)}


def _update(seed: int) -> Update:
    rng = np.random.default_rng(seed)
    header = TrainResult(plan_digest="0" * 64, round=1, weight=float(rng.uniform(0.1, 9)), steps=1, loss=0, seconds=0)
    return Update(header, {"w": rng.normal(size=(3, 2)).astype(np.float32) * 10.0 ** rng.integers(-6, 6)})


@given(st.permutations(range(7)), st.sets(st.integers(0, 6)), st.sets(st.integers(0, 6)))
def test_the_sum_is_the_same_to_the_bit_in_whatever_order_replies_arrive(
    order: list[int], refused: set[int], absent: set[int]
) -> None:
    sites = [f"s{number}" for number in range(7)]

    def folded(arrival: list[int]) -> tuple[bytes, float, int]:
        fold = Fold(MODEL, sites)
        for number in arrival:
            if number not in absent:
                fold.offer(sites[number], None if number in refused else _update(number))
        return fold.close()["w"].tobytes(), fold.weight, fold.count

    assert folded(order) == folded(list(range(7)))
    assert folded(order)[2] == len(set(range(7)) - refused - absent)


def test_the_sum_in_blocks_is_to_the_bit_that_in_one_piece() -> None:
    rng = np.random.default_rng(0)
    model = {"f": np.zeros((333, 777), np.float32), "h": np.zeros((5,), np.float16), "n": np.zeros((), np.int64)}
    updates = [
        {
            "f": rng.normal(size=(777, 333)).astype(np.float32).T,
            "h": rng.normal(size=5).astype(np.float16),
            "n": np.array(7),
        }
        for _ in range(3)
    ]
    fold, expected = Fold(model, ["a", "b", "c"]), {name: np.zeros(tensor.shape) for name, tensor in model.items()}
    for site, tensors in zip("abc", updates, strict=True):
        weight = float(rng.uniform(0.1, 9))
        header = TrainResult(plan_digest="0" * 64, round=1, weight=weight, steps=1, loss=0, seconds=0)
        fold.offer(site, Update(header, tensors))
        for name, tensor in tensors.items():
            expected[name] += weight * tensor.astype(np.float64)
    assert {name: total.tobytes() for name, total in fold.close().items()} == {
        name: total.tobytes() for name, total in expected.items()
    }
