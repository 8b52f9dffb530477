"""A step of LoRA on an 8B model, walked on tensors without numbers: operations, bytes, products, and the tokens that
they allow an H100 in a second.

    python -m benchmarks roofline

Each operation takes as long as its products, or the bytes that it reads and writes, whichever is longer; views take
nothing. The rates are those that such operations reach, not the makers' peaks.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.gpu_models import EIGHT_BILLION
from tunesmith.methods import lora
from tunesmith.models import attention, card_kernels, cuda_attention, fast_layers, fused_loss, linear_nodes, rms_norm
from tunesmith.models.attention import use_packed_attention
from tunesmith.models.fast_layers import use_fast_layers
from tunesmith.models.forward import hidden_at_targets
from tunesmith.models.segments import AttentionOptions, Segments
from tunesmith.recipe.methods import LoraMethod
from tunesmith.types import Batch

PRODUCTS, ATTENTION, BANDWIDTH = 640e12, 310e12, 2.8e12
"""Operations a second that large products and FlashAttention 2 reach on an H100 in bfloat16, and bytes a second."""
NO_KERNEL = {"aten::empty", "aten::new_empty", "aten::empty_like", "aten::resize_", "aten::_unsafe_view"}
"""What is no view by its schema, but moves no bytes: memory is taken, or a shape is written."""
NODES = {"rms_norm": "norms", "tunesmith::gate": "silu · mul", "tunesmith::rotate": "rotations"}
"""Parts by a word of their operators, where a node computes them."""
THIN = 64
"""Inner or outer size up to which a product is that of an adapter."""
REVIEWED = {
    "products": "337–381 (frozen, forward and input gradient)",
    "output layer and loss": "40",
    "attention": "100",
    "thin products": "80–110 (adapters)",
    "norms": "65–76",
    "silu · mul": "38",
    "rotations": "22",
    "other operations": "24–28 (residuals 16–20, rest 8)",
}
"""Milliseconds by part as they were estimated by hand from the operations, at rank 16 and rows of 4,096 tokens."""


@dataclass
class Part:
    """What some operations need."""

    count: int = 0
    operations: float = 0.0
    bytes: float = 0.0
    seconds: float = 0.0


@dataclass
class Counted(TorchDispatchMode):
    """Adds up every operation that starts a kernel."""

    rows: Sequence[int]
    vocabulary: int
    fused: bool = True
    """Whether `card_kernels` are a kernel each, as torch.compile makes them, or their operations one by one."""
    parts: dict[str, Part] = field(default_factory=lambda: defaultdict(Part))

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "tunesmith" and not self.fused:
            with self:
                return card_kernels.OPERATORS[func._opname].plain(*args)
        out = func(*args, **(kwargs or {}))
        read, written = ([t for t in tree_leaves(x) if isinstance(t, Tensor)] for x in ((args, kwargs), out))
        if not func.is_view and written and func._schema.name not in NO_KERNEL:
            factors = [tuple(t.shape) for t in args if isinstance(t, Tensor) and t.dim() == 2]
            self._add(func._schema.name, read, written, factors[-2:])
        return out

    def _add(self, name: str, read: Sequence[Tensor], written: Sequence[Tensor], factors: Sequence[Any]) -> None:
        kind, rate, operations = "other operations", PRODUCTS, 0.0
        kind = next((part for word, part in NODES.items() if word in name), kind)
        if "varlen" in name:
            kind, rate = "attention", ATTENTION
            heads, size = max((tuple(t.shape[-2:]) for t in read if t.dim() == 3), key=lambda shape: shape[0])
            # Of each row half of the scores, of which two products are formed and five for gradients.
            operations = (5 if "backward" in name else 2) * sum(n * n for n in self.rows) * heads * size
        elif name.rpartition("::")[2] in ("mm", "addmm", "bmm", "addmm_") and len(factors) == 2:
            (m, k), (_, n) = factors
            operations, kind = 2.0 * m * k * n, "thin products" if min(m, k, n) <= THIN else "products"
        if any(self.vocabulary in t.shape for t in (*read, *written)) and kind != "thin products":
            kind = "output layer and loss"
        moved = sum(t.nbytes for t in (*read, *written))
        part = self.parts[kind]
        part.count += 1
        part.operations += operations
        part.bytes += moved
        part.seconds += max(operations / rate, moved / BANDWIDTH)


def walk(
    *,
    layers: int = 32,
    rows: Sequence[int] = (4096, 4096),
    rank: int = 16,
    sizes: Any = None,
    fast: bool = True,
    fused: bool = True,
) -> Counted:
    """Count one micro-batch of rows of these lengths, forward and backward, as a card computes it; `fast`: with the
    nodes of `kernels: fast`, of which torch.compile makes kernels where `fused`."""
    import transformers

    sizes = sizes or EIGHT_BILLION
    with FakeTensorMode(allow_non_fake_inputs=True), as_on_a_card():
        config = transformers.AutoConfig.for_model("llama", **{**sizes, "num_hidden_layers": layers})
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.requires_grad_(False)
        attachment = lora.attach(model, LoraMethod(rank=rank, alpha=2 * rank), seed=0)
        use_packed_attention(model)
        if fast:
            use_fast_layers(model)
        output = fused_loss.output_layer_of(model)
        assert output is not None
        tokens = sum(rows)
        batch = Batch(
            layout="packed",
            ids_BT=torch.zeros(1, tokens, dtype=torch.int64),
            positions_BT=torch.cat([torch.arange(n) for n in rows])[None],
            mask_BT=None,
            lengths=tuple(rows),
            predict_N=torch.arange(tokens),
            targets_N=torch.zeros(tokens, dtype=torch.int64),
            row_of_N=torch.zeros(tokens, dtype=torch.int64),
            row_indices=tuple(range(len(rows))),
        )
        model.train()
        with Counted(rows, sizes["vocab_size"], fused) as counted:
            hidden = hidden_at_targets(model, batch)
            loss = output.loss_sum(hidden, batch.targets_N, smoothing=0.0, z=0.0)
            (loss / tokens).backward()
            attachment.collect_gradients()
    return counted


@contextmanager
def as_on_a_card() -> Iterator[None]:
    """A block in which attention over packed rows and the pieces of the loss are those of a card."""

    def attend(query: Tensor, key: Tensor, value: Tensor, segments: Segments, options: AttentionOptions) -> Tensor:
        starts = (torch.tensor([0, *sizes]).cumsum(0).int() for sizes in zip(*segments.sizes, strict=True))
        queries, keys = starts
        return cuda_attention.varlen(
            query, key, value, replace(segments, cu_seqlens_q=queries, cu_seqlens_k=keys), options
        )

    with ExitStack() as stack:
        stack.enter_context(card_operators())
        stack.enter_context(patch.object(attention, "_by_pieces", attend))
        stack.enter_context(patch.dict(fused_loss.CHUNK_BYTES, {"cpu": fused_loss.CHUNK_BYTES_ELSEWHERE}))
        for module in (card_kernels, fast_layers, linear_nodes, rms_norm):
            stack.enter_context(patch.object(module, "on_card", lambda tensor: True))
        # Tensors without numbers cannot be compared.
        for probe in ("_norm_agrees", "_mlp_agrees", "_rotation_agrees"):
            stack.enter_context(patch.object(fast_layers, probe, lambda *given: True))
        stack.enter_context(patch.object(fast_layers, "_activation", lambda module: card_kernels.ACTIVATIONS[0]))
        stack.enter_context(patch.object(fast_layers, "refused_here", lambda *given: ""))
        yield


@contextmanager
def card_operators() -> Iterator[None]:
    """A block in which a processor has the operators of torch that only cards have, as documented: it spells a norm
    out before anybody could count it."""

    def norm(x: Tensor, sizes: Any, weight: Tensor | None, eps: float | None) -> tuple[Tensor, Tensor]:
        inverse = x.float().square().mean(-1, keepdim=True).add(eps or 0.0).rsqrt()
        out = x.float() * inverse if weight is None else x.float() * inverse * weight
        return out.to(x.dtype), inverse

    def backward(  # noqa: PLR0917 — torch's order
        grad: Tensor, x: Tensor, sizes: Any, inverse: Tensor, weight: Tensor | None, needs: Any
    ) -> tuple[Tensor, Tensor]:
        wide, h = x.float(), grad.float() if weight is None else grad.float() * weight
        along = (h * wide).mean(-1, keepdim=True) * inverse.square()
        gx = ((h - wide * along) * inverse).to(x.dtype)
        gweight = (grad.float() * wide * inverse).flatten(0, -2).sum(0) if needs[1] else x.new_empty(0)
        return gx, gweight if weight is None else gweight.to(weight.dtype)

    operators = torch.library.Library("aten", "IMPL")
    try:
        operators.impl("_fused_rms_norm", norm, "CPU")
        operators.impl("_fused_rms_norm_backward", backward, "CPU")
        yield
    finally:
        operators._destroy()


def page(counted: Counted, tokens: int) -> str:
    """The table in Markdown."""
    lines = ["| Part | Operations | TFLOP | GB | ms | by hand, ms |", "|---|---|---|---|---|---|"]
    whole = Part()
    for name, by_hand in REVIEWED.items():
        part = counted.parts[name]
        whole = Part(*(a + b for a, b in zip(vars(whole).values(), vars(part).values(), strict=True)))
        lines.append(_line(name, part, by_hand))
    lines.append(_line("**sum**", whole, "706–795"))
    rate = tokens / whole.seconds
    return (
        "\n".join([*lines, "", f"{rate:,.0f} tokens/s by this roofline; by hand 10,300 to 11,600 without nodes."])
        + "\n"
    )


def _line(name: str, part: Part, reviewed: str) -> str:
    numbers = f"{part.operations / 1e12:.1f} | {part.bytes / 1e9:.0f} | {1e3 * part.seconds:.0f}"
    return f"| {name} | {part.count:,} | {numbers} | {reviewed} |"


def add_roofline(verbs: Any) -> None:
    parser = verbs.add_parser("roofline", help="a LoRA step of 8B on tensors without numbers: what an H100 would reach")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rows", type=int, nargs="*", default=[4096, 4096], metavar="TOKENS")
    parser.add_argument("--plain", action="store_true", help="with `kernels: plain`: without the nodes of this package")
    parser.add_argument("--no-compiler", action="store_true", help="where torch.compile fails: its kernels one by one")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace, words: Sequence[str]) -> int:
    how = {"fast": not options.plain, "fused": not options.no_compiler}
    counted = walk(layers=options.layers, rows=options.rows, rank=options.rank, **how)
    print(page(counted, sum(options.rows)), end="")
    return 0
