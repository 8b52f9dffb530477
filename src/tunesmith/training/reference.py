"""The reference of a run that compares answers: log-probabilities of each branch under the model of step 1.

    rows/<side>/<key>-<digest>.reference    SHA-256 of the rest, then float64 [I, K]

The digest is of everything that the numbers follow from, so another run on the same rows with another loss
finds them next to the encoded rows in the folder of all runs.
"""

# I rows, K branches

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import orjson
import torch
import transformers
from numpy.typing import NDArray

from tunesmith.data.collate import Collator
from tunesmith.data.row_targets import write_reference
from tunesmith.errors import RunError
from tunesmith.evaluation.predict_rows import predict_rows
from tunesmith.recipe.schema import resolved
from tunesmith.runs.atomic import write_atomic
from tunesmith.training.progress import Session
from tunesmith.training.setup import Setup

TOLERANCE = {"float32": 0.002, "float16": 0.05, "bfloat16": 0.4}
"""Nats by which an answer of one trained token may be off between two passes; it grows with the root of their
number. In bfloat16 the largest seen is 0.14."""
LEAST_NATS = 0.01
MOST_NAMED_ROWS = 5


def use_reference(session: Session) -> None:
    """Find or compute the reference of all rows that are trained on or measured. Call it before `restore`.

    Only the first rank does; `share_reference` gives it to the others. Raises StorageError.
    """
    setup = session.setup
    if not setup.task.compares or not setup.world.is_first:
        return
    rows = setup.rows
    sides = ((rows.store, setup.collator, rows.train_rows), (rows.held_store, setup.held_collator, rows.held_rows))
    for store, collator, rows_I in sides:
        if not len(rows_I):  # nothing is held out
            continue
        run_folder = session.run.rows_path / ("train" if store is rows.store else "held_out")
        file = f"{store.key[:16]}-{_digest(setup, rows_I, collator)}.reference"
        by_path = {folder / file: _read(folder / file, len(rows_I)) for folder in (run_folder, store.folder)}
        known_IK = next((values for values in by_path.values() if values is not None), None)
        values_IK = _compute(session, collator, rows_I) if known_IK is None else known_IK
        for path in (path for path, values in by_path.items() if values is None):
            write_atomic(path, _packed(values_IK))
        write_reference(store, rows_I, values_IK)


def share_reference(setup: Setup) -> None:
    """Give every rank the reference of the first."""
    world = setup.world
    if not setup.task.compares or world.size == 1:
        return
    for store in dict.fromkeys((setup.rows.store, setup.rows.held_store)):
        of_rank = store.learnt.reference_IK
        content, *_ = world.gather(b"" if of_rank is None else _packed(of_rank))
        if (values_IK := _unpacked(content, len(store))) is not None:
            write_reference(store, np.arange(len(store)), values_IK)


def _compute(session: Session, collator: Collator, rows_I: NDArray[np.int64]) -> NDArray[np.float64]:
    setup = session.setup
    predictions = predict_rows(
        setup.model,
        setup.task,
        collator,
        rows_I.tolist(),
        tokens_per_pass=setup.sampler.tokens_per_pass,
        progress=lambda done, total: session.listener.on_progress("reference", done, total),
    )
    return np.array([result["logps"] for result in predictions.results], np.float64).reshape(len(rows_I), -1)


def _digest(setup: Setup, rows_I: NDArray[np.int64], collator: Collator) -> str:
    recipe = setup.recipe
    parts = {
        "format": 3,
        "model": {key: value for key, value in setup.identity.items() if key.startswith("model ")},
        "method": recipe.method.model_dump(mode="json"),
        "rows": hashlib.sha256(rows_I.tobytes()).hexdigest(),
        "computed": [recipe.precision, recipe.kernels, recipe.device, recipe.threads],
        "batches": [collator.layout, collator.shares, collator.pads],
        "tokens_per_pass": setup.sampler.tokens_per_pass,
        "seed": recipe.seed,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    return hashlib.sha256(orjson.dumps(parts, option=orjson.OPT_SORT_KEYS)).hexdigest()[:16]


def _packed(found_IK: NDArray[np.float64]) -> bytes:
    return hashlib.sha256(found_IK.tobytes()).digest() + found_IK.tobytes()


def _read(path: Path, num_rows: int) -> NDArray[np.float64] | None:
    """The numbers of a file that is there and whole."""
    try:
        return _unpacked(path.read_bytes(), num_rows)
    except OSError:
        return None


def _unpacked(content: bytes, num_rows: int) -> NDArray[np.float64] | None:
    is_whole = bool(content) and hashlib.sha256(content[32:]).digest() == content[:32]
    return np.frombuffer(content[32:], np.float64).reshape(num_rows, -1).copy() if is_whole else None


def check_start(setup: Setup) -> None:
    """Before the first update the model is its reference: raise RunError if it differs on step 1's rows.

    Then the loss of the first step of dpo is log 2.
    """
    if not setup.task.compares:
        return
    allowed, num = TOLERANCE[resolved(setup.recipe.precision)], 0
    away: list[tuple[float, str]] = []
    setup.model.train()
    for rows in setup.sampler.step(1):
        num += len(rows)
        results = setup.task.measure(setup.model, setup.collator.batch(rows, step=1)).results
        for row, result in zip(rows, results, strict=True):
            moved = np.nan_to_num(np.abs(np.subtract(result["logps"], result["reference"])), nan=np.inf)
            if (moved > np.maximum(LEAST_NATS, allowed * np.sqrt(result["lengths"]))).any():
                away.append((float(moved.max()), str(setup.store.source(row))))
    if not away:
        return
    farthest = sorted(away, reverse=True)[:MOST_NAMED_ROWS]
    named = ", ".join(f"{source} by {nats:.3g} nats" for nats, source in farthest)
    raise RunError(
        f"step 1: before any update the model differs from its reference in {len(away):,} of {num:,} rows: "
        f"{named}. The first loss of dpo would not be log 2, and every later one would be off by as much. "
        "Likely causes: dropout or another draw inside the model, a method that does not start from the base "
        "model, or a model that answers otherwise with other rows in its pass. Try kernels: plain, precision: "
        "float32 or another method. Nothing was trained."
    )
