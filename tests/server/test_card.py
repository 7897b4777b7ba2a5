"""The model card: its facts are those of the run, in the clear and under secure sums, and nothing else."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import RecordDict

from locum.common.build import metric_of
from locum.common.calibration import reliability
from locum.common.canonical import sha256_hex
from locum.common.messages import EvaluateTask, Tensors, pack, unpack
from locum.common.metrics import Outcomes, join
from locum.common.plan import Plan
from locum.server.app import end, write_result
from locum.server.card_facts import Known, facts_of
from locum.server.guidelines import NOT_STATED, PARTS
from locum.server.home import Home
from locum.server.link import Direct
from locum.server.model_card import ModelFile, newest_checkpoint
from locum.server.outcome import pull
from locum.server.records import Evaluated, RoundRecord, RunSummary
from locum.server.report_results import results_of
from locum.server.report_words import NOISE
from locum.server.runs import Run, create_run
from locum.site_client import gate
from locum.site_client.gate import Made, Policy
from tests.pages import Page
from tests.peers import Answer, Peer
from tests.plans import plan, secured
from tests.secure_peers import SecurePeer, run_secure
from tests.server.coordinator import go_on

METRICS = ["AUC", "accuracy", "calibration", "ECE", "Brier"]
ASKED: dict[str, Any] = {
    "evaluation__metrics": METRICS,
    "evaluation__subgroups": [{"by": "manufacturer", "values": ["SIEMENS", "GE"]}],
    "rounds": 1,
}
CELLS = ("SIEMENS", "GE", "other")
NOTHING = np.zeros((0, 0))


@dataclass(frozen=True)
class TestSet:
    """A site's test cases: what the model says of them, and whose scanner made each."""

    __test__ = False
    outcomes: Outcomes
    makers: tuple[str, ...]

    def of(self, maker: str) -> Outcomes:
        return self.outcomes.take(np.flatnonzero([own == maker for own in self.makers]))

    def sums(self, of: Plan, fold: str) -> Tensors:
        """As a site's worker has them (see `site_client/operations.py`)."""
        found = sums_of(of, self.outcomes)
        for maker in CELLS if fold == "test" else ():
            part = self.of(maker)
            own = {**sums_of(of, part), "cases": np.array([float(len(part.patients))])}
            found |= {f"{name}@manufacturer={maker}": array for name, array in own.items()}
        return found

    def cells(self) -> dict[str, list[int]]:
        return {f"manufacturer={m}": [n for n, own in enumerate(self.makers) if own == m] for m in CELLS}


def sums_of(of: Plan, found: Outcomes) -> Tensors:
    return {name: metric_of(name).sums(found, 2) for name in of.evaluation.metrics}


def test_set(site: str, seed: int, **makers: int) -> TestSet:
    rng, count = np.random.default_rng(seed), sum(makers.values())
    labels = (np.arange(count) % 2).astype(np.int64)
    chance = 1 / (1 + np.exp(-rng.normal(size=count) - (2 * labels - 1)))
    outcomes = Outcomes(
        tuple(f"{site}/{n}" for n in range(count)), labels, np.stack([1 - chance, chance], axis=1), NOTHING, NOTHING
    )
    return TestSet(outcomes, tuple(name for name, number in makers.items() for _ in range(number)))


test_set.__test__ = False  # type: ignore[attr-defined]
SETS = {
    "north": test_set("north", 1, SIEMENS=24, GE=16),
    "riverside": test_set("riverside", 2, GE=30, other=4),  # the others are few, so GE is not told apart either
    "st-anne": test_set("st-anne", 3, other=22),
    "lakeview": test_set("lakeview", 4, SIEMENS=15, GE=15, other=12),
}
TOLD = {"SIEMENS": ["north", "lakeview"], "GE": ["north", "lakeview"], "other": ["st-anne", "lakeview"]}
ALL_OTHER = "riverside"


class Plain(Peer):
    """A site without secure sums, whose answer goes through the gate."""

    def evaluate(self, plan: Plan, content: RecordDict) -> Answer:
        task, _ = unpack(content, EvaluateTask, self.carrier)
        mine = SETS[self.site]
        told = {"cases": len(mine.makers), "cells": mine.cells() if task.fold == "test" else {}}
        return pack(*gate.release_metrics(Policy(), plan, task, Made(mine.sums(plan, task.fold), told)))


class Secret(SecurePeer):
    """The same site in secure sums."""

    def sums(self, plan: Plan, request: dict[str, Any]) -> Tensors:
        return SETS[self.site].sums(plan, request["fold"])

    def cells(self, request: dict[str, Any]) -> dict[str, list[int]]:
        return SETS[self.site].cells() if request["fold"] == "test" else {}


@dataclass(frozen=True)
class Pulled:
    """A run that has ended, and what was pulled of it."""

    run: Run
    summary: RunSummary
    facts: dict[str, Any]
    card: str
    page: Page


def pulled(run: Run, folder: Path) -> Pulled:
    pull(run, folder)
    summary = RunSummary.model_validate_json(run.summary.read_bytes())
    facts = json.loads((folder / "model_card.json").read_text(encoding="utf-8"))
    page = Page((folder / "report.html").read_text(encoding="utf-8"))
    return Pulled(run, summary, facts, (folder / "model_card.md").read_text(encoding="utf-8"), page)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Pulled:
    home = Home(tmp_path_factory.mktemp("plain"))
    run = create_run(home, plan(name="plain", **ASKED))
    go_on(run, [Plain(site) for site in SETS])
    return pulled(run, home.path / "out")


@pytest.fixture(scope="module")
def secret(tmp_path_factory: pytest.TempPathFactory) -> Pulled:
    home = Home(tmp_path_factory.mktemp("secret"))
    of = secured(name="secret", **ASKED)
    run = create_run(home, of)
    with run.hold():
        finished = run_secure(of, [Secret(site, cases=len(SETS[site].makers)) for site in SETS], run.folder)
        log = Direct(Home(run.folder)).log(of)
        write_result(run.folder, finished, log)
        end(run.folder, log)
    return pulled(run, home.path / "out")


# --- numbers


def of_sums(name: str, found: Outcomes) -> Any:
    metric = metric_of(name)
    return metric.value(metric.sums(found, 2), 2)


def test_the_test_is_of_all_cases_with_the_intervals_of_their_sums(plain: Pulled) -> None:
    whole = join([each.outcomes for each in SETS.values()])
    for name in METRICS:
        metric = metric_of(name)
        assert np.allclose(plain.summary.test.overall[name], of_sums(name, whole))
        expected = metric.interval(metric.sums(whole, 2), 2) if metric.interval else None
        assert plain.summary.test.intervals.get(name) == (None if expected is None else pytest.approx(expected))


def test_a_cell_is_of_the_sites_that_have_enough_of_it_and_the_rest_is_with_the_others(plain: Pulled) -> None:
    assert [cell.value for cell in plain.summary.test.cells] == list(CELLS)
    for cell in plain.summary.test.cells:
        mixed = [SETS[ALL_OTHER].outcomes] if cell.value == "other" else []
        expected = join([*(SETS[site].of(cell.value) for site in TOLD[cell.value]), *mixed])
        assert cell.cases == len(expected.patients)
        for name in METRICS:
            assert np.allclose(cell.overall[name], of_sums(name, expected))
        assert set(cell.intervals) == {"AUC", "accuracy", "Brier"}


def test_secure_sums_give_the_numbers_of_plain_ones(plain: Pulled, secret: Pulled) -> None:
    a, b = plain.summary.test, secret.summary.test
    assert a.total == b.total == 138
    for name in METRICS:
        assert np.allclose(a.overall[name], b.overall[name], atol=1e-6)
    for name, bounds in a.intervals.items():
        assert b.intervals[name] == pytest.approx(bounds, abs=1e-5)
    for one, other in zip(a.cells, b.cells, strict=True):
        assert (one.value, one.cases) == (other.value, other.cases)
        assert all(np.allclose(one.overall[name], other.overall[name], atol=1e-6) for name in METRICS)
        assert set(one.intervals) == set(other.intervals)


def test_the_cells_add_up_to_the_whole_so_that_no_site_is_what_is_missing(plain: Pulled, secret: Pulled) -> None:
    for each in (plain, secret):
        test = each.summary.test
        assert sum(cell.cases or 0 for cell in test.cells) == test.total
        tables = np.sum([np.array(cell.overall["calibration"]) for cell in test.cells], axis=0)
        assert np.allclose(tables, np.array(test.overall["calibration"]), atol=1e-5)


def test_validation_has_no_cell(plain: Pulled, secret: Pulled) -> None:
    for each in (plain, secret):
        (record,) = each.summary.history
        assert record.evaluation is not None
        assert record.evaluation.cells == ()


# --- the card


@pytest.mark.parametrize("kind", ["plain", "secret"])
def test_the_facts_of_the_card_are_those_of_the_run(kind: str, request: pytest.FixtureRequest) -> None:
    done: Pulled = request.getfixturevalue(kind)
    facts, test, of = done.facts, done.summary.test, done.run.plan
    assert facts["plan"] == {"name": of.name, "digest": of.digest, "purpose": of.purpose}
    assert (facts["run"], facts["final"]) == (done.run.id, True)
    assert facts["sites"]["took part"] == list(done.summary.sites)
    (model,) = facts["results"]["models"]
    for name, score in model["scores"].items():
        assert score["value"] == test.overall[name]
        assert score["interval"] == (list(test.intervals[name]) if name in test.intervals else None)
        assert score["text"] in done.card
        assert score["interval_text"] in done.card
    for row, cell in zip(facts["results"]["subgroups"], test.cells, strict=True):
        assert (row["value"], row["cases"]) == (cell.value, cell.cases)
        assert {name: score["value"] for name, score in row["scores"].items()} == {
            name: cell.overall[name] for name in row["scores"]
        }
        assert f"| manufacturer: {cell.value} | {cell.cases} |" in done.card
    table = test.overall["calibration"]
    assert isinstance(table, list)
    bins = facts["results"]["calibration"]["bins"]
    assert [row["cases"] for row in bins] == [row.cases for row in reliability(table)]
    assert facts["results"]["calibration"]["error"] == pytest.approx(test.overall["ECE"])
    assert facts["protection"]["secure_aggregation"] is of.secured
    assert facts["protection"]["differential_privacy"] is None
    assert facts["model"]["digest"] in done.card


def test_each_site_stands_in_the_card_with_its_interval_and_the_worst_one_is_named(plain: Pulled) -> None:
    test = plain.summary.test
    worst = min(SETS, key=lambda site: test.per_site[site]["AUC"] or 0)
    assert plain.facts["results"]["worst"] == worst
    for row in plain.facts["results"]["sites"]:
        site = row["site"]
        assert row["cases"] == test.cases[site] == len(SETS[site].makers)
        assert row["scores"]["AUC"]["value"] == test.per_site[site]["AUC"]
        assert row["scores"]["AUC"]["interval"] == list(test.site_intervals[site]["AUC"])
        assert row["scores"]["AUC"]["interval_text"] in plain.card


def test_nothing_of_a_single_site_is_in_the_card_of_a_secure_run(secret: Pulled) -> None:
    for row in secret.facts["results"]["sites"]:
        assert (row["told"], row["cases"], row["scores"]) == (False, None, {})
    assert secret.facts["results"]["worst"] is None
    assert set(secret.facts["data"]["cases"].values()) == {None}
    assert secret.facts["protection"]["rosters"] == [{"sites": 4, "threshold": 3}]


def test_the_card_says_by_which_methods_and_what_they_do_not_know(plain: Pulled) -> None:
    words = plain.facts["parts"]["results"]["facts"]["Intervals"]
    for said in ("AUC: DeLong 1988", "accuracy: Wilson 1927", "Brier: Student", "where patients have several"):
        assert said in words
        assert said in plain.card
    assert "what it has too few of counts as other" in plain.card


def test_every_fact_in_words_stands_in_the_card(plain: Pulled) -> None:
    for name, part in plain.facts["parts"].items():
        items = ", ".join(part["items"]["claim"])
        assert not items or f"CLAIM 2024 {items}" in plain.card, name
    for topic, text in plain.facts["parts"]["partitions"]["facts"].items():
        assert f"- **{topic}**: {text}" in plain.card
    for item in plain.facts["protection"]["words"]:
        assert f"- **{item['name']}**: " in plain.card
    for item in plain.facts["not_stated"]:
        assert f"- {item['text']}" in plain.card
    assert "{{" not in plain.card
    assert "{%" not in plain.card


def test_the_page_shows_calibration_and_subgroups_too(plain: Pulled, secret: Pulled) -> None:
    for done in (plain, secret):
        assert done.page.open == []
        assert done.page.unlabelled == []
        for words in (
            "Calibration",
            "Reliability; dashed: perfect calibration",
            "manufacturer: SIEMENS 39",
            "Subgroups",
        ):
            assert words in done.page.text


# --- what is answered, and what people must add


def test_every_item_of_both_guidelines_is_answered_or_listed_for_people() -> None:
    found = [*PARTS.values(), *(item.items for item in NOT_STATED)]
    assert {int(item) for items in found for item in items.claim} == set(range(1, 45))
    letters = {
        3: "abc",
        5: "ab",
        6: "abc",
        8: "abc",
        9: "abc",
        12: "abcdefg",
        18: "abcdef",
        20: "abc",
        23: "ab",
        27: "abc",
    }
    asked = {f"{number}{letter}" for number in range(1, 28) for letter in letters.get(number, [""])}
    assert {item for items in found for item in items.tripod} == asked
    assert len(asked) == 52


# --- protection


def known(of: Plan, **history: Any) -> Known:
    record = RoundRecord(
        round=1, attempt=1, sites=("north",), weight=1, loss=None, weights={}, losses={}, train_seconds={}, excluded={},
        update_norm=1, bytes_down=1, bytes_up=1, seconds=1, **history,
    )  # fmt: skip
    test = Evaluated(round=1, fold="test", overall={"AUC": 0.8}, per_site={}, cases={"north": None}, sites=("north",))
    summary = RunSummary(
        status="completed", round=1, sites=("north",), excluded={}, lost={}, test=test, history=(record,)
    )
    measures = {"all": test.overall, "per_site": {}, "intervals": {"all": {}, "per_site": {}}, "cases": {}, "total": 9}
    results = results_of(of, {"test": {"federated": measures}}, summary.sites)
    file = ModelFile("0" * 64, 1, 1, 1, ())
    return Known(
        of, "r", True, "done", summary, test, results, exact=False, folds={"north": None}, emulated=(), model=file
    )


def words_of(facts: dict[str, Any]) -> dict[str, str]:
    return {item["name"]: item["text"] for item in facts["protection"]["words"]}


def test_the_card_of_a_private_plan_says_unit_epsilon_delta_noise_and_what_was_spent() -> None:
    private = {"epsilon": 4.0, "delta": 1e-5, "clip": 1.5, "metrics_epsilon": 0.5}
    of = plan(protection__differential_privacy=private, release__training_loss=False)
    facts = facts_of(known(of, epsilon={"north": 3.25}))
    told = facts["protection"]["differential_privacy"]
    assert (told["unit"], told["epsilon"], told["delta"], told["clip"]) == ("PATIENT", 4.0, 1e-5, 1.5)
    assert (told["noise"], told["spent"], told["metrics_epsilon"]) == (NOISE, {"north": 3.25}, 0.5)
    text = words_of(facts)["Differential privacy, by PATIENT"]
    for said in ("PATIENT", "epsilon 4 ", "delta 1e-05", "1.5", "AES-256-CTR", "north 3.25", "epsilon 0.5"):
        assert said in text
    assert facts["parts"]["results"]["facts"]["Intervals"].startswith("none: the sums have noise")


def test_clipping_is_not_called_privacy() -> None:
    facts = facts_of(known(plan(training__gradient_clip=2.0)))
    assert facts["protection"]["differential_privacy"] is None
    assert "clipping, not differential privacy" in words_of(facts)["No differential privacy"]
    assert "clipping" not in words_of(facts_of(known(plan())))["No differential privacy"]


def test_the_newest_checkpoint_of_the_log_is_told_and_a_log_without_one_is_not(tmp_path: Path, plain: Pulled) -> None:
    assert newest_checkpoint(tmp_path) is None
    log = Direct(Home(plain.run.folder)).log(plain.run.plan).log
    log.seal()
    found = newest_checkpoint(plain.run.folder / "log")
    assert found is not None
    assert (found["origin"], found["size"]) == (log.store.origin, log.store.size)
    assert found["root"] == log.store.root().hex()
    assert facts_of(replace(known(plan()), log=found))["log"] == found


def test_the_card_names_the_signed_statement_on_the_model(plain: Pulled) -> None:
    statement = plain.run.folder / "statement.json"
    assert plain.facts["statement"] == sha256_hex(statement.read_bytes())
    assert plain.facts["statement"] in plain.card
