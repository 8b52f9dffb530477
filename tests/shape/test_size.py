"""Files, functions and rooms stay small enough to be read at one sitting."""

import ast
from collections import Counter

from shape.tree import SOURCE, name_of, parsed, source_files, walked

MAX_LINES = 500
"""A concept is a file."""
MAX_FUNCTION = 60
LONGER_FUNCTIONS = {"training_steps": 90}
"""The loop may be longer: it is the method, whole, in one place."""
ROOMS = {
    "api, types, errors, …": (
        1_430,
        "the Python interface, the types that travel, errors with ways out as options, numbers as text",
    ),
    "cli": (4_970, "twenty-two commands, what they print and what they refuse"),
    "data": (10_650, "thirty-one forms of rows, images, their problems by line, rendering, encoding, steps, batches"),
    "environment": (
        320,
        "the version, packages, settings of torch's libraries, this process and its children, the hub's refusals",
    ),
    "evaluation": (4_060, "measures with intervals, answers, graded answers, comparison, the report"),
    "export": (3_050, "five formats, each verified against the run"),
    "generation": (
        2_260,
        "every answer that a model writes: serving, evaluation, drawing; padded ones; scores of prompts",
    ),
    "graders": (
        2_630,
        "types of graders, children for code, slips, judges, requests to addresses, a trial, what strangers may use",
    ),
    "inference": (1_670, "a result loaded, files of rows answered and measured, their images too"),
    "jobs": (4_790, "OpenAI's fine-tuning API: files, jobs, graders, projects, webhooks, recovery from kills"),
    "methods": (2_950, "full, LoRA and its relatives, on experts too, QLoRA, peft"),
    "models": (6_385, "finding, loading, attention, heads, experts, losses in pieces, divergences, twelve that see"),
    "optim": (450, "optimizers and schedules"),
    "pages": (1_720, "pages of runs, data, plans, comparisons, exports and chats over what commands print"),
    "parallel": (1_055, "several processes of one run"),
    "planning": (2_195, "defaults with reasons; memory, time, disk; draws, graders, teachers and images too"),
    "recipe": (1_980, "every option, declared once; files of other tools translated"),
    "runs": (1_485, "run folders, events, checkpoints, how far a run is"),
    "serve": (
        3_385,
        "the engine's process and OpenAI's routes, images in requests; sessions, keys, commands and a spare, for pages",
    ),
    "sweeps": (850, "a run for each combination"),
    "tasks": (1_870, "what is learnt"),
    "summaries": (685, "what commands and pages say in the same words, which were in cli, pages and phrases before"),
    "trackers": (750, "four experiment trackers"),
    "training": (
        6_330,
        "the loop, a run around it, answers drawn and planned, teachers here and at addresses, packing",
    ),
}
"""Lines that a room may have, and what for: docs/inside/decisions/004-size-of-the-package.md."""


def test_files_and_functions_are_short() -> None:
    lines = {name_of(path): path.read_text("utf-8").count("\n") for path in source_files()}
    assert [f"{name}: {num}: split it where its subject splits" for name, num in lines.items() if num > MAX_LINES] == []
    long = [
        f"{name_of(path)}:{node.lineno} {node.name}: {length}, at most {limit}"
        for path in source_files()
        for node in walked(parsed(path))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        and (length := (node.end_lineno or node.lineno) - node.lineno + 1)
        > (limit := LONGER_FUNCTIONS.get(node.name, MAX_FUNCTION))
    ]
    assert long == []


def test_each_room_keeps_to_its_lines() -> None:
    lines: Counter[str] = Counter()
    for path in source_files():
        room, *rest = path.relative_to(SOURCE).parts
        lines[room if rest else next(iter(ROOMS))] += path.read_text("utf-8").count("\n")
    assert sorted(lines) == sorted(ROOMS)
    assert [f"{room}: {num}, at most {ROOMS[room][0]}" for room, num in lines.items() if num > ROOMS[room][0]] == []
