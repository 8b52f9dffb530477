"""`python -m benchmarks.tracking --track wandb`: what an experiment tracker costs a run, step by step.

Runs with and without it alternate (A B B A …), each a fresh process, on a model of random weights. Compared are the
median time of a step and the time from the first step to the last, which holds everything between steps too.
`--share` measures the tracker's own processes instead, while ten steps a second are written.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil

from tunesmith.environment.children import for_child
from tunesmith.runs.folder import Run
from tunesmith.trackers.sender import tracked
from tunesmith.types import Event

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "what", "is", "tallest", "mountain", "on",
         "Earth", "yes", "please", "hello"]  # fmt: skip


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
    words = [sys.executable, "-m", "tunesmith", "train", "model", "rows.jsonl", "--out", str(out), "--fast", "-q"]
    words += ["--task", "text", "--set", f"train.max_steps={steps}", "--set", "train.rows_per_step=16"]
    words += ["--set", "checkpoint.every=1000"]
    words += [word for tracker in trackers for word in ("--track", tracker)]
    subprocess.run(words, cwd=folder, env=for_child(), check=True, stdout=subprocess.DEVNULL)
    events = [event for event in Run(out).events() if event.kind == "step"]
    return statistics.median(event.timing["seconds"] for event in events), events[-1].time - events[0].time


def processor_share(folder: Path, name: str, *, rate: float = 10.0, seconds: float = 60.0) -> tuple[float, float]:
    """(share of one core that a tracker's processes take, seconds of it to start) while a run writes `rate` steps/s."""
    run = Run.create(folder, f"written-{name}", "model: ./model\n")
    with tracked([name], offline=True, say=lambda is_sent, line: None, wait_s=60) as begin:
        begin(run)
        return _share_while_written(run, rate, seconds)


def _share_while_written(run: Run, rate: float, seconds: float) -> tuple[float, float]:
    begun, sender = time.monotonic(), next(one for one in psutil.Process().children() if one.is_running())
    run.append(Event("start", 0, time.time(), {"model": "./model", "versions": {}, "identity": {}}, {}))
    used, after_start = [], 10.0
    for step in range(1, int(rate * (seconds + after_start)) + 1):
        values = {"loss": 2 + 1 / step, "lr": 1e-4 / step, "grad_norm": 1 + 1 / step, "tokens": 1000 + step}
        run.append(Event("step", step, time.time(), values, {"seconds": 1 / rate, "peak_bytes": 10**9}))
        if step in (int(rate * after_start), int(rate * (seconds + after_start))):
            used.append((processor_seconds(sender), time.monotonic()))
        time.sleep(max(0.0, begun + step / rate - time.monotonic()))
    run.append(Event("end", step, time.time(), {}, {}))
    (start, begun), (end, ended) = used
    return (end - start) / (ended - begun), start


def processor_seconds(first: psutil.Process) -> float:
    """Seconds of processor that a process and those it started have taken."""
    return sum(sum(one.cpu_times()[:2]) for one in [first, *first.children(recursive=True)])


def main() -> None:
    """Print a line for each pair and the mean over all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--track", action="append", required=True)
    parser.add_argument("--share", action="store_true", help="only the share of one core, at ten steps a second")
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--steps", type=int, default=300)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        if options.share:
            os.environ |= {"MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db", "WANDB_DIR": place}
            for name in options.track:
                share, start = processor_share(folder, name)
                print(f"{name}: {100 * share:.2f} % of one core, {start:.1f} s of it to start", flush=True)
            return
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
