"""LitGPT's `finetune_lora` or `finetune_full` on rows that are tokens already. Run by itself:

    python litgpt_train.py JOB.json RESULT.json

given_rows.py says what is in them; "arguments" are words of its command line. Two things LitGPT cannot be told, and
they are put into it: a rate that falls in a line to zero from the first step on, and gradients clipped at norm 1.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from given_rows import run, versions
from litgpt.__main__ import main
from litgpt.config import configs
from litgpt.finetune import full, lora
from litgpt.scripts.convert_hf_checkpoint import convert_hf_checkpoint
from litgpt.scripts.convert_lit_checkpoint import convert_lit_checkpoint
from litgpt_rows import COUNTER
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

SHAPE = {
    "n_layer": "num_hidden_layers",
    "n_embd": "hidden_size",
    "n_head": "num_attention_heads",
    "intermediate_size": "intermediate_size",
    "padded_vocab_size": "vocab_size",
    "block_size": "max_position_embeddings",
}
"""What LitGPT calls it, and what config.json does."""


def converted(model: Path, folder: Path) -> Path:
    """The model's folder as LitGPT wants it."""
    shutil.copytree(model, folder, copy_function=os.symlink)
    shape = json.loads((model / "config.json").read_text("utf-8"))
    known = [config for config in configs if all(config.get(its) == shape[name] for its, name in SHAPE.items())]
    if not known:
        raise ValueError(f"{model}: LitGPT knows no model of this shape")
    convert_hf_checkpoint(folder, model_name=known[0]["name"])
    return folder


def converted_back(final: Path, model: Path, result: Path) -> str:
    """What LitGPT saved, as a folder of transformers. Its output layer is one apart from the embedding."""
    shutil.copytree(model, result, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors*"))
    told = json.loads((model / "config.json").read_text("utf-8"))
    (result / "config.json").write_text(json.dumps({**told, "tie_word_embeddings": False}), "utf-8")
    convert_lit_checkpoint(final, result)
    (result / "model.pth").replace(result / "pytorch_model.bin")
    return str(result)


def words(job: dict[str, Any], checkpoint: Path, out: Path) -> list[str]:
    """Of LitGPT's command line."""
    optimizer = {"class_path": "torch.optim.AdamW", "init_args": {"lr": job["lr"], "weight_decay": 0.0}}
    given = {
        "out_dir": out,
        "data": "litgpt_rows.Rows",
        "data.path": job["rows"],
        "data.seed": job["seed"],
        "seed": job["seed"],
        "optimizer": json.dumps(optimizer),
        "train.global_batch_size": job["rows_per_step"],
        "train.epochs": 1,
        "train.max_steps": job["steps"],
        "train.lr_warmup_steps": 0,
        "eval.interval": job["steps"] + 1,
        "eval.final_validation": "false",
        **job["arguments"],
    }
    if job["method"] == "lora":
        given |= {"lora_r": job["rank"], "lora_alpha": job["alpha"], "lora_dropout": 0.0}
        given |= {f"lora_{layer}": "true" for layer in ("query", "key", "value", "projection", "mlp")}
    return [f"finetune_{job['method']}", str(checkpoint), *(f"--{name}={value}" for name, value in given.items())]


def linear(optimizer: torch.optim.Optimizer, warmup_steps: int, max_steps: int) -> LambdaLR:
    """A rate that falls to zero, in place of LitGPT's warm-up and cosine."""
    del warmup_steps  # zero
    return LambdaLR(optimizer, lambda step: 1 - step / max_steps)


def clip(optimizer: torch.optim.Optimizer, *_: object) -> None:
    torch.nn.utils.clip_grad_norm_([weight for group in optimizer.param_groups for weight in group["params"]], 1.0)


def train(job: dict[str, Any]) -> dict[str, Any]:
    """RESULT.json of one job."""
    torch.set_num_threads(job["threads"])
    model, folder = Path(job["model"]), Path(job["folder"])
    step_ends: list[float] = []
    full.get_lr_scheduler = lora.get_lr_scheduler = linear
    register_optimizer_step_pre_hook(clip)
    register_optimizer_step_post_hook(lambda *_: step_ends.append(time.time()))
    with tempfile.TemporaryDirectory(dir=folder) as place:  # of the model, copies in forms of LitGPT's
        out = Path(place) / "out"
        # LitGPT reads its own command line again when it saves.
        sys.argv = ["litgpt", *words(job, converted(model, Path(place) / "checkpoint"), out)]
        main()
        result = converted_back(out / "final", model, folder / "result")
        with open(next((out / "logs").rglob("metrics.csv")), encoding="utf-8", newline="") as file:
            losses = [float(row["loss"]) for row in csv.DictReader(file) if row["loss"]]
    batches = len(COUNTER.batches) // len(step_ends)
    return {
        "step_ends": step_ends,
        **COUNTER.per_step(batches, len(step_ends)),
        "losses": losses[batches - 1 :: batches],  # told after each batch, of the batches of a step so far
        "result": result,
        "versions": versions("torch", "litgpt", "lightning"),
    }


if __name__ == "__main__":
    run(train)
