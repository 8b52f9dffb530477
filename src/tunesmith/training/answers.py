"""Answers to held-out prompts, before the first step and after the last, written as rows are measured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

from tunesmith.evaluation.generate import SamplePrompt, sample_values
from tunesmith.generation.continuation import Continuation
from tunesmith.generation.padded import GeneratedAnswer
from tunesmith.generation.writer import AnswerWriter, cache_tokens
from tunesmith.recipe.schema import resolved
from tunesmith.training.progress import Session
from tunesmith.training.setup import Setup, answer_tokens
from tunesmith.types import JsonObject, OnProgress


def prompts_of(setup: Setup, name: str) -> list[SamplePrompt]:
    """The prompts to answer before training, during it or after it."""
    options = setup.recipe.evaluation
    most = {"before": resolved(options.samples_before), "step": options.samples_on_the_way}
    return setup.samples[: most.get(name)]


def writer_of(setup: Setup) -> AnswerWriter:
    """Writes the answers of the model as it is now."""
    return AnswerWriter(
        setup.model,
        setup.renderer,
        answer_tokens(setup.recipe.evaluation.sample_tokens, setup.rows),
        tokens_per_pass=setup.sampler.tokens_per_pass,
        cache=cache_tokens(setup.sampler.tokens_per_pass, recomputed=resolved(setup.recipe.train.checkpointed_layers)),
    )


def continuation(setup: Setup, name: str, tick: OnProgress = lambda what, done, total: None) -> Continuation | None:
    """Writes answers while rows are measured; None where that cannot be: rows are padded, or layers are split,
    so that every rank has to take part in every pass, or rows have branches, which are measured apart."""
    if setup.teacher is not None:  # rows are measured by what it finds, a row at a time
        return None
    prompts, is_packed = prompts_of(setup, name), setup.sampler.layout == "packed"
    if not prompts or not is_packed or setup.world.is_sharded or setup.rows.held_store.branches.has_any:
        return None
    texts = [sample for sample in prompts if not sample.images]  # what comes behind an image is decoded apart
    wanted = {row: len(texts[index].ids) for index, row in rows_of(texts, setup).items()}
    return Continuation(writer_of(setup), setup.task, wanted, tick=partial(tick, "answer"))


def rows_of(prompts: Sequence[SamplePrompt], setup: Setup) -> dict[int, int]:
    """The measured row for each prompt, by the number of the prompt: it begins with the prompt and learns the
    answer."""
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
    written = {} if writing is None else writing.answers
    own_part = [(row, answer.text, answer.stopped) for row, answer in written.items()]
    gathered = [entry for part in world.gather_values(own_part) for entry in part]
    of_rows = {row: GeneratedAnswer(text, stopped) for row, text, stopped in gathered}
    prompts = prompts_of(setup, name)
    rows = rows_of(prompts, setup) if of_rows else {}
    answers = {index: of_rows[row] for index, row in rows.items() if row in of_rows}
    left = [index for index in range(len(prompts)) if index not in answers]
    answers |= zip(left, _written(session, name, [prompts[index] for index in left]), strict=True)
    for index, sample in enumerate(prompts):
        yield sample_values(sample, answers[index])


def _written(session: Session, name: str, prompts: Sequence[SamplePrompt]) -> list[GeneratedAnswer]:
    """Write answers to prompts that begin no measured row, or whose model cannot continue one."""
    setup, ids = session.setup, [sample.ids for sample in prompts]
    rank, size = setup.world.part
    if size == 1 or setup.world.is_sharded:  # every rank takes part in every pass
        rank, size = 0, 1
    mine, images = ids[rank::size], [sample.images for sample in prompts][rank::size]
    writer, tell = writer_of(setup), session.listener.on_progress
    answers = writer.write(mine, lambda done: tell("answer", done, len(mine)), images=images)
    is_told = bool(mine) and name == "before" and setup.world.is_first and setup.kind != "encoder_decoder"
    if is_told and writer.why_padded:
        text = f"answers are written in padded batches, slower: {writer.why_padded}"
        session.emit("note", {"text": text, "aside": True})
    if size == 1:
        return answers
    ranks = setup.world.gather_values([(answer.text, answer.stopped) for answer in answers])
    return [GeneratedAnswer(*ranks[i % size][i // size]) for i in range(len(ids))]
