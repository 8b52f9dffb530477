"""From a recipe to a `Setup`: model, rows, method, plan; every "auto" decided, every check made before step 1."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from tunesmith.data.batch import Plan
from tunesmith.data.render import Renderer
from tunesmith.data.rows import Places, Rows, encode_rows, first_example
from tunesmith.errors import ModelError
from tunesmith.evaluation.samples import SamplePrompt, sample_prompts
from tunesmith.methods import METHODS
from tunesmith.models import attention, load, locate, machine
from tunesmith.models.agreement import ragged_agrees
from tunesmith.models.checkpointing import checkpoint_layers
from tunesmith.models.size import ModelSize, size
from tunesmith.optim import adamw, kernel
from tunesmith.planning.advise import Facts, choose_method, choose_task, decide, total_steps, with_choice
from tunesmith.recipe.knobs import Recipe, known
from tunesmith.run import Run
from tunesmith.tasks import TASKS
from tunesmith.types import Attachment, Choice, Layout, Task

OnProgress = Callable[[str, int, int], None]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass
class Setup:
    """Everything the loop needs, ready to take its first step."""

    recipe: Recipe
    """Resolved: no "auto" is left."""
    choices: list[Choice]
    notes: list[str]
    """What a person should know before the first step: fallbacks, cut rows, overlaps."""
    located: locate.Located
    model: PreTrainedModel
    num_parameters: int
    """Weights of the model itself."""
    renderer: Renderer
    task: Task
    attachment: Attachment
    optimizer: torch.optim.Optimizer
    rows: Rows
    plan: Plan
    total_steps: int
    device: str
    samples: list[SamplePrompt]
    identity: dict[str, str] = field(default_factory=dict)
    """What must stay the same for a run to go on exactly: hashes of data, model, tokenizer and template; settings."""


def prepare(
    recipe: Recipe,
    *,
    root: Path,
    offline: bool = False,
    on_progress: OnProgress = lambda what, done, total: None,
    run: Run | None = None,
) -> Setup:
    """Load, encode, decide and attach. Nothing is written but encoded rows: below `root`, or into `run` when resuming.

    Raises:
        RecipeError, DataError, ModelError: what was given cannot be used.
    """
    notes: list[str] = []
    located = locate.locate(recipe.model, revision=recipe.revision, offline=offline)
    tokenizer = load.load_tokenizer(located, recipe.data.template, on_note=notes.append)
    model_size = size(located)
    recipe, choices = _decide_before_rows(recipe, located, model_size)
    renderer = _renderer(recipe, tokenizer)
    rows = encode_rows(
        recipe.data,
        renderer,
        places=_places(root, run),
        max_held=recipe.evaluation.max_rows,
        on_progress=on_progress,
    )
    lengths_I = rows.store.lengths[rows.train_rows]
    recipe, more = decide(recipe, Facts(model_size.num_params, recipe.device, lengths_I))

    on_progress("load", 0, 1)
    torch.set_num_threads(known(recipe.threads))
    dtype = DTYPES[known(recipe.precision)]
    model = load.load_model(located, dtype=dtype, device=recipe.device, on_note=notes.append)
    layout, padding_notes = _layout(model, rows)
    checkpoint_layers(model, recipe.train.checkpointed_layers)
    attachment = METHODS[recipe.method.name].attach(model, recipe.method, seed=recipe.seed)
    on_progress("load", 1, 1)
    plan = _plan(recipe, rows, layout)
    samples, sample_notes = _samples(recipe, renderer, rows, model_size)
    return Setup(
        recipe=recipe,
        choices=[*choices, *more, kernel(attachment.trained)],
        notes=[*notes, *rows.notes, *padding_notes, *attachment.notes, *sample_notes],
        located=located,
        model=model,
        num_parameters=model_size.num_params,
        renderer=renderer,
        task=TASKS[known(recipe.task)],
        attachment=attachment,
        optimizer=adamw(attachment.trained, recipe.optim),
        rows=rows,
        plan=plan,
        total_steps=total_steps(recipe, plan.steps_per_epoch),
        device=recipe.device,
        samples=samples,
        identity=_identity(recipe, rows, renderer, located),
    )


def _decide_before_rows(recipe: Recipe, located: locate.Located, model_size: ModelSize) -> tuple[Recipe, list[Choice]]:
    """What has to be known before rows can be encoded: task, method, device, precision, longest row."""
    limit = model_size.max_tokens
    asked = recipe.data.max_tokens
    if asked != "auto" and asked > limit:
        raise ModelError(
            f"{located.name}: data.max_tokens is {asked:,}, but the model can attend to {limit:,} tokens. Lower it."
        )
    choices: list[Choice] = []
    if recipe.task == "auto":
        choices.append(choose_task(first_example(recipe.data)))
    if recipe.method.name == "auto":
        choices.append(choose_method(model_size.num_params))
    device = machine.choose_device(recipe.device)
    precision = machine.choose_precision(recipe.precision, str(device.value))
    choices += [device] if recipe.device == "auto" else []
    choices += [precision] if recipe.precision == "auto" else []
    choices += [Choice("data.max_tokens", limit, "the most this model can attend to")] if asked == "auto" else []
    for choice in choices:
        recipe = with_choice(recipe, choice)
    return recipe, choices


def _samples(
    recipe: Recipe, renderer: Renderer, rows: Rows, model_size: ModelSize
) -> tuple[list[SamplePrompt], list[str]]:
    """Prompts that leave room for an answer in what the model can attend to; the others are counted."""
    examples = rows.sample_examples(recipe.evaluation.samples)
    room = min(known(recipe.data.max_tokens), model_size.max_tokens - recipe.evaluation.sample_tokens)
    prompts = sample_prompts(renderer, examples, max_tokens=room)
    left_out = len(examples) - len(prompts)
    return prompts, [f"{left_out} held-out prompts are empty or too long to be answered"] if left_out else []


def _renderer(recipe: Recipe, tokenizer: Any) -> Renderer:
    return Renderer(
        tokenizer,
        known(recipe.task),
        max_tokens=known(recipe.data.max_tokens),
        too_long=recipe.data.too_long,
        control_tokens=recipe.data.control_tokens,
    )


def _places(root: Path, run: Run | None) -> Places:
    """A new run shares encoded rows with others below `root`; a resumed one has its own."""
    shared = root / ".rows"
    return Places(shared, shared) if run is None else Places(run.rows_path / "train", run.rows_path / "held_out")


def _layout(model: PreTrainedModel, rows: Rows) -> tuple[Layout, list[str]]:
    """Ragged if the model gives the same logits for packed rows as for each alone, padded otherwise, and said."""
    probe = [rows.store.row(int(i)) for i in rows.train_rows[:3]]
    agreement = ragged_agrees(model, probe)
    if agreement.ok:
        attention.use_ragged(model)
        return "ragged", []
    note = f"padded batches: this model cannot run rows packed together ({agreement.reason}); slower, same result"
    return "padded", [note]


def _plan(recipe: Recipe, rows: Rows, layout: Layout) -> Plan:
    weights = np.array([file.weight for file in recipe.data.train])
    return Plan(
        rows_I=rows.train_rows,
        weights_I=weights[rows.store.file_index[rows.train_rows]],
        lengths_I=rows.store.lengths[rows.train_rows],
        rows_per_step=known(recipe.train.rows_per_step),
        tokens_per_pass=known(recipe.train.tokens_per_pass),
        layout=layout,
        seed=recipe.seed,
    )


def _identity(recipe: Recipe, rows: Rows, renderer: Renderer, located: locate.Located) -> dict[str, str]:
    settings = {f"setting {key}": str(value) for key, value in flat(recipe.model_dump()).items()}
    model = {f"model {name}": digest for name, digest in load.fingerprint(located).items()}
    hashes = {**rows.store.data_hashes, **rows.held_store.data_hashes}
    data = {f"data {path}": digest for path, digest in hashes.items()}
    return {**settings, **model, **data, "tokenizer and template": renderer.fingerprint, "rows": rows.store.key}


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested mapping as dotted keys."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        leaves |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return leaves
