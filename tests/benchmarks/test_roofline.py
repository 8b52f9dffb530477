"""`python -m benchmarks roofline`: what it counts is what a layer is known to need."""

from pathlib import Path

import torchgen
from benchmarks.gpu_models import EIGHT_BILLION
from benchmarks.roofline import page, walk


def test_a_layer_more_needs_its_own_products_and_attention() -> None:
    rows = (512, 256)
    one, two = (walk(layers=layers, rows=rows) for layers in (1, 2))
    weights, tokens = 218_103_808, sum(rows)
    more = two.parts["products"].operations - one.parts["products"].operations
    assert more == 2 * 2 * weights * tokens  # forward, and backward to the inputs
    scores = sum(n * n for n in rows) * EIGHT_BILLION["hidden_size"]
    assert two.parts["attention"].operations - one.parts["attention"].operations == (2 + 5) * scores
    loss = [2 * 2 * tokens * 4096 * 128256, one.parts["output layer and loss"].operations]
    assert loss[0] == loss[1]
    assert two.parts["other operations"].bytes > one.parts["other operations"].bytes
    assert "tokens/s by this roofline" in page(two, tokens)


def test_norms_gates_and_rotations_move_what_their_kernels_read_and_write() -> None:
    tokens, (hidden, width, heads) = 256, (4096, 14336, 32 + 8)
    one, two = (walk(layers=layers, rows=(tokens,)) for layers in (1, 2))

    def more(part: str) -> float:
        return two.parts[part].bytes - one.parts[part].bytes

    # bfloat16. A norm reads x and writes y, and backward reads x and its gradient and writes that of x, two a layer;
    # besides weights and a float32 number a token.
    assert more("norms") == 2 * (5 * 2 * hidden * tokens + 2 * 2 * hidden + 2 * 4 * tokens)
    assert more("silu · mul") == (3 + 6) * 2 * width * tokens
    assert more("rotations") == 2 * 2 * 2 * heads * 128 * tokens + 4 * 2 * 2 * 128 * tokens
    # Residuals and sums of gradients; matrices of LoRA, of rank 16, side by side, and their gradients in float32.
    assert more("other operations") < 12 * 2 * hidden * tokens + 16 * 16 * 81_920


def test_without_nodes_and_without_a_compiler_more_is_moved() -> None:
    ways = [{}, {"fused": False}, {"fast": False}]
    fast, apart, plain = (sum(part.bytes for part in walk(layers=1, rows=(64,), **how).parts.values()) for how in ways)
    assert fast < apart < plain


def test_what_a_walk_takes_for_one_kernel_is_one_on_a_card() -> None:
    """By the table of the installed torch; `test_card_kernels.py` has the kernels that it compiles."""
    table = (Path(torchgen.__file__).parent / "packaged/ATen/native/native_functions.yaml").read_text("utf-8")
    for name in ("_fused_rms_norm", "_fused_rms_norm_backward"):
        assert f"CUDA: {name}_cuda" in table
