"""What a person can say about an export, and what an export says of itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from tunesmith.export.asked import Asks
    from tunesmith.export.source import Source

MERGE_INTO = ("original", "dequantized")
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True, slots=True)
class Options:
    """Choices of an export; a target refuses those that it does not read."""

    dtype: str = "auto"
    """merged: what the weights are cast to. auto: what the base is stored in, bfloat16 where that was a GGUF."""
    quant: str = "f16"
    """gguf, ollama, gguf-adapter: how matrices are stored."""
    bake_scale: bool = False
    """adapter: write alpha so that programs which ignore use_rslora scale right."""
    pre: str | None = None
    """gguf, ollama: llama.cpp's name of the rule that splits text, instead of what was found."""
    merge_into: str = "original"
    """merged, gguf, ollama, onnx of a base that was quantised for tuning: the weights it had before, or those that the
    quantised ones unpack to, which are what was tuned on."""
    license: str | None = None
    """Of the model card."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """How far an export may be from the tuned model."""

    kl: float
    """Mean KL divergence of the next token or class, in nats."""
    loss: float
    """Rise or fall of the held-out loss."""
    carried: float
    """How far the share of tuning's effect that is in the export may be from 1."""
    weights: float
    """How far any weight may be from base plus delta, over its size."""
    cosine: float
    """Mean of 1 − cosine of the vectors of texts."""
    loss_may_fall: bool = False
    """A lower held-out loss is no fault: the base is a better one than that which was tuned on."""


EXACT = Bounds(kl=1e-6, loss=1e-4, carried=0.01, weights=1e-5, cosine=1e-9)
"""The same numbers in float32: 1e-4 on logits and less is noise of the order of additions."""
ROUNDED = Bounds(kl=5e-3, loss=0.02, carried=0.2, weights=8e-3, cosine=1e-4)
"""Weights of 16 bits. Measured: a merge of SmolLM2 into bfloat16 has KL 7e-4, and rounding moves a weight by 1.1e-3 of
its size. 0.02 nats of loss: trap A2 of docs/correctness.md. After three steps of tuning, when rounding is as large as
6 % of what they changed, it has been seen to look like 6 % of the effect."""
GGUF_EXACT = Bounds(kl=1e-3, loss=0.02, carried=0.05, weights=2e-3, cosine=1e-4)
"""F32 and F16 in a GGUF (trap A14)."""
QUANTIZED = Bounds(kl=2e-2, loss=0.05, carried=0.2, weights=3e-2, cosine=1e-3)
"""8 bits: blocks of 32 share a scale."""
SIX_BITS = Bounds(kl=5e-2, loss=0.05, carried=0.2, weights=6e-2, cosine=2e-3)
FIVE_BITS = Bounds(kl=0.25, loss=0.15, carried=0.3, weights=0.2, cosine=0.02)
FOUR_BITS = Bounds(kl=0.5, loss=0.2, carried=0.3, weights=0.25, cosine=0.1)
"""About twice what was measured of SmolLM2-135M, which such kinds hurt more than larger models: of q4_0 KL 0.22, loss
+0.10, 94 % carried, weights 0.14; of q5_k_m, most rows as Q5_1, KL 0.11, loss +0.06, 113 %, 0.09. Those of q6_k stand
between its neighbours'. A lost adapter carries nothing whatever the kind."""

UNQUANTIZED_KL = 0.5
"""Nats: an adapter that was tuned on a quantised base, on the base as it was. Its loss says whether that is as good."""

Written = Sequence[str]
"""What to say of what was written."""


@dataclass(frozen=True, slots=True)
class Export:
    """One target."""

    name: str
    doc: str
    check: Callable[[Source, Options], list[str]]
    """(source, options) -> notes. Raises for what this target cannot carry, before weights are loaded."""
    write: Callable[[Source, Path, Options], list[str]]
    """(source, folder, options) -> notes. Fills an empty folder."""
    num_bytes: Callable[[Source, Options], int]
    """About what it takes on disk while it is written, at most."""
    bounds: Callable[[Source, Options], Bounds]
    loader: Literal["merged", "adapter", "gguf", "gguf-adapter", "onnx"]
    """How the proof loads it."""
    rounds_less: Callable[[Options], str]
    """The option that rounds less, empty where nothing does."""
    card: Callable[[Source, Path, Options], dict[str, Any]]
    """Fields of the card's head, and under "use" how it is used."""
    reads: tuple[str, ...]
    """Options that it reads beside the licence."""
    quants: tuple[str, ...] = ()
    """What --quant can be."""
    asks: Callable[[Source], Asks] = lambda source: source.head
    """What the proof asks both models: what their head says, or of an encoder that leaves it behind the vector of a
    text."""
