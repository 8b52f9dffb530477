"""A turn of `python -m benchmarks answers`: a run's answers to held-out prompts, before its first step.

    python answers_write.py JOB.json RESULT.json

A run measures the rows of these prompts too. What counts are the seconds that answers add to that. For this checkout,
and for one whose runs write their answers apart, in padded batches.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from given_rows import run

Write = Callable[[int], dict[int, list[int]]]
"""Most tokens of an answer → the tokens of each, by the number of its prompt."""
WARM_UP, LOOKS = 2, 2
"""Tokens of answers that are written before the clock is looked at; times that rows are measured without answers."""


def turn(job: dict[str, Any]) -> dict[str, Any]:
    """RESULT.json: {"seconds" of all answers of so many tokens, by their number, "ids": prompt and answer of each,
    "measuring": seconds of measuring the rows without answers}."""
    from tunesmith.environment.settings import prepare_environment
    from tunesmith.recipe.load import validate
    from tunesmith.training.setup import prepare

    prepare_environment(os.environ)
    recipe = validate({
        "model": job["model"], "method": {"name": "lora"}, "precision": job["precision"], "device": "cpu",
        "threads": job["threads"], "data": {"train": job["chats"][:1], "eval": job["chats"][1:]},
        "evaluation": {"samples": job["num"], "general": False, "surprising": 0},
    })  # fmt: skip
    setup = prepare(recipe, root=Path(job["folder"]) / "runs", offline=True)
    prompts = [list(sample.ids) for sample in setup.samples]
    row_of_source = {str(setup.rows.held_store.source(i)): i for i in reversed(setup.rows.held_rows.tolist())}
    rows = [row_of_source[sample.source] for sample in setup.samples]
    write, goes_on = _writer(setup, prompts, rows)
    write(WARM_UP)
    alone = min(_seconds(lambda: _measure(setup, rows)) for _ in range(LOOKS))
    seconds, ids = {}, {}
    for tokens in job["tokens"]:
        written: dict[int, list[int]] = {}
        took = _seconds(lambda most=tokens, into=written: into.update(write(most)))
        seconds[str(tokens)] = took - alone if goes_on else took
        ids[str(tokens)] = [{"prompt": prompt, "answer": written[i]} for i, prompt in enumerate(prompts)]
    return {"seconds": seconds, "ids": ids, "measuring": alone}


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _measure(setup: Any, rows: Sequence[int], **how: Any) -> None:
    from tunesmith.evaluation.predict_rows import predict_rows

    tokens = setup.sampler.tokens_per_pass
    predict_rows(setup.model, setup.task, setup.held_collator, rows, tokens_per_pass=tokens, **how)


def _writer(setup: Any, prompts: Sequence[Sequence[int]], rows: Sequence[int]) -> tuple[Write, bool]:
    """Writes answers to all prompts, and whether it measures their rows with them."""
    try:
        from tunesmith.generation import continuation
    except ImportError:
        return _padded(setup, prompts), False
    from tunesmith.generation.scheduler import Scheduler
    from tunesmith.training.answers import continuation as continued

    number, written = {row: i for i, row in enumerate(rows)}, dict[int, list[int]]()
    write_token, read = Scheduler._write, continuation.read_answer

    def noted(self: Any, answer: Any, token: Any) -> Any:
        i, request = number[answer.request.key], answer.request
        if i not in written:  # which has its first tokens behind the prompt
            written[i] = list(request.prompt[len(request.prompt) - request.resumed.written :])
        written[i].append(token.token_id)
        return write_token(self, answer, token)

    def known(renderer: Any, prompt: Sequence[int], ids: list[int]) -> Any:
        written.update({i: ids for i, asked in enumerate(prompts) if list(prompt) == asked})
        return read(renderer, prompt, ids)

    Scheduler._write = noted  # type: ignore[method-assign]
    continuation.read_answer = known

    def write(tokens: int) -> dict[int, list[int]]:
        written.clear()
        writing = continued(setup, "after")
        assert writing is not None, "rows are packed"
        writing = replace(writing, writer=replace(writing.writer, new_tokens=tokens))
        _measure(setup, rows, answering=writing)
        if writing.why:
            raise RuntimeError(f"answers were not continued: {writing.why}")
        return dict(written)

    return write, True


def _padded(setup: Any, prompts: Sequence[Sequence[int]]) -> Write:
    from tunesmith.evaluation import generate as padded

    read, stop_ids, written = padded.read_answer, set(setup.renderer.stop_ids), dict[int, list[int]]()

    def noted(renderer: Any, prompt: Sequence[int], ids: list[int]) -> Any:
        end = next((i + 1 for i, token in enumerate(ids) if token in stop_ids), len(ids))
        written.update({i: ids[:end] for i, asked in enumerate(prompts) if list(prompt) == asked})
        return read(renderer, prompt, ids)

    padded.read_answer = noted

    def write(tokens: int) -> dict[int, list[int]]:
        written.clear()
        for start in range(0, len(prompts), padded.ANSWER_BATCH):
            padded.generate(setup.model, setup.renderer, prompts[start : start + padded.ANSWER_BATCH], tokens)
        return dict(written)

    return write


if __name__ == "__main__":
    run(turn)
