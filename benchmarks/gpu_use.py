"""What `python -m benchmarks.gpu_acceptance` measures around training: start, answers, server, export."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_models import ONE_BILLION, SMALL_135M, Bench, mixed_lengths, require
from tunesmith.export.export_run import export_run
from tunesmith.generation.adapters import AdapterSet
from tunesmith.generation.decoder import choose_decoder
from tunesmith.generation.scheduler import PreparedRequest, Scheduler
from tunesmith.inference.load import LoadedModel, load_model
from tunesmith.serve.protocol import Finished, GenerationRequest
from tunesmith.training.loop import training_steps
from tunesmith.training.trainer import train

NEW_TOKENS = 64


def _one_billion(bench: Bench) -> Path:
    return bench.model("1b", "llama", dtype=torch.bfloat16, **bench.sizes(ONE_BILLION))


def starting(bench: Bench) -> dict[str, Any]:
    """A run of 1B from its recipe to its first step and its second: rows, plan, weights, kernels."""
    rows = bench.chats("start", mixed_lengths(bench.num(400, 24)))
    model = _one_billion(bench)
    began = time.perf_counter()
    setup = bench.setup(model, rows, precision=bench.half)
    ready = time.perf_counter()
    steps = training_steps(setup)
    next(steps)
    first = time.perf_counter()
    next(steps)
    size = (model / "model.safetensors").stat().st_size / 1e9
    found = {"ready": ready - began, "first step": first - ready, "second step": time.perf_counter() - first}
    return {"GB of weights": round(size, 2), **{f"seconds: {name}": round(took, 2) for name, took in found.items()}}


def _speaker(bench: Bench) -> LoadedModel:
    return load_model(str(_one_billion(bench)))


def _prompts(num: int) -> list[list[int]]:
    return [[20 + (7 * i + t) % 200 for t in range(100 + i)] for i in range(num)]


def answers(bench: Bench) -> dict[str, Any]:
    """Held-out prompts answered as before step 1: 16 of about 100 tokens."""
    speaker, found = _speaker(bench), {}
    most = bench.num(NEW_TOKENS, 4)
    for turn in ("first", "second"):
        began = time.perf_counter()
        told = speaker.writer(most).write(_prompts(bench.num(16, 2)))
        bench.synchronize()
        found[f"seconds: {turn}"] = round(time.perf_counter() - began, 3)
        require(len(told) == bench.num(16, 2), f"{len(told)} answers")
    return found


def serving(bench: Bench) -> dict[str, Any]:
    """Tokens a second that the server's scheduler writes for 1 and for 16 streams, without HTTP."""
    speaker = _speaker(bench)
    decoder = choose_decoder("1b", speaker.model, AdapterSet(speaker.model), lambda text: None)
    found: dict[str, Any] = {"decoder": type(decoder).__name__}
    most = bench.num(NEW_TOKENS, 4)
    for streams in (1, 16):
        scheduler, rates = Scheduler(decoder, streams=streams), []
        for _ in range(2):  # the first one compiles and allocates
            for key, prompt in enumerate(_prompts(streams)):
                request = GenerationRequest("", temperature=0.0)
                how: dict[str, Any] = {"max_new_tokens": most, "stop_ids": frozenset[int]()}
                scheduler.add(PreparedRequest(key, tuple(prompt), speaker.renderer.tokenizer, request, **how))
            began, ended = time.perf_counter(), 0
            while scheduler.is_busy:
                ended += sum(isinstance(event, Finished) for _, event in scheduler.step())
            bench.synchronize()
            rates.append(streams * most / (time.perf_counter() - began))
            require(ended == streams, f"{ended} of {streams} answers ended")
        found[f"tokens/s, {streams} streams"] = round(rates[-1], 1)
    return found


def export(bench: Bench) -> dict[str, Any]:
    """A run of 135M, exported and verified: merged, and as an adapter. GGUF needs a tokenizer that was not made up."""
    rows = bench.chats("export", mixed_lengths(bench.num(64, 24), mean=60))
    model = bench.model("135m", "llama", dtype=torch.bfloat16, **bench.sizes(SMALL_135M))
    recipe = bench.recipe(model, rows, precision=bench.half, train={"max_steps": 2})
    run, found = train(recipe, root=bench.folder / "exported"), {}
    for target in ("merged", "adapter"):
        began = time.perf_counter()
        try:
            export_run(run, target, out=bench.folder / f"out-{target}", offline=True)
        except Exception as error:
            found[target] = f"FAILED: {type(error).__name__}: {str(error)[:160]}"
            continue
        found[f"seconds: {target}"] = round(time.perf_counter() - began, 1)
    require(not any("FAILED" in str(one) for one in found.values()), f"{found}")
    return found
