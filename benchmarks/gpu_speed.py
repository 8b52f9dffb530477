"""The speed half of `python -m benchmarks.gpu_acceptance`: tokens a second, share of time a card works, memory."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.gpu_models import (
    EIGHT_BILLION,
    ONE_BILLION,
    SMALL_135M,
    TINY_BERT,
    Bench,
    LeftOut,
    mixed_lengths,
    require,
    steps_of,
)  # fmt: skip
from tunesmith.models.fused_loss import OutputLayer
from tunesmith.models.memory import free_cached_memory
from tunesmith.training.loop import training_steps
from tunesmith.training.setup import Setup

PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "4090": 165e12, "T4": 65e12, "L4": 121e12}
"""Dense operations a second in half precision, by the makers' data sheets."""
PUBLISHED = 12473
"""Tokens a second: LoRA of Llama 3 8B at 4,096 tokens on one H100 (NeMo AutoModel's performance summary)."""


def measured(bench: Bench, setup: Setup, *, warm: int = 3, num: int = 6) -> dict[str, Any]:
    """Speed and peak memory of some steps after the first ones, with what was predicted."""
    torch.cuda.reset_peak_memory_stats()
    warm, num = bench.num(warm, 1), bench.num(num, 1)
    require(setup.total_steps >= warm + num, f"the run has {setup.total_steps} steps, and {warm + num} are needed")
    seen = steps_of(setup, warm + num)[warm:]
    tokens, seconds = sum(s["tokens"] for s in seen), sum(s["seconds"] for s in seen)
    step = round(statistics.median(s["seconds"] for s in seen), 4)
    found: dict[str, Any] = {"tokens/s": round(tokens / seconds), "seconds a step": step}
    found["peak GiB"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    found["reserved GiB"] = round(torch.cuda.max_memory_reserved() / 2**30, 2)
    if setup.forecast is not None:
        found["predicted GiB"] = round(setup.forecast.memory.total / 2**30, 2)
        duration = setup.forecast.duration
        found["predicted seconds a step"] = None if duration is None else round(duration.prices["training"], 4)
    return found


def profiled(bench: Bench, setup: Setup, usual: dict[str, Any]) -> dict[str, Any]:
    """Of one step: synchronisations, kernels, the costliest of them, and the share of time in which the card works: of
    the time that so many tokens take in `usual` steps, since a profile about doubles that of a launch."""
    from torch.profiler import ProfilerActivity, profile

    require(setup.total_steps >= 3, f"the run has {setup.total_steps} steps, and 3 are needed")
    steps = training_steps(setup)
    next(steps)
    with warnings.catch_warnings(record=True) as raised:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        passes = next(steps).values["passes"]
        torch.cuda.set_sync_debug_mode("default")
    bench.synchronize()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if bench.is_cuda else [])]
    with profile(activities=activities) as record:
        tokens = next(steps).values["tokens"]
        bench.synchronize()
    kernels = [e for e in record.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    busy = sum(e.device_time_total for e in kernels) / 1e6
    syncs = [f"{Path(w.filename).name}:{w.lineno}" for w in raised if "ynchroniz" in str(w.message)]
    table = record.key_averages().table(sort_by="self_device_time_total", row_limit=14, max_name_column_width=60)
    return {
        "passes": passes,
        "synchronisations": len(syncs),
        "where": sorted(set(syncs))[:12],
        "kernels": len(kernels),
        "busy": round(busy * usual["tokens/s"] / tokens, 3),
        "table": table,
    }


def kernels(bench: Bench) -> dict[str, Any]:
    """Milliseconds, forward and backward, of what this package does and of what torch and Liger have for it."""
    tokens, size, words = (8192, 4096, 128256) if bench.is_cuda else (256, 64, 512)
    found: dict[str, Any] = {}

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        made = torch.randn(*shape, device=bench.device, dtype=getattr(torch, bench.half)) * scale
        return made.requires_grad_()

    def timed(do: Callable[..., Tensor], *inputs: Tensor) -> float:
        grad, began = None, 0.0
        for turn in range(8):
            if turn == 3:
                bench.synchronize()
                began = time.perf_counter()
            out = do(*inputs)
            grad = torch.randn_like(out) if grad is None else grad
            out.backward(grad)  # type: ignore[no-untyped-call]
        bench.synchronize()
        return round((time.perf_counter() - began) / 5 * 1e3, 3)

    def note(name: str, do: Callable[..., Tensor], *inputs: Tensor) -> None:
        try:
            found[name] = timed(do, *inputs)
        except Exception as error:
            found[name] = f"{type(error).__name__}: {str(error)[:100]}"

    x, w = normal(1, tokens, size), normal(size).detach()
    note("norm, torch", lambda x: F.rms_norm(x, (size,), w, 1e-5), x)
    h, v = normal(tokens // 2, size), normal(words, size, scale=0.02).detach()
    targets = torch.randint(words, (tokens // 2,), device=bench.device)
    layer = nn.Linear(size, words, bias=False, device="meta")
    layer.weight = nn.Parameter(v, requires_grad=False)
    output = OutputLayer(layer=layer, scale=1.0, divides=False, cap=None)
    note("loss, own", lambda h: output.loss_sum(h, targets, smoothing=0.0, z=0.0), h)
    note("loss, torch", lambda h: F.cross_entropy((h @ v.t()).float(), targets, reduction="sum"), h)
    if bench.is_cuda and find_spec("liger_kernel"):
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction as Fused
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction

        note("norm, liger", lambda x: LigerRMSNormFunction.apply(x, w, 1e-5, 0.0, "llama", False), x)
        note("loss, liger", lambda h: Fused.apply(h, v, targets, None, None, -100, 0.0, 0.0, "sum")[0], h)
    return found


def small_model(bench: Bench) -> dict[str, Any]:
    """135M weights, where the processor that starts kernels is the limit."""
    rows, found = bench.chats("small", mixed_lengths(bench.num(600, 60), mean=bench.num(250, 60))), {}
    model = bench.model("135m", "llama", dtype=torch.bfloat16, **bench.sizes(SMALL_135M))
    for tokens in (8192, 32768):
        num = bench.num(64 if tokens == 8192 else 128, 8)
        setup = bench.setup(model, rows, train={"rows_per_step": num, "tokens_per_pass": tokens}, precision=bench.half)
        usual = measured(bench, setup)
        found[f"{tokens} a micro-batch"] = usual | profiled(bench, setup, usual)
    return found


def encoder(bench: Bench) -> dict[str, Any]:
    """Short texts that are classified with dropout: packed must not be slower than padded."""
    model = bench.model("bert", "bert", auto="AutoModelForMaskedLM", **bench.sizes(TINY_BERT))
    rows, found = bench.classes("classes", bench.num(1500, 60)), dict[str, Any]()
    train = {"rows_per_step": bench.num(256, 16), "tokens_per_pass": 8192, "epochs": 3}
    for layout in ("packed", "padded"):
        setup = bench.setup(model, rows, precision=bench.half, method={"name": "full"}, train=train)
        if layout == "padded":
            setup.sampler = replace(setup.sampler, layout="padded", ids_of=None)
            setup.collator = replace(setup.collator, layout="padded", shares=False, pads=False)
        require(setup.sampler.layout == layout, f"{setup.notes}")
        found[layout] = measured(bench, setup, num=4)
    is_slower = found["packed"]["tokens/s"] < 0.9 * found["padded"]["tokens/s"]
    require(not (bench.is_cuda and is_slower), f"{found}")
    return found


def one_billion(bench: Bench) -> dict[str, Any]:
    """LoRA, QLoRA and every weight of a 1B model on chats of mixed length; the forecast with what was needed."""
    if why := bench.why_not(14):
        raise LeftOut(why)
    model = bench.model("1b", "llama", dtype=torch.bfloat16, **bench.sizes(ONE_BILLION))
    lengths = mixed_lengths(bench.num(400, 40), mean=bench.num(420, 60), most=bench.num(4000, 200))
    rows, found = bench.chats("chat", lengths), dict[str, Any]()
    train = {"rows_per_step": bench.num(64, 8), "tokens_per_pass": 16384 if not bench.why_not(36) else 4096}
    train |= {"checkpointed_layers": 0}
    usual = {"method": {"name": "lora", "rank": 16, "alpha": 32}, "precision": bench.half, "train": train}
    cases: dict[str, dict[str, Any]] = {
        "lora": {},
        "lora plain": {"kernels": "plain"},
        "full": {"method": {"name": "full"}},
    }
    if find_spec("bitsandbytes") and bench.is_cuda:
        cases["qlora"] = {"method": {"name": "qlora", "rank": 16}}
    for name, how in cases.items():
        if name == "full" and (why := bench.why_not(36)):
            found[name] = why
            continue
        try:
            setup = bench.setup(model, rows, **{**usual, **how})
            found[name] = seen = measured(bench, setup, num=4)
            seen |= profiled(bench, setup, seen) if name == "lora" else {}
        except Exception as error:
            found[name] = f"FAILED: {type(error).__name__}: {str(error)[:160]}"
        setup = None  # type: ignore[assignment]
        free_cached_memory()
    require(not any(str(one).startswith("FAILED") for one in found.values()), f"{found}")
    return found


def eight_billion(bench: Bench) -> dict[str, Any]:
    """Four and eight layers of an 8B model on full rows of 4,096 tokens; 32 layers follow by a line."""
    if why := bench.why_not(38):
        raise LeftOut(why)
    length, num = bench.num(4088, 200), bench.num(72, 24)
    rows, seconds, found = bench.chats("rows4096", [length] * num, share=0.9), dict[int, float](), dict[str, Any]()
    for layers in (4, 8):
        sizes = {**bench.sizes(EIGHT_BILLION), "num_hidden_layers": layers}
        model = bench.model(f"8b-{layers}", "llama", dtype=torch.bfloat16, **sizes)
        train = {"rows_per_step": 8, "tokens_per_pass": 8192, "checkpointed_layers": 0}
        lora = {"name": "lora", "rank": 8, "alpha": 32}
        setup = bench.setup(model, rows, precision=bench.half, method=lora, train=train)
        found[f"{layers} layers"] = one = measured(bench, setup, warm=2, num=4)
        seconds[layers] = 1 / one["tokens/s"]
        setup = None  # type: ignore[assignment]
        free_cached_memory()
    whole = seconds[4] + 28 * (seconds[8] - seconds[4]) / 4
    found |= {"32 layers, extrapolated, tokens/s": round(1 / whole), "published for one H100": PUBLISHED}
    weights = 32 * 218.1e6 + 525e6
    card = torch.cuda.get_device_name(bench.device)
    if peak := next((value for name, value in PEAK.items() if name in card), None):
        found["share of peak"] = 4 * weights / whole / peak
    return found
