"""The empirical check of a model's privacy: what it must find, what it must not, and who can ask for it."""

from __future__ import annotations

import ast
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from locum.common.cli import main
from locum.common.metrics import Outcomes
from locum.common.plan import Plan
from locum.simulations.preparation import Prepared
from locum.site_client.agent import Agent
from locum.site_client.check import LIMITS, canaries_at, check, words_of
from locum.site_client.operations import OPERATIONS
from locum.site_client.privacy.accountant import Mechanism
from locum.site_client.privacy.attacks import attack, patient_losses
from locum.site_client.privacy.budget import one_release
from locum.site_client.privacy.noise import Floats32, NoiseSource
from locum.site_client.privacy.one_run import audit, evidence, least_epsilon, predicted_area
from locum.site_client.session import Session, at_model, open_session, train_round
from locum.site_client.settings import Settings
from locum.site_client.training.private import Setting
from tests.plans import initial
from tests.site_client.asking import Picture, moved, nifti_store, plan, segmentation_plan
from tests.site_client.enrolled import Hospital
from tests.site_client.privacy.private_plans import private

_SPLIT = {"train": 0.6, "validation": 0.2, "test": 0.2}
_NONE = np.zeros((0, 0))


class Quieter(NoiseSource):
    """A broken source: its noise has a quarter of the scale asked for."""

    def noised(self, total: Floats32, std: float) -> Floats32:
        """As the real one, with a quarter of the noise."""
        return super().noised(total, std / 4)


@pytest.fixture
def session(settings: Settings) -> Session:
    of = private(training__local_steps=8, contract__split=_SPLIT)
    made = open_session(settings, of)
    at_model(made, initial(of), 0)
    return made


# --- canaries


def test_canaries_find_no_fault_in_the_code_that_trains(session: Session) -> None:
    found = canaries_at(session)
    assert found is not None
    assert found.failed == ""
    assert found.bound <= found.claimed
    assert found.auc.value == pytest.approx(found.predicted, abs=0.07)
    assert found.canaries == 1000


def test_noise_of_a_quarter_of_its_scale_is_caught(session: Session) -> None:
    found = canaries_at(session, noise=Quieter())
    assert found is not None
    assert found.bound > found.claimed
    assert "epsilon is at least" in found.failed


def test_a_check_leaves_the_network_as_it_was(session: Session) -> None:
    before = {name: tensor.clone() for name, tensor in session.network.state_dict().items()}
    canaries_at(session)
    assert all(bool((tensor == before[name]).all()) for name, tensor in session.network.state_dict().items())


def _seen(mechanism: Mechanism, rng: np.random.Generator, *, scale: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Evidence of a thousand canaries under noise of `scale` times what the mechanism claims."""
    included, scores = rng.random(1000) < 0.5, np.zeros(1000)
    for _ in range(mechanism.steps):
        drawn = included & (rng.random(1000) < mechanism.rate)
        scores += evidence(drawn + rng.normal(0, scale * mechanism.noise, 1000), mechanism)
    return scores, included


@pytest.mark.parametrize(
    "mechanism", [Mechanism(1.0, 1.0, 1), Mechanism(0.8, 0.1, 20), Mechanism(2.0, 0.5, 30)], ids=str
)
def test_honest_noise_passes_and_half_of_it_does_not(mechanism: Mechanism) -> None:
    rng = np.random.default_rng(5)
    assert [audit(*_seen(mechanism, rng), mechanism, 1e-5).failed for _ in range(20)] == [""] * 20
    assert all(audit(*_seen(mechanism, rng, scale=0.5), mechanism, 1e-5).failed for _ in range(20))


def test_the_predicted_area_is_that_of_two_gaussians_where_everybody_is_drawn() -> None:
    from scipy.stats import norm

    for noise, steps in ((1.0, 1), (3.0, 4)):
        distance = np.sqrt(steps) / noise
        exact = norm.cdf(distance / np.sqrt(2))
        assert predicted_area(Mechanism(noise, 1.0, steps)) == pytest.approx(exact, abs=0.01)


def test_the_bound_of_guesses_that_are_all_right_is_that_of_the_paper() -> None:
    # r right guesses of r bound epsilon by (e^ε/(1+e^ε))^r = doubt; of a thousand canaries a quarter is guessed.
    included = np.arange(1000) < 500
    one = (0.05 / 4) ** (1 / 250)
    exact = float(np.log(one / (1 - one)))
    assert least_epsilon(np.arange(1000.0)[::-1], included, 0.0) == pytest.approx(exact, abs=1e-6)
    assert least_epsilon(np.arange(1000.0)[::-1], included, 1e-5) < exact
    assert least_epsilon(np.arange(1000.0), included, 0.0) == 0.0


# --- membership inference


def test_a_patients_loss_is_the_mean_of_its_cases() -> None:
    chances = np.array([0.9, 0.5, 0.2])
    scores = np.stack([1 - chances, chances], axis=1)
    found = patient_losses(Outcomes(("b", "a", "b"), np.array([1, 1, 0]), scores, _NONE, _NONE))
    assert found == pytest.approx([-np.log(0.5), -(np.log(0.9) + np.log(0.8)) / 2])
    dice = np.array([[0.8], [np.nan], [0.4]])
    masks = Outcomes(("a", "b", "a"), np.zeros(0, np.int64), _NONE, dice, _NONE)
    assert patient_losses(masks) == pytest.approx([0.4, 0.0])


def test_the_share_found_is_at_no_more_false_alarms_than_asked() -> None:
    others = np.arange(1.0, 101.0)
    found = attack(np.array([0.5, 1.5, 5.5, 50.5]), others)
    assert found is not None
    # One of a hundred others lies below 1.5, ten below 10.5.
    assert [one.value for one in found.found] == [0.5, 0.75]
    assert found.auc.value == pytest.approx(1 - (0 + 1 + 5 + 50) / 400)
    assert attack(np.zeros(0), others) is None
    assert attack(others, np.zeros(0)) is None


def _noise_pictures() -> list[Picture]:
    """Ninety patients of noise, whose labels say nothing: all that can be learnt is who is who."""
    rng, folds = np.random.default_rng(2), ("train", "validation", "test")
    return [
        Picture(f"p{i}", rng.integers(-150, 250, (16, 16, 8)).astype(np.int16), label, folds[i % 3])
        for i, label in enumerate(rng.choice(["no_lesion", "lesion"], 90).tolist())
    ]


@pytest.fixture(scope="module")
def strangers(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """A hospital of such patients: 30 to train, 60 others."""
    folder = tmp_path_factory.mktemp("strangers")
    return Settings("strangers", (nifti_store(folder, _noise_pictures()),), folder / "run")


_BY_HEART: dict[str, Any] = {
    "contract__modality": None,
    "transforms": {"prepare": [{"name": "ScaleIntensityRanged", "a_min": -150, "a_max": 250, "b_min": 0, "b_max": 1}]},
    "network": {"name": "Classifier", "channels": [8, 16]},
    "training": {"input_size": [16, 16, 8], "batch_size": 10, "local_steps": 80},
    "optimiser": {"name": "AdamW", "lr": 5e-3},
    "rounds": 1,
}


def test_a_model_that_learnt_patients_by_heart_is_found_out(strangers: Settings) -> None:
    of = plan(**_BY_HEART)
    made = open_session(strangers, of)
    update = train_round(made, initial(of), 1)[0]
    found = check(strangers, of, moved(initial(of), update))
    assert found.membership is not None
    assert (found.membership.members, found.membership.others) == (30, 60)
    assert found.membership.auc.low > 0.6
    assert found.canaries is None
    assert "do not apply" in words_of(of, found)["Canaries"]


def test_the_same_training_with_differential_privacy_tells_them_hardly_apart(strangers: Settings) -> None:
    of = private(**_BY_HEART)
    made = open_session(strangers, of)
    mechanism, _ = one_release(of, "train", 30)
    update = train_round(made, initial(of), 1, setting=Setting(mechanism.noise, mechanism.rate))[0]
    found = check(strangers, of, moved(initial(of), update))
    assert found.membership is not None
    # Four standard deviations of a guess.
    assert found.membership.auc.value == pytest.approx(0.5, abs=0.26)
    assert found.failed == ""


def test_a_model_of_masks_is_checked_by_its_dice(masked: Prepared, tmp_path: Path) -> None:
    of = segmentation_plan()
    found = check(Settings("north", (masked.store,), tmp_path / "run"), of, initial(of)).membership
    assert found is not None
    assert found.members > 0
    assert found.others > 0


# --- who can ask for it


def test_no_message_leads_to_the_operations_of_a_check() -> None:
    tree = ast.parse(Path(inspect.getfile(Agent)).read_text(encoding="utf-8"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)]
    asked = [node.args[0] for node in calls if node.func.attr in {"call", "_asked_of_worker"}]  # type: ignore[attr-defined]
    named = {one.value for one in asked if isinstance(one, ast.Constant)}
    passed_on = {one.id for one in asked if isinstance(one, ast.Name)}
    assert named == {"describe", "patients", "train", "evaluate"}
    assert passed_on == {"operation"}
    assert {"losses", "canaries"} <= set(OPERATIONS)
    assert "canaries" not in inspect.signature(train_round).parameters


# --- the command of a hospital's staff


@pytest.fixture
def checked(hospital: Hospital, hospitals: dict[str, Prepared], tmp_path: Path) -> Callable[..., int]:
    """Runs `locum site check-model` on the first model of a plan that was proposed."""
    (hospital.home / "site.yaml").write_text(f"stores: [{hospitals['north'].store}]\nresources: {{threads: 1}}\n")

    def run(of: Plan, *options: str) -> int:
        hospital.approvals().receive(hospital.proposal(of))
        save_file(initial(of), tmp_path / "model.safetensors")
        words = ["site", "check-model", str(tmp_path / "model.safetensors"), "--plan", of.digest[:12]]
        return int(main([*words, "--home", str(hospital.home), *options]) or 0)

    return run


def test_staff_check_a_model_at_their_site_and_nothing_leaves(
    checked: Callable[..., int], hospital: Hospital, capsys: pytest.CaptureFixture[str]
) -> None:
    of = private(contract__split=_SPLIT)
    checked(of)
    capsys.readouterr()
    before = _files(hospital.home)
    assert checked(of) == 0
    told = capsys.readouterr().out
    assert all(words in told for words in ("Membership inference: by their loss", "no fault was found", *LIMITS))
    assert _files(hospital.home) == before
    assert not (hospital.home / "ledger.sqlite").exists()


def _files(home: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in home.rglob("*") if path.is_file()}


def test_staff_get_the_numbers_for_a_program(checked: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    of = plan()
    assert checked(of, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["plan"] == of.digest
    assert told["canaries"] is None
    assert 0 <= told["membership"]["auc"]["low"] <= told["membership"]["auc"]["high"] <= 1


def test_what_is_no_model_is_told_in_words(
    checked: Callable[..., int], hospital: Hospital, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    of = plan()
    checked(of)
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"nothing")
    for path, words in ((broken, "holds no model"), (tmp_path / "absent", "there is no")):
        told = main(["site", "check-model", str(path), "--plan", of.digest, "--home", str(hospital.home)])
        assert told == 2
        assert words in capsys.readouterr().err
