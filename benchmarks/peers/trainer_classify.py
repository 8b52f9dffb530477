"""`transformers.Trainer` on a classification, as its documentation of text classification says. Run by itself:

    python trainer_classify.py JOB.json RESULT.json

JOB.json: the fields of `benchmarks.classify.Settings`, "seed", "folder" for what the Trainer saves, and "arguments":
whatever else goes to TrainingArguments. RESULT.json: "predicted" class of each test row in order, "begun" and
"step_ends" in seconds since the epoch, "step_rows", the rows of each step, and "facts": precision of the weights and
threads.
"""

from __future__ import annotations

import csv
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)


class Rows(Dataset[dict[str, Any]]):
    """Encoded rows without padding: the collator pads each batch to its longest row."""

    def __init__(self, path: str, tokenizer: Any, *, labels: list[str], max_tokens: int) -> None:
        rows = read(path)
        encoded = tokenizer([row["text"] for row in rows], truncation=True, max_length=max_tokens)
        self.rows = [
            {**{name: values[i] for name, values in encoded.items()}, "labels": labels.index(row["label"])}
            for i, row in enumerate(rows)
        ]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]


class Clock(TrainerCallback):  # type: ignore[misc]
    """When training began and when each step ended."""

    def __init__(self) -> None:
        self.begun = 0.0
        self.step_ends: list[float] = []

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.begun = time.time()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.step_ends.append(time.time())


def read(path: str) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def train(job: dict[str, Any]) -> dict[str, Any]:
    """RESULT.json of one job."""
    labels = sorted({row["label"] for row in read(job["train"])})
    set_seed(job["seed"])  # of the new head, which is drawn before the Trainer sets its seed
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    model = AutoModelForSequenceClassification.from_pretrained(
        job["model"],
        num_labels=len(labels),
        id2label=dict(enumerate(labels)),
        label2id={name: i for i, name in enumerate(labels)},
    )
    train_rows, test_rows = (
        Rows(job[name], tokenizer, labels=labels, max_tokens=job["max_tokens"]) for name in ("train", "eval")
    )
    arguments = TrainingArguments(
        output_dir=job["folder"],
        seed=job["seed"],
        per_device_train_batch_size=job["rows_per_step"],
        num_train_epochs=job["epochs"],
        learning_rate=job["lr"],
        warmup_steps=job["warmup"],
        weight_decay=job["weight_decay"],
        report_to="none",
        use_cpu=not torch.accelerator.is_available(),  # what happens anyway, but bf16 is refused without it
        **job["arguments"],
    )
    clock = Clock()
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=train_rows,
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
        callbacks=[clock],
    )
    trainer.train()
    trainer.save_model()
    arguments.train_sampling_strategy = "random"  # by length it would answer test rows in an order of their lengths
    answered = trainer.predict(test_rows)
    if answered.label_ids.tolist() != [row["labels"] for row in test_rows.rows]:
        raise ValueError("the Trainer answered the test rows in another order than the file's")
    epoch = [min(job["rows_per_step"], len(train_rows) - i) for i in range(0, len(train_rows), job["rows_per_step"])]
    return {
        "predicted": [labels[i] for i in answered.predictions.argmax(-1).tolist()],  # [I, C]
        "begun": clock.begun,
        "step_ends": clock.step_ends,
        "facts": {"precision": str(model.dtype).removeprefix("torch."), "threads": torch.get_num_threads()},
        "step_rows": (epoch * math.ceil(job["epochs"]))[: len(clock.step_ends)],
    }


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(train(json.loads(Path(sys.argv[1]).read_text("utf-8")))), "utf-8")
