"""`locum site check-model`: what a model tells of this site's own patients."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from locum.common.errors import MEANING, DataError, RunError, SiteFailure
from locum.site_client.identity import usable
from locum.site_client.options import Home, Json

if TYPE_CHECKING:
    from locum.common.plan import Plan
    from locum.common.tensor_files import Mapped
    from locum.site_client.check import Finding


def check_model(
    model: Annotated[Path, typer.Argument(metavar="MODEL", show_default=False, help="A model.safetensors.")],
    digest: Annotated[
        str, typer.Option("--plan", metavar="DIGEST", show_default=False, help="The plan it was trained by.")
    ],
    home: Home,
    as_json: Json = False,
) -> None:
    """Try to tell from a model which of this site's patients it was trained on; nothing leaves the site."""
    with usable(home):
        plan, finding = _checked(model, digest, home)
    if as_json:
        typer.echo(json.dumps({"plan": plan.digest, **finding.as_dict()}, indent=2))
    else:
        _show(plan, finding)
    if finding.failed:
        raise RunError(f"the privacy check FAILED: {finding.failed}", "train no plan here; tell the makers of Locum")


def _checked(model: Path, digest: str, home: Path) -> tuple[Plan, Finding]:
    from locum.site_client.approvals import open_approvals
    from locum.site_client.check import check
    from locum.site_client.configuration import FILE, read_configuration
    from locum.site_client.identity import load_identity

    configuration = read_configuration(home / FILE)
    approvals = open_approvals(home, configuration.policy)
    plan = approvals.held(approvals.find(digest)).plan
    settings = configuration.settings(load_identity(home).site, home / "run")
    try:
        return plan, check(settings, plan, _tensors(model))
    except SiteFailure as failure:
        what, remedy = MEANING[failure.code]
        raise RunError(f"the model cannot be checked: {what} ({failure.detail})", remedy) from failure


def _tensors(path: Path) -> Mapped:
    from locum.common.tensor_files import TensorFileError, map_tensors

    try:
        return map_tensors(path)
    except FileNotFoundError as error:
        raise DataError(f"there is no {path}", "give the model.safetensors of a run") from error
    except TensorFileError as error:
        raise DataError(f"{path} holds no model: {error}", "give the model.safetensors of a run") from error


def _show(plan: Plan, finding: Finding) -> None:
    from locum.site_client.check import limits_of, words_of
    from locum.site_client.privacy.attacks import FAILED

    for topic, text in words_of(plan, finding).items():
        typer.secho(f"{topic}: {text}.", fg=typer.colors.RED if text.startswith(FAILED) else None)
    typer.echo("\nWhat this shows, and what not:")
    for limit in limits_of(plan):
        typer.echo(f"* {limit}")
    typer.echo("Nothing of this has left the site, and nothing of the budget was spent.")
