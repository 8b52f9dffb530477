"""tunesmith doctor"""

from __future__ import annotations

import platform
import sys
from typing import Any

import typer

from tunesmith.cli.options import Json

EXTRAS = {
    "serve": ("fastapi uvicorn prometheus_client", "a server that answers as OpenAI's API does"),
    "jobs": ("alembic limits python_multipart standardwebhooks", "fine-tuning jobs on the server"),
    "postgres": ("psycopg", "jobs kept in PostgreSQL"),
    "cloud": ("s3fs gcsfs", "data by address, s3:// and gs://"),
    "tensorboard": ("tensorboard", "runs in TensorBoard"),
    "wandb": ("wandb", "runs in Weights & Biases"),
    "mlflow": ("mlflow", "runs in MLflow"),
    "trackio": ("trackio", "runs in Trackio"),
    "json": ("llguidance", "answers that follow a JSON schema, on the server"),
    "bitsandbytes": ("bitsandbytes", "method qlora and optimizers of 8 bits"),
    "peft": ("peft", "the methods of PEFT"),
    "schedulefree": ("schedulefree", "optimizers without a schedule"),
    "bleu": ("sacrebleu", "BLEU and chrF of answers"),
    "llama-cpp": ("llama_cpp", "GGUF exports in all kinds of llama.cpp"),
    "ray": ("ray", "sweeps of several runs at once, and runs on a Ray cluster"),
    "onnx": ("onnxscript onnxruntime", "exports to ONNX"),
}
"""Extra → its modules and its use."""


def doctor(as_json: Json = False) -> None:
    """Show versions, device, precision, threads, disk space and installed extras of this machine.

    tunesmith doctor --json
    """
    from tunesmith.cli.streams import console, json_page
    from tunesmith.environment import install_command

    found = findings()
    if as_json:
        typer.echo(json_page(found))
        return
    screen = console()
    for name, value in found.items():
        if name not in ("extras", "threads reason"):
            why = f": {found['threads reason']}" if name == "threads" else ""
            screen.print(f"{name:<14} {value}{why}", soft_wrap=True)
    for name, is_here in found["extras"].items():
        state = "" if is_here else f"; not installed: {install_command(name)}"
        screen.print(f"extra {name:<14} {EXTRAS[name][1]}{state}", soft_wrap=True, markup=False)


def findings() -> dict[str, Any]:
    """Versions, and the device, precision and threads of a training on this machine."""
    import shutil
    from importlib.util import find_spec

    from tunesmith.environment import default_threads
    from tunesmith.formatting import size
    from tunesmith.models.machine import choose_device, choose_precision
    from tunesmith.training.summary import versions

    device = choose_device("auto")
    precision = choose_precision("auto", device.value)
    threads, why = default_threads()
    return {
        **versions(),
        "interpreter": sys.executable,
        "platform": platform.platform(),
        "device": f"{device.value}: {device.reason}",
        "precision": f"{precision.value}: {precision.reason}",
        "threads": threads,
        "threads reason": why,
        "devices": _together(),
        "disk free": size(shutil.disk_usage(".").free),
        "extras": {name: all(map(find_spec, modules.split())) for name, (modules, _) in EXTRAS.items()},
    }


def _together() -> str:
    """The libraries by which several devices train one run together, and whether they are here."""
    from importlib.util import find_spec

    import torch.distributed as dist

    known = dist.is_available()
    here = {
        "gloo (between processors)": known and dist.is_gloo_available(),
        "NCCL (between CUDA cards)": known and dist.is_nccl_available(),
        "Ray (clusters)": find_spec("ray") is not None,
    }
    return ", ".join(f"{name} {'is here' if is_here else 'is not here'}" for name, is_here in here.items())
