"""`locum site deid`: clean a folder of DICOM, or show tag by tag what is done with one file and why."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from locum.common.errors import DataError
from locum.site_client.options import Json

if TYPE_CHECKING:
    from locum.site_client.imaging.deid.engine import Change, Deidentifier
    from locum.site_client.imaging.deid.folder import Tally
    from locum.site_client.imaging.keys import Keys
    from locum.site_client.imaging.sources import Deidentification

_Paths = Annotated[
    list[Path] | None, typer.Argument(metavar="[IN OUT]", show_default=False, help="A folder, and one for its copy.")
]
_Explain = Annotated[
    Path | None, typer.Option("--explain", metavar="FILE", help="Show what is done with each element of one file.")
]
_Site = Annotated[
    Path | None, typer.Option("--site", metavar="SITE.yaml", help="Take the options from this site file.")
]
_Options = Annotated[
    list[str] | None, typer.Option("--option", metavar="NAME", help="An option of the standard; may be repeated.")
]
_KeyFile = Annotated[Path | None, typer.Option("--key-file", help="The site's secret key; drawn if absent.")]


def deid(
    paths: _Paths = None,
    explain: _Explain = None,
    site: _Site = None,
    option: _Options = None,
    key_file: _KeyFile = None,
    as_json: Json = False,
) -> None:
    """Clean a folder of DICOM into another, or explain tag by tag what is done with one file."""
    if explain is not None and not paths:
        _explain(explain, _engine(_setting(site, option), _keys_to_look(key_file)), as_json=as_json)
    elif explain is None and paths and len(paths) == 2:
        source, target = paths
        _clean(source, target, _setting(site, option), key_file, as_json=as_json)
    else:
        raise typer.BadParameter("give two folders, IN and OUT, or --explain FILE")


def _setting(site: Path | None, options: list[str] | None) -> Deidentification:
    from pydantic import ValidationError

    from locum.site_client.configuration import read_data
    from locum.site_client.imaging.sources import Deidentification

    if options:
        try:
            return Deidentification.model_validate({"options": options})
        except ValidationError:
            known = ", ".join(sorted(_known_options()))
            raise DataError(f"no such option among {', '.join(options)}", f"there are: {known}") from None
    return read_data(site).deidentification if site is not None else Deidentification()


def _known_options() -> list[str]:
    from typing import get_args

    from locum.site_client.imaging.sources import DeidOption

    return list(get_args(DeidOption))


def _keys_to_look(key_file: Path | None) -> Keys:
    """To explain needs no key of the site: names differ, what is done does not."""
    from locum.site_client.imaging.keys import KeyRing, load_ring

    return load_ring(key_file).keys if key_file is not None else KeyRing.new().keys


def _engine(setting: Deidentification, keys: Keys) -> Deidentifier:
    from locum.site_client.imaging.deid.engine import Deidentifier

    return Deidentifier(setting, keys)


# --- one file


def _explain(path: Path, engine: Deidentifier, *, as_json: bool) -> None:
    from locum.site_client.imaging.dicom import read
    from locum.site_client.imaging.reasons import SENTENCE, RefusedError

    if not path.is_file():
        raise DataError(f"there is no file {path}", "check its path")
    try:
        changes, refused = engine.explained(read(path, path.stat().st_size))
    except RefusedError as error:
        raise DataError(f"{path.name}: {error}", SENTENCE[error.reason]) from None
    if as_json:
        told = {"profile": engine.profile, "refused": refused, "changes": [asdict(change) for change in changes]}
        typer.echo(json.dumps(told, indent=2, ensure_ascii=False))
        return
    _print_changes(changes, engine.profile, refused)


def _print_changes(changes: tuple[Change, ...], profile: str, refused: str) -> None:
    typer.echo(f"{profile}\nThis shows values of the original: keep it at the site.\n")
    for change in changes:
        why = f"{change.why} ({change.option})" if change.option else change.why
        typer.echo(f"{change.path} {change.name}: {why}\n    {change.before}  {_after(change)}")
    if refused:
        typer.echo(f"\nthe file would be refused: {refused}")


def _after(change: Change) -> str:
    if change.after is None:
        return "removed"
    return "stays" if change.after == change.before else f"-> {change.after or '(empty)'}"


# --- a folder


def _clean(source: Path, target: Path, setting: Deidentification, key_file: Path | None, *, as_json: bool) -> None:
    from locum.site_client.imaging.deid.folder import clean_folder
    from locum.site_client.imaging.keys import load_or_create_keys

    if key_file is None:
        raise DataError("no key file is named", "add --key-file FILE: that of the store, or a new one to keep")
    keys = load_or_create_keys(key_file)
    engine = _engine(setting, keys)
    with _bar(visible=not as_json) as tell:
        tally = clean_folder(source, target, engine, keys, tell)
    if as_json:
        typer.echo(json.dumps(_as_dict(tally, engine.profile), indent=2))
        return
    console = Console()
    console.print(_table(tally, engine.profile))
    for path, reason, detail in tally.refused:
        console.print(f"{path}: {reason}{f' ({detail})' if detail else ''}", soft_wrap=True, markup=False)


def _as_dict(tally: Tally, profile: str) -> dict[str, object]:
    refused = [{"path": path, "reason": str(reason), "detail": detail} for path, reason, detail in tally.refused]
    return {"profile": profile, "found": tally.found, "written": tally.written, "skipped": tally.skipped,
            "refused": refused}  # fmt: skip


def _table(tally: Tally, profile: str) -> Table:
    from locum.site_client.imaging.reasons import SENTENCE

    table = Table("", "files", "meaning", title=profile)
    table.add_row("found", str(tally.found), "")
    table.add_row("written", str(tally.written), "")
    table.add_row("skipped", str(tally.skipped), "They are there already." if tally.skipped else "")
    for reason, number in sorted(Counter(reason for _, reason, _ in tally.refused).items()):
        table.add_row(reason, str(number), SENTENCE[reason], style="yellow")
    return table


@contextmanager
def _bar(*, visible: bool) -> Iterator[Callable[[int], None]]:
    columns = (TextColumn("{task.description} {task.completed} files"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not visible) as bars:
        task = bars.add_task("cleaning", total=None)
        yield lambda done: bars.update(task, completed=done)
