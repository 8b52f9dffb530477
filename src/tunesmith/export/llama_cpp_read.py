"""A GGUF asked by llama.cpp itself, through llama-cpp-python where that is installed.

Logits come from its own decoder at the places asked for; texts are split by its own tokenizer.
"""

# N targets, V vocabulary

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tunesmith.data.render import Renderer
from tunesmith.errors import ModelError
from tunesmith.export.asked import Asks, greedy
from tunesmith.export.gguf_encoders import ENCODERS, pooling_of
from tunesmith.export.gguf_read import TEMPLATE, read_tokenizer
from tunesmith.models.gguf import read_gguf
from tunesmith.models.modes import silence_transformers
from tunesmith.models.resolve_model import resolve_model
from tunesmith.recipe.schema import Recipe
from tunesmith.types import Batch, ModelKind

LLAMA_CPP = "llama.cpp"
"""Name of this way to load."""
MOST_AT_ONCE = 512
"""Tokens of one decoding, which bounds the memory that it takes."""
MOST_TOKENS = 8192
ROOM = 64
"""Tokens beside those of the longest row: an answer."""


def is_installed() -> bool:
    return find_spec("llama_cpp") is not None


def installed_version() -> str:
    try:
        return version("llama-cpp-python")
    except PackageNotFoundError:
        return "of an unknown version"


@dataclass(frozen=True)
class LlamaAsked:
    """An open model of llama.cpp."""

    llama: Any
    has_types: bool = False
    decoder_start: int | None = None

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def logits(self, batch: Batch) -> Tensor:
        ids, places = batch.ids_BT[0].tolist(), batch.predict_N.tolist()
        found: dict[int, Tensor] = {}
        for start in range(0, len(ids), MOST_AT_ONCE):
            part = ids[start : start + MOST_AT_ONCE]
            here = {place for place in places if start <= place < start + len(part)}
            self._decode(part, start, here)
            found |= {place: self._row(place - start) for place in here}
        return torch.stack([found[place] for place in places])

    def answers(self, renderer: Renderer, prompts: Sequence[Sequence[int]], *, num_tokens: int) -> list[str]:
        known = 0

        def next_v(ids: list[int]) -> Tensor:
            nonlocal known
            self._decode(ids[known:], known, {len(ids) - 1})
            known = len(ids)
            return self._row(-1)

        texts = []
        for prompt in prompts:
            known = 0
            texts.append(greedy(next_v, renderer, prompt, num_tokens=num_tokens))
        return texts

    def split(self, renderer: Renderer, texts: Sequence[str]) -> list[list[int]]:
        return [self.llama.tokenize(text.encode(), add_bos=False, special=False) for text in texts]

    def read(self, renderer: Renderer, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
        """Prompts as its tokenizer reads their text. One of sentencepiece cannot be given the blanks that it leaves
        out after control tokens, so that only fixed texts are compared there."""
        if self.llama.metadata.get("tokenizer.ggml.model") == "llama":
            return [list(prompt) for prompt in prompts]
        texts = [renderer.tokenizer.decode(list(prompt), clean_up_tokenization_spaces=False) for prompt in prompts]
        return [self.llama.tokenize(text.encode(), add_bos=False, special=True) for text in texts]

    def _decode(self, ids: Sequence[int], start: int, wanted: Set[int]) -> None:
        """Go on with a text whose first `start` tokens are known; the logits at the places `wanted` are kept."""
        import llama_cpp

        if start == 0:
            llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.llama.ctx), True)
        batch = llama_cpp.llama_batch_init(len(ids), 0, 1)
        try:
            batch.n_tokens = len(ids)
            for i, token_id in enumerate(ids):
                batch.token[i], batch.pos[i], batch.n_seq_id[i] = token_id, start + i, 1
                batch.seq_id[i][0] = 0
                # A decoding that is asked for nothing is an error there.
                batch.logits[i] = int(start + i in wanted or i == len(ids) - 1)
            if code := llama_cpp.llama_decode(self.llama.ctx, batch):
                raise ModelError(f"llama.cpp cannot decode a text of {start + len(ids)} tokens (code {code})")
        finally:
            llama_cpp.llama_batch_free(batch)

    def _row(self, i: int) -> Tensor:
        """[V] at place `i` of the last decoding; -1: its last."""
        import llama_cpp

        row = llama_cpp.llama_get_logits_ith(self.llama.ctx, i)
        return torch.from_numpy(np.ctypeslib.as_array(row, shape=(self.llama.n_vocab(),)).copy())


@dataclass(frozen=True)
class LlamaEncoderAsked(LlamaAsked):
    """An open encoder: one vector a text, or the scores of its classes."""

    num_outputs: int = 0

    def logits(self, batch: Batch) -> Tensor:
        import llama_cpp

        ids = batch.ids_BT[0].tolist()
        self._decode(ids, 0, set(range(len(ids))))
        row = llama_cpp.llama_get_embeddings_seq(self.llama.ctx, 0)
        return torch.from_numpy(np.ctypeslib.as_array(row, shape=(1, self.num_outputs)).copy())

    def split(self, renderer: Renderer, texts: Sequence[str]) -> list[list[int]]:
        """Without the marks around a text, where it puts them there."""
        marks = [renderer.tokenizer.cls_token_id, renderer.tokenizer.sep_token_id]
        whole = [self.llama.tokenize(text.encode(), add_bos=True, special=False) for text in texts]
        return [ids[1:-1] if [ids[0], ids[-1]] == marks else ids for ids in whole]


@dataclass(frozen=True)
class LlamaLoaded:
    """What was exported, ready to be asked."""

    llama: Any
    tokenizer: PreTrainedTokenizerBase
    by: str
    head: Asks = "next_token"
    kind: ModelKind = "causal"

    def asked(self, renderer: Renderer) -> LlamaAsked:
        import llama_cpp

        if self.kind == "causal":
            return LlamaAsked(self.llama)
        num_classes = llama_cpp.llama_model_n_cls_out(self.llama.model)
        num_outputs = self.llama.n_embd() if self.head == "vector" else num_classes
        return LlamaEncoderAsked(self.llama, num_outputs=num_outputs)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """None: it does not give them out."""
        yield from ()


def load_llama_cpp(folder: Path, recipe: Recipe, base: Path | None) -> LlamaLoaded:
    """The GGUF of an exported folder; where it is an adapter, on the file `base`. Raises ModelError where llama.cpp
    cannot load it."""
    import llama_cpp

    exported = next(folder.glob("*.gguf"))
    path = base or exported
    longest = recipe.data.max_tokens if isinstance(recipe.data.max_tokens, int) else MOST_TOKENS
    words: dict[str, Any] = {"n_ctx": longest + ROOM, "n_batch": MOST_AT_ONCE, "n_threads": torch.get_num_threads()}
    if base is not None:
        words["lora_path"] = str(exported)
    header = read_gguf(path)
    what: dict[str, Any] = {}
    if header.architecture in ENCODERS:  # which read a text at once
        whole = int(header.metadata[f"{header.architecture}.context_length"])
        words |= {"n_ctx": whole, "n_batch": whole, "n_ubatch": whole, "embedding": True}
        what = {"kind": "encoder", "head": "vector" if pooling_of(header) else "sequence"}
    by = f"llama.cpp (llama-cpp-python {installed_version()})"
    try:
        llama = llama_cpp.Llama(str(path), verbose=False, **words)
    except (ValueError, RuntimeError, AssertionError) as error:
        raise ModelError(f"{by} cannot load it: {error}. A newer one may; without one it is not asked.") from error
    with silence_transformers():
        tokenizer = read_tokenizer(resolve_model(str(path), offline=True))
    template = folder / TEMPLATE
    if template.is_file():
        tokenizer.chat_template = template.read_text("utf-8")
    return LlamaLoaded(llama, tokenizer, by, **what)
