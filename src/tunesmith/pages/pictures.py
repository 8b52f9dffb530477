"""Small drawings as SVG with attributes alone: curves, bars and ranges that need no script."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from tunesmith.phrases import size
from tunesmith.types import Record

WIDTH, HEIGHT = 720, 240
LEFT, BOTTOM, TOP = 46, 24, 8
"""Room for the numbers of the axes, in the units of the picture."""
Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class _Scale:
    """Maps steps and losses to coordinates of the picture."""

    last: float
    low: float
    high: float

    def x(self, step: float) -> float:
        return LEFT + (WIDTH - LEFT - 8) * step / self.last

    def y(self, loss: float) -> float:
        inside = min(max(loss, self.low), self.high)
        return TOP + (HEIGHT - BOTTOM - TOP) * (self.high - inside) / (self.high - self.low)

    def path(self, points: Points) -> str:
        return " ".join(f"{self.x(step):.1f},{self.y(loss):.1f}" for step, loss in points)


def curve(values: Record) -> Markup:
    """The loss or reward of a run over its steps, and its held-out points; empty before there are two of
    any."""
    mean, held_out = _course(values, "mean"), _finite_pairs(values["held_out"]) if values else []
    scale = _scale([values], [mean, held_out], held_out)
    if scale is None:
        return Markup("")
    parts = [_axes(scale)]
    if values["width"] > 1:
        parts.append(
            f'<polygon class="band" points="{scale.path([*_course(values, "low"), *_course(values, "high")[::-1]])}"/>'
        )
    parts.append(f'<polyline class="mean" fill="none" points="{scale.path(mean)}"/>')
    if len(held_out) > 2:  # two are the before and after of a table, not a course
        parts.append(f'<polyline class="held" fill="none" points="{scale.path(held_out)}"/>')
    for step, loss in held_out:
        parts.append(f'<circle class="held" cx="{scale.x(step):.1f}" cy="{scale.y(loss):.1f}" r="4"/>')
    return _picture(parts, f"{values['aim'].capitalize()} over the steps")


def curves(runs: Sequence[tuple[str, Record]]) -> Markup:
    """The losses or rewards of several runs in one picture, each with its letter at its end."""
    courses = [(letter, _course(values, "mean")) for letter, values in runs]
    scale = _scale([values for _, values in runs], [course for _, course in courses])
    if scale is None:
        return Markup("")
    parts = [_axes(scale)]
    for index, (letter, course) in enumerate(courses):
        if course:
            end, height = scale.x(course[-1][0]) - 14 * index, scale.y(course[-1][1]) - 7  # beside each other
            parts.append(f'<polyline class="c c{index}" fill="none" points="{scale.path(course)}"/>')
            parts.append(f'<text class="name" x="{end:.1f}" y="{height:.1f}" text-anchor="end">{letter}</text>')
    return _picture(parts, f"Training {runs[0][1]['aim']} of the runs over their steps")


def _course(values: Record, name: str) -> list[tuple[float, float]]:
    return _finite_pairs(zip(values["training"]["step"], values["training"][name], strict=True)) if values else []


def _scale(runs: Sequence[Record], courses: Sequence[Points], whole: Points = ()) -> _Scale | None:
    """The scale that all courses fit, each point of `whole` among them; None with less than two points."""
    losses = [loss for course in courses for _, loss in course]
    if len(losses) < 2:
        return None
    bottom, top = _bounds(losses, [loss for _, loss in whole])
    last = max([*(values["steps"] for values in runs), *(step for course in courses for step, _ in course)])
    return _Scale(last or 1, bottom, top)


def _picture(parts: Sequence[str], label: str) -> Markup:
    head = f'<svg class="curve" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">'
    return Markup(head + "".join(parts) + "</svg>")


def _axes(scale: _Scale) -> str:
    parts = []
    for loss in ticks(scale.low, scale.high):
        y = scale.y(loss)
        parts.append(f'<line class="rule" x1="{LEFT}" x2="{WIDTH - 8}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{loss:g}</text>')
    for step in ticks(0, scale.last, most=6):
        if step == round(step):  # between few steps there are marks of parts of one
            parts.append(f'<text x="{scale.x(step):.1f}" y="{HEIGHT - 6}" text-anchor="middle">{step:,.0f}</text>')
    return "".join(parts)


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """At most `most` round numbers from `low` to `high`."""
    if not high > low:
        return [low]
    raw = (high - low) / most
    power = 10 ** math.floor(math.log10(raw))
    step = next(power * nice for nice in (1, 2, 5, 10) if power * nice >= raw)
    first = math.ceil(low / step - 1e-9)
    return [round(number * step, 10) for number in range(first, math.floor(high / step + 1e-9) + 1)]


def _bounds(losses: Sequence[float], held_out: Sequence[float]) -> tuple[float, float]:
    """The lowest and the highest loss of the picture; the few highest of training would flatten it."""
    ordered = sorted(losses)
    low, high = ordered[0], max([ordered[min(len(ordered) - 1, int(0.995 * len(ordered)))], *held_out])
    room = 0.06 * (high - low) or 0.5
    return low - room, high + room


def _finite_pairs(pairs: Iterable[Any]) -> list[tuple[float, float]]:
    return [(float(step), float(loss)) for step, loss in pairs if loss is not None]


def progress(share: float, label: str) -> Markup:
    """A bar that is filled to this share."""
    return _bar("bar", label, 6, [("full", 0.0, 100 * min(max(share, 0.0), 1.0), "")])


def parts_bar(parts: Sequence[tuple[str, float]], room: float, label: str) -> Markup:
    """A bar of parts against the available room; the part beyond it has a colour of its own."""
    total = sum(num for _, num in parts)
    unit = 100 / max(total, room, 1.0)
    at, drawn = 0.0, []
    for index, (name, num) in enumerate(parts):
        drawn.append((f"part p{index % 6}", unit * at, unit * num, f"{name} {size(num)}"))
        at += num
    if total > room:
        drawn.append(("over", unit * room, unit * (total - room), f"{size(total - room)} too many"))
    return _bar("bar parts", label, 10, drawn)


def range_bar(low: float, value: float, high: float, label: str) -> Markup:
    """A value between its bounds, on a scale from nothing to the upper one."""
    unit = 100 / max(high, 1e-9)
    drawn = [("part p2", unit * low, unit * (high - low), ""), ("full", unit * value, 0.8, "")]
    return _bar("bar parts", label, 10, drawn)


def _bar(kind: str, label: str, height: int, drawn: Iterable[tuple[str, float, float, str]]) -> Markup:
    """Rectangles of (class, beginning, width, title) on a scale to 100."""
    piece = Markup('<rect class="{}" x="{:.2f}" width="{:.2f}" height="{}"><title>{}</title></rect>')
    every = [("ground", 0.0, 100.0, ""), *drawn]
    pieces = [piece.format(name, at, width, height, title) for name, at, width, title in every]
    head = Markup('<svg class="{}" viewBox="0 0 100 {}" preserveAspectRatio="none" role="img" aria-label="{}">')
    return head.format(kind, height, label) + Markup("").join(pieces) + Markup("</svg>")
