"""A run as its events tell it, written by hand: what displays are drawn from without training anything."""

from collections.abc import Iterator, Sequence
from typing import Any

from tunesmith.types import Event

STEPS = 12
CHOICES = (
    {"key": "task", "value": "chat", "reason": "rows are conversations (messages)"},
    {"key": "method", "value": {"name": "lora", "rank": 16, "alpha": 32.0}, "reason": "needs 0.3 GiB instead of 2.0"},
    {"key": "optim.lr", "value": 0.0005, "reason": "usual for LoRA on a model below a billion weights"},
)
SPANS = [["<|im_start|>user\nMy screen is flickering.<|im_end|>\n", False], ["Check the cable.<|im_end|>", True]]
PROMPTS = ("Tell me a joke", "What can you eat")
ANSWERS = {"before": "As an AI model I cannot do that, but", "after": "I consume RAM, and binary digits."}


def plan(**changes: Any) -> dict[str, Any]:
    values = {
        "model": "SmolLM2-135M-Instruct.gguf",
        "task": "chat",
        "method": "lora",
        "choices": list(CHOICES),
        "rows": {"train": 500, "held_out": 60, "skipped": 0},
        "tokens_per_epoch": 34_567,
        "longest_row": 301,
        "steps": STEPS,
        "trained_parameters": 4_884_480,
        "total_parameters": 139_399_488,
        "precision": "bfloat16",
        "device": "cpu",
        "sample": SPANS,
        "warnings": [],
    }
    return values | changes


def interval(value: float, margin: float = 0.05) -> dict[str, float]:
    return {"value": value, "low": value - margin, "high": value + margin}


def evaluation(name: str, step: int, loss: float, **more: dict[str, float]) -> Event:
    measures = {"loss": interval(loss), "token_accuracy": interval(0.7 - loss / 10), **more}
    values = {"name": name, "loss": loss, "rows": 60, "targets": 1234, "measures": measures}
    return Event("evaluation", step, 0.0, values, {"seconds": 1.0})


def answers(name: str, step: int, rouge: float) -> Event:
    return Event("answers", step, 0.0, {"name": name, "num": 8, "measures": {"rougeL": interval(rouge, 0.2)}})


def general(name: str, step: int, loss: float) -> Event:
    return Event("general", step, 0.0, {"name": name, "loss": loss, "tokens": 4321})


def step(number: int, loss: float) -> Event:
    values = {"loss": loss, "lr": 5e-4, "grad_norm": 1.0, "tokens": 1000, "targets": 300, "rows": [number]}
    return Event("step", number, 0.0, values, {"seconds": 2.0, "tokens_per_second": 500.0, "peak_bytes": 2**30})


def sample(name: str, index: int, *, prompt: str, answer: str) -> Event:
    values = {"name": name, "index": index, "prompt": prompt, "reference": "…", "answer": answer, "stopped": True}
    return Event("sample", STEPS if name == "after" else 0, 0.0, values)


HEADLINE = "On 60 rows it was not trained on, the loss fell."


def report() -> dict[str, Any]:
    """As much of a report as a display draws."""
    measured = {}
    for name, loss, rouge, text in (("before", 3.5, 0.2, 3.1), ("after", 2.25, 0.3, 3.2)):
        measures = dict(evaluation(name, 0, loss).values["measures"])
        measures |= {"rougeL": interval(rouge, 0.2), "general_loss": {"value": text}}
        measured[name] = {"rows": 60, "targets": 1234, "answers": 8, "measures": measures}
    changes = {
        "loss": {"value": -1.25, "low": -1.3, "high": -1.2, "is_clear": True},
        "token_accuracy": {"value": 0.125, "low": -0.01, "high": 0.26, "is_clear": False},
        "general_loss": {"value": 0.1, "low": 0.09, "high": 0.11, "is_clear": True},
    }
    return {"task": "chat", "metrics": measured, "changes": changes, "baseline": None, "headline": [HEADLINE]}


def whole_run(*, changes: dict[str, Any] | None = None, prompts: Sequence[str] = PROMPTS) -> Iterator[Event]:
    """start, plan, before, twelve steps with one evaluation and two checkpoints between, after, end."""
    yield Event("start", 0, 0.0, {"model": "SmolLM2-135M-Instruct.gguf", "versions": {}})
    yield Event("plan", 0, 0.0, plan(**(changes or {})))
    yield evaluation("before", 0, 3.5)
    for index, prompt in enumerate(prompts):
        yield sample("before", index, prompt=prompt, answer=ANSWERS["before"])
    yield answers("before", 0, 0.2)
    yield general("before", 0, 3.1)
    yield Event("checkpoint", 0, 0.0, {"path": "checkpoints/step-0"})
    for number in range(1, STEPS + 1):
        yield step(number, 3.5 - number / 10)
        if number == STEPS // 2:
            yield evaluation("step", number, 2.9)
            yield Event("note", number, 0.0, {"text": "a note on the way"})
    yield Event("checkpoint", STEPS, 0.0, {"path": f"checkpoints/step-{STEPS}"})
    yield evaluation("after", STEPS, 2.25)
    for index, prompt in enumerate(prompts):
        yield sample("after", index, prompt=prompt, answer=ANSWERS["after"])
    yield answers("after", STEPS, 0.3)
    yield general("after", STEPS, 3.2)
    yield Event("end", STEPS, 0.0, {"report": report()})
