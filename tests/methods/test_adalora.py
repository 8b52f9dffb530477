"""AdaLoRA: what its loss has beside the rows and when its ranks move are peft's, however a step is cut and wherever a
run is broken off.
"""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

from methods.test_peft import base_model, by_peft, ids_of, logits, saved
from tiny_run import same_run, stop_at, tiny_recipe
from tunesmith.errors import RecipeError, Stopped
from tunesmith.methods import restore, state_dict
from tunesmith.methods.adalora import RankAllocation
from tunesmith.methods.peft import PeftAttachment, attach, load_result, resolve_steps
from tunesmith.optim import OPTIMIZERS, Optimizer, rate
from tunesmith.recipe.methods import PeftMethod
from tunesmith.recipe.schema import Optim, Recipe
from tunesmith.runs.folder import Run, runs
from tunesmith.training import step as gradients
from tunesmith.training.loop import training_steps
from tunesmith.training.setup import Setup, prepare
from tunesmith.training.trainer import resume, train

RANKS = {"init_r": 6, "target_r": 3, "tinit": 1, "tfinal": 2, "target_modules": ["q_proj", "v_proj"]}
STEPS = 10


def recipe_of(folder: Path, settings: dict[str, Any] | None = None, **sections: Any) -> Recipe:
    recipe = tiny_recipe(folder, **{"train": {"max_steps": STEPS}, **sections})
    return recipe.model_copy(update={"method": PeftMethod(kind="ADALORA", settings={**RANKS, **(settings or {})})})


def setup_of(folder: Path, *, tokens_per_pass: int = 96, **sections: Any) -> Setup:
    recipe = recipe_of(folder, train={"max_steps": STEPS, "tokens_per_pass": tokens_per_pass}, **sections)
    return prepare(recipe, root=folder)


def attachment_of(setup: Setup) -> PeftAttachment:
    assert isinstance(setup.attachment, PeftAttachment)
    return setup.attachment


def pattern(attachment: PeftAttachment) -> dict[str, list[bool]]:
    found: dict[str, list[bool]] = attachment.config.rank_pattern
    return found


def _saved_by_peft(attachment: PeftAttachment) -> dict[str, Tensor]:
    found = peft.get_peft_model_state_dict(attachment.wrapped, attachment.state_dict(), save_embedding_layers=False)
    return {name: tensor.detach().clone() for name, tensor in found.items()}


def kept(attachment: PeftAttachment) -> int:
    return sum(map(sum, pattern(attachment).values()))


def with_pefts_term(attachment: PeftAttachment, loss: Tensor) -> Tensor:
    """What peft's own forward makes of a loss."""
    tuner = attachment.wrapped.base_model
    own = tuner.model.forward
    tuner.model.forward = lambda: SimpleNamespace(loss=loss)
    try:
        found: Tensor = tuner().loss
    finally:
        tuner.model.forward = own
    return found


def pefts_own_loop(setup: Setup) -> list[float]:
    """Loss with its term, backward, update, ranks, zero: as peft's example has it."""
    attachment, recipe = attachment_of(setup), setup.recipe
    [(_, _, optimizer)] = setup.optimizer.parts
    losses = []
    for step in range(1, setup.total_steps + 1):
        setup.model.train()
        rows = [row for members in setup.sampler.step(step) for row in members]
        num_targets = sum(float(setup.rows.store.denominators[row]) for row in rows)
        loss = setup.task.loss_sum(setup.model, setup.collator.batch(rows, draw=step)) / num_targets
        losses.append(float(loss.detach()))
        with_pefts_term(attachment, loss).backward()
        torch.nn.utils.clip_grad_norm_(list(attachment.trained.values()), recipe.optim.clip)
        for group in optimizer.param_groups:
            group["lr"] = rate(step, setup.total_steps, recipe.optim)
        optimizer.step()
        attachment.wrapped.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    return losses


def assert_learns_what_peft_learns(ours: Setup, theirs: Setup) -> None:
    expected = pefts_own_loop(theirs)
    found = [event.values["loss"] for event in training_steps(ours)]
    assert len(found) == STEPS
    # float32 sums in another order, through ten updates of AdamW.
    assert found == pytest.approx(expected, abs=1e-4)
    lost = {name: [not has for has in mask] for name, mask in pattern(attachment_of(ours)).items()}
    for name, tensor in attachment_of(theirs).trained.items():
        assert torch.allclose(ours.attachment.trained[name], tensor, atol=1e-3), name
        if name in lost:
            assert (tensor[lost[name]] == 0).all()


def test_the_loop_learns_what_pefts_own_loop_learns(tmp_path: Path) -> None:
    ours, theirs = setup_of(tmp_path), setup_of(tmp_path, tokens_per_pass=4096)
    assert_learns_what_peft_learns(ours, theirs)
    attachment = attachment_of(ours)
    assert kept(attachment) == 3 * 4  # of 6 ranks of 4 layers
    assert len({sum(mask) for mask in pattern(attachment).values()}) > 1  # not each the same
    for name, has in pattern(attachment).items():
        assert (attachment.trained[name][:, 0] != 0).tolist() == has


@pytest.mark.parametrize("late", [False, True])
def test_the_test_sees_ranks_that_move_at_another_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, late: bool
) -> None:
    right = RankAllocation.around_update
    ours, theirs = setup_of(tmp_path), setup_of(tmp_path, tokens_per_pass=4096)
    shift = 1 if late else -1
    monkeypatch.setattr(RankAllocation, "around_update", lambda self, step: right(self, max(1, step - shift)))
    with pytest.raises(AssertionError):
        assert_learns_what_peft_learns(ours, theirs)


# trap: L13
def assert_passes_change_nothing(folder: Path) -> None:
    whole, cut = setup_of(folder, tokens_per_pass=4096), setup_of(folder, tokens_per_pass=1)
    together, alone = list(training_steps(whole)), list(training_steps(cut))
    assert {event.values["passes"] for event in together} == {1}
    assert sum(event.values["passes"] for event in alone) > 2 * STEPS
    for key in ("loss", "penalty", "grad_norm"):
        assert [e.values[key] for e in alone] == pytest.approx([e.values[key] for e in together], rel=1e-3), key
    assert pattern(attachment_of(cut)) == pattern(attachment_of(whole))


def test_passes_do_not_change_what_is_learnt(tmp_path: Path) -> None:
    assert_passes_change_nothing(tmp_path)


def once_a_pass(right: Callable[..., Any]) -> Callable[..., Any]:
    def buggy(setup: Setup, *given: Any) -> Any:
        found = right(setup, *given)
        gradients.penalize(setup)
        return found

    return buggy


def test_the_test_sees_a_term_that_counts_once_a_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradients, "_pass", once_a_pass(gradients._pass))
    with pytest.raises(AssertionError):
        assert_passes_change_nothing(tmp_path)


def test_the_term_is_pefts_and_told_beside_the_loss(tmp_path: Path) -> None:
    setup = setup_of(tmp_path)
    with torch.no_grad():
        expected = float(with_pefts_term(attachment_of(setup), torch.zeros(())))
    event = next(training_steps(setup))
    assert event.values["penalty"] == pytest.approx(expected, rel=1e-6)
    assert expected > 0.1
    first = next(training_steps(prepare(tiny_recipe(tmp_path), root=tmp_path)))
    assert event.values["loss"] == pytest.approx(first.values["loss"], abs=1e-5)  # fresh, both are the base
    assert "penalty" not in first.values


def assert_sensitivities_are_of_the_whole_gradient(setup: Setup) -> None:
    """|w · gradient| after the first update, of the rows, the term and the clipping together."""
    attachment, seen = attachment_of(setup), {}
    step = setup.optimizer.step

    def watched(lr: float, *, number: int, divisor: float) -> None:
        seen.update({name: tensor.grad / torch.tensor(divisor) for name, tensor in attachment.trained.items()})
        step(lr, number=number, divisor=divisor)

    setup.optimizer.step = watched  # type: ignore[method-assign]
    event = next(training_steps(setup))
    assert event.values["passes"] > 1
    assert attachment.step_hook
    for name, part in attachment.step_hook.state().items():
        if name.endswith("/ipt"):
            weight = name.removesuffix("/ipt")
            assert torch.equal(part, (attachment.trained[weight] * seen[weight]).abs()), name


def test_sensitivities_are_of_the_whole_gradient(tmp_path: Path) -> None:
    assert_sensitivities_are_of_the_whole_gradient(setup_of(tmp_path, tokens_per_pass=1))


@pytest.mark.parametrize("name", [name for name, row in OPTIMIZERS.items() if not row.counters])
def test_no_optimizer_changes_the_gradient_that_sensitivities_are_read_from(name: str) -> None:
    weights = {"x.lora_A": torch.randn(6, 64), "x.lora_E": torch.randn(6, 1)}
    update = Optimizer({key: tensor.requires_grad_() for key, tensor in weights.items()}, Optim(name=name, lr=1e-2))
    for _ in range(3):
        for tensor in weights.values():
            tensor.grad = torch.randn_like(tensor)
        before = {key: (tensor.grad, tensor.grad.clone()) for key, tensor in weights.items()}
        update.step(1e-2)
        assert all(torch.equal(now, then) for now, then in before.values())


# trap: R3
def assert_resumed_is_uninterrupted(straight: Run, folder: Path, at: int) -> None:
    with pytest.raises(Stopped):
        train(straight.recipe(), root=folder / "stopped", listener=stop_at(at))
    same_run(resume(runs(folder / "stopped")[0]), straight)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("straight")
    return train(recipe_of(folder), root=folder / "runs")


@pytest.mark.parametrize("at", [1, 5, STEPS - 1])
def test_resumed_it_is_uninterrupted(straight: Run, tmp_path: Path, at: int) -> None:
    """Before the first rank goes, in between, and after the last."""
    assert_resumed_is_uninterrupted(straight, tmp_path, at)


@pytest.mark.parametrize(("forgotten", "at"), [("exp_avg_unc", 5), ("mask", STEPS - 1)])
def test_the_test_sees_what_is_not_remembered(
    straight: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forgotten: str, at: int
) -> None:
    right = RankAllocation.load

    def buggy(self: RankAllocation, tensors: dict[str, Tensor]) -> None:
        right(self, {**tensors, **{n: t for n, t in self.state().items() if n.endswith(forgotten)}})

    monkeypatch.setattr(RankAllocation, "load", buggy)
    with pytest.raises(AssertionError):
        assert_resumed_is_uninterrupted(straight, tmp_path, at)


def test_an_earlier_step_that_is_put_back_has_its_own_ranks(tmp_path: Path) -> None:
    """As evaluation.keep: best does."""
    setup = setup_of(tmp_path)
    attachment = attachment_of(setup)
    for event in training_steps(setup):
        if event.step == 2:
            early = {name: tensor.detach().clone() for name, tensor in state_dict(attachment).items()}
            tensors, ranks = _saved_by_peft(attachment), kept(attachment)
    assert kept(attachment) < ranks
    restore(attachment, early)
    again = _saved_by_peft(attachment)
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in tensors.items())


def test_a_layer_that_has_lost_every_rank_is_saved_and_loaded(tmp_path: Path) -> None:
    settings = {**RANKS, "total_step": 4}
    attachment = attach(base_model(), PeftMethod(kind="ADALORA", settings=settings), seed=0)
    name = next(iter(pattern(attachment)))
    pattern(attachment)[name] = [False] * 6
    with torch.no_grad():
        for key, tensor in attachment.trained.items():
            tensor.zero_() if key == name else tensor.add_(torch.randn_like(tensor), alpha=0.1)
    live = logits(attachment.model)
    folder = saved(attachment, tmp_path)
    again = base_model()
    loaded = load_result(again, folder)
    assert loaded.trained[name].shape == (0, 1)
    # 2e-5: float32 in another order of sums.
    assert (logits(again) - live).abs().max() <= 2e-5
    assert (by_peft(folder) - live).abs().max() <= 2e-5
    assert (logits(base_model()) - live).abs().max() > 0.01
    under = peft.PeftModel.from_pretrained(base_model(), str(folder), adapter_name="another").eval()
    with torch.no_grad():
        assert (under(ids_of()).logits - live).abs().max() <= 2e-5


def test_a_layer_without_a_gradient_counts_for_nothing(tmp_path: Path) -> None:
    """An expert that no row came to."""
    attachment = attach(base_model(), PeftMethod(kind="ADALORA", settings={**RANKS, "total_step": 4}), seed=0)
    assert attachment.step_hook
    with attachment.step_hook.around_update(1):
        pass
    assert all(tensor.grad is None for tensor in attachment.trained.values())
    assert all(not part.any() for name, part in attachment.step_hook.state().items() if not name.endswith("mask"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_number_that_a_layer_divides_by_is_not_trained(dtype: torch.dtype) -> None:
    """It is not saved either: in bfloat16 peft alone would train it, so that the result were not what was trained."""
    model = base_model(dtype=dtype)
    attachment = attach(model, PeftMethod(kind="ADALORA", settings={**RANKS, "total_step": 4}), seed=0)
    assert {name.rpartition(".")[2] for name in attachment.trained} == {"lora_A", "lora_B", "lora_E"}
    scales = {name: weight for name, weight in model.named_parameters() if ".ranknum." in name}
    assert len(scales) == 4
    assert all(float(weight) == 6 and not weight.requires_grad for weight in scales.values())


def test_the_number_of_steps_is_the_runs_own(tmp_path: Path) -> None:
    setup = setup_of(tmp_path)
    assert setup.recipe.method.settings["total_step"] == setup.total_steps == STEPS
    assert ("method.settings.total_step", STEPS) in [(choice.key, choice.value) for choice in setup.choices]
    assert any("4 layers begin with 6 ranks each and keep 3 on average: 12 go" in note for note in setup.notes)
    again = prepare(setup.recipe, root=tmp_path)  # a resolved recipe repeats the run
    assert again.recipe == setup.recipe


def test_a_schedule_without_room_for_its_steps_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"^method.settings: ADALORA: peft refuses them: .*budgeting phase"):
        prepare(recipe_of(tmp_path, {"tinit": 5, "tfinal": 5}), root=tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_r": 6}, r"target_r: 6: must be below init_r \(6\)"),
        ({"target_r": 0}, "target_r: 0: must be a whole number above 0"),
        ({"init_r": "six"}, "init_r: 'six': must be a whole number above 0"),
        ({"deltaT": 0}, "deltaT: 0: must be a whole number above 0"),
        ({"beta1": 1.0}, "beta1: 1.0: must be above 0 and below 1"),
        ({"beta2": 0}, "beta2: 0: must be above 0 and below 1"),
    ],
)
def test_a_schedule_that_cannot_run_is_refused(settings: dict[str, Any], message: str) -> None:
    method = PeftMethod(kind="ADALORA", settings={**RANKS, **settings})
    with pytest.raises(RecipeError, match=rf"^method.settings.{message}"):
        resolve_steps(method, Optim(), lambda: STEPS)


def test_a_setting_that_adalora_ignores_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"^method.settings: ADALORA: peft refuses them: .*`r` is not used"):
        prepare(recipe_of(tmp_path, {"r": 4}), root=tmp_path)


def test_means_of_weights_would_bring_ranks_back(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"^optim.name: schedule_free: keeps means of the weights"):
        prepare(recipe_of(tmp_path, optim={"name": "schedule_free"}), root=tmp_path)


def test_a_step_after_the_last_rank_went_can_be_tried_alone(tmp_path: Path) -> None:
    setup = setup_of(tmp_path)
    for step in (STEPS, 2, STEPS - 2, 5):
        assert next(training_steps(setup, start=step - 1)).step == step
