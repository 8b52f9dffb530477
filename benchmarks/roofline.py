"""`python -m benchmarks.roofline`: how fast the products of a step alone would be here, beside what was raced.

The floor of a step is the time of its matrix products by themselves, in bfloat16, at the shapes that the model has:
forward, gradients of the inputs, and for full training of the weights; the head at the targets only. No attention,
norms, activations, optimizer or copies. Nobody who computes these products here in this precision can be faster.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.measured import machine, median_seconds
from benchmarks.train import OURS, Turn
from benchmarks.train_page import read_turns

Shapes = Counter[tuple[int, int]]
"""How often a model has a linear layer from so many numbers to so many."""


def shapes_of(model: nn.Module) -> tuple[Shapes, tuple[int, int]]:
    """Of the layers, and of the head."""
    found: Shapes = Counter()
    head = model.get_output_embeddings()
    for module in model.modules():
        if isinstance(module, nn.Linear) and module is not head:
            found[module.in_features, module.out_features] += 1
    return found, (head.in_features, head.out_features)


def floor_seconds(shapes: Shapes, head: tuple[int, int], *, tokens: int, targets: int, method: str, rank: int) -> float:
    """Of one step over `tokens`, of which `targets` are learnt."""
    trains = method == "full"
    total = sum(num * _product(*shape, tokens, weights=trains) for shape, num in shapes.items())
    total += _product(*head, targets, weights=trains)
    if not trains:  # A and B, with gradients of both: all that LoRA adds
        total += sum(
            num * (_product(size, rank, tokens, weights=True) + _product(rank, out, tokens, weights=True))
            for (size, out), num in shapes.items()
        )
    return total


def _product(size: int, out: int, tokens: int, *, weights: bool) -> float:
    """Seconds of x·Wᵀ, of the gradient of x, and where asked for of W: medians."""
    x, weight, dy = (torch.randn(*shape).bfloat16() for shape in ((tokens, size), (out, size), (tokens, out)))
    ways: list[Callable[[], Tensor]] = [lambda: x @ weight.t(), lambda: dy @ weight]
    if weights:
        ways.append(lambda: dy.t() @ x)
    return sum(median_seconds(way) for way in ways)


def rates(turns: Sequence[Turn]) -> dict[str, list[float]]:
    """Tokens a second of each contestant, ours first."""
    names = sorted({turn.name for turn in turns}, key=lambda name: (name != OURS, name))
    return {name: [turn.tokens_per_second for turn in turns if turn.name == name] for name in names}


def draw(groups: dict[str, dict[str, list[float]]], floors: dict[str, float], path: Path) -> None:
    """Bars of medians with every round as a dot, a line at the floor's rate: one panel for each set of settings."""
    from matplotlib.figure import Figure

    width = max(4.2, 1.0 * max(map(len, groups.values())))  # a name below each bar
    figure = Figure(figsize=(width * len(groups), 3.4), layout="constrained")
    for axes, (title, found) in zip(figure.subplots(1, len(groups), squeeze=False)[0], groups.items(), strict=True):
        for place, (name, values) in enumerate(found.items()):
            color = "#2f6f9f" if name == OURS else "#b9bec4"
            axes.bar(place, statistics.median(values), color=color, width=0.65)
            axes.plot([place] * len(values), values, "o", color="#222222", markersize=3)
        axes.axhline(floors[title], color="#a33b2c", linewidth=1)
        axes.annotate("matrix products alone", (0.98, floors[title]), xycoords=("axes fraction", "data"), ha="right",
                      va="bottom", fontsize=8, color="#a33b2c")  # fmt: skip
        axes.set_xticks(range(len(found)), [name.replace(", ", "\n") for name in found], fontsize=8)
        axes.set_title(title, fontsize=10)
        axes.set_ylabel("tokens/s")
        axes.set_ylim(0, 1.15 * floors[title])
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, format="svg", metadata={"Date": None})


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.roofline", description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="the work folder of python -m benchmarks train")
    parser.add_argument("--plot", type=Path, metavar="PLOT.svg")
    options = parser.parse_args(words)
    groups: dict[str, list[Turn]] = {}
    for turn in read_turns(options.work):
        if not turn.error:
            groups.setdefault(f"{turn.settings['method']}, rows {turn.settings['rows']}", []).append(turn)
    print(f"{machine()['processor']}\n\n| | floor, tokens/s | products' share of Tunesmith's step | of the peers' |")
    print("|---|---:|---:|---|")
    found, floors = {}, {}
    for title, turns in groups.items():
        found[title], floors[title] = rates(turns), _floor(options.work, turns[0].settings)
        shares = {name: statistics.median(values) / floors[title] for name, values in found[title].items()}
        peers = ", ".join(f"{name} {share:.0%}" for name, share in shares.items() if name != OURS)
        print(f"| {title} | {floors[title]:.0f} | {shares.get(OURS, 0):.0%} | {peers} |", flush=True)
    if options.plot:
        draw(found, floors, options.plot)


def _floor(work: Path, settings: Any) -> float:
    """Tokens a second of the products alone, of a step as long as those of the rows are in the mean."""
    torch.set_num_threads(settings["threads"])
    rows = json.loads((work / "rows" / settings["rows"] / "rows.json").read_text("utf-8"))["train"]
    tokens, targets = (
        round(settings["rows_per_step"] * statistics.mean(count(row) for row in rows))
        for count in (lambda row: len(row["ids"]), lambda row: sum(row["trained"][1:]))
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(settings["model"]))
    layers, head = shapes_of(model)
    how = {"tokens": tokens, "targets": targets, "method": settings["method"], "rank": settings["rank"]}
    return tokens / floor_seconds(layers, head, **how)


if __name__ == "__main__":
    main()
