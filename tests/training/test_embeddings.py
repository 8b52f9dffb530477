"""Runs of task embed: rows by line, prompts, folders of sentence-transformers, serving, several processes."""

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from export.exports import quick
from often import often
from parallel.test_agent import TUNESMITH, begin, end, train_words
from shape.tree import ROOT
from tiny_tasks import encoder_folder, rows_of, task_recipe, write, write_pooling
from tunesmith.data.branches import lines_of
from tunesmith.data.examples import examples
from tunesmith.errors import DataError, RecipeError
from tunesmith.evaluation.metrics import METRICS
from tunesmith.export.export_run import export_run
from tunesmith.inference.load import load_any
from tunesmith.inference.measure import evaluate_file
from tunesmith.inference.predict import Predictor, predict_list
from tunesmith.models.pooling import find_pooling
from tunesmith.recipe.docs import as_yaml
from tunesmith.recipe.schema import Data
from tunesmith.runs.folder import Run
from tunesmith.serve.protocol import EngineOptions, RequestError
from tunesmith.serve.registry import open_registry
from tunesmith.serve.served_model import Embedder
from tunesmith.training.selftest import selftest
from tunesmith.training.setup import prepare
from tunesmith.training.trainer import train
from tunesmith.types import Problem

PROMPTS = {"query_prompt": "red : ", "document_prompt": "blue : "}


def problems(folder: Path, rows: list[dict[str, Any]]) -> list[Problem]:
    found: list[Problem] = []
    data = Data(train=[str(write(folder / "rows.jsonl", rows))])
    list(examples(data.train, data, found.append, task="embed"))
    return found


@pytest.mark.parametrize(
    ("row", "code", "said"),
    [
        ({"anchor": "red", "positive": " red "}, "identical_texts", "anchor and positive"),
        ({"anchor": "red", "positive": "blue", "negatives": ["plum", "blue"]}, "identical_texts", "'blue'"),
        ({"query": "red", "positive": "blue", "negative_1": "red"}, "identical_texts", "query"),
        ({"anchor": "red", "positive": " "}, "empty", "positive is empty"),
        ({"anchor": "red", "positive": None}, "missing_field", "positive is null"),
        ({"anchor": "red", "positive": "blue", "negatives": ["plum", 3]}, "wrong_type", "negatives[1]"),
        ({"sentence1": "red", "sentence2": "blue", "score": "high"}, "bad_numbers", "high"),
    ],
)
def test_what_teaches_nothing_is_an_error_by_line(tmp_path, row, code, said):
    good = {"anchor": "Ada", "positive": "Bob"} if "sentence1" not in row else {**row, "score": 1}
    (*_, found) = problems(tmp_path, [good, row])
    assert (found.source.line, found.code) == (2, code)
    assert said in str(found)


def test_other_names_are_proposed(tmp_path):
    (found,) = problems(tmp_path, [{"question": "red", "answer": "blue"}])
    assert (found.source.line, found.code) == (1, "unknown_shape")
    assert "data.columns={anchor: question, positive: answer}" in str(found)


def test_every_form_of_a_row_is_read(tmp_path):
    rows = [
        {"anchor": "red", "positive": "blue"},
        {"query": "red", "positive": "blue", "negative": "plum"},
        {"query": "red", "positive": "blue", "negative_1": "plum", "negative_2": "pear"},
        {"query": "red", "positive": "blue", "negatives": ["plum", "pear"]},
        {"sentence1": "red", "sentence2": "red", "score": "0.5"},
    ]
    found = []
    for row in rows:
        data = Data(train=[str(write(tmp_path / "row.jsonl", [row]))])
        found += [one for _, one in examples(data.train, data, pytest.fail)]
    assert [one.shape for one in found] == ["text_pairs"] * 5
    assert [[text.text for (text,) in one.branches] for one in found] == [
        ["blue"], ["blue", "plum"], ["blue", "plum", "pear"], ["blue", "plum", "pear"], ["red"],
    ]  # fmt: skip
    assert found[-1].values == (0.5,)


def recipe_of(folder: Path, kind: str = "encoder", **sections: Any) -> Any:
    return task_recipe(folder, "embed", kind, rows=40, **{"train": {"max_steps": 2}, **sections})


def test_rows_of_another_kind_are_refused_by_line(tmp_path):
    rows = [*rows_of("embed", 8), {**rows_of("embed", 9)[-1], "negative": "plum"}]
    scored = [{**row, "score": 1.0} for row in rows_of("embed", 3, seed=3)]
    path = write(tmp_path / "mixed.jsonl", [*rows, *scored])
    with pytest.raises(DataError, match=r"mixed\.jsonl:10: embed\.loss ranking"):
        prepare(recipe_of(tmp_path, data={"train": [str(path)]}), root=tmp_path)
    with pytest.raises(RecipeError, match=r"embed\.dims: 4096"):
        prepare(recipe_of(tmp_path, embed={"dims": [4096]}), root=tmp_path)


def vectors_of(run: Run, texts: list[str], **how: Any) -> np.ndarray:
    registry = open_registry([str(run.path)], root=run.path.parent, options=EngineOptions(), note=lambda text: None)
    (embedder,) = registry.models.values()
    return np.array(embedder.embed(texts, **how)[0])


def assert_prompts_are_served(folder: Path) -> None:  # trap: P27
    run = train(recipe_of(folder, embed=PROMPTS), root=folder / "runs")
    assert find_pooling(run.model_path).query_prompt == "red : "
    searched, found = vectors_of(run, ["Ada in Rome"], is_query=True), vectors_of(run, ["Ada in Rome"])
    plain = vectors_of(run, ["red : Ada in Rome"])
    assert np.abs(searched - found).max() > 1e-3
    assert np.abs(plain - searched).max() > 1e-3


def test_prompts_are_saved_and_served(tmp_path):
    assert_prompts_are_served(tmp_path)


@pytest.mark.slow
def test_the_test_sees_forgotten_prompts(tmp_path, monkeypatch):
    right = Embedder._row
    monkeypatch.setattr(Embedder, "_row", lambda self, prompt, text, index: right(self, "", text, index))
    with pytest.raises(AssertionError):
        assert_prompts_are_served(tmp_path)


def assert_a_prompt_is_left_out(folder: Path) -> None:  # trap: P28
    base = encoder_folder(folder / "model", dropout=0.0)
    write_pooling(base, {"pooling_mode_mean_tokens": True, "include_prompt": False})
    run = train(recipe_of(folder, model=str(base), embed=PROMPTS), root=folder / "runs")
    assert not find_pooling(run.model_path).include_prompt
    store = prepare(recipe_of(folder, model=str(base), embed=PROMPTS), root=folder / "runs").store
    anchor, positive = lines_of(store.row(0))
    assert (
        anchor.trained.tolist()
        == positive.trained.tolist()[: len(anchor.ids)]
        == [False] * 3 + [True] * (len(anchor.ids) - 3)
    )
    model, tokenizer = (of.from_pretrained(run.model_path) for of in (AutoModel, AutoTokenizer))
    with torch.no_grad():
        hidden = model.eval()(**tokenizer("red : Ada in Rome", return_tensors="pt")).last_hidden_state[0]
    mean = hidden[3:].mean(0)  # behind [CLS], red and the colon
    np.testing.assert_allclose(vectors_of(run, ["Ada in Rome"], is_query=True)[0], mean / mean.norm(), atol=1e-6)


def test_a_prompt_that_the_model_does_not_pool_is_left_out(tmp_path):
    assert_a_prompt_is_left_out(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("place", ["data.branch_encoders", "serve.served_model"])
def test_the_test_sees_a_prompt_in_the_mean(tmp_path, monkeypatch, place):
    monkeypatch.setattr(f"tunesmith.{place}.first_pooled", lambda *_: 0)
    with pytest.raises(AssertionError):
        assert_a_prompt_is_left_out(tmp_path)


@pytest.mark.parametrize("kind", often(["encoder", "causal"], "encoder"))
def test_an_adapter_is_merged_and_proven(tmp_path, kind, monkeypatch):
    quick(monkeypatch)
    run = train(recipe_of(tmp_path, kind, method="lora"), root=tmp_path / "runs")
    kept = "last" if kind == "causal" else "mean"
    assert find_pooling(run.adapter_path).kind == kept
    made = export_run(run, "merged", proof=kind == "encoder")
    assert find_pooling(made.path).kind == kept
    merged = load_any(str(made.path), root=tmp_path)
    assert merged.renderer.task_name == "embed"


def test_pooling_follows_the_files_of_the_model(tmp_path):
    folder = encoder_folder(tmp_path / "model", dropout=0.0)
    write_pooling(folder, {"pooling_mode_cls_token": True})
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 9}), "utf-8")
    setup = prepare(recipe_of(tmp_path, model=str(folder)), root=tmp_path)
    assert (setup.recipe.embed.pooling, setup.recipe.embed.normalize, setup.recipe.data.max_tokens) == ("cls", True, 9)
    assert all(setup.store.row(i).trained.sum() == len(setup.store.row(i).branches) for i in range(5))


def test_any_model_is_measured_on_a_file_beside_bm25(tmp_path):
    folder = encoder_folder(tmp_path / "model", dropout=0.0)
    write_pooling(folder, {"pooling_mode_mean_tokens": True})
    found = evaluate_file(load_any(str(folder), root=tmp_path), str(write(tmp_path / "f.jsonl", rows_of("embed", 30))))
    assert {"recall_1", "recall_10", "mrr_10", "ndcg_10"} <= found.measures.keys() <= METRICS.keys()
    assert found.baseline["name"] == "BM25"
    assert found.baseline["measures"]["recall_1"]["value"] > 0.8  # positives have the words of their anchors


def test_dimensions_and_limits_are_served_clearly(tmp_path):
    run = train(recipe_of(tmp_path), root=tmp_path / "runs")
    whole, cut = vectors_of(run, ["Ada in Rome", "a plum"]), vectors_of(run, ["Ada in Rome", "a plum"], dimensions=8)
    np.testing.assert_allclose(cut, whole[:, :8] / np.linalg.norm(whole[:, :8], axis=1, keepdims=True), atol=1e-6)
    with pytest.raises(RequestError, match="have 32 numbers"):
        vectors_of(run, ["Ada"], dimensions=33)
    with pytest.raises(RequestError, match=r"input\[1\] has .* tokens, at most 64"):
        vectors_of(run, ["Ada", "Ada " * 80])


PEER = """
import json, sys
import numpy as np
from sentence_transformers import SentenceTransformer
folder, texts = sys.argv[1], json.loads(sys.argv[2])
model = SentenceTransformer(folder, device="cpu")
print(json.dumps({
    "plain": model.encode(texts, prompt_name="document").tolist(),
    "query": model.encode(texts, prompt_name="query").tolist(),
    "limit": model.max_seq_length,
}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("include_prompt", [True, False])
@pytest.mark.parametrize("pooling", ["mean", "cls", "max", "last"])
@pytest.mark.parametrize("kind", ["encoder", "causal"])
def test_sentence_transformers_answers_alike(tmp_path, kind, pooling, include_prompt):
    python = ROOT / ".peers" / "st" / "bin" / "python"
    if not python.exists():
        pytest.skip("no environment with sentence-transformers: python -m benchmarks.environments .peers st")
    torch.manual_seed(0)
    prompts = PROMPTS if kind == "encoder" else {"query_prompt": "find: ", "document_prompt": "text: "}
    options = {**prompts, "pooling": pooling, "include_prompt": include_prompt}
    run = train(recipe_of(tmp_path, kind, embed=options), root=tmp_path / "runs")
    texts = ["Ada in Rome", "the big old apple", "a plum"]  # of "a" alone no token would be left but the prompt's
    said = subprocess.run(
        [python, "-c", PEER, run.model_path, json.dumps(texts)], check=True, capture_output=True, text=True
    )
    peer = json.loads(said.stdout.splitlines()[-1])
    np.testing.assert_allclose(vectors_of(run, texts), peer["plain"], atol=1e-5)
    np.testing.assert_allclose(vectors_of(run, texts, is_query=True), peer["query"], atol=1e-5)
    assert peer["limit"] == run.recipe().data.max_tokens


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_processes_have_the_negatives_of_both(tmp_path):
    train_options = {"max_steps": 3, "rows_per_step": 16, "tokens_per_pass": 48}
    recipe = recipe_of(tmp_path, dropout=0.0, train=train_options)
    alone = train(recipe, root=tmp_path / "runs")
    (tmp_path / "recipe.yaml").write_text(as_yaml(recipe, comments=False))
    out = tmp_path / "two"
    assert end(begin(*TUNESMITH, *train_words(tmp_path, out, "--set", "devices=2")), 200) == (0, "")
    of_two, of_one = ([one.values for one in run.events() if one.kind == "step"] for run in (Run(out), alone))
    assert [one["loss"] for one in of_two] == pytest.approx([one["loss"] for one in of_one], abs=1e-5)
    assert [one["grad_norm"] for one in of_two] == pytest.approx([one["grad_norm"] for one in of_one], rel=1e-3)
    last = [[one for one in run.events() if one.kind == "evaluation"][-1].values for run in (Run(out), alone)]
    assert last[0]["measures"]["recall_1"] == last[1]["measures"]["recall_1"]


def test_its_proofs_hold_on_a_model(tmp_path):
    proofs = list(selftest(recipe_of(tmp_path, dropout=0.0), offline=True))
    assert [proof.found for proof in proofs if not proof.passed] == []
    assert len(proofs) >= 3


def test_predict_writes_the_vectors_of_anchors(tmp_path):
    run = train(recipe_of(tmp_path, embed=PROMPTS), root=tmp_path / "runs")
    found = predict_list(Predictor(load_any(str(run.path), root=tmp_path)), ["Ada in Rome", {"anchor": "a plum"}])
    expected = vectors_of(run, ["Ada in Rome", "a plum"], is_query=True)
    np.testing.assert_allclose([line["embedding"] for line in found], expected, atol=1e-6)
