"""Proofs that a person can run on their own model: two ways to compute one number, compared.

Each proof says what was compared, what was found and what is allowed.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import orjson
import torch
from torch import Tensor

from tunesmith.environment.process import refuse_ranks
from tunesmith.errors import InputError
from tunesmith.methods import restore
from tunesmith.models import load
from tunesmith.models.load import model_kind
from tunesmith.models.packing_check import TOLERANCES
from tunesmith.models.resolve_model import ModelRef, resolve_base
from tunesmith.optim import Optimizer
from tunesmith.recipe.load import validate
from tunesmith.recipe.schema import Recipe
from tunesmith.runs import checkpoint
from tunesmith.tasks import TASKS
from tunesmith.training.loop import training_steps
from tunesmith.training.packed_rows import packed_agrees
from tunesmith.training.setup import Setup, prepare
from tunesmith.training.step import step_loss
from tunesmith.types import TaskName

STEPS = 4

QUESTIONS = (
    ("What is the capital of France?", "Paris."),
    ("Name a colour.", "Blue, like the sky on a clear day."),
    ("How many days has a week?", "Seven: Monday to Sunday."),
    ("Say hello.", "Hello! How can I help you today?"),
    ("What do bees make?", "Honey, and wax for their combs."),
    ("Is water wet?", "People have argued about it for a long time, and they still do."),
    ("2 + 2?", "4"),
    ("Who wrote Hamlet?", "William Shakespeare wrote Hamlet around the year 1600."),
)
"""Texts for rows of a model without data."""


@dataclass(frozen=True, slots=True)
class Proof:
    """One comparison, and whether it passed."""

    name: str
    passed: bool
    found: str


def selftest(recipe: Recipe, *, offline: bool = False) -> Iterator[Proof]:
    """Yield every proof in turn, on the rows of the recipe, or on built-in rows if it names none."""
    refuse_ranks(os.environ)
    with tempfile.TemporaryDirectory(prefix="tunesmith-selftest-") as name, _as_it_was():
        folder = Path(name)
        setup = prepare(_small(recipe, folder, offline=offline), root=folder, offline=offline)
        setup = replace(setup, total_steps=STEPS)
        if setup.drawing is not None:
            setup.drawing.close()
            raise InputError(
                "task reinforce: its rows have no answers that a self-test could learn; each run itself checks that "
                "answers are drawn and learnt by the same numbers. Test the model with another task: --set task=chat"
            )
        if setup.teacher is not None:
            raise InputError(
                "task distil: its rows cannot be learnt before a teacher has read them. Test the model with "
                "another task: --set task=chat"
            )
        yield _packing(setup)
        if setup.samples:
            yield _templates(setup)
        yield _accumulation(setup)
        yield _resume(setup, folder)


@contextmanager
def _as_it_was() -> Iterator[None]:
    """A block after which torch is free to take any kernel, if it was before."""
    is_strict = torch.are_deterministic_algorithms_enabled()
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(is_strict)


def _small(recipe: Recipe, folder: Path, *, offline: bool) -> Recipe:
    # Kernels of a card add in any order, unless they are kept from it, and a proof compares bits.
    recipe = recipe.model_copy(update={"repeatable": True})
    if recipe.data.train:  # which of a run are found where they are now
        return recipe.model_copy(update={"train": recipe.train.model_copy(update={"rows_per_step": 4})})
    data = recipe.model_dump()
    file = folder / "rows.jsonl"
    task = recipe.task
    if task == "auto":
        task = _task_of(resolve_base(recipe, offline=offline, weights=False), recipe.data.template_at)
    rows, record = [], TASKS[task].record
    for question, answer in QUESTIONS:
        kind = "question" if "?" in question else "order"
        learns_classes = TASKS[task].learns_classes
        rows.append(record(f"{question} {answer}", kind) if learns_classes else record(question, answer))
    file.write_bytes(b"\n".join(map(orjson.dumps, rows)))
    data["data"] |= {"train": [{"path": str(file)}], "held_out": 0.1}
    data["train"] |= {"rows_per_step": 4}
    return validate({**data, "task": task})


def _task_of(located: ModelRef, template: str | None) -> TaskName:
    """The task that is usual for a model."""
    kind = model_kind(located)
    tokenizer = load.load_tokenizer(located, template, on_note=lambda note: None)
    has_template = bool(tokenizer.chat_template)
    fitting = [task for task in TASKS.values() if kind in task.heads and (has_template or not task.is_chat)]
    # An encoder of sentences has no head for masked tokens, and every encoder can get one for classes.
    return min(fitting, key=lambda task: kind == "encoder" and not task.learns_classes).name


def _packing(setup: Setup) -> Proof:
    plain = setup.recipe.kernels == "plain"
    agreement = packed_agrees(setup.model, setup.kind, setup.rows, renderer=setup.renderer, plain=plain, num=4)
    if setup.sampler.layout != "packed":
        return Proof("rows do not see each other", True, f"padded batches are used: {agreement.reason}")
    allowed = TOLERANCES[setup.model.dtype]
    finding = f"answers packed and alone differ by {agreement.error:.1e} of their spread, allowed is {allowed:.0e}"
    return Proof("rows do not see each other", agreement.ok, finding)


def _templates(setup: Setup) -> Proof:
    """The tokens before each trained answer are the tokens of the prompt that a server would read."""
    held_out = [setup.rows.held_store.row(int(index)) for index in setup.rows.held_rows]
    num_right = 0
    for sample in setup.samples:
        row = next(row for row in held_out if str(row.source) == sample.source)
        num_right += row.ids[: len(sample.ids)].tolist() == list(sample.ids)
    finding = f"{num_right} of {len(setup.samples)} rows begin with the prompt as it is served"
    return Proof("training prompts are serving prompts", num_right == len(setup.samples), finding)


def _accumulation(setup: Setup) -> Proof:
    """Gradients of the same rows in one pass and in as many passes as rows."""
    rows = [int(i) for i in setup.rows.train_rows[:4]]
    together = _gradients(setup, [rows])
    alone = _gradients(setup, [[row] for row in rows])
    scale = max(float(g.norm()) for g in together.values())
    worst = max(float((together[name] - alone[name]).norm()) for name in together) / scale
    compares = setup.store.branches.has_any  # what two answers have in common cancels, its rounding does not
    allowed = (1e-4 if compares else 1e-5) if setup.recipe.precision == "float32" else 5e-2
    finding = f"gradients of 1×{len(rows)} and {len(rows)}×1 rows differ by {worst:.1e}, allowed is {allowed:.0e}"
    return Proof("passes do not change the update", worst <= allowed, finding)


def _gradients(setup: Setup, passes: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    store = setup.rows.store
    count = sum(float(store.denominators[i]) for rows in passes for i in rows)
    setup.optimizer.zero_grad()
    setup.model.eval()  # no dropout: it would differ between the two ways
    loss_of = step_loss(setup, [tuple(rows) for rows in passes], 1)
    for rows in passes:
        batch = setup.collator.batch(rows, step=0, lines="learnt")
        (loss_of(setup.model, batch) / count).backward()  # type: ignore[no-untyped-call]
        setup.attachment.collect_gradients()
    gradients = {name: t.grad.clone() for name, t in setup.attachment.trained.items() if t.grad is not None}
    setup.optimizer.zero_grad()
    return gradients


def _resume(setup: Setup, folder: Path) -> Proof:
    """Four steps in one go, and two steps, a checkpoint read back, and two more: equal bit for bit."""
    fresh = {name: tensor.detach().clone() for name, tensor in setup.attachment.trained.items()}
    straight_losses = _run(setup, start=0, stop=STEPS)
    straight = {name: tensor.detach().clone() for name, tensor in setup.attachment.trained.items()}

    _restart(setup, fresh, {})
    losses = _run(setup, start=0, stop=STEPS // 2)
    state = setup.optimizer.state()
    checkpoint.save(folder / "checkpoints", STEPS // 2, weights=setup.attachment.trained, optimizer=state, state={})
    _restart(setup, fresh, {})
    saved = checkpoint.newest(folder / "checkpoints", lambda path, why: None)
    assert saved is not None
    _restart(setup, saved.weights, saved.optimizer)
    losses += _run(setup, start=STEPS // 2, stop=STEPS)

    same = all(torch.equal(straight[name], tensor) for name, tensor in setup.attachment.trained.items())
    passed = same and losses == straight_losses
    verdict = "equal bit for bit" if passed else "different"
    finding = f"{STEPS} steps and {STEPS // 2} + {STEPS // 2} resumed: {verdict}"
    return Proof("a resumed run is the same run", passed, finding)


def _restart(setup: Setup, weights: Mapping[str, Tensor], optimizer: Mapping[str, Tensor]) -> None:
    restore(setup.attachment, weights)
    recipe, attachment = setup.recipe, setup.attachment
    setup.optimizer = Optimizer(attachment.trained, recipe.optim, factors=attachment.rate_factors)
    setup.optimizer.load(optimizer)


def _run(setup: Setup, *, start: int, stop: int) -> list[float]:
    losses = []
    for event in training_steps(setup, start=start):
        losses.append(event.values["loss"])
        if event.step == stop:
            break
    return losses
