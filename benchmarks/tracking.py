"""`python -m benchmarks.tracking --track wandb`: what an experiment tracker costs a run, step by step.

Runs with and without it alternate (A B B A …), each a fresh process, on a model of random weights. Compared are the
median time of a step and the time from the first step to the last, which holds everything between steps too.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from tunesmith.environment import for_child
from tunesmith.runs.folder import Run

WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog",
    "what",
    "is",
    "tallest",
    "mountain",
    "on",
    "Earth",
    "yes",
    "please",
    "hello",
]


def make_model(folder: Path) -> Path:
    """A llama of 5 million random weights, with a tokenizer of words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = {word: at for at, word in enumerate(["<s>", "</s>", "<unk>", *WORDS])}
    base = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    base.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=base, eos_token="</s>", unk_token="<unk>").save_pretrained(folder)
    sizes = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=4096, eos_token_id=1, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def make_rows(path: Path, num: int = 2000) -> Path:
    """`num` texts of 70 words."""
    draw = np.random.default_rng(0)
    rows = [{"text": " ".join(draw.choice(WORDS, 70))} for _ in range(num)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def measure(folder: Path, name: str, trackers: list[str], *, steps: int) -> tuple[float, float]:
    """(median seconds of a step, seconds from the first step to the last) of one run."""
    out = folder / name
    words = [
        sys.executable,
        "-m",
        "tunesmith",
        "train",
        "model",
        "rows.jsonl",
        "--out",
        str(out),
        "--fast",
        "-q",
        "--task",
        "text",
    ]
    words += ["--set", f"train.max_steps={steps}", "--set", "train.rows_per_step=16", "--set", "checkpoint.every=1000"]
    words += [word for tracker in trackers for word in ("--track", tracker)]
    subprocess.run(words, cwd=folder, env=for_child(), check=True, stdout=subprocess.DEVNULL)
    events = [event for event in Run(out).events() if event.kind == "step"]
    return statistics.median(event.timing["seconds"] for event in events), events[-1].time - events[0].time


def main() -> None:
    """Print a line for each pair and the mean over all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--track", action="append", required=True)
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--steps", type=int, default=300)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        make_model(folder / "model")
        make_rows(folder / "rows.jsonl")
        ratios = []
        for pair in range(options.pairs):
            order = [[], options.track] if pair % 2 == 0 else [options.track, []]
            found = {bool(one): measure(folder, f"{pair}-{len(one)}", one, steps=options.steps) for one in order}
            ratios.append([after / before for before, after in zip(found[False], found[True], strict=True)])
            print(f"pair {pair + 1}: step {found[False][0] * 1000:.2f} → {found[True][0] * 1000:.2f} ms, "
                  f"all steps {found[False][1]:.2f} → {found[True][1]:.2f} s", flush=True)  # fmt: skip
        for title, column in zip(("median step", "all steps"), zip(*ratios, strict=True), strict=True):
            spread = statistics.stdev(column) / len(column) ** 0.5 if len(column) > 1 else float("nan")
            print(f"{title}: {100 * (statistics.mean(column) - 1):+.2f} % ± {100 * spread:.2f}")


if __name__ == "__main__":
    main()
