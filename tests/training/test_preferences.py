"""Preferences from file to result: first loss, reference, memory settings, resuming, and what is refused."""

import json
import math
import os
import signal
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import tunesmith
from export.exports import quick
from often import often
from parallel.test_agent import TUNESMITH, begin, end, second_rank, train_words, wait_for_step
from tiny_run import model_folder, same_run, stopped, values_of
from tiny_tasks import STEPS_ALONE, assert_alike, by_memory, refuse_packing, rows_of, task_recipe, write
from tunesmith.data.branches import lines_of
from tunesmith.data.drafts import join
from tunesmith.data.formats.comparisons import SIDES
from tunesmith.data.prefixes import share_prefixes
from tunesmith.data.renderer import LengthLimit
from tunesmith.errors import DataError, InputError, ModelError, RecipeError, RunError
from tunesmith.evaluation.compare import preference_notes, row_baseline
from tunesmith.evaluation.scores import score
from tunesmith.export.export_run import export_run
from tunesmith.inference.load import load_any, load_run
from tunesmith.inference.measure import evaluate_file
from tunesmith.inference.predict import Predictor, predict_list
from tunesmith.models.modes import eval_mode
from tunesmith.recipe.docs import as_yaml
from tunesmith.recipe.objectives import Prefer
from tunesmith.runs.folder import Run, runs
from tunesmith.tasks.preference_losses import OBJECTIVES, Pairs, pair_losses
from tunesmith.training import reference
from tunesmith.training.resolve import resolve_run
from tunesmith.training.selftest import selftest
from tunesmith.training.setup import prepare
from tunesmith.training.trainer import resume, train

LORA = {"name": "lora", "rank": 4, "alpha": 8}
METHODS = [LORA, "full", {**LORA, "name": "dora"}, {**LORA, "name": "qlora"}, {"name": "peft", "kind": "IA3"}]


def recipe_of(folder: Any, *, method: Any = LORA, rows: int = 24, **sections: Any) -> Any:
    return task_recipe(folder, "prefer", "causal", method=method, rows=rows, **{"precision": "float32", **sections})


def steps_of(run: Any) -> list[dict[str, Any]]:
    return [event.values for event in run.events() if event.kind == "step"]


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """The run of a method, trained once: tests look at it and leave it as it is."""
    found = {}

    def run_of(method: Any) -> Run:
        key = str(method)
        if key not in found:
            folder = tmp_path_factory.mktemp("tuned")
            found[key] = train(recipe_of(folder, method=method), root=folder / "runs")
        return found[key]

    return run_of


@pytest.mark.parametrize(
    "method", often(METHODS, LORA, "full"), ids=lambda method: method if isinstance(method, str) else method["name"]
)
def test_the_first_loss_is_log_2_and_the_reference_is_kept(tuned, method):
    run = tuned(method)
    assert steps_of(run)[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert steps_of(run)[-1]["loss"] < math.log(2) - 1e-3
    kept = sorted((run.rows_path).glob("*/*.reference"))
    assert [path.parent.name for path in kept] == ["held_out", "train"]
    lines = [json.loads(line) for line in (run.path / "evaluation" / "before.jsonl").read_text().splitlines()]
    assert all(line["logps"] == line["reference"] and line["margin"] == 0 for line in lines)


def own_logps(model: Any, row: Any, *, before: int = 1) -> list[float]:
    """Each line alone, its logits whole: what predicts a token is the position before it."""
    found = []
    for line in lines_of(row):
        ids = torch.from_numpy(line.ids.astype("int64"))
        with torch.no_grad():
            logps = torch.log_softmax(model(ids[None]).logits[0].double(), -1)
        trained = torch.from_numpy(line.trained).nonzero()[:, 0]
        found.append(float(logps[trained - before].gather(1, ids[trained, None]).sum()))
    return found


# trap: P4, P5
@pytest.mark.parametrize("arch", often(["llama", "gpt2", "qwen3", "gemma2", "phi3"], "llama", "gpt2"))
@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_log_probabilities_are_those_of_each_line_alone(tmp_path, arch, layout, monkeypatch):
    if layout == "padded":
        refuse_packing(monkeypatch)
    recipe = recipe_of(tmp_path)
    recipe = recipe.model_copy(update={"model": str(model_folder(tmp_path / arch, arch))})
    setup = prepare(recipe, root=tmp_path / "runs")
    rows = [int(i) for i in setup.rows.train_rows[:5]]
    plain = load_plain(recipe.model)
    with eval_mode(setup.model):
        found = setup.task.measure(setup.model, setup.collator.batch(rows, step=1)).results
        expected = [own_logps(plain, setup.store.row(row)) for row in rows]
        with_prompt = [own_logps(plain, shifted(setup.store.row(row))) for row in rows]
        off_by_one = [own_logps(plain, setup.store.row(row), before=0) for row in rows]
    ours = [result["logps"] for result in found]
    np.testing.assert_allclose(ours, expected, rtol=1e-4)
    for planted in (with_prompt, off_by_one):
        with pytest.raises(AssertionError):
            np.testing.assert_allclose(ours, planted, rtol=1e-4)


def load_plain(folder: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def shifted(row: Any) -> Any:
    """The row with one token more of its prompt trained."""
    trained = row.trained.copy()
    trained[np.flatnonzero(trained)[0] - 1] = True
    return replace(row, trained=trained)


# trap: P10
@pytest.mark.parametrize("layout", often(["packed", "padded"], "packed"))
def test_memory_settings_change_no_loss_and_no_gradient(tmp_path, layout, monkeypatch):
    if layout == "padded":
        refuse_packing(monkeypatch)
    found = by_memory(tmp_path, recipe_of, 4096, 120, 1, prefer={"nll": 1.0})
    assert [steps[0][2] for steps in found][::2] == [1 if layout == "packed" else 2, 8]
    assert_alike(found)


OFTEN = ("orpo",)
"""Without a reference and by odds. With one and by likelihoods: above; the others in the slow set."""


@pytest.mark.parametrize(
    "loss", [pytest.param(name, marks=[] if name in OFTEN else pytest.mark.slow) for name in OBJECTIVES]
)
def test_one_pass_is_eight_passes_for_every_loss(tmp_path, loss):
    assert_alike(by_memory(tmp_path, recipe_of, 4096, 1, prefer={"loss": loss}))


@pytest.mark.slow
def test_a_likelihood_by_the_tokens_of_a_pass_would_be_seen(tmp_path, monkeypatch):
    """As TRL takes it: the mean over the chosen tokens of a micro-batch."""

    def broken(pairs: Pairs, options: Prefer) -> Any:
        losses, scaled = pair_losses(pairs, options.model_copy(update={"nll": 0.0}))
        return losses - pairs.s_B2[:, 0].sum() / pairs.n_B2[:, 0].sum(), scaled

    monkeypatch.setattr("tunesmith.tasks.preference_losses.pair_losses", broken)
    found = by_memory(tmp_path, recipe_of, 4096, 1, prefer={"nll": 1.0})
    with pytest.raises(AssertionError):
        assert_alike(found)


# trap: P1
def test_the_reference_is_the_model_of_step_1_whatever_was_learnt(tuned, tmp_path):
    run = tuned("full")
    recipe = run.recipe()
    setup = prepare(recipe, root=tmp_path / "runs")
    kept = reference._read(next(run.rows_path.glob("train/*.reference")), len(setup.rows.train_rows))
    rows = [setup.store.row(int(i)) for i in setup.rows.train_rows[:4]]
    models = (load_plain(recipe.model), load_plain(str(run.model_path)))
    base, tuned = ([own_logps(model, row) for row in rows] for model in models)
    np.testing.assert_allclose(kept[:4], base, rtol=1e-4)
    with pytest.raises(AssertionError):  # a reference that moves with the model
        np.testing.assert_allclose(kept[:4], tuned, rtol=1e-4)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight")
    recipe = recipe_of(folder, train={"rows_per_step": 4, "epochs": 2}, checkpoint={"every": 2})
    return train(recipe, root=folder / "runs")


@pytest.mark.parametrize("is_lost", often([False, True], False), ids=["kept", "lost"])
def test_stopped_and_resumed_it_is_the_same_run(tmp_path, straight, is_lost):
    """With the reference that it has kept, or one that the untouched model is asked for again."""
    halting = stopped(straight.recipe(), tmp_path / "halting", 3)
    kept = {path: path.read_bytes() for path in halting.rows_path.glob("*/*.reference")}
    for path in kept if is_lost else ():
        path.write_bytes(kept[path][:-8] + b"damaged!")
    resume(halting)
    same_run(halting, straight)
    assert is_lost or kept == {path: path.read_bytes() for path in kept}


def test_another_loss_on_the_same_rows_finds_the_reference(tmp_path, monkeypatch):
    computed = []
    monkeypatch.setattr(reference, "_compute", lambda *a, real=reference._compute: computed.append(1) or real(*a))
    short = {"train": {"max_steps": 1}, **STEPS_ALONE}
    train(recipe_of(tmp_path, **short), root=tmp_path / "runs")
    run = train(recipe_of(tmp_path, prefer={"loss": "ipo"}, **short), root=tmp_path / "runs")
    assert len(computed) == 2
    assert len(list(run.rows_path.glob("*/*.reference"))) == 2


# trap: P3
@pytest.mark.parametrize("cause", ["stale", "dropout"])
def test_a_reference_of_another_model_ends_the_run_before_an_update(tmp_path, monkeypatch, cause):
    if cause == "stale":
        monkeypatch.setattr(reference, "_compute", lambda *a, real=reference._compute: real(*a) + 0.5)
        recipe = recipe_of(tmp_path)
    else:
        monkeypatch.setattr("tunesmith.training.setup.disable_dropout", lambda model: None)
        recipe = recipe_of(tmp_path, dropout=0.3)
    with pytest.raises(
        RunError, match=r"step 1: before any update the model differs from its reference in \d+ of \d+ rows"
    ):
        train(recipe, root=tmp_path / "runs")
    (run,) = runs(tmp_path / "runs")
    assert not steps_of(run)


# trap: P2
@pytest.mark.parametrize("arch", ["llama", "gpt2"])  # a number that attention reads, and modules
@pytest.mark.parametrize("is_off", [True, False])
def test_dropout_of_the_model_is_off(tmp_path, is_off, arch, monkeypatch):
    if not is_off:
        monkeypatch.setattr("tunesmith.training.setup.disable_dropout", lambda model: None)
    folder = model_folder(tmp_path / arch, arch, dropout=0.3)
    setup = prepare(recipe_of(tmp_path).model_copy(update={"model": str(folder)}), root=tmp_path / "runs")
    setup.model.train()
    batch = setup.collator.batch([int(i) for i in setup.rows.train_rows[:4]], step=1)
    with nullcontext() if is_off else pytest.raises(AssertionError):
        assert_repeats(setup, batch)


def assert_repeats(setup: Any, batch: Any) -> None:
    losses = {setup.task.loss_sum(setup.model, batch).item() for _ in range(3)}
    assert len(losses) == 1


# trap: P11
def test_the_stem_is_computed_once(tmp_path):
    assert_sharing_changes_nothing(tmp_path)


@pytest.mark.slow
def test_branches_that_do_not_go_on_where_the_stem_ends_would_be_seen(tmp_path, monkeypatch):
    def laid_on(batch: Any, rows: Any, **more: Any) -> Any:
        made = share_prefixes(batch, rows, **more)
        return replace(made, positions_BT=torch.arange(made.ids_BT.shape[1])[None])

    monkeypatch.setattr("tunesmith.data.collate.share_prefixes", laid_on)
    monkeypatch.setattr("tunesmith.training.shared_prefixes.disagreement", lambda *args: None)
    with pytest.raises(AssertionError):
        assert_sharing_changes_nothing(tmp_path)


def assert_sharing_changes_nothing(tmp_path: Path) -> None:
    rows = rows_of("prefer", 24)
    for row in rows:
        row["prompt"][0]["content"] += " the big red old" * 8
    recipe = recipe_of(tmp_path, train={"max_steps": 4}, **STEPS_ALONE)
    write(tmp_path / "prefer.jsonl", rows)
    run = train(recipe, root=tmp_path / "runs")
    plain = train(recipe.model_copy(update={"kernels": "plain"}), root=tmp_path / "runs")
    assert all(step["computed"] < 0.75 * step["tokens"] for step in steps_of(run))
    assert all(step["computed"] >= step["tokens"] for step in steps_of(plain))
    for ours, theirs in zip(steps_of(run), steps_of(plain), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"loss": {"label_smoothing": 0.1}}, "prefer.label_smoothing"),
        ({"data": {"too_long": "cut"}}, "data.too_long: cut"),
        ({"method": {**LORA, "dropout": 0.1}}, "method.dropout"),
        ({"prefer": {"loss": "ipo", "label_smoothing": 0.1}}, "prefer.label_smoothing"),
    ],
)
def test_options_that_would_change_what_is_compared_are_refused(tmp_path, section, message):
    with pytest.raises(RecipeError, match=message):
        train(recipe_of(tmp_path, **section), root=tmp_path / "runs")
    assert not runs(tmp_path / "runs")


@pytest.mark.parametrize(("loss", "has_margin"), [("dpo", True), ("hinge", True), ("ipo", False), ("apo_zero", False)])
def test_margins_of_rows_that_a_loss_has_no_use_for_are_said(tmp_path, loss, has_margin):
    rows = [{**row, "margin": float(i % 3)} for i, row in enumerate(rows_of("prefer", 12))]
    data = {"train": [str(write(tmp_path / "rows.jsonl", rows))], "eval": []}
    recipe = task_recipe(tmp_path, "prefer", "causal", dropout=0.0, data=data, prefer={"loss": loss})
    found = [choice for choice in resolve_run(recipe, root=tmp_path).choices if choice.key == "prefer.margin"]
    why = f"{loss} has no margin: the margins of 8 rows are not used"
    assert [(choice.value, choice.reason) for choice in found] == ([] if has_margin else [(0.0, why)])


# trap: P8
def test_a_side_that_is_too_long_is_an_error_by_line(tmp_path):
    assert_a_long_side_is_refused(tmp_path)


@pytest.mark.slow
def test_a_side_that_is_cut_would_be_seen(tmp_path, monkeypatch):
    real = LengthLimit.fit
    monkeypatch.setattr(LengthLimit, "fit", lambda limit, *of: real(replace(limit, too_long="cut"), *of))
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        assert_a_long_side_is_refused(tmp_path)


def assert_a_long_side_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError) as refused:
        train(recipe_of(tmp_path, data={"max_tokens": 24}), root=tmp_path / "runs")
    assert any(problem.code == "too_long" and problem.message.startswith(("chosen:", "rejected:"))
               for problem in refused.value.problems)  # fmt: skip


def test_a_pair_of_which_one_side_is_too_long_is_dropped_whole(tmp_path):
    whole = prepare(recipe_of(tmp_path), root=tmp_path / "runs").store
    longest = [max(len(line.ids) for line in lines_of(whole.row(i))) for i in range(len(whole))]
    limit = int(np.median(longest))
    (tmp_path / "less").mkdir()
    recipe = recipe_of(tmp_path / "less", data={"max_tokens": limit, "too_long": "drop"})
    store = prepare(recipe, root=tmp_path / "runs").store
    assert store.summary.errors["too_long"] == sum(length > limit for length in longest) > 0
    assert len(store) == sum(length <= limit for length in longest)


def not_learnt(drafts: Any, values: Any) -> Any:
    """The rejected answer's end is read and not trained: the model would learn which side goes on."""
    drafts[1].trained_T[np.flatnonzero(drafts[1].trained_T)[-1]] = False
    return join(drafts, values)


def left_out(drafts: Any, values: Any) -> Any:
    """The rejected answer has no end: the model would know the chosen one by its end."""
    last = int(np.flatnonzero(drafts[1].trained_T)[-1])
    drafts[1] = replace(drafts[1], ids_T=drafts[1].ids_T[:last], trained_T=drafts[1].trained_T[:last])
    return join(drafts, values)


def twice(drafts: Any, values: Any) -> Any:
    """The chosen answer ends, and ends."""
    last = int(np.flatnonzero(drafts[0].trained_T)[-1])
    ids, trained = (np.insert(of, last, of[last]) for of in (drafts[0].ids_T, drafts[0].trained_T))
    return join([replace(drafts[0], ids_T=ids, trained_T=trained), *drafts[1:]], values)


def newline(drafts: Any, values: Any) -> Any:
    """As TRL has it: the newline that a template writes behind the end of a turn is learnt too."""
    for draft in drafts:
        draft.trained_T[np.flatnonzero(draft.trained_T)[0] :] = True
    return join(drafts, values)


# trap: P6, P7
@pytest.mark.parametrize("is_plain", [False, True], ids=["template", "plain"])
def test_an_answer_is_learnt_with_one_end_and_nothing_behind_it(tmp_path, is_plain):
    assert_learnt_with_one_end(answers_to_learn(tmp_path, is_plain=is_plain))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("planted", "is_plain"), [(not_learnt, False), (left_out, False), (left_out, True), (twice, False), (twice, True),
                              (newline, False)]
)  # fmt: skip
def test_another_end_would_be_seen(tmp_path, monkeypatch, planted, is_plain):
    monkeypatch.setattr("tunesmith.data.branch_encoders.join", planted)
    with pytest.raises(AssertionError):
        assert_learnt_with_one_end(answers_to_learn(tmp_path, is_plain=is_plain))


def answers_to_learn(folder: Path, *, is_plain: bool) -> Any:
    """A recipe; plain rows are of a model without a template, and some of their answers have their end already."""
    recipe = recipe_of(folder)
    if not is_plain:
        return recipe
    (Path(recipe.model) / "chat_template.jinja").unlink()
    rows = rows_of("prefer", 24)
    for i, row in enumerate(rows):
        row["prompt"] = row["prompt"][0]["content"]
        for side in ("chosen", "rejected"):
            row[side] = f" {row[side][0]['content']}" + ("<|im_end|>" if i % 3 == 0 and side == "chosen" else "")
    write(folder / "prefer.jsonl", rows)
    data = recipe.data.model_copy(update={"eval": (), "held_out": 0.2, "control_tokens": "allow"})
    return recipe.model_copy(update={"data": data})


def assert_learnt_with_one_end(recipe: Any) -> None:
    """The trained tokens of both sides are those of the answer as it is written and one end, which counts."""
    setup = prepare(recipe, root=Path(recipe.model).parent / "runs")
    (stop,), tokenizer = setup.renderer.stop_ids, setup.renderer.tokenizer
    records = [json.loads(line) for line in Path(recipe.data.train[0].path).read_text("utf-8").splitlines()]
    rows = [int(i) for i in setup.rows.train_rows]
    results = setup.task.measure(setup.model, setup.collator.batch(rows, step=1)).results
    for i, result in zip(rows, results, strict=True):
        record, lines = records[setup.store.source(i).line - 1], lines_of(setup.store.row(i))
        said = [record[side] if isinstance(record[side], str) else record[side][0]["content"] for side in SIDES]
        expected = [[*tokenizer(text.removesuffix("<|im_end|>"))["input_ids"], stop] for text in said]
        assert [line.ids[line.trained].tolist() for line in lines] == expected
        assert result["lengths"] == list(map(len, expected))


def test_a_template_that_ends_no_answer_is_refused(tmp_path):
    recipe = recipe_of(tmp_path)
    template = Path(recipe.model) / "chat_template.jinja"
    template.write_text(template.read_text("utf-8").replace("<|im_end|>", ""), "utf-8")
    with pytest.raises(ModelError, match="would never stop"):
        prepare(recipe, root=tmp_path / "runs")


# trap: P20
def test_sums_of_a_batch_are_made_in_float64(tmp_path):
    setup = prepare(recipe_of(tmp_path), root=tmp_path / "runs")
    assert setup.collator.batch([int(setup.rows.train_rows[0])], step=1).values_BV.dtype == torch.float64


# trap: P13
def test_the_same_prompt_is_on_one_side_whatever_its_answers(tmp_path):
    rows = [row for row in rows_of("prefer", 20) for _ in range(3)]
    rows = [json.loads(json.dumps(row)) for row in rows]
    for number, row in enumerate(rows):
        row["chosen"][0]["content"] += " apple" * (1 + number % 3)
    recipe = recipe_of(tmp_path)
    write(tmp_path / "prefer.jsonl", rows)
    data = recipe.data.model_copy(update={"eval": (), "held_out": 0.2})
    found = prepare(recipe.model_copy(update={"data": data}), root=tmp_path / "runs").rows
    inputs, hashes = found.store.inputs, found.store.hashes
    assert len(found.held_rows) > 0
    assert not set(inputs[found.held_rows]) & set(inputs[found.train_rows])
    with pytest.raises(AssertionError):  # split by what the whole row says
        assert not set(inputs[hashes < np.median(hashes)]) & set(inputs[hashes >= np.median(hashes)])


def test_a_preference_run_starts_from_a_chat_run_and_is_used_like_one(tmp_path, monkeypatch):
    quick(monkeypatch)
    root = tmp_path / "runs"
    short = {"train": {"max_steps": 2}, **STEPS_ALONE}
    first = train(task_recipe(tmp_path, "chat", "causal", method=LORA, **short), root=root)
    recipe = recipe_of(tmp_path, **short)
    assert runs(root) == [first]
    second = train(recipe.model_copy(update={"model": "last"}), root=root)
    assert steps_of(second)[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    loaded = load_run(second)
    (answer,) = predict_list(Predictor(loaded), [{"messages": [{"role": "user", "content": "the big apple"}]}])
    assert answer["messages"][-1]["role"] == "assistant"
    (answer,) = predict_list(Predictor(loaded), ["the big apple"])
    assert answer["messages"][-1]["role"] == "assistant"
    exported = export_run(second, "merged", out=tmp_path / "merged").path
    merged = predict_list(Predictor(load_any(str(exported), root=root, task="chat")), ["the big apple"])
    assert merged == [answer]
    chats = str(tmp_path / "chat-held.jsonl")  # its answers are measured as those of a run of chats
    measures = evaluate_file(load_any(str(second.path), root=root, task="chat"), chats, samples=2).measures
    same = evaluate_file(load_any(str(exported), root=root, task="chat"), chats, samples=0).measures
    assert measures["loss"]["value"] == pytest.approx(same["loss"]["value"], rel=1e-3)
    assert {"perplexity", "exact_match"} <= measures.keys()
    for name in ("classify", "foo"):
        with pytest.raises(InputError, match=f"--task {name}: it takes prefer or chat"):
            load_any(str(second.path), root=root, task=name)


@pytest.mark.parametrize("method", [LORA, "full"])
def test_measured_again_a_result_is_as_its_run_said(tuned, method):
    """One of full tuning against its base."""
    run = tuned(method)
    said = next(e.values for e in run.events() if e.kind == "evaluation" and e.values["name"] == "after")["measures"]
    held = run.recipe().data.eval[0].path
    loaded = load_any(str(run.path), root=run.path.parent)
    found = evaluate_file(loaded, held, samples=0).measures
    for key in ("loss", "preference_accuracy", "margin", "chosen_shift", "longer_chosen", "likelier_chosen"):
        assert found[key]["value"] == pytest.approx(said[key]["value"], rel=1e-3, abs=1e-4), key
    if method == "full":
        alone = evaluate_file(replace(loaded, run=None), held, samples=0).measures
        assert alone["margin"]["value"] == 0  # against itself nothing has moved


# trap: P15
def test_what_was_learnt_of_length_is_shown_where_it_cannot_help():
    """A model that learnt length is right where the chosen answer is longer, and wrong where it is shorter."""
    rows = [
        {"hash": f"{i:x}", "loss": 0.5, "count": 1, "lengths": [9, 3] if i % 4 else [3, 9], "logps": [-9.0, -9.0],
         "reference": [-9.0, -9.0], "margin": 2.0}
        for i in range(40)
    ]  # fmt: skip
    learner = [{**row, "margin": float(row["lengths"][0] - row["lengths"][1])} for row in rows]
    assert_right_at_any_length(rows)
    with pytest.raises(AssertionError):
        assert_right_at_any_length(learner)


def assert_right_at_any_length(rows: list[dict[str, Any]]) -> None:
    _, details = score(rows)
    assert [one["accuracy"] for one in details["by_length"]] == [1.0, None, 1.0]


def test_the_model_and_rows_prove_themselves(tmp_path):
    proofs = list(selftest(recipe_of(tmp_path)))
    assert len(proofs) == 4
    assert all(proof.passed for proof in proofs), proofs


# trap: P14
def test_labels_the_wrong_way_round_turn_every_accuracy_round():
    """A model that learnt swapped labels loses as many pairs as it would have won, and is below both habits."""
    rows = [
        {"hash": f"{i:x}", "loss": 0.5, "count": 1, "lengths": [9, 3] if i % 2 else [3, 9], "reference": [-9.0, -9.0],
         "logps": [-9.0, -9.0], "margin": 2.0 if i % 8 else -2.0}
        for i in range(40)
    ]  # fmt: skip
    swapped = [{**row, "margin": -row["margin"]} for row in rows]
    accuracies = [score(some)[0]["preference_accuracy"]["value"] for some in (rows, swapped)]
    assert accuracies == [0.875, 0.125]
    assert_flip_is_noted(swapped)
    with pytest.raises(AssertionError):
        assert_flip_is_noted(rows)


def assert_flip_is_noted(rows: list[dict[str, Any]]) -> None:
    assert "the wrong way round" in "".join(preference_notes(score(rows)[0]))


# trap: P14, P16
def test_a_model_that_lost_both_or_follows_neither_habit_is_noted():
    right = {"value": 0.8, "low": 0.7, "high": 0.9}
    fine = {"preference_accuracy": right, "chosen_shift": {"value": 0.1}, "rejected_shift": {"value": -2.0}}
    habits = {"longer_chosen": {"value": 0.6}, "likelier_chosen": {"value": 0.55}}
    assert not list(preference_notes({**fine, **habits}))
    unlearnt = {**fine, **habits, "chosen_shift": {"value": -0.9}}
    assert "prefer.nll" in "".join(preference_notes(unlearnt))
    with pytest.raises(AssertionError):
        assert "prefer.nll" in "".join(preference_notes({**unlearnt, "chosen_shift": {"value": 0.0}}))


def test_a_learner_of_length_is_no_better_than_the_habit():
    rows = [
        {"hash": f"{i:x}", "loss": 0.5, "count": 1, "lengths": [9, 3] if i % 4 else [3, 9], "logps": [-9.0, -9.0],
         "reference": [-9.0, -9.0], "margin": 2.0 if i % 4 else -2.0}
        for i in range(40)
    ]  # fmt: skip
    measures, details = score(rows)
    assert measures["preference_accuracy"]["value"] == measures["longer_chosen"]["value"] == 0.75
    assert details["constant"]["answer"] == "longer_chosen"
    assert [(one["chosen"], one["pairs"], one["accuracy"]) for one in details["by_length"]] == [
        ("shorter", 10, 0.0), ("as long", 0, None), ("longer", 30, 1.0),
    ]  # fmt: skip
    baseline = row_baseline(rows, details["constant"])
    assert baseline["measures"]["preference_accuracy"]["change"]["value"] == 0
    assert "longer answer" in baseline["words"]


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("rows", ["pairs", "labels"])
def test_two_processes_take_the_same_steps_killed_and_resumed(tmp_path, rows):
    recipe = recipe_of(tmp_path, train={"rows_per_step": 4, "epochs": 40}, checkpoint={"every": 10})
    for path in (tmp_path / "prefer.jsonl", tmp_path / "prefer-held.jsonl") if rows == "labels" else ():
        pairs = [json.loads(line) for line in path.read_text().splitlines()]
        sides = ["rejected" if i % 3 else "chosen" for i in range(len(pairs))]
        write(path, [{"prompt": pair["prompt"], "completion": pair[side], "label": side == "chosen"}
                     for side, pair in zip(sides, pairs, strict=True)])  # fmt: skip
    alone = train(recipe, root=tmp_path / "runs")
    (tmp_path / "recipe.yaml").write_text(as_yaml(recipe, comments=False))
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    code, said = end(begin(*TUNESMITH, *train_words(tmp_path, straight, "--set", "devices=2")), 200)
    assert (code, said) == (0, "")
    two = steps_of(Run(straight))
    for ours, theirs in zip(two[:20], steps_of(alone)[:20], strict=True):
        assert sorted(ours["rows"]) == sorted(theirs["rows"])
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
    started = begin(*TUNESMITH, *train_words(tmp_path, killed, "--set", "devices=2"))
    wait_for_step(killed, 25)
    os.kill(second_rank(killed), signal.SIGKILL)
    assert end(started, 60)[0] == 1
    assert end(begin(*TUNESMITH, "resume", killed, "--quiet"), 200) == (0, "")
    assert values_of(Run(killed).events()) == values_of(Run(straight).events())


def test_plain_rows_of_a_model_without_a_template_are_prompt_and_answer(tmp_path):
    recipe = recipe_of(tmp_path)
    template = Path(recipe.model) / "chat_template.jinja"
    template.unlink()
    rows = [{"prompt": "the big apple", "chosen": " eats a pear", "rejected": f" {place} {i}"}
            for i, place in enumerate(["Rome", "Oslo", "Lima"] * 8)]  # fmt: skip
    run = tunesmith.train(recipe.model, rows, root=tmp_path / "runs", offline=True, method=LORA, precision="float32",
                          train={"max_steps": 2}, evaluation={"general": False}, prefer={"loss": "simpo"})  # fmt: skip
    assert run.recipe().task == "prefer"
    assert run.recipe().prefer.filled().beta == 2.0
    assert len(steps_of(run)) == 2
    chats = [{"prompt": [{"role": "user", "content": "Hi"}], "chosen": "a", "rejected": "b"}] * 3
    with pytest.raises(InputError):
        tunesmith.train(recipe.model, chats, root=tmp_path / "runs", offline=True)
