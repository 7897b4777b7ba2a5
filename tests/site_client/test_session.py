from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from locum.common.build import Model
from locum.common.errors import Code, SiteFailure
from locum.common.plan import Plan
from locum.common.updates import l2_norm
from locum.simulations.preparation import Prepared
from locum.site_client.session import (
    Session,
    at_model,
    describe,
    fit_alone,
    measure,
    open_session,
    train_round,
)
from locum.site_client.settings import Settings
from tests.plans import initial
from tests.site_client.asking import (
    Picture,
    batch_norm_plan,
    equal,
    moved,
    nifti_store,
    plan,
    segmentation_plan,
)

_NO_AUGMENT: dict[str, Any] = {"transforms__augment": []}


def _round(settings: Settings, of: Plan, number: int = 1) -> Model:
    return train_round(open_session(settings, of), initial(of), number)[0]


def _state(session: Session) -> Model:
    return {name: tensor.numpy().copy() for name, tensor in session.network.state_dict().items()}


def _by_role(session: Session, role: str) -> Model:
    return {name: array for name, array in _state(session).items() if session.roles[name] == role}


def test_the_same_plan_site_and_round_give_the_same_update_to_the_bit(settings: Settings) -> None:
    of = plan()
    session = open_session(settings, of)
    first = train_round(session, initial(of), 1)[0]
    train_round(session, moved(initial(of), first), 2)
    torch.rand(3)
    assert equal(train_round(session, initial(of), 1)[0], first)
    assert equal(_round(settings, of), first)


def test_dropout_is_drawn_from_the_plans_seed_too(settings: Settings) -> None:
    network = {"name": "DenseNet121", "init_features": 4, "growth_rate": 2, "block_config": [1, 1], "dropout_prob": 0.5}
    of = plan(network=network, training__input_size=[16, 16, 8])
    first = _round(settings, of)
    torch.rand(7)
    assert equal(_round(settings, of), first)
    assert not equal(_round(settings, of, 2), first)


@pytest.mark.parametrize("changes", [{"seed": 1}, {"number": 2}, {"site": "south"}], ids=str)
def test_another_seed_round_or_site_gives_another_update(changes: dict[str, Any], settings: Settings) -> None:
    number, site = changes.pop("number", 1), changes.pop("site", "north")
    of = plan()
    other = train_round(open_session(replace(settings, site=site), plan(**changes)), initial(of), number)[0]
    assert not equal(_round(settings, of), other)


def test_two_hospitals_give_different_updates(settings: Settings, hospitals: dict[str, Prepared]) -> None:
    riverside = replace(settings, site="riverside", stores=(hospitals["riverside"].store,))
    assert not equal(_round(settings, plan()), _round(riverside, plan()))


def test_cases_of_several_stores_are_one_set(settings: Settings, hospitals: dict[str, Prepared]) -> None:
    pooled = replace(settings, stores=tuple(site.store for site in hospitals.values()))
    counts = [
        describe(open_session(replace(settings, stores=(site.store,)), plan()))["cases"] for site in hospitals.values()
    ]
    assert describe(open_session(pooled, plan()))["cases"] == {fold: sum(c[fold] for c in counts) for fold in counts[0]}  # type: ignore[index]


def test_a_budget_too_small_for_the_cache_changes_no_bit(settings: Settings) -> None:
    of = plan()
    assert equal(_round(replace(settings, cache_bytes=0), of), _round(settings, of))
    assert equal(_round(replace(settings, cache_bytes=20_000), of), _round(settings, of))


# --- what stays at the site


def test_running_statistics_stay_at_the_site_and_are_kept_from_round_to_round(settings: Settings) -> None:
    of = batch_norm_plan()
    session = open_session(settings, of)
    before = _by_role(session, "local")
    update = train_round(session, initial(of), 1)[0]
    after = _by_role(session, "local")
    assert {name.rpartition(".")[2] for name in after} == {"running_mean", "running_var", "num_batches_tracked"}
    assert not after.keys() & update.keys()
    assert all(not np.array_equal(after[name], before[name]) for name in after)
    at_model(session, moved(initial(of), update), 1)
    assert equal(_by_role(session, "local"), after)


def test_a_session_opened_again_goes_on_where_it_was_to_the_bit(settings: Settings) -> None:
    of = batch_norm_plan()
    steady, model = open_session(settings, of), initial(of)
    elsewhere = replace(settings, run_dir=settings.run_dir.with_name("again"))
    for number in (1, 2, 3):
        again = open_session(elsewhere, of)
        a, b = train_round(steady, model, number)[0], train_round(again, model, number)[0]
        assert equal(a, b)
        assert equal(_state(steady), _state(again))
        model = moved(model, a)


def test_a_round_tried_again_starts_from_the_local_tensors_before_it(settings: Settings) -> None:
    of = batch_norm_plan()
    session = open_session(settings, of)
    model = moved(initial(of), train_round(session, initial(of), 1)[0])
    first = train_round(session, model, 2)[0]
    assert equal(train_round(session, model, 2)[0], first)


def test_a_round_that_failed_leaves_nothing_behind(settings: Settings) -> None:
    of = batch_norm_plan(optimiser={"name": "SGD", "lr": 0.05}, training__local_steps=3)
    session = open_session(settings, of)
    poison = {name: np.full_like(array, np.nan) for name, array in initial(of).items()}
    with pytest.raises(SiteFailure) as failed:
        train_round(session, poison, 1)
    assert failed.value.code is Code.LOSS_NOT_FINITE
    at_model(session, initial(of), 1)
    assert equal(_by_role(session, "local"), _by_role(open_session(settings, of), "local"))
    assert len(measure(session, "test").patients) == 3


def test_the_last_rounds_are_kept_and_all_when_the_best_is_asked_for(settings: Settings) -> None:
    for select, kept in (("last", 3), ("best", 5)):
        of = batch_norm_plan(evaluation={"metrics": ["AUC"], "select": select}, training__local_steps=1, rounds=5)
        session = open_session(settings, of)
        second: Model = {}
        for number in range(1, 6):
            train_round(session, initial(of), number)
            second = _by_role(session, "local") if number == 2 else second
        assert len(list(settings.run_dir.glob(f"{of.digest[:16]}/local-*.safetensors"))) == kept
        at_model(session, initial(of), 2)
        assert equal(_by_role(session, "local"), second) is (select == "best")


def test_local_tensors_named_by_the_plan_never_leave(settings: Settings) -> None:
    of = plan(tensors={"local": ["4.*"]})
    session = open_session(settings, of)
    update = train_round(session, initial(of), 1)[0]
    assert not [name for name in update if name.startswith("4.")]
    (path,) = settings.run_dir.glob("*/local-000001.safetensors")
    assert equal(load_file(path), _by_role(session, "local"))
    assert all(
        not np.array_equal(load_file(path)[name], a)
        for name, a in _by_role(open_session(settings, of), "local").items()
    )


def test_a_network_without_local_tensors_leaves_no_file(settings: Settings) -> None:
    _round(settings, plan())
    assert not settings.run_dir.exists()


def test_frozen_tensors_do_not_change_and_do_not_leave(settings: Settings) -> None:
    of = plan(tensors={"frozen": ["0.*"]})
    session = open_session(settings, of)
    before = _by_role(session, "frozen")
    assert before
    update = train_round(session, initial(of), 1)[0]
    assert equal(_by_role(session, "frozen"), before)
    assert not before.keys() & update.keys()
    assert l2_norm(update) > 0


def test_frozen_running_statistics_do_not_change_and_are_what_training_normalises_with(settings: Settings) -> None:
    of = batch_norm_plan(tensors={"frozen": ["*running_*", "*num_batches_tracked"]}, **_NO_AUGMENT)
    session = open_session(settings, of)
    before = _by_role(session, "frozen")
    train_round(session, initial(of), 1)
    assert equal(_by_role(session, "frozen"), before)
    free = _round(settings, batch_norm_plan(**_NO_AUGMENT))
    assert not equal(_round(settings, of), free)


def test_training_alone_starts_from_the_plan_and_returns_every_tensor(settings: Settings) -> None:
    of = batch_norm_plan()
    session = open_session(settings, of)
    train_round(session, initial(of), 1)
    alone = fit_alone(session, 2)
    assert equal(alone, fit_alone(open_session(settings, of), 2))
    assert alone.keys() == session.roles.keys()


# --- what a site says of itself


def _described(settings: Settings, of: Plan) -> dict[str, Any]:
    return describe(open_session(settings, of))


def _one_class(folder: Path, count: int = 3) -> Path:
    volumes = np.random.default_rng(1).integers(0, 99, (count, 16, 16, 8)).astype(np.int16)
    return nifti_store(folder, [Picture(f"i{n}", volume, "lesion") for n, volume in enumerate(volumes)])


def test_a_site_with_one_class_is_told_of_and_takes_part_or_not_as_the_plan_says(
    settings: Settings, tmp_path: Path
) -> None:
    only = replace(settings, stores=(_one_class(tmp_path / "site"),))
    allowed = _described(only, plan(contract__modality=None))
    assert (allowed["able"], allowed["missing_classes"]) == (True, ["no_lesion"])
    of = plan(contract__modality=None, contract__single_class="exclude")
    excluded = _described(only, of)
    assert (excluded["able"], excluded["reason"]) == (False, "no training case of no_lesion")
    assert train_round(open_session(only, plan(contract__modality=None)), initial(of), 1)[1].steps == 2


def test_a_reason_is_short_however_many_classes_there_are(settings: Settings, tmp_path: Path) -> None:
    only = replace(settings, stores=(_one_class(tmp_path / "site"),))
    classes = [
        "lesion",
        *(
            f"a quite long name of a rare finding, of which there are many {n:03d}"[:64].replace(",", "")
            for n in range(100, 140)
        ),
    ]
    reason = _described(only, plan(contract={"task": "classification", "classes": classes, "single_class": "exclude"}))
    assert not reason["able"]
    assert len(reason["reason"]) <= 200


def test_a_site_with_too_few_patients_is_not_able_however_many_cases_they_have(settings: Settings) -> None:
    found = _described(settings, plan(contract__least_patients=7))
    assert (found["able"], found["reason"]) == (
        False,
        "6 training patients have images that fit the contract (modality, dimensions, spacing), which asks for 7",
    )


@pytest.mark.parametrize(
    ("changes", "fit"),
    [
        ({"modality": ["CT", "MR"]}, True),
        ({"modality": ["MR"]}, False),
        ({"spacing": {"least": "8 mm", "most": "10 mm"}}, True),
        ({"spacing": {"most": "9 mm"}}, False),
        ({"spacing": {"least": "9 mm"}}, False),
    ],
)
def test_a_case_is_the_plans_when_modality_and_every_spacing_fit(
    changes: dict[str, Any], fit: bool, settings: Settings
) -> None:
    found = _described(settings, plan(**{f"contract__{key}": value for key, value in changes.items()}))
    assert (sum(found["cases"].values()) > 0) is fit


def test_volumes_are_no_cases_of_a_plan_for_pictures_nor_pictures_of_one_for_volumes(
    settings: Settings, flat: Prepared
) -> None:
    two = {"contract__modality": None, "contract__dimensions": 2, "training__input_size": [16, 16],
           "transforms__prepare": []}  # fmt: skip
    pictures = replace(settings, stores=(flat.store,))
    assert sum(_described(settings, plan(**two))["cases"].values()) == 0
    assert sum(_described(pictures, plan(contract__modality=None))["cases"].values()) == 0
    assert sum(_described(pictures, plan(**two))["cases"].values()) == 13


def test_a_site_without_masks_is_not_able_to_segment(settings: Settings) -> None:
    found = _described(settings, segmentation_plan())
    assert (found["able"], found["reason"]) == (False, "13 cases have no mask")


# --- every kind of task learns


def _loss_of_rounds(settings: Settings, of: Plan) -> list[float]:
    session, model, losses = open_session(settings, of), initial(of), []
    for number in range(1, 4):
        update, done, _ = train_round(session, model, number)
        model = moved(model, update)
        losses.append(done.loss)
    return losses


_ADAM = {"name": "AdamW", "lr": 0.01}


def test_three_rounds_lower_the_loss_of_a_classifier_of_volumes(settings: Settings) -> None:
    losses = _loss_of_rounds(settings, plan(optimiser=_ADAM, training__local_steps=12, training__batch_size=8))
    assert losses[2] < losses[1] < losses[0]


def test_three_rounds_lower_the_loss_of_a_classifier_of_radiographs(settings: Settings, flat: Prepared) -> None:
    changes: dict[str, Any] = {
        "contract__modality": ["DX"],
        "contract__dimensions": 2,
        "transforms__prepare": [{"name": "NormalizeIntensityd"}],
        "training": {"input_size": [16, 16], "batch_size": 8, "local_steps": 12},
        "optimiser": _ADAM,
    }
    losses = _loss_of_rounds(replace(settings, stores=(flat.store,)), plan(**changes))
    assert losses[2] < losses[1] < losses[0]


def test_three_rounds_lower_the_loss_of_a_segmentation(settings: Settings, masked: Prepared) -> None:
    of = segmentation_plan(optimiser=_ADAM, training__local_steps=8)
    losses = _loss_of_rounds(replace(settings, stores=(masked.store,)), of)
    assert losses[2] < losses[1] < losses[0]


def test_three_rounds_lower_the_loss_of_a_classifier_of_two_channels(settings: Settings, tmp_path: Path) -> None:
    store = _two_channels(tmp_path / "site")
    of = plan(**_TWO_CHANNELS, optimiser=_ADAM, training__local_steps=12)
    losses = _loss_of_rounds(replace(settings, stores=(store,)), of)
    assert losses[2] < losses[1] < losses[0]
    with pytest.raises(SiteFailure) as failed:
        _round(replace(settings, stores=(store,)), plan(**{**_TWO_CHANNELS, "contract__channels": 1}))
    assert failed.value.code is Code.DATA_UNREADABLE
    assert "2 channels" in failed.value.detail


_TWO_CHANNELS: dict[str, Any] = {
    "contract__modality": None,
    "contract__channels": 2,
    "transforms": {"prepare": [{"name": "ScaleIntensityd", "channel_wise": False}]},
    "training__input_size": [8, 8, 4],
    "training__batch_size": 8,
}


def _two_channels(folder: Path) -> Path:
    """The label is whether the second channel is brighter than the first."""
    rng = np.random.default_rng(2)
    pictures = []
    for number in range(8):
        array = rng.integers(0, 40, (8, 8, 4, 2)).astype(np.int16)
        array[..., number % 2] += 60
        pictures.append(Picture(f"i{number}", array, ("no_lesion", "lesion")[number % 2]))
    return nifti_store(folder, pictures)
