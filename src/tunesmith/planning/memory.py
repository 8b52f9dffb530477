"""Predicted peak memory: what is held throughout, and what comes on top of it while a pass, an update or a look runs.

    peak = run-time + max over phases of (held + transient)

    held        weights + float32 masters + optimizer state (+ gradients, from the second pass of a step on)
    step        for each layer forward what it keeps for the backward, then the head and its logits, then for each layer
                backward what it frees and the gradients it makes: the highest point on that way, from `tracing`
    update      gradients of everything that is trained
    evaluation  a forward of held-out rows, nothing kept

A layer counts as one of two kinds: as it is, or recomputed, which keeps its input alone and needs the rest of itself
again while it is gone back through (Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost").
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from tunesmith.planning.sketch import Kept, Stack
from tunesmith.planning.tracing import Segment


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes by what they are for, at the moment when they are most."""

    phase: str
    weights: int
    masters: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    """Kept for the backward, and what the layer at work needs."""
    logits: int = 0
    """Of the targets, and their gradients."""
    runtime: int = 0
    """Python, torch, and what they keep for themselves."""

    @property
    def total(self) -> int:
        return sum(self.parts().values())

    def parts(self) -> dict[str, int]:
        """Component → bytes."""
        names = ("weights", "masters", "gradients", "optimizer", "activations", "logits", "runtime")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True, slots=True)
class Pass:
    """What one pass does, both ways of treating its layers."""

    plain: Sequence[Segment]
    recomputed: Sequence[Segment]
    """Empty: not traced, since no layer is."""


def step_peak(kept: Kept, stacks: Sequence[Stack], one: Pass, *, recomputed: int, accumulating: bool) -> Memory:
    """The most that a pass forward and backward needs, or the update after it."""
    held = held_memory(kept)
    base = replace(held, gradients=kept.gradients if accumulating else 0)
    update = replace(held, phase="update", gradients=kept.gradients)
    return max(highest("step", base, timeline(one, stacks, recomputed)), update, key=lambda memory: memory.total)


def evaluation_peak(kept: Kept, stacks: Sequence[Stack], segments: Sequence[Segment]) -> Memory:
    """The most that measuring rows needs."""
    return highest("evaluation", held_memory(kept), timeline(Pass(segments, ()), stacks, 0))


def held_memory(kept: Kept) -> Memory:
    """What is there throughout."""
    return Memory("rest", weights=kept.weights, masters=kept.masters, optimizer=kept.optimizer)


def timeline(one: Pass, stacks: Sequence[Stack], recomputed: int) -> Iterator[Segment]:
    """Every segment of the whole model's pass in order, the first `recomputed` layers as such."""
    plain, again = ({segment.place: segment for segment in some} for some in (one.plain, one.recomputed))
    firsts = [sum(len(stack.like) for stack in stacks[:number]) for number in range(len(stacks))]
    told: set[tuple[str, int]] = set()
    for segment in one.plain:
        way, number, _ = segment.place
        if way not in ("forward", "backward"):
            yield segment
            continue
        if (way, number) in told:
            continue
        told.add((way, number))
        layers = list(enumerate(stacks[number].like))
        for index, like in layers if way == "forward" else reversed(layers):
            of = again if firsts[number] + index < recomputed else plain
            if (found := of.get((way, number, like))) is not None:  # below everything trained nothing goes back
                yield found


def highest(phase: str, base: Memory, segments: Iterator[Segment]) -> Memory:
    """The moment of a pass at which it holds most, on top of `base`."""
    alive = gradients = 0
    best = base
    for segment in segments:
        made = min(segment.gradients, segment.peak)
        inside = segment.peak - made
        is_head = (segment.place[0] == "between" and segment.gradients == 0) or segment.place[0] == "head"
        now = replace(
            base,
            phase=phase,
            gradients=base.gradients + gradients + made,
            activations=alive - gradients + (0 if is_head else inside),
            logits=inside if is_head else 0,
        )
        best = max(best, now, key=lambda memory: memory.total)
        alive += segment.delta
        gradients += segment.gradients
    return best
