"""The report for a site's steward: one HTML file that loads nothing, of what was measured, with pictures.

Rules:
  * It holds exact numbers and pictures of patients, and stays at the site. What may leave is shown in it as it would.
  * No script. Links lead to the desk's viewer, and work where the desk shows the page.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from locum.common.envelope import Readiness
from locum.site_client.imaging.fitting import Seen
from locum.site_client.imaging.reasons import SENTENCE, Reason
from locum.site_client.imaging.split import FOLDS
from locum.site_client.readiness import pictures
from locum.site_client.readiness.clauses import Measured
from locum.site_client.readiness.people import UNKNOWN, band_of, maker_of

#: Pictures on a page, and cases of whose values a histogram is made.
PICTURES, SAMPLE = 12, 64
_BINS = 12

Tell = Callable[[int, int], None]


@dataclass(frozen=True)
class Bar:
    """One bar of a chart: its label, its count, and its length in percent of the longest."""

    label: str
    count: int
    length: float


@dataclass(frozen=True)
class Chart:
    """A chart of counts; `of` says of what."""

    title: str
    of: str
    bars: tuple[Bar, ...]


def page(measured: Measured, said: Readiness, store: Path, *, at: datetime, tell: Tell = lambda *_: None) -> bytes:
    """The report.

    Args:
        measured: what there is.
        said: what may be said of it.
        store: the store that it is of, for its label files.
        at: when it was measured.
        tell: is told how many of how many pictures and samples are read.
    """
    from jinja2 import Environment, StrictUndefined

    template = (files("locum.site_client.readiness") / "readiness.html.j2").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    return environment.from_string(template).render(context(measured, said, store, at=at, tell=tell)).encode()


def context(measured: Measured, said: Readiness, store: Path, *, at: datetime, tell: Tell) -> dict[str, Any]:
    """What the page is made of."""
    shown = measured.fitting or measured.seen
    chosen, sampled = pictures.spread(shown, PICTURES), pictures.spread(measured.fitting, SAMPLE)
    total = len(chosen) + len(sampled)
    drawn = [_told(tell, n, total, pictures.picture(one)) for n, one in enumerate(chosen, start=1)]
    values = [_told(tell, n, total, pictures.values(one)) for n, one in enumerate(sampled, start=len(chosen) + 1)]
    return {
        "measured": measured,
        "plan": measured.plan,
        "said": said,
        "statement": json.dumps(said.model_dump(mode="json"), indent=2),
        "at": f"{at:%Y-%m-%d %H:%M}",
        "pictures": drawn,
        "charts": [*_charts(measured.fitting), _numbers("Values of voxels", f"middle slices of {len(values)} images",
                                                        np.concatenate([np.zeros(0), *values]))],
        "folds": _folds(measured.fitting),
        "makers": _makers(measured.fitting),
        "quarantined": [(name, count, SENTENCE[Reason(name)]) for name, count in measured.declared.quarantined.items()],
        "quality": _quality(store),
    }  # fmt: skip


def _told(tell: Tell, done: int, total: int, found: Any) -> Any:
    tell(done, total)
    return found


# --- charts


def _charts(seen: Sequence[Seen]) -> list[Chart]:
    facts = [one.facts for one in seen]
    people = {one.case.patient: one.facts for one in reversed(seen)}
    volumes = [one for one in facts if len(one.spacing) > 2]
    return [
        _counted("Sex", "patients", Counter(one.sex or UNKNOWN for one in people.values())),
        _counted("Age", "patients", Counter(band_of(one.age) for one in people.values())),
        _counted("Maker of the scanner", "images", Counter(one.manufacturer.strip() or UNKNOWN for one in facts)),
        _counted("Month of the study", "images", Counter(one.month or UNKNOWN for one in facts), most=36),
        _numbers(
            "Spacing in the plane (mm)", "images", np.array([max(one.spacing[:2]) for one in facts if one.spacing])
        ),
        _numbers("Distance of slices (mm)", "volumes", np.array([one.spacing[2] for one in volumes])),
        _numbers("Slices", "volumes", np.array([one.slices for one in volumes])),
    ]


def _counted(title: str, of: str, counts: Mapping[str, int], most: int = 16) -> Chart:
    """A bar a value; of many values the rarest are one bar."""
    names = sorted(counts)
    if len(names) > most:
        names = sorted(sorted(names, key=lambda name: -counts[name])[: most - 1])
    rest = sum(counts.values()) - sum(counts[name] for name in names)
    found = [(name, counts[name]) for name in names] + ([("all others", rest)] if rest else [])
    return Chart(title, of, _bars(found))


def _numbers(title: str, of: str, numbers: np.ndarray[Any, Any]) -> Chart:
    """A bar a range; the thousandth at either end is in the outermost."""
    known = numbers[np.isfinite(numbers)]
    if not known.size:
        return Chart(title, of, ())
    low, high = np.quantile(known, (0.001, 0.999))
    if low == high:
        return Chart(title, of, _bars([(f"{low:.4g}", int(known.size))]))
    counts, edges = np.histogram(np.clip(known, low, high), bins=_BINS)
    ranges = [f"{a:.4g} to {b:.4g}" for a, b in pairwise(edges)]
    return Chart(title, of, _bars(list(zip(ranges, map(int, counts), strict=True))))


def _bars(found: Sequence[tuple[str, int]]) -> tuple[Bar, ...]:
    largest = max((count for _, count in found), default=0)
    return tuple(Bar(name, count, 100 * count / largest if largest else 0) for name, count in found)


# --- tables


def _folds(seen: Iterable[Seen]) -> list[tuple[str, tuple[int, ...], tuple[int, ...]]]:
    """By label, images and patients of each fold; the last row is all of them."""
    images: dict[str, Counter[str]] = {}
    patients: dict[str, dict[str, set[str]]] = {}
    for one in seen:
        for label in (one.facts.label or "no label", "all"):
            images.setdefault(label, Counter())[one.case.fold] += 1
            patients.setdefault(label, {}).setdefault(one.case.fold, set()).add(one.case.patient)
    order = sorted(images, key=lambda label: (label == "all", label))
    return [
        (label, tuple(images[label][f] for f in FOLDS), tuple(len(patients[label].get(f, ())) for f in FOLDS))
        for label in order
    ]


def _makers(seen: Iterable[Seen]) -> list[dict[str, Any]]:
    """What each maker's images are: for who wants to know whether one of them differs."""
    groups: dict[str, list[Seen]] = {}
    for one in seen:
        groups.setdefault(maker_of(one.facts.manufacturer), []).append(one)
    return [_maker(name, group) for name, group in sorted(groups.items())]


def _maker(name: str, group: Sequence[Seen]) -> dict[str, Any]:
    months = sorted(one.facts.month for one in group if one.facts.month)
    parameters: dict[str, list[float]] = {}
    for one in group:
        for keyword, value in one.facts.parameters.items():
            parameters.setdefault(keyword, []).append(value)
    return {
        "name": name,
        "images": len(group),
        "patients": len({one.case.patient for one in group}),
        "months": f"{months[0]} to {months[-1]}" if months else UNKNOWN,
        "models": sorted(Counter(one.facts.model or UNKNOWN for one in group).items()),
        "labels": sorted(Counter(one.facts.label or "no label" for one in group).items()),
        "spacing": _middle([max(one.facts.spacing) for one in group if one.facts.spacing]),
        "slices": _middle([one.facts.slices for one in group]),
        "parameters": [(keyword, _middle(found)) for keyword, found in sorted(parameters.items())],
    }


def _middle(numbers: Sequence[float]) -> str:
    """Median, and the range from a tenth to nine tenths."""
    if not numbers:
        return "unknown"
    low, middle, high = np.quantile(numbers, (0.1, 0.5, 0.9))
    return f"{middle:.4g} ({low:.4g} to {high:.4g})"


def _quality(store: Path) -> list[tuple[str, str]]:
    """What label sources measured of themselves: agreement of readers, precision of rules; as they wrote it."""
    found = []
    for name in ("agreement.json", "reports.json"):
        path = store / name
        if path.is_file():
            try:
                found.append((name, json.dumps(json.loads(path.read_bytes()), indent=2, ensure_ascii=False)))
            except ValueError:
                found.append((name, "this file cannot be read"))
    return found
