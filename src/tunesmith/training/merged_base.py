"""The model that a run starts from where that is the result of another run: its folder, or its adapter merged
into its base, and how far that is from what was measured."""

# N targets, V vocabulary or classes

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tunesmith.data.collate import Collator
from tunesmith.data.dataset import open_kept
from tunesmith.data.row_targets import write_targets
from tunesmith.errors import RunError
from tunesmith.inference.load import LoadedModel, load_run
from tunesmith.inference.measure import feed, masked_share
from tunesmith.models.forward import hidden_at_targets, logits_at_targets, sequence_logits
from tunesmith.models.memory import free_cached_memory
from tunesmith.models.modes import eval_mode
from tunesmith.models.resolve_model import ModelRef
from tunesmith.models.save import save_model
from tunesmith.phrases import percent, size
from tunesmith.runs.atomic import from_json, remove, sha256_file, to_json, write_atomic
from tunesmith.runs.folder import Run, is_run

MERGE_WAIT_S = 300.0
"""Longest wait for another process that has the run which a run starts from, such as to merge its adapter."""
FACTS = "merged.json"
"""File in a merged base with its distance from the result that was measured."""
MADE_OF = "merged-from.json"
"""File in a merged base with the SHA-256 of each file of its adapter, written last."""
COMPARED_ROWS = 16
"""Held-out rows, or else rows of the training, that both are compared on."""
MOST_TARGETS = 64
"""Most targets of a row that are compared, spread over it: each has a number for all of the vocabulary."""
MOST_KL = 5e-3
"""Largest mean KL divergence, in nats, of a merged base whose answers count as equal: as of a 16-bit export."""


MOST_LOSS, MOST_ERROR = 0.02, 0.01
"""Largest change of its loss, in nats, and of vectors and numbers, as a share of them."""


@dataclass(frozen=True, slots=True)
class Distance:
    """The distance of a merged base in 16 bits from the result that was measured."""

    words: str
    needs_float32: bool = False


@dataclass(frozen=True, slots=True)
class Start:
    """The model to load where a recipe names a run, and what the new run has to know of that run."""

    model: str
    note: str | None = None
    """The run that the model is the result of, in words; None: it is no run's."""
    precision: str | None = None
    """The precision that it needs so as to answer as it was measured; None: any."""


def start_from(model: str, *, root: Path, offline: bool) -> Start:
    """The model that `model` names: a run by its folder, its name in `root` or "last", or any other model.

    The beginning of a name is not enough here: `gpt2` is a model, whatever runs begin so. Raises RunError for a
    run without a result.
    """
    is_whole_name = model == "last" or Path(model).exists() or (root / model / "run.json").is_file()
    if not (is_whole_name and is_run(model, root)):
        return Start(model)
    run = Run.open(model, root)
    if run.result() == run.model_path:
        run.check_result(run.model_path)
        return Start(str(run.model_path), f"starts from the result of {run.path}")
    merged, until = run.merged_path, time.monotonic() + MERGE_WAIT_S
    while not _is_merged(run):
        try:
            _merge(run, merged, offline=offline)
            break
        except RunError:
            if time.monotonic() > until or not (run.is_locked() or _is_merged(run)):
                raise
            time.sleep(0.2)  # another run that starts from it merges
    num_bytes = sum(path.stat().st_size for path in merged.glob("*.safetensors"))
    note = f"starts from the result of {run.path}, its adapter merged into its base in {merged} ({size(num_bytes)})"
    distance = Distance(**from_json((merged / FACTS).read_bytes()))
    return Start(str(merged), f"{note}; {distance.words}", "float32" if distance.needs_float32 else None)


def _is_merged(run: Run) -> bool:
    """Whether the merged base is there and was made of this adapter: by content, since a copy keeps its
    time."""
    try:
        made_of = from_json((run.merged_path / MADE_OF).read_bytes())
    except (OSError, ValueError):
        return False
    return bool(made_of == _adapter_hashes(run))


def _adapter_hashes(run: Run) -> dict[str, str]:
    return {path.name: sha256_file(path) for path in sorted(run.adapter_path.iterdir()) if path.is_file()}


def _merge(run: Run, merged: Path, *, offline: bool) -> None:
    if (below := run.started_from()) is not None:
        start_from(str(below.path), root=run.path.parent, offline=offline)  # its merged base may be gone
    with run.lock():
        if _is_merged(run):  # meanwhile
            return
        remove(merged)
        # A merge is never written into quantised weights.
        loaded = load_run(run, offline=offline, as_trained=False)
        collator, rows = _rows(run, loaded)
        measured = _answers(loaded, collator, rows)
        loaded.attachment.merge()
        is_whole = loaded.model.dtype == torch.float32
        if is_whole:
            _save(run, loaded)
            for weight in loaded.model.parameters():
                weight.data.copy_(weight.data.bfloat16())
        distance = _distance(measured, _answers(loaded, collator, rows), loaded)
        if distance.needs_float32 and not is_whole:
            del loaded, collator
            free_cached_memory()
            loaded = load_run(run, offline=offline, as_trained=False, on={"precision": "float32"})
            loaded.attachment.merge()
        if not is_whole:
            _save(run, loaded)
        (merged / FACTS).write_bytes(to_json(asdict(distance), indent=True) + b"\n")
        write_atomic(merged / MADE_OF, to_json(_adapter_hashes(run)))  # last: then the rest is whole


def _save(run: Run, loaded: LoadedModel) -> None:
    adapter = ModelRef("folder", run.adapter_path, str(run.adapter_path))
    renderer = loaded.renderer
    ends, pooling = renderer.stop_ids, renderer.pooling
    save_model(loaded.model, renderer.tokenizer, run.merged_path, located=adapter, stop_ids=ends, pooling=pooling)


def _rows(run: Run, loaded: LoadedModel) -> tuple[Collator | None, list[int]]:
    """Rows to compare on, as the run kept them: held-out ones, else training rows; none if they are gone."""
    after = run.evaluation_path / "after.jsonl"
    lines = map(from_json, after.read_bytes().splitlines()[:COMPARED_ROWS]) if after.is_file() else ()
    wanted = np.array([int(line["hash"], 16) for line in lines], np.uint64)
    for side, key in (("held_out", "held-out rows"), ("train", "rows")):
        store = open_kept(run.rows_path / side, run.identity().get(key))
        if store is None:
            continue
        nums = np.flatnonzero(np.isin(store.hashes, wanted)) if len(wanted) else np.arange(len(store))
        if len(nums):
            write_targets([(store, nums)], masked=masked_share(loaded))
            return feed(loaded, store), nums[:COMPARED_ROWS].tolist()
    return None, []


def _answers(loaded: LoadedModel, collator: Collator | None, rows: list[int]) -> list[tuple[Tensor, Tensor]]:
    """Logits [N, V] in float32 and targets [N] of each row, `MOST_TARGETS` of them at most."""
    answers = []
    for row in rows:
        assert collator is not None, "there are rows"
        batch = collator.batch([row], step=0)
        with eval_mode(loaded.model):
            if loaded.head == "vector":
                logits_NV = hidden_at_targets(loaded.model, batch)
            else:
                forward = sequence_logits if loaded.head == "sequence" else logits_at_targets
                logits_NV = forward(loaded.model, batch)
        num = len(logits_NV)
        spread_N = torch.linspace(0, num - 1, min(num, MOST_TARGETS), device=logits_NV.device).long()
        targets_N = batch.targets_N[spread_N] if len(batch.targets_N) == num else batch.targets_N
        answers.append((logits_NV[spread_N].float().cpu(), targets_N.cpu()))
    return answers


def _distance(
    measured: list[tuple[Tensor, Tensor]], merged: list[tuple[Tensor, Tensor]], loaded: LoadedModel
) -> Distance:
    """The distance of a merged base's answers from the answers of base and adapter."""
    if not measured:
        return Distance("how far it is from what was measured is not known: the rows of that run are gone")
    p_NV, q_NV = (torch.cat([logits_NV for logits_NV, _ in side]) for side in (measured, merged))
    kind = "" if loaded.labels is None else loaded.labels.kind
    if loaded.head == "vector" or kind == "number":
        error = float(((q_NV - p_NV).norm(dim=-1) / p_NV.norm(dim=-1).clamp_min(1e-9)).mean())
        return Distance(f"in 16 bits its answers differ by {percent(error, 2)} from those measured", error > MOST_ERROR)
    if kind == "many":  # two classes for each label
        p_NV, q_NV = (torch.stack([side, torch.zeros_like(side)], -1).flatten(0, 1) for side in (p_NV, q_NV))
    log_p, log_q = p_NV.double().log_softmax(-1), q_NV.double().log_softmax(-1)
    kl = float((log_p.exp() * (log_p - log_q)).sum(-1).clamp_min(0.0).mean())
    text, change = f"in 16 bits its KL divergence from the model that was measured is {kl:.2g} nats", 0.0
    if loaded.labels is None:
        targets_N = torch.cat([targets_N for _, targets_N in measured])[:, None]
        change = float((log_p.gather(-1, targets_N) - log_q.gather(-1, targets_N)).mean())
        text += f", its loss {change:+.4f}"
    return Distance(f"{text} ({len(measured)} rows)", kl > MOST_KL or abs(change) > MOST_LOSS)
