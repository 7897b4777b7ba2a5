"""The desk's pages: what is in quarantine and in the store, in pictures, for the site's own staff.

Rules:
  * Every value is escaped by the template. An error with a remedy becomes a page; it shows both.
  * Nothing is changed but by :func:`locum.site_client.imaging.quarantine.decide`, which is one transaction: whatever
    happens to the desk, a decision is recorded whole or not at all.
"""

from __future__ import annotations

import base64
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlencode

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, HTMLResponse, PlainTextResponse, RedirectResponse, Response
from jinja2 import Environment, FunctionLoader, StrictUndefined

from locum.common.errors import DataError, LocumError
from locum.site_client.desk import shelf
from locum.site_client.desk.door import REPORT_POLICY, Pass, fields_of
from locum.site_client.desk.pictures import SMALL, Picture, Solid, Studio, Wanted
from locum.site_client.imaging import quarantine
from locum.site_client.imaging.items import Item
from locum.site_client.imaging.quarantine import Crop, Wish
from locum.site_client.imaging.reasons import SENTENCE, Reason

_PACKAGE = "locum.site_client.desk"
#: The files that a page may load, and nothing else of the package.
_STATIC = {
    "desk.css": "text/css; charset=utf-8",
    "crop.js": "text/javascript; charset=utf-8",
    "viewer.js": "text/javascript; charset=utf-8",
    "niivue.umd.js": "text/javascript; charset=utf-8",
    "niivue.licences.txt": "text/plain; charset=utf-8",
}


#: Nobody needs to look at images of a patient who has withdrawn.
_WITHDRAWN = Picture(problem="The patient has withdrawn: the image is not shown.")


@dataclass(frozen=True)
class Desk:
    """What the pages are of.

    Attributes:
        store: the folder of volumes and catalog.
        site_file: the site file by which the store is brought up to date, as a command names it.
        person: the name that forms begin with; whoever decides can write another.
        keys: the secrets of this run.
        studio: makes pictures.
        names: handle to unit, of those that pages have shown: to find one among all takes half a second for 100,000.
    """

    store: Path
    site_file: str
    person: str
    keys: Pass
    studio: Studio
    names: dict[str, str] = field(default_factory=dict)

    def unit(self, opened: shelf.Shelf, handle: str) -> str:
        """The key of the unit with a handle; raises DataError if there is none (any more)."""
        return quarantine.unit_of(opened.connection, self.names.get(handle, handle))


def pages(desk: Desk) -> FastAPI:
    """The pages as an application, for the inner side of the door."""
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    _errors(app, desk)
    for add in (_overview, _quarantine, _one_held, _decide, _cases, _files, _readiness, _static):
        add(app, desk)
    return app


def _errors(app: FastAPI, desk: Desk) -> None:
    @app.exception_handler(LocumError)
    def told(_request: Request, error: LocumError) -> Response:
        return _page(desk, "message", status=409, title="This did not work", message=error.message, remedy=error.remedy)

    @app.exception_handler(sqlite3.Error)
    def busy(_request: Request, error: sqlite3.Error) -> Response:
        told = {
            "message": f"the catalog cannot be read: {error}",
            "remedy": "try again; an ingest may be writing to it",
        }
        return _page(desk, "message", status=503, title="This did not work", **told)

    @app.exception_handler(404)
    def absent(_request: Request, _error: Exception) -> Response:
        return _page(desk, "message", status=404, title="There is no such page", message="", remedy="")


def _overview(app: FastAPI, desk: Desk) -> None:
    @app.get("/")
    def overview() -> Response:
        with shelf.opened(desk.store) as opened:
            whole = opened.complete
            return _page(
                desk,
                "overview",
                site=opened.site,
                counts=opened.catalog.counts() if whole else None,
                waiting=quarantine.number_waiting(opened.connection),
            )


def _quarantine(app: FastAPI, desk: Desk) -> None:
    @app.get("/quarantine")
    def listed(reason: str = "", first: int = 0) -> Response:
        with shelf.opened(desk.store) as opened:
            chosen = reason if reason in set(Reason) else None
            number = quarantine.number_held(opened.connection, chosen)
            found = quarantine.held(opened.connection, reason=chosen, first=_place(first), most=shelf.PAGE)
            reasons = quarantine.reasons_held(opened.connection)
        desk.names.update({one.handle: one.unit for one in found})
        return _page(
            desk,
            "quarantine",
            held=found,
            reasons=reasons,
            chosen=chosen or "",
            paging=_Paging("/quarantine", {"reason": chosen or ""}, _place(first), number),
        )


def _one_held(app: FastAPI, desk: Desk) -> None:
    @app.get("/quarantine/{handle}")
    def one(handle: str, number: int = 0) -> Response:
        with shelf.opened(desk.store) as opened:
            unit = desk.unit(opened, handle)
            items = quarantine.items_of(opened.connection, unit)
            held = quarantine.held_of(opened.connection, unit)
            decision = quarantine.decision_on(opened.connection, unit)
            case = quarantine.case_of(opened.connection, unit)
        place = min(max(number, 0), len(items) - 1)
        picture = _WITHDRAWN if _is_withdrawn(held) else _picture(desk, items[place])
        return _page(
            desk,
            "held",
            handle=handle,
            held=held,
            case=case,
            items=items,
            place=place,
            picture=picture,
            source=_inline(picture.content),
            decision=decision,
            seen=quarantine.stamp(items),
            can=any(entry.releasable for entry in held),
            in_unit=any(entry.in_unit for entry in held),
        )

    @app.get("/pictures/{handle}")
    def small(handle: str) -> Response:
        with shelf.opened(desk.store) as opened:
            unit = desk.unit(opened, handle)
            items = quarantine.items_of(opened.connection, unit)
            held = quarantine.held_of(opened.connection, unit)
        if _is_withdrawn(held):
            return _image(_WITHDRAWN)
        return _image(_picture(desk, items[len(items) // 2], side=SMALL))

    @app.get("/quarantine/{handle}/viewer")
    def viewer(handle: str) -> Response:
        with shelf.opened(desk.store) as opened:
            unit = desk.unit(opened, handle)
            stamp = quarantine.stamp(quarantine.items_of(opened.connection, unit))
            held = quarantine.held_of(opened.connection, unit)
        title = f"In quarantine: {', '.join(one.reason for one in held)}"
        return _viewer(desk, title, f"/quarantine/{handle}/volume", handle=handle, seen=stamp)

    @app.get("/quarantine/{handle}/volume")
    def volume(handle: str) -> Response:
        with shelf.opened(desk.store) as opened:
            unit = desk.unit(opened, handle)
            items = quarantine.images_of(opened.connection, unit)
            held = quarantine.held_of(opened.connection, unit)
        solid = (
            Solid(problem=_WITHDRAWN.problem) if _is_withdrawn(held) else desk.studio.solid(list(map(_wanted, items)))
        )
        if solid.problem:
            return PlainTextResponse(solid.problem, status_code=422)
        return Response(solid.content, media_type="application/octet-stream")


def _is_withdrawn(held: Sequence[quarantine.Held]) -> bool:
    return any(entry.reason is Reason.CONSENT_WITHDRAWN for entry in held)


def _decide(app: FastAPI, desk: Desk) -> None:
    @app.post("/decide")
    async def decided(request: Request) -> Response:
        given = fields_of(await request.body())
        if given.get("decision") not in {"release", "reject"}:
            raise DataError("the form says neither release nor reject", "open the page again")
        wish = Wish(
            given.get("unit", ""),
            cast("Any", given["decision"]),
            given.get("by", ""),
            crop=_crop(given) if given["decision"] == "release" else None,
            seen=given.get("seen") or None,
        )
        made = await _aside(lambda: quarantine.decide(desk.store, wish))
        return RedirectResponse(f"/quarantine/{quarantine.handle(made.unit)}", status_code=303)


async def _aside(work: Callable[[], Any]) -> Any:
    """Work that reads files, beside the loop that answers other requests."""
    from starlette.concurrency import run_in_threadpool

    return await run_in_threadpool(work)


def _crop(given: Mapping[str, str]) -> Crop | None:
    """The box of a form; None if it is left empty."""
    cells = [given.get(name, "").strip() for name in ("left", "top", "width", "height")]
    if not any(cells):
        return None
    if not all(cell.isascii() and cell.isdigit() and len(cell) < 7 for cell in cells):
        raise DataError(
            "the box is not complete", "give left, top, width and height as whole numbers of pixels, or none"
        )
    left, top, width, height = map(int, cells)
    return left, top, width, height


def _cases(app: FastAPI, desk: Desk) -> None:
    @app.get("/cases")
    def listed(request: Request, first: int = 0) -> Response:
        given = {name: request.query_params[name] for name in shelf.FILTERS if request.query_params.get(name)}
        with shelf.opened(desk.store) as opened:
            found, number = opened.cases(given, first=_place(first))
            choices = opened.choices()
        paging = _Paging("/cases", given, _place(first), number)
        return _page(desk, "cases", cases=found, choices=choices, chosen=given, paging=paging)

    @app.get("/cases/{name}")
    def viewer(name: str) -> Response:
        with shelf.opened(desk.store) as opened:
            found = opened.case(name)
            stamp = quarantine.stamp(quarantine.items_of(opened.connection, found.unit))
        title = f"Case {found.id}{f': {found.label}' if found.label else ''}"
        mask = f"/masks/{found.id}.nii" if found.mask else ""
        handle = quarantine.handle(found.unit)
        return _viewer(desk, title, f"/volumes/{found.id}.nii", mask=mask, case=found, handle=handle, seen=stamp)


def _viewer(desk: Desk, title: str, image: str, *, mask: str = "", **context: Any) -> Response:
    """The page of one volume; `context` has the handle and the stamp of its unit, and the case if it is one."""
    return _page(desk, "viewer", title=title, image=image, mask=mask, **{"case": None, **context})


def _files(app: FastAPI, desk: Desk) -> None:
    @app.get("/volumes/{name}.nii")
    def volume(name: str) -> Response:
        with shelf.opened(desk.store) as opened:
            return _nifti(opened.case(name).image)

    @app.get("/masks/{name}.nii")
    def mask(name: str) -> Response:
        with shelf.opened(desk.store) as opened:
            found = opened.case(name).mask
        if found is None:
            raise DataError("this case has no mask", "")
        return _nifti(found)

    @app.get("/small/{name}")
    def small(name: str) -> Response:
        with shelf.opened(desk.store) as opened:
            image = opened.case(name).image
        return _image(desk.studio.picture(Wanted(image, _size(image), side=SMALL)))


def _nifti(path: Path) -> Response:
    if not path.is_file():
        raise DataError("the file of this case is not in the store", "ingest again: it is made anew")
    return FileResponse(path, media_type="application/octet-stream")


def _readiness(app: FastAPI, desk: Desk) -> None:
    @app.get("/readiness")
    def listed(name: str = "") -> Response:
        names = shelf.reports(desk.store)
        return _page(desk, "readiness", names=names, chosen=name if name in names else next(iter(names), ""))

    @app.get("/reports/{name}")
    def report(name: str) -> Response:
        headers = {"content-security-policy": REPORT_POLICY}
        return Response(shelf.report(desk.store, name), media_type="text/html; charset=utf-8", headers=headers)


def _static(app: FastAPI, desk: Desk) -> None:
    @app.get("/static/{name}")
    def static(name: str) -> Response:
        if name not in _STATIC:
            return _page(desk, "message", status=404, title="There is no such file", message="", remedy="")
        return Response(_resource(f"static/{name}"), media_type=_STATIC[name])


@lru_cache(maxsize=16)
def _resource(name: str) -> bytes:
    return (files(_PACKAGE) / name).read_bytes()


# --- parts of pages


def _place(first: int) -> int:
    """Where in a list a page begins, whatever its address says: a database counts to 2⁶³."""
    return min(max(0, first), 1 << 40)


@dataclass(frozen=True)
class _Paging:
    """Where in a list a page is."""

    path: str
    chosen: Mapping[str, str]
    first: int
    number: int

    @property
    def last(self) -> int:
        return min(self.first + shelf.PAGE, self.number)

    def to(self, first: int) -> str:
        """The address of the page that begins at a place."""
        kept = {name: value for name, value in self.chosen.items() if value}
        return f"{self.path}?{urlencode({**kept, 'first': first})}"

    @property
    def back(self) -> str:
        return self.to(max(0, self.first - shelf.PAGE)) if self.first else ""

    @property
    def on(self) -> str:
        return self.to(self.last) if self.last < self.number else ""


def _picture(desk: Desk, item: Item, side: int = 2048) -> Picture:
    return desk.studio.picture(_wanted(item, side))


def _wanted(item: Item, side: int = 2048) -> Wanted:
    return Wanted(item.path, item.size if item.row is not None else _size(item.path), item.row, side)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1


def _inline(content: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(content).decode()}" if content else ""


def _image(picture: Picture) -> Response:
    if picture.content:
        return Response(picture.content, media_type="image/png")
    words = f'<text x="50%" y="50%" font-size="11" text-anchor="middle" fill="#888">{escape("no picture")}</text>'
    body = f'<svg xmlns="http://www.w3.org/2000/svg" width="{SMALL}" height="{SMALL // 2}">{words}</svg>'
    return Response(body, media_type="image/svg+xml")


def _page(desk: Desk, template: str, *, status: int = 200, **context: Any) -> Response:
    fixed = {
        "store": str(desk.store),
        "ingest": f"locum site ingest {desk.site_file} --store {desk.store}",
        "csrf": desk.keys.csrf,
        "person": desk.person,
        "sentence": {reason.value: SENTENCE[reason] for reason in Reason},
    }
    return HTMLResponse(_templates().get_template(template).render({**fixed, **context}), status_code=status)


@lru_cache(maxsize=1)
def _templates() -> Environment:
    def source(name: str) -> str:
        return _resource(f"{name}.html.j2").decode()

    return Environment(
        loader=FunctionLoader(source), autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined
    )
