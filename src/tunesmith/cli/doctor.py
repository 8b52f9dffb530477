"""tunesmith doctor, selftest"""

from __future__ import annotations

import platform
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from tunesmith.cli.options import Json, Offline, Root, Settings, Target, named, to_overrides
from tunesmith.cli.streams import console, json_line
from tunesmith.environment.packages import install_command
from tunesmith.environment.process import default_threads
from tunesmith.errors import InputError, RecipeError
from tunesmith.phrases import plural, size
from tunesmith.runs.folder import Run, is_run
from tunesmith.types import JsonObject

if TYPE_CHECKING:
    from tunesmith.recipe.schema import Recipe


EXTRAS = {
    "serve": ("fastapi uvicorn prometheus_client", "a server that answers as OpenAI's API does"),
    "jobs": ("alembic limits python_multipart standardwebhooks", "fine-tuning jobs on the server"),
    "postgres": ("psycopg", "jobs kept in PostgreSQL"),
    "excel": ("openpyxl", "rows in Excel files"),
    "images": ("PIL", "images in chats"),
    "cloud": ("s3fs gcsfs", "data by address, s3:// and gs://"),
    "tensorboard": ("tensorboard", "runs in TensorBoard"),
    "wandb": ("wandb", "runs in Weights & Biases"),
    "mlflow": ("mlflow", "runs in MLflow"),
    "trackio": ("trackio", "runs in Trackio"),
    "json": ("llguidance", "answers that follow a JSON schema, on the server"),
    "graders": ("rapidfuzz jsonschema", "graders of likeness and of JSON schemas"),
    "bitsandbytes": ("bitsandbytes", "method qlora and optimizers of 8 bits"),
    "cuda": ("liger_kernel", "kernels of a card where torch.compile makes none"),
    "peft": ("peft", "the methods of PEFT"),
    "llama-cpp": ("llama_cpp", "GGUF exports in all kinds of llama.cpp"),
    "ray": ("ray", "sweeps of several runs at once, and runs on a Ray cluster"),
    "onnx": ("onnxscript onnxruntime", "exports to ONNX"),
}
"""Extra → its modules and its use."""


def doctor(as_json: Json = False) -> None:
    """Show versions, device, precision, threads, disk space and installed extras of this machine.

    tunesmith doctor --json
    """
    facts = findings()
    if as_json:
        json_line(facts)
        return
    screen = console()
    for name, value in facts.items():
        if name not in ("extras", "threads reason"):
            why = f": {facts['threads reason']}" if name == "threads" else ""
            screen.print(f"{name:<14} {value}{why}", soft_wrap=True)
    for name, is_here in facts["extras"].items():
        state = "" if is_here else " (not installed)"
        screen.print(f"extra {name:<14} {EXTRAS[name][1]}{state}", soft_wrap=True, markup=False)
    if missing := [name for name, is_here in facts["extras"].items() if not is_here]:
        way = f"\nTo install one of those that are missing, such as {missing[0]}:\n{install_command(missing[0])}"
        screen.print(way, soft_wrap=True, markup=False)


def findings() -> JsonObject:
    """Versions, and the device, precision and threads of a training on this machine."""
    from importlib.util import find_spec

    import torch

    from tunesmith.models.card import driver
    from tunesmith.models.machine import choose_device, choose_precision
    from tunesmith.training.summary import versions

    try:
        device = choose_device("auto")
        chosen, precision = f"{device.value}: {device.reason}", choose_precision("auto", device.value)
    except RecipeError as error:  # a card that torch cannot use: what would be, with device: cpu
        chosen, precision = f"none: {error}", choose_precision("auto", "cpu")
    threads, why = default_threads()
    return {
        **versions(),
        "interpreter": sys.executable,
        "platform": platform.platform(),
        "torch's CUDA": torch.version.cuda or "none: built for processors",
        "NVIDIA driver": driver() or "none",
        "device": chosen,
        "precision": f"{precision.value}: {precision.reason}",
        "threads": threads,
        "threads reason": why,
        "devices": _together(),
        "grader code": _grader_code(),
        "disk free": _free_disk(),
        "extras": {name: all(map(find_spec, modules.split())) for name, (modules, _) in EXTRAS.items()},
    }


def _grader_code() -> str:
    """Whether code that comes as the text of a grader, or in answers, has a network here, or why it does not run."""
    from tunesmith.graders.children import runs_offline

    try:
        is_offline = runs_offline()
    except (InputError, OSError) as error:
        return f"does not run: {error}"
    if is_offline:
        return "runs without network (graders python and unit_tests)"
    return "runs with network: this system lets no ordinary program close it (graders python and unit_tests)"


def _free_disk() -> str:
    """Free space where runs are written, or why it is not known."""
    try:
        return size(shutil.disk_usage(".").free)
    except OSError as error:  # the folder was removed, or may not be looked into
        return f"not known: {error.strerror}"


def _together() -> str:
    """The libraries by which several devices train one run together, and whether they are here."""
    import torch.distributed as dist

    known = dist.is_available()
    here = {
        "gloo (between processors)": known and dist.is_gloo_available(),
        "NCCL (between CUDA cards)": known and dist.is_nccl_available(),
    }
    return ", ".join(f"{name} {'is here' if is_here else 'is not here'}" for name, is_here in here.items())


def selftest(
    target: Target,
    settings: Settings = None,
    root: Root = Path("runs"),
    offline: Offline = False,
    as_json: Json = False,
) -> None:
    """Check on your own model that packing, templates, micro-batches and resuming change no result.

    tunesmith selftest HuggingFaceTB/SmolLM2-135M-Instruct

    tunesmith selftest sentence-transformers/all-MiniLM-L6-v2 --set task=tag
    """
    recipe = recipe_of(target, settings or [], root=root)
    screen = console(stderr=as_json)
    from tunesmith.training import selftest as proofs

    failed = 0
    for proof in proofs.selftest(recipe, offline=offline):
        failed += not proof.passed
        if as_json:
            json_line(asdict(proof))
        sign, style = ("✓", "") if proof.passed else ("✗", "red")
        screen.print(f"{sign} {proof.name}: {proof.found}", style=style)
    if failed:
        screen.print(f"{plural(failed, 'proof')} failed: training this model here is not reliable.", style="red")
        raise typer.Exit(1)


def recipe_of(target: str, settings: list[str], *, root: Path) -> Recipe:
    """The recipe of a run, or a fresh one for a model."""
    from tunesmith.recipe import load
    from tunesmith.recipe.origin import moved_to

    if is_run(target, root):
        run = Run.open(named(target, root), root)
        return moved_to(run.place(load.load(str(run.recipe_path), settings)))
    return load.load(None, [*to_overrides({"model": target}), *settings])
