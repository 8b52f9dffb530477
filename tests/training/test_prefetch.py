"""Batches made ahead for a CUDA device are the batches that are needed, in their order."""

import threading
from types import SimpleNamespace
from typing import Any

import pytest

from tunesmith.training.state import BatchKey, Prefetcher


class Feed:
    """Batches that name themselves; `log` holds the thread that made each."""

    def __init__(self, device: str = "cuda:0", fail: int | None = None) -> None:
        self.device, self.fail = device, fail
        self.log: list[tuple[Any, bool]] = []

    def batch(self, rows: Any, *, draw: int, copies: Any, lines: Any) -> Any:
        if rows == (self.fail,):
            raise ValueError("a damaged row")
        self.log.append(((draw, rows, copies), threading.current_thread() is threading.main_thread()))
        return SimpleNamespace(name=(draw, rows, copies))


def keys(step: int, *numbers: int) -> list[BatchKey]:
    return [BatchKey(step, (number,), (0,)) for number in numbers]


def names(batches: Any) -> list[Any]:
    return [batch.name for batch in batches]


def test_on_a_processor_each_is_made_when_it_is_needed():
    collator, ahead = Feed("cpu"), Prefetcher()
    batches = ahead.batches(collator, keys(1, 7, 8), lambda: pytest.fail("a processor looks at no other step"))
    next(batches)
    assert collator.log == [((1, (7,), (0,)), True)]
    assert names(batches) == [(1, (8,), (0,))]


def test_the_next_one_is_made_in_a_thread_over_the_end_of_a_step():
    collator, ahead = Feed(), Prefetcher()
    first, second = keys(1, 7, 8, 9), keys(2, 4, 5)
    assert names(ahead.batches(collator, first, lambda: second[0])) == [(1, (n,), (0,)) for n in (7, 8, 9)]
    assert names(ahead.batches(collator, second)) == [(2, (n,), (0,)) for n in (4, 5)]
    assert collator.log == [
        ((1, (7,), (0,)), True),
        *(((step, (n,), (0,)), False) for step, n in ((1, 8), (1, 9), (2, 4), (2, 5))),
    ]


def test_one_that_is_not_needed_any_more_is_thrown_away():
    collator, ahead = Feed(), Prefetcher()
    batches = ahead.batches(collator, keys(1, 7, 8))
    next(batches)  # memory ends in it: the step is made anew in other micro-batches
    assert names(ahead.batches(collator, keys(1, 5, 6))) == [(1, (5,), (0,)), (1, (6,), (0,))]


def test_an_error_of_the_thread_reaches_the_step_that_needs_its_batch():
    collator, ahead = Feed(fail=8), Prefetcher()
    batches = ahead.batches(collator, keys(1, 7, 8))
    next(batches)
    with pytest.raises(ValueError, match="a damaged row"):
        next(batches)


def test_a_run_takes_the_same_steps_with_batches_made_ahead(tmp_path, monkeypatch):
    from tiny_run import tiny_recipe
    from tunesmith.training import state
    from tunesmith.training.loop import training_steps
    from tunesmith.training.setup import prepare

    recipe = tiny_recipe(tmp_path, train={"tokens_per_pass": 40})
    straight = [event.values for event in training_steps(prepare(recipe, root=tmp_path))]
    monkeypatch.setattr(state, "works_ahead", lambda collator: True)
    setup = prepare(recipe, root=tmp_path)
    taken: list[bool] = []
    take = Prefetcher._take
    monkeypatch.setattr(
        Prefetcher,
        "_take",
        lambda self, collator, key: taken.append(self._ahead is not None) or take(self, collator, key),
    )
    assert [event.values for event in training_steps(setup)] == straight
    assert taken.count(False) == 1 < taken.count(True)
