"""A processor that computes by the nodes of a card."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

from benchmarks.roofline import card_operators

from tunesmith.models import card_kernels, fast_layers, linear_nodes, rms_norm


@contextmanager
def as_on_a_card() -> Iterator[None]:
    """A block in which every tensor is taken for one of a card; operators that only cards have are spelled out."""
    with ExitStack() as stack:
        stack.enter_context(card_operators())
        for module in (card_kernels, fast_layers, linear_nodes, rms_norm):
            stack.enter_context(patch.object(module, "on_card", lambda tensor: True))
        stack.enter_context(patch.object(fast_layers, "refused_here", lambda *given: ""))
        yield
