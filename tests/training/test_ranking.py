"""Runs of task rank: losses by hand, rows by line, lists measured beside BM25, scores served and read elsewhere."""

import json
import math
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import ndcg_score

from often import often
from shape.tree import ROOT
from tiny_tasks import rows_of, task_recipe, write
from tunesmith.data.examples import examples
from tunesmith.errors import DataError
from tunesmith.evaluation import retrieval
from tunesmith.evaluation.retrieval import _in_list
from tunesmith.inference.load import load_any
from tunesmith.inference.measure import evaluate_file
from tunesmith.inference.predict import Predictor, predict_list
from tunesmith.recipe.objectives import Rank
from tunesmith.recipe.schema import Data
from tunesmith.serve.protocol import EngineOptions
from tunesmith.serve.registry import open_registry
from tunesmith.tasks.scores import ranking_losses
from tunesmith.training.setup import prepare
from tunesmith.training.step import compute_gradients
from tunesmith.training.trainer import train

SCORES, WANTED = [0.3, -1.2, 2.0, 0.5, -0.4], [1.0, 0.0, 0.0, 1.0, 0.0]
ROWS = [0, 0, 0, 1, 1]
PEER = json.loads((Path(__file__).parent.parent / "tasks" / "st_losses.json").read_text("utf-8"))["rankings"]


def losses(**options: Any) -> list[float]:
    return ranking_losses(
        torch.tensor(SCORES, dtype=torch.float64), torch.tensor(WANTED, dtype=torch.float64), torch.tensor(ROWS),
        torch.zeros(2).double(), Rank(**options),
    ).tolist()  # fmt: skip


def test_every_loss_is_its_formula():
    def sigma(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    def share(values: list[float]) -> list[float]:
        return [math.exp(value) / sum(map(math.exp, values)) for value in values]

    of_rows = [(SCORES[:3], WANTED[:3]), (SCORES[3:], WANTED[3:])]
    point = [-np.mean([math.log(sigma(z if y else -z)) for z, y in zip(*row, strict=True)]) for row in of_rows]
    weighted = [
        -np.mean([(2 if y else 1) * math.log(sigma(z if y else -z)) for z, y in zip(*row, strict=True)])
        for row in of_rows
    ]
    lists = [-sum(p * math.log(q) for p, q in zip(share(y), share(z), strict=True)) for z, y in of_rows]
    pair = [np.mean([math.log(1 + math.exp(other - z[0])) for other in z[1:]]) for z, _ in of_rows]
    assert losses() == pytest.approx(point)
    assert losses(positive_weight=2.0) == pytest.approx(weighted)
    assert losses(loss="listwise") == pytest.approx(lists)
    assert losses(loss="pairwise") == pytest.approx(pair)


@pytest.mark.parametrize("case", PEER, ids=lambda case: case["name"])
def test_losses_are_those_of_sentence_transformers(case):
    """Of rows with equal numbers of documents, where a mean over rows is one over documents."""
    scores = torch.tensor(case["scores"], dtype=torch.float64)
    row_of = torch.arange(len(scores)).repeat_interleave(scores.shape[1])
    wanted = torch.tensor(case["wanted"], dtype=torch.float64).flatten()
    found = ranking_losses(scores.flatten(), wanted, row_of, scores.new_zeros(len(scores)), Rank(**case["options"]))
    assert float(found.mean()) == pytest.approx(case["loss"], rel=1e-6)


def test_the_order_of_a_list_is_measured_as_by_scikit_learn():
    wanted, scores = np.array([0.0, 2.0, 1.0, 0.0]), np.array([0.9, 0.5, 0.8, 0.1])
    rank, ndcg = _in_list(scores, wanted)
    assert (rank, ndcg) == (3, pytest.approx(ndcg_score([wanted], [scores], k=10)))


@pytest.mark.parametrize(
    ("row", "code"),
    [
        ({"query": "red", "documents": ["blue", "plum"], "labels": [1]}, "bad_numbers"),
        ({"query": "red", "documents": [], "labels": []}, "missing_field"),
        ({"query": "red", "documents": ["blue", " "], "scores": [0.5, 0]}, "empty"),
        ({"query": "", "document": "blue", "label": 1}, "empty"),
        ({"query": "red", "positive": "blue", "negatives": ["blue"]}, "identical_texts"),
    ],
)
def test_what_cannot_be_learnt_is_an_error_by_line(tmp_path, row, code):
    found: list[Any] = []
    data = Data(train=[str(write(tmp_path / "rows.jsonl", [row]))])
    list(examples(data.train, data, found.append, task="rank"))
    assert [(one.source.line, one.code) for one in found] == [(1, code)]


@pytest.mark.parametrize("loss", often(["pointwise", "listwise", "pairwise"], "listwise"))
def test_one_micro_batch_is_as_many(tmp_path, loss):
    found = []
    for name, tokens in (("one", 4096), ("many", 40)):
        (tmp_path / name).mkdir()
        sections = {"train": {"rows_per_step": 12, "tokens_per_pass": tokens}, "ranking": {"loss": loss}}
        setup = prepare(task_recipe(tmp_path / name, "rank", "encoder", dropout=0.0, **sections), root=tmp_path)
        setup.model.train()
        done = compute_gradients(setup, setup.sampler, 1)
        grads = [one.grad.flatten() for one in setup.attachment.trained.values() if one.grad is not None]
        found.append((len(done.computed.micro_batches), sum(done.computed.losses), torch.cat(grads)))
    (one, loss, gradient), (many, loss_of_many, of_many) = found
    assert one == 1 < many
    assert loss_of_many == pytest.approx(loss, rel=1e-5)
    assert float((of_many - gradient).norm() / gradient.norm()) < 1e-4


PEER_SCRIPT = """
import json, sys
from sentence_transformers import CrossEncoder
print(json.dumps(CrossEncoder(sys.argv[1], device="cpu").predict(json.loads(sys.argv[2])).tolist()))
"""


@pytest.mark.slow
def test_a_cross_encoder_of_sentence_transformers_answers_alike(tmp_path):
    python = ROOT / ".peers" / "st" / "bin" / "python"
    if not python.exists():
        pytest.skip("no environment with sentence-transformers: python -m benchmarks.environments .peers st")
    run = train(task_recipe(tmp_path, "rank", "encoder", train={"max_steps": 2}), root=tmp_path / "runs")
    pairs = [("Ada in Rome", "the big old apple"), ("a plum", "red red plum")]
    words = [python, "-c", PEER_SCRIPT, run.model_path, json.dumps(pairs)]
    said = json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
    rows = [{"query": query, "document": document} for query, document in pairs]
    found = [line["score"] for line in predict_list(Predictor(load_any(str(run.path), root=tmp_path)), rows)]
    np.testing.assert_allclose([1 / (1 + math.exp(-score)) for score in found], said, atol=1e-5)


def test_rows_have_a_query_and_its_documents_apart(tmp_path):
    setup = prepare(task_recipe(tmp_path, "rank", "encoder"), root=tmp_path)
    row, record = setup.store.row(0), rows_of("rank", 1)[0]
    begin = int(row.values[0])
    assert row.second == begin + 1  # behind the mark between both texts
    assert setup.renderer.tokenizer.decode(row.ids[1:begin]) == record["query"]


def test_a_run_orders_documents_when_it_is_served(tmp_path):
    sections = {"train": {"epochs": 6}, "optim": {"lr": 5e-3}}
    run = train(task_recipe(tmp_path, "rank", "encoder", rows=60, **sections), root=tmp_path / "runs")
    registry = open_registry([str(run.path)], root=tmp_path, options=EngineOptions(), note=lambda text: None)
    (model,) = registry.models.values()
    good, bad = model.classify([("Ada in Rome", "apple pear"), ("Ada in Rome", "Rome Oslo")])
    assert (model.card.answers, model.card.labels) == ("labels", ())
    assert good["score"] > bad["score"]
    last = [one.values["measures"] for one in run.events() if one.kind == "evaluation"][-1]
    assert last["ndcg_10"]["value"] > 0.9
    assert json.loads((run.path / "report.json").read_text("utf-8"))["baseline"]["name"] == "BM25"


DOCUMENTS = {"apple pear": 1, "Rome Oslo": 0, "plum": 1, "Lima": 0}
FORMS = {
    "label": lambda query, document, wanted: {"query": query, "document": document, "label": wanted},
    "score": lambda query, document, wanted: {"query": query, "document": document, "score": 0.9 if wanted else 0.2},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", often(["encoder", "causal"], "encoder"))
def test_a_document_a_row_is_trained_measured_predicted_and_reported(tmp_path, kind, form):
    """With each query there are several rows, one a document."""
    rows = [FORMS[form](row["query"], *one) for row in rows_of("rank", 8) for one in DOCUMENTS.items()]
    files = {
        "train": [str(write(tmp_path / "rows.jsonl", rows[:24]))],
        "eval": [str(write(tmp_path / "held.jsonl", rows[24:]))],
    }
    recipe = task_recipe(tmp_path, "rank", kind, dropout=0.0, data=files, train={"epochs": 12}, optim={"lr": 5e-3})
    run = train(recipe, root=tmp_path / "runs")
    last = [one.values["measures"] for one in run.events() if one.kind == "evaluation"][-1]
    assert last.keys() == {"loss", "spearman"}
    assert last["spearman"]["value"] > 0.8
    report = json.loads(run.report_path.read_text("utf-8"))
    assert (report["baseline"], report["metrics"]["after"]["measures"]) == (None, last)
    assert "Spearman correlation" in " ".join(report["headline"])
    loaded = load_any(str(run.path), root=tmp_path)
    again = evaluate_file(loaded, files["eval"][0])
    assert again.measures["spearman"]["value"] == pytest.approx(last["spearman"]["value"], abs=0.02)
    assert again.baseline is None
    found = [
        line["score"]
        for line in predict_list(
            Predictor(loaded), [{key: row[key] for key in ("query", "document")} for row in rows[24:]]
        )
    ]
    wanted = [row.get("label", row.get("score")) for row in rows[24:]]
    assert np.mean(found, where=np.array(wanted) > 0.5) > np.mean(found, where=np.array(wanted) < 0.5)


@pytest.mark.parametrize("loss", ["listwise", "pairwise"])
def test_a_loss_of_lists_is_refused_for_a_document_a_row(tmp_path, loss):
    """Of a list of one it is always 0, so nothing would be learnt."""
    rows = [FORMS["label"](row["query"], "plum", 1) for row in rows_of("rank", 8)]
    data = {"train": [str(write(tmp_path / "rows.jsonl", rows))], "eval": []}
    with pytest.raises(DataError, match=f"rows.jsonl:1: ranking.loss {loss} compares the documents of a row"):
        prepare(task_recipe(tmp_path, "rank", "encoder", data=data, ranking={"loss": loss}), root=tmp_path)


def assert_lists_that_cannot_be_wrong_are_left_out(folder: Path) -> None:  # trap: M6
    """Twelve lists with one right document, and as many whose documents are all wrong: the ranks are of the twelve."""
    found = []
    for name, num in (("right alone", 0), ("with others", 12)):
        (folder / name).mkdir(parents=True)
        held = rows_of("rank", 12, seed=7)
        held += [
            {"query": row["query"], "documents": ["Lima", "plum a"], "labels": [0, 0]}
            for row in rows_of("rank", num, seed=9)
        ]
        data = {"eval": [str(write(folder / name / "held.jsonl", held))]}
        recipe = task_recipe(folder / name, "rank", "encoder", dropout=0.0, data=data, train={"max_steps": 1})
        run = train(recipe, root=folder / name / "runs")
        (after,) = (one.values for one in run.events() if one.kind == "evaluation" and one.values["name"] == "after")
        headline = json.loads(run.report_path.read_text("utf-8"))["headline"]
        found.append(([after["measures"][key]["value"] for key in ("recall_1", "mrr_10", "ndcg_10")], headline))
    (alone, _), (beside, headline) = found
    assert beside == pytest.approx(alone)
    assert any("12 of 24 lists are left out of the ranks" in sentence for sentence in headline)


def test_lists_that_cannot_be_wrong_are_left_out(tmp_path):
    assert_lists_that_cannot_be_wrong_are_left_out(tmp_path)


@pytest.mark.slow
def test_lists_that_count_as_found_would_be_seen(tmp_path, monkeypatch):
    def as_found(own: Any, tokenizer: Any) -> Any:
        first = {"rank": 1, "bm25": 1, "ndcg": 1.0, "bm25_ndcg": 1.0}
        return [{**row, **(first if row["rank"] is None else {})} for row in lists(own, tokenizer)]

    lists = retrieval._lists
    monkeypatch.setattr(retrieval, "_lists", as_found)
    with pytest.raises(AssertionError):
        assert_lists_that_cannot_be_wrong_are_left_out(tmp_path)
