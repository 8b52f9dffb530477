"""The whole method in one flat file: LoRA on a chat model, no abstraction of Tunesmith's, nothing hidden.

A test holds the losses of this file equal to `tunesmith.training_steps`. Read it to know what the tool does;
change it to try an idea.

    python examples/flat_loop.py MODEL_FOLDER train.jsonl
"""

import json
import math
import sys

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

RANK, ALPHA, LR, WARMUP, CLIP, ROWS_PER_STEP, SEED = 16, 32.0, 5e-4, 0.05, 1.0, 4, 0


class Lora(nn.Module):
    """y = W x + (alpha / rank) B A x, with W frozen (Hu et al. 2021, arXiv:2106.09685, section 4.1)."""

    def __init__(self, base: nn.Linear, a: torch.Tensor) -> None:
        super().__init__()
        self.base = base
        self.a = nn.Parameter(a)
        self.b = nn.Parameter(torch.zeros(base.out_features, RANK))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + ALPHA / RANK * (x @ self.a.T) @ self.b.T


def encode(tokenizer, row):
    """Ids of a conversation, and which of them the assistant wrote, end of turn included."""
    messages = row["messages"]
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    encoded = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
    trained = [False] * len(encoded["input_ids"])
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        start = len(tokenizer.apply_chat_template(messages[:i], tokenize=False, add_generation_prompt=True))
        end = len(tokenizer.apply_chat_template(messages[: i + 1], tokenize=False).rstrip())
        for t, (a, b) in enumerate(encoded["offset_mapping"]):
            trained[t] |= start <= a and b <= end
    return encoded["input_ids"], trained


def lr_at(step, total):
    """Warm-up to the peak at step W, then down a line that would meet zero at the step after the last."""
    warmup = math.floor(WARMUP * total + 0.5)
    return LR * step / warmup if step <= warmup else LR * (1 - (step - 1 - warmup) / (total - warmup))


def loss_of(model, ids, trained):
    """Sum of -log p over the trained tokens of one row; position t predicts token t + 1."""
    logits = model(input_ids=torch.tensor([ids])).logits[0, :-1].float()
    targets = torch.tensor([token if is_trained else -100 for token, is_trained in zip(ids, trained, strict=True)][1:])
    return F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum")


def adapt(model, make_a):
    """LoRA on every linear layer of the decoder; `make_a(name, in_features)` gives the first A."""
    model.requires_grad_(False)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and ".layers." in name:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, Lora(module, make_a(name, module.in_features)))
    return [p for p in model.parameters() if p.requires_grad]


def train(model, parameters, rows, order, total):
    """Yields the loss of each step, nats per target; `order(step)` names the rows of a step."""
    optimizer = torch.optim.AdamW(parameters, lr=LR, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    for step in range(1, total + 1):
        chosen = [rows[i] for i in order(step)]
        num_targets = sum(sum(trained[1:]) for _, trained in chosen)
        loss_sum = sum(loss_of(model, ids, trained) for ids, trained in chosen)
        (loss_sum / num_targets).backward()
        nn.utils.clip_grad_norm_(parameters, CLIP)
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, total)
        optimizer.step()
        optimizer.zero_grad()
        yield float(loss_sum.detach()) / num_targets


def main(folder, file):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with open(file, encoding="utf-8") as lines:
        rows = [encode(tokenizer, json.loads(line)) for line in lines]
    torch.manual_seed(SEED)
    bound = math.sqrt(3)
    parameters = adapt(model, lambda name, n: torch.empty(RANK, n).uniform_(-bound, bound) / math.sqrt(3 * n))
    shuffled = torch.randperm(len(rows)).tolist()
    total = math.ceil(len(rows) / ROWS_PER_STEP)
    for step, loss in enumerate(
        train(model, parameters, rows, lambda s: shuffled[(s - 1) * ROWS_PER_STEP : s * ROWS_PER_STEP], total), 1
    ):
        print(f"step {step:4d} of {total}   loss {loss:.4f}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
