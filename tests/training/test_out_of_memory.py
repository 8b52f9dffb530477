"""Memory that ends in a step: smaller passes with the same update, or a saved run and the way on."""

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

import fresh
from tiny_run import same_run, tiny_recipe
from tunesmith.errors import OutOfMemoryError, RecipeError, RunError, Stopped, is_out_of_memory
from tunesmith.models.modes import layers_of
from tunesmith.runs import checkpoint
from tunesmith.runs.folder import runs
from tunesmith.training import step
from tunesmith.training.loop import training_steps
from tunesmith.training.progress import Listener, Progress
from tunesmith.training.setup import Setup, prepare
from tunesmith.training.trainer import resume, train

CPU = "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate"
FOUND = [MemoryError(), torch.OutOfMemoryError("CUDA out of memory."), RuntimeError(CPU)]


@pytest.mark.parametrize("error", FOUND, ids=lambda error: type(error).__name__)
def test_the_end_of_memory_is_known_by_its_class_or_its_words(error):
    assert is_out_of_memory(error)


def test_other_errors_are_not_the_end_of_memory():
    assert not any(map(is_out_of_memory, [RuntimeError("mat1 and mat2 cannot be multiplied"), ValueError("memory")]))


def bounded(setup: Setup, tokens: int, error: Exception, *, inside_backward: bool = False) -> Setup:
    """Memory ends in every pass of more than so many tokens: on its way in, or after gradients were added up."""
    right = setup.task.loss_sum

    def loss_sum(model, batch):
        found = right(model, batch)
        if batch.num_tokens <= tokens:
            return found
        if inside_backward:
            found.backward(retain_graph=True)  # gradients that a retry must not keep
        raise error

    setup.task = replace(setup.task, loss_sum=loss_sum)
    return setup


def weights_after(setup: Setup, steps: int) -> list[torch.Tensor]:
    for event in training_steps(setup):
        if event.step == steps:
            break
    return [tensor.detach().clone() for tensor in setup.attachment.trained.values()]


@pytest.mark.parametrize(
    ("method", "inside_backward", "error"),
    [("lora", False, FOUND[0]), ("lora", True, FOUND[1]), ("full", False, FOUND[2]), ("full", True, FOUND[0])],
)
def test_passes_are_halved_and_the_update_is_the_same(tmp_path, method, inside_backward, error):
    """float32: what differs is the order of sums, over a few hundred terms of size one and three updates."""
    settings = {"name": "full"} if method == "full" else {"name": "lora", "rank": 4}
    recipe = tiny_recipe(tmp_path, train={"rows_per_step": 6, "tokens_per_pass": 400}, optim={"lr": 1e-3})
    recipe = recipe.model_copy(update={"method": type(recipe).model_validate({"method": settings}).method})
    expected = weights_after(prepare(recipe, root=tmp_path), 3)
    setup = bounded(prepare(recipe, root=tmp_path), 100, error, inside_backward=inside_backward)
    for one, other in zip(weights_after(setup, 3), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=3e-5)


@pytest.mark.slow
def test_planted_a_retry_that_keeps_gradients_would_be_seen(tmp_path, monkeypatch):
    recipe = tiny_recipe(tmp_path, train={"rows_per_step": 6, "tokens_per_pass": 400}, optim={"lr": 1e-3})
    expected = weights_after(prepare(recipe, root=tmp_path), 3)
    monkeypatch.setattr("tunesmith.training.step.drop_gradients", lambda setup: None)
    found = weights_after(bounded(prepare(recipe, root=tmp_path), 100, MemoryError(), inside_backward=True), 3)
    assert any(float((one - other).abs().max()) > 3e-4 for one, other in zip(found, expected, strict=True))


def test_what_happened_is_told_and_holds_from_there_on(tmp_path, monkeypatch):
    run = patched(monkeypatch, lambda recipe: train(recipe, root=tmp_path / "runs"), tmp_path, tokens=100)
    notes = [event.values["text"] for event in run.events() if event.kind == "note"]
    told = [text for text in notes if text.startswith("out of memory in step 1 (")]
    assert len(told) == 1
    assert "the update is the same" in told[0]
    steps = [event for event in run.events() if event.kind == "step"]
    assert steps[0].values["tokens_per_pass"] <= 100
    assert not any("tokens_per_pass" in step.values for step in steps[1:])


def patched(monkeypatch, act, folder, *, tokens: int):
    from tunesmith.training.setup import prepare as right

    monkeypatch.setattr(
        "tunesmith.training.trainer.prepare", lambda *args, **how: bounded(right(*args, **how), tokens, MemoryError())
    )
    return act(tiny_recipe(folder, train={"rows_per_step": 6, "tokens_per_pass": 400}))


def test_a_row_that_is_too_much_ends_the_run_saved_with_the_way_on(tmp_path, monkeypatch):
    with pytest.raises(
        OutOfMemoryError, match=r"a micro-batch of one row of \d+ tokens; .* Saved: step 0. .*--set"
    ) as told:
        patched(monkeypatch, lambda recipe: train(recipe, root=tmp_path / "runs"), tmp_path, tokens=3)
    run = runs(tmp_path / "runs")[0]
    assert checkpoint.steps(run.checkpoints_path) == [0]
    failed = list(run.events())[-1]
    assert (failed.kind, failed.values["ways"]) == ("failed", [asdict(way) for way in told.value.ways])
    assert len(told.value.lengths) == 1
    monkeypatch.undo()
    settings = ["train.tokens_per_pass=1", "train.checkpointed_layers=2"]
    assert [f"{key}={value}" for way in told.value.ways for key, value in way.settings.items()] == settings
    assert all(f"--set {setting}" in str(told.value) for setting in settings)
    resume(run, settings=settings)
    assert run.state() == "done"
    assert run.recipe().train.checkpointed_layers == 2
    assert any("resumed with other settings" in event.values.get("text", "") for event in run.events())


def test_a_run_that_goes_on_takes_no_setting_that_would_make_it_another(tmp_path):
    run = train(tiny_recipe(tmp_path, train={"max_steps": 2}), root=tmp_path / "runs")
    (run.path / "report.json").unlink()
    events = run.events_path.read_text().splitlines()
    run.events_path.write_text("\n".join(line for line in events if '"kind":"end"' not in line) + "\n")
    with pytest.raises((RecipeError, RunError), match=r"it would be another run|this run is done"):
        resume(run, settings=["optim.lr=1"])


LIMITED = """
import resource, sys, torch
from tunesmith.errors import is_out_of_memory
torch.ones(8)
resource.setrlimit(resource.RLIMIT_AS, (resource.getrlimit(resource.RLIMIT_AS)[0], -1))
now = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now + 2**28, now + 2**28))
try:
    torch.ones(2**30)
except Exception as error:
    sys.exit(0 if is_out_of_memory(error) else f"not known: {type(error)}: {error}")
sys.exit("nothing was raised")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="address space is limited by setrlimit on Linux")
def test_what_torch_says_under_a_real_limit_is_known():
    fresh.done("-c", LIMITED)


def test_a_row_longer_than_a_pass_may_be_does_not_make_the_others_longer(tmp_path):
    """Half of what the long row has would be more than the passes had: the step would be tried for ever."""
    recipe = tiny_recipe(tmp_path, train={"rows_per_step": 64, "tokens_per_pass": 60})
    file = Path(recipe.data.train[0].path)
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    for row in rows:  # on whichever side it is held out, some long one is trained
        row["messages"][-1]["content"] += " word" * (40 if len(row["messages"][-1]["content"]) % 2 else 0)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    setup = bounded(prepare(recipe, root=tmp_path), 61, MemoryError())
    assert max(setup.sampler.lengths_I) > 125
    with pytest.raises(OutOfMemoryError):
        next(iter(training_steps(setup)))


class EndsOnce:
    """Memory ends once, in the step after `step`."""

    def __init__(self, monkeypatch, step: int) -> None:
        self.at, self.steps, self.spent = step, list[int](), False
        monkeypatch.setattr("tunesmith.training.trainer.prepare", self.prepare)

    def prepare(self, *args, **how) -> Setup:
        setup = prepare(*args, **how)
        right = setup.task.loss_sum

        def loss_sum(model, batch):
            if self.steps[-1:] == [self.at] and not self.spent:
                self.spent = True
                raise MemoryError
            return right(model, batch)

        setup.task = replace(setup.task, loss_sum=loss_sum)
        return setup

    def listener(self, *, stop: int = 0) -> Listener:
        return Listener(
            on_event=lambda event: self.steps.append(event.step) if event.kind == "step" else None,
            should_stop=lambda: self.steps[-1:] == [stop],
        )


def with_dropout(folder):
    return tiny_recipe(folder, dropout=0.1, train={"rows_per_step": 6, "tokens_per_pass": 400, "max_steps": 6})


def stopped_after_memory_ended(recipe, folder, monkeypatch):
    ends = EndsOnce(monkeypatch, 2)
    with pytest.raises(Stopped):
        train(recipe, root=folder / "stopped", listener=ends.listener(stop=4))
    assert ends.spent
    return runs(folder / "stopped")[0]


# trap: R8
def assert_resumed_as_if_never_stopped(folder, monkeypatch) -> None:
    recipe = with_dropout(folder)
    ends = EndsOnce(monkeypatch, 2)
    straight = train(recipe, root=folder / "straight", listener=ends.listener())
    assert ends.spent
    run = stopped_after_memory_ended(recipe, folder, monkeypatch)
    resume(run)
    same_run(run, straight)


def test_a_run_whose_passes_were_halved_resumes_bit_for_bit(tmp_path, monkeypatch):
    assert_resumed_as_if_never_stopped(tmp_path, monkeypatch)


@pytest.mark.slow
def test_passes_that_are_whole_again_after_a_resume_would_be_seen(tmp_path, monkeypatch):  # trap: R8 planted
    monkeypatch.setattr(Progress, "tokens_per_pass", property(lambda self: None, lambda self, value: None))
    with pytest.raises(AssertionError):
        assert_resumed_as_if_never_stopped(tmp_path, monkeypatch)


def test_a_resume_that_names_the_size_of_passes_gets_it(tmp_path, monkeypatch):
    run = stopped_after_memory_ended(with_dropout(tmp_path), tmp_path, monkeypatch)
    resume(run, settings=["train.tokens_per_pass=400"])
    passes = [event.values["passes"] for event in run.events() if event.kind == "step"]
    assert [num > 1 for num in passes] == [False, False, True, True, False, False]


def test_the_heaviest_pass_is_rehearsed_as_a_step_computes_it(tmp_path, monkeypatch):
    setup = prepare(tiny_recipe(tmp_path, train={"checkpointed_layers": 2}), root=tmp_path)
    right, recomputes = step._pass, list[bool]()

    def run(state, *given):
        recomputes.append(all(layer.training and layer.gradient_checkpointing for layer in layers_of(state.model)))
        return right(state, *given)

    monkeypatch.setattr(step, "_pass", run)
    step.rehearse(setup, setup.sampler.step(1)[0], times=2)
    assert recomputes == [True, True]
    assert all(tensor.grad is None for tensor in setup.attachment.trained.values())
