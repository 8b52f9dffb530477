"""`tunesmith serve --engine vllm|llama.cpp`: another program's own server, started with what was tuned."""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tunesmith.cli.render import visible
from tunesmith.cli.serving import Access, check_extra, refuse_open_door
from tunesmith.cli.streams import console, json_line
from tunesmith.errors import InputError

if TYPE_CHECKING:
    from tunesmith.export.server_commands import ServerCommand

Program = Literal["vllm", "llama-server", "llama_cpp.server"]
ENGINES = ("own", "vllm", "llama.cpp")
KEY_VARIABLES = {"vllm": "VLLM_API_KEY", "llama-server": "LLAMA_API_KEY", "llama_cpp.server": "API_KEY"}
"""Where each program reads its key: an argument could be seen by every user of the machine."""
_INSTALL = {
    "vllm": "vllm is not installed here. Run pip install vllm on a machine with a GPU",
    "llama.cpp": "neither llama-server nor the package llama-cpp-python is installed here. Install llama.cpp, or run "
    "pip install 'llama-cpp-python[server]'",
}

_SERVER_NEEDS = ("sse_starlette", "starlette_context", "pydantic_settings")
"""What llama-cpp-python brings with its extra `server` alone."""
PENALTY = (
    "llama_cpp.server makes tokens that stand already less likely (repeat_penalty 1.1), which no other server does: "
    "answers are those of the run where a request says repeat_penalty 1"
)

OWN_ONLY = {
    "streams": "streams", "queue": "queue", "max_prompt_tokens": "max-prompt-tokens", "max_new_tokens": "max-tokens",
    "memory_gib": "memory-gib", "threads": "threads", "grace": "grace", "allow_host": "allow-host",
    "allow_origin": "allow-origin",
}  # fmt: skip
"""Options that another program does not take from here."""


def serve_elsewhere(
    engine: str, targets: Sequence[str], access: Access, given: Sequence[str], how: dict[str, Any]
) -> None:
    """Export what is missing, and become the other program; with `only_print` nothing is done but to say how.

    `given`: names of what the command line says, of which not all is for another program. `how`: root, offline,
    base, only_print, as_json.
    """
    if foreign := [name for name in given if name in OWN_ONLY]:
        options = ", ".join("--" + OWN_ONLY[name] for name in foreign)
        raise InputError(f"{options}: for --engine own alone. {engine} has its own: start it by hand from --print.")
    check_extra()
    from tunesmith.export.server_commands import llama_cpp_command, vllm_command
    from tunesmith.serve.keys import read_keys
    from tunesmith.serve.listening import bind

    program = _program(engine, must_be_there=not how["only_print"])
    keys, _ = read_keys(access.key_file, os.environ)
    if len(keys) > 1:
        raise InputError(f"--key-file: holds {len(keys)} keys, and {program} takes one.")
    bound = bind(access.host, access.port)
    bound.socket.close()
    refuse_open_door(access, bound, has_key=bool(keys))
    where = {
        "host": bound.host,
        "port": bound.port,
        "root": how["root"],
        "offline": how["offline"],
        "base": how["base"],
    }
    if program == "vllm":
        command = vllm_command(targets, **where)
    else:
        command = llama_cpp_command(targets, program, sys.executable, **where)
    if how["only_print"]:
        _print(command, program, has_key=bool(keys), as_json=how["as_json"])
    else:
        _become(command, program, keys, offline=how["offline"])


def _become(command: ServerCommand, program: Program, keys: Sequence[str], *, offline: bool) -> None:
    _export(command, offline=offline)
    screen = console(stderr=True)
    screen.print(visible(f"served by {program} as {', '.join(command.names)}: {shlex.join(command.words)}"))
    if program == "llama_cpp.server":
        screen.print(PENALTY, style="bright_black")
    path = shutil.which(command.words[0]) or _beside_python(command.words[0])
    assert path is not None, "it was there a moment ago"
    environment = {**os.environ, **({KEY_VARIABLES[program]: keys[0]} if keys else {})}
    # The other program takes this one's place: signals and its exit code are its own.
    os.execve(path, command.words, environment)


def _program(engine: str, *, must_be_there: bool) -> Program:
    found: Program | None
    if engine == "vllm":
        found = "vllm" if shutil.which("vllm") or _beside_python("vllm") else None
    else:
        found = "llama-server" if shutil.which("llama-server") else None
        if found is None and importlib.util.find_spec("llama_cpp") is not None:
            found = "llama_cpp.server"
            missing = [name for name in _SERVER_NEEDS if importlib.util.find_spec(name) is None]
            if missing and must_be_there:
                raise InputError(
                    f"--engine llama.cpp: llama-cpp-python is here without {', '.join(missing)}, its server's needs. "
                    "Install llama.cpp, or run pip install 'llama-cpp-python[server]'."
                )
    if found is None and must_be_there:
        raise InputError(f"--engine {engine}: {_INSTALL[engine]}. --print shows the command for another machine.")
    return found or ("vllm" if engine == "vllm" else "llama-server")


def _beside_python(name: str) -> str | None:
    """A program of this environment, which need not be activated."""
    path = Path(sys.executable).with_name(name)
    return str(path) if os.access(path, os.X_OK) else None


def _print(command: ServerCommand, program: str, *, has_key: bool, as_json: bool) -> None:
    exports = [["tunesmith", "export", str(need.run.path), "--to", need.target] for need in command.needs]
    missing = [words for words, need in zip(exports, command.needs, strict=True) if not need.folder.exists()]
    if as_json:
        json_line({"kind": "command", "first": missing, "words": command.words, "names": command.names})
        return
    screen = console()
    for words in missing:
        screen.print(shlex.join(words), soft_wrap=True)
    key = f'{KEY_VARIABLES[program]}="$TUNESMITH_API_KEY" ' if has_key else ""
    screen.print(key + shlex.join(command.words), soft_wrap=True)


def _export(command: ServerCommand, *, offline: bool) -> None:
    from tunesmith.cli.display import phases
    from tunesmith.cli.export import PHASES
    from tunesmith.export.export_run import export_run

    for need in command.needs:
        if not need.folder.exists():
            with phases(console(stderr=True), PHASES) as progress:
                export_run(need.run, need.target, offline=offline, on_progress=progress)
