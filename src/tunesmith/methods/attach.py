"""A recipe's method on its model: what is trained, given what its passes can hold."""

from __future__ import annotations

from transformers import PreTrainedModel

from tunesmith.data.store import RowStore
from tunesmith.methods import METHODS, full
from tunesmith.optim import OPTIMIZERS
from tunesmith.recipe.knobs import Recipe
from tunesmith.recipe.method_knobs import FullMethod
from tunesmith.types import Attachment, HeadName


def attach(
    recipe: Recipe, model: PreTrainedModel, *, head: HeadName, store: RowStore | None, pad_id: int
) -> Attachment:
    """`store`: the rows that are trained on, whose tokens, and `pad_id` where rows may be padded, are the only ones
    that full tuning can teach an embedding; None: they are not known.

    Raises what the method's own `attach` raises.
    """
    method = recipe.method
    if not isinstance(method, FullMethod):
        return METHODS[method.name].attach(model, method, seed=recipe.seed)
    # Masked words become any other at random; some optimizers' updates of a row depend on all rows.
    is_known = store is not None and head != "masked_token" and OPTIMIZERS[recipe.optim.name].spares_zeros
    tokens = store.tokens.tolist() if store is not None and is_known else None
    if tokens is not None and head != "next_token":  # before a token that is predicted from the left stands no padding
        tokens = sorted({*tokens, pad_id})
    return full.attach(model, method, seed=recipe.seed, tokens=tokens)
