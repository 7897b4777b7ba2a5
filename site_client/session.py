"""What the worker keeps warm for one plan: the network, the prepared cases, and the site's local tensors.

Rules:
  * Weights arrive as raw arrays and are checked against the network before use.
  * Tensors with the role `local` never leave; they are written to disk after every round, so that a restarted worker
    and a resumed run go on exactly where they were.
  * Prepared cases are of the catalogs as they were when the session was opened. Once an ingest has changed one (a
    patient has withdrawn, a label was mended), the next task opens the session anew.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from monai.data import CacheDataset
from numpy.typing import NDArray
from safetensors.numpy import load_file, save
from torch import nn

from locum.common import build
from locum.common.build import Model, Role
from locum.common.durable import replace_file
from locum.common.errors import Code, DataError, SiteFailure
from locum.common.messages import Arrays
from locum.common.metrics import Outcomes
from locum.common.plan import Fold, Plan
from locum.site_client.imaging.catalog import Case
from locum.site_client.imaging.consent import State
from locum.site_client.imaging.fitting import fitting_cases, patients_of
from locum.site_client.settings import Settings
from locum.site_client.training import data, evaluate, private, train

_KEPT_ROUNDS = 3
_NAMED_CLASSES = 2


@dataclass
class Session:
    """One plan at one site, built once and used for every round."""

    settings: Settings
    plan: Plan
    network: nn.Module
    roles: Mapping[str, Role]
    device: torch.device
    cases: Mapping[Fold, tuple[Case, ...]]
    _states: tuple[State, ...] = ()
    _datasets: dict[tuple[Fold, bool], CacheDataset] = field(default_factory=dict)
    _together: bool | None = None

    def dataset(self, fold: Fold, *, augment: bool) -> CacheDataset:
        """The prepared cases of a fold; raises SiteFailure (NO_DATA, DATA_UNREADABLE)."""
        key = (fold, augment)
        if key not in self._datasets:
            budget = self.settings.cache_bytes - sum(map(data.held_bytes, self._datasets.values()))
            self._datasets[key] = data.dataset(self.plan, self.cases[fold], augment=augment, budget_bytes=budget)
        return self._datasets[key]

    def outdated(self) -> bool:
        """Whether the cases of a store are others than when the session was opened.

        While an ingest writes to a store, it is what it was: what an ingest does counts when it has ended.
        """
        return any(state.outdated() for state in self._states)

    def people(self) -> data.People:
        """The training cases by patient, for a plan with differential privacy; raises as :meth:`dataset` does."""
        return data.people(self.dataset("train", augment=True), self.cases["train"])

    def admitted(self) -> bool:
        """Whether the gradients of patients can be computed side by side; raises SiteFailure (PRIVACY_REFUSED)."""
        if self._together is None:
            self._together = private.admitted(self.plan, self.network, self.people())
        return self._together


def open_session(settings: Settings, plan: Plan) -> Session:
    """Builds the plan's network and finds its cases; raises SiteFailure (PLAN_UNBUILDABLE, DATA_UNREADABLE)."""
    torch.set_num_threads(settings.threads)
    torch.use_deterministic_algorithms(plan.deterministic, warn_only=True)
    network, roles = _built(plan)
    device = torch.device(_device_name(settings.device))
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(roles[name] != "frozen")
    states = tuple(map(State.of, settings.stores))  # before the cases: what changes meanwhile is then seen
    return Session(settings, plan, network.to(device), roles, device, _cases(settings, plan), states)


def _built(plan: Plan) -> tuple[nn.Module, dict[str, Role]]:
    """The network and its roles; the plan's other parts are built too, to fail before round 1 and not in it."""
    try:
        network, roles = build.initial_state(plan)
        build.transforms(plan, "prepare")
        build.transforms(plan, "augment")
        build.loss(plan)
        build.optimiser(plan, network.parameters())
    except build.CONSTRUCTION_ERRORS as error:
        raise SiteFailure(Code.PLAN_UNBUILDABLE, f"{type(error).__name__}: {error}") from error
    return network, roles


def _device_name(asked: str) -> str:
    if asked != "auto":
        return asked
    return "cuda" if torch.cuda.is_available() else "cpu"


def _cases(settings: Settings, plan: Plan) -> dict[Fold, tuple[Case, ...]]:
    try:
        return fitting_cases(settings.stores, plan)
    except DataError as error:
        raise SiteFailure(Code.DATA_UNREADABLE, str(error)) from error


def describe(session: Session) -> dict[str, object]:
    """What a site can say about itself before round 1: configuration, counts, ability and why not.

    Raises:
        SiteFailure: PRIVACY_REFUSED if a plan with differential privacy has a network that cannot be trained so.
    """
    plan, cases = session.plan, session.cases
    shared = build.shared_tensors(session.network, session.roles)
    missing = _missing_classes(plan, cases["train"])
    reason = _inability(plan, cases, missing)
    if plan.private is not None and not reason:
        session.admitted()
    return {
        "configuration": build.configuration(plan, shared),
        "cases": {fold: len(found) for fold, found in cases.items()},
        "missing_classes": missing,
        "able": not reason,
        "reason": reason,
    }


def _inability(plan: Plan, cases: Mapping[Fold, tuple[Case, ...]], missing: Sequence[str]) -> str:
    """Why the site cannot take part, in words that name no case and no label of its own; empty if it can."""
    contract = plan.contract
    patients = len({case.patient for case in cases["train"]})
    if patients < contract.least_patients:
        return (
            f"{patients} training patients have images that fit the contract (modality, dimensions, spacing), "
            f"which asks for {contract.least_patients}"
        )
    everything = [case for fold in cases.values() for case in fold]
    if contract.task == "segmentation":
        unknown, what = sum(case.mask is None for case in everything), "no mask"
    else:
        unknown, what = sum(case.label not in contract.classes for case in everything), "no label of the plan"
    if unknown:
        return f"{unknown} cases have {what}"
    if missing and contract.single_class == "exclude":
        more = ", …" if len(missing) > _NAMED_CLASSES else ""
        return "no training case of " + ", ".join(missing[:_NAMED_CLASSES]) + more
    return ""


def _missing_classes(plan: Plan, cases: Sequence[Case]) -> list[str]:
    if plan.contract.task == "segmentation":
        return []
    present = {case.label for case in cases}
    return [name for name in plan.contract.classes if name not in present]


def patients(session: Session) -> dict[Fold, int]:
    """How many patients of each fold fit the contract."""
    return patients_of(session.cases)


def train_round(
    session: Session,
    model: Arrays,
    round_number: int,
    *,
    start: int | None = None,
    attempt: int = 1,
    setting: private.Setting | None = None,
) -> tuple[Model, train.Trained, int]:
    """Trains one round from `model`; returns the update (local − global), what was done, and the number of cases.

    Each attempt at a round trains on other draws. `start` is the round that the model is of: the one before unless
    told. With differential privacy, `setting` is what the ledger has reserved, and patients are told for cases.

    Raises:
        SiteFailure: PRIVACY_REFUSED if there is a setting and the plan has no differential privacy, or the other way
            round.
    """
    check_private(session.plan, setting)
    at_model(session, model, round_number - 1 if start is None else start)
    if setting is None:
        done, cases = _train_steps(session, round_number, attempt), len(session.cases["train"])
    else:
        done, cases = _train_privately(session, round_number, setting)
    _save_local(session, round_number)
    after = build.shared_tensors(session.network, session.roles)
    return {name: after[name] - model[name] for name in after}, done, cases


def check_private(plan: Plan, setting: object) -> None:
    """Raises SiteFailure (PRIVACY_REFUSED) where a plan asks for noise and its request gives none, or reversed."""
    if (plan.private is None) != (setting is None):
        missing = "no noise" if setting is None else "noise that the plan does not ask for"
        raise SiteFailure(Code.PRIVACY_REFUSED, f"the worker was given {missing}")


def _train_privately(session: Session, round_number: int, setting: private.Setting) -> tuple[train.Trained, int]:
    people, together = session.people(), session.admitted()
    engine = private.Engine(session.plan, session.network, together=together)
    done = private.train_privately(session.plan, engine, people, round_number=round_number, setting=setting)
    return done, len(people.cases)


def _train_steps(session: Session, round_number: int, attempt: int = 1) -> train.Trained:
    """Trains the network as it stands for one round's steps."""
    prepared = session.dataset("train", augment=True)
    site = session.settings.site
    torch.manual_seed(data.draw_seed(session.plan.seed, site, round_number, "network", attempt))
    loader = data.training_loader(session.plan, prepared, site=site, round_number=round_number, attempt=attempt)
    batches = data.read(loader)
    return train.train(
        session.plan,
        session.network,
        batches,
        round_number=round_number,
        device=session.device,
        frozen={name for name, role in session.roles.items() if role == "frozen"},
    )


def at_model(session: Session, model: Arrays, round_number: int) -> None:
    """Puts the network where it is after a round: the shared tensors of `model`, the site's own local ones."""
    load_model(session, model)
    _load_local(session, round_number)


def measure(session: Session, fold: Fold) -> Outcomes:
    """The outcomes of the network as it stands on a fold."""
    prepared = session.dataset(fold, augment=False)
    batches = data.read(data.evaluation_loader(session.plan, prepared))
    return evaluate.outcomes(session.plan, session.network, batches, session.cases[fold], session.device)


def fit_alone(session: Session, rounds: int) -> Model:
    """Trains from the plan's start without a federation, `rounds` rounds of its steps; returns every tensor.

    Without differential privacy too if the plan has it: nothing of it leaves a simulation.
    """
    session.network.load_state_dict(build.initial_state(session.plan)[0].state_dict())
    for round_number in range(1, rounds + 1):
        _train_steps(session, round_number)
    state = session.network.state_dict()
    return {name: tensor.detach().cpu().numpy().copy() for name, tensor in state.items()}


def at_whole_model(session: Session, model: Arrays) -> None:
    """Puts every tensor of a model trained alone into the network, local ones too."""
    _assign(session.network.state_dict(), model)


def load_model(session: Session, model: Mapping[str, NDArray[np.generic]]) -> None:
    """Puts the shared tensors into the network; raises SiteFailure (MESSAGE_UNREADABLE) if they do not fit."""
    state = session.network.state_dict()
    shared = {name for name, role in session.roles.items() if role == "shared"}
    if set(model) != shared or any(tuple(state[name].shape) != model[name].shape for name in shared):
        raise SiteFailure(Code.MESSAGE_UNREADABLE, "the model's tensors are not those of the plan's network")
    _assign(state, model)


def _assign(state: Mapping[str, torch.Tensor], arrays: Mapping[str, NDArray[np.generic]]) -> None:
    with torch.no_grad():
        for name, array in arrays.items():
            state[name].copy_(torch.from_numpy(np.array(array)))


def _local_folder(session: Session) -> Path:
    """The plan's own folder: a site may serve several plans."""
    return session.settings.run_dir / session.plan.digest[:16]


def _local_files(session: Session) -> list[tuple[int, Path]]:
    files = _local_folder(session).glob("local-*.safetensors")
    return sorted((int(path.stem.split("-")[1]), path) for path in files)


def _load_local(session: Session, after_round: int) -> None:
    """Loads the local tensors as they were after `after_round`; as the seed made them before the site's first."""
    if "local" not in session.roles.values():
        return
    older = [path for number, path in _local_files(session) if number <= after_round]
    local = load_file(older[-1]) if older else build.tensors_of(*build.initial_state(session.plan), "local")
    _assign(session.network.state_dict(), local)


def _save_local(session: Session, round_number: int) -> None:
    local = build.tensors_of(session.network, session.roles, "local")
    if not local:
        return
    _local_folder(session).mkdir(parents=True, exist_ok=True)
    replace_file(_local_folder(session) / f"local-{round_number:06d}.safetensors", save(local))
    # Any round may turn out the best one, and is then measured with its own local tensors.
    only_last = session.plan.evaluation.select == "last" and session.plan.evaluation.rollback is None
    kept = _KEPT_ROUNDS if only_last else round_number
    for number, path in _local_files(session):
        if number <= round_number - kept or number > round_number:
            path.unlink()
