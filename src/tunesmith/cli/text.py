"""Values as a person reads them, with units; and text of data made harmless to a terminal."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

from tunesmith import formatting as values

size = values.size
_BARS = "▁▂▃▄▅▆▇█"

# Everything a terminal acts on instead of showing: C0 but tab and newline, DEL, C1, and the marks that reverse the
# order of what follows.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    """The text with every control character spelled out, so that no row of data can drive the terminal."""
    return _CONTROLS.sub(_spelled, text)


def _spelled(match: re.Match[str]) -> str:
    code = ord(match.group())
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def one_line(text: str, width: int) -> str:
    """The text on one line, at most `width` characters."""
    flat = " ".join(visible(text).split())
    return flat if len(flat) <= width else flat[: width - 1].rstrip() + "…"


def count(number: float) -> str:
    """A large number: 134.5 M."""
    for unit, divisor in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= divisor * 10 or (number >= divisor and unit != "k"):
            return f"{number / divisor:.1f} {unit}"
    return f"{number:,.0f}"


def age(seconds: float) -> str:
    """How long ago, in one unit."""
    for unit, length in (("day", 86400), ("hour", 3600), ("minute", 60)):
        if seconds >= length:
            number = int(seconds // length)
            return f"{number} {unit}{'s' if number > 1 else ''} ago"
    return "just now"


def loss(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}" if math.isfinite(value) else str(value)


def percent(share: float) -> str:
    return f"{share * 100:.1f} %"


def option(value: Any) -> str:
    """As `values.option`, made harmless."""
    return visible(values.option(value))


def sparkline(values: Sequence[float], width: int = 24) -> str:
    """Values as bars, lowest to highest of those shown; the newest `width` of them. Not finite: a gap."""
    shown = list(values)[-width:]
    finite = [value for value in shown if math.isfinite(value)]
    if not finite:
        return ""
    low, span = min(finite), max(finite) - min(finite)
    top = len(_BARS) - 1

    def bar(value: float) -> str:
        if not math.isfinite(value):
            return " "
        return _BARS[round((value - low) / span * top)] if span else _BARS[top // 2]

    return "".join(map(bar, shown))
