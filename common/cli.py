"""The command `locum`, put together from the entry points `locum.commands`; each group is loaded only when called.

Errors with a remedy are printed as two lines and no traceback (`--debug` shows it). Exit codes: 0 done, 1 failed,
2 wrong usage or plan, 130 interrupted.
"""

from __future__ import annotations

import logging
import os
import sys
from importlib.metadata import EntryPoint, entry_points, version
from typing import Any

import click
import typer.main

from locum.common.errors import DataError, LocumError, PlanError

#: One line for each of our own groups, so that `locum --help` loads none of them.
_HELP = {
    "plan": "Check, show and identify a plan.",
    "simulate": "Run a plan over several hospitals on this machine.",
    "site": "At a hospital: join a federation, ingest images, look at the catalog.",
    "server": "The coordinator: begin a federation, invite, list and revoke sites.",
    "propose": "Put a plan before the sites.",
    "run": "Run a plan that sites have approved.",
    "watch": "Follow a run: each site's state, progress and losses.",
    "stop": "End a run; what was committed stays.",
    "resume": "Go on with a run that was paused or stopped.",
    "pull": "Fetch a run's model, metrics and report.",
    "cohort": "Ask the sites how many of their patients fit a description.",
    "readiness": "Show which sites' data meet a plan's contract, and where they do not.",
    "audit": "A run's record: bundle it, verify it offline, read it, compare it.",
}
_SERVER = ("audit", "cohort", "readiness", "server", "propose", "run", "watch", "stop", "resume", "pull")
_EXTRA = {"simulate": "site,server", "site": "site", **dict.fromkeys(_SERVER, "server")}


class _Groups(click.Group):
    """A click group whose commands are entry points."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        del ctx
        return sorted(entry_points(group="locum.commands").names)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        del ctx
        found = entry_points(group="locum.commands", name=cmd_name)
        if not found:
            return None
        return _load(next(iter(found)))

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, _HELP.get(name, "")) for name in self.list_commands(ctx)])


def _load(entry: EntryPoint) -> click.Command:
    try:
        return typer.main.get_command(entry.load())
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.startswith("locum"):
            raise
        extra = _EXTRA.get(entry.name, entry.name)
        raise LocumError(
            f"`locum {entry.name}` needs the package {error.name}", f"pip install 'locum[{extra}]'"
        ) from error


@click.group(cls=_Groups, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(version("locum"), prog_name="locum")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def locum(*, debug: bool) -> None:
    """Federated learning for medical images: the model travels, the images stay."""
    del debug


def main(arguments: list[str] | None = None) -> Any:
    """The console script; returns the exit code."""
    words = sys.argv[1:] if arguments is None else arguments
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    logging.raiseExceptions = False  # a log on a full disk is no reason to print tracebacks
    try:
        return locum(words, standalone_mode=False)
    except (click.exceptions.Abort, KeyboardInterrupt):
        click.echo("stopped", err=True)
        return 130
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except click.exceptions.Exit as error:
        return error.exit_code
    except LocumError as error:
        if "--debug" in words:
            raise
        return report(error)


def report(error: LocumError) -> int:
    """Prints what went wrong and what to do; returns the exit code."""
    click.echo(f"error: {error.message}", err=True)
    click.echo(f" next: {error.remedy}", err=True)
    return 2 if isinstance(error, PlanError | DataError) else 1
