"""Predictions of a model for encoded rows: the lines of evaluation/<name>.jsonl that metrics follow from."""

# I rows, C classes, N targets of a row

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load, save
from torch import nn

from tunesmith.data.collate import Collator
from tunesmith.data.dataset import RowStore
from tunesmith.data.labels import count_classes
from tunesmith.data.sampler import micro_batches_of
from tunesmith.evaluation.scores import Constant, RowResult
from tunesmith.generation.continuation import Continuation
from tunesmith.models.machine import to_host
from tunesmith.models.modes import eval_mode
from tunesmith.parallel.shares import shares
from tunesmith.parallel.world import World
from tunesmith.tasks.task import BoundTask
from tunesmith.types import HeadName, JsonObject, Labels, Record

MOST_ROW_CHARS = 10_000
"""Characters of a row's text that are written down."""
MOST_HIGH_LOSS = 20
"""Training rows of high loss that are listed."""
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Predictions:
    """The losses and outputs of a model for some rows, in their order."""

    losses_I: Floats
    """Loss of each row, summed over its targets: nats, or squared error."""
    counts_I: Floats
    """Share of each row in the denominator of the loss."""
    num_bytes_I: NDArray[np.int64]
    """UTF-8 bytes that the row's targets spell; 0 for rows that are not documents."""
    outputs: list[NDArray[np.generic]]
    """The likeliest token or tag of each target, int64 [N]; of sequence heads logits or number [1, C]."""
    targets: list[NDArray[np.generic]]
    """The right answer: int64 [N]; of sequence heads int64 [1], float32 [1] or float32 [1, C]."""
    results: list[Record] = field(default_factory=list)
    """Results of rows with branches, in place of outputs and targets: see `Measured.results`."""

    def __len__(self) -> int:
        return len(self.losses_I)


def predict_rows(
    model: nn.Module,
    task: BoundTask,
    collator: Collator,
    rows: Sequence[int],
    *,
    tokens_per_pass: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
    world: World | None = None,
    answering: Continuation | None = None,
) -> Predictions:
    """Predictions for the given rows of the collator's store, in the order given. `answering`: goes on from the
    prompts of rows that this process reads.

    They do not depend on how rows are cut into micro-batches, and no random number of the loop is consumed: the
    mask of a row follows from the row alone. The micro-batches are dealt to the ranks of `world`, and every
    rank gets all predictions: with the bits that one process gives.
    """
    store, world = collator.store, world or World()
    place = {row: i for i, row in enumerate(rows)}
    losses_I = np.zeros(len(rows))
    outputs: list[NDArray[np.generic]] = [np.empty(0)] * len(rows)
    targets: list[NDArray[np.generic]] = [np.empty(0)] * len(rows)
    results: dict[int, Record] = {}
    done = 0
    settings: dict[str, Any] = {"layout": collator.layout, "device": collator.device}
    batches = micro_batches_of(store, rows, tokens_per_pass=tokens_per_pass, **settings)
    dealt = shares([int(store.lengths[list(members)].sum()) for members in batches], world.size)
    mine = dealt[world.rank]
    with eval_mode(model):
        for _ in range(max(map(len, dealt)) - len(mine) if world.is_sharded else 0):  # ranks have equal passes
            task.measure(model, collator.batch(batches[0], step=0))
        for members in map(batches.__getitem__, mine):
            batch = collator.batch(members, step=0)
            measured = (answering or task).measure(model, batch)
            done += len(members)
            progress(done, len(rows))
            if measured.results:
                measured_rows = zip(members, measured.losses_N.tolist(), measured.results, strict=True)
                for member, loss, result in measured_rows:
                    losses_I[place[member]], results[place[member]] = loss, result
                continue
            row_of_N, losses_N, *answers = (
                tensor.numpy()
                for tensor in to_host(batch.row_of_N, measured.losses_N, measured.outputs_N, batch.targets_N)
            )
            sums = np.bincount(row_of_N, losses_N, minlength=len(members))
            cuts = np.flatnonzero(np.diff(row_of_N)) + 1
            parts = (np.split(values, cuts) for values in answers)
            for member, loss, output, target in zip(members, sums, *parts, strict=True):
                i = place[member]
                losses_I[i], outputs[i], targets[i] = loss, output, target
    if answering:
        answering.finish()
    if world.size > 1:
        _gather(world, [place[row] for i in mine for row in batches[i]], losses_I, outputs, targets)
        results = {i: result for part in world.gather_values(sorted(results.items())) for i, result in part}
    in_order, index = [results[i] for i in sorted(results)], np.asarray(rows, np.int64)
    num_bytes_I = store.num_bytes[index].astype(np.int64)
    return Predictions(losses_I, store.denominators[index], num_bytes_I, outputs, targets, in_order)


def _gather(
    world: World,
    places: Sequence[int],
    losses_I: Floats,
    outputs: list[NDArray[np.generic]],
    targets: list[NDArray[np.generic]],
) -> None:
    """Fill in what other ranks predicted; `places`: those that this rank did."""
    mine: dict[str, NDArray[Any]] = {"places": np.asarray(places, np.int64), "losses": losses_I[list(places)]}
    for name, parts in (("outputs", outputs), ("targets", targets)):
        predicted = [parts[i] for i in places]
        mine[f"{name} sizes"] = np.array([len(part) for part in predicted], np.int64)
        if predicted:
            mine[name] = np.concatenate(predicted)
    for content in world.gather(save(mine)):
        received = load(content)
        losses_I[received["places"]] = received["losses"]
        for name, parts in (("outputs", outputs), ("targets", targets)):
            if name in received:
                cut = np.split(received[name], np.cumsum(received[f"{name} sizes"])[:-1])
                for i, part in zip(received["places"].tolist(), cut, strict=True):
                    parts[i] = part


def row_results(
    head: HeadName, labels: Labels | None, found: Predictions, hashes_I: NDArray[np.uint64]
) -> list[RowResult]:
    """One JSON-ready result a row: hash, loss, count, and what was predicted.

    Tokens have `correct`; classes `label`, `predicted` and the `probability` of the prediction (lists where a
    row has any number of classes); numbers `value` and `predicted`; words `tags` and `predicted`. Where the
    loss covers the whole text of a document's window, `bytes` is the size of that text.
    """
    sums = (hashes_I.tolist(), found.losses_I.tolist(), found.counts_I.tolist(), found.num_bytes_I.tolist())
    results: list[RowResult] = []
    for hash_, loss, count, num_bytes, fields in zip(*sums, _predicted(head, labels, found), strict=True):
        size = {"bytes": num_bytes} if num_bytes > 0 and head == "next_token" else {}
        results.append({"hash": f"{hash_:016x}", "loss": loss, "count": count, **size, **fields})
    return results


def _predicted(head: HeadName, labels: Labels | None, found: Predictions) -> Iterator[JsonObject]:
    if found.results:
        yield from found.results  # type: ignore[misc]
        return
    pairs = zip(found.outputs, found.targets, strict=True)
    if head in ("next_token", "masked_token"):
        yield from ({"correct": int(np.sum(output == target))} for output, target in pairs)
        return
    assert labels is not None  # a head that answers with classes or numbers has them
    names = labels.names
    for output, target in pairs:
        if labels.kind == "tags":
            yield {"tags": [names[i] for i in target.tolist()], "predicted": [names[i] for i in output.tolist()]}
            continue
        true_C, output_C = target.reshape(-1).astype(np.float64), output.reshape(-1).astype(np.float64)
        if labels.kind == "number":
            yield {"value": float(true_C[0]), "predicted": float(output_C[0])}
        elif labels.kind == "many":
            chances_C = sigmoid(output_C)
            above = np.flatnonzero(chances_C > 0.5)
            yield {
                "label": [names[i] for i in np.flatnonzero(true_C > 0)],
                "predicted": [names[i] for i in above],
                "probability": chances_C[above].tolist(),
            }
        else:
            chances_C = softmax(output_C)
            best = int(chances_C.argmax())
            yield {"label": names[int(true_C[0])], "predicted": names[best], "probability": float(chances_C[best])}


def softmax(logits: Floats) -> Floats:
    """Probability of each class where just one holds, over the last axis."""
    shifted = np.exp(logits - logits.max(-1, keepdims=True))
    return np.asarray(shifted / shifted.sum(-1, keepdims=True), np.float64)


def sigmoid(logits: Floats) -> Floats:
    """Probability of each class where each holds or not by itself."""
    return np.asarray((1 + np.tanh(logits / 2)) / 2, np.float64)  # exp would overflow for large negative logits


def row_lines(
    store: RowStore,
    rows_I: NDArray[np.int64],
    results: Iterable[RowResult],
    *,
    tokenizer: Any,
    texts: Iterable[str | None],
) -> Iterator[JsonObject]:
    """Each row's result with its "source" and "text"; a text that is None is written as its tokens spell it."""
    for row, result, row_text in zip(map(int, rows_I), results, texts, strict=True):
        text = row_text
        if text is None:
            text = str(tokenizer.decode(store.row(row).ids.tolist(), skip_special_tokens=True))
        shown = text if len(text) <= MOST_ROW_CHARS else text[:MOST_ROW_CHARS] + " …"
        yield {"source": str(store.source(row)), "hash": result["hash"], "text": shown, **result}


def sample_rows(store: RowStore, rows_I: NDArray[np.int64], most: int) -> NDArray[np.int64]:
    """The `most` rows of smallest content hash: the same sample whatever the order of the rows."""
    hashes_I = store.hashes[rows_I]
    if most < len(rows_I):  # larger hashes are not sorted: a million take long, and a plan does it often
        near_I = hashes_I <= np.partition(hashes_I, most)[most]
        rows_I, hashes_I = rows_I[near_I], hashes_I[near_I]
    return rows_I[np.argsort(hashes_I, kind="stable")][:most]


def highest_loss(lines: Iterable[JsonObject]) -> list[JsonObject]:
    """The lines of highest loss per target, the highest first."""
    return sorted(lines, key=lambda line: -line["loss"] / line["count"])[:MOST_HIGH_LOSS]


def constant_answer(labels: Labels | None, store: RowStore, rows_I: NDArray[np.int64]) -> Constant | None:
    """The best answer without reading a row, by the labels of some rows: their commonest class (of tags: the
    commonest tag), the classes that most rows have where a row has any number of them, or the mean of their
    numbers."""
    if labels is None or len(rows_I) == 0:
        return None
    if labels.kind == "number":
        seen = store.count_labels(rows_I)
        return float(np.average([float(name) for name in seen.names], weights=seen.counts_V))
    counts_C = count_classes(store.count_labels(rows_I), labels.names)
    if labels.kind == "many":
        return [labels.names[i] for i in np.flatnonzero(counts_C * 2 > len(rows_I))]
    return labels.names[int(counts_C.argmax())]
