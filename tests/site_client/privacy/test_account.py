"""`locum site ledger` and a review: what was spent, what one more run would do, and never less than it is."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from locum.common.cli import main
from locum.common.errors import PlanError
from locum.common.plan import Plan
from locum.simulations.preparation import Prepared
from locum.site_client.gate import Policy
from locum.site_client.privacy.account import account, account_of
from locum.site_client.privacy.accountant import Mechanism, epsilon
from locum.site_client.privacy.budget import whole_run
from locum.site_client.privacy.ledger import Ledger, Limit, Use
from locum.site_client.privacy.projection import project
from locum.site_client.review import plan_in_words
from tests.plans import plan
from tests.site_client.enrolled import Hospital
from tests.site_client.privacy.private_plans import private

DELTA = 1e-5
ONE = Mechanism(2.0, 1.0, 1)
USE = Use("patients", "run-1", "a" * 64, 1, "train")
_WIDE = Limit(100.0, DELTA)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "store").mkdir()
    (tmp_path / "site.yaml").write_text("stores: [store]\n")
    return tmp_path


def _ledger(home: Path) -> Ledger:
    made = Ledger(home / "ledger.sqlite")
    made.begin()
    return made


def _spend(ledger: Ledger, *uses: Use, commit: bool = True) -> None:
    for use in uses:
        number = ledger.reserve(use, ONE, run=_WIDE, lifetime=_WIDE).id
        if commit:
            ledger.commit(number)


def _told(home: Path, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["site", "ledger", *words, "--home", str(home)]) in {None, 0}
    return capsys.readouterr().out


# --- what was spent


def test_the_account_names_every_run_its_epsilon_and_what_was_never_committed(home: Path) -> None:
    ledger = _ledger(home)
    _spend(ledger, USE, replace(USE, round=2), replace(USE, purpose="test"))
    _spend(ledger, replace(USE, run="run-2", plan="b" * 64), commit=False)
    found = account(home)
    assert (found.population, found.spent, found.lifetime, found.rows) == (
        "patients",
        epsilon([replace(ONE, steps=4)], DELTA),
        8.0,
        8,
    )
    first, second = found.runs
    assert (first.run, first.epsilon, first.reservations, first.uncommitted) == (
        "run-1",
        epsilon([replace(ONE, steps=3)], DELTA),
        {"train": 2, "test": 1},
        0,
    )
    assert (second.plan, second.uncommitted) == ("b" * 64, 1)
    assert found.left == 8.0 - found.spent


def test_the_command_says_it_in_words_and_as_data(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ledger = _ledger(home)
    _spend(ledger, USE, commit=False)
    ledger.note_unprotected(replace(USE, run="bare-run"))
    text = _told(home, capsys)
    spent = epsilon([ONE], DELTA)
    assert f"patients: epsilon {spent:.2f} of 8 is spent, at delta 1e-05; {8 - spent:.2f} is left" in text
    assert "run-1  plan aaaaaaaaaaaa" in text
    assert "reserved: train 1; 1 never committed, which count" in text
    assert "ALSO: 1 run without differential privacy; the epsilon above says nothing of them\n  bare-run" in text
    assert f"3 rows, each follows the one before; the last is {ledger.state().head[:12]}" in text
    found = json.loads(_told(home, capsys, "--json"))
    assert (found["spent"], found["rows"], found["unprotected"]) == (spent, 3, [{"run": "bare-run", "plan": "a" * 64}])


def test_a_population_that_spent_nothing_begins_at_zero(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "epsilon 0.00 of 8 is spent" in _told(home, capsys)
    assert "there is no ledger yet" in _told(home, capsys)
    assert not (home / "ledger.sqlite").exists()
    _spend(_ledger(home), replace(USE, population="eyes"))
    text = _told(home, capsys)
    assert "epsilon 0.00 of 8 is spent" in text
    assert "other populations in this ledger: eyes" in text


def test_two_agents_with_one_ledger_see_the_same(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name / "store").mkdir(parents=True)
        (tmp_path / name / "site.yaml").write_text("stores: [store]\nledger: ../shared.sqlite\n")
    shared = Ledger(tmp_path / "shared.sqlite")
    shared.begin()
    _spend(shared, USE)
    assert account(tmp_path / "a") == account(tmp_path / "b")
    assert account(tmp_path / "a").spent > 0


def test_the_account_warns_above_the_policys_epsilon(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _spend(_ledger(home), USE)
    assert "WARNING" not in _told(home, capsys)
    (home / "site.yaml").write_text("stores: [store]\npolicy: {warn_epsilon: 0.5}\n")
    assert "WARNING: that is above 0.5" in _told(home, capsys)


def test_a_damaged_ledger_is_told_with_the_row_and_the_remedy(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ledger = _ledger(home)
    _spend(ledger, USE)
    ledger.close()
    with closing(sqlite3.connect(ledger.path)) as connection, connection:
        connection.executescript("DROP TRIGGER no_change; UPDATE ledger SET noise = 9.0 WHERE id = 2")
    assert main(["site", "ledger", "--home", str(home)]) not in {None, 0}
    told = capsys.readouterr().err
    assert "row 2 of the ledger" in told.replace("\n", " ")
    assert "restore the ledger from a backup" in told.replace("\n", " ")


def test_the_explanation_says_unit_mechanisms_noise_accountant_and_room(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ledger = _ledger(home)
    _spend(ledger, USE, replace(USE, round=2))
    text = _told(home, capsys, "--explain")
    for said in ("Unit: the patient", "zero-out", "noise 2, rate 1, 2 times", "AES-256-CTR", "PLD", "Delta 1e-05"):
        assert said in text
    found = account(home)
    assert f"A further run could use epsilon {found.room():.2f}" in text
    assert found.room() > found.left  # mechanisms compose to less than their sum


def test_the_room_is_what_the_ledger_would_still_let_through(home: Path) -> None:
    _spend(_ledger(home), USE)
    policy = Policy(lifetime_epsilon=4.0)
    found = account_of(Ledger(home / "ledger.sqlite").rows(), "patients", policy)
    assert 0 < found.room() < 4.0
    full = account_of(Ledger(home / "ledger.sqlite").rows(), "patients", Policy(lifetime_epsilon=found.spent))
    assert full.room() == 0.0


# --- what one more run would do


def _projected(home: Path, of: Plan, patients: dict[Any, int] | None, **policy: Any) -> str:
    allowed = Policy.model_validate(policy)
    found = account_of(Ledger(home / "ledger.sqlite").rows(), "patients", allowed)
    return "\n".join(project(found, allowed, of, patients).words())


_PATIENTS = {"train": 40, "validation": 10, "test": 10}


def test_a_projection_says_what_a_run_would_leave(home: Path) -> None:
    _spend(_ledger(home), USE)
    of = private()
    after = epsilon([ONE, *whole_run(of, _PATIENTS)], DELTA)  # type: ignore[arg-type]
    text = _projected(home, of, _PATIENTS)
    assert "40 to train, 10 to choose the model, 10 to test" in text
    assert f"stands at epsilon {epsilon([ONE], DELTA):.2f} of 8" in text
    assert f"would bring it to {after:.2f} at most" in text
    assert f"This plan would leave {8 - after:.1f} of 8" in text
    assert ("WARNING: that is above 3" in text) == (after > 3)


def test_a_projection_says_when_a_run_would_not_come_to_its_end(home: Path) -> None:
    _spend(_ledger(home), USE)
    assert "BEYOND the lifetime's 1.5" in _projected(home, private(), _PATIENTS, lifetime_epsilon=1.5)


def test_a_projection_says_when_the_delta_is_above_one_in_the_number_of_patients(home: Path) -> None:
    _ledger(home)
    text = _projected(home, private(delta=0.03), _PATIENTS)
    assert "REFUSED here: the plan's delta 0.03 is above 1/N = 0.025" in text


def test_without_the_stores_epsilons_are_added_up(home: Path) -> None:
    _ledger(home)
    text = _projected(home, private(), None)
    assert "unknown" in text
    assert "bring it to 4.00 at most" in text  # 2 to train, 1 for each of two folds
    untold = private(release={"training_loss": False, "metrics": []}, metrics_epsilon=None)
    assert "bring it to 2.00 at most" in _projected(home, untold, None)


@pytest.fixture
def proposed(hospital: Hospital, hospitals: dict[str, Prepared]) -> Callable[..., Plan]:
    """Proposes plans to an enrolled hospital whose store has images."""
    (hospital.home / "store").symlink_to(hospitals["north"].store)
    (hospital.home / "site.yaml").write_text("stores: [store]\n")

    def propose(of: Plan) -> Plan:
        hospital.approvals().receive(hospital.proposal(of))
        return of

    return propose


def test_a_review_says_unit_epsilon_and_what_the_plan_would_leave(
    hospital: Hospital, proposed: Callable[..., Plan], capsys: pytest.CaptureFixture[str]
) -> None:
    of = proposed(private())
    main(["site", "review", of.digest, "--home", str(hospital.home)])
    text = capsys.readouterr().out
    assert "per patient: epsilon 2, delta 0.001" in text
    assert "This site's ledger\n  Patients that fit: " in text
    assert "This plan would leave " in text
    main(["site", "ledger", "--plan", of.digest[:8], "--json", "--home", str(hospital.home)])
    found = json.loads(capsys.readouterr().out)["projection"]
    assert f"would leave {found['left']:.1f} of 8" in text
    assert sum(found["patients"].values()) == 12


def test_a_review_at_a_desk_without_the_images_adds_up(
    hospital: Hospital, proposed: Callable[..., Plan], capsys: pytest.CaptureFixture[str]
) -> None:
    of = proposed(private())
    (hospital.home / "store").unlink()
    main(["site", "review", of.digest, "--home", str(hospital.home)])
    assert "How many patients fit is unknown" in capsys.readouterr().out


def test_a_review_of_a_plan_without_differential_privacy_says_how_it_is_noted(
    hospital: Hospital, proposed: Callable[..., Plan], capsys: pytest.CaptureFixture[str]
) -> None:
    of = proposed(plan())
    main(["site", "review", of.digest, "--home", str(hospital.home)])
    assert "This site's ledger\n  A run of this plan is noted as one without" in capsys.readouterr().out
    assert main(["site", "ledger", "--plan", of.digest, "--home", str(hospital.home)]) not in {None, 0}


def test_a_review_of_a_private_plan_counts_patients_and_says_what_is_not_protected() -> None:
    of = private(images=3)
    words = plan_in_words(of, Policy())
    privacy, leaves = "\n".join(words["Privacy"]), "\n".join(words["What leaves this site"])
    assert "of up to 3 images of a patient in a step the mean counts" in privacy
    assert "Of the metrics: epsilon 1 more for each fold" in privacy
    assert "A run may repeat 1 round; more than that is refused here" in privacy
    assert "NOT protected: how many patients there are" in privacy
    assert "the number of training patients, as the update's weight" in leaves
    assert "signed statement of the epsilon" in leaves
    assert "cases in each fold" not in leaves
    assert "single ones" not in leaves


@pytest.mark.parametrize("wrong", [0, -1, float("inf"), float("nan")])
def test_an_epsilon_of_zero_or_infinity_is_an_error_of_the_plan(wrong: float) -> None:
    for key in ("epsilon", "metrics_epsilon", "delta", "clip"):
        with pytest.raises(PlanError, match=key):
            private(**{key: wrong})
