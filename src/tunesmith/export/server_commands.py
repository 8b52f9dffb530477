"""The command that starts another server with a run: vLLM or llama.cpp."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tunesmith.errors import InputError
from tunesmith.export.adapter import gguf_adapter_file, not_for_vllm, vllm_rank
from tunesmith.export.gguf import file_name
from tunesmith.export.llama_cpp import TEMPLATE
from tunesmith.export.run_result import RunResult, open_result
from tunesmith.export.target import ExportOptions
from tunesmith.export.targets import default_folder
from tunesmith.inference.load import refuse_needless
from tunesmith.models.resolve_model import resolve_model
from tunesmith.runs.folder import Run, is_run


@dataclass(frozen=True)
class NeededExport:
    """An export that the command needs."""

    run: Run
    target: str

    @property
    def folder(self) -> Path:
        return default_folder(self.run, self.target).absolute()


@dataclass(frozen=True)
class ServerCommand:
    """Command line of another server, and the exports it needs."""

    words: list[str]
    needs: list[NeededExport]
    names: list[str]
    """Names of the models there."""


def vllm_command(
    targets: Sequence[str], *, host: str, port: int, root: Path, offline: bool, base: str | None = None
) -> ServerCommand:
    """Adapters on their base; or one model, or one run without an adapter.

    Raises InputError for what vLLM cannot serve, naming the run and the reason.
    """
    address = ["--host", host, "--port", str(port)]
    if not is_run(targets[0], root):
        _refuse_others(targets, "vLLM serves one model, or the runs of one base")
        refuse_needless(base, targets[0])
        located = resolve_model(targets[0], offline=offline)
        if located.is_gguf:
            raise InputError(f"{targets[0]}: vLLM reads GGUF files badly. Use --engine llama.cpp.")
        words = ["vllm", "serve", str(located.path.absolute()), *address, "--served-model-name", targets[0]]
        return ServerCommand(words, [], [targets[0]])
    results = [_open_writer(target, root, offline, base, "vLLM") for target in targets]
    first = results[0]
    if len(results) == 1 and (not first.is_adapter or not_for_vllm(first, first.adapter_config)):
        need = NeededExport(first.run, "merged")
        words = ["vllm", "serve", str(need.folder), *address, "--served-model-name", _name(first)]
        return ServerCommand([*words, "--dtype", first.recipe.precision], [need], [_name(first)])
    for result in results:
        why = not_for_vllm(result, result.adapter_config) if result.is_adapter else "it has no adapter"
        if not why and result.base_hashes != first.base_hashes:
            why = f"it is tuned from another base than {first.run.path}"
        if not why and _tokenization(result) != _tokenization(first):
            why = f"it has another tokenizer or template than {first.run.path}, and vLLM has one for all"
        if why:
            raise InputError(f"{result.run.path}: vLLM cannot serve it with other runs: {why}. Serve it alone.")
    needs = [NeededExport(result.run, "adapter") for result in results]
    folder = needs[0].folder
    rank = max(vllm_rank(result.adapter_config) or 0 for result in results)
    words = ["vllm", "serve", str(first.base.path.absolute()), *address]
    words += ["--served-model-name", first.base.name, "--dtype", first.recipe.precision]
    # Template, end tokens and control tokens are those of the run; the base may have others.
    words += ["--tokenizer", str(folder), "--generation-config", str(folder)]
    if (first.folder / TEMPLATE).is_file():  # otherwise it is in the tokenizer's own file
        words += ["--chat-template", str(folder / TEMPLATE)]
    words += ["--enable-lora", "--max-lora-rank", str(rank), "--max-loras", str(len(results)), "--lora-modules"]
    words += [f"{_name(result)}={need.folder}" for result, need in zip(results, needs, strict=True)]
    return ServerCommand(words, needs, [*map(_name, results), first.base.name])


def llama_cpp_command(
    targets: Sequence[str], *, host: str, port: int, root: Path, offline: bool, base: str | None = None
) -> ServerCommand:
    """One run, or one GGUF file. A run whose base is a GGUF is served as that file and its adapter, other runs as F16.

    Raises InputError for what llama.cpp cannot serve.
    """
    _refuse_others(targets, "llama.cpp serves one model")
    needs, more = [], []
    if not is_run(targets[0], root):
        refuse_needless(base, targets[0])
        located = resolve_model(targets[0], offline=offline)
        if not located.is_gguf:
            raise InputError(f"{targets[0]}: llama.cpp reads GGUF files, and runs, which are exported for it.")
        name, path = located.path.stem, located.path
    else:
        result = _open_writer(targets[0], root, offline, base, "llama.cpp")
        name, options = _name(result), ExportOptions()
        needs = [NeededExport(result.run, "gguf-adapter" if result.is_adapter and result.base.is_gguf else "gguf")]
        path = needs[0].folder / file_name(result, options)
        if needs[0].target == "gguf-adapter":
            path, more = result.base.path, ["--lora", str(needs[0].folder / gguf_adapter_file(result, options))]
            if isinstance(result.tokenizer.chat_template, str):
                more += ["--chat-template-file", str(needs[0].folder / TEMPLATE)]
    words = ["llama-server", "--model", str(path.absolute()), "--alias", name, "--jinja", "--host", host]
    return ServerCommand([*words, "--port", str(port), *more], needs, [name])


def _refuse_others(targets: Sequence[str], rule: str) -> None:
    if len(targets) > 1:
        raise InputError(f"{', '.join(targets)}: {rule}. Give one, or serve them with --engine own.")


def _open_writer(target: str, root: Path, offline: bool, base: str | None, server: str) -> RunResult:
    """The result of a run that writes text. Raises InputError for other runs."""
    result = open_result(Run.open(target, root, base=base), offline=offline)
    if result.head != "next_token" or result.kind != "causal":
        raise InputError(
            f"{result.run.path}: {server} is for decoder-only models that write text, and this run is tuned for "
            f"{result.recipe.task}. Use --engine own."
        )
    return result


def _name(result: RunResult) -> str:
    """The run's name, which becomes a word of another program's command line."""
    name = result.run.path.absolute().name
    if name.startswith("-") or any(mark in name for mark in "=, \t\n"):
        raise InputError(f"{result.run.path}: its name cannot be a word of another program's command line. Rename it.")
    return name


def _tokenization(result: RunResult) -> tuple[str, object]:
    """Tokenizer and template."""
    return str(result.tokenizer.backend_tokenizer.to_str()), result.tokenizer.chat_template
