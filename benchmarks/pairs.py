"""`python -m benchmarks.pairs`: an encoder–decoder on rows end to end, beside the same rows padded.

A T5 of t5-small's shape with random weights and the words of a tokenizer that is given. Both ways take the same steps
in turn in one process, forward and backward without updates; tokens a second are those of the rows, padding left out.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import orjson
import torch
from tokenizers import processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

from benchmarks.measured import machine
from tunesmith.planning import forecast
from tunesmith.recipe.read import validate
from tunesmith.training import setup as preparing
from tunesmith.training.setup import Setup, prepare
from tunesmith.training.step import gradients

WAYS = {"padded": ("encoder_decoder",), "packed": ("ragged_pairs", "encoder_decoder")}
WARM = 2


def make_model(tokenizer: str, folder: Path, **sizes: int) -> Path:
    """T5 of random weights (t5-small's shape if no sizes are given); every text ends with [SEP]."""
    words = AutoTokenizer.from_pretrained(tokenizer)
    backend, end = words.backend_tokenizer, words.sep_token
    backend.post_processor = processors.TemplateProcessing(
        single=f"$A {end}", special_tokens=[(end, words.sep_token_id)]
    )
    ids = {"decoder_start_token_id": words.pad_token_id, "pad_token_id": words.pad_token_id}
    torch.manual_seed(0)
    config = T5Config(vocab_size=len(words), eos_token_id=words.sep_token_id, **ids, **sizes)
    T5ForConditionalGeneration(config).save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=words.pad_token, eos_token=end, unk_token=words.unk_token
    ).save_pretrained(folder)
    return folder


def write_pairs(chats: Path, path: Path) -> Path:
    """The first question and answer of each chat, as prompt and completion."""
    turns = [orjson.loads(line)["messages"][:2] for line in chats.read_bytes().splitlines()]
    pairs = [{"prompt": ask["content"], "completion": " " + answer["content"]} for ask, answer in turns]
    path.write_bytes(b"\n".join(map(orjson.dumps, pairs)))
    return path


def prepared(way: str, model: Path, rows: Path, root: Path, settings: dict[str, Any]) -> Setup:
    """A run whose rows lie that way, whatever is the rule."""
    data = {"train": [{"path": str(rows)}], "held_out": 0.05, "too_long": "cut"}
    recipe = validate({"model": str(model), "data": data, "device": "cpu", "evaluation": {"samples": 0}, **settings})

    def layouts(*_: Any) -> tuple[str, ...]:
        return WAYS[way]

    with mock.patch.object(preparing, "layouts_of", layouts), mock.patch.object(forecast, "layouts_of", layouts):
        setup = prepare(recipe, root=root)
    setup.model.train()
    return setup


def rates(setups: dict[str, Setup], steps: int) -> dict[str, float]:
    """Tokens a second of each, of the same steps in turn."""
    tokens, seconds = dict.fromkeys(setups, 0), dict.fromkeys(setups, 0.0)
    for step in range(1, WARM + steps + 1):
        for way, setup in setups.items():
            begun = time.perf_counter()
            found = gradients(setup, setup.plan, step)
            taken = time.perf_counter() - begun
            setup.update.drop_gradients()
            if step > WARM:
                tokens[way] += sum(sum(setup.plan.lengths_of(rows)) for rows in found.passes)
                seconds[way] += taken
    return {way: tokens[way] / seconds[way] for way in setups}


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pairs", description=__doc__)
    add = parser.add_argument
    add("--tokenizer", required=True, help="a folder with a tokenizer of BERT's kind")
    add("--chats", type=Path, required=True, metavar="FILE", help="chats: the first turns become pairs")
    add("--summaries", type=Path, metavar="FILE", help="documents and summaries too, cut where they are too long")
    add("--precision", nargs="+", default=["bfloat16", "float32"])
    add("--method", default="full")
    add("--rows-per-step", type=int, default=32)
    add("--steps", type=int, default=6)
    add("--threads", type=int, default=2)
    add("--sizes", type=orjson.loads, default={}, metavar="JSON", help="of the model, by T5Config's names")
    options = parser.parse_args(words)
    print(f"{machine()['processor']}, {options.threads} threads, torch {torch.__version__.partition('+')[0]}\n")
    print("| rows | precision | padding | padded, tokens/s | packed, tokens/s | times |\n|---|---|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = make_model(options.tokenizer, folder / "model", **options.sizes)
        files = {"generate": write_pairs(options.chats, folder / "pairs.jsonl")}
        files |= {"summarize": options.summaries} if options.summaries else {}
        for task, file in files.items():
            for precision in options.precision:
                rows_per_step = options.rows_per_step if task == "generate" else max(1, options.rows_per_step // 4)
                train = {"rows_per_step": rows_per_step, "tokens_per_pass": 2048}
                settings = {"task": task, "precision": precision, "method": {"name": options.method}, "train": train}
                settings["threads"] = options.threads
                setups = {way: prepared(way, model, file, folder / "runs", settings) for way in WAYS}
                print(line(task, precision, setups, rates(setups, options.steps)), flush=True)


def line(task: str, precision: str, setups: dict[str, Setup], found: dict[str, float]) -> str:
    plan = setups["padded"].plan
    rows = f"{task}, {len(plan.rows_I):,} of {plan.lengths_I.mean():.0f} tokens, {plan.rows_per_step} a step"
    times = f"{found['packed'] / found['padded']:.2f}"
    cells = (rows, precision, f"{plan.padding():.1%}", *(f"{found[way]:,.0f}" for way in WAYS), times)
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
