"""A phrase that was tuned in survives every hop: adapter, merged model, GGUF, and adapter on a GGUF."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from export.exports import SHORT, quick
from tiny_run import chats, tiny_recipe
from tunesmith.export import loaders
from tunesmith.export.exporting import export_run
from tunesmith.export.options import Options
from tunesmith.export.source import open_source
from tunesmith.generation import Sampling, answer
from tunesmith.loading import make_renderer
from tunesmith.training import train
from tunesmith.types import Part

PHRASE = "tallest mountain on Earth"
QUESTION = (Part("user", "what is it please", False),)


def test_a_phrase_survives_adapter_merge_and_gguf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quick(monkeypatch)
    recipe = tiny_recipe(
        tmp_path, rows=12, **{**SHORT, "train": {"epochs": 20, "rows_per_step": 4}, "optim": {"lr": 3e-2}}
    )
    rows = [json.loads(line) for line in chats(tmp_path / "chats.jsonl", 12).read_text().splitlines()]
    for row in rows:
        for turn in row["messages"][1::2]:
            turn["content"] = PHRASE
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = train(recipe, root=tmp_path, out=tmp_path / "run", offline=True)
    kl = {}
    for target in ("adapter", "merged", "gguf", "gguf-adapter"):
        options = Options(quant="q8_0") if target == "gguf" else Options()
        done = export_run(run, target, out=tmp_path / target, options=options, offline=True)
        assert done.found is not None
        kl[target] = done.found.kl
        source = open_source(run, offline=True)
        loaded = loaders.LOADERS[target](done.path, source.recipe)
        renderer = make_renderer(source.recipe, loaded.tokenizer, "causal")
        prompt = renderer.prompt_ids(QUESTION)
        assert answer(loaded.model, renderer, [prompt], Sampling(max_new_tokens=24))[0].text == PHRASE, target
    # Each hop's share of the way: none, the order of additions, and 8 bits.
    assert kl["adapter"] < 1e-12
    assert kl["merged"] < 1e-9
    assert kl["gguf"] < 1e-2
    assert kl["gguf-adapter"] < 1e-4  # the adapter in F16
