"""LLaMA-Factory's own training on rows that are tokens already: what `llamafactory-cli train` does. Run by itself:

    python llamafactory_train.py JOB.json RESULT.json

given_rows.py says what is in them; "arguments" are those of its configuration file. The rows reach it as its
`tokenized_path`, a data set that it would have made itself from texts.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from datasets import Dataset, DatasetDict
from given_rows import labelled, run, versions
from trainer_log import Clock

# LLaMA-Factory imports torchaudio, whose builds on PyPI load torch's libraries for CUDA and so no torch without them.
# No row here has sound.
sys.modules["torchaudio"] = ModuleType("torchaudio")
sys.modules["torchaudio"].__spec__ = ModuleSpec("torchaudio", None)

from llamafactory.train.tuner import run_exp  # noqa: E402


def train(job: dict[str, Any]) -> dict[str, Any]:
    """RESULT.json of one job."""
    torch.set_num_threads(job["threads"])
    folder = Path(job["folder"])
    rows = [{**row, "attention_mask": [1] * len(row["input_ids"])} for row in labelled(job["rows"], "train")]
    DatasetDict({"train": Dataset.from_list(rows)}).save_to_disk(folder / "rows")
    rows_per_batch = min(job["arguments"]["per_device_train_batch_size"], job["rows_per_step"])
    batches = job["rows_per_step"] // rows_per_batch
    result = str(folder / "result")
    given: dict[str, Any] = {
        "model_name_or_path": job["model"],
        "stage": "sft",
        "do_train": True,
        "finetuning_type": job["method"],
        "dataset": "rows",  # a name is asked for; what is in tokenized_path is taken
        "tokenized_path": str(folder / "rows"),
        "output_dir": result,
        "seed": job["seed"],
        "num_train_epochs": 1,
        "learning_rate": job["lr"],
        "gradient_accumulation_steps": batches,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": not torch.accelerator.is_available(),
    }
    if job["method"] == "lora":
        given |= {"lora_rank": job["rank"], "lora_alpha": job["alpha"], "lora_target": "all"}
    clock = Clock()
    run_exp({**given, **job["arguments"], "per_device_train_batch_size": rows_per_batch}, callbacks=[clock])
    return {
        **clock.told(batches),
        "result": result,
        "versions": versions("torch", "transformers", "llamafactory", "peft", "accelerate"),
    }


if __name__ == "__main__":
    run(train)
