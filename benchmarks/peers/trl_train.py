"""TRL's SFTTrainer on rows that are rendered already, as its documentation says. Run by itself:

    python trl_train.py JOB.json RESULT.json

JOB.json: the fields of `benchmarks.train.Settings`, "seed", "folder" for what is saved, "rows" as peers/render_rows.py
writes them, and "arguments": whatever else goes to SFTConfig. RESULT.json: the fields of `benchmarks.train.Log`.
"""

from __future__ import annotations

import json
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

ROWS_PER_BATCH = 8
"""As TRL has it; a step accumulates as many batches as it needs."""


class Clock(TrainerCallback):  # type: ignore[misc]
    """When each step ended, and its loss."""

    def __init__(self) -> None:
        self.step_ends: list[float] = []
        self.losses: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.step_ends.append(time.time())

    def on_log(self, _args: Any, _state: Any, _control: Any, logs: dict[str, float] | None = None, **__: Any) -> None:
        if logs and "loss" in logs:
            self.losses.append(float(logs["loss"]))


class Counter:
    """A collator that notes the real tokens and the targets of each batch; batches are taken in the order of steps."""

    def __init__(self, collator: Any) -> None:
        self.collator = collator
        self.batches: list[tuple[int, int]] = []

    def __call__(self, examples: Any) -> Any:
        targets = sum(sum(label != -100 for label in row["labels"][1:]) for row in examples)
        self.batches.append((sum(len(row["input_ids"]) for row in examples), targets))
        return self.collator(examples)

    def per_step(self, batches: int, steps: int) -> list[list[int]]:
        groups = [self.batches[step * batches : (step + 1) * batches] for step in range(steps)]
        return [[sum(batch[i] for batch in group) for group in groups] for i in (0, 1)]


def train(job: dict[str, Any]) -> dict[str, Any]:
    """RESULT.json of one job."""
    torch.set_num_threads(job["threads"])
    rows = json.loads(Path(job["rows"]).read_text("utf-8"))["train"]
    columns = {
        "input_ids": [row["ids"] for row in rows],
        "labels": [
            [token if is_target else -100 for token, is_target in zip(row["ids"], row["trained"], strict=True)]
            for row in rows
        ],
    }
    batches = -(-job["rows_per_step"] // ROWS_PER_BATCH)
    given: dict[str, Any] = {
        "output_dir": job["folder"],
        "seed": job["seed"],
        "num_train_epochs": 1,
        "learning_rate": job["lr"],
        "logging_steps": 1,
        "per_device_train_batch_size": min(ROWS_PER_BATCH, job["rows_per_step"]),
        "gradient_accumulation_steps": batches,
        "max_length": None,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": not torch.accelerator.is_available(),
    }
    adapter = LoraConfig(
        r=job["rank"], lora_alpha=job["alpha"], lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    counter = Counter(DataCollatorForLanguageModeling(pad_token_id=tokenizer.pad_token_id))
    clock = Clock()
    trainer = SFTTrainer(
        model=job["model"],
        args=SFTConfig(**{**given, **job["arguments"]}),
        train_dataset=Dataset.from_dict(columns),
        data_collator=counter,
        processing_class=tokenizer,
        peft_config=adapter if job["method"] == "lora" else None,
        callbacks=[clock],
    )
    trainer.train()
    result = str(Path(job["folder"]) / "result")
    trainer.save_model(result)
    tokens, targets = counter.per_step(batches, len(clock.step_ends))
    names = ("torch", "transformers", "trl", "peft", "accelerate")
    return {
        "step_ends": clock.step_ends,
        "tokens": tokens,
        "targets": targets,
        "losses": clock.losses,
        "result": result,
        "versions": {name: version(name).partition("+")[0] for name in names},
    }


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(train(json.loads(Path(sys.argv[1]).read_text("utf-8")))), "utf-8")
