"""What a model makes of some rows: seen of the tuned model and, in a new process, of what was exported.

    python -m tunesmith.export.probe JOB

reads a job's file, loads what was exported as others load it, and writes what it saw beside the job.
"""

# N targets, V vocabulary or classes

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from tunesmith.data.batch import build_batch
from tunesmith.data.feed import Masking
from tunesmith.data.labels import targets
from tunesmith.data.render import Renderer
from tunesmith.evaluation.forgetting import passages
from tunesmith.evaluation.generate import PromptLimit, sample_prompts
from tunesmith.export import loaders
from tunesmith.export.asked import Asked, Asks
from tunesmith.export.pre_tokenizers import PROBE
from tunesmith.export.sketches import Sketches, sketch_all
from tunesmith.inference.load import make_renderer, run_labels
from tunesmith.recipe import load
from tunesmith.recipe.schema import Base
from tunesmith.runs.folder import Run
from tunesmith.types import IGNORE, Batch, Example, Labels, Layout, Part, Row, Source

MOST_TOKENS = 8192
"""Of all rows together; the first row is always taken."""
POSITIONS = 8
"""Targets of a row whose logits are compared, evenly spread; losses are of all of them."""
ANSWER_TOKENS = 16


@dataclass(frozen=True)
class Seen:
    """What was seen of one model."""

    ids: list[list[int]]
    """Tokens of each row."""
    prompts: list[list[int]] = field(default_factory=list)
    """What serving would feed, of models that write."""
    losses: list[float] = field(default_factory=list)
    """Of each row, summed over its targets; empty where rows have no answers."""
    counts: list[int] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)
    texts: list[list[int]] = field(default_factory=list)
    """Tokens of fixed texts."""
    weights: Sketches = field(default_factory=dict)
    loaded_by: str = ""
    logits: list[NDArray[np.float32]] = field(default_factory=list)
    """[N, V] of each row."""
    vectors: bool = False
    """Whether these are vectors of texts, [1, D] each."""

    @property
    def loss(self) -> float | None:
        return sum(self.losses) / max(sum(self.counts), 1) if self.losses else None

    def save(self, folder: Path) -> None:
        facts = {key: value for key, value in vars(self).items() if key != "logits"}
        np.savez(folder / "logits.npz", *self.logits)
        (folder / "seen.json").write_text(json.dumps(facts), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Seen:
        facts = json.loads((folder / "seen.json").read_text("utf-8"))
        with np.load(folder / "logits.npz", allow_pickle=False) as arrays:
            return cls(**facts, logits=[arrays[f"arr_{i}"] for i in range(len(arrays.files))])


def look(
    asked: Asked,
    renderer: Renderer,
    examples: Sequence[Example],
    *,
    head: Asks,
    labels: Labels | None,
    masked: float,
    answered: bool = True,
) -> Seen:
    """What a model makes of the first rows of `examples`. `masked`: share of masked tokens; `answered` False leaves out
    prompts and answers."""
    rows = rows_of(renderer, examples, head=head, labels=labels, masked=masked)
    # Fixed texts hold what rules of splitting disagree on: blanks, digits, quotes, many scripts, code.
    texts = asked.split(renderer, [PROBE, *passages()])
    seen = Seen([row.ids.tolist() for row in rows], texts=texts, vectors=head == "vector")
    layout: Layout = "encoder_decoder" if renderer.kind == "encoder_decoder" else "padded"
    how: dict[str, Any] = {"decoder_start": asked.decoder_start, "has_types": asked.has_types}
    for row in rows:
        batch = build_batch([row], [0], layout=layout, device=asked.device, **how)
        logits_NV = asked.logits(batch)
        if len(logits_NV) == 0:
            continue
        if not seen.vectors and (row.labels is None or not _unanswered(row.labels)):
            seen.losses.append(float(_losses(logits_NV, batch, labels).double().sum()))
            seen.counts.append(batch.num_targets)
        kept = np.unique(np.linspace(0, len(logits_NV) - 1, POSITIONS).astype(np.int64))
        seen.logits.append(logits_NV[kept].numpy())
    if renderer.stop_ids and head == "next_token" and answered:
        prompts = _prompts(renderer, examples[: len(rows)])
        seen.prompts.extend(asked.read(renderer, prompts))
        seen.answers.extend(asked.answers(renderer, prompts, num_tokens=ANSWER_TOKENS))
    return seen


def rows_of(
    renderer: Renderer, examples: Sequence[Example], *, head: Asks, labels: Labels | None, masked: float
) -> list[Row]:
    """The first row of each example that has one, until there are MOST_TOKENS."""
    vocabulary: dict[str, int] = {}
    rows: list[Row] = []
    num_tokens = 0
    for encoded in renderer.encode(examples, vocabulary=vocabulary):
        first = encoded[0] if encoded else None
        if not isinstance(first, Row):
            continue
        num_tokens += len(first.ids)
        if rows and num_tokens > MOST_TOKENS:
            break
        rows.append(first)
    if head == "masked_token":
        masking = Masking.of(renderer.tokenizer, share=masked, seed=0)
        return [
            masking.apply(row, num=max(1, round(masked * int(row.trained.sum()))), draw=0, index=i)
            for i, row in enumerate(rows)
        ]
    if labels is None:
        return rows
    names = list(vocabulary)
    return [replace(row, labels=_targets(row, labels, names)) for row in rows]


def _targets(row: Row, labels: Labels, names: Sequence[str]) -> NDArray[np.generic]:
    assert row.labels is not None, "a row of a task with labels has places for them"
    ids = row.labels.astype(np.int64)
    return ids if _unanswered(ids) else targets(labels, ids, names)


def _unanswered(labels: NDArray[np.generic]) -> bool:
    return labels.dtype == np.int64 and labels.size > 0 and bool((labels == IGNORE).all())


def _losses(logits_NV: torch.Tensor, batch: Batch, labels: Labels | None) -> torch.Tensor:
    """Of each target, unweighted."""
    targets_N = batch.targets_N.cpu()
    if labels is not None and labels.kind == "number":
        return (logits_NV[:, 0] - targets_N).square()
    if labels is not None and labels.kind == "many":
        return F.binary_cross_entropy_with_logits(logits_NV, targets_N, reduction="none").sum(-1)
    return F.cross_entropy(logits_NV, targets_N, reduction="none")


def _prompts(renderer: Renderer, examples: Sequence[Example]) -> list[list[int]]:
    longest = renderer.max_tokens or MOST_TOKENS
    room = PromptLimit(longest, cut_to=longest)
    made = sample_prompts(renderer, examples, limit=room, new_tokens=ANSWER_TOKENS)
    return [list(prompt.ids) for prompt in made]


def write_job(
    path: Path, *, loader: str, exported: Path, recipe: Path, model: str, examples: Sequence[Example],
    base: Path | None = None,
) -> None:  # fmt: skip
    """The file that says what a new process is to load and look at. `model`: where that of the recipe is now; `base`:
    what an adapter is put on."""
    plain = [asdict(example) for example in examples]
    job = {"loader": loader, "exported": str(exported.resolve()), "recipe": str(recipe.resolve()), "examples": plain,
           "base": base and str(base.resolve()), "model": model}  # fmt: skip
    path.write_text(json.dumps(job), encoding="utf-8")


def do_job(path: Path) -> None:
    """Load what a job names, look at it, and write down what was seen beside the job."""
    job = json.loads(path.read_text("utf-8"))
    recipe = Run(Path(job["recipe"]).parent).dated(load.load(job["recipe"]))
    recipe = recipe.on_base(Base(recipe.model, job["model"]))
    torch.set_num_threads(recipe.threads if isinstance(recipe.threads, int) else 1)
    loaded = loaders.load(job["loader"], Path(job["exported"]), recipe, base=job["base"] and Path(job["base"]))
    labels = run_labels(recipe)
    renderer = make_renderer(recipe, loaded.tokenizer, loaded.kind)
    examples = [_example(plain) for plain in job["examples"]]
    asked = loaded.asked(renderer)
    seen = look(asked, renderer, examples, head=loaded.head, labels=labels, masked=recipe.train.masked)
    replace(seen, loaded_by=loaded.by, weights=sketch_all(loaded.weights())).save(path.parent)


def _example(plain: Mapping[str, Any]) -> Example:
    parts = tuple(Part(**part) for part in plain["parts"])
    rest = {"tools": tuple(plain["tools"]), "labels": tuple(plain["labels"]), "source": Source(**plain["source"])}
    return Example(**{**plain, **rest, "parts": parts})


if __name__ == "__main__":
    do_job(Path(sys.argv[1]))
