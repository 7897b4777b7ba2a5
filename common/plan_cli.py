"""`locum plan`: check, show, identify and describe plans."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from typing import Annotated

import typer

from locum.common.errors import PlanError
from locum.common.plan import Plan, load_plan, plan_error
from locum.common.yaml_source import read_yaml

app = typer.Typer(help="Check, show and identify a plan.", no_args_is_help=True, add_completion=False)

_PlanPath = Annotated[Path, typer.Argument(metavar="PLAN", help="A plan.yaml.")]
_Json = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]


def checked_plan(path: Path) -> Plan:
    """A plan whose parts have been built and probed; raises :class:`PlanError` with lines and remedies."""
    from locum.common.build import check_buildable

    plan = load_plan(path)
    found = check_buildable(plan)
    if found:
        raise plan_error(read_yaml(path), found)
    return plan


@app.command()
def check(plan: _PlanPath, as_json: _Json = False) -> None:
    """Check a plan: its form, its names, and that its parts build and fit together."""
    deep = importlib.util.find_spec("monai") is not None
    try:
        found = checked_plan(plan) if deep else load_plan(plan)
    except PlanError as error:
        if as_json:
            typer.echo(json.dumps({"ok": False, "problems": error.message.splitlines()}))
            raise typer.Exit(2) from error
        raise
    if as_json:
        typer.echo(json.dumps({"ok": True, "digest": found.digest, "built": deep}))
        return
    typer.echo(f"{plan.name} is a plan: {found.digest}")
    if not deep:
        typer.echo("its parts were not built: pip install 'locum[site]' to check them too")
    for line in notes(found):
        typer.echo(f"note: {line}")


def notes(plan: Plan) -> list[str]:
    """What a person should know about a plan that is allowed."""
    found = []
    if plan.protection.secure_aggregation == "off":
        found.append("updates are not encrypted against the aggregator (protection.secure_aggregation: off)")
    if plan.protection.differential_privacy is None:
        found.append("no differential privacy: what the model remembers of a patient is not bounded")
    if plan.protection.site_noise is not None:
        found += _without_noise(plan)
    if importlib.util.find_spec("torch") is not None:
        found += _local_tensors_note(plan) + _site_noise_note(plan)
    return found


def _without_noise(plan: Plan) -> list[str]:
    """What is summed beside updates that have site noise."""
    release = plan.release
    told = [
        *plan.released_metrics,
        *(["the training loss"] if release.training_loss else []),
        *(["the numbers of cases"] if release.case_counts else []),
    ]
    if not told:
        return []
    return [
        f"site noise is on updates only: the sums of {', '.join(told)} have none, and its epsilon does not cover them"
    ]


def _site_noise_note(plan: Plan) -> list[str]:
    """How large the noise is beside what it is added to."""
    from locum.common.build import coordinates, skeleton
    from locum.common.secagg import LEAST_SITES
    from locum.common.sums import site_noise

    sites, size = max(LEAST_SITES, plan.participation.quorum), coordinates(plan, skeleton(plan))
    calibration, noise = site_noise(plan, sites=sites, size=size), plan.protection.site_noise
    if calibration is None or noise is None:
        return []
    norm = calibration.deviation(sites) * math.sqrt(size)
    note = (
        f"site noise: in the mean of {sites} sites the noise has a norm of {norm:.3g}, and an update one of at most "
        f"{noise.clip:g}; more sites, a larger epsilon, fewer rounds or a smaller network make it less"
    )
    return [note]


def _local_tensors_note(plan: Plan) -> list[str]:
    from locum.common.build import skeleton, tensor_roles

    roles = tensor_roles(plan, skeleton(plan))
    local = [name for name, role in roles.items() if role == "local" and not name.endswith("num_batches_tracked")]
    if not local:
        return []
    note = (
        f"{len(local)} tensors stay at each site (first: {local[0]}), so the released model holds their initial "
        "values; choose a network without running statistics, or name them in tensors.shared"
    )
    return [note]


@app.command()
def show(plan: _PlanPath, as_json: _Json = False) -> None:
    """Show a plan with every default written out."""
    found = load_plan(plan)
    typer.echo(found.canonical().decode() if as_json else found.to_yaml(), nl=as_json)


@app.command()
def digest(plan: _PlanPath) -> None:
    """Print the digest that identifies a plan: SHA-256 of its canonical JSON (RFC 8785)."""
    typer.echo(load_plan(plan).digest)


@app.command()
def schema() -> None:
    """Print the JSON Schema of a plan, for editors."""
    described = Plan.model_json_schema()
    described["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    typer.echo(json.dumps(described, indent=2))
