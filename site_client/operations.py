"""What a worker can be asked to do with its session.

`describe`, `patients`, `train` and `evaluate` answer the coordinator through the agent; the last two with the noise
that its ledger has reserved, `private` of a request, which a plan with differential privacy must have and no other may.
`outcomes`, `pictures`, `fit_alone`, `losses` and `canaries` are for a simulation, which owns the data it made; no
message type leads to them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from locum.common.build import metric_of
from locum.common.errors import Code, SiteFailure
from locum.common.messages import Arrays, Tensors
from locum.common.metrics import Outcomes
from locum.common.plan import Fold, parse_plan
from locum.common.plan_checks import OTHER
from locum.common.sums import CASES, cells_of
from locum.site_client.check import canaries_at, losses_at
from locum.site_client.privacy.measures import noised_sums
from locum.site_client.privacy.noise import NoiseSource
from locum.site_client.session import (
    Session,
    at_model,
    at_whole_model,
    check_private,
    describe,
    fit_alone,
    measure,
    open_session,
    patients,
    train_round,
)
from locum.site_client.settings import Settings
from locum.site_client.training.pictures import sample_pictures
from locum.site_client.training.private import Setting


def session_for(session: Session | None, settings: Settings, request: Mapping[str, Any]) -> Session:
    """The session of the request's plan: the warm one, or a new one if the plan or a catalog is another."""
    plan = parse_plan(request["plan"].encode()) if "plan" in request else None
    if plan is not None and (session is None or session.plan.digest != plan.digest):
        return open_session(settings, plan)
    if session is None:
        raise SiteFailure(Code.INTERNAL, "the worker was asked before it was given a plan")
    return open_session(settings, session.plan) if session.outdated() else session


def _describe(session: Session, _request: Mapping[str, Any], _tensors: Arrays) -> tuple[dict[str, Any], Tensors]:
    return describe(session), {}


def _patients(session: Session, _request: Mapping[str, Any], _tensors: Arrays) -> tuple[dict[str, Any], Tensors]:
    return {"patients": patients(session)}, {}


def _train(session: Session, request: Mapping[str, Any], tensors: Arrays) -> tuple[dict[str, Any], Tensors]:
    given = request.get("private")
    update, done, cases = train_round(
        session,
        tensors,
        request["round"],
        start=request.get("start"),
        attempt=request.get("attempt", 1),
        setting=Setting(given["noise"], given["rate"]) if given is not None else None,
    )
    return {"steps": done.steps, "loss": done.loss, "cases": cases}, update


def _evaluate(session: Session, request: Mapping[str, Any], tensors: Arrays) -> tuple[dict[str, Any], Tensors]:
    if session.plan.private is not None:
        return _evaluate_privately(session, request, tensors)
    check_private(session.plan, request.get("private"))
    at_model(session, tensors, request["round"])
    found = measure(session, request["fold"])
    cells = _cells(session, request["fold"])
    sums = _sums(session, found)
    for key, rows in cells.items():
        own = {**_sums(session, found.take(rows)), CASES: np.array([float(len(rows))])}
        sums |= {f"{name}@{key}": array for name, array in own.items()}
    patients = np.unique(found.patients, return_inverse=True)[1]
    return {
        "cases": len(found.patients),
        "cells": {key: sorted({int(patients[row]) for row in rows}) for key, rows in cells.items()},
    }, sums


def _evaluate_privately(
    session: Session, request: Mapping[str, Any], tensors: Arrays
) -> tuple[dict[str, Any], Tensors]:
    """Patients for cases, and noise in the sums.

    Where the plan releases none, no noise is needed, for no image is looked at: it is not paid for, so that not even a
    failure may depend on one. Raises SiteFailure (PRIVACY_REFUSED, NO_DATA and as :func:`measure`).
    """
    plan, given, fold = session.plan, request.get("private"), request["fold"]
    if plan.released_metrics:
        check_private(plan, given)
    at_model(session, tensors, request["round"])
    if given is not None:
        sums = noised_sums(plan, measure(session, fold), multiplier=given["noise"], noise=NoiseSource())
        return {"cases": patients(session)[fold]}, sums
    if not patients(session)[fold]:
        raise SiteFailure(Code.NO_DATA, f"no patient in the {fold} fold")
    return {"cases": patients(session)[fold]}, {}


def _sums(session: Session, found: Outcomes) -> Tensors:
    classes = len(session.plan.contract.classes)
    return {name: metric_of(name).sums(found, classes) for name in session.plan.evaluation.metrics}


def _cells(session: Session, fold: Fold) -> dict[str, NDArray[np.intp]]:
    """By cell of the plan's subgroups, which of a fold's cases are its own, by their place."""
    named = {cell: cell.value.casefold() for cell in cells_of(session.plan, fold)}
    values = [case.manufacturer.strip().casefold() for case in session.cases[fold]]
    known = set(named.values())
    own = [value if value in known else OTHER for value in values]
    return {cell.key: np.flatnonzero([value == name for value in own]) for cell, name in named.items()}


def _stand_at(session: Session, request: Mapping[str, Any], tensors: Arrays) -> None:
    """A federation's model after some round, or a whole model trained alone."""
    if request["round"] is None:
        at_whole_model(session, tensors)
    else:
        at_model(session, tensors, request["round"])


def _outcomes(session: Session, request: Mapping[str, Any], tensors: Arrays) -> tuple[dict[str, Any], Tensors]:
    _stand_at(session, request, tensors)
    found = measure(session, request["fold"])
    arrays: Tensors = {"labels": found.labels, "scores": found.scores, "dice": found.dice, "surface": found.surface}
    return {"patients": list(found.patients)}, arrays


def _pictures(session: Session, request: Mapping[str, Any], tensors: Arrays) -> tuple[dict[str, Any], Tensors]:
    _stand_at(session, request, tensors)
    return sample_pictures(session, request["count"])


def _fit_alone(session: Session, request: Mapping[str, Any], _tensors: Arrays) -> tuple[dict[str, Any], Tensors]:
    return {}, fit_alone(session, request["rounds"])


def _losses(session: Session, request: Mapping[str, Any], tensors: Arrays) -> tuple[dict[str, Any], Tensors]:
    at_model(session, tensors, request["round"])
    found = losses_at(session)
    return {}, {"members": found.members, "others": found.others}


def _canaries(session: Session, request: Mapping[str, Any], tensors: Arrays) -> tuple[dict[str, Any], Tensors]:
    at_model(session, tensors, request["round"])
    found = canaries_at(session)
    return {"canaries": asdict(found) if found is not None else None}, {}


_Operation = Callable[[Session, Mapping[str, Any], Arrays], tuple[dict[str, Any], Tensors]]
OPERATIONS: dict[str, _Operation] = {
    "describe": _describe,
    "patients": _patients,
    "train": _train,
    "evaluate": _evaluate,
    "outcomes": _outcomes,
    "pictures": _pictures,
    "fit_alone": _fit_alone,
    "losses": _losses,
    "canaries": _canaries,
}
