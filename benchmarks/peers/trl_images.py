"""TRL's SFTTrainer on prompts with images and their completions, in the order given. Run by itself:

python trl_images.py JOB.json RESULT.json
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, Features, Image, Value
from given_rows import run, versions
from torch.utils.data import SequentialSampler
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import SFTConfig, SFTTrainer
from trl_steps import StepLog

MARKER = "<image>"


class InOrder(SFTTrainer):  # type: ignore[misc]
    """The order of the rows is that of the file."""

    def _get_train_sampler(self, *_: Any) -> Any:
        return SequentialSampler(self.train_dataset)


def train(job: dict[str, Any]) -> dict[str, Any]:
    """RESULT.json: {"losses" of each step, "versions"}."""
    torch.set_num_threads(job["threads"])
    processor = AutoProcessor.from_pretrained(job["model"])
    lines = Path(job["rows"]).read_text("utf-8").splitlines()
    rows = [_row(json.loads(lines[line - 1]), Path(job["rows"]).parent, processor) for line in job["order"]]
    columns = {"images": [Image()], "prompt": Value("string"), "completion": Value("string")}
    dataset = Dataset.from_list(rows, features=Features(columns))
    notes = StepLog("loss")
    arguments = SFTConfig(
        output_dir=str(Path(job["folder"]) / "trl"), learning_rate=job["lr"], lr_scheduler_type="constant",
        per_device_train_batch_size=job["rows_per_step"], max_steps=job["steps"], max_length=None, max_grad_norm=1.0,
        logging_steps=1, logging_first_step=True, weight_decay=0.0, save_strategy="no", report_to="none",
        disable_tqdm=True, use_cpu=True, bf16=False, gradient_checkpointing=False, completion_only_loss=True,
    )  # fmt: skip
    trainer = InOrder(
        model=AutoModelForImageTextToText.from_pretrained(job["model"], dtype=torch.float32),
        args=arguments,
        train_dataset=dataset,
        processing_class=processor,
        callbacks=[notes],
    )
    _refuse_other_ids(trainer, dataset, job)
    trainer.train()
    return {"losses": notes.values, "versions": versions("torch", "transformers", "trl")}


def _row(row: dict[str, Any], folder: Path, processor: Any) -> dict[str, Any]:
    """A prompt with its image before the text, rendered, and a completion with the token that closes it."""
    text = row["prompt"].replace(MARKER, "")
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}
    return {
        "images": [{"path": None, "bytes": (folder / name).read_bytes()} for name in row["images"]],
        "prompt": processor.apply_chat_template([message], add_generation_prompt=True, tokenize=False),
        "completion": row["completion"] + processor.tokenizer.eos_token,
    }


def _refuse_other_ids(trainer: SFTTrainer, dataset: Any, job: dict[str, Any]) -> None:
    """Raise ValueError where TRL would train on other tokens than ours, which would compare nothing."""
    for row, line in zip(dataset, job["order"], strict=True):
        batch = trainer.data_collator([dict(row)])
        found = batch["input_ids"][0][batch["attention_mask"][0] == 1].tolist()
        if found != job["ids"][str(line)]:
            raise ValueError(f"line {line}: TRL reads {found}, ours {job['ids'][str(line)]}")


if __name__ == "__main__":
    run(train)
