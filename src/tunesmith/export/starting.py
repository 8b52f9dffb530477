"""The command that starts another server with what was tuned: vLLM, llama.cpp, or llama-cpp-python.

What each of them can serve is known before it is started: servers.py, gguf_models.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tunesmith.errors import InputError
from tunesmith.export.exporting import default_folder
from tunesmith.export.gguf_adapter import file_name as adapter_file
from tunesmith.export.gguf_file import file_name as gguf_file
from tunesmith.export.gguf_read import TEMPLATE
from tunesmith.export.options import Options
from tunesmith.export.servers import not_for_vllm, vllm_rank
from tunesmith.export.source import Source, open_source
from tunesmith.inference.load import refuse_needless
from tunesmith.models.resolve_model import resolve_model
from tunesmith.runs.folder import Run, is_run

LlamaServer = Literal["llama-server", "llama_cpp.server"]


@dataclass(frozen=True)
class Needed:
    """An export that has to be there."""

    run: Run
    target: str

    @property
    def folder(self) -> Path:
        return default_folder(self.run, self.target).absolute()


@dataclass(frozen=True)
class Start:
    """How another server is started."""

    words: list[str]
    needs: list[Needed]
    names: list[str]
    """By which the models are asked there."""


def start_vllm(
    targets: Sequence[str], *, host: str, port: int, root: Path, offline: bool, base: str | None = None
) -> Start:
    """Adapters on their base; or one model, or one run whose every weight was tuned.

    Raises InputError for what vLLM cannot serve, naming the run and the reason.
    """
    address = ["--host", host, "--port", str(port)]
    if not is_run(targets[0], root):
        _alone(targets, "vLLM serves one model, or the runs of one base")
        refuse_needless(base, targets[0])
        located = resolve_model(targets[0], offline=offline)
        if located.is_gguf:
            raise InputError(f"{targets[0]}: vLLM reads no GGUF files well. Use --engine llama.cpp.")
        path = str(located.path.absolute())
        return Start(["vllm", "serve", path, *address, "--served-model-name", targets[0]], [], [targets[0]])
    sources = [open_source(Run.open(target, root, base=base), offline=offline) for target in targets]
    for source in sources:
        _check_writes(source, "vLLM")
    if len(sources) == 1 and (not sources[0].is_adapter or not_for_vllm(sources[0], sources[0].adapter_config)):
        need = Needed(sources[0].run, "merged")
        name = _name(sources[0])
        words = ["vllm", "serve", str(need.folder), *address, "--served-model-name", name]
        return Start([*words, "--dtype", sources[0].recipe.precision], [need], [name])
    return _adapters(sources, address)


def _adapters(sources: Sequence[Source], address: list[str]) -> Start:
    for source in sources:
        why = not_for_vllm(source, source.adapter_config) if source.is_adapter else "every weight of it was tuned"
        if why:
            raise InputError(f"{source.run.path}: vLLM cannot serve it beside others: {why}. Serve it alone.")
    first = sources[0]
    for source in sources[1:]:
        differs = {
            "is tuned from another base": source.base_hashes != first.base_hashes,
            "has another tokenizer or template, of which vLLM has one for all,": _text_of(source) != _text_of(first),
        }
        if found := [what for what, holds in differs.items() if holds]:
            raise InputError(f"{source.run.path}: {found[0]} than {first.run.path}. Serve each alone.")
    needs = [Needed(source.run, "adapter") for source in sources]
    tokenizer = str(needs[0].folder)
    rank = max(vllm_rank(source.adapter_config) or 0 for source in sources)
    modules = [f"{_name(source)}={need.folder}" for source, need in zip(sources, needs, strict=True)]
    words = ["vllm", "serve", str(first.base.path.absolute()), *address]
    words += ["--served-model-name", first.base.name, "--dtype", first.recipe.precision]
    # Template, end tokens and control tokens are the run's: those of the base may be others.
    words += ["--tokenizer", tokenizer, "--generation-config", tokenizer]
    if (first.result / TEMPLATE).is_file():  # else it stands in the tokenizer's own file
        words += ["--chat-template", str(needs[0].folder / TEMPLATE)]
    words += ["--enable-lora", "--max-lora-rank", str(rank), "--max-loras", str(len(sources)), "--lora-modules"]
    return Start([*words, *modules], needs, [*map(_name, sources), first.base.name])


def start_llama_cpp(
    targets: Sequence[str],
    program: LlamaServer,
    python: str,
    *,
    host: str,
    port: int,
    root: Path,
    offline: bool,
    base: str | None = None,
) -> Start:
    """One run, or one GGUF file.

    A run whose base is a GGUF file is served as that file with its adapter beside it where the program can read the
    run's own template then; others as a GGUF of f16. Raises InputError for what llama.cpp cannot serve.
    """
    _alone(targets, "llama.cpp serves one model by its name")
    address = ["--host", host, "--port", str(port)]
    if not is_run(targets[0], root):
        refuse_needless(base, targets[0])
        located = resolve_model(targets[0], offline=offline)
        if not located.is_gguf:
            raise InputError(f"{targets[0]}: llama.cpp reads GGUF files, and runs, which are exported for it.")
        name = located.path.stem
        return Start([*_llama_words(program, python, located.path, name), *address], [], [name])
    source = open_source(Run.open(targets[0], root, base=base), offline=offline)
    _check_writes(source, "llama.cpp")
    name = _name(source)
    if program == "llama-server" and source.is_adapter and source.base.is_gguf:
        need = Needed(source.run, "gguf-adapter")
        words = [*_llama_words(program, python, source.base.path, name), *address]
        words += ["--lora", str(need.folder / adapter_file(source, Options()))]
        if isinstance(source.tokenizer.chat_template, str):
            words += ["--chat-template-file", str(need.folder / TEMPLATE)]
        return Start(words, [need], [name])
    need = Needed(source.run, "gguf")
    path = need.folder / gguf_file(source, Options())
    return Start([*_llama_words(program, python, path, name), *address], [need], [name])


def _llama_words(program: LlamaServer, python: str, model: Path, name: str) -> list[str]:
    path = str(model.absolute())
    if program == "llama-server":
        return ["llama-server", "--model", path, "--alias", name, "--jinja"]
    return [python, "-m", "llama_cpp.server", "--model", path, "--model_alias", name]


def _alone(targets: Sequence[str], rule: str) -> None:
    if len(targets) > 1:
        raise InputError(f"{', '.join(targets)}: {rule}. Give one, or serve them with --engine own.")


def _check_writes(source: Source, where: str) -> None:
    if source.head != "next_token" or source.kind != "causal":
        raise InputError(
            f"{source.run.path}: {where} is started here for models that go on with a text, and this one is tuned for "
            f"{source.recipe.task}. Use --engine own."
        )


def _name(source: Source) -> str:
    """The run's name, which goes to another program as a word of its command line."""
    name = source.run.path.absolute().name
    if name.startswith("-") or any(mark in name for mark in "=, \t\n"):
        raise InputError(f"{source.run.path}: its name cannot be a word of another program's command line. Rename it.")
    return name


def _text_of(source: Source) -> tuple[str, object]:
    """All that decides how a conversation becomes tokens."""
    return str(source.tokenizer.backend_tokenizer.to_str()), source.tokenizer.chat_template
