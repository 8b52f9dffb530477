"""`python -m benchmarks.padding`: how much of what padded passes compute is padding, with and without
`train.group_by_length`.

Lengths are drawn log-normally from a fixed seed; nothing is computed, so every machine prints the same tables.
"""

# I rows

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tunesmith.data.batch import Plan

STEPS = 512
MOST_ROWS = 65_536
"""Of an epoch: of large steps fewer are drawn."""
ROWS_PER_STEP = (8, 16, 64, 256, 1024)
FEW_STEPS = (16, 32, 64, 128, 256)


@dataclass(frozen=True, slots=True)
class Drawn:
    """Rows of one kind: of each side the median of the lengths, and the deviation of their logarithms."""

    name: str
    sides: tuple[tuple[float, float], ...]
    tokens_per_pass: int
    most: int
    """Tokens of a side, at which it is cut."""
    follows: float = 0.0
    """Deviation of the logarithm of target over source, where targets follow from their sources; 0: they do not."""

    def draw(self, num: int) -> list[NDArray[np.int32]]:
        """Lengths of `num` rows, side by side."""
        rng = np.random.default_rng(0)
        drawn = [rng.lognormal(np.log(median), sigma, num) for median, sigma in self.sides]
        if self.follows:
            drawn.append(drawn[0] * rng.lognormal(0.0, self.follows, num))
        return [np.clip(np.round(lengths_I), 3, self.most).astype(np.int32) for lengths_I in drawn]


LINES = (
    Drawn("short texts (median 12, σ 0.6)", ((12, 0.6),), 2048, 2048),
    Drawn("chats (median 90, σ 0.8)", ((90, 0.8),), 2048, 2048),
    Drawn("long rows (median 350, σ 0.35)", ((350, 0.35),), 4096, 4096),
)
PAIRS = (
    Drawn("summaries (350, σ 0.6, cut at 512 → 60, σ 0.4)", ((350, 0.6), (60, 0.4)), 4096, 512),
    Drawn("answers (200, σ 0.5 → 5, σ 0.5)", ((200, 0.5), (5, 0.5)), 4096, 2048),
    Drawn("translations (30, σ 0.6 → the same, σ 0.2)", ((30, 0.6),), 2048, 512, follows=0.2),
)


def plan_of(drawn: Drawn, *, rows_per_step: int, steps: int, grouped: bool) -> Plan:
    """An epoch of so many steps."""
    sides = drawn.draw(rows_per_step * steps)
    is_pair = len(sides) == 2
    return Plan(
        rows_I=np.arange(rows_per_step * steps),
        weights_I=np.ones(rows_per_step * steps),
        lengths_I=sum(sides[1:], start=sides[0]),
        targets_I=sides[1] if is_pair else None,
        rows_per_step=rows_per_step,
        tokens_per_pass=drawn.tokens_per_pass,
        layout="encoder_decoder" if is_pair else "padded",
        seed=0,
        groups_by_length=grouped,
    )


def told(plan: Plan) -> str:
    """Padding of an epoch, and the passes of a step."""
    passes = [rows for step in range(1, plan.steps_per_epoch + 1) for rows in plan.step(step)]
    share = 1 - int(plan.lengths_I.sum()) / sum(map(plan.computed, passes))
    return f"{100 * share:.1f} % in {len(passes) / plan.steps_per_epoch:.1f}"


def table(drawn: tuple[Drawn, ...], sizes: tuple[tuple[int, int], ...], first: str) -> Iterator[str]:
    """A row for each (rows a step, steps an epoch), named by `first`; without grouping → with it."""
    yield f"| {first} | {' | '.join(one.name for one in drawn)} |"
    yield f"|---:|{'---|' * len(drawn)}"
    for rows_per_step, steps in sizes:
        cells = []
        for one in drawn:
            made = [
                plan_of(one, rows_per_step=rows_per_step, steps=steps, grouped=grouped) for grouped in (False, True)
            ]
            cells.append(" → ".join(map(told, made)))
        size = f"{rows_per_step:,}" if first == "rows a step" else f"{steps:,}"
        yield f"| {size} | {' | '.join(cells)} |"


def planning_seconds(num_rows: int) -> tuple[float, float]:
    """To group all pools of an epoch, and to go to a step of another, of rows of two sides."""
    plan = plan_of(PAIRS[0], rows_per_step=16, steps=num_rows // 16, grouped=True)
    begun = time.process_time()
    for step in range(1, plan.steps_per_epoch, 256):
        plan.step(step)
    whole = time.process_time() - begun
    begun = time.process_time()
    plan.step(5 * plan.steps_per_epoch // 2)
    return whole, time.process_time() - begun


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.padding", description=__doc__)
    parser.add_argument("--steps", type=int, default=STEPS, help="of an epoch")
    options = parser.parse_args()
    by_rows = tuple((rows, min(options.steps, MOST_ROWS // rows)) for rows in ROWS_PER_STEP)
    by_steps = tuple((16, steps) for steps in FEW_STEPS)
    tables = (LINES, by_rows, "rows a step"), (PAIRS, by_rows[:3], "rows a step"), (LINES, by_steps, "steps an epoch")
    for drawn, sizes, first in tables:
        for line in table(drawn, sizes, first):
            print(line, flush=True)
        print()
    whole, resumed = planning_seconds(1_000_000)
    print(f"A million rows: {whole:.2f} s for all pools of an epoch, {resumed:.2f} s to a step of another.")


if __name__ == "__main__":
    main()
