"""Plots of a report as inline SVG: drawn by matplotlib, coloured by the page, equal bytes for equal numbers.

Lines differ by style, so that none needs its colour. matplotlib takes most of a second to import:
this module is imported only where a report is drawn.
"""

# S steps

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.backends import backend_svg  # noqa: F401 (now, and not inside the first savefig)
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from tunesmith.evaluation.metrics import info_of
from tunesmith.evaluation.report.values import headline_metrics, selected_step
from tunesmith.evaluation.series import RunSeries, measures_of
from tunesmith.types import Record

INK, MUTED, RULE, ACCENT, PAPER = "#010101", "#020202", "#030303", "#040404", "#050505"
"""Placeholder colours, which the page replaces by its own, light or dark."""
_VARIABLES = {INK: "--ink", MUTED: "--muted", RULE: "--rule", ACCENT: "--accent", PAPER: "--paper"}

PLOT_WIDTH, PLOT_HEIGHT = 480, 250
"""Size of a plot in CSS pixels, at which its text has the size below."""
STYLE = Path(__file__).with_name("report.mplstyle")

HELD_OUT_LINE: dict[str, Any] = {"linestyle": (0, (4, 2)), "marker": "o", "markerfacecolor": PAPER, "markersize": 6}
MOST_POINTS = 2000
"""Most points of a line; beyond, the lowest and highest point of each part are drawn."""
COURSE_FROM = 3
"""Fewest evaluations whose course is drawn: two are the before and after of the table."""
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Plot:
    """One figure of the report."""

    name: str
    title: str
    description: str
    """Caption, also for screen readers."""
    svg: str


def draw(name: str, title: str, description: str, paint: Callable[[Any], None], *, height: float = PLOT_HEIGHT) -> Plot:
    """The plot that `paint` makes of empty axes."""
    file = io.StringIO()
    with mpl.rc_context(fname=STYLE), warnings.catch_warnings():
        # A script that DejaVu lacks is not a fault: the browser has the font, only the space is a guess.
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure = Figure(figsize=(PLOT_WIDTH / 72, height / 72), layout="constrained")
        paint(figure.add_subplot())
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    words = f'<title id="{name}-title">{escape(title)}</title><desc id="{name}-text">{escape(description)}</desc>'
    size = f'viewBox="0 0 {PLOT_WIDTH} {height:g}" width="{PLOT_WIDTH}" height="{height:g}"'
    head = f'<svg role="img" aria-labelledby="{name}-title {name}-text" {size}>{words}'
    return Plot(name, title, description, head + _inline(file.getvalue(), name))


def _inline(svg: str, name: str) -> str:
    """Only what a page needs of an SVG file, its ids made the page's own and its colours the page's."""
    body = svg[svg.index(">", svg.index("<svg")) + 1 :]
    body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", body, flags=re.DOTALL)
    used = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', body))
    body = re.sub(r' id="([^"]+)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in used else "", body)
    body = re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", body).replace("xlink:href", "href")
    body = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", body)
    body = re.sub("|".join(_VARIABLES), lambda m: f"var({_VARIABLES[m[0]]})", body)
    body = re.sub(r">\s+<(?!/?t)", "><", body)
    return body.rstrip()


def training_plots(series: RunSeries, report: Record) -> list[Plot]:
    """Loss over the steps, and the most important metric."""
    if not series.steps:
        return []
    steps_S, losses_S = np.array([(step.step, step.loss) for step in series.steps.values()], np.float64).T
    kept_step = selected_step(report)
    headline = headline_metrics(report)[:1]
    return [_loss(series, steps_S, losses_S, kept_step), *_measure(series, headline, kept_step)]


def _loss(series: RunSeries, steps_S: Floats, losses_S: Floats, kept: int) -> Plot:
    window = max(1, len(steps_S) // 25)
    points = [(step, values["loss"]) for step, values in series.course(kept)]
    held = np.asarray(points, np.float64).reshape(-1, 2)

    def paint(axes: Any) -> None:
        raw = thinned(steps_S, losses_S)
        if window > 1:
            axes.plot(*raw, color=MUTED, linewidth=0.7, alpha=0.45)
            smoothed = thinned(steps_S, smooth(losses_S, window))
            axes.plot(*smoothed, color=INK, linewidth=1.6, label="training, smoothed")
        else:
            axes.plot(*raw, color=INK, linewidth=1.4, label="training")
        if len(held):
            line = HELD_OUT_LINE if len(held) >= COURSE_FROM else {**HELD_OUT_LINE, "linestyle": ""}
            axes.plot(held[:, 0], _finite(held[:, 1]), color=ACCENT, linewidth=1.6, label="held out", **line)
            chosen = held[held[:, 0] == kept][-1:]
            axes.plot(chosen[:, 0], _finite(chosen[:, 1]), color=ACCENT, linestyle="", marker="o", markersize=7)
        _mark_kept(axes, kept)
        axes.set_ylabel("loss per target")
        axes.legend()

    smoothed = f" (thick: mean over {window} steps)" if window > 1 else ""
    return draw("loss", "Loss", f"Of training rows{smoothed} and held-out rows.", paint)


def _measure(series: RunSeries, keys: Sequence[str], kept: int) -> list[Plot]:
    """The most important metric, where it was measured during training and is not another form of the loss."""
    measured = [(step, measures_of(values).get(key)) for key in keys for step, values in series.course(kept)]
    points = [
        (step, interval) for step, interval in measured if interval is not None and math.isfinite(interval["value"])
    ]
    if len(points) < COURSE_FROM or keys[0] in ("loss", "perplexity", "bits_per_byte"):
        return []
    info = info_of(keys[0])

    def paint(axes: Any) -> None:
        values = np.asarray([interval["value"] for _, interval in points])
        ends = np.asarray([(i.get("low", i["value"]), i.get("high", i["value"])) for _, i in points]).T
        spans = np.abs(np.nan_to_num(ends, nan=0.0) - values) * np.isfinite(ends)
        axes.errorbar(
            [step for step, _ in points], values, spans, color=ACCENT, linewidth=1.6, elinewidth=1, **HELD_OUT_LINE
        )
        _mark_kept(axes, kept)
        # The corner that a good course leaves.
        rises, is_late = info.better != "lower", 2 * kept > points[-1][0]
        axes.legend(loc=f"{'upper' if rises == is_late else 'lower'} {'left' if is_late else 'right'}")

    return [draw("measure", info.label.capitalize(), "On held-out rows, with 95 % intervals.", paint)]


def _mark_kept(axes: Any, kept: int) -> None:
    axes.axvline(kept, color=INK, linewidth=1.1, linestyle=(0, (1, 2)), label=f"kept: step {kept:,}")
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))


def smooth(values_S: Floats, window: int) -> Floats:
    """The mean over `window` neighbours, of fewer at both ends."""
    padded = np.concatenate([[0.0], np.cumsum(values_S)])
    centre = np.arange(len(values_S))
    low = np.maximum(centre - window // 2, 0)
    high = np.minimum(centre + (window + 1) // 2, len(values_S))
    return np.asarray((padded[high] - padded[low]) / (high - low))


def thinned(steps_S: Floats, values_S: Floats) -> tuple[Floats, Floats]:
    """At most MOST_POINTS of the points, with every peak among them."""
    values_S = _finite(values_S)
    if len(values_S) <= MOST_POINTS:
        return steps_S, values_S
    parts = np.array_split(np.arange(len(values_S)), MOST_POINTS // 2)
    low = [part[np.argmin(np.nan_to_num(values_S[part], nan=np.inf))] for part in parts]
    high = [part[np.argmax(np.nan_to_num(values_S[part], nan=-np.inf))] for part in parts]
    extremes = np.unique(np.asarray([low, high]))
    return steps_S[extremes], values_S[extremes]


def _finite(values: Floats) -> Floats:
    return np.where(np.isfinite(values), values, np.nan)


def scatter_plot(pairs: Floats) -> Plot:
    """Numbers of held-out rows: true and predicted."""

    def paint(axes: Any) -> None:
        low, high = np.nanmin(_finite(pairs)), np.nanmax(_finite(pairs))
        axes.plot([low, high], [low, high], color=MUTED, linewidth=1, linestyle=":", label="exactly right")
        axes.scatter(pairs[:, 0], pairs[:, 1], s=16, facecolor="none", edgecolor=ACCENT, linewidth=1)
        axes.set(xlabel="true", ylabel="predicted")
        axes.legend(loc="upper left")

    description = f"{len(pairs):,} held-out rows: the number and what the model said."
    return draw("scatter", "Numbers", description, paint)


def length_plot(lengths: Record) -> Plot:
    """Histogram of the training rows' lengths, with the limit marked."""
    edges, counts, limit = lengths["edges"], lengths["counts"], lengths["max_tokens"]
    near = limit <= 2 * edges[-1]

    def paint(axes: Any) -> None:
        axes.bar(edges[:-1], counts, width=np.diff(edges), align="edge", color=ACCENT, alpha=0.55, edgecolor=PAPER)
        if near:
            axes.axvline(limit, color=INK, linewidth=1.2, linestyle=(0, (4, 2)), label=f"limit: {limit:,} tokens")
            axes.legend()
        axes.set(xlabel="tokens", ylabel="rows")
        axes.grid(visible=False, axis="x")

    where = "the dashed line is" if near else "far to the right is"
    text = f"Training rows by their number of tokens; {where} the limit, {limit:,}."
    return draw("lengths", "Lengths", text, paint)
