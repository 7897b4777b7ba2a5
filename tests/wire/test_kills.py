"""kill -9 of everything that a run needs; each run ends as it should and gives the model of one that nobody hurt."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from locum.common.plan import Plan
from tests.plans import plan
from tests.wire.federation import Federation, ended, events, model_of
from tests.wire.harm import EVALUATE, DESCRIBE, TRAIN, Taken, bits, expected, hold, kill, kill_app, mend, open_peers, release, told

PLANS = {
    "app": plan(name="app", rounds=2),
}


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    with open_peers(tmp_path_factory.mktemp("federation"), list(PLANS.values())) as federation:
        yield federation


@pytest.fixture
def federation(opened: Federation) -> Iterator[Federation]:
    mend(opened)
    yield opened
    mend(opened)


def test_the_run_process_is_killed_in_every_phase_of_a_round(federation: Federation, tmp_path: Path) -> None:
    of = PLANS["app"]
    taken = Taken(federation)
    hold(federation, DESCRIBE)
    run = federation.run(of)
    taken.wait("query.describe 0")
    kill_app(run)
    hold(federation, TRAIN)
    release_kind = lambda kind: [ (federation.folder / n / f"hold-{kind}").unlink(missing_ok=True) for n in "abc"]
    release_kind(DESCRIBE)
    taken.wait("train 1")
    kill_app(run)
    hold(federation, EVALUATE)
    release_kind(TRAIN)
    told(run, "committed", round=1)
    kill_app(run)
    taken.wait("evaluate 1")
    kill_app(run)
    release(federation)
    assert ended(run) == "completed"
    print([ (round(e["at"]-run.created.created_at,1), {k:v for k,v in e.items() if k not in("at","per_site","overall","cases")}) for e in events(run)])
    for n in "abc": print(n, taken.of(n))
    assert bits(model_of(run)) == expected(of, tmp_path)
