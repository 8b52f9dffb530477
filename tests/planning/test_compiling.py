"""What libraries keep of products is counted by what a pass multiplies, and how many passes and lengths there are."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from tunesmith.data.sampler import StepSampler, padded_size
from tunesmith.planning import compiling
from tunesmith.planning.compiling import COMPILED, in_bfloat16, in_float32
from tunesmith.planning.memory import Memory, with_heap
from tunesmith.planning.tracing import MAPPED, Product, Segment, Tracer

LENGTHS = (100, 100, 90, 80, 70, 60)


def plan_with(tokens_per_pass: int = 200) -> StepSampler:
    return StepSampler(
        rows_I=np.arange(6), weights_I=np.ones(6), lengths_I=np.array(LENGTHS, np.int32), rows_per_step=2,
        tokens_per_pass=tokens_per_pass, layout="packed", seed=0,
    )  # fmt: skip


def segment(*kernels: int, dtype: torch.dtype = torch.bfloat16) -> Segment:
    made = Segment(("forward", 0, 0))
    for number, num in enumerate(kernels):
        made.products[Product(1, 3_000_000, dtype, f"shape {number}", num)] += 5
    return made


@pytest.fixture(autouse=True)
def roomy(monkeypatch):
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        monkeypatch.setenv(name, "512")


def test_matrices_are_compiled_once_a_size_and_attention_once_a_length():
    """Three steps of a pass each, of two sizes; five lengths, two of them in the pass that was looked at, which has 12
    for them."""
    plan = plan_with()
    assert len({padded_size(sum(plan.lengths_of(rows))) for step in (1, 2, 3) for rows in plan.step(step)}) == 2
    found = in_bfloat16(plan, 3, [segment(1, 1, 6, 6, 0)], [segment(1)], lengths_R=np.array([100, 90]))
    assert found.kept == COMPILED * (2 * 2 + 12 * 5 / 2 + compiling.PASSES_BEFORE)
    assert found.seconds == pytest.approx((2 * 2 / 3 + 30 / 3) * compiling.COMPILE_SECONDS)


def test_sizes_that_are_not_kept_are_compiled_throughout_a_long_run(monkeypatch):
    """A few sizes; where all are kept, a thousand steps compile them once each."""
    seconds = {}
    for most in ("100", "2"):
        for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
            monkeypatch.setenv(name, most)
        found = in_bfloat16(plan_with(), 1000, [segment(1, 1)], [], lengths_R=np.array([100, 90]))
        seconds[most] = found.seconds / (2 * compiling.COMPILE_SECONDS)
    assert seconds["100"] <= 6 / 1000
    assert seconds["2"] > 0.2


def test_sizes_that_come_again_are_compiled_again_where_there_is_no_room():
    assert compiling._compiled([32, 64, 32, 64, 32], 2) == (2, 0)
    assert compiling._compiled([32, 64, 32, 64, 32], 1) == (2, 3)
    assert compiling._compiled([32, 32, 64, 64], 0) == (2, 0)


def test_no_more_is_kept_than_both_caches_hold(monkeypatch):
    monkeypatch.setenv("LRU_CACHE_CAPACITY", "16")
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "8")
    found = in_bfloat16(plan_with(), 3, [segment(1, 1, 6, 6)], [], lengths_R=np.array([100, 90]))
    assert found.kept == COMPILED * 16
    # What attention to a length is thrown away is compiled again for every pass.
    assert found.seconds == pytest.approx((2 * 2 / 3 + 12) * compiling.COMPILE_SECONDS)


def test_float32_keeps_copies_of_its_largest_product_and_compiles_nothing():
    found = in_float32([segment(1, dtype=torch.float32), segment(1)])
    assert (found.kept, found.seconds) == (3_000_000, 0.0)


def traced(do) -> Segment:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), Tracer([], gradients=lambda: 0) as tracer:
        do()
    return tracer.close()[0]


def test_attention_of_a_long_row_has_more_compiled():
    def attend(tokens: int) -> list[int]:
        def do() -> None:
            q = torch.empty(1, 2, tokens, 64, dtype=torch.bfloat16).requires_grad_()
            F.scaled_dot_product_attention(q, q, q, is_causal=True).sum().backward()

        return sorted(one.kernels for one in traced(do).products)

    assert attend(500) == [0, 6]
    assert attend(800) == [0, 11]


def test_large_blocks_are_told_from_those_of_the_heap():
    def do() -> None:
        small = [torch.empty(MAPPED - 64, dtype=torch.uint8) for _ in range(2)]
        del small
        kept.append(torch.empty(MAPPED, dtype=torch.uint8))

    kept: list[torch.Tensor] = []
    found = traced(do)
    assert (found.heap_peak, found.mapped_peak, found.mapped) == (2 * (MAPPED - 64), MAPPED, MAPPED)
    assert found.peak == found.heap_peak, "they were not there at once"


PHASES = (
    Memory("step", weights=100, activations=50, heap=40, mapped=30, held=100),
    Memory("evaluation", weights=100, logits=25, heap=5, mapped=25, held=100),
)


def test_a_pinned_heap_stays_as_large_as_the_phase_that_needed_most_left_it():
    """50 at once at most, but 40 · 1.1 in the heap and 30 beside it; while measuring, the heap of the step and 25."""
    step, looking = with_heap(PHASES, 0.1, pinned=True)
    assert (step.total, looking.total) == (100 + 44 + 30, 100 + 44 + 25)


def test_planted_a_heap_that_is_given_back_would_be_seen():
    """As if every phase began with an empty heap: the measured runs in bfloat16 end with their evaluation highest."""
    pinned = with_heap(PHASES, 0.1, pinned=True)[1].total
    alone = with_heap([replace(PHASES[1])], 0.1, pinned=True)[0].total
    assert alone < pinned


def test_a_heap_that_nothing_pins_has_holes_alone():
    assert [one.allocator for one in with_heap(PHASES, 0.1, pinned=False)] == [4, 0]
