"""Set up a run: from a recipe to a `Setup` with model, rows, method and steps. Every "auto" is decided and
every check made before step 1."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from tunesmith.data import sampler
from tunesmith.data.collate import Collator, Masking, pads_to_multiple
from tunesmith.data.dataset import RowStore
from tunesmith.data.renderer import Renderer
from tunesmith.data.sampler import StepSampler
from tunesmith.data.splits import Splits
from tunesmith.errors import DoesNotFitError, ModelError, RecipeError
from tunesmith.evaluation.general import can_generate
from tunesmith.evaluation.generate import PromptLimit, SamplePrompt, new_tokens_for, sample_notes, sample_prompts
from tunesmith.generation.draws import refuse_undrawable
from tunesmith.graders.kept import KeptGrades
from tunesmith.inference.load import has_token_types
from tunesmith.inference.reward_scores import pool_of
from tunesmith.methods import METHODS, attach
from tunesmith.models import attention, load, machine
from tunesmith.models.card import prepare_allocator
from tunesmith.models.fast_layers import use_fast_layers
from tunesmith.models.fused_loss import OutputLayer, find_output_layer, output_layer_of
from tunesmith.models.heads import new_head_names, new_param_names
from tunesmith.models.memory import free_cached_memory
from tunesmith.models.modes import checkpoint_layers, disable_dropout, eval_mode
from tunesmith.models.packing_check import layouts_of
from tunesmith.models.quantized import num_weights
from tunesmith.models.resolve_model import ModelRef, resolve_base
from tunesmith.models.special_tokens import pad_id, resize_embeddings, without_vector
from tunesmith.optim import Optimizer
from tunesmith.parallel.world import World
from tunesmith.phrases import size
from tunesmith.planning.defaults import far_numbers, total_steps
from tunesmith.planning.forecast import Forecast, kept_checkpoints
from tunesmith.planning.memory import TORCH_DTYPES, layers_to_split
from tunesmith.recipe.docs import flat
from tunesmith.recipe.load import validate
from tunesmith.recipe.schema import EvaluationOptions, Recipe, resolved
from tunesmith.runs.atomic import free_bytes
from tunesmith.runs.background import in_background
from tunesmith.runs.folder import Run
from tunesmith.tasks import TASKS, bind
from tunesmith.training.draw import Drawing
from tunesmith.training.image_parts import seeing_notes
from tunesmith.training.inputs import Inputs
from tunesmith.training.packed_rows import PACKED, packed_agrees
from tunesmith.training.resolve import ResolvedRun, resolve_run, sampler_of
from tunesmith.training.shared_prefixes import decide_sharing, filled_by, image_token_of
from tunesmith.training.state import LossScale, TrainState
from tunesmith.training.taught_answers import taught_by
from tunesmith.training.teacher import Teacher
from tunesmith.types import Aside, Attachment, Choice, HeadName, JsonObject, Labels, Layout, ModelKind, OnProgress

PROBED = 3
"""Number of training rows that are tried before the first step: for float16, and packed together."""


@dataclass
class Setup(TrainState):
    """A run before its first step: the state of training, and what evaluation, report and result need."""

    model: PreTrainedModel
    choices: list[Choice]
    notes: list[str]
    """Facts to know before the first step: fallbacks, cut rows, overlaps."""
    located: ModelRef
    max_tokens: int
    """Maximum number of tokens that the model can attend to."""
    num_parameters: int
    """Weights of the model, including its head."""
    renderer: Renderer
    kind: ModelKind
    head: HeadName
    rows: Splits
    """The rows of `store` to train on, those held out, and their labels."""
    held_collator: Collator
    """Makes batches from rows of `rows.held_store`."""
    samples: list[SamplePrompt]
    new_head: bool
    """Whether the head has random weights before the first step."""
    given: JsonObject
    """Options of the person's recipe that differ from the defaults, before anything was decided."""
    forecast: Forecast | None
    """Predicted memory and time; None for a resumed run, or if prediction failed."""
    drawing: Drawing | None = None
    """Draws and grades answers; None: rows have theirs."""
    teacher: Teacher | None = None
    """The model that rows, or drawn answers, are read by."""
    identity: dict[str, str] = field(default_factory=dict)
    """Hashes of data, model, tokenizer and template, and settings. An exact resume needs the same, but for
    `same_run.MAY_CHANGE`."""

    @property
    def can_generate(self) -> bool:
        """Whether the model writes text, so that its general ability can be measured."""
        return can_generate(self.head, is_causal=self.sampler.layout != "encoder_decoder", max_tokens=self.max_tokens)

    def whole_weights(self) -> JsonObject:
        """{"weights"} of a model whose trained layers are split, on the first rank. Every rank calls it."""
        if not self.attachment.shards:
            return {}
        from tunesmith.parallel.fsdp import whole_weights

        return {"weights": whole_weights(self.world, self.model)}

    def save_result(self, folder: Path, **weights: Any) -> None:
        """Save the tuned adapter or model. `weights`: what `whole_weights` returned."""
        METHODS[self.recipe.method.name].save_result(
            self.attachment, folder, model=self.model, renderer=self.renderer, located=self.located, **weights
        )


def prepare(
    recipe: Recipe,
    *,
    root: Path,
    offline: bool = False,
    on_progress: OnProgress = lambda what, done, total: None,
    run: Run | None = None,
    world: World | None = None,
) -> Setup:
    """Load, encode, decide and attach. Only encoded rows are written: below `root`, or into `run` when resuming.

    Args:
        recipe: with model and training files; what it leaves to "auto" is decided here.
        root: the folder of runs, where encoded rows are kept for the next one.
        offline: nothing is fetched.
        on_progress: called with phase, done and total.
        run: the run to resume; None: a new one.
        world: the group of processes; its first rank decides for all, and one rank of each machine encodes rows.

    Raises:
        InputError: RecipeError, DataError, ModelError: input that cannot be used; DoesNotFitError: too little memory.

    Examples:
        >>> recipe = tunesmith.Recipe(model="smollm2", data={"train": ["support.jsonl"]})
        >>> setup = tunesmith.prepare(recipe, root=Path("runs"))
    """
    world = world or World()
    plan = _resolve_together(world, recipe, root, offline=offline, on_progress=on_progress, run=run)
    if run is None and plan.served is not None:
        plan.served.prove()  # before a model is loaded; a run that goes on may need it no more
    setup = _set_up(plan, world, on_progress)
    # A float16 that the person chose is kept: losses that are no numbers will show that it overflows.
    if plan.recipe.precision != "float16" or not _overflows(setup, was_chosen="precision" not in plan.given):
        return setup
    del setup
    free_cached_memory()
    float32 = recipe.model_copy(update={"precision": "float32"})
    plan = _resolve_together(world, float32, root, offline=offline, on_progress=on_progress, run=run, tries=1)
    reason = "numbers in this model are too large for float16, this device's fast type, as first rows showed"
    others = (choice for choice in plan.choices if choice.key != "precision")
    plan.choices = [*others, Choice("precision", "float32", reason)]
    plan.given.pop("precision", None)  # float32 was decided here, not given by the person
    return _set_up(plan, world, on_progress)


@torch.no_grad()
def _overflows(setup: Setup, *, was_chosen: bool) -> bool:
    """Whether the forward pass overflows on one of the first rows, which no scale of the loss can mend. Only a
    precision that `was_chosen` here, not by the person, is tried. The first rank tries it for all ranks."""
    world = setup.world
    if not world.is_first:
        return bool(world.wait_for("overflows"))
    rows = [int(i) for i in setup.rows.train_rows[:PROBED]] if was_chosen else []
    overflows = False
    with eval_mode(setup.model):
        for row in rows:
            batch = setup.collator.batch([row], draw=1)
            if setup.drawing is not None:  # nothing is learnt of a prompt: all its tokens are tried
                places_N = torch.arange(batch.lengths[0], device=batch.ids_BT.device)
                batch = replace(batch, predict_N=places_N, targets_N=batch.ids_BT[0, : len(places_N)])
            overflows = overflows or not bool(setup.task.measure(setup.model, batch).losses_N.isfinite().all())
    world.publish("overflows", overflows)
    return overflows


def _set_up(plan: ResolvedRun, world: World, on_progress: OnProgress) -> Setup:
    """Load the model of a resolved run and attach its method."""
    recipe, inputs, rows = plan.recipe, plan.inputs, plan.rows
    device = world.card or recipe.device
    on_progress("load", 0, 1)
    hashes = in_background(partial(load.fingerprint, inputs.located))
    torch.set_num_threads(resolved(recipe.threads))
    model, num_parameters = _load(recipe, inputs, rows.labels, world)
    _refuse_longer_tokenizer(model, inputs, rows)
    new_head = not set(new_param_names(model)).isdisjoint(new_head_names(model))
    tokenizer = inputs.renderer.tokenizer
    attachment = attach(recipe, model, head=inputs.head, store=rows.store, pad_id=pad_id(model, tokenizer))
    kernel_notes = _use_fast_layers(model, world, kernels=recipe.kernels, device=recipe.device)
    with attachment.perturbed():
        layout, padding_notes = _layout(model, rows, inputs, plain=recipe.kernels == "plain")
        _refuse_drawing(rows, model, layout, padding_notes, inputs.located.name)
    in_pieces = METHODS[recipe.method.name].fused_loss and recipe.kernels == "fast"
    output, loss_notes = _output_layer(model) if in_pieces else (None, [])
    optimizer = Optimizer(attachment.trained, recipe.optim, factors=attachment.rate_factors)
    on_progress("load", 1, 1)
    sampler = sampler_of(recipe.train, rows, layout, device, seed=recipe.seed)
    sampler = replace(sampler, part=world.part, is_even=world.is_sharded)
    collator, held_collator, sharing_choices = collators(recipe, inputs, rows, model, sampler, device=device)
    sampler = filled_by(sampler, rows.store, collator.image_token) if collator.shares else sampler
    drawing = _drawing(plan, attachment, output, shares=collator.shares)
    teacher, distilling = taught_by(plan, model, output, world)
    samples, prompt_notes = _samples(recipe.evaluation, inputs, rows)
    notes = [*inputs.notes, *plan.notes, *rows.notes, *far_numbers(rows), *kernel_notes, *padding_notes, *loss_notes]
    return Setup(
        recipe=recipe,
        choices=[*plan.choices, *sharing_choices],
        notes=[*notes, *attachment.notes, *seeing_notes(model, rows), *prompt_notes],
        located=inputs.located,
        model=model,
        max_tokens=inputs.size.max_tokens,
        num_parameters=num_parameters,
        renderer=inputs.renderer,
        task=bind(resolved(recipe.task), rows.labels, recipe.loss, output, recipe=recipe, vocabulary=len(tokenizer)),
        loss_scale=LossScale.of(resolved(recipe.precision)),
        kind=inputs.kind,
        head=inputs.head,
        attachment=attachment,
        optimizer=optimizer,
        rows=rows,
        store=rows.store,
        collator=collator,
        held_collator=held_collator,
        sampler=sampler,
        total_steps=total_steps(recipe.train, sampler.steps_per_epoch),
        device=device,
        samples=samples,
        new_head=new_head,
        given=plan.given,
        forecast=plan.forecast,
        draw=drawing or distilling,
        drawing=drawing,
        teacher=teacher,
        identity=_identity(recipe, rows, inputs.renderer, hashes.result(), drawing, teacher=teacher),
        world=world,
    )


def _use_fast_layers(model: PreTrainedModel, world: World, *, kernels: str, device: str) -> list[str]:
    """Compute each known layer in one autograd node. Returns a note where a card lacks one kernel for it."""
    if kernels != "fast" or device == "mps" or world.is_sharded:
        return []
    return [Aside(note) for note in use_fast_layers(model)]


def _output_layer(model: PreTrainedModel) -> tuple[OutputLayer | None, list[str]]:
    """Find the output layer by which losses are computed piece by piece. None: logits are computed whole, with
    a note where the forecast did not expect that."""
    output_layer = find_output_layer(model)
    if output_layer is not None or output_layer_of(model) is None:
        return output_layer, []
    why = "this model's logits need more than its output layer, so the logits of all targets are kept at once"
    return None, [f"the loss: {why}, which takes more memory than was foreseen"]


def _resolve_together(
    world: World, recipe: Recipe, root: Path, *, run: Run | None, offline: bool, on_progress: OnProgress, tries: int = 0
) -> ResolvedRun:
    """Resolve the run on the first rank, then with its recipe on one rank of each machine, then on the others.
    `tries`: the number of times that this was done before."""
    if not world.is_first:
        decided = validate(world.wait_for(f"recipe {tries}"))
        recipe = decided if run is None else run.place(decided)
    leader = world.rank - world.place.local_rank  # the first rank of this machine, which encodes its rows
    if world.rank != leader:
        world.wait_for(f"rows of {leader}, {tries}", leader)
    plan = _resolve(world, recipe, root, run=run, offline=offline, on_progress=on_progress)
    if world.is_first:
        world.publish(f"recipe {tries}", plan.recipe.model_dump(mode="json"))
    if world.rank == leader:
        world.publish(f"rows of {leader}, {tries}", True)
    return plan


def _resolve(
    world: World, recipe: Recipe, root: Path, *, offline: bool, on_progress: OnProgress, run: Run | None
) -> ResolvedRun:
    """Resolve the run, and download the weights of the model if they are missing."""
    if recipe.repeatable:
        machine.use_repeatable_kernels()  # before the machine's speed is measured
    plan = resolve_run(recipe, root=root, offline=offline, on_progress=on_progress, run=run, world=world)
    if plan.inputs.located.has_weights:
        return plan
    on_progress("download", 0, 1)  # the run fits into memory, so its weights are worth fetching
    resolve_base(plan.inputs.recipe.model_copy(update={"revision": plan.inputs.revision}))
    on_progress("download", 1, 1)
    return resolve_run(recipe, root=root, on_progress=on_progress, run=run, world=world)


def _load(recipe: Recipe, inputs: Inputs, labels: Labels | None, world: World) -> tuple[PreTrainedModel, int]:
    """Load the model as the method needs its base. Returns it with its number of weights."""
    if recipe.shard is True:
        world.connect()
    method, device = recipe.method, world.card or recipe.device
    if allocator_note := prepare_allocator(device):
        inputs.notes.append(allocator_note)
    model = load.load_model(
        inputs.located,
        dtype=TORCH_DTYPES[resolved(recipe.precision)],
        device="cpu" if inputs.located.is_gguf or recipe.shard is True else device,
        head=inputs.head,
        labels=labels,
        seed=recipe.seed,
        tokenizer=inputs.renderer.tokenizer,
        packing=METHODS[method.name].packing(method),
        on_note=inputs.notes.append,
    )
    resize_embeddings(model, inputs.added)
    num_parameters = num_weights(model)
    if recipe.shard is True:
        from tunesmith.parallel.fsdp import shard_layers

        shard_layers(world, model, model.base_model, layers_to_split(model, recipe.model), device=device)
    inputs.notes.extend(METHODS[method.name].prepare_base(model, method, device=device))
    checkpoint_layers(model, resolved(recipe.train.checkpointed_layers))
    if TASKS[resolved(recipe.task)].compares or TASKS[resolved(recipe.task)].samples:
        disable_dropout(model)
    return model, num_parameters


def _refuse_longer_tokenizer(model: PreTrainedModel, inputs: Inputs, rows: Splits) -> None:
    """Raise ModelError for rows with a token that the model has no vector for."""
    tokenizer = inputs.renderer.tokenizer
    if len(tokenizer) <= model.get_input_embeddings().weight.shape[0]:
        return
    for store in (rows.store, rows.held_store):
        if why := without_vector(model, tokenizer, store.tokens):
            raise ModelError(f"{inputs.located.name}: {why}")


def _samples(evaluation: EvaluationOptions, inputs: Inputs, rows: Splits) -> tuple[list[SamplePrompt], list[str]]:
    """Held-out prompts to answer on the way, which leave an answer its place in the model's context, and notes
    on those that do not."""
    if inputs.head != "next_token" or rows.is_prompts:
        return [], []
    examples = rows.sample_examples(resolved(evaluation.samples))
    new_tokens = answer_tokens(evaluation.sample_tokens, rows)
    limit = PromptLimit.of(inputs.renderer, model_tokens=inputs.size.max_tokens, new_tokens=new_tokens)
    prompts = sample_prompts(inputs.renderer, examples, limit=limit, new_tokens=new_tokens)
    return prompts, sample_notes(prompts, num_rows=len(examples))


def answer_tokens(sample_tokens: int, rows: Splits) -> int:
    """Maximum number of tokens of an answer to a held-out prompt."""
    return new_tokens_for(rows.held_store.targets[rows.held_rows], sample_tokens)


def _layout(model: PreTrainedModel, rows: Splits, inputs: Inputs, *, plain: bool) -> tuple[Layout, list[str]]:
    """Choose packed rows if the model computes the same for them as for each row alone, else padded ones, with
    a note. An encoder–decoder has one layout only."""
    layout, *slower_layouts = layouts_of(inputs.kind)
    if not slower_layouts:
        return layout, []
    agreement = packed_agrees(model, inputs.kind, rows, renderer=inputs.renderer, plain=plain, num=PROBED)
    if agreement.ok:
        attention.use_packed_attention(model, plain=plain)
        kernels = ", ".join(agreement.kernels)
        notes = [Aside(f"attention: {kernels}, which a probe here found right")] if kernels else []
        return layout, [*notes, *([Aside(PACKED)] if rows.has_images else [])]
    note = f"padded batches: this model cannot run rows packed together ({agreement.reason}); slower, same result"
    return slower_layouts[0], [Aside(note)]


def _drawing(plan: ResolvedRun, attachment: Attachment, output: OutputLayer | None, *, shares: bool) -> Drawing | None:
    """The drawing of answers, with their grader. Raises InputError for a grader that cannot be loaded."""
    recipe, inputs, rows = plan.recipe, plan.inputs, plan.rows
    if not rows.is_prompts:
        return None
    if recipe.reinforce.kl and not attachment.keeps_base:
        raise RecipeError(
            f"reinforce.kl: {recipe.reinforce.kl:g}: needs the untouched model, and this method changes weights of its "
            "own. Use method lora without method.also_train and data.new_tokens, or leave it out."
        )
    prompts = {store: rows.prompts(store, rows_I) for store, rows_I in rows.sides}
    if rows.held_store is rows.store:  # one store has both sides
        prompts = {rows.store: rows.prompts(rows.store, np.concatenate([rows.train_rows, rows.held_rows]))}
    grades, device = KeptGrades(), resolved(recipe.device)
    pool = pool_of(recipe.grader_at, grades, root=plan.root, offline=plan.offline, device=device)
    return Drawing(recipe, inputs.renderer, output, shares, prompts, pool, grades)


def _refuse_drawing(rows: Splits, model: PreTrainedModel, layout: Layout, notes: Sequence[str], name: str) -> None:
    """Raise ModelError for a model whose answers cannot be drawn, or would be learnt in padded batches."""
    if not rows.is_prompts:
        return
    if layout != "packed":
        why = f": {notes[0]}" if notes else ""
        raise ModelError(f"{name}: task reinforce learns packed rows, which this model does not run{why}. Use another.")
    refuse_undrawable(name, model)


def _identity(
    recipe: Recipe, rows: Splits, renderer: Renderer, model_hashes: Mapping[str, str], drawing: Drawing | None, *,
    teacher: Teacher | None,
) -> dict[str, str]:  # fmt: skip
    """`Setup.identity`: values of settings, hashes of model and data, and what else may not change. Sections of
    the recipe for other tasks are left out."""
    section = TASKS[resolved(recipe.task)].section
    others = {task.section.name for task in TASKS.values() if task.section and task.section is not section}
    options = flat(recipe.model_dump(exclude={"track", *others}))
    settings = {f"setting {key}": str(value) for key, value in options.items()}
    model = {f"model {name}": digest for name, digest in model_hashes.items()}
    file_hashes = {**rows.store.data_hashes, **rows.held_store.data_hashes}
    data = {f"data {path}": digest for path, digest in file_hashes.items()}
    encoded = {
        "tokenizer and template": renderer.fingerprint,
        "rows": rows.store.key,
        "held-out rows": rows.held_store.key,
        "setting order of rows": f"version {sampler.ORDER_VERSION}",
        **({} if drawing is None else {"grader": drawing.pool.identity}),
        **({} if not rows.has_images else {"images": f"{rows.store.summary.images} {rows.held_store.summary.images}"}),
        **({} if teacher is None else {"teacher": teacher.digest}),
    }
    return {**settings, **model, **data, **encoded}


def refuse_small_disk(setup: Setup, folder: Path) -> None:
    """Raise DoesNotFitError where the disk of `folder` has less free space than checkpoints and result take.

    `folder`: the runs folder, a new run's folder, or a resumed run's folder, whose checkpoints are replaced.
    """
    attachment, num_snapshots = setup.attachment, setup.recipe.checkpoint.snapshots
    trained_bytes = 4 * attachment.num_trained  # in float32; of a split run more than this process holds
    local_bytes = 4 * sum(tensor.numel() for tensor in attachment.trained.values())
    optimizer_bytes = setup.optimizer.state_bytes() * trained_bytes // local_bytes
    checkpoints = (trained_bytes + optimizer_bytes) * kept_checkpoints(
        setup.recipe.checkpoint, setup.total_steps, keeps_best=setup.recipe.evaluation.every is not None
    )
    is_adapter = METHODS[setup.recipe.method.name].is_adapter
    result = trained_bytes if is_adapter else sum(tensor.nbytes for tensor in setup.model.parameters())
    num_results = 1 + num_snapshots + bool(num_snapshots)  # the last one: a snapshot at a stop
    written = sum(path.stat().st_size for path in (folder / "checkpoints").rglob("*") if path.is_file())
    needed = checkpoints + result * num_results - min(checkpoints, written)
    if (free := free_bytes(folder)) == sys.maxsize:
        setup.notes.append(f"{folder}: free space unknown")
    if needed <= free:
        return
    raise DoesNotFitError(
        f"{folder}: the disk has {size(free)} free, but this run needs {size(needed)} more: "
        f"{size(checkpoints)} for checkpoints{f', of which it has {size(written)},' if written else ''} and "
        f"{size(result)} for the result. Free some space, choose a folder on a larger disk with --runs, or "
        "keep fewer checkpoints with checkpoint.keep.",
        needed=needed,
        room=free,
    )


def collators(
    recipe: Recipe, inputs: Inputs, rows: Splits, model: PreTrainedModel, sampler: StepSampler, *, device: str
) -> tuple[Collator, Collator, list[Choice]]:
    """Make the collators of training rows and of held-out rows; returns what was decided for them too.

    Held-out rows are masked by one seed in all runs, so that their metrics can be compared, and each is
    computed whole, as in a later evaluation of the result.
    """
    tokenizer, layout = inputs.renderer.tokenizer, sampler.layout
    is_masked = inputs.head == "masked_token"
    choice = decide_sharing(recipe, inputs, rows.store, model, sampler)

    def collator(store: RowStore, seed: int, *, shares: bool) -> Collator:
        return Collator(
            store,
            layout=layout,
            device=device,
            masking=Masking.of(tokenizer, share=recipe.train.masked, seed=seed) if is_masked else None,
            decoder_start=getattr(model.config, "decoder_start_token_id", None),
            has_types=has_token_types(model, tokenizer),
            pad_id=pad_id(model, tokenizer),
            shares=shares,
            pools=TASKS[resolved(recipe.task)].pools,
            batch_images=inputs.renderer.batch_images,
            image_token=image_token_of(inputs, store),
            pads=pads_to_multiple(layout, device=torch.device(device).type, precision=resolved(recipe.precision)),
        )

    shares = choice is not None and bool(choice.value)
    choices = [] if choice is None else [choice]
    return collator(rows.store, recipe.seed, shares=shares), collator(rows.held_store, 0, shares=False), choices
