"""Knobs of each method: part of knobs.py, in a file of its own for its length."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_validator

from tunesmith.recipe.sections import Fraction, Positive, Section


class LoraMethod(Section):
    """Low-rank adaptation: the model stays frozen, two small matrices beside each linear layer are trained."""

    name: Literal["lora"] = "lora"
    rank: Positive = 16
    """Rank of the update of each adapted layer."""
    alpha: Annotated[float, Field(gt=0)] = 32.0
    """The update is scaled by alpha / rank."""
    dropout: Fraction = 0.0
    """Dropout on the input of the low-rank path."""
    targets: tuple[str, ...] = ("all-linear",)
    """Layers to adapt: all-linear, attention, mlp, the end of a module's name (q_proj), or a regular expression
    over whole module names (re:layers\\.[0-3]\\..*)."""
    loraplus_ratio: Annotated[float, Field(ge=1)] = 1.0
    """LoRA+: rate of B over the rate of A, which is optim.lr."""

    @field_validator("targets", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value


class FullMethod(Section):
    """Full fine-tuning: every weight is trained."""

    name: Literal["full"] = "full"


class AutoMethod(Section):
    """LoRA, unless the model is so small that training every weight is as cheap."""

    name: Literal["auto"] = "auto"


METHOD_KNOBS: Mapping[str, type[Section]] = MappingProxyType(
    {"auto": AutoMethod, "lora": LoraMethod, "full": FullMethod}
)
"""The settings of each method, by its name."""


def _method_name(value: Any) -> str:
    return str(value.get("name", "auto")) if isinstance(value, dict) else str(getattr(value, "name", "auto"))


Method = Annotated[
    Annotated[AutoMethod, Tag("auto")] | Annotated[LoraMethod, Tag("lora")] | Annotated[FullMethod, Tag("full")],
    Discriminator(_method_name),
]
