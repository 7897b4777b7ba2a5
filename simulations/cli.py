"""`locum simulate`: a plan over several hospitals on this machine."""

from __future__ import annotations

import json
import sys
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from locum.common.errors import PlanError, RunError
from locum.common.plan import Plan, changed, load_plan
from locum.site_client.privacy.attacks import FAILED
from locum.site_client.worker import process_context

if TYPE_CHECKING:
    from locum.simulations.sites import Site

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command()
def simulate(
    plan: Annotated[Path | None, typer.Argument(help="A plan.yaml; the demo's plan if left out.")] = None,
    sites: Annotated[int | None, typer.Option(help="How many emulated hospitals.", min=1, max=200)] = None,
    sites_file: Annotated[Path | None, typer.Option(help="Which hospitals, real or emulated.")] = None,
    data: Annotated[Path | None, typer.Option(help="Where the data of a sites file lies, instead of its root.")] = None,
    engine: Annotated[str, typer.Option(help="How to run it: local, or rehearse.")] = "local",
    seed: Annotated[int | None, typer.Option(help="Instead of the plan's seed.", min=0)] = None,
    baselines: Annotated[bool, typer.Option("--baselines", help="Also train each site alone, and pooled.")] = False,
    privacy_check: Annotated[
        bool, typer.Option("--privacy-check", help="Also try to tell from the model whom it was trained on.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="The run's folder; runs/NAME if left out.")] = None,
    resume: Annotated[Path | None, typer.Option(help="Go on with the run in this folder.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the run that --out holds.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print metrics.json at the end, and nothing else.")] = False,
) -> None:
    """Run a plan over several hospitals on this machine, with the code that hospitals run.

    Without PLAN: four emulated hospitals with CT lesions. The result lies in the run's folder; open report.html.
    """
    process_context()  # first of all: it loads torch meanwhile
    _check_engine(engine)
    from locum.simulations.simulate import Simulation, check_sites, open_folder
    from locum.simulations.simulate import simulate as run

    console = Console(stderr=as_json, quiet=as_json)
    if resume is not None:
        folder, chosen, asked = (
            resume,
            *_asked_again(resume, given=[plan, sites, sites_file, data, seed, out, force or None]),
        )
    else:
        chosen = _plan(plan, seed)
        folder = out or Path("runs") / chosen.name
        asked = {"engine": engine, "privacy_check": privacy_check, **_asked(sites, sites_file, data, baselines)}
    hospitals = _hospitals(asked, chosen)
    check_sites(chosen, len(hospitals))
    if resume is None:
        open_folder(folder, chosen, asked, force=force)
    wanted = Simulation(
        chosen,
        hospitals,
        folder,
        baselines=bool(asked["baselines"]) or baselines,
        privacy_check=bool(asked.get("privacy_check")) or privacy_check,
        engine=asked["engine"],
    )
    try:
        metrics = run(wanted, console)
    except KeyboardInterrupt:
        console.print(f"stopped; committed rounds are kept: go on with `locum simulate --resume {folder}`")
        raise typer.Exit(130) from None
    except OSError as error:
        reason = f"{folder} cannot be written: {error.strerror}; committed rounds are kept"
        raise RunError(reason, f"free space or mend the disk, then `locum simulate --resume {folder}`") from error
    if as_json:
        sys.stdout.write(json.dumps(metrics, indent=1) + "\n")
    else:
        _show(metrics, folder, console)
    _check_privacy(metrics)


def _check_privacy(metrics: dict[str, Any]) -> None:
    """Raises RunError if canaries proved a fault."""
    failed = metrics.get("privacy_check", {}).get("failed", {})
    if failed:
        told = "".join(f"\n  {site}: {reason}" for site, reason in failed.items())
        remedy = "train no plan with differential privacy with this version, and tell its makers"
        raise RunError(f"the privacy check FAILED{told}", remedy)


def _check_engine(engine: str) -> None:
    from locum.simulations.simulate import ENGINES

    if engine not in ENGINES:
        raise PlanError(f"there is no engine '{engine}'", f"use --engine {' or --engine '.join(ENGINES)}")


def _plan(path: Path | None, seed: int | None) -> Plan:
    from locum.common.plan_cli import checked_plan

    plan = checked_plan(path) if path is not None else load_plan(shipped("plans"))
    return plan if seed is None else changed(plan, seed=seed)


def shipped(kind: Literal["plans", "sites"]) -> Path:
    """The demo's plan or sites file."""
    return Path(str(files("locum.configs") / kind / "demo.yaml"))


def _asked(sites: int | None, sites_file: Path | None, data: Path | None, baselines: bool) -> dict[str, Any]:
    return {
        "sites": sites,
        "sites_file": str(sites_file.absolute()) if sites_file else None,
        "data": str(data.absolute()) if data else None,
        "baselines": baselines,
    }


def _asked_again(folder: Path, *, given: list[object]) -> tuple[Plan, dict[str, Any]]:
    from locum.simulations.simulate import asked_of

    if any(item is not None for item in given):
        raise RunError("--resume goes on with what the run was asked for", "leave the other options out")
    asked = asked_of(folder)
    return load_plan(folder / "plan.yaml"), asked


def _hospitals(asked: dict[str, Any], plan: Plan) -> tuple[Site, ...]:
    from locum.simulations.sites import read_sites

    path = Path(asked["sites_file"]) if asked["sites_file"] else shipped("sites")
    root = Path(asked["data"]) if asked["data"] else None
    return read_sites(path, seed=plan.seed, count=asked["sites"], root=root)


def _show(metrics: dict[str, Any], folder: Path, console: Console) -> None:
    test = metrics["test"]
    scalars = [name for name, value in test["federated"]["all"].items() if not isinstance(value, list)]
    table = Table("test on all sites' patients", *scalars)
    rows = {"federated": test["federated"]["all"]}
    if "pooled" in test:
        rows["pooled data"] = test["pooled"]["all"]
        rows |= {f"{site} alone": values for site, values in test["local"]["per_site"].items()}
    for name, values in rows.items():
        table.add_row(name, *["–" if values[metric] is None else f"{values[metric]:.3f}" for metric in scalars])
    console.print(table)
    for topic, text in metrics.get("privacy_check", {}).get("words", {}).items():
        console.print(Text(f"{topic}: {text}", "bold red" if text.startswith(FAILED) else ""), soft_wrap=True)
    console.print(f"{metrics['rounds']} rounds, {metrics['seconds_total']:.0f} s; open {folder / 'report.html'}")
