"""What a tuned model answers to rows: classes, numbers, tags or text, each row as it was put in training."""

# B rows, C classes

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tunesmith.data.batch import build_batch
from tunesmith.data.passes import fill_passes
from tunesmith.errors import DataError, InputError
from tunesmith.evaluation.generate import PromptLimit, Sampling, generate
from tunesmith.evaluation.predict_rows import sigmoid, softmax
from tunesmith.inference.lines import Answered, Line
from tunesmith.inference.load import Speaker
from tunesmith.models import contention
from tunesmith.models.forward import sequence_logits, token_logits
from tunesmith.models.modes import evaluating
from tunesmith.tasks import TASKS
from tunesmith.types import Batch, Example, Problem, Row, TaskName

Done = Callable[[int], None]
Warn = Callable[[Problem], None]

OUTSIDE = "O"
"""The tag of words outside of all spans."""
THRESHOLD = 0.5
"""Probability above which a class holds, where any number of them can and nothing else is asked for."""
DIGITS = 6
"""Of probabilities, after the point."""


@dataclass(frozen=True)
class Predictor:
    """Answers to rows, in their order, in passes of like lengths."""

    speaker: Speaker
    max_new_tokens: int = 256
    threshold: float | None = None
    """Probability above which a class holds where any number can, or from which on the second of two is answered."""

    def __post_init__(self) -> None:
        contention.watch()
        if self.speaker.head == "masked_token":
            raise InputError(
                "predict: this model fills in masked tokens: it has no answer to a row. Its measures: tunesmith eval."
            )
        if self.threshold is not None and not (self.is_many or self.positive):
            raise InputError(
                "predict: --threshold is for models that answer with any number of classes, or with one of two; this "
                "one does not."
            )

    @property
    def chunk_rows(self) -> int:
        """Rows answered at once: few where each takes long, for a call that is killed loses what it was at."""
        return 64 if self.writes else 512

    @property
    def writes(self) -> bool:
        """Whether it answers with text."""
        return self.speaker.head == "next_token"

    @property
    def is_many(self) -> bool:
        """Whether it answers with any number of classes, those above the threshold."""
        return self.speaker.labels is not None and self.speaker.labels.kind == "many"

    @property
    def positive(self) -> str | None:
        """Of two classes the second, which a threshold is about, as in the report; None where there are not two."""
        labels = self.speaker.labels
        return labels.names[1] if labels is not None and labels.kind == "one" and len(labels.names) == 2 else None

    @property
    def holds_above(self) -> float:
        """The threshold of each class, where any number can hold."""
        return THRESHOLD if self.threshold is None else self.threshold

    def identity(self) -> dict[str, str]:
        """What the answers follow from beside the rows, by name."""
        options = {"--max-tokens": str(self.max_new_tokens)} if self.writes else {}
        threshold = self.holds_above if self.is_many else self.threshold
        options |= {} if threshold is None else {"--threshold": str(threshold)}
        return {**self.speaker.identity(), **options}

    @property
    def task(self) -> TaskName:
        return self.speaker.renderer.task_name

    def __call__(self, examples: Sequence[Example], done: Done, warn: Warn) -> list[Answered]:
        """A line or a problem for each example."""
        if self.writes:
            return self._write(examples, done, warn)
        return self._label(examples, done, warn)

    def _write(self, examples: Sequence[Example], done: Done, warn: Warn) -> list[Answered]:
        key = TASKS[self.task].answer_key
        asked = [self._prompt(example, warn) for example in examples]
        results: list[Answered] = [prompt if isinstance(prompt, Problem) else {} for prompt in asked]
        prompts = {i: prompt for i, prompt in enumerate(asked) if not isinstance(prompt, Problem)}
        how = Sampling(max_new_tokens=self.max_new_tokens)
        for members in self._passes({i: len(ids) + self.max_new_tokens for i, ids in prompts.items()}, done):
            told = generate(self.speaker.model, self.speaker.renderer, [prompts[i] for i in members], how)
            for i, given in zip(members, told, strict=True):
                results[i] = {key: given.text}
                if not given.stopped and self.task != "text":  # which never comes to an end by itself
                    warn(self._cut_off(examples[i]))
        return results

    def _cut_off(self, example: Example) -> Problem:
        message = f"its answer was cut off at {self.max_new_tokens} tokens."
        return Problem(example.source, "answer_cut", message, "Raise --max-tokens.", severity="warning")

    def _prompt(self, example: Example, warn: Warn) -> list[int] | Problem:
        """What the model is given, if that leaves room for an answer."""
        room = PromptLimit.of(self.speaker.renderer, model_tokens=self.speaker.room, new_tokens=self.max_new_tokens)
        try:
            ids, cut = room.encode(self.speaker.renderer, example)
        except DataError as error:
            return Problem(example.source, "no_prompt", str(error))
        if not ids:
            return Problem(example.source, "no_prompt", "it holds no text: there is nothing to answer.")
        limit = room.limit(cut)
        if len(ids) > limit:
            message = f"its {len(ids):,} tokens are more than the {limit:,} that leave this model room for an answer."
            return Problem(example.source, "too_long", message, "Shorten it, or lower --max-tokens.")
        if cut:
            message = (
                f"its prompt has {cut:,} tokens more than the {room.cut_to:,} there is room for: they were cut off."
            )
            warn(Problem(example.source, "cut", message, severity="warning"))
        return ids

    def _label(self, examples: Sequence[Example], done: Done, warn: Warn) -> list[Answered]:
        is_tags = self.speaker.head == "tokens"
        asked = [_numbered(example) for example in examples] if is_tags else examples
        # The words of a row are its classes here: the labels of the encoded row then say which words have a token.
        words = {str(i): i for i in range(max((len(example.parts) for example in asked), default=0))}
        encoded = self.speaker.renderer.encode(asked, on_warning=warn, vocabulary=words)
        results: list[Answered] = [{} for _ in examples]
        rows: dict[int, Row] = {}
        for i, found in enumerate(encoded):
            first = found[0]
            if isinstance(first, Problem):
                results[i] = first
            else:
                rows[i] = first
        with evaluating(self.speaker.model):
            for members in self._passes({i: len(row.ids) for i, row in rows.items()}, done):
                batch = self._batch([rows[i] for i in members], members)
                told = self._tags(batch, rows, examples, warn) if is_tags else self._classes(batch)
                for i, line in zip(members, told, strict=True):
                    results[i] = line
        return results

    def _passes(self, lengths: Mapping[int, int], done: Done) -> Iterator[tuple[int, ...]]:
        """Rows of like length together; `done` hears how many are, after each pass."""
        most = self.speaker.tokens_per_pass(lengths.values())
        num_done = 0
        for members in fill_passes(list(lengths), list(lengths.values()), tokens_per_pass=most, layout="padded"):
            yield members
            num_done += len(members)
            done(num_done)

    def _batch(self, rows: Sequence[Row], members: Sequence[int]) -> Batch:
        return build_batch(
            rows,
            members,
            layout="padded",
            device=self.speaker.model.device,
            has_types=self.speaker.has_types,
            pad_id=self.speaker.pad_id,
        )

    def _classes(self, batch: Batch) -> Iterator[Line]:
        labels = self.speaker.labels
        assert labels is not None, "a sequence head answers with labels"
        logits_BC = self._logits(sequence_logits, batch)
        if labels.kind == "number":
            yield from ({"label": float(value)} for value in logits_BC[:, 0])
            return
        chances_BC = sigmoid(logits_BC) if labels.kind == "many" else softmax(logits_BC)
        for chances_C in chances_BC:
            probabilities = {name: round(float(p), DIGITS) for name, p in zip(labels.names, chances_C, strict=True)}
            answer: str | list[str]
            if labels.kind == "many":
                answer = [name for name, p in zip(labels.names, chances_C, strict=True) if p > self.holds_above]
            elif self.threshold is not None:
                answer = labels.names[int(chances_C[1] >= self.threshold)]
            else:
                answer = labels.names[int(chances_C.argmax())]
            yield {"label": answer, "probabilities": probabilities}

    def _tags(
        self, batch: Batch, rows: Mapping[int, Row], examples: Sequence[Example], warn: Warn
    ) -> Iterator[Answered]:
        """A tag a word: `OUTSIDE` for one that no token was left of; a problem where the model has no such tag."""
        labels = self.speaker.labels
        assert labels is not None, "a head for words answers with labels"
        best_N = self._logits(token_logits, batch).argmax(-1)
        cuts = np.cumsum([int(rows[i].trained.sum()) for i in batch.row_indices])[:-1]
        for i, of_row in zip(batch.row_indices, np.split(best_N, cuts), strict=True):
            word_ids = rows[i].labels
            assert word_ids is not None, "each word was given as a label"
            num_silent = len(examples[i].parts) - len(word_ids)
            if num_silent and OUTSIDE not in labels.names:
                message = f"{num_silent} of its words have no token that was read, and no tag stands for none."
                yield Problem(examples[i].source, "no_tag", message, "Shorten it, or leave such words out.")
                continue
            if num_silent:
                message = f"{num_silent} of its words have no token that was read: they are tagged {OUTSIDE}."
                warn(Problem(examples[i].source, "no_tag", message, severity="warning"))
            tags = [OUTSIDE] * len(examples[i].parts)
            for word, tag in zip(word_ids.tolist(), of_row.tolist(), strict=True):
                tags[word] = labels.names[tag]
            yield {"tags": tags}

    @torch.no_grad()
    def _logits(self, forward: Callable[[Any, Batch], torch.Tensor], batch: Batch) -> NDArray[np.float64]:
        return forward(self.speaker.model, batch).double().cpu().numpy()


def _numbered(example: Example) -> Example:
    return replace(example, labels=tuple(str(i) for i in range(len(example.parts))))
