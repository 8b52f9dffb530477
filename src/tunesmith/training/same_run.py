"""Whether a run that is resumed is still the same run: its identity, and what of it may change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from tunesmith.data import sampler
from tunesmith.errors import RecipeError, RunError
from tunesmith.inference.load import follow_renamed_gguf
from tunesmith.parallel.world import World
from tunesmith.phrases import changes
from tunesmith.recipe import load
from tunesmith.recipe.docs import flat
from tunesmith.recipe.schema import Recipe, resolved
from tunesmith.runs.folder import Run
from tunesmith.tasks import TASKS

if TYPE_CHECKING:
    from tunesmith.data.renderer import Renderer
    from tunesmith.data.splits import Splits
    from tunesmith.training.draw import Drawing
    from tunesmith.training.setup import Setup
    from tunesmith.training.teacher import Teacher

MAY_CHANGE = ("train.tokens_per_pass", "train.checkpointed_layers", "memory", "devices", "shard")
"""Options that change the memory of a step, and of its result rounding and dropout's random numbers."""
NAMED_LATER = {
    "setting data.encoding": "auto",
    "setting data.suffixes": "()",
    "setting evaluation.samples_on_the_way": "0",
    "setting data.image_folder": "None",
    "setting data.limits.images": "64",
    "setting data.limits.image_bytes": "20971520",
    "setting data.limits.image_pixels": "24000000",
    "setting reinforce.updates": "1",
    "setting distil.model": "None",
    "setting distil.key_env": "",
}
"""Settings that earlier versions did not record, with the values that they used; each new option goes here."""
MEASURES_LATER = "setting evaluation.samples_before"
"""Another such setting, which changes only a measurement: it may have any value."""


def run_identity(
    recipe: Recipe,
    rows: Splits,
    renderer: Renderer,
    model_hashes: Mapping[str, str],
    *,
    drawing: Drawing | None,
    teacher: Teacher | None,
) -> dict[str, str]:
    """`Setup.identity`: values of settings, hashes of model and data, and what else may not change. Sections of
    the recipe for other tasks are left out."""
    section = TASKS[resolved(recipe.task)].section
    sections = [task.section for task in TASKS.values() if task.section is not None]
    unused_sections = {other.name for other in sections if other is not section}
    options = flat(recipe.model_dump(exclude={"track", *unused_sections}))
    settings = {f"setting {key}": str(value) for key, value in options.items()}
    model = {f"model {name}": digest for name, digest in model_hashes.items()}
    file_hashes = {**rows.store.data_hashes, **rows.held_store.data_hashes}
    data = {f"data {path}": digest for path, digest in file_hashes.items()}
    encoded = {
        "tokenizer and template": renderer.fingerprint,
        "rows": rows.store.key,
        "held-out rows": rows.held_store.key,
        "setting order of rows": f"version {sampler.ORDER_VERSION}",
    }
    if drawing is not None:
        encoded["grader"] = drawing.pool.identity
    if rows.has_images:
        encoded["images"] = f"{rows.store.summary.images} {rows.held_store.summary.images}"
    if teacher is not None:
        encoded["teacher"] = teacher.digest
    return {**settings, **model, **data, **encoded}


def refuse_other_run(
    run: Run, setup: Setup, then: Mapping[str, str], settings: Sequence[str]
) -> tuple[list[str], list[str]]:
    """Compare the identity of a run `then`, in its checkpoint, with the one that it has now.

    Returns notes on settings that an earlier resume changed, and the settings that its version did not record.

    Raises:
        RunError: it would be another run.
    """
    if not then:
        return [], []
    later = {key: value for key, value in NAMED_LATER.items() if key in setup.identity}
    unnamed = [key for key in later if key not in then]
    then = follow_renamed_gguf({**later, **then}, setup.identity)
    known = then.get("tokenizer and template")
    if known not in (None, setup.renderer.fingerprint) and setup.renderer.is_of(known):
        # An earlier version named it, and rows, by less; files of model and data are compared by hash.
        named_anew = ("tokenizer and template", "rows", "held-out rows")
        then |= {key: setup.identity[key] for key in named_anew if key in then}
    free = {f"setting {key}" for key in (*MAY_CHANGE, *(setting.partition("=")[0] for setting in settings))}
    free.add(MEASURES_LATER)
    try:
        _refuse_changes(run, _without(setup.identity, free), _without(then, free))
    except RunError:
        setup.rows.discard()
        raise
    pairs = [(key, setup.identity.get(f"setting {key}"), then.get(f"setting {key}")) for key in MAY_CHANGE]
    # A `resume --set` that was killed before its checkpoint left them.
    notes = [f"{key} is {new} in recipe.yaml; it was {old} until here" for key, new, old in pairs if new != old]
    return [] if settings else notes, unnamed


def settings_of_group(recipe: Recipe, world: World) -> list[str]:
    """Settings of a run that is resumed on another number of devices: the same number of threads in all, and
    whole layers if one process is left."""
    before = 1 if recipe.devices == "auto" else recipe.devices
    unsharded = ["shard=false"] if world.size == 1 and recipe.shard is True else []
    if before == world.size:
        return unsharded
    threads = max(1, resolved(recipe.threads) * before // world.size)
    is_cpu = recipe.device == "cpu" and threads != recipe.threads
    return [*unsharded, f"devices={world.size}", *([f"threads={threads}"] if is_cpu else [])]


def with_settings(run: Run, settings: Sequence[str]) -> Recipe:
    """The recipe of a run with the settings that a user gave. Raises RecipeError if they make another run."""
    keys = [setting.partition("=")[0].strip() for setting in settings]
    if other := [key for key in keys if key not in MAY_CHANGE]:
        raise RecipeError(
            f"--set {other[0]}: it would be another run. When a run is resumed, only {', '.join(MAY_CHANGE)} "
            "can change; for anything else start a new run with `tunesmith train`."
        )
    return recipe_with(run, settings)


def recipe_with(run: Run, settings: Sequence[str]) -> Recipe:
    """The recipe of a run with some settings, and with its files where they are now."""
    return run.place(load.load(str(run.recipe_path), settings)) if settings else run.recipe()


def _without(identity: Mapping[str, str], keys: set[str]) -> dict[str, str]:
    return {key: value for key, value in identity.items() if key not in keys}


def _refuse_changes(run: Run, now: Mapping[str, str], then: Mapping[str, str]) -> None:
    if changed := changes(then, now):
        raise RunError(
            f"{run.path}: cannot resume exactly, because this changed: {'; '.join(changed)}. "
            "Put it back, or start a new run with `tunesmith train`."
        )
