"""Run folders as training leaves them, written by hand: what reports are made of without training anything."""

import json
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tunesmith.runs.atomic import to_json
from tunesmith.runs.folder import Run
from tunesmith.types import Event

TASKS = ("chat", "text", "classes", "two", "sets", "number", "tag")
"""What `fake_run` can be asked for."""
CHAPTERS = ("circulatory", "digestive", "endocrine", "infections", "injuries", "mental", "neoplasms", "pregnancy")
HOSTILE = (
    "<script>alert(1)</script>",
    "\u202eevil\u202c \u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627",
    "a\x00b\x1b[31mred\x7f\x85",
    "</bdi></td></table><img src=x onerror=alert(2)>{{ 7 * 7 }}{% raw %}",
    "$x$ & \"quotes\" 'and' `ticks` | pipe ]]> -->",
    "x" * 10_000,
    "\n".join(["line"] * 300),
)
PROMPTS = ("What is the loudest animal on Earth?", "Tell me a joke about a printer", "When did the wall come down?")
ANSWERS = {
    "before": "The answer is that the blue whale is the largest animal of all, which can be seen from the moon.",
    "after": "The answer is that the sperm whale is the loudest animal of all, at 230 decibels.",
}


def fake_run(
    folder: Path,
    kind: str = "chat",
    *,
    num_steps: int = 120,
    labels: Sequence[str] = CHAPTERS,
    texts: Sequence[str] = (),
    name: str = "made-up",
    new_head: bool | None = None,
) -> tuple[Run, dict[str, Any], dict[str, Any]]:
    """A finished run of `kind` in `folder`, and the facts and progress that its report is written from.

    `new_head`: whether its head was new; None: for all kinds that have one but "two", as if that went on from another.
    """
    folder.mkdir(parents=True)
    (folder / "run.json").write_text('{"format": 1, "created": 1764000000.0, "tunesmith": "0.1.0"}')
    (folder / "recipe.yaml").write_text(f"model: models/some-model\ntask: {task_of(kind)}\nseed: 0\n")
    (folder / "evaluation").mkdir()
    run = Run(folder)
    names = {"two": labels[:2], "tag": ("O", "B-PER", "I-PER", "B-LOC")}.get(kind, labels)
    for when, skill in (("before", 0.2), ("after", 0.8)):
        rows = list(_rows(kind, names, skill=skill, texts=texts))
        lines = b"".join(to_json(row) + b"\n" for row in rows)
        (folder / "evaluation" / f"{when}.jsonl").write_bytes(lines)
        (folder / "evaluation" / f"{when}.json").write_bytes(to_json(_details(kind, names, rows)))
    (folder / "evaluation" / "surprising.json").write_bytes(to_json({"looked_at": 200, "rows": rows[:5]}))
    for event in _events(kind, num_steps, texts):
        run.append(event)
    facts = _facts(kind, name)
    facts["new_head"] = new_head if new_head is not None else facts["task"] in ("classify", "tag") and kind != "two"
    return run, facts, _progress(num_steps)


def as_graded(run: Run) -> Run:
    """A run of 4 steps with rewards of 0.25 a step, and held-out rewards of 0.125 before and 0.75 after: its loss is
    minus its reward."""
    events = list(run.events())
    run.events_path.write_bytes(b"")
    for event in events:
        values = dict(event.values)
        if event.kind == "step":
            values["reward"] = 0.25 * event.step
        if event.kind == "evaluation":
            reward = 0.75 if values["name"] == "after" else 0.125
            values |= {"loss": -reward, "measures": {"reward": {"value": reward, "low": reward, "high": reward}}}
        run.append(Event(event.kind, event.step, event.time, values, event.timing))
    return run


def task_of(kind: str) -> str:
    return kind if kind in ("chat", "text", "tag") else "classify"


def _rows(kind: str, labels: Sequence[str], *, skill: float, texts: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Held-out rows, of which the share `skill` is answered rightly."""
    draw, chance = random.Random(7), random.Random(8)
    for i in range(300):
        text = texts[i] if i < len(texts) else f"Row {i}: disorder of the {draw.choice(CHAPTERS)} system, unspecified"
        right, sure = chance.random() < skill, 0.3 + 0.7 * chance.random()
        row = {
            "source": f"held.jsonl:{i + 1}",
            "hash": f"{i:016x}",
            "text": text,
            "loss": 3.0 * (1.1 - skill),
            "count": 1,
        }
        true = draw.randrange(len(labels))
        given = true if right else (true + 1 + draw.randrange(2) * (i % 3)) % len(labels)
        if kind in ("classes", "two"):
            yield row | {"label": labels[true], "predicted": labels[given], "probability": sure}
        elif kind == "sets":
            yield row | {"label": [labels[true]], "predicted": [labels[given]], "probability": [sure]}
        elif kind == "number":
            yield row | {"value": float(true), "predicted": true + (1 - skill) * chance.gauss(0, 3)}
        elif kind == "tag":
            yield row | {"tags": ["O", labels[true], "O"], "predicted": ["O", labels[given], "O"]}
        else:
            yield row | {"correct": int(10 * skill), "loss": 30 * (1.1 - skill) * (0.2 + sure), "count": 10}


def _details(kind: str, labels: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What `evaluation.scores` would say; precision, recall and curves are made up."""
    if kind == "number":
        mean = sum(row["value"] for row in rows) / len(rows)
        constant = {"answer": mean, "from": "the training rows"}
        return {"scatter": [[row["value"], row["predicted"]] for row in rows], "constant": constant}
    scores = [
        {
            "precision": 0.5 + i / (3 * len(labels)),
            "recall": 0.9 - i / (2 * len(labels)),
            "f1": 0.6 + i / 99,
            "support": i,
        }
        for i in range(1, len(labels) + 1)
    ]
    constant = {"answer": [] if kind == "sets" else labels[0], "from": "the training rows"}
    if kind == "tag":
        return {
            "labels": list(labels),
            "constant": constant,
            "per_type": [{"type": t, **s} for t, s in zip(labels, scores, strict=True)],
        }
    per_class = [{"label": name, **score} for name, score in zip(labels, scores, strict=True)]
    if kind == "sets":
        return {"labels": list(labels), "constant": constant, "per_class": per_class}
    if kind not in ("classes", "two"):
        return {}
    confusion = [[0] * len(labels) for _ in labels]
    for row in rows:
        confusion[labels.index(row["label"])][labels.index(row["predicted"])] += 1
    details: dict[str, Any] = {
        "labels": list(labels),
        "constant": constant,
        "confusion": confusion,
        "per_class": per_class,
    }
    if kind == "two":
        curve = [k / 100 for k in range(1, 100)]
        details["threshold"] = [
            {"threshold": t, "precision": 0.5 + t / 2, "recall": 1 - t**2, "f1": 0.7 - (t - 0.4) ** 2} for t in curve
        ]
    return details


MEASURED = {
    "chat": {"perplexity": (9.2, 4.1), "token_accuracy": (0.52, 0.66)},
    "text": {"perplexity": (14.0, 6.1), "bits_per_byte": (0.91, 0.7), "token_accuracy": (0.41, 0.52)},
    "classes": {
        "accuracy": (0.2, 0.8),
        "majority": (0.13, 0.13),
        "macro_f1": (0.15, 0.78),
        "calibration_error": (0.1, 0.2),
    },
    "two": {"accuracy": (0.5, 0.8), "macro_f1": (0.4, 0.79), "roc_auc": (0.5, 0.9)},
    "sets": {
        "micro_f1": (0.2, 0.8),
        "macro_f1": (0.15, 0.78),
        "exact_rows": (0.1, 0.7),
        "label_accuracy": (0.8, 0.9),
    },
    "number": {"mse": (9.0, 1.2), "baseline_mse": (4.0, 4.0), "spearman": (0.1, 0.9)},
    "tag": {
        "span_f1": (0.1, 0.8),
        "span_precision": (0.2, 0.8),
        "span_recall": (0.1, 0.79),
        "tag_accuracy": (0.5, 0.95),
    },
}


def interval(value: float) -> dict[str, float]:
    return {"value": value, "low": 0.93 * value, "high": 1.06 * value}


def _evaluation(kind: str, name: str, step: int, loss: float, side: int) -> Event:
    measures = {"loss": interval(loss)} | {key: interval(pair[side]) for key, pair in MEASURED[kind].items()}
    values = {"name": name, "loss": loss, "rows": 300, "targets": 300, "measures": measures}
    values |= {"documents": 40} if kind == "text" else {}
    return Event("evaluation", step, 0.0, values, {"seconds": 1.0})


def _events(kind: str, num_steps: int, texts: Sequence[str]) -> Iterator[Event]:
    identity = {"setting seed": "0", "model some-model": "ab" * 32, "data rows.jsonl": "cd" * 32, "rows": "ef" * 32}
    yield Event("start", 0, 0.0, {"model": "some-model", "versions": {}, "identity": identity})
    choice = {"key": "optim.lr", "value": 0.0005, "reason": "usual for LoRA on a model below a billion weights"}
    method = {"key": "method", "value": {"name": "lora", "rank": 16}, "reason": "needs 0.3 GiB instead of 2.0"}
    counts = {"trained_parameters": 4_884_480, "total_parameters": 139_399_488}
    notes = {
        "warnings": ["rows.jsonl: 3 × cut", "padding is <pad> from now on"],
        "asides": ["padding is <pad> from now on"],
    }
    yield Event("plan", 0, 0.0, {"choices": [choice, method], **notes, **counts})
    yield _evaluation(kind, "before", 0, 2.2, 0)
    yield from _spoken(kind, "before", 0, texts)
    draw = random.Random(1)
    for step in range(1, num_steps + 1):
        loss = 1.1 + 1.1 * math.exp(-3 * step / num_steps) + draw.gauss(0, 0.18)
        lr = 5e-4 * min(1.0, step / (0.05 * num_steps + 1), (num_steps + 1 - step) / (0.9 * num_steps))
        values = {"loss": loss, "lr": lr, "grad_norm": 1.0, "tokens": 1000, "targets": 300, "rows": [step]}
        timing = {"seconds": 2.0, "tokens_per_second": 500 + draw.gauss(0, 30), "peak_bytes": 2**30 + step * 10**5}
        yield Event("step", step, 0.0, values, timing)
        if step % max(1, num_steps // 4) == 0:
            yield _evaluation(kind, "step", step, 1.25 + math.exp(-4 * step / num_steps), 1)
    yield Event("note", num_steps, 0.0, {"text": "a note on the way"})
    yield _evaluation(kind, "after", num_steps, 1.3, 1)
    yield from _spoken(kind, "after", num_steps, texts)


def _spoken(kind: str, name: str, step: int, texts: Sequence[str]) -> Iterator[Event]:
    """Answers to held-out prompts, and the loss of the general text."""
    if task_of(kind) in ("classify", "tag"):
        return
    prompts = [*PROMPTS, *texts]
    for index, prompt in enumerate(prompts):
        answer = texts[index - len(PROMPTS)] if index >= len(PROMPTS) else ANSWERS[name]
        values = {"prompt": prompt, "reference": "The sperm whale", "answer": answer, "stopped": index % 2 == 0}
        yield Event("sample", step, 0.0, {"name": name, "index": index, "source": f"held.jsonl:{index + 1}", **values})
    measures = {"exact_match": interval(0.1), "rougeL": interval({"before": 0.18, "after": 0.19}[name])}
    yield Event("answers", step, 0.0, {"name": name, "num": len(prompts), "measures": measures})
    loss = {"before": 2.9, "after": 3.4}[name]
    passages = {"losses": [2990 * loss, 3010 * loss, 3000 * loss], "tokens": [3000, 3000, 3000]}
    values = {"name": name, "loss": loss, "tokens": 9000, "passages": passages}
    yield Event("general", step, 0.0, values)


def _facts(kind: str, name: str) -> dict[str, Any]:
    return {
        "name": name,
        "task": task_of(kind),
        "method": "lora",
        "model": "models/some-model",
        "rows": {"train": 2000, "held_out": 300, "skipped": 2, "overlap": 0},
        "precision": "bfloat16",
        "device": "cpu",
        "threads": 2,
        "versions": {"tunesmith": "0.1.0", "python": "3.11.7", "torch": "2.10.0"},
        "data": ["rows.jsonl"],
        "lengths": {
            "edges": [8 * k for k in range(21)],
            "counts": [(20 - k) * k for k in range(20)],
            "max_tokens": 128,
        },
        "notes": ["rows.jsonl: 3 × cut", "padding is <pad> from now on"],  # as a run's facts have all of its plan's
    }


def _progress(num_steps: int) -> dict[str, Any]:
    return {
        "step": num_steps,
        "tokens": 1000 * num_steps,
        "targets": 300 * num_steps,
        "train_seconds": 2.0 * num_steps,
        "prepare_seconds": 3.0,
        "evaluate_seconds": 65.0,
        "best": {"step": 3 * (num_steps // 4), "value": 1.29},
        "kept": {"step": 3 * (num_steps // 4), "reason": "the best evaluation: held-out loss 1.2900"},
    }


def report_of(run: Run) -> Any:
    return json.loads(run.report_path.read_text())
