"""The report and the model card of a simulation."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from locum.common import build
from locum.common.build import check_buildable
from locum.common.metrics import Outcomes
from locum.common.plan import Plan, parse_plan
from locum.server.records import CellRecord, Evaluated, RoundRecord, RunSummary, SecureRecord
from locum.simulations import report, report_pictures, results
from locum.simulations.federations import FederationSpec, federation
from locum.simulations.institutions import found_federation, open_agent
from locum.simulations.preparation import Prepared, prepare_site
from locum.simulations.report_data import data_of
from locum.simulations.report_pictures import Picture
from locum.site_client.gate import Policy
from locum.site_client.imaging.catalog import Counts
from locum.site_client.settings import Settings
from locum.site_client.worker import Worker
from tests.pages import Page

SITES = ("north", "riverside", "st-anne", "lakeview")
CLASSIFY = """
name: ct-lesions
purpose: Show a whole federated study in a minute, on emulated hospitals. Not for patients.
contract: {task: classification, modality: [CT], dimensions: 3, classes: [no_lesion, lesion]}
network: {name: Classifier, channels: [4, 8]}
loss: {name: CrossEntropyLoss}
optimiser: {name: AdamW, lr: 2e-3}
training: {input_size: [16, 16, 8], batch_size: 8, local_steps: 20}
rounds: 10
participation: {quorum: 2, deadline: 10 min}
evaluation: {metrics: [AUC, accuracy, confusion]}
protection: {secure_aggregation: off}
"""
SEGMENT = """
name: hippocampus
purpose: Outline the hippocampus in magnetic resonance images, head and body apart.
contract: {task: segmentation, modality: [MR], dimensions: 3, classes: [background, anterior, posterior]}
network: {name: UNet, channels: [4, 8], strides: [2], norm: BATCH}
loss: {name: DiceCELoss}
optimiser: {name: AdamW, lr: 2e-3}
training: {input_size: [16, 16, 16], batch_size: 2, local_steps: 20}
rounds: 10
participation: {quorum: 2, deadline: 10 min}
evaluation: {metrics: [Dice, surface_distance]}
protection: {secure_aggregation: off}
"""


# --- a run that could have been


def plan_of(text: str, **changes: str) -> Plan:
    for old, new in changes.items():
        text = re.sub(rf"^{old}:.*$", f"{old}: {new}", text, flags=re.MULTILINE)
    return parse_plan(text.encode())


def outcomes(plan: Plan, site: str, skill: float, rng: np.random.Generator) -> Outcomes:
    cases = 12 + 5 * SITES.index(site)
    patients = tuple(f"{site}/{number}" for number in range(cases))
    none = np.zeros((0, 0))
    if plan.contract.task == "segmentation":
        dice = np.clip(rng.normal(skill, 0.04, (cases, 2)), 0, 1)
        return Outcomes(patients, np.zeros(0, np.int64), none, dice, 6 * (1 - dice))
    labels = (np.arange(cases) % 2).astype(np.int64)
    chance = 1 / (1 + np.exp(-rng.normal(0, 1, cases) - 4 * (skill - 0.5) * (2 * labels - 1)))
    return Outcomes(patients, labels, np.stack([1 - chance, chance], axis=1), none, none)


def metrics_of(plan: Plan, *, with_baselines: bool = True, one_class_at: str | None = None) -> dict[str, Any]:
    rng = np.random.default_rng(7)

    def model(skill: float) -> Any:
        found = {site: outcomes(plan, site, skill - 0.03 * SITES.index(site), rng) for site in SITES}
        if one_class_at is not None:
            found[one_class_at] = found[one_class_at].take(np.flatnonzero(found[one_class_at].labels == 1))
        return results.scored(plan, found, draws=50)

    baselines = results.Baselines(model(0.93), {site: model(0.8) for site in SITES}) if with_baselines else None
    return results.as_metrics(plan, model(0.9), baselines, seconds=71.4, round_seconds=[3.0] * plan.rounds)


def evaluated(plan: Plan, number: int, fold: str, excluded: Mapping[str, str] | None = None) -> Evaluated:
    reached = 0.9 - 0.35 * float(np.exp(-number / 3))
    names = [name for name in plan.released_metrics if name != "confusion"]
    per_site = {
        site: {name: reached - 0.02 * SITES.index(site) + 0.01 * ((number * 7 + 3 * i) % 5) for name in names}
        for i, site in enumerate(SITES)
        if site not in (excluded or {})
    }
    overall = dict.fromkeys(names, reached)
    cases = dict.fromkeys(per_site, 6)
    return Evaluated(
        round=number, fold=fold, overall=overall, per_site=per_site, cases=cases, sites=tuple(per_site),
        total=sum(cases.values()), excluded=dict(excluded or {}),
    )  # fmt: skip


def record(plan: Plan, number: int, excluded: Mapping[str, str]) -> RoundRecord:
    taking_part = [site for site in SITES if site not in excluded]
    return RoundRecord(
        round=number,
        attempt=2 if number == 4 else 1,
        sites=tuple(taking_part),
        weight=sum(30.0 + SITES.index(site) for site in taking_part),
        loss=0.25 + 0.5 / number if plan.release.training_loss else None,
        weights={site: 30.0 + SITES.index(site) for site in taking_part},
        losses={site: 0.2 + 0.5 / number + 0.03 * SITES.index(site) for site in taking_part},
        train_seconds={site: 1.9 + 0.2 * SITES.index(site) for site in taking_part},
        excluded=dict(excluded),
        update_norm=1.2 / number,
        bytes_down=4 * 346_000,
        bytes_up=len(taking_part) * 346_000,
        seconds=2.8 + 0.3 * (number % 3),
        model_sha256="0" * 64,
        evaluation=evaluated(plan, number, "validation", {"st-anne": "the worker process died"} if number == 7 else {}),
    )


def summary_of(plan: Plan, *, losses: bool = True) -> RunSummary:
    def missing(number: int) -> dict[str, str]:
        return {"lakeview": "no answer by the deadline"} if losses and number in {3, 4, 8} else {}

    history = tuple(record(plan, number, missing(number)) for number in range(1, plan.rounds + 1))
    if not losses:
        history = tuple(
            r.model_copy(update={"attempt": 1, "evaluation": evaluated(plan, r.round, "validation")}) for r in history
        )
    return RunSummary(
        status="completed with losses" if losses else "completed",
        round=plan.rounds,
        sites=SITES,
        excluded={"hillcrest": "2 training patients fit the contract, which asks for 8"} if losses else {},
        lost={"lakeview": [3, 4, 8]} if losses else {},
        test=evaluated(plan, plan.rounds, "test"),
        history=history,
    )


def counts_of(*names: str) -> dict[str, Counts]:
    return {
        name: Counts(
            found=900 + 7 * place, stored=880, cases=55, labels_without_image=place,
            quarantined={"missing_slices": 18, "localizer": 2 + 7 * place},
        ).check()
        for place, name in enumerate(names)
    }  # fmt: skip


def pictures_for(plan: Plan) -> list[Picture]:
    rows, columns = np.mgrid[:48, :48]
    image = (120 + 60 * np.sin(rows / 5) * np.cos(columns / 7)).astype(np.uint8)
    if plan.contract.task == "classification":
        said = [("lesion", "lesion", 0.97), ("no_lesion", "lesion", 0.61), ("no_lesion", "no_lesion", 0.88)]
        return [Picture(site, f"{n:016x}", image, *answer) for site in SITES for n, answer in enumerate(said)]
    truth = np.zeros((48, 48), np.uint8)
    truth[(rows - 20) ** 2 + (columns - 24) ** 2 < 90] = 1
    truth[(rows - 30) ** 2 + (columns - 24) ** 2 < 70] = 2
    return [Picture(site, f"{n:016x}", image, truth, np.roll(truth, n, axis=1)) for site in SITES for n in range(3)]


def write(folder: Path, plan: Plan, **parts: Any) -> tuple[str, str]:
    """Writes a report of parts that go together; returns the page and the card."""
    network, roles = build.initial_state(plan)
    save_file(build.shared_tensors(network, roles), folder / "model.safetensors")
    (folder / "plan.yaml").write_text(plan.to_yaml())
    counts = parts.pop("counts", counts_of(*SITES, "hillcrest"))
    given = {
        "summary": summary_of(plan),
        "metrics": json.loads(json.dumps(metrics_of(plan))),
        "data": data_of(folder, plan, counts, parts.pop("folds", {})),
        "pictures": pictures_for(plan),
        **parts,
    }
    report.write(folder, plan, **given)
    return (folder / "report.html").read_text(), (folder / "model_card.md").read_text()


@pytest.fixture(scope="module", params=[CLASSIFY, SEGMENT], ids=["classification", "segmentation"])
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Plan, Page, str, str]:
    plan = plan_of(request.param)
    html, card = write(tmp_path_factory.mktemp("run"), plan)
    return plan, Page(html), html, card


def test_the_page_is_whole_and_needs_no_other_file(written: tuple[Plan, Page, str, str]) -> None:
    _, page, html, _ = written
    assert page.open == []
    assert "script" not in page.tags
    assert all(target.startswith(("#", "data:image/png;base64,")) for target in page.loads)
    assert not re.search(r"(?:https?:)?//[a-z]|@import|url\((?!#)", html)


def test_ids_are_unique_and_every_picture_and_table_is_told(written: tuple[Plan, Page, str, str]) -> None:
    _, page, html, _ = written
    assert len(page.ids) == len(set(page.ids))
    assert set(re.findall(r"(?:href=\"#|url\(#)([^\")]+)", html)) <= set(page.ids)
    assert page.unlabelled == []
    assert html.count("<table") == html.count("<thead>")
    assert '<html lang="en">' in html
    assert "<th>" not in html, "a header cell says what it heads"


def test_every_site_and_every_reason_is_shown(written: tuple[Plan, Page, str, str]) -> None:
    plan, page, _, card = written
    said = [*SITES, "hillcrest", "no answer by the deadline", "the worker process died", "3–4, 8", "asks for 8"]
    for text in [*said, "The image is a localizer (scout)", "Slices are missing", plan.purpose, plan.digest]:
        assert text in page.text
    for text in [*said, plan.purpose, plan.digest]:
        assert text in card


def test_losses_are_in_the_status_in_words(written: tuple[Plan, Page, str, str]) -> None:
    _, page, _, card = written
    status = "Completed with losses: lakeview missed rounds 3–4, 8 of 10; hillcrest could not take part."
    assert status in page.text
    assert status in card
    assert "round 4 (2 attempts)" in page.text


def test_a_run_without_losses_says_so(tmp_path: Path) -> None:
    plan = plan_of(CLASSIFY)
    html, _ = write(tmp_path, plan, summary=summary_of(plan, losses=False), counts=counts_of(*SITES))
    text = Page(html).text
    assert "all 4 sites contributed to all of 10 rounds" in text
    assert "Nothing: every site contributed to every round and every test." in text


def test_models_and_sites_have_intervals_and_the_worst_site_is_named(written: tuple[Plan, Page, str, str]) -> None:
    plan, page, html, card = written
    test = json.loads(json.dumps(metrics_of(plan)))["test"]
    first = plan.evaluation.metrics[0]
    for kind in ("federated", "pooled"):
        low, high = test[kind]["intervals"]["all"][first]
        assert f"{low:.3f} to {high:.3f}" in page.text
        assert f"{low:.3f} to {high:.3f}" in card
    for site in SITES:
        assert f"{test['local']['per_site'][site][first]:.3f}" in page.text
        assert f"{site} alone" in page.text
        low, high = test["federated"]["intervals"]["per_site"][site][first]
        assert f"{low:.3f} to {high:.3f}" in card
    worst = min(SITES, key=lambda site: test["federated"]["per_site"][site][first])
    assert f"Worst site: {worst}" in page.text
    assert re.search(rf'<tr class="worst"><th scope="row">{worst}<', html)
    assert f"| {worst} (worst) |" in card


def test_what_does_not_protect_is_said(written: tuple[Plan, Page, str, str]) -> None:
    _, page, _, card = written
    for text in (page.text, card):
        assert "No secure aggregation" in text
        assert "not encrypted against the aggregator" in text
        assert "No differential privacy" in text


def test_a_simulation_of_a_secure_plan_shows_its_own_measurements_and_says_that_they_are(tmp_path: Path) -> None:
    plan = plan_of(CLASSIFY, protection="{secure_aggregation: required}", participation="{quorum: 3}")
    summary = summary_of(plan)
    masked = [_masked(record) for record in summary.history]
    html, card = write(tmp_path, plan, summary=summary.model_copy(update={"history": tuple(masked)}))
    page = Page(html)
    assert page.open == []
    for site in SITES:
        assert f"{site} alone" in page.text
    assert "Worst site:" in page.text
    assert "no thin lines: what each site gave is a part of the sums only" in page.text
    assert (
        "taken from the sites' own data for this report: a coordinator of this plan sees their sums only" in page.text
    )
    for text in (page.text, card):
        assert "A roster of 4 sites: 3 of them had to answer" in text
        assert "A roster of 5 sites: 4 of them had to answer" in text
        assert "No secure aggregation" not in text


def _masked(record: RoundRecord) -> RoundRecord:
    """The record of a round whose sites tell nothing of themselves."""
    sites = 4 if record.round < 5 else 5
    secret = {"roster": "0" * 64, "context": "0" * 64, "sites": sites, "threshold": sites - 1, "uploads": {}}
    assert record.evaluation is not None
    evaluation = record.evaluation.model_copy(update={"per_site": {}, "cases": dict.fromkeys(record.sites)})
    told = {"weights": {}, "losses": dict.fromkeys(record.sites), "train_seconds": {}, "evaluation": evaluation}
    return record.model_copy(update={**told, "secured": SecureRecord(**secret)})


def test_files_add_up_on_the_page(written: tuple[Plan, Page, str, str]) -> None:
    _, page, _, _ = written
    for site, counts in counts_of(*SITES, "hillcrest").items():
        assert f"{site} {counts.found} {counts.stored} {sum(counts.quarantined.values())} {counts.cases}" in page.text


def test_confusion_is_shown_with_its_counts(tmp_path: Path) -> None:
    plan = plan_of(CLASSIFY)
    metrics = metrics_of(plan)
    html, _ = write(tmp_path, plan, metrics=metrics)
    for row in metrics["test"]["federated"]["all"]["confusion"]:
        for count in row:
            assert f">{count:.0f}</td>" in html
    assert 'id="confusion"' in html


def test_segmentation_pictures_have_both_outlines(tmp_path: Path) -> None:
    html, _ = write(tmp_path, plan_of(SEGMENT))
    pictures = html[html.index('id="pictures"') : html.index('id="cost"')]
    assert pictures.count('class="truth"') == pictures.count('class="prediction"') == 3 * len(SITES)
    assert "Dice of this slice 1.000" in pictures


def test_an_outline_closes_around_its_pixels_at_the_border_too() -> None:
    truth = np.zeros((4, 6), np.uint8)
    truth[0:2, 0:3] = 1
    picture = report_pictures.shown(Picture("north", "0", np.zeros((4, 6), np.uint8), truth, np.zeros_like(truth)))
    path = re.search(r'class="truth" d="([^"]+)"', picture.svg)
    assert path is not None
    numbers = np.array(re.findall(r"-?\d+\.?\d*", path[1]), dtype=float).reshape(-1, 2)
    assert numbers.min(axis=0).tolist() == [0, 0]
    assert numbers.max(axis=0).tolist() == [3, 2]
    assert 'class="prediction"' not in picture.svg
    assert picture.dice == 0


def test_wrong_predictions_are_marked(tmp_path: Path) -> None:
    html, _ = write(tmp_path, plan_of(CLASSIFY))
    assert "✗ lesion</span> (61 %)<br>truth: no_lesion" in html
    assert "✓ lesion</span> (97 %)<br>truth: lesion" in html


def test_a_metric_that_does_not_exist_is_told_in_words(tmp_path: Path) -> None:
    plan = plan_of(CLASSIFY)
    metrics = metrics_of(plan, one_class_at="st-anne")
    assert metrics["test"]["federated"]["per_site"]["st-anne"]["AUC"] is None
    html, card = write(tmp_path, plan, metrics=metrics)
    row = html[html.index('<tr><th scope="row">st-anne</th>') :]
    assert "not defined (a class is missing from the test cases)" in row[: row.index("</tr>")]
    assert re.search(r"\| st-anne \| 11 \| not defined", card)
    assert "Worst site: st-anne" not in html


def test_a_site_without_test_cases_is_still_shown(tmp_path: Path) -> None:
    plan = plan_of(CLASSIFY)
    metrics = metrics_of(plan)
    for part in (metrics["test"]["federated"], metrics["test"]["federated"]["intervals"]):
        del part["per_site"]["north"]
    del metrics["test"]["federated"]["cases"]["north"]
    html, _ = write(tmp_path, plan, metrics=metrics)
    row = html[html.index('<tr><th scope="row">north</th>') :]
    assert "no test cases" in row[: row.index("</tr>")]
    assert "the others also on those of sites left out" in Page(html).text


def test_without_baselines_the_report_says_how_to_run_them(tmp_path: Path) -> None:
    plan = plan_of(CLASSIFY)
    html, card = write(tmp_path, plan, metrics=metrics_of(plan, with_baselines=False))
    assert "locum simulate --baselines" in html
    assert "locum simulate --baselines" in card
    assert "alone</th>" not in html


def test_the_report_says_whether_baselines_were_trained_whatever_was_first_asked_for(tmp_path: Path) -> None:
    plan = plan_of(CLASSIFY)
    for asked, trained in ((False, True), (True, False)):
        (tmp_path / "simulation.json").write_text(json.dumps({"engine": "local", "baselines": asked}))
        html, _ = write(tmp_path, plan, metrics=metrics_of(plan, with_baselines=trained))
        assert f"Baselines {'trained' if trained else 'not trained'}" in Page(html).text


def test_a_plan_that_releases_nothing_has_a_report(tmp_path: Path) -> None:
    silence = "release: {metrics: [], training_loss: false, case_counts: false}\n"
    plan = plan_of(CLASSIFY.replace("quorum: 2,", "quorum: 2, weighting: equal,") + silence)
    summary = summary_of(plan)
    silent = [r.model_copy(update={"losses": dict.fromkeys(r.losses), "evaluation": None}) for r in summary.history]
    html, _ = write(tmp_path, plan, summary=summary.model_copy(update={"history": tuple(silent)}))
    assert "The plan releases neither losses nor validation metrics." in html
    assert Page(html).open == []


def test_text_of_others_is_never_markup(tmp_path: Path) -> None:
    evil = '<script>alert("x")</script> | *b*'
    plan = plan_of(CLASSIFY, purpose=json.dumps(evil))
    summary = summary_of(plan).model_copy(update={"excluded": {evil: evil}})
    image = np.zeros((8, 8), np.uint8)
    metrics = json.loads(json.dumps(metrics_of(plan)).replace("st-anne", "st$anne<b>"))
    summary = RunSummary.model_validate_json(summary.model_dump_json().replace("st-anne", "st$anne<b>"))
    html, card = write(
        tmp_path, plan, summary=summary, metrics=metrics, counts=counts_of(*SITES, evil),
        pictures=[Picture(evil, "1", image, evil, "lesion", 0.5)],
    )  # fmt: skip
    page = Page(html)
    assert page.open == []
    assert not {"script", "b"} & set(page.tags)
    assert "<script" not in card
    assert "| *b*" not in card
    assert "st$anne&lt;b&gt;" in html


def test_more_sites_than_colours_have_a_report(tmp_path: Path) -> None:
    plan = plan_of(CLASSIFY)
    names = [f"site-{number:03}" for number in range(60)]
    metrics = metrics_of(plan, with_baselines=False)
    federated = metrics["test"]["federated"]
    for part in (federated["per_site"], federated["intervals"]["per_site"], federated["cases"]):
        part.update(dict.fromkeys(names, part["north"]))
    summary = summary_of(plan).model_copy(update={"sites": tuple(names)})
    html, _ = write(tmp_path, plan, metrics=metrics, summary=summary, counts=counts_of(*names), pictures=[])
    page = Page(html)
    assert page.open == []
    assert "the 40 worst of 60 sites" in page.text
    assert all(re.search(rf'<th scope="row">{name}', html) for name in names)


def test_the_same_results_give_the_same_page(tmp_path: Path) -> None:
    plan = plan_of(CLASSIFY)
    pages = [re.sub(r"Written by.*UTC", "", write(tmp_path, plan)[0]) for _ in range(2)]
    assert pages[0] == pages[1]


def test_the_cards_code_loads_the_model(
    written: tuple[Plan, Page, str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, _, _, _ = written
    text = SEGMENT if plan.contract.task == "segmentation" else CLASSIFY
    _, card = write(tmp_path, plan_of(text))
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)
    assert code is not None
    monkeypatch.chdir(tmp_path)
    found: dict[str, Any] = {}
    exec(compile(code[1], "model_card.md", "exec"), found)  # noqa: S102 (the promise is that it runs)
    probabilities = found["probabilities"]
    assert probabilities.shape[1] == len(plan.contract.classes)
    assert probabilities.sum(dim=1).allclose(probabilities.new_ones(()))


def test_the_card_names_what_the_file_does_not_hold(tmp_path: Path) -> None:
    """A batch normalisation's running statistics stay at the sites."""
    plan = plan_of(SEGMENT)
    network, roles = build.initial_state(plan)
    shared = build.shared_tensors(network, roles)
    _, card = write(tmp_path, plan)
    assert f"{sum(array.size for array in shared.values()):,} in {len(shared)} tensors" in card
    absent = sum(role == "local" and network.state_dict()[name].is_floating_point() for name, role in roles.items())
    assert absent > 0
    assert f"does not hold {absent} tensors" in card


def test_a_network_that_cannot_be_made_without_memory_has_a_card(tmp_path: Path) -> None:
    swin = "{name: SwinUNETR, feature_size: 12, depths: [1, 1, 1, 1]}"
    text = SEGMENT.replace("[16, 16, 16]", "[64, 64, 64]")
    plan = plan_of(text, network=swin)
    assert check_buildable(plan) == []
    _, card = write(tmp_path, plan)
    shared = build.shared_tensors(*build.initial_state(plan))
    assert f"{sum(array.size for array in shared.values()):,} in {len(shared)} tensors" in card
    assert "does not hold" not in card


def test_the_card_lists_what_a_person_must_add(written: tuple[Plan, Page, str, str]) -> None:
    card = written[3]
    assert "Not stated by the plan" in card
    assert "the licence of the model" in card
    assert "{{" not in card
    assert "{%" not in card


def test_the_cards_facts_are_those_of_the_simulation(tmp_path: Path) -> None:
    plan = plan_of(CLASSIFY.replace("confusion]", "confusion, calibration, ECE]"))
    interval = {"AUC": (0.6, 0.97)}
    cells = (
        CellRecord(by="manufacturer", value="SIEMENS", cases=21, overall={"AUC": 0.875}, intervals=interval),
        CellRecord(by="manufacturer", value="other", cases=0, overall={"AUC": None}),
    )
    metrics = metrics_of(plan)
    metrics["test"]["federated"]["subgroups"] = [cell.model_dump(mode="json") for cell in cells]
    html, card = write(tmp_path, plan, metrics=json.loads(json.dumps(metrics)))
    facts = json.loads((tmp_path / "model_card.json").read_text())
    federated = metrics["test"]["federated"]
    first, *others = facts["results"]["models"]
    assert [model["kind"] for model in others] == ["pooled", *["alone"] * len(SITES)]
    for name, score in first["scores"].items():
        assert score["value"] == federated["all"][name]
        assert score["interval"] == list(federated["intervals"]["all"][name])
    assert {row["site"]: row["cases"] for row in facts["results"]["sites"]} == federated["cases"]
    assert facts["results"]["calibration"]["error"] == pytest.approx(federated["all"]["ECE"])
    assert [row["cases"] for row in facts["results"]["subgroups"]] == [21, 0]
    assert "| manufacturer: SIEMENS | 21 | 0.875 (0.600 to 0.970) |" in card
    assert "| manufacturer: other | none told apart | not defined" in card
    assert "bootstrap over patients" in facts["parts"]["results"]["facts"]["Intervals"]
    assert Page(html).unlabelled == []
    for words in ("Reliability; dashed: perfect calibration", "manufacturer: SIEMENS 21 0.875 0.600 to 0.970"):
        assert words in Page(html).text


# --- with real sites


@pytest.fixture(scope="module")
def hospitals(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Prepared]]:
    """Two emulated hospitals that have ingested what they wrote."""
    folder = tmp_path_factory.mktemp("run")
    spec = FederationSpec(sites=2, seed=3, patients=10, broken=0.2, shape=(8, 16, 16), spacing=(10.0, 7.5, 7.5))
    return folder, [prepare_site(site, folder / "sites" / site.name, 3) for site in federation(spec)]


SMALL = (
    CLASSIFY.replace("lesion]}", "lesion], split: {train: 0.4, validation: 0.2, test: 0.4}}")
    + "transforms: {prepare: [{name: ResizeWithPadOrCropd, spatial_size: [16, 16, 8]}]}\n"
)


@pytest.fixture
def workers(hospitals: tuple[Path, list[Prepared]]) -> Iterator[list[Worker]]:
    """The worker of each hospital, and one over the stores of both."""
    folder, prepared = hospitals
    federation = found_federation(folder)
    made = [open_agent(site, Policy(), federation, cache_bytes=1 << 24).worker for site in prepared]
    stores = tuple(site.store for site in prepared)
    made.append(Worker(Settings("pooled", stores, folder / "pooled"), logging.getLogger("locum.test")))
    yield made
    for worker in made:
        worker.stop()


def test_pictures_come_from_every_site_with_test_cases(
    hospitals: tuple[Path, list[Prepared]], workers: list[Worker]
) -> None:
    prepared = hospitals[1]
    plan = plan_of(SMALL)
    model = build.shared_tensors(*build.initial_state(plan))
    sites = {site.name: worker for site, worker in zip(prepared, workers, strict=False)}
    pictures = report.pictures_of(plan, sites, model, round_number=0, count=3)
    assert [site.name for site in prepared] == list(dict.fromkeys(picture.site for picture in pictures))
    for picture in pictures:
        assert picture.image.shape == (16, 16)
        assert picture.image.dtype == np.uint8
        assert picture.truth in plan.contract.classes
        assert picture.probability is not None
        assert 0.5 <= picture.probability <= 1


def test_a_site_called_pooled_is_a_site_as_any_other(workers: list[Worker]) -> None:
    plan = plan_of(SMALL, rounds="1", training="{input_size: [16, 16, 8], batch_size: 4, local_steps: 2}")
    first, second, whole = workers
    told: list[str] = []
    found, expected = (
        results.baselines(plan, {name: first, "b": second}, whole, tested={name: first}, parallel=1, told=told.append)
        for name in ("pooled", "a")
    )
    assert told == ["pooled", "pooled", "b", "pooled", "a", "b"]
    assert found.pooled.all == expected.pooled.all
    assert set(found.local) == {"pooled", "b"}
    assert found.local["pooled"].all == expected.local["a"].all != found.pooled.all
    assert found.local["b"].cases == {"pooled": found.pooled.cases["pooled"]}


def test_emulated_hospitals_are_called_emulated_and_described(hospitals: tuple[Path, list[Prepared]]) -> None:
    folder, prepared = hospitals
    plan = plan_of(CLASSIFY)
    (folder / "simulation.json").write_text(json.dumps({"engine": "local", "sites": 2, "baselines": True}))
    folds = {prepared[0].name: {"train": 3, "validation": 2, "test": 1}}
    html, card = write(folder, plan, counts={site.name: site.counts for site in prepared}, folds=folds)
    page = Page(html)
    assert "All data is emulated." in page.text
    assert "All data is emulated." in card
    assert re.search(rf"{prepared[0].name} emulated 3 2 1 no_lesion \d+ lesion \d+ CT ", page.text)
    assert re.search(rf"{prepared[1].name} emulated not told not told not told", page.text)
    for site in prepared:
        for reason in site.counts.quarantined:
            assert reason.replace("_", " ") in page.text
