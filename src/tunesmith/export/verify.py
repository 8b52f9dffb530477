"""The check of an export: it is loaded in a new process, from its files, and compared with the tuned model.

    python -m tunesmith.export.export_run JOB

does the part of the new process: it reads a job file, loads the export, and writes the outputs next to the job.
"""

# N targets, V vocabulary or classes

from __future__ import annotations

import json
from base64 import b64decode, b64encode
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from tunesmith.data.branches import lines_of
from tunesmith.data.collate import Masking, build_batch
from tunesmith.data.examples import examples
from tunesmith.data.formats import FORMATS, find_shape
from tunesmith.data.labels import targets
from tunesmith.data.read import expand_folders
from tunesmith.data.renderer import Renderer
from tunesmith.errors import DataError
from tunesmith.evaluation.general import passages
from tunesmith.evaluation.generate import PromptLimit, sample_prompts
from tunesmith.export import llama_cpp
from tunesmith.export.gguf_tokenizer import PROBE
from tunesmith.export.proof_plan import MANY_TOKENS, ProofPlan, is_here
from tunesmith.export.run_result import RunResult
from tunesmith.export.target import Computing, ExportedModel, ExportTarget, Tolerances, TorchModel
from tunesmith.inference.load import LoadedModel, load_base, load_run, make_renderer, run_labels
from tunesmith.models.memory import free_cached_memory
from tunesmith.phrases import percent
from tunesmith.recipe import load as recipe_file
from tunesmith.recipe.origin import Base
from tunesmith.runs.atomic import from_json
from tunesmith.tasks import TASKS
from tunesmith.types import (
    IGNORE,
    Batch,
    Example,
    HeadName,
    ImageRef,
    Labels,
    Layout,
    Part,
    Record,
    Row,
    Source,
    TaskName,
)

Floats = NDArray[np.float64]
MAX_ROWS = 32
PROGRESS = "progress"
"""File next to a job with the numbers of rows done and of all rows."""
POSITIONS = 8
"""Targets of a row whose logits are compared, evenly spaced; losses are of all targets."""
STANDARD_ERRORS = 2.0
"""Standard errors by which a held-out loss may exceed its tolerance."""


@dataclass(frozen=True)
class Outputs:
    """Outputs of one model on the rows of the check."""

    ids: list[list[int]]
    """Tokens of each row."""
    prompts: list[list[int]] = field(default_factory=list)
    """Tokens of prompts, of models that write."""
    losses: list[float] = field(default_factory=list)
    """Loss of each row, summed over its targets; empty if rows have no answers."""
    counts: list[int] = field(default_factory=list)
    """Targets of each row."""
    texts: list[list[int]] = field(default_factory=list)
    """Tokens of fixed texts."""
    loaded_by: str = ""
    logits: list[NDArray[np.float32]] = field(default_factory=list)
    """[N, V] of each row."""

    @property
    def loss(self) -> float | None:
        return sum(self.losses) / max(sum(self.counts), 1) if self.losses else None

    def save(self, folder: Path) -> None:
        facts = {key: value for key, value in vars(self).items() if key != "logits"}
        np.savez(folder / "logits.npz", *self.logits)
        (folder / "outputs.json").write_text(json.dumps(facts), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Outputs:
        facts = json.loads((folder / "outputs.json").read_text("utf-8"))
        with np.load(folder / "logits.npz", allow_pickle=False) as arrays:
            return cls(**facts, logits=[arrays[f"arr_{i}"] for i in range(len(arrays.files))])


@dataclass(frozen=True, slots=True)
class CheckRows:
    """Rows to compare models on, and a description of them."""

    examples: list[Example]
    described: str


def find_rows(result: RunResult) -> CheckRows:
    """Up to 32 rows: held-out rows, else the first training rows, else fixed texts if data files are gone."""
    after = result.run.evaluation_path / "after.jsonl"
    lines = list(map(from_json, after.read_bytes().splitlines())) if after.is_file() else []
    sources = list(dict.fromkeys(str(line["source"]) for line in lines))
    wanted = sources[:MAX_ROWS]
    try:
        if wanted:
            side = "eval" if result.recipe.data.eval else "train"
            matching = (example for example in _examples(result, side) if str(example.source) in wanted)
            if held_out := list(islice(matching, len(wanted))):
                unit = "documents, the first window of each" if any("bytes" in line for line in lines) else "rows"
                described = f"of {len(sources):,} held-out {unit}"
                in_order = sorted(held_out, key=lambda example: wanted.index(str(example.source)))
                return CheckRows(in_order, described)
        if first := list(islice(_examples(result, "train"), MAX_ROWS)):
            return CheckRows(first, "training rows, since none is held out")
    except DataError:
        pass  # the files are gone or changed; two models can be compared without them
    pairs = enumerate(pairwise(passages()))
    fixed = [_fixed_row(result.renderer.task_name, *pair, Source("general text", i + 1)) for i, pair in pairs]
    return CheckRows(fixed, "fixed texts, since the run's data files are gone")


def _examples(result: RunResult, side: str) -> Iterator[Example]:
    data = result.recipe.data
    files = expand_folders(getattr(data, side), lambda problem: None, how=data.reading)
    for _, example in examples(files, data, lambda problem: None, task=result.renderer.task_name):
        yield example


def _fixed_row(task: TaskName, text: str, question: str, place: Source) -> Example:
    answered = not TASKS[task].learns_classes
    record = TASKS[task].record(text, question) if answered else TASKS[task].record(text)
    shape = find_shape(record, task=task, answered=answered)
    assert shape is not None, "a task's own record has a shape of the task"
    row = FORMATS[shape].parse(record, place, answered=answered)
    assert isinstance(row, Example), "and no problems"
    return row


def compute(
    model: ExportedModel, renderer: Renderer, rows: Sequence[Example], *, labels: Labels | None, masked: float,
    tokens: int, tick: Callable[[int, int], None],
) -> Outputs:  # fmt: skip
    """The outputs of a model. `masked`: share of masked tokens; `tokens`: of all rows together, at most; `tick`
    gets the numbers of rows done and of all rows."""
    encoded = encode_rows(renderer, rows, head=model.head, labels=labels, masked=masked, tokens=tokens)
    # Fixed texts have spaces, digits, quotes, many scripts and code, which pre-tokenizers split differently.
    outputs = Outputs([row.ids.tolist() for row in encoded], texts=model.tokenize([PROBE, *passages()]))
    known = {image.number: image for example in rows for image in example.images}
    layout: Layout = "encoder_decoder" if renderer.kind == "encoder_decoder" else "padded"
    settings: dict[str, Any] = {"decoder_start": model.decoder_start, "has_types": model.has_types}
    for i, row in enumerate(encoded, start=1):
        batch = build_batch([row], [0], layout=layout, device=model.device, pools=model.head == "vector", **settings)
        if row.images:
            batch = replace(batch, images=renderer.batch_images([[known[number] for number in row.images]]))
        logits_NV = model.logits(batch)
        if len(logits_NV) == 0:
            continue
        if model.head != "vector" and (row.labels is None or not _has_no_answer(row.labels)):
            outputs.losses.append(float(_losses(logits_NV, batch, labels).double().sum()))
            outputs.counts.append(batch.num_targets)
        positions = np.unique(np.linspace(0, len(logits_NV) - 1, POSITIONS).astype(np.int64))
        outputs.logits.append(logits_NV[positions].numpy())
        tick(i, len(encoded))
    if renderer.stop_ids and model.head == "next_token":
        longest = renderer.max_tokens or MANY_TOKENS
        limit = PromptLimit(longest, cut_to=longest)
        samples = sample_prompts(renderer, rows[: len(encoded)], limit=limit, new_tokens=1)
        outputs.prompts.extend(list(prompt.ids) for prompt in samples)
    return outputs


def encode_rows(
    renderer: Renderer, rows: Sequence[Example], *, head: HeadName, labels: Labels | None, masked: float,
    tokens: int = MANY_TOKENS,
) -> list[Row]:  # fmt: skip
    """The first row of each example that has one, up to `tokens` together; the first is always used."""
    vocabulary: dict[str, int] = {}
    first_rows: list[Row] = []
    num_tokens = 0
    for encoded in renderer.encode(rows, vocabulary=vocabulary):
        first = encoded[0] if encoded else None
        if not isinstance(first, Row):
            continue
        first = lines_of(first)[0]
        num_tokens += len(first.ids)
        if first_rows and num_tokens > tokens:
            break
        first_rows.append(first)
    if head == "masked_token":
        masking = Masking.of(renderer.tokenizer, share=masked, seed=0)
        nums = [max(1, round(masked * int(row.trained.sum()))) for row in first_rows]
        return [masking.apply(row, num=nums[i], step=0, index=i) for i, row in enumerate(first_rows)]
    if labels is None:
        return first_rows
    names = list(vocabulary)
    return [replace(row, labels=_targets(row, labels, names)) for row in first_rows]


def _targets(row: Row, labels: Labels, names: Sequence[str]) -> NDArray[np.generic]:
    assert row.labels is not None, "rows of a task with labels have places for them"
    ids = row.labels.astype(np.int64)
    return ids if _has_no_answer(ids) else targets(labels, ids, names)


def _has_no_answer(labels: NDArray[np.generic]) -> bool:
    return labels.dtype == np.int64 and labels.size > 0 and bool((labels == IGNORE).all())


def _losses(logits_NV: Tensor, batch: Batch, labels: Labels | None) -> Tensor:
    """Unweighted loss of each target."""
    targets_N = batch.targets_N.cpu()
    if labels is not None and labels.kind == "number":
        return (logits_NV[:, 0] - targets_N).square()
    if labels is not None and labels.kind == "many":
        return F.binary_cross_entropy_with_logits(logits_NV, targets_N, reduction="none").sum(-1)
    return F.cross_entropy(logits_NV, targets_N, reduction="none")


@dataclass(frozen=True, slots=True)
class ExportComparison:
    """Distances of an export from the tuned model."""

    rows: int
    positions: int
    """Places where next tokens or classes were compared."""
    same_ids: bool
    """Whether both tokenizers made the same tokens of every row and prompt."""
    difference: str
    """The first token that differs."""
    kl: float
    """Mean KL divergence, tuned from exported, in nats; for numbers the mean relative error."""
    kl_max: float
    loss_tuned: float | None
    loss_exported: float | None
    loss_error: float | None
    """Standard error of their difference over rows; None for fewer than two."""
    carried: float | None
    """Share of the change from the base that the export keeps: slope of (exported − base) on (tuned − base).
    None if there is no base, or no effect."""
    measure: str = "KL divergence"

    def problems(self, allowed: Tolerances) -> list[str]:
        """Every tolerance that is exceeded, in words."""
        exceeded = [] if self.same_ids else [f"its tokens differ: {self.difference}"]
        if self.same_ids and not self.kl <= allowed.kl:
            exceeded.append(f"its {self.measure} from the tuned model is {self.kl:.2g}, at most {allowed.kl:g} allowed")
        if self.loss_tuned is not None and self.loss_exported is not None:
            change = self.loss_exported - self.loss_tuned
            # On few rows rounding changes the loss by chance; the KL divergence has a tolerance too.
            chance = STANDARD_ERRORS * (self.loss_error or 0.0)
            if not abs(change) <= allowed.loss + chance:
                limit = f"{allowed.loss:g} allowed" + (f", and {chance:.4f} by chance on few rows" if chance else "")
                exceeded.append(f"its loss is {change:+.4f} from the tuned model's, at most {limit}")
        if self.carried is not None and not abs(self.carried - 1) <= allowed.carried:
            share, limit = percent(round(self.carried, 3)), percent(allowed.carried, 0)
            exceeded.append(f"it keeps {share} of the change from the base, 100 % ± {limit} allowed")
        return exceeded


def compare(tuned: Outputs, exported: Outputs, *, base: Outputs | None, labels: Labels | None) -> ExportComparison:
    """`base`: the model without its adapter, on the same rows."""
    difference = _first_difference(tuned, exported)
    kl_N = np.zeros(0)
    if not difference:
        pairs = zip(tuned.logits, exported.logits, strict=True)
        kl_N = np.concatenate([kl_N, *(_divergence(a, b, labels) for a, b in pairs)])
    return ExportComparison(
        rows=len(tuned.ids),
        positions=len(kl_N),
        same_ids=not difference,
        difference=difference,
        kl=float("nan") if difference else float(kl_N.mean()) if len(kl_N) else 0.0,
        kl_max=float(kl_N.max(initial=0.0)),
        loss_tuned=tuned.loss,
        loss_exported=exported.loss,
        loss_error=_loss_error(tuned, exported),
        carried=None if difference or base is None else _carried(tuned, exported, base),
        measure="relative error" if labels is not None and labels.kind == "number" else "KL divergence",
    )


def _first_difference(tuned: Outputs, exported: Outputs) -> str:
    for what, name in (("row", "ids"), ("prompt", "prompts"), ("fixed text", "texts")):
        ours, theirs = getattr(tuned, name), getattr(exported, name)
        if len(ours) != len(theirs):
            return f"the tuned model has {len(ours)} {what}s, the export {len(theirs)}"
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            if a != b:
                unlike = (n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
                place = next(unlike, min(len(a), len(b)))
                return f"{what} {i + 1} at token {place + 1}: {a[place : place + 4]} became {b[place : place + 4]}"
    return ""


def _loss_error(tuned: Outputs, exported: Outputs) -> float | None:
    """Standard error of the difference of two losses per target on the same rows, as a ratio estimate (Cochran,
    "Sampling Techniques", 1977, section 6.4)."""
    num = len(tuned.losses)
    if num < 2 or len(exported.losses) != num:
        return None
    change = np.asarray(exported.losses) - np.asarray(tuned.losses)
    counts = np.asarray(tuned.counts, np.float64)
    total = max(float(counts.sum()), 1.0)
    residual = change - change.sum() / total * counts
    return float(np.sqrt((residual**2).sum() * num / (num - 1)) / total)


def _divergence(tuned_NV: NDArray[np.float32], exported_NV: NDArray[np.float32], labels: Labels | None) -> Floats:
    p, q = tuned_NV.astype(np.float64), exported_NV.astype(np.float64)
    if labels is not None and labels.kind == "number":
        return np.asarray(np.abs(q - p)[:, 0] / np.maximum(np.abs(p[:, 0]), 1.0))
    is_many = labels is not None and labels.kind == "many"
    if is_many:  # two classes for each label
        p, q = (np.stack([x, np.zeros_like(x)], -1) for x in (p, q))
    log_p, log_q = (x - np.logaddexp.reduce(x, axis=-1, keepdims=True) for x in (p, q))
    kl = np.maximum((np.exp(log_p) * (log_p - log_q)).sum(-1), 0.0)
    return np.asarray(kl.mean(-1) if is_many else kl)


def _carried(tuned: Outputs, exported: Outputs, base: Outputs) -> float | None:
    """The share of the change from the base that the export keeps, over logits less their mean."""
    inner = effect = 0.0
    for logits in zip(tuned.logits, exported.logits, base.logits, strict=True):
        a, b, c = (x.astype(np.float64) for x in logits)
        if a.shape[-1] > 1:
            a, b, c = (x - x.mean(-1, keepdims=True) for x in (a, b, c))
        inner += float(((b - c) * (a - c)).sum())
        effect += float(((a - c) ** 2).sum())
    return inner / effect if effect > 1e-12 * max(sum(x.size for x in tuned.logits), 1) else None


class TunedOutputs(NamedTuple):
    """Outputs of the tuned model and of its base without the quantization of training, and the loss with it."""

    tuned: Outputs
    base: Outputs | None
    """None: there is none to compare with."""
    quantized_loss: float | None


def tuned_outputs(result: RunResult, rows: CheckRows, plan: ProofPlan) -> TunedOutputs:
    """Outputs that an export is compared with. One model is in memory at a time."""
    quantized_loss = None
    if result.quant is not None:
        on = {} if is_here(result.recipe.device) else plan.on  # packed, it fits where it was trained
        quantized_loss = _outputs(load_run(result.run, offline=True, on=on), result, rows, plan, "tuned").loss
        free_cached_memory()
    model: LoadedModel | None = load_run(result.run, offline=True, as_trained=False, on=plan.on)
    assert model is not None
    tuned = _outputs(model, result, rows, plan, "tuned")
    base = None
    if model.has_base:
        with model.adapter_disabled():
            base = _outputs(model, result, rows, plan, "base")
    elif model.attachment is not None:
        model = None
        free_cached_memory()
        base = _outputs(load_base(result.run, offline=True, on=plan.on), result, rows, plan, "base")
    model = None
    free_cached_memory()
    return TunedOutputs(tuned, base, quantized_loss)


def _outputs(model: LoadedModel, result: RunResult, rows: CheckRows, plan: ProofPlan, phase: str) -> Outputs:
    loaded = TorchModel(model.renderer.tokenizer, result.kind, model.head, "", model.model)
    settings: dict[str, Any] = {"masked": result.recipe.train.masked, "tokens": plan.tokens}
    tick = partial(result.on_progress, phase)
    return compute(loaded, model.renderer, rows.examples, labels=result.labels, tick=tick, **settings)


def exported_outputs(
    result: RunResult, target: ExportTarget, folder: Path, rows: CheckRows, plan: ProofPlan, *, work: Path
) -> Outputs:
    """The outputs of an export in a new process. `work`: an empty folder. ExportError: it does not load."""
    facts = {
        "target": target.name, "exported": str(folder.resolve()), "recipe": str(result.run.recipe_path.resolve()),
        "model": result.recipe.place, "computing": asdict(plan.computing), "tokens": plan.tokens,
        "examples": [asdict(example) for example in rows.examples],
    }  # fmt: skip
    path = work / "job.json"
    text = json.dumps(facts, default=lambda content: b64encode(content).decode())  # the bytes of an image
    path.write_text(text, encoding="utf-8")
    launch(path, partial(result.on_progress, "verify"), expected_s=plan.seconds)
    return Outputs.load(work)


def launch(job: Path, tick: Callable[[int, int], None], *, expected_s: float = 0.0) -> None:
    """Do a job in a new process. Raises ExportError with the last line of its errors, or if it takes several
    times as long as expected."""

    def look() -> None:
        done, total = 0, 1
        with suppress(OSError, ValueError):  # it still loads, or is writing the numbers
            done, total = map(int, (job.parent / PROGRESS).read_text("utf-8").split())
        tick(done, total)

    what = "the export cannot be used in a new process"
    limit_s = max(llama_cpp.TIMEOUT_S, 4 * expected_s)
    llama_cpp.run_module("tunesmith.export.export_run", str(job), what=what, tick=look, limit_s=limit_s)


def do_job(path: Path, targets: Mapping[str, ExportTarget]) -> None:
    """Load the export that a job names, and save its outputs next to the job."""
    job = json.loads(path.read_text("utf-8"))
    recipe = recipe_file.load(job["recipe"])
    recipe = recipe.on_base(Base(recipe.model, job["model"]))
    torch.set_num_threads(recipe.threads if isinstance(recipe.threads, int) else 1)
    model = targets[job["target"]].load(Path(job["exported"]), recipe, Computing(**job["computing"]))
    renderer = make_renderer(recipe, model.tokenizer, model.kind)
    rows = [_example(values) for values in job["examples"]]

    def tick(done: int, total: int) -> None:
        with suppress(OSError):  # a disk that is full is said by what has to be written
            (path.parent / PROGRESS).write_text(f"{done} {total}", "utf-8")

    settings: dict[str, Any] = {"masked": recipe.train.masked, "tokens": job["tokens"], "tick": tick}
    outputs = compute(model, renderer, rows, labels=run_labels(recipe.task, recipe.data), **settings)
    replace(outputs, loaded_by=model.loaded_by).save(path.parent)


def _example(values: Record) -> Example:
    parts = tuple(_part(part) for part in values["parts"])
    rest = {"tools": tuple(values["tools"]), "labels": tuple(values["labels"]), "source": Source(**values["source"])}
    branches = tuple(tuple(_part(part) for part in branch) for branch in values["branches"])
    return Example(**{**values, **rest, "parts": parts, "branches": branches})


def _part(values: Record) -> Part:
    images = ((place, ImageRef(**{**image, "data": b64decode(image["data"])})) for place, image in values["images"])
    return Part(**{**values, "images": tuple(images)})
