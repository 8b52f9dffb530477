"""TRL's GRPOTrainer, for `python -m benchmarks reinforce`: the losses of answers that are given, or a run from the same
prompts. Run by itself:

python reinforce_trl.py JOB.json RESULT.json
"""

from __future__ import annotations

import importlib.util
import json
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from given_rows import run, versions
from peft import LoraConfig, PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer
from trl_steps import StepLog

LOSSES = {"tokens": "dapo", "answers": "grpo", "constant": "dr_grpo"}
"""Divisor → TRL's name of the loss that has it."""
CLIPS = {"clip": (0.2, 0.28), "sequence": (3e-4, 4e-4), "cispo": (0.2, 5.0)}


def main(job: dict[str, Any]) -> dict[str, Any]:
    torch.set_num_threads(job["threads"])
    found = _train(job) if job.get("beside") else _losses(job)
    return {**found, "versions": versions("torch", "transformers", "trl", "peft")}


def _arguments(job: dict[str, Any], **changes: Any) -> GRPOConfig:
    settings: dict[str, Any] = {
        "output_dir": str(Path(job["folder"]) / "trl"), "learning_rate": job["lr"], "lr_scheduler_type": "constant",
        "max_completion_length": job["max_new_tokens"], "num_generations": job["samples"], "temperature": 1.0,
        "beta": 0.0, "scale_rewards": "none", "loss_type": "dapo", "epsilon": 0.2, "epsilon_high": 0.28,
        "max_grad_norm": 1.0, "weight_decay": 0.0, "shuffle_dataset": False, "logging_steps": 1, "report_to": "none",
        "save_strategy": "no", "disable_tqdm": True, "use_cpu": True, "bf16": False, "gradient_checkpointing": False,
    }  # fmt: skip
    return GRPOConfig(**{**settings, **changes})


def _losses(job: dict[str, Any]) -> dict[str, Any]:
    """RESULT.json: {"settings": the loss of each}; gradients are in trl-N.safetensors."""
    folder = Path(job["folder"])
    given = json.loads((folder / "answers.json").read_text("utf-8"))
    tokenizer = AutoTokenizer.from_pretrained(given["base"])
    base = AutoModelForCausalLM.from_pretrained(given["base"], dtype=torch.float32)
    model = PeftModel.from_pretrained(base, folder / "adapter", is_trainable=True)
    answers = given["answers"]
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=_arguments(job, per_device_train_batch_size=len(answers), steps_per_generation=1),
        train_dataset=Dataset.from_list([{"prompt": "x"}] * len(answers)),
        processing_class=tokenizer,
    )
    inputs = _batch(answers, tokenizer.pad_token_id)
    trainer.current_gradient_accumulation_steps = 1
    found = []
    for number, setting in enumerate(job["settings"]):
        trainer.loss_type = "cispo" if setting["loss"] == "cispo" else LOSSES[setting["normalize"]]
        trainer.epsilon_low, trainer.epsilon_high = CLIPS[setting["loss"]]
        trainer.importance_sampling_level = "sequence" if setting["loss"] == "sequence" else "token"
        trainer.beta, trainer.max_completion_length = setting["kl"], job["max_new_tokens"]
        now = _logps(trainer, model, inputs)
        with_old = {"old_per_token_logps": now + inputs["moved"]} if setting["moved"] else {}
        with model.disable_adapter():
            reference = {"ref_per_token_logps": _logps(trainer, model, inputs)}
        model.train()
        model.zero_grad()
        loss = trainer._compute_loss(model, {**inputs, **with_old, **reference})
        loss.backward()
        grads = {
            name.removeprefix("base_model.model.").replace(".default", "").replace(".weight", ""): weight.grad.float()
            for name, weight in model.named_parameters()
            if weight.grad is not None
        }
        save_file({name: grad.contiguous() for name, grad in grads.items()}, folder / f"trl-{number}.safetensors")
        found.append({"loss": float(loss.detach())})
    return {"settings": found}


def _batch(answers: list[dict[str, Any]], pad: int) -> dict[str, torch.Tensor]:
    """Prompts padded on the left, answers on the right, as GRPOTrainer has them."""
    prompt, answer = (max(len(one[f"{part}_ids"]) for one in answers) for part in ("prompt", "completion"))
    shape = (len(answers), prompt), (len(answers), answer)
    prompt_ids, completion_ids = (torch.full(size, pad) for size in shape)
    prompt_mask, completion_mask = (torch.zeros(size, dtype=torch.int64) for size in shape)
    moved = torch.zeros(shape[1])
    for row, one in enumerate(answers):
        num = len(one["completion_ids"])
        prompt_ids[row, prompt - len(one["prompt_ids"]) :] = torch.tensor(one["prompt_ids"])
        prompt_mask[row, prompt - len(one["prompt_ids"]) :] = 1
        completion_ids[row, :num], completion_mask[row, :num] = torch.tensor(one["completion_ids"]), 1
        moved[row, :num] = torch.tensor(one["moved"])
    return {
        "prompt_ids": prompt_ids, "prompt_mask": prompt_mask, "completion_ids": completion_ids,
        "completion_mask": completion_mask, "moved": moved, "num_items_in_batch": completion_mask.sum(),
        "advantages": torch.tensor([one["advantage"] for one in answers], dtype=torch.float32),
    }  # fmt: skip


@torch.no_grad()
def _logps(trainer: GRPOTrainer, model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    ids, mask = (torch.cat([inputs[f"prompt_{what}"], inputs[f"completion_{what}"]], dim=1) for what in ("ids", "mask"))
    return trainer._get_per_token_logps_and_entropies(model, ids, mask, inputs["completion_ids"].shape[1])[0]


def _train(job: dict[str, Any]) -> dict[str, Any]:
    """RESULT.json: {"seconds" and "rewards" of each step, "adapter"}."""
    spec = importlib.util.spec_from_file_location("grader", job["grader"])
    assert spec is not None
    assert spec.loader is not None
    grader = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(grader)

    def reward(completions: list[Any], item: list[str], **_: Any) -> list[float]:
        texts = [answer[0]["content"].strip() for answer in completions]
        samples = [{"output_text": text} for text in texts]
        return [float(grader.grade(one, json.loads(row))) for one, row in zip(samples, item, strict=True)]

    rows = [row for step in job["order"] for row in step]
    tokenizer = AutoTokenizer.from_pretrained(job["base"])
    for row in rows:
        ids = tokenizer.apply_chat_template(row["messages"], add_generation_prompt=True, return_dict=False)
        if list(ids) != row["ids"]:
            raise ValueError(f"TRL would read other ids than ours: {row['messages']}")
    clock, of_step = StepLog("reward"), job["rows_per_step"] * job["samples"]
    begun = time.time()
    arguments = _arguments(
        job, per_device_train_batch_size=job["rows_per_pass"], max_steps=job["steps"], seed=job["seed"],
        gradient_accumulation_steps=of_step // job["rows_per_pass"],
    )  # fmt: skip
    dtype = getattr(torch, job["precision"])
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(job["base"], dtype=dtype),
        reward_funcs=reward,
        args=arguments,
        train_dataset=Dataset.from_list([{"prompt": row["messages"], "item": json.dumps(row["item"])} for row in rows]),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[clock],
    )
    trainer.train()
    adapter = str(Path(job["folder"]) / f"adapter-{job['name']}")
    trainer.model.save_pretrained(adapter)
    ends = clock.ends or [begun]
    seconds = [after - before for before, after in pairwise(ends)]
    return {"seconds": seconds, "rewards": clock.values, "adapter": adapter}


if __name__ == "__main__":
    run(main)
