"""The benchmark of secure sums: both sides give the right mean. Its times are not tested."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from locum.common.errors import RunError
from locum.common.secagg.roster import threshold_of
from locum.simulations.benchmarks.flower_secagg import SecAggPlus
from locum.simulations.benchmarks.secure_sum import Locum, beside_flower, check, vector_of

_SIZE, _SITES = 1000, 4
_ALL = slice(0, _SIZE)


@pytest.mark.parametrize("gone", [0, 1])
def test_our_sum_of_those_who_gave_is_right(tmp_path: Path, gone: int) -> None:
    vector = vector_of(_SIZE)
    ours = Locum(tmp_path, vector, sites=_SITES)
    survivors = ours.names[: _SITES - gone]
    for name in survivors:
        ours.mask(name, np.empty(_SIZE, np.uint32))
        ours.upload(name)
    total = ours.fold(survivors)
    assert not np.allclose(ours.mean(total, _ALL), vector, atol=1e-2)
    ours.unmask(total, {name: ours.answer(name, total) for name in survivors})
    np.testing.assert_allclose(ours.mean(total, _ALL), vector, atol=1e-7)


@pytest.mark.parametrize("gone", [0, 1])
def test_the_sum_of_flower_is_right(gone: int) -> None:
    vector, clients = vector_of(_SIZE), range(1, _SITES + 1)
    theirs = SecAggPlus(vector, sites=_SITES, threshold=threshold_of(_SITES))
    for client in clients:
        theirs.set_up(client)
    for client in clients:
        theirs.share(client)
    survivors = clients[: _SITES - gone]
    for client in survivors:
        theirs.collect(client, 250 * client)
    total = theirs.fold(survivors)
    answers = [theirs.answer(client, survivors) for client in survivors]
    mean = theirs.mean(theirs.unmask(total, survivors, answers), len(survivors))
    np.testing.assert_allclose(mean, vector, atol=2e-5)


def test_a_wrong_sum_ends_the_benchmark() -> None:
    vector = vector_of(_SIZE)
    with pytest.raises(RunError, match="not the sum"):
        check(lambda part: vector[part] + 0.01, vector)


def test_the_ratios_are_those_of_the_seconds_and_an_upload_has_half_the_bytes(tmp_path: Path) -> None:
    found = {row.what: row.value for row in beside_flower(tmp_path, vector_of(20_000), _SITES)}
    what = "0.02 M, 4 sites"
    seconds = [
        found[f"{what}: client, {side}"] for side in ("Flower, made bytes", "Locum, file written, hashed, signed")
    ]
    assert found[f"{what}: client as sent, Flower / Locum"] == seconds[0] / seconds[1]
    assert 1.9 < found[f"{what}: upload, Flower"] / found[f"{what}: upload, Locum"] < 2.1
