"""`python -m benchmarks planning`: what a plan predicts beside what the same run then takes, over a grid of runs.

Every case is two fresh processes: one predicts and probes as `tunesmith plan` does; the other predicts, loads, takes a
few steps, measures held-out rows, and reports its peak.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.measured import machine, run_child, versions
from tunesmith.environment.settings import prepare_environment

SPREAD, PROBE_SPREAD = 0.5, 0.3
"""Of `tunesmith.planning.forecast` and `tunesmith.training.probe`, which import torch."""

PEER = Path(__file__).parent / "peers" / "plan_peer.py"
STEPS = 4
Shape = tuple[str, int, int, int, int, int, int]
SHAPES: dict[str, Shape] = {
    # architecture, hidden, layers, heads, heads of keys, inner width, vocabulary
    "llama 5M": ("llama", 256, 6, 4, 2, 768, 4096),
    "gpt2 35M": ("gpt2", 512, 6, 8, 8, 2048, 32000),
    "mistral 60M": ("mistral", 512, 8, 8, 2, 1536, 49152),
    "llama 135M": ("llama", 576, 30, 9, 3, 1536, 49152),
    "mistral 350M": ("mistral", 960, 24, 15, 5, 2560, 65536),
    "llama 1B": ("llama", 2048, 16, 32, 8, 8192, 49152),
    "bert 30M": ("bert", 384, 12, 12, 12, 1536, 30522),
}
"""Random weights of these shapes."""


@dataclass(frozen=True, slots=True)
class Case:
    """One run."""

    model: str
    """A shape, or smollm2 or minilm: the real models of --smollm2 and --minilm."""
    method: str
    precision: str
    length: int
    """Tokens of a row, about."""
    tokens: int
    """In a pass."""
    layers: str = "none"
    """Which are recomputed: none, half or all."""
    task: str = "generate"


CASES = (
    Case("llama 5M", "full", "float32", 64, 1024),
    Case("llama 5M", "full", "bfloat16", 512, 4096),
    Case("llama 5M", "lora", "float32", 2048, 4096, "all"),
    Case("gpt2 35M", "full", "float32", 128, 1024),
    Case("gpt2 35M", "full", "bfloat16", 1024, 2048, "half"),
    Case("gpt2 35M", "lora", "bfloat16", 512, 2048),
    Case("mistral 60M", "full", "bfloat16", 256, 2048),
    Case("mistral 60M", "lora", "float32", 512, 1024, "all"),
    Case("mistral 60M", "dora", "bfloat16", 128, 2048),
    Case("llama 135M", "full", "bfloat16", 64, 1024),
    Case("llama 135M", "full", "bfloat16", 512, 2048, "half"),
    Case("llama 135M", "full", "float32", 256, 512, "all"),
    Case("llama 135M", "lora", "bfloat16", 256, 2048),
    Case("llama 135M", "lora", "bfloat16", 4096, 4096, "all"),
    Case("llama 135M", "dora", "bfloat16", 1024, 1024, "half"),
    Case("mistral 350M", "full", "bfloat16", 512, 512),
    Case("mistral 350M", "lora", "bfloat16", 2048, 2048, "half"),
    Case("mistral 350M", "dora", "bfloat16", 256, 512, "all"),
    Case("llama 1B", "lora", "bfloat16", 512, 512),
    Case("llama 1B", "lora", "bfloat16", 1024, 1024, "all"),
    Case("bert 30M", "full", "float32", 128, 1024, task="text"),
    Case("bert 30M", "full", "bfloat16", 256, 2048, task="text"),
    Case("bert 30M", "full", "float32", 64, 1024, "half", task="text"),
    Case("smollm2", "lora", "bfloat16", 256, 1024),
    Case("smollm2", "full", "bfloat16", 512, 1024, "all"),
    Case("smollm2", "dora", "bfloat16", 64, 512),
    Case("smollm2", "qlora", "bfloat16", 128, 1024),
    Case("mistral 350M", "qlora", "bfloat16", 512, 1024, "half"),
    Case("minilm", "full", "float32", 64, 1024, task="classify"),
    Case("minilm", "lora", "float32", 128, 1024, task="classify"),
)


def add_parser(verbs: Any) -> None:
    """The verb's own words."""
    parser = verbs.add_parser("planning", help="what a plan predicts beside what a run takes")
    parser.add_argument("--smollm2", help="GGUF file or folder of SmolLM2-135M-Instruct")
    parser.add_argument("--minilm", help="folder of all-MiniLM-L6-v2")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--memory-only", action="store_true", help="no seconds in the table: the machine has other work"
    )
    parser.add_argument("--only", type=int, nargs="*", help="numbers of cases, from 1")
    parser.add_argument("--results", type=Path, help="JSON lines, one a case: what is there is not run again")
    parser.add_argument("--folder", help="keep models and rows here")
    parser.add_argument("--out", type=Path, help="write the table here too")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, words: Sequence[str]) -> int:
    """0: every case ran; 1: one failed."""
    prepare_environment(os.environ)  # as the command line does for its runs
    results: dict[str, dict[str, Any]] = {}
    if options.results and options.results.exists():
        lines = options.results.read_text("utf-8").splitlines()
        results = {str(found["case"]): found for found in map(json.loads, lines)}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(options.folder or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for number, case in enumerate(CASES, start=1):
            real = {"smollm2": options.smollm2, "minilm": options.minilm}.get(case.model, "")
            if real is None or (options.only and number not in options.only) or str(number) in results:
                continue
            found = measure(case, folder, threads=options.threads, real=real)
            results[str(number)] = {"case": number, **asdict(case), **found}
            print(json.dumps(results[str(number)]), file=sys.stderr, flush=True)
            if options.results:
                with open(options.results, "a", encoding="utf-8") as file:
                    file.write(json.dumps(results[str(number)]) + "\n")
    page = markdown([results[key] for key in sorted(results, key=int)], memory_only=options.memory_only)
    print(page)
    if options.out:
        options.out.write_text(page, "utf-8")
    return int(any("error" in found for found in results.values()))


def measure(case: Case, folder: Path, *, threads: int, real: str) -> dict[str, Any]:
    """The case in a process of its own: predicted and measured bytes and seconds, or why it failed."""
    data = folder / f"{case.task}-{case.length}.jsonl"
    if not data.exists():
        data.write_text("".join(json.dumps(row) + "\n" for row in rows(case)), "utf-8")
    spec = {**asdict(case), "shape": SHAPES.get(case.model), "real": real, "data": str(data), "threads": threads}
    (folder / "spec.json").write_text(json.dumps({**spec, "steps": STEPS, "folder": str(folder)}), "utf-8")
    words = [sys.executable, str(PEER), str(folder / "spec.json")]
    run_child(words, log=folder / "log")  # makes the model, whose memory is none of the run's
    found: dict[str, Any] = {}
    for what in ("probe", "run"):
        out = folder / "out.json"
        out.unlink(missing_ok=True)
        child = run_child([*words, what, str(out)], log=folder / "log")
        if child.code or not out.exists():
            return {"error": f"{what}: {child.tail}"}
        found |= json.loads(out.read_text("utf-8"))
    return {**found, "measured_bytes": child.peak_bytes}


def rows(case: Case) -> list[dict[str, str]]:
    """Rows of about `length` tokens of a vocabulary in which a letter is one; a third is learnt."""
    draw = random.Random(case.length)

    def text(tokens: int) -> str:
        return " ".join(draw.choices("abcdefgh", k=max(1, tokens // 2)))

    made = []
    for _ in range(60):
        length = round(case.length * draw.uniform(0.8, 1.0))
        if case.task == "text":
            made.append({"text": text(length)})
        elif case.task == "classify":
            made.append({"text": text(length), "label": draw.choice("xyz")})
        else:
            made.append({"prompt": text(2 * length // 3), "completion": text(length // 3)})
    return made


def errors(found: Sequence[dict[str, Any]], predicted: str, measured: str) -> list[float]:
    """Of each case |predicted / measured - 1|."""
    return [abs(one[predicted] / one[measured] - 1) for one in found if one.get(predicted) and one.get(measured)]


def markdown(found: Sequence[dict[str, Any]], *, memory_only: bool = False) -> str:
    """The table, and the median and worst error of each prediction: by formula, and after a probe."""
    here = machine()
    whole = [one for one in found if "error" not in one]
    libraries = ", ".join(f"{name} {value}" for name, value in versions().items() if name in ("torch", "transformers"))
    kinds = [("memory", "bytes", 2**20, "{:,.0f}", "{:+.1%}")]
    if not memory_only:
        kinds.append(("step", "seconds", 1, "{:.2f}", "{:+.0%}"))
    heads = [f"{name}: measured | by formula | error | after a probe | error" for name, *_ in kinds]
    lines = [
        f"{here['processor']}, {here['cores']} cores; {libraries}. Memory in MiB, seconds a mean step.",
        "",
        f"| model | method | precision | row | pass | recomputed | {' | '.join(heads)} |",
        f"|---|---|---|---:|---:|---|{'---:|' * 5 * len(kinds)}",
    ]
    for one in found:
        cells = [f"{one[key]}" for key in ("model", "method", "precision", "length", "tokens", "layers")]
        if "error" in one:
            cells += ["failed", *[""] * (5 * len(kinds) - 1)]
        for _, unit, scale, number, share in kinds if "error" not in one else ():
            measured = one[f"measured_{unit}"]
            cells.append(number.format(measured / scale))
            for way in ("predicted", "probe"):
                cells += [
                    number.format(one[f"{way}_{unit}"] / scale),
                    share.format(one[f"{way}_{unit}"] / measured - 1),
                ]
        lines.append(f"| {' | '.join(cells)} |")
    lines.append("")
    for way, words, spread in (("predicted", "by formula", SPREAD), ("probe", "after a probe", PROBE_SPREAD)):
        if (off := errors(whole, "measured_seconds", f"{way}_seconds")) and not memory_only:
            held = sum(one <= spread for one in off)
            lines.append(
                f"The range that is shown {words}, ± {spread:.0%}, holds the seconds of {held} of {len(off)}.  "
            )
    for name, unit, *_ in kinds:
        for way, words in (("predicted", "by formula"), ("probe", "after a probe")):
            if off := errors(whole, f"{way}_{unit}", f"measured_{unit}"):
                median, worst = statistics.median(off), max(off)
                lines.append(
                    f"{name.capitalize()} {words}, {len(off)} cases: median error {median:.1%}, worst {worst:.1%}.  "
                )
    return "\n".join(lines) + "\n"
