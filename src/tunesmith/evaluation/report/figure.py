"""A plot as an inline SVG: drawn by matplotlib, coloured by the page, the same bytes for the same numbers.

matplotlib takes most of a second to import: this module is imported only where a report is drawn.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from typing import Any

import matplotlib as mpl
from matplotlib.backends import backend_svg  # noqa: F401 (now, and not inside the first savefig)
from matplotlib.figure import Figure

INK, MUTED, RULE, ACCENT, PAPER = "#010101", "#020202", "#030303", "#040404", "#050505"
"""Colours that stand for others: the page says which, by day and by night."""
_VARIABLES = {INK: "--ink", MUTED: "--muted", RULE: "--rule", ACCENT: "--accent", PAPER: "--paper"}

WIDTH, HEIGHT = 480, 250
"""Size of a plot in CSS pixels, at which its text has the size below."""
MOST_BESIDE = 620
"""Width up to which two plots stand side by side."""
_TEXT = 10.5

_STYLE = {
    "svg.fonttype": "none",  # text stays text: it can be searched, copied and read aloud
    "svg.hashsalt": "tunesmith",  # ids follow from content alone
    "text.parse_math": False,  # a dollar sign in a label is one
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib: the same layout everywhere
    "font.size": _TEXT,
    "axes.titlesize": _TEXT,
    "axes.labelsize": _TEXT,
    "xtick.labelsize": _TEXT,
    "ytick.labelsize": _TEXT,
    "legend.fontsize": _TEXT,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "grid.color": RULE,
    "grid.linewidth": 0.8,
    "hatch.color": PAPER,
    "hatch.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "text.color": INK,
    "legend.frameon": False,
    "legend.handlelength": 2.4,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}


@dataclass(frozen=True, slots=True)
class Plot:
    """One figure of the report."""

    name: str
    title: str
    description: str
    """What is drawn and how to read it; for those who cannot see it too."""
    svg: str
    wide: bool = False


def draw(
    name: str,
    title: str,
    description: str,
    paint: Callable[[Any], None],
    *,
    width: float = WIDTH,
    height: float = HEIGHT,
) -> Plot:
    """The plot that `paint` makes of empty axes."""
    file = io.StringIO()
    with mpl.rc_context(_STYLE), warnings.catch_warnings():
        # A script that DejaVu lacks is no fault: the browser has the font, only the space set aside is a guess.
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure = Figure(figsize=(width / 72, height / 72), layout="constrained")
        paint(figure.add_subplot())
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    words = f'<title id="{name}-title">{escape(title)}</title><desc id="{name}-text">{escape(description)}</desc>'
    size = f'viewBox="0 0 {width:g} {height:g}" width="{width:g}" height="{height:g}"'
    head = f'<svg role="img" aria-labelledby="{name}-title {name}-text" {size}>{words}'
    return Plot(name, title, description, head + _inline(file.getvalue(), name), wide=width > MOST_BESIDE)


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
