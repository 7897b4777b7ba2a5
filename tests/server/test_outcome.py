"""What is pulled of a run: a model with its digest, numbers, and a page and a card that say what they are of."""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from locum.common.errors import Code, RunError
from locum.common.messages import Description, EvaluateTask, Tensors
from locum.common.plan import Plan, load_plan
from locum.common.secagg.ring import Ring, mean_error
from locum.server.app import end, write_result
from locum.server.home import Home
from locum.server.link import Direct
from locum.server.outcome import _with_model, outcome_of, pull
from locum.server.records import RunSummary
from locum.server.report_words import ranges, spans
from locum.server.runs import Run, create_run
from tests.pages import Page
from tests.peers import Failing, Peer
from tests.plans import plan, secured
from tests.secure_peers import SecurePeer, failed, run_secure
from tests.server.coordinator import go_on


class Skilled(Peer):
    """A peer whose measured AUC is its own, and grows with the rounds."""

    def __init__(self, site: str, bin_of_lesions: int, **given: Any) -> None:
        super().__init__(site, **given)
        self.bin = bin_of_lesions

    def sums(self, plan: Plan, task: EvaluateTask) -> Tensors:
        histogram = np.zeros((2, 2, 1024))
        histogram[1, 0, 380:420] = 1
        histogram[1, 1, self.bin + task.round] = 2
        return {"AUC": histogram.ravel(), "accuracy": np.array([[3.0, 1.0], [1.0, 3.0]]).ravel()}


class Away(Skilled):
    """A skilled peer that fails to train in some rounds."""

    def train(self, plan: Plan, content: Any) -> Any:
        answer = super().train(plan, content)
        return Failing("", Code.WORKER_DIED, "").error if self.trained[-1] in {2, 3} else answer


PEERS = (Skilled("north", 400, value=0.1), Away("riverside", 385, value=0.2, weight=3.0), Skilled("st-anne", 410))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    return Home(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module")
def ended(home: Home) -> Run:
    """A run with losses: one site missed two rounds, another never took part."""

    class Empty(Peer):
        def description(self, plan: Plan) -> Description:
            return super().description(plan).model_copy(update={"able": False, "reason": "no <b>case</b> | here"})

    run = create_run(home, plan(name="ended", rounds=4))
    go_on(run, [*PEERS, Empty("hillcrest")])
    return run


@pytest.fixture(scope="module")
def pulled(ended: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pulled") / "out"
    pull(ended, folder)
    return folder


def test_everything_that_is_promised_is_there_and_belongs_together(ended: Run, pulled: Path) -> None:
    names = {path.name for path in pulled.iterdir()}
    assert names == {
        "model.safetensors",
        "metrics.json",
        "report.html",
        "model_card.md",
        "model_card.json",
        "plan.yaml",
        "statement.json",
    }
    metrics = json.loads((pulled / "metrics.json").read_text())
    model = (pulled / "model.safetensors").read_bytes()
    assert metrics["model"]["sha256"] == hashlib.sha256(model).hexdigest()
    assert model == (ended.folder / "model.safetensors").read_bytes()
    assert load_plan(pulled / "plan.yaml").digest == metrics["plan_digest"] == ended.plan.digest
    assert metrics["run"] == ended.id
    assert (metrics["final"], metrics["status"], metrics["round"]) == (True, "completed with losses", 4)
    for name in ("report.html", "model_card.md"):
        assert metrics["model"]["sha256"] in (pulled / name).read_text()


def test_the_metrics_are_those_of_the_run_with_the_worst_site(ended: Run, pulled: Path) -> None:
    metrics = json.loads((pulled / "metrics.json").read_text())
    summary = RunSummary.model_validate_json(ended.summary.read_bytes())
    federated = metrics["test"]["federated"]
    assert federated["all"] == summary.test.overall
    assert federated["per_site"] == summary.test.per_site
    assert metrics["lost"] == {"riverside": [2, 3]}
    assert metrics["worst"]["AUC"]["site"] == "riverside"
    assert metrics["worst"]["AUC"]["value"] == min(values["AUC"] for values in federated["per_site"].values())
    assert len(metrics["history"]) == 4


def test_the_page_is_whole_needs_no_other_file_and_shows_every_site(pulled: Path) -> None:
    html = (pulled / "report.html").read_text()
    page = Page(html)
    assert page.open == []
    assert "script" not in page.tags
    assert all(target.startswith("#") for target in page.loads)
    assert not re.search(r"(?:https?:)?//[a-z]|@import|url\((?!#)", html)
    assert len(page.ids) == len(set(page.ids))
    assert {target[1:] for target in page.loads} <= set(page.ids)
    assert page.unlabelled == []
    assert "prefers-color-scheme: dark" in html
    for words in (
        "Completed with losses: riverside missed rounds 2–3 of 4; hillcrest could not take part.",
        "riverside worst",
        "riverside 2 of 4 2–3 3",
        "the worker process died",
        "no <b>case</b> | here",
        "asked for",
        "Worst site: riverside",
    ):
        assert words in page.text, words


def test_the_card_says_what_the_model_is_and_escapes_what_others_wrote(pulled: Path) -> None:
    card = (pulled / "model_card.md").read_text()
    assert "| riverside (worst) | 2 |" in card
    assert "95 %, from the sums alone (AUC: DeLong 1988" in card
    assert "hillcrest: the whole run (no &lt;b&gt;case&lt;/b&gt; \\| here)" in card
    assert "not the run's result" not in card
    assert "{{" not in card
    assert "{%" not in card


def test_the_cards_code_loads_the_model(pulled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = re.search(r"```python\n(.*?)```", (pulled / "model_card.md").read_text(), re.DOTALL)
    assert code is not None
    monkeypatch.chdir(pulled)
    found: dict[str, Any] = {}
    exec(compile(code[1], "model_card.md", "exec"), found)  # noqa: S102 (the promise is that it runs)
    assert found["probabilities"].shape == (1, 2)


def test_a_run_that_goes_on_gives_its_last_committed_round_and_every_file_says_so(home: Home, tmp_path: Path) -> None:
    run = create_run(home, plan(name="going", rounds=9))
    go_on(run, PEERS, rounds=2)
    run.want("stop")
    outcome = pull(run, tmp_path / "out")
    assert (outcome.final, outcome.summary.round) == (False, 2)
    assert outcome.summary.lost == {"riverside": [2]}
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert (metrics["final"], metrics["status"], metrics["test"]) == (False, "stopped", None)
    assert metrics["validation"]["round"] == 2
    page = Page((tmp_path / "out" / "report.html").read_text())
    assert "This run has not ended: it is stopped. What follows is of round 2 of 9" in page.text
    assert "the validation cases, after round 2" in page.text
    assert "not the run's result" in (tmp_path / "out" / "model_card.md").read_text()
    model = load_file(tmp_path / "out" / "model.safetensors")
    kept = load_file(run.checkpoints / "round-000002" / "model.safetensors")
    assert all(np.array_equal(model[name], kept[name]) for name in kept)


def test_what_is_pulled_while_rounds_are_committed_is_always_of_one_round(home: Home, tmp_path: Path) -> None:
    run = create_run(home, plan(name="racing", rounds=12, evaluation={"metrics": ["AUC"], "every_rounds": 12}))
    engine = threading.Thread(target=go_on, args=(run, [_Plain("a"), _Plain("b")]))
    engine.start()
    while run.committed() < 1:
        time.sleep(0.01)
    rounds = []
    while engine.is_alive():
        rounds.append(pull(run, tmp_path / "out").summary.round)
        metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
        content = (tmp_path / "out" / "model.safetensors").read_bytes()
        assert metrics["model"]["sha256"] == hashlib.sha256(content).hexdigest()
        assert metrics["round"] == rounds[-1] == len(metrics["history"])
    engine.join()
    assert rounds == sorted(rounds)
    assert outcome_of(run).final


def test_a_round_that_is_forgotten_before_its_model_is_copied_gives_way_to_a_newer_one(
    home: Home, tmp_path: Path
) -> None:
    run = create_run(home, plan(name="forgotten", rounds=9))
    go_on(run, PEERS, rounds=1)
    before = outcome_of(run)
    go_on(run, PEERS, rounds=4)
    assert not (run.checkpoints / "round-000001").exists()
    after = _with_model(before, tmp_path / "model.safetensors")
    assert (before.summary.round, after.summary.round) == (1, 4)
    assert hashlib.sha256((tmp_path / "model.safetensors").read_bytes()).hexdigest() == after.model_sha256


class _Plain(Peer):
    def sums(self, plan: Plan, task: EvaluateTask) -> Tensors:
        return {"AUC": super().sums(plan, task)["AUC"]}


def test_a_damaged_model_is_named_and_does_not_leave(home: Home, tmp_path: Path) -> None:
    run = create_run(home, plan(name="damaged", rounds=1))
    go_on(run, [Peer("a"), Peer("b")])
    path = run.checkpoints / "round-000001" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(RunError, match="damaged"):
        pull(run, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_plan_that_releases_nothing_has_a_report(home: Home, tmp_path: Path) -> None:
    class Silent(Peer):
        def description(self, plan: Plan) -> Description:
            return super().description(plan).model_copy(update={"cases": None})

        def header(self, plan: Plan, task: Any) -> Any:
            return super().header(plan, task).model_copy(update={"steps": None, "loss": None})

        def sums(self, plan: Plan, task: EvaluateTask) -> Tensors:
            return {}

    silence = {"metrics": [], "training_loss": False, "case_counts": False}
    run = create_run(home, plan(name="silent", rounds=1, release=silence, participation__weighting="equal"))
    go_on(run, [Silent("a"), Silent("b")])
    pull(run, tmp_path / "out")
    page = Page((tmp_path / "out" / "report.html").read_text())
    assert page.open == []
    assert "The plan releases neither losses nor validation metrics." in page.text
    assert "not told" in page.text
    assert "Nothing was measured" in (tmp_path / "out" / "model_card.md").read_text()


# --- under secure aggregation


class SkilledInSecret(SecurePeer):
    """A secure site whose measured AUC is its own; it fails to train in some rounds."""

    def __init__(self, site: str, bin_of_lesions: int, *, fails_in: tuple[int, ...] = (), cases: int = 8) -> None:
        super().__init__(site, 0.1, cases)
        self.bin, self.fails_in = bin_of_lesions, fails_in

    def train(self, message: Any, bundle: bytes) -> Any:
        return failed(message, 108) if self.contexts[-1].round in self.fails_in else super().train(message, bundle)

    def sums(self, plan: Plan, request: dict[str, Any]) -> Tensors:
        histogram = np.zeros((2, 2, 1024))
        histogram[1, 0, 380:420] = 1
        histogram[1, 1, self.bin + request["round"]] = 2
        return {"AUC": histogram.ravel(), "accuracy": np.array([[3.0, 1.0], [1.0, 3.0]]).ravel()}


def _secure_run(home: Home, folder: Path, **changes: Any) -> tuple[Run, Path]:
    """A finished run over four sites, of which one misses two rounds, and what was pulled of it."""
    plan = secured(**{"rounds": 4, "admission": {"norm_bound": 20, "weight_cap": 500}, **changes})
    run = create_run(home, plan)
    peers = [SkilledInSecret("north", 400), SkilledInSecret("riverside", 385, fails_in=(2, 3), cases=24),
             SkilledInSecret("st-anne", 410), SkilledInSecret("lakeview", 395)]  # fmt: skip
    with run.hold():
        finished = run_secure(plan, peers, run.folder)
        log = Direct(Home(run.folder)).log(plan)
        write_result(run.folder, finished, log)
        end(run.folder, log)
    pull(run, folder)
    return run, folder


@pytest.fixture(scope="module")
def summed(home: Home, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Path]:
    return _secure_run(home, tmp_path_factory.mktemp("summed") / "out", name="summed")


def test_numbers_of_sums_are_whole_and_none_is_of_a_site(summed: tuple[Run, Path]) -> None:
    metrics = json.loads((summed[1] / "metrics.json").read_text())
    federated = metrics["test"]["federated"]
    assert federated["total"] == 48
    assert federated["sites"] == ["lakeview", "north", "riverside", "st-anne"]
    assert federated["per_site"] == {}
    assert set(federated["cases"].values()) == {None}
    assert isinstance(federated["all"]["AUC"], float)
    assert metrics["worst"] == {}
    assert metrics["lost"] == {"riverside": [2, 3]}
    history = metrics["history"]
    assert [record["weight"] for record in history] == pytest.approx([48, 24, 24, 48])
    assert all(record["loss"] == pytest.approx(0.5) for record in history)
    assert [len(record["secured"]["uploads"]) for record in history] == [4, 3, 3, 4]


def test_the_page_of_a_secure_run_shows_sums_and_says_what_was_protected(summed: tuple[Run, Path]) -> None:
    html = (summed[1] / "report.html").read_text()
    page = Page(html)
    assert page.open == []
    assert page.unlabelled == []
    assert {target[1:] for target in page.loads} <= set(page.ids)
    plan = summed[0].plan
    error = mean_error(Ring(32, 4, 20), 500, 24)
    for words in (
        "48 test cases",
        "riverside not told in the sums, not told",
        "What each site measured is a part of the sums only: no site shows its own.",
        "no thin lines: what each site gave is a part of the sums only",
        "riverside 2 of 4 2–3 not told",
        "secure sums were set up: 4 sites, of which 3 must answer to unmask a sum",
        "A roster of 4 sites: 3 of them had to answer, for one set of sites, before a sum was unmasked; 1 site",
        "32 bits a number, for a norm of at most 20",
        f"no number of a round's mean update is off by more than {error:.1e}.",
        "only differential privacy does",
        "needs outside cryptographic review before it protects real patients",
        "by themselves: none of these",
    ):
        assert words in page.text, words
    for words in ("worst", "last loss", "share of all weight", "No secure aggregation", "slowest site, training"):
        assert words not in page.text, words
    assert html.count("<figcaption>Training loss</figcaption>") == 1
    assert plan.secured


def test_the_card_of_a_secure_run_says_that_its_numbers_are_of_sums(summed: tuple[Run, Path]) -> None:
    card = (summed[1] / "model_card.md").read_text()
    assert "from sums over the sites" in card
    assert "| all sites | 48 |" in card
    assert "| riverside | not told | not told | not told |" in card
    assert "**Secure aggregation**" in card
    assert "{{" not in card


def test_what_the_plan_has_each_site_tell_is_shown_of_each_site(home: Home, tmp_path: Path) -> None:
    told = {"per_site": ["metrics", "training_loss", "case_counts"]}
    _, folder = _secure_run(home, tmp_path / "out", name="told", release=told)
    page = Page((folder / "report.html").read_text())
    assert page.open == []
    for words in (
        "riverside worst 24",
        "riverside 2 of 4 2–3 24 33.3 % 0.5000 24",
        "beside the metric sums, training loss and case counts that the plan has each site tell",
    ):
        assert words in page.text, words
    assert json.loads((folder / "metrics.json").read_text())["worst"]["AUC"]["site"] == "riverside"


def test_a_plain_run_says_that_the_coordinator_has_seen_each_update(pulled: Path) -> None:
    for name in ("report.html", "model_card.md"):
        assert "the coordinator has seen each site" in (pulled / name).read_text()


def test_spans_and_ranges_say_the_same_rounds() -> None:
    assert spans([5, 3, 4, 8]) == [(3, 5), (8, 8)]
    assert ranges([5, 3, 4, 8]) == "3–5, 8"
    assert spans([]) == []
