"""llama.cpp through llama-cpp-python: its quantizer, which alone makes K types, and its own answers to a GGUF.

    python -m tunesmith.export.llama_cpp SOURCE OUT FILE_TYPE THREADS

quantizes the GGUF file SOURCE into OUT: in a process of its own, because the quantizer ends the process when it fails.
"""

# N targets, V vocabulary

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence, Set
from dataclasses import dataclass, field
from errno import ENOSPC
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tunesmith.environment import for_child
from tunesmith.errors import ExportError, ModelError
from tunesmith.export.gguf_tokenizer import read_tokenizer
from tunesmith.export.target import ExportedModel
from tunesmith.models.modes import silence_transformers
from tunesmith.models.resolve_model import resolve_model
from tunesmith.recipe.schema import Recipe
from tunesmith.types import Batch

TIMEOUT_S = 3600.0
_MAX_BATCH = 512
"""Tokens of one decoding, which bounds its memory."""
_MAX_TOKENS = 8192
_ANSWER_ROOM = 64
_LOG_ERROR = 4
"""ggml's number of this log level."""


def is_installed() -> bool:
    return find_spec("llama_cpp") is not None


def run_module(module: str, *words: str, what: str) -> None:
    """Run a module of the package in a new process, offline. Raises ExportError with its last line of stderr, after
    `what`."""
    environment = for_child(HF_HUB_OFFLINE="1")
    command = [sys.executable, "-m", module, *words]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired as error:
        raise ExportError(f"{what}: not done within {TIMEOUT_S / 60:.0f} minutes.") from error
    if done.returncode != 0:
        last = [line for line in done.stderr.splitlines() if line.strip()][-1:] or [f"exit code {done.returncode}"]
        raise ExportError(f"{what}: {last[0][:600]}")


def requantize(source: Path, out: Path, *, file_type: int, threads: int) -> None:
    """Write the GGUF `source` as `out` with matrices of llama.cpp's `file_type`.

    Raises ExportError with the quantizer's own message; OSError if the disk is full.
    """
    words = (str(source), str(out), str(file_type), str(threads))
    try:
        run_module("tunesmith.export.llama_cpp", *words, what="llama.cpp's quantizer failed")
    except ExportError as error:
        written = out.stat().st_size if out.exists() else 0
        # The quantizer says only that writing failed. Its output is at most as large as its input.
        if shutil.disk_usage(out.parent).free < source.stat().st_size - written:
            raise OSError(ENOSPC, os.strerror(ENOSPC), str(out)) from error
        raise


def _quantize(source: str, out: str, file_type: str, threads: str) -> None:
    import llama_cpp

    errors: list[str] = []

    def keep(level: int, text: bytes, data: object) -> None:
        if level == _LOG_ERROR:
            errors.append(text.decode(errors="replace").strip())

    callback = llama_cpp.llama_log_callback(keep)
    llama_cpp.llama_log_set(callback, None)
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype, settings.nthread = int(file_type), int(threads)
    if code := llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(out), settings):
        sys.exit("; ".join(errors) or f"it stopped with code {code}")


@dataclass(frozen=True)
class LlamaCppModel(ExportedModel):
    """A GGUF loaded by llama.cpp. Logits come from its decoder, tokens from its own tokenizer."""

    llama: Any
    decoded: list[int] = field(default_factory=list)
    """The tokens in its cache."""

    def logits(self, batch: Batch) -> Tensor:
        ids, places = batch.ids_BT[0].tolist(), batch.predict_N.tolist()
        found: dict[int, Tensor] = {}
        for start in range(0, len(ids), _MAX_BATCH):
            part = ids[start : start + _MAX_BATCH]
            here = {place for place in places if start <= place < start + len(part)}
            self._decode(part, start, here)
            found |= {place: self._row(place - start) for place in here}
        return torch.stack([found[place] for place in places])

    def next_logits(self, ids: list[int]) -> Tensor:
        known = len(self.decoded)
        if known >= len(ids) or self.decoded != ids[:known]:
            known = 0
        for start in range(known, len(ids), _MAX_BATCH):
            self._decode(ids[start : start + _MAX_BATCH], start, set())
        return self._row(-1)

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.llama.tokenize(text.encode(), add_bos=False, special=False) for text in texts]

    def retokenize(self, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
        # A sentencepiece tokenizer of llama.cpp drops spaces after control tokens: only fixed texts are compared there.
        if self.llama.metadata.get("tokenizer.ggml.model") == "llama":
            return super().retokenize(prompts)
        texts = [self.tokenizer.decode(list(prompt), clean_up_tokenization_spaces=False) for prompt in prompts]
        return [self.llama.tokenize(text.encode(), add_bos=False, special=True) for text in texts]

    def _decode(self, ids: Sequence[int], start: int, wanted: Set[int]) -> None:
        """Decode tokens at places `start`, …, keeping the logits at `wanted` and at the last; 0 begins a new text."""
        import llama_cpp

        self.decoded[start:] = ids
        if start == 0:
            llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.llama.ctx), True)
        batch = llama_cpp.llama_batch_init(len(ids), 0, 1)
        try:
            batch.n_tokens = len(ids)
            for i, token_id in enumerate(ids):
                batch.token[i], batch.pos[i], batch.n_seq_id[i] = token_id, start + i, 1
                batch.seq_id[i][0] = 0
                batch.logits[i] = int(start + i in wanted or i == len(ids) - 1)
            if code := llama_cpp.llama_decode(self.llama.ctx, batch):
                raise ModelError(f"llama.cpp cannot decode a text of {start + len(ids)} tokens (code {code})")
        finally:
            llama_cpp.llama_batch_free(batch)

    def _row(self, i: int) -> Tensor:
        """Logits [V] at place `i` of the last decoding; -1: its last."""
        import llama_cpp

        row = llama_cpp.llama_get_logits_ith(self.llama.ctx, i)
        return torch.from_numpy(np.ctypeslib.as_array(row, shape=(self.llama.n_vocab(),)).copy())


def load_in_llama_cpp(folder: Path, recipe: Recipe) -> LlamaCppModel:
    """The GGUF in `folder`. Raises ModelError if llama.cpp cannot load it."""
    import llama_cpp

    path = next(folder.glob("*.gguf"))
    longest = recipe.data.max_tokens if isinstance(recipe.data.max_tokens, int) else _MAX_TOKENS
    settings: dict[str, Any] = {"n_ctx": longest + _ANSWER_ROOM, "n_batch": _MAX_BATCH}
    try:
        by = f"llama.cpp (llama-cpp-python {version('llama-cpp-python')})"
    except PackageNotFoundError:
        by = "llama.cpp"
    try:
        llama = llama_cpp.Llama(str(path), verbose=False, n_threads=torch.get_num_threads(), **settings)
    except (ValueError, RuntimeError, AssertionError) as error:
        raise ModelError(f"{by} cannot load it: {error}. Install a newer one, or remove it to skip it.") from error
    with silence_transformers():
        tokenizer = read_tokenizer(resolve_model(str(path), offline=True))
    return LlamaCppModel(tokenizer, "causal", "next_token", by, llama)


if __name__ == "__main__":
    _quantize(*sys.argv[1:])
