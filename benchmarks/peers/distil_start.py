"""What all ways of `python -m benchmarks distil` begin with.

    python distil_start.py JOB.json RESULT.json

Makes the smaller copy of a model that learns, and the rows: with their own answers, or with one that the teacher draws
to each. A row whose answer does not end by itself is left out: learning its text would teach to break off.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from given_rows import run

if TYPE_CHECKING:
    from tunesmith.recipe.schema import Recipe

WAYS = ("sft", "off", "on")


def recipe_of(job: dict[str, Any], way: str) -> Recipe:
    """What is trained: one of `WAYS`."""
    from tunesmith.recipe.load import validate

    adapter = {"rank": 16, "alpha": 32} if job["method"] == "lora" else {}
    recipe: dict[str, Any] = {
        "model": job["student"], "method": {"name": job["method"], **adapter}, "precision": job["precision"],
        "device": "cpu", "threads": job["threads"], "seed": job["seed"],
        "data": {"train": [job["train"]], "eval": [job["eval"]]},
        "optim": {"lr": job["lr"], "schedule": "constant", "warmup": 0},
        "train": {"rows_per_step": job["rows_per_step"], "max_steps": job["steps"], "epochs": 99},
        # The judge measures all ways alike; a run measures few.
        "evaluation": {"samples": 0, "general": False, "every": None, "surprising": 0, "max_rows": 4},
    }  # fmt: skip
    if way == "sft":
        return validate({**recipe, "task": "chat"})
    drawn = {"on_policy": True, "max_new_tokens": job["max_new_tokens"]} if way == "on" else {}
    return validate({**recipe, "task": "distil", "distil": {"teacher": job["teacher"], **drawn}})


def smaller(model: str, num_layers: int, folder: Path) -> None:
    """Save a copy of a model with so many of its layers, evenly chosen, the first and the last among them."""
    import torch
    from torch import nn

    from tunesmith.models.load import load_model, load_tokenizer
    from tunesmith.models.modes import layers_of
    from tunesmith.models.resolve_model import resolve_model

    located = resolve_model(model, offline=True)
    whole: Any = load_model(located, dtype=torch.float32, device="cpu")
    layers = list(layers_of(whole))
    kept = sorted({round(i * (len(layers) - 1) / (num_layers - 1)) for i in range(num_layers)})
    whole.model.layers = nn.ModuleList(layers[i] for i in kept)
    for number, layer in enumerate(whole.model.layers):
        layer.self_attn.layer_idx = number
    whole.config.num_hidden_layers = len(kept)
    if getattr(whole.config, "layer_types", None):
        whole.config.layer_types = [whole.config.layer_types[i] for i in kept]
    whole.save_pretrained(folder)
    load_tokenizer(located, None).save_pretrained(folder)


def start(job: dict[str, Any]) -> dict[str, Any]:
    """RESULT.json: {"student", "train", "eval": files, "num": rows of these, "held": ids, trained, prompt and item of
    each held-out row}."""
    import torch

    from tunesmith.training.resolve import resolve_run
    from tunesmith.training.taught_answers import prompt_of

    torch.set_num_threads(job["threads"])
    folder = Path(job["folder"])
    student = job["model"]
    if job["layers"]:
        student = str(folder / "student")
        smaller(job["model"], job["layers"], Path(student))
    records = {side: _records(job[f"{side}_rows"], job[f"num_{side}"]) for side in ("train", "eval")}
    answers = _drawn(job, records) if job["answers"] == "teacher" else {}
    for side, of_side in answers.items():
        pairs = [(record, text) for record, text in zip(records[side], of_side, strict=True) if text]
        records[side] = [{**record, "answered": text} for record, text in pairs]
    files = {side: _write(folder / f"{side}.jsonl", records[side]) for side in records}
    known = {**job, **files, "student": student}
    rows = resolve_run(recipe_of(known, "sft"), root=folder / "start-runs", offline=True).rows
    held = []
    for i in range(len(rows.held_store)):  # not the few that a run measures
        row, line = rows.held_store.row(i), int(rows.held_store.lines[i])
        held.append({
            "ids": row.ids.tolist(), "trained": row.trained.tolist(), "prompt": prompt_of(row).tolist(),
            "item": records["eval"][line - 1],
        })  # fmt: skip
    return {**files, "student": student, "held": held, "num": {side: len(records[side]) for side in records}}


def _records(path: str, most: int) -> list[dict[str, Any]]:
    lines = Path(path).read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines if line.strip()][:most]


def _write(path: Path, records: Sequence[dict[str, Any]]) -> str:
    lines = [_answered(record, record["answered"]) if "answered" in record else record for record in records]
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), "utf-8")
    return str(path)


def _answered(record: dict[str, Any], answer: str) -> dict[str, Any]:
    """A row with this answer in place of its own."""
    asked = record.get("prompt") or list(record["messages"][:-1])
    turns = [{"role": "user", "content": asked}] if isinstance(asked, str) else asked
    return {"messages": [*turns, {"role": "assistant", "content": answer}]}


def _drawn(job: dict[str, Any], records: dict[str, list[dict[str, Any]]]) -> dict[str, list[str]]:
    """An answer of the teacher to each row, drawn at temperature 1; "" where it did not end, or is empty."""
    from tunesmith.data.formats.prompts import prompt_in
    from tunesmith.data.problems import RowProblems
    from tunesmith.generation.draws import Draw, draw_answers, drawing
    from tunesmith.inference.load import load_any
    from tunesmith.types import Source

    loaded = load_any(job["teacher"], root=Path("runs"), offline=True)
    how = Draw(renderer=loaded.renderer, num=1, temperature=1.0, max_new_tokens=job["max_new_tokens"], streams=32)
    texts, first = {}, 0
    with drawing(loaded.model) as decoder:
        for side, of_side in records.items():
            prompts = [prompt_in(record, RowProblems(Source("", 0))) for record in of_side]
            ids = [loaded.renderer.prompt_ids(tuple(turns), tools) for turns, _, tools in prompts]
            seeds = list(range(first, first + len(ids)))
            drawn = draw_answers(decoder, ids, seeds, how)
            texts[side] = [answer.text if answer.ended else "" for (answer,) in drawn]
            first += len(ids)
    return texts


if __name__ == "__main__":
    run(start)
