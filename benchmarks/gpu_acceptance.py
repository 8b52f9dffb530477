"""Acceptance of the CUDA path: one command, at most ten minutes on one card.

    python -m benchmarks.gpu_acceptance --out accept.json
    python -m benchmarks.gpu_acceptance --device cpu

The second form walks through every check where no card is, with tiny models and faked functions of torch.cuda. What
was found is in `accept.json`, and as a table in `accept.md`. What CUDA computes is compared with float32 on a
processor; speed, synchronisations, launches and memory are measured. Exit code 0: no check failed. All checks and
the bars: docs/guide/gpu.md.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
import traceback
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tunesmith.environment.settings import prepare_environment

if __name__ == "__main__":  # before torch is imported, and only where this process is the command's own
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    prepare_environment(os.environ)

import torch
from torch import Tensor

from benchmarks import gpu_speed, gpu_use
from benchmarks.gpu_models import FAMILIES, Bench, LeftOut, memory_limit, mixed_lengths, require, steps_of
from benchmarks.gpu_walk import walking
from tunesmith.errors import Stopped
from tunesmith.models.attention import Segments, packed_attention
from tunesmith.models.card import driver, exact_products
from tunesmith.models.memory import free_cached_memory
from tunesmith.runs.folder import Run
from tunesmith.training.progress import Listener
from tunesmith.training.trainer import resume, train
from tunesmith.types import Segment

LARGEST_ERROR = {torch.bfloat16: 0.02, torch.float16: 0.004, torch.float32: 2e-5}
"""Norm of a difference, in norms of the right answer."""
STOPPED_AT = 4
"""Step after which a run is stopped and resumed."""
HEAD_SIZES = (16, 20, 64, 80, 128, 256)
Check = Callable[[Bench], Any]


def facts(bench: Bench) -> dict[str, Any]:
    """Card, versions, and the libraries that are there."""
    import transformers

    found: dict[str, Any] = {"torch": torch.__version__, "transformers": transformers.__version__}
    card, capability = torch.cuda.get_device_properties(bench.device), torch.cuda.get_device_capability(bench.device)
    found |= {"card": card.name, "capability": capability, "GiB": round(card.total_memory / 2**30, 1)}
    found |= {"CUDA": torch.version.cuda, "driver": driver()}
    return found | {name: find_spec(name) is not None for name in ("bitsandbytes", "liger_kernel", "triton")}


def plan(bench: Bench) -> dict[str, Any]:
    """A forecast is made on the card, rows are packed, and nothing of the plan fails."""
    setup = bench.setup(bench.family("llama"), bench.chats("plan", mixed_lengths(64)))
    require(setup.forecast is not None, "no forecast: " + "; ".join(setup.notes))
    require(setup.sampler.layout == "packed", "rows are padded: " + "; ".join(setup.notes))
    assert setup.forecast is not None
    return {"predicted GiB": setup.forecast.memory.total / 2**30, "notes": setup.notes}


def attention(bench: Bench) -> dict[str, Any]:
    """Every shape that can reach packed attention, forward and backward, against float32 on a processor."""
    whole = [Segment(n) for n in (70, 33, 33, 1, 128, 5)]
    shared = [Segment(40), *(Segment(n, ((0, 40),)) for n in (20, 7, 1)), Segment(90)]
    kinds: list[tuple[str, list[Segment], bool, dict[str, Any]]] = [
        ("causal", whole, True, {}),
        ("window", whole, True, {"sliding_window": 16}),
        ("prefix", shared, True, {}),
        ("both ways", whole, False, {}),
        ("softcap", whole, True, {"softcap": 30.0}),
        ("scaling", whole, True, {"scaling": 0.2}),
    ]
    errors: dict[str, float] = {}
    wrong: list[str] = []
    for size in HEAD_SIZES:
        for groups in (2, 8):
            for name, pieces, causal, how in kinds:
                shape = (8, groups, size)
                right = _attended("cpu", torch.float32, pieces, shape, causal, how)
                for dtype, allowed in LARGEST_ERROR.items():
                    case = f"{dtype} {size} {groups} {name}"
                    try:
                        found = _attended(bench.device, dtype, pieces, shape, causal, how)
                    except Exception as error:
                        wrong.append(f"{case}: {type(error).__name__}: {str(error)[:90]}")
                        continue
                    errors[case] = max(float((a - b).norm() / b.norm()) for a, b in zip(found, right, strict=True))
                    if not errors[case] <= allowed:
                        wrong.append(f"{case}: off by {errors[case]:.2g}")
    require(not wrong, f"{len(wrong)} cases: {wrong[:8]}")
    return {"cases": len(errors), "largest error": max(errors.values())}


def _attended(  # noqa: PLR0917 — one case, in the order of its name
    device: str,
    dtype: torch.dtype,
    pieces: list[Segment],
    shape: tuple[int, int, int],
    causal: bool,
    how: dict[str, Any],
) -> list[Tensor]:
    """The answer and the gradients of queries, keys and values."""
    heads, groups, size = shape
    draw = torch.Generator().manual_seed(1)
    tokens = sum(piece.tokens for piece in pieces)
    shapes = [(1, num, tokens, size) for num in (heads, groups, groups)]
    q, k, v = (torch.randn(s, generator=draw).to(device, dtype).requires_grad_() for s in shapes)
    segments = Segments.sharing(pieces, device=torch.device(device))
    module: Any = types.SimpleNamespace(is_causal=causal)
    out, _ = packed_attention(module, q, k, v, None, segments=segments, short_products=False, **how)
    out.backward(torch.randn(out.shape, generator=draw).to(out))  # type: ignore[no-untyped-call]
    return [t.detach().float().cpu() for t in (out, q.grad, k.grad, v.grad) if t is not None]


def losses(bench: Bench) -> dict[str, Any]:
    """The first steps of five families: on a processor in float32, on the card in float32 and in half precision."""
    found = {}
    half = bench.half
    rows = bench.chats("losses", mixed_lengths(80), system="You are a helpful assistant who answers briefly and well.")
    for arch in FAMILIES:
        method = {"method": {"name": "full"}} if arch == "gpt2" else {}

        def run(device: str, precision: str, arch: str = arch, method: dict[str, Any] = method) -> list[float]:
            made = bench.setup(bench.family(arch), rows, device=device, precision=precision, threads=2, **method)
            require(made.sampler.layout == "packed", f"{arch} on {device} is padded: {made.notes}")
            return [step["loss"] for step in steps_of(made, 6)]

        right = run("cpu", "float32")
        off = [
            max(abs(a - b) / b for a, b in zip(run(bench.device, precision), right, strict=True))
            for precision in ("float32", half)
        ]
        found[arch] = {"float32": off[0], half: off[1]}
        # GPT-2 drops out in training, each device by random numbers of its own: only its first loss could be the same.
        if arch != "gpt2" or not bench.is_cuda:
            require(off[0] <= 2e-4 and off[1] <= 0.03, f"{found}")
    return found


def repeats(bench: Bench) -> dict[str, Any]:
    """Two runs of the same steps, and a stop with a resume, bit for bit; on a card only `repeatable: true` has to."""
    found = {}
    for strict in (False, True) if bench.is_cuda else (False,):
        try:
            found["repeatable" if strict else "usual"] = _repeated(bench, strict=strict)
        finally:
            torch.use_deterministic_algorithms(False)
    last = found["repeatable" if bench.is_cuda else "usual"]
    require(last["repeats"] and last["resumes"], f"{found}")
    return found


def _repeated(bench: Bench, *, strict: bool) -> dict[str, bool]:
    model, rows = bench.family("llama"), bench.chats("repeats", mixed_lengths(80))
    how = {"precision": bench.half, "method": {"name": "lora", "rank": 8, "dropout": 0.1}, "repeatable": strict}

    def steps(num: int) -> list[tuple[float, float]]:
        return [(s["loss"], s["grad_norm"]) for s in steps_of(bench.setup(model, rows, **how), num)]

    root, seen = bench.folder / f"stopped-{strict}", list[str]()
    listener = Listener(
        on_event=lambda event: seen.append(event.kind), should_stop=lambda: seen.count("step") >= STOPPED_AT
    )
    try:
        train(bench.recipe(model, rows, **how), root=root, listener=listener)
    except Stopped:
        run = Run(max(root.glob("*/run.json"), key=os.path.getmtime).parent)
    resumed = [(e.values["loss"], e.values["grad_norm"]) for e in resume(run).events() if e.kind == "step"]
    return {"repeats": steps(6) == steps(6), "resumes": steps(len(resumed)) == resumed}


def memory_ends(bench: Bench) -> Any:
    """A micro-batch too large for the card is halved, and the update is the same."""
    length, rows_per_step = bench.num(700, 120), bench.num(32, 8)
    model, rows = bench.family("llama"), bench.chats("ends", [length] * 2 * rows_per_step)
    train = {"rows_per_step": rows_per_step, "tokens_per_pass": 32 * 1024, "epochs": 2}
    how: dict[str, Any] = {"train": train, "precision": "float32", "kernels": "plain"}
    setup = bench.setup(model, rows, **how)
    free_cached_memory()
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()  # what was measured before a run, such as the speed of the card, is no step
    usual = steps_of(setup, 2)
    needed = torch.cuda.max_memory_allocated() - held
    setup = bench.setup(model, rows, **how)
    free_cached_memory()
    held = torch.cuda.memory_allocated()
    with memory_limit((held + 0.6 * needed) / torch.cuda.get_device_properties(bench.device).total_memory):
        tight = steps_of(setup, 2)
    require(any("tokens_per_pass" in step for step in tight), "memory never ended: the check is too weak")
    off = max(abs(a["loss"] - b["loss"]) for a, b in zip(usual, tight, strict=True))
    require(off < 1e-4, f"losses differ by {off}")
    return {"halved to": [step.get("tokens_per_pass") for step in tight], "losses differ by": off}


def methods(bench: Bench) -> dict[str, str]:
    """Each method and optimizer learns: its loss is finite, and lower after ten steps."""
    model, rows, found = bench.family("llama"), bench.chats("methods", mixed_lengths(96)), {}
    cases: list[tuple[dict[str, Any], str]] = [({"name": "lora", "rank": 8}, o) for o in ("adamw", "adafactor", "muon")]
    cases += [({"name": name}, "adamw") for name in ("full", "dora")]
    if find_spec("bitsandbytes") and bench.is_cuda:
        cases += [({"name": "qlora", "rank": 8}, "adamw")]
        cases += [({"name": "full"}, optimizer) for optimizer in ("adamw_8bit", "lion")]
    for method, optimizer in cases:
        name = " ".join(map(str, [*method.values(), optimizer]))
        try:
            optim = {"name": optimizer, "lr": 2e-3 if optimizer != "lion" else 2e-4}
            setup = bench.setup(model, rows, method=method, optim=optim, precision=bench.half)
            seen = [step["loss"] for step in steps_of(setup, 10)]
            found[name] = f"{seen[0]:.3f} → {seen[-1]:.3f}" if seen[-1] < seen[0] else f"FAILED: {seen}"
        except Exception as error:
            found[name] = f"FAILED: {type(error).__name__}: {str(error)[:120]}"
    require(not any("FAILED" in text for text in found.values()), f"{found}")
    return found


CHECKS: tuple[Check, ...] = (
    facts, plan, attention, losses, repeats, memory_ends, methods, gpu_speed.kernels, gpu_speed.small_model,
    gpu_speed.encoder, gpu_use.starting, gpu_use.answers, gpu_use.serving, gpu_use.export, gpu_speed.one_billion,
    gpu_speed.eight_billion,
)  # fmt: skip


COMPARED = (attention, losses)
"""Checks that compare float32 with a processor's."""


def table(found: dict[str, Any]) -> str:
    """What was found, as a page of docs has it."""
    lines = ["| Check | | Seconds | Found |", "|---|---|---|---|"]
    for name, result in found.items():
        word = {True: "ok", False: "**failed**", None: "left out"}[result["ok"]]
        text = "; ".join(_cells(result["found"])).replace("|", "/").replace("\n", " ")
        lines.append(f"| `{name}` | {word} | {result.get('seconds', '')} | {text[:900]} |")
    return "\n".join(lines) + "\n"


def _cells(value: Any, path: str = "") -> Iterator[str]:
    """`name: number` for everything inside, without profiles."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key not in ("table", "where", "notes"):
                yield from _cells(inner, f"{path} {key}".strip())
    else:
        number = f"{value:.4g}" if isinstance(value, float) else str(value)
        yield f"{path}: {number}" if path else number


def main(words: Sequence[str] | None = None) -> int:
    """0: no check failed; 1: one did."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_acceptance", description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", default="", metavar="A,B", help="only these checks")
    parser.add_argument("--skip", default="", metavar="A,B", help="all checks but these")
    parser.add_argument("--limit", type=float, default=570.0, metavar="SECONDS", help="no check begins after this")
    parser.add_argument("--out", type=Path, default=Path("accept.json"))
    options = parser.parse_args(words)
    only, skip = ({name for name in text.split(",") if name} for text in (options.only, options.skip))
    if unknown := sorted((only | skip) - {check.__name__ for check in CHECKS}):
        parser.error(f"{', '.join(unknown)}: no such check: {', '.join(check.__name__ for check in CHECKS)}")
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(f"--device {options.device}: torch sees no CUDA device here. Use --device cpu")
    chosen = [check for check in CHECKS if (not only or check.__name__ in only) and check.__name__ not in skip]
    with tempfile.TemporaryDirectory() as folder, walking(options.device):
        bench = Bench(options.device, Path(folder))
        failed = _run(bench, chosen, limit=options.limit, out=options.out)
    print(f"{failed} failed; {options.out}")
    return 1 if failed else 0


def _run(bench: Bench, checks: Sequence[Check], *, limit: float, out: Path) -> int:
    began, failed = time.monotonic(), 0
    for check in checks:
        started = time.monotonic()
        result: dict[str, Any] = {"ok": None, "found": "not run: no time left"}
        if started - began <= limit:
            try:
                with exact_products() if check in COMPARED else nullcontext():
                    result = {"ok": True, "found": check(bench)}
            except LeftOut as reason:
                result = {"ok": None, "found": str(reason)}
            except Exception as error:  # whatever a card says of it is the result
                where = "".join(traceback.format_exception(error)[-3:])
                result = {"ok": False, "found": f"{type(error).__name__}: {str(error)[:1500]}", "where": where}
            result["seconds"] = round(time.monotonic() - started, 1)
            free_cached_memory()
        failed += result["ok"] is False
        bench.found[check.__name__] = result
        out.write_text(json.dumps(bench.found, indent=1, default=str), encoding="utf-8")
        out.with_suffix(".md").write_text(table(bench.found), encoding="utf-8")
        word = {True: "ok", False: "FAILED", None: "left out"}[result["ok"]]
        found = json.dumps(result["found"], default=str)[:700]
        print(f"{word:<9}{check.__name__:<15}{result.get('seconds', 0):>6} s  {found}", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
