"""`locum audit`: a run's bundle made, checked, read and compared. Only `bundle` needs a coordinator's folder.

Exit codes: 0 it holds, 1 it does not, 2 what was given is no bundle or no log.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from locum.common.errors import DataError, LocumError
from locum.server.home import default_home

if TYPE_CHECKING:
    from locum.common.audit.story import Story

app = typer.Typer(
    help="A run's record: bundle it, verify it without a network, read it, compare it with a site's own log.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
)

_Bundle = Annotated[Path, typer.Argument(metavar="BUNDLE", show_default=False, help="What `locum audit bundle` wrote.")]
_Json = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]
_Authority = Annotated[
    Path | None, typer.Option("--authority", metavar="FILE", help="The federation's ca.pem, which you trust.")
]
_Fingerprint = Annotated[
    str | None, typer.Option("--fingerprint", metavar="HEX", help="Its SHA-256 instead, as the coordinator told you.")
]
_Witnesses = Annotated[
    int | None,
    typer.Option("--witnesses", min=0, show_default="more than half of the run's sites", help="Sites that must vouch."),
]
_FINGERPRINT = re.compile(r"[0-9a-f]{64}")


@app.command()
def bundle(
    run: Annotated[
        str | None, typer.Argument(metavar="[RUN]", show_default=False, help="A run's name, or its beginning or end.")
    ] = None,
    home: Annotated[
        Path | None,
        typer.Option(
            "--home", metavar="DIR", show_default="$LOCUM_SERVER_HOME or ./locum-server", help="The coordinator's."
        ),
    ] = None,
    run_dir: Annotated[
        Path | None,
        typer.Option("--run-dir", metavar="DIR", help="The folder of a simulation, instead of a coordinator's."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", show_default="RUN.audit.zip", help="Where the bundle goes.")
    ] = None,
    without_model: Annotated[bool, typer.Option("--without-model", help="Leave the model's file out.")] = False,
    as_json: _Json = False,
) -> None:
    """Put into one file all that a reviewer needs to check a run."""
    from locum.common.audit.tell import failure_lines
    from locum.common.audit.verify import verify as check
    from locum.server.bundle import make_bundle, source_of

    source = source_of(run, home or default_home(), run_dir)
    path = out or Path(f"{source.name}.audit.zip")
    made = make_bundle(source, path, with_model=not without_model)
    verdict = check(path, authority=source.fingerprint)
    if as_json:
        told = {"bundle": str(path), "holds": verdict.holds, "authority": source.fingerprint}
        _tell({**told, **made.model_dump(mode="json")})
        return
    size = path.stat().st_size
    typer.echo(f"{path} holds the record of {made.run}: {len(made.members) + 1} members, {size:,} bytes")
    if verdict.first is not None:
        typer.echo("\n".join(("note: a reviewer will find that", *failure_lines(verdict.first))))
    typer.echo(f"authority: {source.fingerprint}    tell it to the reviewer in another way than the file goes")
    typer.echo(f"next: locum audit verify {path}")


@app.command()
def verify(
    bundle: _Bundle,
    authority: _Authority = None,
    fingerprint: _Fingerprint = None,
    witnesses: _Witnesses = None,
    as_json: _Json = False,
) -> None:
    """Check a bundle, without a network: who signed, that nothing was changed, and that the plan was kept."""
    from locum.common.audit.tell import verdict_fields, verdict_lines
    from locum.common.audit.verify import verify as check

    verdict = check(bundle, authority=_pinned(authority, fingerprint), witnesses=witnesses)
    if as_json:
        _tell(verdict_fields(verdict))
    else:
        typer.echo("\n".join(verdict_lines(verdict)))
    if not verdict.holds:
        raise typer.Exit(1)


@app.command()
def show(  # noqa: PLR0913, PLR0917 - one an option
    bundle: _Bundle,
    part: Annotated[
        str | None,
        typer.Argument(
            metavar="[PART]",
            show_default=False,
            help="course, plan, approvals, sites, rounds, refusals, privacy or metrics; all but the plan if left out.",
        ),
    ] = None,
    site: Annotated[str | None, typer.Option("--site", metavar="NAME", help="Of this site alone.")] = None,
    of_round: Annotated[int | None, typer.Option("--round", metavar="N", help="Of this round alone.")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE.html", help="All of it as a page to print.")
    ] = None,
    authority: _Authority = None,
    fingerprint: _Fingerprint = None,
    witnesses: _Witnesses = None,
    as_json: _Json = False,
) -> None:
    """Read a bundle: who took part, what was agreed, every round, what was spent. It is checked first."""
    from locum.common.audit.story import story_of

    parts = _parts(part)
    story = story_of(bundle, authority=_pinned(authority, fingerprint), witnesses=witnesses)
    if out is not None:
        _write_page(story, out)
    elif as_json:
        from locum.common.audit.tell import story_fields

        _tell(story_fields(story))
    else:
        _print(story, parts, site, of_round)
    if not story.told.holds:
        raise typer.Exit(1)


def _parts(part: str | None) -> list[str]:
    from locum.common.audit.tell import PARTS

    if part is None:
        return [name for name in PARTS if name != "plan"]
    if part not in PARTS:
        raise DataError(f"a bundle has no part '{part}'", f"ask for one of {', '.join(PARTS)}")
    return [part]


def _print(story: Story, parts: list[str], site: str | None, of_round: int | None) -> None:
    from locum.common.audit.tell import PARTS, failure_lines

    first = story.told.first
    lines = [f"{story.told.run}: all checks hold"] if first is None else list(failure_lines(first))
    for part in parts:
        lines += ["", *([f"-- {part}"] if len(parts) > 1 else []), *PARTS[part](story, site, of_round)]
    typer.echo("\n".join(lines))


def _write_page(story: Story, out: Path) -> None:
    from locum.common.durable import replace_file

    try:
        from locum.server.audit_page import page
    except ModuleNotFoundError as error:
        raise LocumError(f"a page needs the package {error.name}", "pip install 'locum[server]'") from error
    try:
        replace_file(out, page(story))
    except OSError as error:
        raise DataError(f"{out} cannot be written: {error.strerror}", "choose another --out") from error
    typer.echo(f"next: open {out}")


@app.command()
def diff(
    bundle: _Bundle,
    log: Annotated[
        Path,
        typer.Argument(metavar="LOG", show_default=False, help="A site's own log: its folder, or its entries.jsonl."),
    ],
    as_json: _Json = False,
) -> None:
    """Compare what the coordinator says it got from a site with what that site says it let go."""
    from locum.common.audit.diff import compare

    found = compare(bundle, log)
    if as_json:
        _tell(
            {"site": found.site, "compared": found.compared, "differences": [vars(each) for each in found.differences]}
        )
    else:
        typer.echo("\n".join(found.lines()))
    if found.differences:
        raise typer.Exit(1)


@app.command("verify-model")
def verify_model(
    model: Annotated[Path, typer.Argument(metavar="MODEL", show_default=False, help="A model.safetensors.")],
    statement: Annotated[
        Path, typer.Argument(metavar="STATEMENT", show_default=False, help="The statement.json that came with it.")
    ],
    authority: _Authority = None,
    fingerprint: _Fingerprint = None,
    as_json: _Json = False,
) -> None:
    """Check that a model's file is the one that a federation signed for, and say what it signed."""
    from locum.common.audit.claims import claim_lines, claimed

    said = claimed(model, statement, _pinned(authority, fingerprint))
    if as_json:
        _tell(said.model_dump(mode="json", by_alias=True))
        return
    typer.echo("\n".join(claim_lines(said, pinned=authority is not None or fingerprint is not None)))


# --- helpers


def _pinned(authority: Path | None, fingerprint: str | None) -> str | None:
    """The SHA-256 of the authority that is trusted; None if none was given."""
    if authority is not None:
        from locum.common.identity import fingerprint_of, load_certificate

        return fingerprint_of(load_certificate(authority))
    if fingerprint is None:
        return None
    plain = fingerprint.replace(":", "").lower()
    if not _FINGERPRINT.fullmatch(plain):
        raise DataError(
            f"'{fingerprint}' is no fingerprint", "give the 64 hexadecimal digits of the authority's SHA-256"
        )
    return plain


def _tell(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2))
