"""`locum site`: what a hospital does with its own images, and what it lets others do.

Errors with a remedy are printed by the `locum` command; nothing here catches them.
"""

from __future__ import annotations

import getpass
import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from locum.common.errors import DataError, RunError
from locum.site_client.check_cli import check_model
from locum.site_client.deid_cli import deid
from locum.site_client.desk_cli import desk
from locum.site_client.doctor_cli import doctor
from locum.site_client.enrol_cli import enrol
from locum.site_client.identity import usable
from locum.site_client.imaging.labels.agreement_cli import agreement
from locum.site_client.imaging.labels.labels_cli import labels
from locum.site_client.imaging.retrieve.pacs_cli import pacs
from locum.site_client.key_cli import key_app
from locum.site_client.ledger_cli import ledger
from locum.site_client.options import Home, Json
from locum.site_client.quarantine_cli import app as quarantine_app
from locum.site_client.questions_cli import questions
from locum.site_client.readiness_cli import readiness
from locum.site_client.released_cli import released
from locum.site_client.start_cli import start

if TYPE_CHECKING:
    from locum.site_client.approvals import Approvals
    from locum.site_client.imaging import ingest as imaging
    from locum.site_client.imaging.catalog import Catalog, Counts
    from locum.site_client.review import Review

app = typer.Typer(
    help="At a hospital: join, ingest images, review and approve plans, run the agent.",
    no_args_is_help=True,
    add_completion=False,
)
app.command()(enrol)
app.command()(start)
app.command()(doctor)
app.command()(ledger)
app.command()(released)
app.command()(questions)
app.command()(readiness)
app.command()(check_model)
app.command()(desk)
app.command()(deid)
app.command()(agreement)
app.command()(labels)
app.command()(pacs)
app.add_typer(key_app, name="key")
app.add_typer(quarantine_app, name="quarantine")

_SITE_HELP = "A site.yaml: where the images and labels are."
_SiteFile = Annotated[Path, typer.Argument(metavar="SITE.yaml", show_default=False, help=_SITE_HELP)]
_Store = Annotated[Path, typer.Option("--store", metavar="DIR", help="The folder of volumes and catalog.")]
_KeyFile = Annotated[
    Path | None,
    typer.Option("--key-file", help="The site's secret key; drawn and kept in the store as split.key if absent."),
]
_Digest = Annotated[
    str, typer.Argument(metavar="DIGEST", show_default=False, help="The plan's digest, or at least 6 first digits.")
]
_Steward = Annotated[
    str | None, typer.Option("--steward", metavar="NAME", help="Who decides; the login name unless given.")
]

#: The split that `catalog` shows; a plan states its own.
_SPLIT = (0.8, 0.1, 0.1)


@app.command()
def ingest(site: _SiteFile, store: _Store, key_file: _KeyFile = None, as_json: Json = False) -> None:
    """Bring the store up to date: read, check, convert and catalogue the site's images."""
    # The imaging libraries take most of a second to load: not for `--help`.
    from locum.site_client.configuration import read_data
    from locum.site_client.imaging.ingest import ingest as run
    from locum.site_client.imaging.keys import load_or_create_keys

    data = read_data(site)
    keys = load_or_create_keys(key_file or store / "split.key")
    with _bars(visible=not as_json) as tell:
        counts = run(data, store, keys=keys, progress=tell)
    if counts.found == 0:
        raise DataError(f"no file was found in the sources of {site}", "check the paths in the site file")
    _print_ingest(counts, store, as_json=as_json)


@app.command()
def catalog(
    store: _Store,
    as_json: Json = False,
    quarantine: Annotated[bool, typer.Option("--quarantine", help="List every item in quarantine, and why.")] = False,
) -> None:
    """Show what the store holds: counts, folds, labels, and makes of scanners."""
    from locum.site_client.imaging.catalog import Catalog

    with closing(Catalog.open(store)) as opened:
        summary = _summary(opened)
        counts = opened.counts()
        held = opened.quarantine() if quarantine else ()
    if as_json:
        listed = {"quarantine": [list(item) for item in held]} if quarantine else {}
        typer.echo(json.dumps(counts.as_dict() | summary | listed, indent=2))
        return
    console = Console()
    console.print(_counts_table(counts))
    for title, rows in summary.items():
        console.print(_two_columns(title, rows))
    for name, reason, detail in held:
        console.print(f"{name}: {reason}{f' ({detail})' if detail else ''}", soft_wrap=True, markup=False)


# --- plans


@app.command()
def review(
    home: Home,
    digest: Annotated[
        str | None, typer.Argument(metavar="[DIGEST]", show_default=False, help="A plan; without it, all are listed.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show what was proposed; for one plan, in words, what it would do here."""
    from locum.site_client.status import proposal_as_dict

    with _approvals(home) as approvals:
        if digest is not None:
            found = _reviewed(approvals, approvals.find(digest))
            typer.echo(json.dumps(found.as_dict(), indent=2) if as_json else found.text())
            return
        listed = [proposal_as_dict(approvals, held) for held in approvals.proposals()]
    if as_json:
        typer.echo(json.dumps({"proposals": listed}, indent=2))
        return
    _print_proposals(listed)
    if listed:
        typer.echo("next: locum site review DIGEST")


@app.command()
def approve(
    digest: _Digest,
    home: Home,
    steward: _Steward = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    as_json: Json = False,
) -> None:
    """Let a plan run here: show it, ask, and sign its digest with the site's key."""
    if as_json and not yes:
        raise typer.BadParameter("--json asks no question: add --yes")
    with _approvals(home) as approvals:
        whole, name = approvals.find(digest), _steward_name(steward)
        if not yes:
            typer.echo(_reviewed(approvals, whole).text() + "\n")
            typer.confirm(f"{name}, shall this plan run here?", abort=True)
        standing = approvals.approve(whole, name)
        _tell_clock(home)
    if as_json:
        typer.echo(json.dumps({"digest": whole, **standing.as_dict()}, indent=2))
        return
    typer.echo(f"plan {whole[:12]}: {standing.in_words()}")
    if not standing.stands:
        typer.echo(f"next: another steward: locum site approve {whole[:12]} --steward NAME")


@app.command()
def revoke(digest: _Digest, home: Home, steward: _Steward = None, as_json: Json = False) -> None:
    """Take an approval back: the agent refuses the plan from its next message on."""
    from locum.site_client.approvals import open_approvals
    from locum.site_client.gate import Policy

    with usable(home):
        approvals = open_approvals(home, Policy())  # to take back needs no policy: a broken site.yaml must not stop it
        whole = approvals.find(digest)
        standing = approvals.revoke(whole, _steward_name(steward))
    told = json.dumps({"digest": whole, **standing.as_dict()}, indent=2)
    typer.echo(told if as_json else f"plan {whole[:12]}: {standing.in_words()}")


@app.command()
def status(home: Home, as_json: Json = False) -> None:
    """Show who this site is, what was proposed and approved, and whether the agent runs."""
    from locum.site_client.status import status as look

    with usable(home):
        found = look(home)
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    until = "valid until" if found["certificate_valid"] else "EXPIRED at"
    typer.echo(f"site {found['site']} of {found['federation']} at {found['address']}")
    typer.echo(f"certificate {until} {found['certificate_ends'][:16].replace('T', ' ')} UTC")
    typer.echo(f"the agent {found['agent']['state']}")
    _print_log(found["log"])
    if found["configuration"] != "ok":
        typer.echo(f"site.yaml: {found['configuration']}")
    for path in found["damaged"]:
        typer.echo(f"does not count, for it was not written by this site or its federation: {path}")
    _print_proposals(found["proposals"])


def _print_log(log: dict[str, Any]) -> None:
    from locum.site_client.review import printable

    if log["problem"]:
        typer.echo(printable(log["problem"]))
    if log["witnessed"]:
        typer.echo(f"witnessed {log['witnessed']} entries of the federation's log, at {log['at']}")
    for path in log["refused"]:
        typer.echo(f"evidence of a log that was not what it was: {path}")


@contextmanager
def _approvals(home: Path) -> Iterator[Approvals]:
    from locum.site_client.approvals import open_approvals
    from locum.site_client.configuration import FILE, read_policy
    from locum.site_client.identity import load_identity

    with usable(home):
        load_identity(home)  # who is not enrolled should hear that first
        yield open_approvals(home, read_policy(home / FILE))


def _reviewed(approvals: Approvals, digest: str) -> Review:
    """A review with what the ledger would say."""
    from locum.site_client.privacy.projection import in_review

    found = approvals.review(digest)
    return replace(found, ledger=in_review(approvals.home, found.held.plan))


def _tell_clock(home: Path) -> None:
    """Says on standard error that an approval has a wrong date, if the agent knows that."""
    from locum.site_client.status import CLOCK_WARNING, doing

    off = doing(home).clock_off
    if abs(off) > CLOCK_WARNING:
        way = "ahead of" if off > 0 else "behind"
        typer.echo(f"this machine's clock is {abs(off):.0f} s {way} the coordinator's, and dates approvals", err=True)
        typer.echo("next: set it", err=True)


def _steward_name(given: str | None) -> str:
    if given is not None:
        return given
    try:
        return getpass.getuser()
    except (KeyError, OSError) as error:
        raise RunError("this account has no name to sign with", "give yours: --steward NAME") from error


def _print_proposals(listed: list[dict[str, Any]]) -> None:
    from locum.site_client.review import day_and_time, printable

    if not listed:
        typer.echo("nothing is proposed")
    for one in listed:
        forbidden = (
            f"; forbidden by this site's policy: {', '.join(one['forbidden_by'])}" if one["forbidden_by"] else ""
        )
        proposed = f"by {printable(one['proposed_by'])}, {day_and_time(one['proposed_at'])}"
        typer.echo(f"{one['digest'][:12]}  {one['name']}  {proposed}: {one['state']}{forbidden}")


# --- images


@contextmanager
def _bars(*, visible: bool) -> Iterator[Callable[[imaging.Progress], None]]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not visible) as bars:
        tasks = {
            stage: bars.add_task(stage, total=None, visible=False) for stage in ("retrieving", "reading", "storing")
        }

        def tell(progress: imaging.Progress) -> None:
            bars.update(tasks[progress.stage], completed=progress.done, total=progress.total, visible=True)

        yield tell


def _print_ingest(counts: Counts, store: Path, *, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(counts.as_dict(), indent=2))
        return
    console = Console()
    console.print(_counts_table(counts))
    if counts.labels_without_image:
        console.print(f"{counts.labels_without_image} lines of the tables name no image of this site")
    console.print(f"next: locum site catalog --store {store}", soft_wrap=True)


def _counts_table(counts: Counts) -> Table:
    from locum.site_client.imaging.reasons import SENTENCE, Reason

    table = Table("", "files", "meaning", title=f"{counts.cases} cases")
    table.add_row("found", str(counts.found), "")
    table.add_row("stored", str(counts.stored), "")
    if counts.annotations:
        table.add_row(
            "annotations", str(counts.annotations), "Objects that say something of images: SEG, SR, RTSTRUCT."
        )
    for reason, number in counts.quarantined.items():
        table.add_row(reason, str(number), SENTENCE[Reason(reason)], style="yellow")
    return table


def _summary(opened: Catalog) -> dict[str, dict[str, int]]:
    cases, facts = opened.cases(_SPLIT), opened.facts()
    return {
        "folds": _sorted(Counter(case.fold for case in cases)),
        "patients": _sorted(Counter({case.patient: case.fold for case in cases}.values())),
        "labels": _sorted(Counter(case.label or "none" for case in cases)),
        "scanners": _sorted(Counter(fact.scanner for fact in facts)),
    }


def _sorted(counter: Counter[Any]) -> dict[str, int]:
    return {str(name): counter[name] for name in sorted(counter)}


def _two_columns(title: str, rows: dict[str, int]) -> Table:
    table = Table(title, "number")
    for name, number in rows.items():
        table.add_row(name or "unknown", str(number))
    return table
