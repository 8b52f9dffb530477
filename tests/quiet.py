"""What the process that runs tests does once: one thread, no chatter, no waiting for a disk nor for other programs.

Imported by conftest.py, and not in a process that only hands out tests: all of it brings in torch.
"""

import gc
import os
from copy import deepcopy
from functools import cache, lru_cache

import torch
from transformers.utils import logging
from typer import testing

from tunesmith.evaluation import report
from tunesmith.planning import devices
from tunesmith.recipe import yaml_io

gc.set_threshold(20_000, 10, 50)
"""Circles are looked for a thirtieth as often: a tenth of the time of a small run."""
os.fsync = lambda descriptor: None
"""A run of a second would wait for the disk a third of it. What a power cut loses is seen by tests that count calls."""
WRITE_PAGES, report._write_pages = report._write_pages, lambda *args, **kwargs: None
"""Runs inside tests leave report.json alone: drawing the pages takes longer than training such models."""

for cards in (torch.cuda, torch.xpu):
    if not cards.is_available():  # it would keep its caller's stack, printed, for a card that never comes: at each step
        cards.manual_seed_all = lambda seed: None
devices.BUSY_S = 0.0
"""A run waits a fifth of a second to see what other programs take of the processor: in a thousand runs, minutes."""

testing._get_command = cache(testing._get_command)
"""The commands are made once, not for each that a test calls: typer reads the types of all their options."""

PARSED = lru_cache(yaml_io.parse)
yaml_io.parse = lambda text, where: deepcopy(PARSED(text, where))
"""A run reads its own recipe several times, and its tests once more: reading YAML takes longer than a step."""

logging.set_verbosity_error()
logging.disable_progress_bar()
torch.set_num_threads(1)
os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))
"""A fork has to make torch's pool of threads anew, which two threads of it that begin at once do not survive: "Invalid
thread pool!"."""
