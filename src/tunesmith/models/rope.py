"""Rotary positions that follow from the longest text of a pass.

Of a model with two sets of frequencies (longrope: Phi-3 and Phi-4-mini with long contexts) transformers takes one set
for all rows of a pass, by the largest position in it: a row of more tokens than the border changes what the others say,
also where rows are padded. So where a row is longer, each goes alone. ("dynamic" changes its frequencies beyond the
positions that the config names, and no row or text is longer than those.)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def border(config: Any) -> int | None:
    """The most tokens of a text that is computed with the frequencies for short ones; None: there is one set."""
    config = config.get_text_config()
    settings = getattr(config, "rope_parameters", None) or {}
    of_layers = [settings] if "rope_type" in settings else settings.values()  # or by type of layer
    usual = getattr(config, "original_max_position_embeddings", None) or getattr(config, "max_position_embeddings", 0)
    borders = [
        int(one.get("original_max_position_embeddings") or usual or 0)
        for one in of_layers
        if isinstance(one, Mapping) and one.get("rope_type") == "longrope"
    ]
    return min(borders, default=None)


def why(config: Any, longest: int) -> str:
    """Why texts cannot share a pass where one has so many tokens; "": they can."""
    found = border(config)
    if found is None or longest <= found:
        return ""
    return f"a text of more than {found:,} tokens changes the positions (longrope) of all others in its pass"
