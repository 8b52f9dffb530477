"""Held-out prompts that a run answers before its first step and after its last, from rows that it measures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

from tunesmith.evaluation.generate import (
    GeneratedAnswer,
    SamplePrompt,
    answer_samples,
    prompt_batches,
    read_answer,
    sample_values,
)
from tunesmith.generation.continuation import Continuation, kept_passes
from tunesmith.recipe.schema import resolved
from tunesmith.training.progress import Session
from tunesmith.training.setup import Setup, answer_tokens
from tunesmith.types import JsonObject, OnProgress


def prompts_of(setup: Setup, name: str) -> list[SamplePrompt]:
    """The prompts that are answered before, at a step on the way, or after."""
    options = setup.recipe.evaluation
    most = {"before": resolved(options.samples_before), "step": options.samples_on_the_way}
    return setup.samples[: most.get(name)]


def continuation(setup: Setup, name: str, tick: OnProgress = lambda what, done, total: None) -> Continuation | None:
    """Writes answers while rows are measured; None where that cannot be: rows are padded, or layers are split,
    so that every rank has to take part in every pass, or rows have branches, which are measured apart."""
    if setup.teacher is not None:  # rows are measured by what it finds, a row at a time
        return None
    prompts, is_packed = prompts_of(setup, name), setup.sampler.layout == "packed"
    if not prompts or not is_packed or setup.world.is_sharded or setup.rows.held_store.branches.has_any:
        return None
    wanted = {row: len(prompts[index].ids) for index, row in rows_of(prompts, setup).items()}
    passes = kept_passes(resolved(setup.recipe.train.checkpointed_layers))
    return Continuation(
        model=setup.model,
        task=setup.task,
        stop_ids=frozenset(setup.renderer.stop_ids),
        new_tokens=answer_tokens(setup.recipe.evaluation.sample_tokens, setup.rows),
        wanted=wanted,
        most_tokens=passes * setup.sampler.tokens_per_pass,
        tick=partial(tick, "answer"),
    )


def rows_of(prompts: Sequence[SamplePrompt], setup: Setup) -> dict[int, int]:
    """Number of a prompt → the measured row that begins with it and learns what follows."""
    store, row_of_prompt = setup.rows.held_store, dict[int, int]()
    row_of_source = {str(store.source(row)): row for row in reversed(setup.rows.held_rows.tolist())}
    for number, sample in enumerate(prompts):
        if (index := row_of_source.get(sample.source)) is None:
            continue
        row, num_tokens = store.row(index), len(sample.ids)
        if row.trained[num_tokens : num_tokens + 1].any() and row.ids[:num_tokens].tolist() == list(sample.ids):
            row_of_prompt[number] = index
    return row_of_prompt


def samples(session: Session, name: str, writing: Continuation | None) -> Iterator[JsonObject]:
    """The values of the "sample" events of the prompts, in order; each rank writes some of the answers."""
    setup, world = session.setup, session.setup.world
    mine = [] if writing is None else [(row, ids) for row, ids in writing.answers.items()]
    written: dict[int, list[int]] = dict(pair for part in world.gather_values(mine) for pair in part)
    prompts = prompts_of(setup, name)
    rows = rows_of(prompts, setup) if written else {}
    answered: dict[int, GeneratedAnswer] = {}
    for index, sample in enumerate(prompts):
        if (ids := written.get(rows.get(index, -1))) is not None:
            answered[index] = read_answer(setup.renderer, sample.ids, ids)
    missing = _generated(session, [sample for index, sample in enumerate(prompts) if index not in answered])
    for index, sample in enumerate(prompts):
        yield sample_values(sample, answered[index]) if index in answered else next(missing)


def _generated(session: Session, prompts: list[SamplePrompt]) -> Iterator[JsonObject]:
    """Answers to prompts that begin no measured row, or whose model goes on from none."""
    setup, tick = session.setup, session.listener.on_progress
    new_tokens, most = answer_tokens(setup.recipe.evaluation.sample_tokens, setup.rows), setup.sampler.tokens_per_pass
    rank, size = setup.world.part
    if size == 1 or setup.world.is_sharded:  # every rank takes part in every pass
        yield from answer_samples(setup.model, setup.renderer, prompts, new_tokens, tick, most=most)
        return
    batches = prompt_batches(prompts, new_tokens, most)
    mine = [
        list(answer_samples(setup.model, setup.renderer, batch, new_tokens, tick, most=most))
        for batch in batches[rank::size]
    ]
    ranks = setup.world.gather_values(mine)
    for i in range(len(batches)):
        yield from ranks[i % size][i // size]
