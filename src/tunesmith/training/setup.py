"""Set up a run: from a recipe to a `Setup` with model, rows, method and steps. Every "auto" is decided and
every check made before step 1."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

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
from tunesmith.recipe.load import validate
from tunesmith.recipe.schema import EvaluationOptions, Recipe, resolved
from tunesmith.runs.atomic import free_bytes
from tunesmith.runs.background import in_background
from tunesmith.runs.folder import Run
from tunesmith.tasks import TASKS, bind
from tunesmith.training.draw import Drawing
from tunesmith.training.image_parts import seeing_notes
from tunesmith.training.inputs import Inputs
from tunesmith.training.packed_rows import PACKED_NOTE, packed_agrees
from tunesmith.training.resolve import ResolvedRun, resolve_run, sampler_of
from tunesmith.training.same_run import run_identity
from tunesmith.training.shared_prefixes import decide_sharing, image_token_of, with_shared_prefixes
from tunesmith.training.state import LossScale, TrainState
from tunesmith.training.taught_answers import taught_by
from tunesmith.training.teacher import Teacher, leader_of
from tunesmith.types import Aside, Attachment, Choice, HeadName, JsonObject, Layout, ModelKind, OnProgress

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
    user_options: JsonObject
    """Options of the user's recipe that differ from the defaults, before anything was decided."""
    forecast: Forecast | None
    """Predicted memory and time; None for a resumed run, or if prediction failed."""
    drawing: Drawing | None = None
    """Draws and grades answers; None: the rows have answers."""
    teacher: Teacher | None = None
    """The model to learn from: it reads the rows, or the answers that are drawn."""
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
    resolved_run = _resolve_together(world, recipe, root, offline=offline, on_progress=on_progress, run=run)
    if run is None and resolved_run.served is not None:
        # Before a model is loaded. A resumed run may not need its teacher any more.
        resolved_run.served.prove()
    setup = _set_up(resolved_run, world, on_progress)
    # A float16 that the user set stays: a loss that is not a number will show where it overflows.
    is_default = "precision" not in resolved_run.user_options
    if resolved_run.recipe.precision != "float16" or not _overflows(setup, is_default=is_default):
        return setup
    del setup
    free_cached_memory()
    float32 = recipe.model_copy(update={"precision": "float32"})
    resolved_run = _resolve_together(
        world, float32, root, offline=offline, on_progress=on_progress, run=run, earlier_tries=1
    )
    reason = "numbers in this model are too large for float16, this device's fast type, as first rows showed"
    other_choices = [choice for choice in resolved_run.choices if choice.key != "precision"]
    resolved_run.choices = [*other_choices, Choice("precision", "float32", reason)]
    resolved_run.user_options.pop("precision", None)  # float32 was decided here, not set by the user
    return _set_up(resolved_run, world, on_progress)


@torch.no_grad()
def _overflows(setup: Setup, *, is_default: bool) -> bool:
    """Whether the forward pass overflows on one of the first rows, which no scale of the loss can mend. Nothing
    is tried where the user set the precision. The first rank tries the rows for all ranks.

    `is_default`: whether the precision was decided here."""
    world = setup.world
    if not world.is_first:
        return bool(world.wait_for("overflows"))
    rows = [int(i) for i in setup.rows.train_rows[:PROBED]] if is_default else []
    overflows = False
    with eval_mode(setup.model):
        for row in rows:
            batch = setup.collator.batch([row], step=1)
            if setup.drawing is not None:  # a prompt has no targets: all its tokens are tried instead
                places_N = torch.arange(batch.lengths[0], device=batch.ids_BT.device)
                batch = replace(batch, predict_N=places_N, targets_N=batch.ids_BT[0, : len(places_N)])
            overflows = overflows or not bool(setup.task.measure(setup.model, batch).losses_N.isfinite().all())
    world.publish("overflows", overflows)
    return overflows


def _set_up(resolved_run: ResolvedRun, world: World, on_progress: OnProgress) -> Setup:
    """Load the model of a resolved run and attach its method."""
    recipe, inputs, rows = resolved_run.recipe, resolved_run.inputs, resolved_run.rows
    device = world.card or recipe.device
    on_progress("load", 0, 1)
    hashes = in_background(partial(load.fingerprint, inputs.located))
    torch.set_num_threads(resolved(recipe.threads))
    model, num_parameters = _load(recipe, inputs, rows, world)
    new_head = not set(new_param_names(model)).isdisjoint(new_head_names(model))
    tokenizer = inputs.renderer.tokenizer
    attachment = attach(recipe, model, head=inputs.head, store=rows.store, pad_id=pad_id(model, tokenizer))
    kernel_notes = _use_fast_layers(model, world, kernels=recipe.kernels, device=recipe.device)
    with attachment.perturbed():
        layout, padding_notes = _layout(model, rows, inputs, plain=recipe.kernels == "plain")
        _refuse_drawing(rows, model, layout, padding_notes, inputs.located.name)
    loss_in_pieces = METHODS[recipe.method.name].fused_loss and recipe.kernels == "fast"
    output_layer, loss_notes = _output_layer(model) if loss_in_pieces else (None, [])
    task_name, vocabulary = resolved(recipe.task), len(tokenizer)
    task = bind(task_name, rows.labels, recipe.loss, output_layer, recipe=recipe, vocabulary=vocabulary)
    optimizer = Optimizer(attachment.trained, recipe.optim, factors=attachment.rate_factors)
    on_progress("load", 1, 1)
    sampler, collator, held_collator, sharing = _batches(recipe, inputs, rows, model, layout=layout, world=world)
    drawing = _drawing(resolved_run, attachment, output_layer, shares=collator.shares)
    teacher, taught_answers = taught_by(resolved_run, model, output_layer, world)
    samples, prompt_notes = _samples(recipe.evaluation, inputs, rows)
    notes = [*inputs.notes, *resolved_run.notes, *rows.notes, *far_numbers(rows)]
    notes += [*kernel_notes, *padding_notes, *loss_notes, *attachment.notes]
    notes += [*seeing_notes(model, rows), *prompt_notes]
    return Setup(
        recipe=recipe,
        choices=[*resolved_run.choices, *sharing],
        notes=notes,
        located=inputs.located,
        model=model,
        max_tokens=inputs.size.max_tokens,
        num_parameters=num_parameters,
        renderer=inputs.renderer,
        task=task,
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
        user_options=resolved_run.user_options,
        forecast=resolved_run.forecast,
        draw=drawing or taught_answers,
        drawing=drawing,
        teacher=teacher,
        identity=run_identity(recipe, rows, inputs.renderer, hashes.result(), drawing=drawing, teacher=teacher),
        world=world,
    )


def _use_fast_layers(model: PreTrainedModel, world: World, *, kernels: str, device: str) -> list[str]:
    """Compute each known layer in one autograd node. Returns a note if this card has no kernel that does so."""
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
    world: World,
    recipe: Recipe,
    root: Path,
    *,
    run: Run | None,
    offline: bool,
    on_progress: OnProgress,
    earlier_tries: int = 0,
) -> ResolvedRun:
    """Resolve the run on the first rank, then with its recipe on one rank of each machine, then on the others.
    `earlier_tries`: how often this was done before; it keeps the ranks' messages apart."""
    if not world.is_first:
        decided = validate(world.wait_for(f"recipe {earlier_tries}"))
        recipe = decided if run is None else run.place(decided)
    leader = leader_of(world)  # it encodes the rows of its machine
    rows_are_ready = f"rows of {leader}, {earlier_tries}"
    if world.rank != leader:
        world.wait_for(rows_are_ready, leader)
    resolved_run = _resolve(world, recipe, root, run=run, offline=offline, on_progress=on_progress)
    if world.is_first:
        world.publish(f"recipe {earlier_tries}", resolved_run.recipe.model_dump(mode="json"))
    if world.rank == leader:
        world.publish(rows_are_ready, True)
    return resolved_run


def _resolve(
    world: World, recipe: Recipe, root: Path, *, offline: bool, on_progress: OnProgress, run: Run | None
) -> ResolvedRun:
    """Resolve the run, and download the weights of the model if they are missing."""
    if recipe.repeatable:
        machine.use_repeatable_kernels()  # before the machine's speed is measured
    resolved_run = resolve_run(recipe, root=root, offline=offline, on_progress=on_progress, run=run, world=world)
    inputs = resolved_run.inputs
    if inputs.located.has_weights:
        return resolved_run
    on_progress("download", 0, 1)  # the run fits into memory, so its weights are worth fetching
    resolve_base(inputs.recipe.model_copy(update={"revision": inputs.revision}))
    on_progress("download", 1, 1)
    return resolve_run(recipe, root=root, on_progress=on_progress, run=run, world=world)


def _load(recipe: Recipe, inputs: Inputs, rows: Splits, world: World) -> tuple[PreTrainedModel, int]:
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
        labels=rows.labels,
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
    task = TASKS[resolved(recipe.task)]
    if task.compares or task.samples:
        disable_dropout(model)
    _refuse_longer_tokenizer(model, inputs, rows)
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
    """Held-out prompts to answer during the run, and notes. A prompt that leaves no room for an answer in the
    model's context is left out, and a note says so."""
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
        notes: list[str] = [Aside(f"attention: {kernels}, which a probe here found right")] if kernels else []
        if rows.has_images:
            notes.append(Aside(PACKED_NOTE))
        return layout, notes
    note = f"padded batches: this model cannot run rows packed together ({agreement.reason}); slower, same result"
    return slower_layouts[0], [Aside(note)]


def _drawing(
    resolved_run: ResolvedRun, attachment: Attachment, output_layer: OutputLayer | None, *, shares: bool
) -> Drawing | None:
    """The drawing of answers, with their grader. Raises InputError for a grader that cannot be loaded."""
    recipe, inputs, rows = resolved_run.recipe, resolved_run.inputs, resolved_run.rows
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
    root, offline = resolved_run.root, resolved_run.offline
    pool = pool_of(recipe.grader_at, grades, root=root, offline=offline, device=device)
    return Drawing(recipe, inputs.renderer, output_layer, shares, prompts, pool, grades)


def _refuse_drawing(rows: Splits, model: PreTrainedModel, layout: Layout, notes: Sequence[str], name: str) -> None:
    """Raise ModelError for a model whose answers cannot be drawn, or would be learnt in padded batches."""
    if not rows.is_prompts:
        return
    if layout != "packed":
        why = f": {notes[0]}" if notes else ""
        raise ModelError(f"{name}: task reinforce learns packed rows, which this model does not run{why}. Use another.")
    refuse_undrawable(name, model)


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
    num_results = 1 + num_snapshots + bool(num_snapshots)  # with snapshots, one more may be made at a stop
    old_files = [path for path in (folder / "checkpoints").rglob("*") if path.is_file()]
    old_checkpoints = sum(path.stat().st_size for path in old_files)
    needed = checkpoints + result * num_results - min(checkpoints, old_checkpoints)
    if (free := free_bytes(folder)) == sys.maxsize:
        setup.notes.append(f"{folder}: free space unknown")
    if needed <= free:
        return
    kept = f", of which it has {size(old_checkpoints)}," if old_checkpoints else ""
    raise DoesNotFitError(
        f"{folder}: the disk has {size(free)} free, but this run needs {size(needed)} more: "
        f"{size(checkpoints)} for checkpoints{kept} and "
        f"{size(result)} for the result. Free some space, choose a folder on a larger disk with --runs, or "
        "keep fewer checkpoints with checkpoint.keep.",
        needed=needed,
        room=free,
    )


def _batches(
    recipe: Recipe, inputs: Inputs, rows: Splits, model: PreTrainedModel, *, layout: Layout, world: World
) -> tuple[StepSampler, Collator, Collator, list[Choice]]:
    """Make the sampler of steps, and the collators of training rows and of held-out rows. Returns them, and
    what was decided for them.

    Held-out rows are masked by one seed in all runs, so that their metrics can be compared, and each is
    computed whole, as in a later evaluation of the result.
    """
    tokenizer, device = inputs.renderer.tokenizer, world.card or resolved(recipe.device)
    is_masked = inputs.head == "masked_token"
    sampler = sampler_of(recipe.train, rows, layout, device, seed=recipe.seed)
    sampler = replace(sampler, part=world.part, equal_passes=world.is_sharded)
    sharing = decide_sharing(recipe, inputs, rows.store, model, sampler)
    shares = sharing is not None and bool(sharing.value)
    if shares:
        sampler = with_shared_prefixes(sampler, rows.store, image_token_of(inputs, rows.store))

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

    trained, held_out = collator(rows.store, recipe.seed, shares=shares), collator(rows.held_store, 0, shares=False)
    return sampler, trained, held_out, [] if sharing is None else [sharing]
