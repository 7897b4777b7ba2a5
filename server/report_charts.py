"""The charts of a report: matplotlib figures as inline SVG that follows the page's colours, light or dark.

Rules:
  * Figures are made with `Figure()`; pyplot's global state is never touched.
  * A chart is about 420 units wide, so that its text can be read at a phone's width.
  * Colours are those of Okabe & Ito (colour-blind safe), and no fact is told by colour alone.
  * The same results give the same bytes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from typing import Any

import matplotlib as mpl
from markupsafe import Markup, escape
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from locum.common.calibration import Reliability
from locum.common.metrics import Metric
from locum.server.records import RoundRecord
from locum.server.report_results import ModelRow, Score, SiteRow, label, number
from locum.server.report_words import spans

#: Colours in the figure that stand for a colour of the page: matplotlib needs a number, the page has the value.
_TOKENS = {
    "#010101": "var(--ink)", "#020202": "var(--muted)", "#030303": "var(--line)", "#040404": "var(--page)",
    "#050505": "var(--soft)", **{f"#0a0a0{n}": f"var(--s{n})" for n in range(8)},
}  # fmt: skip
INK, MUTED, LINE, PAGE, SOFT = list(_TOKENS)[:5]
SERIES = list(_TOKENS)[5:]
FEDERATED, ALONE, POOLED = SERIES[0], SERIES[1], SERIES[2]
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")

_STYLE: dict[str, Any] = {
    "svg.fonttype": "none", "svg.hashsalt": "locum", "text.parse_math": False, "font.size": 10.5,
    "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": MUTED, "axes.labelcolor": MUTED,
    "xtick.color": MUTED, "ytick.color": MUTED, "text.color": INK, "axes.grid": True,
    "grid.color": LINE, "grid.linewidth": 0.8, "axes.axisbelow": True,
    "xtick.major.size": 0, "ytick.major.size": 0,
}  # fmt: skip
_WIDTH = 5.8  # inches of 72 units
_MOST_ROWS = 40
_MARKS = "●■▲◆▼✚✖★"


@dataclass(frozen=True)
class Chart:
    """A chart ready for the page: its SVG, which says in words what it shows, and its title."""

    svg: Markup
    title: str


# --- from figure to page


def _figure(height: float) -> tuple[Figure, Any]:
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.add_subplot()
    axes.patch.set_alpha(0)
    return figure, axes


def _chart(figure: Figure, name: str, title: str, alt: str) -> Chart:
    buffer = StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return Chart(Markup(_inline(buffer.getvalue(), name, alt)), title)  # noqa: S704 (matplotlib escapes its texts)


def _inline(text: str, name: str, alt: str) -> str:
    """An SVG file as an element of a page: ids of its own, the page's font and colours, a text for who cannot see."""
    body = text[text.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>\s*", "", body, flags=re.DOTALL)
    body = re.sub(r"<style.*?</style>", "", body, flags=re.DOTALL)
    used = set(re.findall(r'href="#([^"]+)"', body)) | set(re.findall(r"url\(#([^)]+)\)", body))
    body = re.sub(r' id="([^"]*)"', lambda found: f' id="{name}-{found[1]}"' if found[1] in used else "", body)
    body = re.sub(r'(?:xlink:)?href="#', f'href="#{name}-', body)
    body = body.replace("url(#", f"url(#{name}-")
    body = re.sub(r"font-family: [^;\"]*;?\s*", "", body)
    for token, colour in _TOKENS.items():
        body = body.replace(token, colour)
    size = re.search(r'viewBox="([^"]*)"', body)
    viewed = size.group(1) if size else ""
    head = f'<svg viewBox="{viewed}" role="img" aria-label="{escape(alt)}">'
    return re.sub(r"<svg[^>]*>", lambda _: head, body, count=1)


# --- dots and intervals


def _dot(axes: Any, score: Score, at: float, **look: Any) -> None:
    """A value with its interval; a value that does not exist is written in words."""
    colour = look.pop("color")
    if score.value is None:
        return
    if score.interval is not None:
        axes.plot(score.interval, [at, at], color=colour, linewidth=2.2, solid_capstyle="round", zorder=2)
    look = {"marker": "o", "markersize": 7.5, "markeredgecolor": colour, "markerfacecolor": colour, **look}
    axes.plot([score.value], [at], linestyle="none", markeredgewidth=1.6, zorder=3, **look)


def _rows(axes: Any, names: Sequence[str], texts: Sequence[str], *, bold: Sequence[bool]) -> None:
    """Names left, values right, the first row on top."""
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_yticks(range(len(names)), names)
    axes.grid(axis="y", visible=False)
    axes.spines["left"].set_visible(False)
    for tick, heavy in zip(axes.get_yticklabels(), bold, strict=True):
        tick.set_color(INK)
        tick.set_fontweight("bold" if heavy else "normal")
    place = axes.get_yaxis_transform()
    for at, (text, heavy) in enumerate(zip(texts, bold, strict=True)):
        weight = "bold" if heavy else "normal"
        axes.text(1.02, at, text, transform=place, va="center", ha="left", fontweight=weight)
    axes.xaxis.set_major_locator(MaxNLocator(5))


def _short(score: Score) -> str:
    return "not defined" if score.value is None else number(score.metric, score.value)


def _limits(axes: Any, scores: Sequence[Score]) -> None:
    """The range of all values and intervals; a share ends at 1."""
    points = [s.value for s in scores if s.value is not None] + [b for s in scores for b in s.interval or ()]
    if not points:
        axes.set_xlim(0, 1)
        return
    low, high = min(points), max(points)
    margin = max(0.04 * (high - low), 0.01)
    most = high + margin if scores[0].metric.unit else min(high + margin, 1.01)
    axes.set_xlim(max(low - margin, 0.0 - margin / 4), most)


def models_chart(rows: Sequence[ModelRow], index: int) -> Chart:
    """One metric of every model on the test cases of all sites; of many models the first ones."""
    rows = rows[:_MOST_ROWS]
    scores = [row.scores[index] for row in rows]
    metric = scores[0].metric
    colours = {"federated": FEDERATED, "pooled": POOLED, "alone": ALONE}
    marks = {"federated": "o", "pooled": "s", "alone": "D"}
    with mpl.rc_context(_STYLE):
        figure, axes = _figure(0.65 + 0.33 * len(rows))
        for at, row in enumerate(rows):
            _dot(axes, row.scores[index], at, color=colours[row.kind], marker=marks[row.kind])
        _rows(axes, [row.name for row in rows], [_short(s) for s in scores], bold=[r.kind == "federated" for r in rows])
        if scores[0].value is not None:
            axes.axvline(scores[0].value, color=FEDERATED, linewidth=1, linestyle=(0, (3, 3)), zorder=1)
        _limits(axes, scores)
        axes.set_xlabel(f"{label(metric)}, 95 % interval")
        told = "; ".join(f"{row.name} {row.scores[index].full_text}" for row in rows)
        return _chart(
            figure, f"models{index}", f"{label(metric)} on the test cases of all sites", f"{label(metric)}: {told}"
        )


def sites_chart(rows: Sequence[SiteRow], index: int, overall: Score) -> Chart:
    """One metric at every site, of many sites the first ones: the federated model, and the site's own if trained."""
    rows, left_out = rows[:_MOST_ROWS], len(rows[_MOST_ROWS:])
    metric = overall.metric
    with mpl.rc_context(_STYLE):
        figure, axes = _figure(0.65 + 0.36 * len(rows))
        for at, row in enumerate(rows):
            colour = ALONE if row.worst and index == 0 else FEDERATED
            if row.alone:
                _dot(axes, row.alone[index], at + 0.2, color=MUTED, marker="D", markersize=5.5, markerfacecolor=PAGE)
            _dot(axes, row.scores[index], at - (0.1 if row.alone else 0), color=colour)
        names = [f"{row.site} (worst)" if row.worst and index == 0 else row.site for row in rows]
        _rows(axes, names, [_short(row.scores[index]) for row in rows], bold=[row.worst and index == 0 for row in rows])
        if overall.value is not None:
            axes.axvline(overall.value, color=MUTED, linewidth=1, linestyle=(0, (3, 3)), zorder=1)
        _limits(axes, [overall, *(row.scores[index] for row in rows), *(row.alone[index] for row in rows if row.alone)])
        interval = ", 95 % interval" if any(row.scores[index].interval for row in rows) else ""
        axes.set_xlabel(f"{label(metric)}{interval}; dashed line: all sites together")
        told = "; ".join(f"{row.site} {row.scores[index].full_text}" for row in rows)
        title = f"{label(metric)} at " + (
            f"the {_MOST_ROWS} worst of {len(rows) + left_out} sites" if left_out else "each site"
        )
        return _chart(figure, f"sites{index}", title, f"{label(metric)} by site: {told}")


# --- calibration


def reliability_chart(bins: Sequence[Reliability]) -> Chart:
    """The share of cases that are so against the probability given to them, with 95 % intervals, and the diagonal."""
    known = [row for row in bins if row.chance is not None and row.share is not None]
    with mpl.rc_context(_STYLE):
        figure, axes = _figure(3.6)
        axes.plot([0, 1], [0, 1], color=MUTED, linewidth=1, linestyle=(0, (3, 3)), zorder=1)
        for row in known:
            axes.plot(
                [row.chance] * 2,
                row.interval or [row.share] * 2,
                color=FEDERATED,
                linewidth=2.2,
                solid_capstyle="round",
                zorder=2,
            )
        axes.plot([row.chance for row in known], [row.share for row in known], color=FEDERATED, marker="o",
                  markersize=6.5, linewidth=1.2, zorder=3)  # fmt: skip
        axes.set_xlim(-0.02, 1.02)
        axes.set_ylim(-0.02, 1.02)
        axes.set_xlabel("mean probability that the model gives")
        axes.set_ylabel("share that is so")
        told = "; ".join(f"{row.chance:.2f} given, {row.share:.2f} so, {row.cases} cases" for row in known)
        return _chart(figure, "reliability", "Reliability; dashed: perfect calibration", f"Reliability: {told}")


# --- curves over the rounds

Points = tuple[list[int], list[float]]


@dataclass(frozen=True)
class Curves:
    """A quantity over the rounds: of all sites together, and of each site that released it."""

    title: str
    unit: str
    overall: Points
    per_site: Mapping[str, Points]

    @property
    def by_site(self) -> bool:
        """Whether a site released its own."""
        return any(values for _, values in self.per_site.values())


def loss_curves(history: Sequence[RoundRecord], sites: Sequence[str]) -> Curves:
    """The mean training loss of each round."""
    return Curves(
        "Training loss",
        "loss",
        _points([(r.round, r.loss) for r in history]),
        {site: _points([(r.round, r.losses.get(site)) for r in history]) for site in sites},
    )


def validation_curves(history: Sequence[RoundRecord], sites: Sequence[str], metric: Metric) -> Curves:
    """A metric on the validation fold after each round that was evaluated."""
    found = [record.evaluation for record in history if record.evaluation is not None]
    return Curves(
        f"{label(metric)} on validation cases",
        label(metric),
        _points([(e.round, e.overall.get(metric.name)) for e in found]),
        {site: _points([(e.round, e.per_site.get(site, {}).get(metric.name)) for e in found]) for site in sites},
    )


def _points(pairs: Sequence[tuple[int, Any]]) -> Points:
    known = [(number, float(value)) for number, value in pairs if isinstance(value, float | int)]
    return [number for number, _ in known], [value for _, value in known]


def curves_chart(curves: Curves, name: str) -> Chart:
    """The curves as a chart."""
    rounds, values = curves.overall
    few = len(curves.per_site) <= len(SERIES)
    with mpl.rc_context(_STYLE):
        figure, axes = _figure(2.9)
        for index, points in enumerate(curves.per_site.values()):
            colour = SERIES[index] if few else MUTED
            marker = MARKERS[index] if few else None
            axes.plot(*points, color=colour, linewidth=1.3, marker=marker, markersize=4, alpha=0.9 if few else 0.35)
        axes.plot(rounds, values, color=INK, linewidth=2.6, marker=None if len(values) > 1 else "o")
        axes.set_xlabel("round")
        axes.set_ylabel(curves.unit)
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        alt = f"{curves.title}, all sites: {values[0]:.3f} in round {rounds[0]}, {values[-1]:.3f} in round {rounds[-1]}"
        return _chart(figure, name, curves.title, alt)


def all_curves(history: Sequence[RoundRecord], sites: Sequence[str], metrics: Sequence[Metric]) -> list[Chart]:
    """The loss and every metric over the rounds, as far as they were released."""
    return [curves_chart(curves, name) for name, curves in _released(history, sites, metrics).items()]


def legend(history: Sequence[RoundRecord], sites: Sequence[str], metrics: Sequence[Metric]) -> list[tuple[str, str]]:
    """The mark of each site's curves, and its name; without a mark, what is to be said of all of them."""
    curves = _released(history, sites, metrics).values()
    if not any(each.by_site for each in curves):
        return [("", "no thin lines: what each site gave is a part of the sums only")]
    if len(sites) > len(_MARKS):
        return [("", f"thin lines: each of {len(sites)} sites")]
    return list(zip(_MARKS, sites, strict=False))


def _released(history: Sequence[RoundRecord], sites: Sequence[str], metrics: Sequence[Metric]) -> dict[str, Curves]:
    """The curves of which something was released."""
    found = {"loss": loss_curves(history, sites)}
    found |= {f"validation{n}": validation_curves(history, sites, metric) for n, metric in enumerate(metrics)}
    return {name: curves for name, curves in found.items() if curves.overall[1]}


# --- who contributed


def contributions_chart(history: Sequence[RoundRecord], sites: Sequence[str]) -> Chart:
    """Which site contributed to which round: a thick bar where it did, a thin line with a cross where it did not.

    Of many sites those that missed the most.
    """
    missed = {site: [r.round for r in history if site not in r.sites] for site in sites}
    shown = sorted(sites, key=lambda site: (-len(missed[site]), site))[:_MOST_ROWS]
    first, last = history[0].round, history[-1].round
    with mpl.rc_context(_STYLE):
        figure, axes = _figure(0.65 + 0.3 * len(shown))
        for at, site in enumerate(shown):
            for low, high in spans(r.round for r in history if site in r.sites):
                axes.broken_barh([(low - 0.5, high - low + 1)], (at - 0.22, 0.44), color=FEDERATED)
            for low, high in spans(missed[site]):
                axes.plot([low - 0.5, high + 0.5], [at, at], color=ALONE, linewidth=1.2)
                axes.plot([(low + high) / 2], [at], color=ALONE, marker="x", markersize=7, markeredgewidth=1.8)
        counted = [f"{len(history) - len(missed[site])} of {len(history)}" for site in shown]
        _rows(axes, shown, counted, bold=[bool(missed[site]) for site in shown])
        axes.set_xlim(first - 0.6, last + 0.6)
        axes.set_xlabel("round")
        axes.xaxis.set_major_locator(MaxNLocator(10, integer=True))
        told = "; ".join(f"{site} {text} rounds" for site, text in zip(shown, counted, strict=True))
        title = "Rounds to which each site contributed" if len(shown) == len(sites) else (
            f"Rounds to which the {len(shown)} sites contributed that missed the most"
        )  # fmt: skip
        return _chart(figure, "contributions", title, f"Contributions: {told}")


# --- cost of the rounds


def time_chart(history: Sequence[RoundRecord]) -> Chart:
    """Seconds of each round, and how much of it the slowest site trained, if sites tell."""
    rounds = [record.round for record in history]
    total = [record.seconds for record in history]
    slowest = [min(max(r.train_seconds.values(), default=0.0), r.seconds) for r in history]
    with mpl.rc_context(_STYLE):
        figure, axes = _figure(2.5)
        axes.bar(rounds, total, color=SOFT, width=0.75, label="whole round")
        if any(record.train_seconds for record in history):
            axes.bar(rounds, slowest, color=FEDERATED, width=0.75, label="slowest site, training")
        _cost_axes(axes, "seconds", max(total))
        alt = f"Seconds per round: {min(total):.2f} to {max(total):.2f}, {sum(total):.1f} in all rounds"
        return _chart(figure, "time", "Time per round", alt)


def bytes_chart(history: Sequence[RoundRecord]) -> Chart:
    """Bytes to and from the sites in each round."""
    rounds = [record.round for record in history]
    unit, size = ("MB", 1e6) if max(r.bytes_down + r.bytes_up for r in history) >= 1e6 else ("kB", 1e3)
    down = [record.bytes_down / size for record in history]
    up = [record.bytes_up / size for record in history]
    with mpl.rc_context(_STYLE):
        figure, axes = _figure(2.5)
        axes.bar([n - 0.2 for n in rounds], down, color=SERIES[2], width=0.38, label="model to sites")
        axes.bar([n + 0.2 for n in rounds], up, color=SERIES[1], width=0.38, label="updates from sites")
        _cost_axes(axes, unit, max(down + up))
        alt = f"{unit} per round, all sites: {max(down):.2f} down, {max(up):.2f} up at most"
        return _chart(figure, "bytes", "Bytes per round, all sites", alt)


def _cost_axes(axes: Any, unit: str, most: float) -> None:
    axes.grid(axis="x", visible=False)
    axes.set_ylim(0, most * 1.05 or 1)
    axes.set_xlabel("round")
    axes.set_ylabel(unit)
    axes.xaxis.set_major_locator(MaxNLocator(10, integer=True))
    axes.figure.legend(loc="outside upper right", ncols=2, frameon=False, fontsize=10, borderpad=0)
