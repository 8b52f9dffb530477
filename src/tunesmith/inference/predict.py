"""Predictions for rows: classes, numbers, tags, vectors or text, each row encoded as it was in training."""

# B rows, C classes

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from tunesmith.data.addresses import is_address
from tunesmith.data.collate import build_batch
from tunesmith.data.dataset import file_hash
from tunesmith.data.detect_format import FileFacts
from tunesmith.data.examples import examples
from tunesmith.data.read import expand_folders
from tunesmith.data.sampler import make_micro_batches, pass_cost
from tunesmith.errors import DataError, InputError
from tunesmith.evaluation.generate import PromptLimit
from tunesmith.evaluation.predict_rows import sigmoid, softmax
from tunesmith.generation.writer import AnswerWriter
from tunesmith.inference.load import LoadedModel
from tunesmith.inference.rows import Answered, Counts, Line, OutputFile, RowStream, read_file, read_list
from tunesmith.models.forward import logits_at_targets, sequence_logits
from tunesmith.models.modes import eval_mode
from tunesmith.recipe.schema import Data, DataFile
from tunesmith.tasks import TASKS
from tunesmith.tasks.embedding_losses import embed
from tunesmith.types import Batch, Example, Problem, Record, Row, TaskName, images_of

Done = Callable[[int], None]
Warn = Callable[[Problem], None]
Progress = Callable[[int, int], None]
"""Bytes of the file that are done, and all."""

OUTSIDE = "O"
"""The tag of words outside of all spans."""
THRESHOLD = 0.5
"""Probability above which a class holds, where any number of them can, by default."""
DIGITS = 6
"""Digits of probabilities after the point."""


@dataclass(frozen=True)
class Predictor:
    """Predicts rows in their order, in micro-batches of similar lengths."""

    loaded: LoadedModel
    max_new_tokens: int = 256
    threshold: float | None = None
    """Probability above which a class holds where any number can, or from which the second of two is given."""

    def __post_init__(self) -> None:
        if self.loaded.head == "masked_token":
            raise InputError(
                "predict: this model fills in masked tokens: it has no answer to a row. Its measures: tunesmith eval."
            )
        if self.threshold is not None and not (self.is_many or self.positive):
            raise InputError(
                "predict: --threshold is for models that answer with any number of classes, or with one of "
                "two; this one does not."
            )

    @property
    def chunk_rows(self) -> int:
        """Rows of a chunk: few where each takes long, because a killed call loses its chunk."""
        return 64 if self.writes else 512

    @property
    def writes(self) -> bool:
        """Whether predictions are text."""
        return self.loaded.head == "next_token"

    @property
    def is_many(self) -> bool:
        """Whether predictions are any number of classes, those above the threshold."""
        return self.loaded.labels is not None and self.loaded.labels.kind == "many"

    @property
    def positive(self) -> str | None:
        """The second of two classes, whose threshold can be set; None where there are not two."""
        labels = self.loaded.labels
        is_binary = labels is not None and labels.kind == "one" and len(labels.names) == 2
        return labels.names[1] if labels is not None and is_binary else None

    @property
    def holds_above(self) -> float:
        """The threshold of each class where any number can hold."""
        return THRESHOLD if self.threshold is None else self.threshold

    def identity(self) -> dict[str, str]:
        """Hashes and options that determine the predictions besides the rows, by name."""
        options = {"--max-tokens": str(self.max_new_tokens)} if self.writes else {}
        threshold = self.holds_above if self.is_many else self.threshold
        options |= {} if threshold is None else {"--threshold": str(threshold)}
        return {**self.loaded.identity(), **options}

    @property
    def task(self) -> TaskName:
        return self.loaded.renderer.task_name

    def __call__(self, examples: Sequence[Example], done: Done, warn: Warn) -> list[Answered]:
        """A line or a problem for each example."""
        if self.writes:
            return self._write(examples, done, warn)
        return self._label(examples, done, warn)

    def _write(self, examples: Sequence[Example], done: Done, warn: Warn) -> list[Answered]:
        key = TASKS[self.task].answer_key
        encoded = [self._prompt(example, warn) for example in examples]
        results: list[Answered] = [prompt if isinstance(prompt, Problem) else {} for prompt in encoded]
        prompts = {i: prompt for i, prompt in enumerate(encoded) if not isinstance(prompt, Problem)}
        images = [images_of(examples[i].parts) for i in prompts]
        answers = self._writer.write(list(prompts.values()), done, images=images)
        for i, answer in zip(prompts, answers, strict=True):
            results[i] = {key: answer.text}
            if not answer.stopped and TASKS[self.task].writes_answers:  # a continuation has no end
                message = f"its answer was cut off at {self.max_new_tokens} tokens."
                way = "Raise --max-tokens."
                warn(Problem(examples[i].source, "answer_cut", message, way, severity="warning"))
        return results

    @cached_property
    def _writer(self) -> AnswerWriter:
        return self.loaded.writer(self.max_new_tokens)

    def _prompt(self, example: Example, warn: Warn) -> list[int] | Problem:
        """The ids of the prompt, if they leave room for an answer."""
        room = PromptLimit.of(self.loaded.renderer, model_tokens=self.loaded.max_tokens, new_tokens=self.max_new_tokens)
        try:
            ids, cut = room.encode(self.loaded.renderer, example)
        except DataError as error:
            return Problem(example.source, "no_prompt", str(error))
        if not ids:
            return Problem(example.source, "no_prompt", "it holds no text: there is nothing to answer.")
        if why := self.loaded.without_vector(ids):
            return Problem(example.source, "no_vector", why)
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
        is_tags = self.loaded.head == "tokens"
        numbered = (
            [replace(example, labels=tuple(map(str, range(len(example.parts))))) for example in examples]
            if is_tags
            else examples
        )
        # The words of a row are its classes here: labels of the encoded row say which words have a token.
        words = {str(i): i for i in range(max((len(example.parts) for example in numbered), default=0))}
        encoded = self.loaded.renderer.encode(numbered, on_warning=warn, vocabulary=words)
        results: list[Answered] = [{} for _ in examples]
        rows: dict[int, Row] = {}
        for i, encoded_rows in enumerate(encoded):
            first = encoded_rows[0]
            if isinstance(first, Problem):
                results[i] = first
            elif why := self.loaded.without_vector(first.ids):
                results[i] = Problem(first.source, "no_vector", why)
            else:
                rows[i] = first
        with eval_mode(self.loaded.model):
            for members in self._passes({i: len(row.ids) for i, row in rows.items()}, done):
                batch = self._batch([rows[i] for i in members], members)
                lines = self._tags(batch, rows, examples, warn) if is_tags else self._lines(batch)
                for i, line in zip(members, lines, strict=True):
                    results[i] = line
        return results

    def _passes(self, lengths: Mapping[int, int], done: Done) -> Iterator[tuple[int, ...]]:
        """Indices of rows of similar length; `done` gets how many rows are, after each micro-batch."""
        most = self.loaded.tokens_per_pass
        num_done, cost = 0, pass_cost(self.loaded.model.device)
        for members in make_micro_batches(
            list(lengths), list(lengths.values()), tokens_per_pass=most, layout="padded", cost=cost
        ):
            yield members
            num_done += len(members)
            done(num_done)

    def _batch(self, rows: Sequence[Row], members: Sequence[int]) -> Batch:
        return build_batch(
            rows,
            members,
            layout="padded",
            device=self.loaded.model.device,
            has_types=self.loaded.has_types,
            pad_id=self.loaded.pad_id,
            pools=self.loaded.head == "vector",
        )

    def _lines(self, batch: Batch) -> Iterator[Line]:
        if self.loaded.head != "vector":
            return self._classes(batch)
        vectors_LD = embed(self.loaded.model, batch, self.loaded.recipe.embed)
        return ({"embedding": vector_D} for vector_D in vectors_LD.tolist())

    def _classes(self, batch: Batch) -> Iterator[Line]:
        labels = self.loaded.labels
        assert labels is not None, "a sequence head answers with labels"
        logits_BC = self._logits(sequence_logits, batch)
        if labels.kind == "number":
            key = TASKS[self.task].answer_key or "label"
            yield from ({key: float(value)} for value in logits_BC[:, 0])
            return
        chances_BC = sigmoid(logits_BC) if labels.kind == "many" else softmax(logits_BC)
        for chances_C in chances_BC:
            chances = zip(labels.names, chances_C, strict=True)
            probabilities = {name: round(float(chance), DIGITS) for name, chance in chances}
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
        """A tag a word: `OUTSIDE` for one without a token; a problem where the model has no such tag."""
        labels = self.loaded.labels
        assert labels is not None, "a head for words answers with labels"
        best_N = self._logits(logits_at_targets, batch).argmax(-1)
        cuts = np.cumsum([int(rows[i].trained.sum()) for i in batch.row_indices])[:-1]
        for i, of_row in zip(batch.row_indices, np.split(best_N, cuts), strict=True):
            word_ids = rows[i].labels
            assert word_ids is not None, "each word was given as a label"
            num_silent = len(examples[i].parts) - len(word_ids)
            if num_silent and OUTSIDE not in labels.names:
                message = f"{num_silent} of its words have no token that was read, and the model has no tag for that."
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
        return forward(self.loaded.model, batch).cpu().double().numpy()


def predict_to(
    out: Path,
    predictor: Predictor,
    path: str,
    *,
    bare: bool = False,
    keep: Sequence[str] = (),
    overwrite: bool = False,
    progress: Progress = lambda done, total: None,
    say: Callable[[str], None] = lambda text: None,
) -> Counts:
    """Predict all rows of a file into the file `out`, from where an earlier call left off. Without an answer
    there is no file.

    Raises:
        InputError: `out` holds something else, was made from another file or model, or is the file itself.
        DataError: the file, or what is left of it, cannot be read; the lines before are kept. StorageError.
    """
    if out.exists() and Path(path).exists() and out.samefile(path):
        raise InputError(f"{out}: these are the rows themselves. Choose another --out.")
    output = OutputFile(out, fingerprint(predictor, path, bare=bare, keep=keep), kept=keep, overwrite=overwrite)
    try:
        if output.num_lines:
            say(f"{out}: continues after {output.num_lines:,} rows")
        skip = output.num_lines
        counts = predict_file(predictor, path, output.write, bare=bare, keep=keep, skip=skip, progress=progress)
        counts.errors += output.num_errors
        counts.answered += output.num_lines - output.num_errors
        if counts.answered:
            output.finish()
        else:
            output.discard()
    finally:
        output.close()
    return counts


def fingerprint(predictor: Predictor, path: str, *, bare: bool, keep: Sequence[str] = ()) -> dict[str, str]:
    """Hashes of rows, model and renderer, and every option, by name: the lines follow from them."""
    data, usual = predictor.loaded.recipe.data, Data()
    expanded = expand_folders([DataFile(path=path)], lambda warning: None, how=data.reading)
    # The path of a file is part of every line, as its source; one that is missing is refused when it is read.
    files = (file for file in expanded if is_address(file.path) or Path(file.path).is_file())
    hashes = [f"{file.path} {file_hash(file)}\n" for file in files]
    rows = hashlib.sha256("".join(hashes).encode("utf-8", "surrogateescape")).hexdigest()
    fields = ", ".join(["bare" if bare else "echoed", *keep, "reference"])
    is_usual = (data.reading, data.limits) == (usual.reading, usual.limits)
    read_as = {} if is_usual else {"reading": f"{data.reading} {data.limits}"}
    return {**predictor.identity(), "fields": fields, "rows": rows, **read_as, **_image_hash(predictor, path)}


def _image_hash(predictor: Predictor, path: str) -> dict[str, str]:
    """The hash of all images that the rows of a file show, by its name; nothing where they show none. A row
    names an image by its path, so it stays the same when its image changes."""
    if predictor.loaded.renderer.placeholders is None:
        return {}
    data, digest = _own_folder(predictor), hashlib.sha256()
    nothing = digest.digest()
    options = cast(Any, {"task": predictor.task, "answered": False})
    for _, example in examples([DataFile(path=path)], data, lambda problem: None, **options):
        for image in example.images:
            digest.update(image.sha256.encode())
    return {} if digest.digest() == nothing else {"images": digest.hexdigest()}


def _own_folder(predictor: Predictor) -> Data:
    """The options by which rows are read: their images lie beside them, wherever the run had its images."""
    return predictor.loaded.recipe.data.model_copy(update={"image_folder": None})


def predict_file(
    predictor: Predictor,
    path: str,
    write: Callable[[Sequence[Line]], None],
    *,
    bare: bool = False,
    keep: Sequence[str] = (),
    skip: int = 0,
    progress: Progress = lambda done, total: None,
) -> Counts:
    """Predict the rows of a file and pass lines to `write` as they are made; the first `skip` of them were
    written before."""
    facts: list[FileFacts] = []

    def tick(done: int, of_chunk: int) -> None:
        if facts:  # bytes of the file that are done, as far as the rows that were read are answered
            read = max(facts[-1].rows, 1)
            progress(round(facts[-1].done_bytes * (read - of_chunk + done) / read), facts[-1].total_bytes)

    stream = RowStream(predictor, write, chunk_rows=predictor.chunk_rows, bare=bare, skip=skip, tick=tick)
    read_file(path, _own_folder(predictor), predictor.task, stream, facts, keep=keep)
    stream.flush()
    return stream.counts


def predict_list(predictor: Predictor, rows: Iterable[str | Record], *, bare: bool = False) -> list[Line]:
    """A line for each of some texts or rows, in their order and without a source."""
    lines: list[Line] = []
    stream = RowStream(predictor, lines.extend, chunk_rows=predictor.chunk_rows, bare=bare)
    read_list(rows, predictor.loaded.recipe.data, predictor.task, stream)
    stream.flush()
    return [{name: value for name, value in line.items() if name != "source"} for line in lines]
