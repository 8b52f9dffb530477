"""`tunesmith serve --engine vllm|llama.cpp`: another program's server, started with a run or model."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.cli.render import visible
from tunesmith.cli.server import Access, check_extra, refuse_open_door
from tunesmith.cli.streams import console, json_line
from tunesmith.errors import InputError

if TYPE_CHECKING:
    from tunesmith.export.server_commands import ServerCommand

ENGINES = ("own", "vllm", "llama.cpp")
PROGRAMS = {"vllm": "vllm", "llama.cpp": "llama-server"}
KEY_VARIABLES = {"vllm": "VLLM_API_KEY", "llama-server": "LLAMA_API_KEY"}
"""Environment variables of the keys: every user of the machine could see an argument."""
OWN_ONLY = {
    "streams": "streams", "queue": "queue", "max_prompt_tokens": "max-prompt-tokens", "max_new_tokens": "max-tokens",
    "memory_gib": "memory-gib", "threads": "threads", "grace": "grace", "allow_host": "allow-host",
    "allow_origin": "allow-origin",
}  # fmt: skip
"""Options of the own engine only."""


def serve_elsewhere(
    engine: str, targets: Sequence[str], access: Access, given: Sequence[str], how: dict[str, Any]
) -> None:
    """Make the exports that are missing, and become the other program; with `only_print` print the commands.

    `given`: names of the options on the command line. `how`: root, offline, base, only_print, as_json.
    """
    if foreign := [name for name in given if name in OWN_ONLY]:
        options = ", ".join("--" + OWN_ONLY[name] for name in foreign)
        raise InputError(f"{options}: for --engine own only. Start {engine} by hand with the command of --print.")
    check_extra()
    from tunesmith.export.server_commands import llama_cpp_command, vllm_command
    from tunesmith.serve.http import bind
    from tunesmith.serve.middleware import read_keys

    program = PROGRAMS[engine]
    path = shutil.which(program) or _in_environment(program)
    if path is None and not how["only_print"]:
        raise InputError(
            f"--engine {engine}: {program} is not installed here. Install {engine}; --print shows the command for "
            "another machine."
        )
    keys, _ = read_keys(access.key_file, os.environ)
    if len(keys) > 1:
        raise InputError(f"--key-file: holds {len(keys)} keys, and {program} takes one.")
    bound = bind(access.host, access.port)
    bound.socket.close()
    refuse_open_door(access, bound, has_key=bool(keys))
    where = {"host": bound.host, "port": bound.port, **{name: how[name] for name in ("root", "offline", "base")}}
    command = (vllm_command if engine == "vllm" else llama_cpp_command)(targets, **where)
    if path is None or how["only_print"]:
        _print(command, KEY_VARIABLES[program] if keys else None, as_json=how["as_json"])
        return
    _export(command, offline=how["offline"])
    names = ", ".join(command.names)
    console(stderr=True).print(visible(f"served by {program} as {names}: {shlex.join(command.words)}"))
    environment = {**os.environ, **({KEY_VARIABLES[program]: keys[0]} if keys else {})}
    # The other program replaces this one: signals and the exit code are its own.
    os.execve(path, command.words, environment)


def _in_environment(name: str) -> str | None:
    """A program of this Python environment, which may not be activated."""
    path = Path(sys.executable).with_name(name)
    return str(path) if os.access(path, os.X_OK) else None


def _print(command: ServerCommand, key_variable: str | None, *, as_json: bool) -> None:
    missing = [
        ["tunesmith", "export", str(need.run.path), "--to", need.target]
        for need in command.needs
        if not need.folder.exists()
    ]
    if as_json:
        json_line({"kind": "command", "first": missing, "words": command.words, "names": command.names})
        return
    key = f'{key_variable}="$TUNESMITH_API_KEY" ' if key_variable else ""
    for line in (*map(shlex.join, missing), key + shlex.join(command.words)):
        console().print(line, soft_wrap=True)


def _export(command: ServerCommand, *, offline: bool) -> None:
    from tunesmith.cli.display import phases
    from tunesmith.cli.export import PHASES
    from tunesmith.export.export_run import export_run

    for need in command.needs:
        if not need.folder.exists():
            with phases(console(stderr=True), PHASES) as progress:
                export_run(need.run, need.target, offline=offline, on_progress=progress)
