"""Handwritten digits as chats: a model from scratch learns to read them, and reads nothing of permuted images."""

import base64
import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

import fresh
from tiny_vision import png, vision_folder
from tunesmith.inference import load as loading
from tunesmith.inference.measure import evaluate_file
from tunesmith.inference.predict import Predictor, predict_file
from tunesmith.models import image_features
from tunesmith.recipe.load import validate
from tunesmith.runs.folder import Run
from tunesmith.training.trainer import train

datasets = pytest.importorskip("sklearn.datasets")
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
HELD = 297


def digit_rows(folder: Path, *, permuted: bool) -> tuple[Path, Path]:
    """Training rows and held-out rows, each with a picture of 16 × 16 pixels. `permuted`: of another row."""
    images_IHW, digits_I = datasets.load_digits(return_X_y=True)
    images_IHW = images_IHW.reshape(-1, 8, 8)
    order = np.random.default_rng(0).permutation(len(digits_I)) if permuted else np.arange(len(digits_I))
    files = []
    for name, some in (("train", slice(HELD, None)), ("held", slice(0, HELD))):
        lines = []
        for i in range(len(digits_I))[some]:
            grey = (images_IHW[order[i]] * 15.9).astype(np.uint8)
            (folder / f"{i}.png").write_bytes(png(Image.fromarray(grey.repeat(2, 0).repeat(2, 1))))
            lines.append({"images": [f"{i}.png"], "prompt": "<image>Which digit?", "completion": WORDS[digits_I[i]]})
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
        files.append(folder / f"{name}.jsonl")
    return files[0], files[1]


def trained(folder: Path, *, steps: int, permuted: bool = False) -> Run:
    """A run that trains all of a small LLaVA, whose weights are random."""
    rows, held = digit_rows(folder, permuted=permuted)
    model = vision_folder(folder / "model", "llava")
    torch.manual_seed(0)
    fresh_model = AutoModelForImageTextToText.from_config(AutoModelForImageTextToText.from_pretrained(model).config)
    fresh_model.save_pretrained(model)
    recipe: dict[str, Any] = {
        "model": str(model),
        "task": "chat",
        "method": {"name": "full", "train": ["language", "projector", "vision"]},
        "data": {"train": [str(rows)], "eval": [str(held)]},
        "optim": {"lr": 3e-3, "warmup": 0.1},
        "train": {"epochs": 100, "max_steps": steps, "rows_per_step": 32, "tokens_per_pass": 4096},
        "evaluation": {"samples": 0, "general": False, "surprising": 0},
        "checkpoint": {"every": 10_000},
        "precision": "float32",
        "device": "cpu",
        "threads": 1,
    }
    return train(validate(recipe), root=folder / "runs", offline=True)


def share_right(run: Run, folder: Path) -> float:
    """The share of held-out digits that a run reads, as `eval` counts them."""
    result = evaluate_file(loading.load_run(run, offline=True), str(folder / "held.jsonl"), samples=HELD)
    return float(result.measures["exact_match"]["value"])


def predicted(run: Run, folder: Path) -> tuple[list[str], list[str]]:
    """The answers of `predict`, and what the rows have."""
    lines: list[Any] = []
    loaded = loading.load_run(run, offline=True)
    predict_file(Predictor(loaded, max_new_tokens=8), str(folder / "held.jsonl"), lines.extend)
    return [line["messages"][-1]["content"] for line in lines], [line["reference"] for line in lines]


def served(run: Run, folder: Path) -> list[str]:
    """The answers of `tunesmith serve` to the openai package, which sends each picture as a data URI."""
    words = ["-m", "tunesmith", "serve", str(run.path), "--port", "0", "--quiet", "--threads", "1", "--offline"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "FRESH_PYTHON": str(fresh.python())}
    process = fresh.Process(*words, env=environment)
    assert process.stdout is not None
    try:
        url = process.stdout.readline().strip()
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        answers = []
        for number in range(HELD):
            content = base64.b64encode((folder / f"{number}.png").read_bytes()).decode()
            shown = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{content}"}}
            asked: Any = {"role": "user", "content": [shown, {"type": "text", "text": "Which digit?"}]}
            answer = client.chat.completions.create(model=run.path.name, messages=[asked], temperature=0, max_tokens=8)
            answers.append(str(answer.choices[0].message.content))
        return answers
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


@pytest.mark.slow
def test_digits_are_read_by_every_command(tmp_path: Path) -> None:
    """By `eval`, by `predict` and by `serve`, whose answers are `predict`'s."""
    run = trained(tmp_path, steps=900)
    assert share_right(run, tmp_path) >= 0.95
    answers, references = predicted(run, tmp_path)
    assert np.mean([answer == reference for answer, reference in zip(answers, references, strict=True)]) >= 0.95
    assert served(run, tmp_path) == answers


@pytest.mark.slow
@pytest.mark.parametrize("bug", ["permuted images", "vectors of the row before"])
def test_images_of_other_rows_teach_nothing(bug: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chance is a tenth: a model that read anything but its own row's image would show it here."""
    if bug == "vectors of the row before":
        theirs = image_features._look
        monkeypatch.setattr(image_features, "_look", lambda *args: (seen := theirs(*args))[-1:] + seen[:-1])
    run = trained(tmp_path, steps=200, permuted=bug == "permuted images")
    assert share_right(run, tmp_path) <= 0.2
