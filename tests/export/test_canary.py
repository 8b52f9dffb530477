"""A phrase that was tuned in survives every hop: adapter, merged model, GGUF."""

import json
from pathlib import Path

import pytest

from export.exports import SHORT, quick
from tiny_run import chats, tiny_recipe
from tunesmith.export.export_run import TARGETS, export_run
from tunesmith.export.target import Computing, ExportedModel, ExportOptions, TorchModel
from tunesmith.generation.padded import generate
from tunesmith.inference.load import make_renderer
from tunesmith.runs.folder import Run
from tunesmith.training.trainer import train
from tunesmith.types import Part

PHRASE = "tallest mountain on Earth"
QUESTION = (Part("user", "what is it please", False),)
HOPS = {
    "adapter": ("adapter", ExportOptions()),
    "merged": ("merged", ExportOptions(dtype="float32")),
    "gguf f16": ("gguf", ExportOptions(quant="f16")),
    "gguf q8_0": ("gguf", ExportOptions(quant="q8_0")),
}


def test_a_phrase_survives_every_hop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quick(monkeypatch)
    recipe = tiny_recipe(
        tmp_path, rows=12, **{**SHORT, "train": {"epochs": 20, "rows_per_step": 4}, "optim": {"lr": 1e-2}}
    )
    say_the_phrase(tmp_path / "chats.jsonl", 12)
    run = train(recipe, root=tmp_path, out=tmp_path / "run", offline=True)
    kl = survived(run, tmp_path)
    # Each hop's share of the way: none, the order of additions, F16, and 8 bits.
    bounds = {"adapter": 1e-12, "merged": 1e-9, "gguf f16": 1e-4, "gguf q8_0": 1e-2}
    assert all(value < bounds[hop] for hop, value in kl.items()), kl


def say_the_phrase(path: Path, num: int) -> None:
    """Different conversations, in all of which the assistant says the one thing."""
    rows = [json.loads(line) for line in chats(path, num).read_text().splitlines()]
    for row in rows:
        for turn in row["messages"][1::2]:
            turn["content"] = PHRASE
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def survived(run: Run, folder: Path) -> dict[str, float]:
    """KL divergence of every hop from the tuned model, each of which says the phrase to a question that no row asks."""
    kl = {}
    for hop, (target, options) in HOPS.items():
        done = export_run(run, target, out=folder / hop, options=options, offline=True)
        kl[hop] = done.found.kl
        assert said(run, TARGETS[target].load(done.path, run.recipe(), Computing("cpu", "float32"))) == PHRASE, hop
    return kl


def said(run: Run, loaded: ExportedModel) -> str:
    assert isinstance(loaded, TorchModel)
    renderer = make_renderer(run.recipe(), loaded.tokenizer, "causal")
    return generate(loaded.model, renderer, [renderer.prompt_ids(QUESTION)], 24)[0].text
