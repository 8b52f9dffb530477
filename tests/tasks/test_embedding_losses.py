"""Losses of vectors: by formulas, by sentence-transformers' own numbers, and in one micro-batch as in many."""

import json
import math
import subprocess
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from often import often
from tiny_tasks import sentence_transformers_python, task_recipe, texts, write
from tunesmith.data.branch_encoders import BranchEncoder, EmbeddingEncoder
from tunesmith.errors import RecipeError
from tunesmith.parallel.world import World
from tunesmith.recipe.objectives import Embed
from tunesmith.tasks import embedding_losses
from tunesmith.tasks.embedding_losses import Texts, prepass, text_losses
from tunesmith.training.setup import Setup, prepare
from tunesmith.training.step import compute_gradients

PEER = json.loads((Path(__file__).parent / "st_losses.json").read_text("utf-8"))
"""Made by st_losses.py where sentence-transformers is installed."""


def some_texts(rows: list[list[list[float]]], scores: list[float] | None = None, keys: Any = None) -> Texts:
    """Texts of given vectors, all of them different unless `keys` say otherwise."""
    flat = [vector for row in rows for vector in row]
    names = keys or range(len(flat))
    wanted = scores or [0.0] * len(rows)
    vectors = torch.tensor(flat, dtype=torch.float64)
    known = list(dict.fromkeys(names))
    return Texts(vectors, torch.tensor([known.index(name) for name in names]), torch.tensor([len(row) for row in rows]),
                 torch.tensor(wanted))  # fmt: skip


@pytest.mark.parametrize("case", PEER["cases"], ids=lambda case: case["name"])
def test_every_loss_is_that_of_sentence_transformers(case):
    found = text_losses(some_texts(case["rows"], case["scores"]), Embed(**case["options"]))
    assert float(found.mean()) == pytest.approx(case["loss"], rel=1e-6)


@pytest.mark.slow
def test_the_peer_still_says_so(tmp_path):
    python = sentence_transformers_python()
    script = Path(__file__).with_name("st_losses.py")
    subprocess.run([python, script, tmp_path / "again.json"], check=True, capture_output=True)
    again = json.loads((tmp_path / "again.json").read_text("utf-8"))
    for kind in ("cases", "rankings"):
        for now, then in zip(again[kind], PEER[kind], strict=True):
            assert now["loss"] == pytest.approx(then["loss"], rel=1e-6), now["name"]


VECTORS = torch.randn(9, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64).tolist()
ROWS = [VECTORS[0:2], VECTORS[2:5], VECTORS[5:7], VECTORS[7:9]]
"""The second row has a hard negative."""


def cos(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b)


def by_hand(anchor: list[float], positive: list[float], others: list[list[float]]) -> float:
    return -20 * cos(anchor, positive) + math.log(sum(math.exp(20 * cos(anchor, one)) for one in [positive, *others]))


def test_an_anchor_is_compared_with_every_document_of_the_step():
    expected = []
    for i, (anchor, positive, *_) in enumerate(ROWS):
        others = [text for k, row in enumerate(ROWS) for text in row[1:] if (k, text) != (i, positive)]
        expected.append(by_hand(anchor, positive, others))
    assert text_losses(some_texts(ROWS), Embed(loss="ranking")).tolist() == pytest.approx(expected, rel=1e-12)


KEYS = ["a", "x", "b", "x", "n", "a", "y", "x", "z"]
"""Rows 1 and 2 share their positive x, rows 1 and 3 their anchor a; the last row's anchor is the text x itself."""


def assert_no_text_is_its_own_negative() -> None:  # trap: P23
    found = text_losses(some_texts(ROWS, keys=KEYS), Embed(loss="ranking")).tolist()
    _, x1, _, x2, n, _, y, _, z = VECTORS
    expected = [
        by_hand(VECTORS[0], x1, [n, z]),  # neither the other x nor y, which belongs to a as well
        by_hand(VECTORS[2], x2, [n, y, z]),
        by_hand(VECTORS[5], y, [n, z]),
        by_hand(VECTORS[7], z, [n, y]),  # not itself
    ]
    assert found == pytest.approx(expected, rel=1e-12)


def test_no_text_is_its_own_negative():
    assert_no_text_is_its_own_negative()


def test_the_test_sees_duplicates_as_negatives(monkeypatch):
    monkeypatch.setattr(embedding_losses, "_is_in", lambda pairs, known: torch.zeros_like(pairs, dtype=torch.bool))
    with pytest.raises(AssertionError):
        assert_no_text_is_its_own_negative()


SHARED = [("red apple", "big apple"), ("big apple", "small apple"), ("small apple", "red apple")]
"""Each text is an anchor and a document."""
PROMPTS = {"query_prompt": "the ", "document_prompt": "a "}


def assert_a_text_is_known_without_its_prompt(folder: Path) -> None:  # trap: P23
    """An anchor is compared with its positive and the one text that is neither its own nor belongs to it."""
    data = {"train": [str(write(folder / "rows.jsonl", [{"anchor": a, "positive": b} for a, b in SHARED]))], "eval": []}
    train = {"rows_per_step": 3, "tokens_per_pass": 512}
    options = {"loss": "ranking", **PROMPTS}
    recipe = task_recipe(folder, "embed", "encoder", data=data, dropout=0.0, train=train, embed=options)
    setup = prepare(recipe, root=folder)
    batch = setup.collator.batch(setup.sampler.step(1)[0], step=1)
    texts_of = embedding_losses.texts_of(batch, embedding_losses.embed(setup.model, batch, setup.recipe.embed))
    vectors = texts_of.vectors_LD.tolist()
    by_text = {SHARED[row][k]: vectors[2 * i + k] for i, row in enumerate(batch.row_indices) for k in (1,)}
    expected = []
    for i, row in enumerate(batch.row_indices):
        anchor, positive = SHARED[row]
        others = [vector for text, vector in by_text.items() if text not in (anchor, positive)]
        expected.append(by_hand(vectors[2 * i], by_text[positive], others))
    assert text_losses(texts_of, setup.recipe.embed).tolist() == pytest.approx(expected, rel=1e-5)


def test_a_text_is_known_without_its_prompt(tmp_path):
    assert_a_text_is_known_without_its_prompt(tmp_path)


@pytest.mark.slow
def test_knowing_a_text_by_its_prompt_too_would_be_seen(tmp_path, monkeypatch):
    """Its key stays that of the tokens that the model reads."""
    monkeypatch.setattr(EmbeddingEncoder, "encode", BranchEncoder.encode)
    with pytest.raises(AssertionError):
        assert_a_text_is_known_without_its_prompt(tmp_path)


def test_rows_that_are_all_one_document_have_no_loss_and_no_gradient():
    texts_of = some_texts(ROWS, keys=["a", "x", "b", "x", "x", "c", "x", "d", "x"])
    vectors = texts_of.vectors_LD.requires_grad_()
    losses = text_losses(texts_of._replace(vectors_LD=vectors), Embed(loss="ranking"))
    losses.sum().backward()
    assert losses.tolist() == pytest.approx([0] * 4, abs=1e-12)
    assert float(vectors.grad.abs().max()) < 1e-12


OPTIONS: dict[str, dict[str, Any]] = {
    "ranking": {},
    "symmetric": {"symmetric": True},
    "dims": {"dims": [32, 8]},
    "cosent": {"loss": "cosent"},
    "angle": {"loss": "angle"},
    "cosine": {"loss": "cosine"},
    "margin": {"loss": "margin"},
}


def rows_for(name: str, num: int) -> list[dict[str, Any]]:
    said, others, third = (texts(num, seed=seed) for seed in (1, 2, 3))
    if name in ("cosent", "angle", "cosine"):
        return [{"sentence1": a, "sentence2": others[i], "score": i % 5} for i, a in enumerate(said)]
    rows = [{"anchor": a, "positive": b, "negative": c} for a, b, c in zip(said, others, third, strict=True)]
    return [{**row, "score": 0.5} for row in rows] if name == "margin" else rows


def setup_of(folder: Path, name: str, *, tokens: int, dropout: float = 0.0, **sections: Any) -> Setup:
    folder.mkdir(exist_ok=True, parents=True)
    data = {"train": [str(write(folder / "rows.jsonl", rows_for(name, 16)))], "eval": []}
    sections = {"train": {"rows_per_step": 14, "tokens_per_pass": tokens}, "embed": OPTIONS[name], **sections}
    return prepare(task_recipe(folder, "embed", "encoder", data=data, dropout=dropout, **sections), root=folder)


def gradients(setup: Setup) -> tuple[int, float, torch.Tensor]:
    """Micro-batches of step 1, its loss, and its gradient as one vector."""
    setup.model.train()
    done = compute_gradients(setup, setup.sampler, 1)
    grads = [tensor.grad.flatten() for tensor in setup.attachment.trained.values() if tensor.grad is not None]
    return len(done.computed.micro_batches), sum(done.computed.losses) / done.num_targets, torch.cat(grads)


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("name", often(OPTIONS, "ranking", "cosent", "margin"))
def test_one_micro_batch_is_as_many(tmp_path, name):  # trap: P24
    assert_one_micro_batch_is_as_many(tmp_path, name)


def assert_one_micro_batch_is_as_many(folder: Path, name: str) -> None:
    one, loss, gradient = gradients(setup_of(folder / "one", name, tokens=4096))
    many, loss_of_many, gradient_of_many = gradients(setup_of(folder / "many", name, tokens=48))
    assert (one, many) == (1, pytest.approx(8, abs=3))
    assert loss_of_many == pytest.approx(loss, rel=1e-5)
    assert apart(gradient_of_many, gradient) < 1e-4  # float32 sums in another order


def of_the_pass(model: Any, batches: Any, world: World, **how: Any) -> Any:
    """Each micro-batch has its own negatives, as where gradients are accumulated."""
    return partial(embedding_losses.embedding_loss_sum, **how)


def gradient_of_the_pass(model: Any, batches: Any, world: World, **how: Any) -> Any:
    """The loss is that of the step, its gradient that of the pass alone."""
    whole, own = prepass(model, batches, world, **how), of_the_pass(model, batches, world, **how)

    def loss_sum(model: Any, batch: Any) -> torch.Tensor:
        loss = own(model, batch)
        return loss + (whole(model, batch) - loss).detach()

    return loss_sum


def as_constants(model: Any, batches: Any, world: World, **how: Any) -> Any:
    """Texts of other micro-batches are negatives that nothing is learnt of: their part of the gradient is missing."""
    found = [
        embedding_losses.texts_of(batch, embedding_losses.embed(model, batch, how["options"])) for batch in batches
    ]

    def loss_sum(model: Any, batch: Any) -> torch.Tensor:
        own = embedding_losses.texts_of(batch, embedding_losses.embed(model, batch, how["options"]))
        others = [texts for texts in found if not torch.equal(texts.keys_L, own.keys_L)]
        losses = text_losses(embedding_losses.joined([own, *others]), how["options"])
        return losses[: len(own.counts_B)].sum()

    return loss_sum


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "planted"),
    [("ranking", of_the_pass), ("ranking", gradient_of_the_pass), ("ranking", as_constants),
     ("symmetric", gradient_of_the_pass), ("cosent", as_constants)],
)  # fmt: skip
def test_negatives_of_the_pass_would_be_seen(tmp_path, monkeypatch, name, planted):
    monkeypatch.setattr(embedding_losses, "prepass", planted)
    with pytest.raises(AssertionError):
        assert_one_micro_batch_is_as_many(tmp_path, name)


@pytest.mark.parametrize(
    ("name", "num", "size"), [("ranking", 16, 13), ("ranking", 42, 16), ("cosent", 16, 13), ("margin", 21, 1)]
)
def test_a_step_of_few_rows_has_something_to_compare(tmp_path, name, num, size):
    rows = [
        {key: value for key, value in row.items() if key != "negative" or name == "margin"}
        for row in rows_for(name, num)
    ]
    data = {"train": [str(write(tmp_path / "rows.jsonl", rows))], "eval": []}
    train = {"rows_per_step": "auto", "tokens_per_pass": 512}
    recipe = task_recipe(tmp_path, "embed", "encoder", data=data, train=train, embed=OPTIONS[name])
    assert prepare(recipe, root=tmp_path).recipe.train.rows_per_step == size
    if size > 1:
        alone = recipe.model_copy(update={"train": recipe.train.model_copy(update={"rows_per_step": 1})})
        with pytest.raises(RecipeError, match=r"train\.rows_per_step: 1: a row is compared .* Use 2 or more\."):
            prepare(alone, root=tmp_path)


def assert_the_gradient_is_that_of_one_graph(folder: Path, method: Any) -> None:  # trap: P25
    """With dropout: of all micro-batches in one graph, which draw the same."""
    setup = setup_of(folder, "ranking", tokens=48, dropout=0.2, method=method)
    many, _, found = gradients(setup)
    assert many > 3
    setup.optimizer.zero_grad()
    seeds: list[int] = []
    real = torch.manual_seed
    try:
        torch.manual_seed = lambda seed: (seeds.append(seed), real(seed))[1]
        compute_gradients(setup, setup.sampler, 1)
    finally:
        torch.manual_seed = real
    setup.optimizer.zero_grad()
    torch.manual_seed(seeds[0])
    options = setup.recipe.embed
    batches = [setup.collator.batch(rows, step=1) for rows in setup.sampler.step(1)]
    parts = [embedding_losses.texts_of(batch, embedding_losses.embed(setup.model, batch, options)) for batch in batches]
    losses = text_losses(embedding_losses.joined(parts), options)
    (losses.sum() / len(losses)).backward()
    setup.attachment.collect_gradients()
    grads = [tensor.grad.flatten() for tensor in setup.attachment.trained.values() if tensor.grad is not None]
    assert apart(found, torch.cat(grads)) < 1e-5


@pytest.mark.parametrize("method", ["full", {"name": "lora", "rank": 4, "dropout": 0.2}], ids=["full", "lora"])
def test_dropout_is_drawn_again_as_it_was_looked_at(tmp_path, method):
    assert_the_gradient_is_that_of_one_graph(tmp_path, method)


@pytest.mark.slow
def test_the_test_sees_dropout_that_is_drawn_anew(tmp_path, monkeypatch):
    def other(model: Any, batches: Any, world: World, **how: Any) -> Any:
        found = prepass(model, batches, world, **how)

        def loss_sum(model: Any, batch: Any) -> Any:
            torch.rand(1)
            return found(model, batch)

        return loss_sum

    monkeypatch.setattr(embedding_losses, "prepass", other)
    with pytest.raises(AssertionError):
        assert_the_gradient_is_that_of_one_graph(tmp_path, "full")


@pytest.fixture(scope="module")
def bfloat16_setup(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    return setup_of(tmp_path_factory.mktemp("bfloat16"), "ranking", tokens=96, precision="bfloat16")


def assert_vectors_have_length_one(setup: Setup) -> None:  # trap: P26
    batch = setup.collator.batch(setup.sampler.step(1)[0], step=1)
    with torch.no_grad():
        vectors = embedding_losses.embed(setup.model, batch, setup.recipe.embed)
    assert vectors.dtype == torch.float32
    assert float((vectors.double().norm(dim=-1) - 1).abs().max()) < 1e-6


def test_a_vector_has_length_one_in_bfloat16_too(bfloat16_setup):
    assert next(bfloat16_setup.model.parameters()).dtype == torch.bfloat16
    assert_vectors_have_length_one(bfloat16_setup)


def test_the_test_sees_vectors_that_are_scaled_in_bfloat16(bfloat16_setup, monkeypatch):
    monkeypatch.setattr(
        F, "normalize", lambda v, dim: (v.bfloat16() / v.bfloat16().norm(dim=dim, keepdim=True)).float()
    )
    with pytest.raises(AssertionError):
        assert_vectors_have_length_one(bfloat16_setup)
