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
    allocator: int = 0
    """What is free in blocks that the process does not give back: see `with_heap`."""
    heap: int = 0
    """No component: most bytes of small blocks that come and go in this phase."""
    mapped: int = 0
    """No component: the same of blocks that are mapped one by one."""
    held: int = 0
    """No component: of the total what neither comes nor goes in this phase."""

    @property
    def total(self) -> int:
        return sum(self.parts().values())

    def parts(self) -> dict[str, int]:
        """Component → bytes."""
        names = ("weights", "masters", "gradients", "optimizer", "activations", "logits", "runtime", "allocator")
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
    step = highest("step", base, timeline(one, stacks, recomputed))
    update = replace(step, phase="update", gradients=kept.gradients, activations=0, logits=0)
    return max(step, update, key=lambda memory: memory.total)


def evaluation_peak(kept: Kept, stacks: Sequence[Stack], segments: Sequence[Segment]) -> Memory:
    """The most that measuring rows needs."""
    return highest("evaluation", held_memory(kept), timeline(Pass(segments, ()), stacks, 0))


def held_memory(kept: Kept) -> Memory:
    """What is there throughout."""
    return Memory("rest", weights=kept.weights, masters=kept.masters, optimizer=kept.optimizer)


def with_heap(phases: Sequence[Memory], fragments: float, *, pinned: bool) -> list[Memory]:
    """What a processor's phases take with all that the C library keeps.

    `fragments` of its heap lie in holes that nothing fits into. What is free at its upper end goes back to the system,
    unless it is `pinned` by small things that came last and stay, as compiled products are: then the heap stays as
    large as in the phase that needed most of it, and large blocks are mapped beside it whenever they come.
    """
    if not pinned:
        return [replace(one, allocator=int(one.heap * fragments)) for one in phases]
    heap = int(max(phase.heap for phase in phases) * (1 + fragments))
    return [replace(one, allocator=max(0, heap + one.mapped - (one.total - one.held))) for one in phases]


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
    alive = mapped = gradients = 0
    heap_peak = mapped_peak = 0
    best = base
    for segment in segments:
        made = min(segment.gradients, segment.peak)
        inside = segment.peak - made
        is_head = (segment.place[0] == "between" and segment.gradients == 0) or segment.place[0] == "head"
        in_use = alive - gradients + (0 if is_head else inside)
        now = replace(
            base,
            phase=phase,
            # Of a table whose rows learn, the gradient is smaller than it is counted: the sum is what the pass holds.
            gradients=base.gradients + gradients + made + min(0, in_use),
            activations=max(0, in_use),
            logits=inside if is_head else 0,
        )
        best = max(best, now, key=lambda memory: memory.total)
        heap_peak = max(heap_peak, alive - mapped + segment.heap_peak)
        mapped_peak = max(mapped_peak, mapped + segment.mapped_peak)
        alive += segment.delta
        mapped += segment.mapped
        gradients += segment.gradients
    return replace(best, heap=heap_peak, mapped=mapped_peak, held=base.total)
