"""`python -m benchmarks roofline`: what it counts is what a layer is known to need."""

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
