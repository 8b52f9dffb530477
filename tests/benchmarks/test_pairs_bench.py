"""`python -m benchmarks.pairs`: the same steps both ways."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from benchmarks import pairs

SIZES = {"d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 1, "num_heads": 4}


def words(folder: Path) -> Path:
    known = ["[PAD]", "[UNK]", "[SEP]", "how", "are", "you", "well", "fine", "and", "yourself"]
    backend = Tokenizer(models.WordLevel({word: at for at, word in enumerate(known)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", sep_token="[SEP]"
    ).save_pretrained(folder)
    return folder


def test_both_ways_take_the_same_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chats, tokenizer = tmp_path / "chats.jsonl", words(tmp_path / "words")
    lines = []
    for at in range(24):
        ask, answer = "how are you " + "well " * (at % 5), "fine and yourself " + "well " * (at % 7)
        turns = [("user", f"{ask}{at}"), ("assistant", answer)]
        lines.append(json.dumps({"messages": [{"role": role, "content": text} for role, text in turns]}))
    chats.write_text("\n".join(lines), "utf-8")
    model = pairs.make_model(str(tokenizer), tmp_path / "model", **SIZES)
    rows = pairs.write_pairs(chats, tmp_path / "pairs.jsonl")
    settings = {"precision": "float32", "method": {"name": "full"}, "task": "generate", "threads": 1}
    settings |= {"train": {"rows_per_step": 8, "tokens_per_pass": 64}}
    setups = {way: pairs.prepared(way, model, rows, tmp_path / "runs", settings) for way in pairs.WAYS}
    assert {way: setup.plan.layout for way, setup in setups.items()} == {
        "padded": "encoder_decoder",
        "packed": "ragged_pairs",
    }
    taken = [sorted(row for rows in setup.plan.step(1) for row in rows) for setup in setups.values()]
    assert taken[0] == taken[1]
    before = torch.get_num_threads()
    command = ["--tokenizer", str(tokenizer), "--chats", str(chats), "--precision", "float32", "--steps", "1"]
    pairs.main([*command, "--threads", "1", "--sizes", json.dumps(SIZES), "--rows-per-step", "8"])
    torch.set_num_threads(before)
    *_, last = capsys.readouterr().out.splitlines()
    assert last.startswith("| generate, ")
    assert all(rate > 0 for rate in pairs.rates(setups, 1).values())
