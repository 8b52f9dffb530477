"""tunesmith doctor"""

from __future__ import annotations

import platform
import sys
from typing import Any

import typer

from tunesmith.cli.options import Json


def doctor(as_json: Json = False) -> None:
    """Say what this machine offers: versions, device, precision, threads, memory.

    tunesmith doctor --json
    """
    from tunesmith.cli.output import console, json_page

    found = findings()
    if as_json:
        typer.echo(json_page(found))
        return
    screen = console()
    for name, value in found.items():
        screen.print(f"{name:<14} {value}")


def findings() -> dict[str, Any]:
    """What a training on this machine would rest on."""
    import shutil

    import torch

    from tunesmith.cli.text import size
    from tunesmith.describing import versions
    from tunesmith.models.machine import choose_device, choose_precision

    device = choose_device("auto")
    precision = choose_precision("auto", device.value)
    return {
        **versions(),
        "interpreter": sys.executable,
        "platform": platform.platform(),
        "device": f"{device.value}: {device.reason}",
        "precision": f"{precision.value}: {precision.reason}",
        "threads": torch.get_num_threads(),
        "disk free": size(shutil.disk_usage(".").free),
    }
