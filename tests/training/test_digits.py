"""Handwritten digits as chats: a model from scratch learns to read them, and reads nothing of permuted images."""

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

from serve.batches import Heard
from tiny_vision import png, vision_folder
from tunesmith.inference import load as loading
from tunesmith.inference.measure import evaluate_file
from tunesmith.inference.predict import Predictor, predict_file
from tunesmith.recipe.load import validate
from tunesmith.serve.protocol import EngineOptions, GenerationRequest
from tunesmith.serve.registry import LocalEngine
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


def accuracy(folder: Path, *, permuted: bool, steps: int) -> tuple[Any, float]:
    """A trained run, and the share of held-out digits that it reads, as `eval` counts them."""
    trained, held = digit_rows(folder, permuted=permuted)
    model = vision_folder(folder / "model", "llava")
    torch.manual_seed(0)
    fresh = AutoModelForImageTextToText.from_config(AutoModelForImageTextToText.from_pretrained(model).config)
    fresh.save_pretrained(model)
    recipe: dict[str, Any] = {
        "model": str(model),
        "task": "chat",
        "method": {"name": "full", "train": ["language", "projector", "vision"]},
        "data": {"train": [str(trained)], "eval": [str(held)]},
        "optim": {"lr": 3e-3, "warmup": 0.1},
        "train": {"epochs": 100, "max_steps": steps, "rows_per_step": 32, "tokens_per_pass": 4096},
        "evaluation": {"samples": 0, "general": False, "surprising": 0},
        "checkpoint": {"every": 10_000},
        "precision": "float32",
        "device": "cpu",
        "threads": 1,
    }
    run = train(validate(recipe), root=folder / "runs", offline=True)
    result = evaluate_file(loading.load_run(run, offline=True), str(held), samples=HELD)
    return run, result.measures["exact_match"]["value"]


@pytest.mark.slow
def test_digits_are_read_from_their_images(tmp_path: Path) -> None:
    """By `eval`, by `predict`, and by what `chat` and `serve` ask; the three answer alike."""
    run, share = accuracy(tmp_path, permuted=False, steps=900)
    assert share >= 0.95
    loaded = loading.load_run(run, offline=True)
    lines: list[Any] = []
    predict_file(Predictor(loaded, max_new_tokens=8), str(tmp_path / "held.jsonl"), lines.extend)
    answers = [line["messages"][-1]["content"] for line in lines]
    assert np.mean([answer == line["reference"] for answer, line in zip(answers, lines, strict=True)]) >= 0.95

    engine = LocalEngine(loaded, lambda text: None)
    for number in range(20):
        heard = Heard()
        shown = [(0, 0, base64.b64encode((tmp_path / f"{number}.png").read_bytes()).decode())]
        asked = ({"role": "user", "content": "Which digit?"},)
        request = GenerationRequest("", messages=asked, images=shown, temperature=0.0)
        for told in engine.generate(request, EngineOptions(max_new_tokens=8, streams=1)):
            heard.hear(told)
        assert heard.answer().text == answers[number]


@pytest.mark.slow
def test_permuted_images_teach_nothing(tmp_path: Path) -> None:
    """The same run, with the images of other rows: chance is a tenth."""
    _, share = accuracy(tmp_path, permuted=True, steps=200)
    assert share <= 0.2
