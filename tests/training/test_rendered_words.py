"""SmolLM2 with a random tower and projector grafted on reads words that are drawn in fonts."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from benchmarks.grafted import SIZE, graft
from matplotlib import get_data_path
from PIL import Image, ImageDraw, ImageFont

from tunesmith.inference.load import load_run
from tunesmith.inference.measure import evaluate_file
from tunesmith.recipe.load import validate
from tunesmith.training.trainer import train

MODEL = Path(os.environ.get("TUNESMITH_SMOLLM2_GGUF", Path(__file__).parents[2] / "models/SmolLM2-135M-Instruct.gguf"))
"""`python scripts/get_model.py smollm2` fetches it."""
WORDS = ("house", "river", "green", "seven", "bread", "cloud", "music", "horse",
         "table", "light", "paper", "stone", "water", "night", "fruit", "sugar")  # fmt: skip
FONTS = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSansMono", "STIXGeneralBol")
TRAINED, HELD = 20, 3
"""Pictures of each word, each in a font and at a place of its own."""


def drawn(word: str, seed: int) -> Image.Image:
    """A word, black on white, in a font and at a place that follow from the seed."""
    draw = np.random.default_rng([seed, *word.encode()])
    file = Path(get_data_path()) / "fonts" / "ttf" / f"{FONTS[draw.integers(len(FONTS))]}.ttf"
    font = ImageFont.truetype(str(file), 16)
    picture = Image.new("RGB", (SIZE, SIZE), "white")
    left, top = draw.integers(1, 7), draw.integers(18, 27)
    ImageDraw.Draw(picture).text((int(left), int(top)), word, fill="black", font=font)
    return picture


def rows(folder: Path, name: str, seeds: range) -> Path:
    lines = []
    for word in WORDS:
        for seed in seeds:
            drawn(word, seed).save(folder / f"{word}-{seed}.png")
            shown = {"images": [f"{word}-{seed}.png"], "prompt": "<image>Which word is it?", "completion": word}
            lines.append(json.dumps(shown) + "\n")
    (folder / f"{name}.jsonl").write_text("".join(lines), "utf-8")
    return folder / f"{name}.jsonl"


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(not MODEL.exists(), reason="no model: python scripts/get_model.py smollm2")
def test_words_are_read_back(tmp_path: Path) -> None:
    """The tower stays random: adapters on the language part and the projector learn what it shows. Chance is one in
    sixteen; about ten minutes on one thread."""
    held = rows(tmp_path, "held", range(TRAINED, TRAINED + HELD))
    recipe: dict[str, Any] = {
        "model": str(graft(str(MODEL), tmp_path / "grafted", "words")),
        "task": "chat",
        "method": {"name": "lora", "also_train": ["projector"]},
        "data": {"train": [str(rows(tmp_path, "train", range(TRAINED)))], "eval": [str(held)]},
        "optim": {"lr": 1e-3},
        "train": {"epochs": 10, "rows_per_step": 16},
        "evaluation": {"samples": 0, "general": False, "surprising": 0},
        "checkpoint": {"every": 10_000},
        "threads": 1,
    }
    run = train(validate(recipe), root=tmp_path / "runs", offline=True)
    result = evaluate_file(load_run(run, offline=True), str(held), samples=len(WORDS) * HELD)
    share = result.measures["exact_match"]["value"]
    print(f"{share:.1%} of {len(WORDS) * HELD} words")
    assert share >= 0.8
