"""Other programs' servers, by executables that only say how they were called."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from export.exports import finished
from export.test_gguf_adapter import of_gguf
from tunesmith.cli import other_servers
from tunesmith.cli.app import app
from tunesmith.errors import InputError
from tunesmith.export.server_commands import llama_cpp_command, vllm_command
from tunesmith.runs.folder import Run

SAYS = """#!{python}
import json, os, sys
keys = [name for name in ("VLLM_API_KEY", "LLAMA_API_KEY", "API_KEY") if name in os.environ]
print(json.dumps({{"words": sys.argv, "key": [os.environ[name] for name in keys]}}))
sys.exit(7)
"""
KEY = "k-0123456789abcdef-0123456789abcdef"


def fake(folder: Path, name: str) -> dict[str, str]:
    """The environment in which a program of this name is found, and only says how it was called."""
    folder.mkdir(exist_ok=True)
    program = folder / name
    program.write_text(SAYS.format(python=sys.executable))
    program.chmod(0o755)
    paths = [str(Path(__file__).parents[2] / "src")]
    return {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": os.pathsep.join(paths)}


def called(run: Run, engine: str, environment: dict[str, str]) -> tuple[Any, str]:
    words = [sys.executable, "-m", "tunesmith", "serve", str(run.path), "--engine", engine, "--port", "0"]
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 7, done.stderr
    return json.loads(done.stdout), done.stderr


def option(words: list[str], name: str) -> str:
    return words[words.index(name) + 1]


def test_vllm_gets_the_exported_adapter_and_the_flags_it_needs(tmp_path: Path) -> None:
    run = finished("chat")
    environment = {**fake(tmp_path / "bin", "vllm"), "TUNESMITH_API_KEY": KEY}
    told, said = called(run, "vllm", environment)
    words = told["words"]
    adapter = run.path.absolute() / "exports" / "adapter"
    assert json.loads((adapter / "verify.json").read_text())["verified"] is True
    assert words[1:3] == ["serve", str(Path(run.recipe().model).absolute())]
    assert "--enable-lora" in words
    assert option(words, "--max-lora-rank") == "8"  # the least that vLLM has for a rank of 4
    assert option(words, "--lora-modules") == f"{run.path.name}={adapter}"
    assert option(words, "--tokenizer") == option(words, "--generation-config") == str(adapter)
    assert Path(option(words, "--chat-template")).read_text() == (run.adapter_path / "chat_template.jinja").read_text()
    assert option(words, "--dtype") == "float32"
    assert option(words, "--host") == "127.0.0.1"
    assert told["key"] == [KEY]
    assert KEY not in " ".join(words) + said


def test_llama_server_gets_the_run_as_a_gguf() -> None:
    run = finished("chat")
    result = CliRunner().invoke(app, ["serve", str(run.path), "--engine", "llama.cpp", "--print", "--port", "0"])
    assert result.exit_code == 0, result.output
    export, command = result.stdout.splitlines()
    assert export == f"tunesmith export {run.path} --to gguf"
    words = command.split()
    assert option(words, "--model").endswith(f"exports/gguf-f16/{run.path.name}-f16.gguf")
    assert option(words, "--alias") == run.path.name
    assert "--jinja" in words


def test_print_shows_what_would_be_done_and_does_nothing() -> None:
    run = finished("full")
    result = CliRunner().invoke(app, ["serve", str(run.path), "--engine", "vllm", "--print", "--port", "0"])
    assert result.exit_code == 0, result.output
    export, command = result.stdout.splitlines()
    assert export == f"tunesmith export {run.path} --to merged"
    assert command.startswith(f"vllm serve {run.path.absolute()}/exports/merged --host 127.0.0.1 --port ")
    assert command.endswith(f"--served-model-name {run.path.name} --dtype float32")
    assert not (run.path / "exports").exists()


def test_a_run_of_a_gguf_is_its_adapter_on_that_file_where_templates_can_be_given(tmp_path: Path) -> None:
    gguf_run = of_gguf(tmp_path / "gguf")
    where: dict[str, Any] = {"host": "127.0.0.1", "port": 1, "root": gguf_run.path.parent, "offline": True}
    start = llama_cpp_command([str(gguf_run.path)], **where)
    assert option(start.words, "--model") == str(Path(gguf_run.recipe().model).absolute())
    assert option(start.words, "--lora").endswith("-lora-f16.gguf")
    assert option(start.words, "--chat-template-file").endswith("chat_template.jinja")
    assert [need.target for need in start.needs] == ["gguf-adapter"]
    assert [need.target for need in vllm_command([str(gguf_run.path)], **where).needs] == ["merged"]


# trap: S9


def names_stay_words(run: Run) -> None:
    where: dict[str, Any] = {"host": "127.0.0.1", "port": 1, "root": run.path.parent, "offline": True}
    for name in ("-h", "--trust-remote-code", "a=b", "a b", "a,b"):
        link = run.path.parent / name
        link.symlink_to(run.path)
        try:
            with pytest.raises(InputError, match="its name cannot be a word"):
                vllm_command([str(link)], **where)
        finally:
            link.unlink()


def test_a_name_is_never_read_as_an_option(monkeypatch: pytest.MonkeyPatch) -> None:
    names_stay_words(finished("chat"))
    monkeypatch.setattr("tunesmith.export.server_commands._name", lambda result: result.run.path.name)
    with pytest.raises(pytest.fail.Exception):
        names_stay_words(finished("chat"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--engine", "vllm"], "vllm is not installed here"),
        (["--engine", "llama.cpp"], "llama-server is not installed here"),
        (["--engine", "sglang"], "there is no such engine"),
        (["--print"], "--engine vllm or llama.cpp"),
        (["--engine", "vllm", "--streams", "4", "--grace", "3"], "--streams, --grace: for --engine own only"),
        (["--engine", "vllm", "--print", "--host", "0.0.0.0"], "needs an API key"),
        (["--engine", "llama.cpp", "--print", "other"], "llama.cpp serves one model"),
        (["--engine", "vllm", "--print", "nowhere/model", "--offline"], "nowhere/model"),
    ],
)
def test_refused_with_the_reason(words: list[str], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(other_servers.shutil, "which", lambda name: None)
    monkeypatch.setattr(other_servers, "_in_environment", lambda name: None)
    first = ["serve", *([] if "nowhere/model" in words else [str(finished("chat").path)])]
    result = CliRunner().invoke(app, [*first, *words, "--port", "0"])
    assert result.exit_code == 2
    assert said in " ".join(result.output.split())


def test_heads_are_served_here() -> None:
    run = finished("classify-encoder")
    result = CliRunner().invoke(app, ["serve", str(run.path), "--engine", "vllm", "--print", "--port", "0"])
    assert result.exit_code == 2
    assert "tuned for classify. Use --engine own" in " ".join(result.output.split())
