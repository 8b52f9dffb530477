"""Types of options, and the options of each method."""

from __future__ import annotations

from datetime import date
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    SerializeAsAny,
    Tag,
    field_validator,
)

from tunesmith.types import JsonObject

Auto: TypeAlias = Literal["auto"]
Positive = Annotated[int, Field(gt=0)]
Rank = Annotated[int, Field(gt=0, le=65_536)]
"""Layers of language models have fewer inputs, and a higher rank than these has no use."""
Fraction = Annotated[float, Field(ge=0, lt=1)]


def _is_day(text: str) -> str:
    date.fromisoformat(text)
    return text


Day = Annotated[str, Field(pattern=r"^\d{4}-\d{2}-\d{2}$"), AfterValidator(_is_day)]


class OptionGroup(BaseModel):  # noqa: PLW1641 (pydantic gives frozen models a hash)
    """A group of options: immutable, and an unknown key is an error."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False, validate_default=True
    )

    def __eq__(self, other: object) -> bool:
        """Whether both say the same; where the files of a run are now is not part of it."""
        return type(self) is type(other) and self.__dict__ == other.__dict__


def _as_list(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else (value,) if isinstance(value, str) else value


Words = Annotated[tuple[str, ...], BeforeValidator(_as_list)]
"""One text or a list of texts."""


class LowRankMethod(OptionGroup):
    """Options that LoRA and its relatives share: the model is frozen, small matrices next to its layers are
    trained."""

    name: str
    rank: Rank = 16
    """Rank of the update of each adapted layer."""
    alpha: Annotated[float, Field(gt=0)] = 32.0
    """The update is scaled by alpha / rank."""
    rslora: bool = False
    """Rank-stabilised: scale the update by alpha / √rank instead, so that a high rank learns as fast as a low
    one."""
    dropout: Fraction = 0.0
    """Dropout on the input of the low-rank path."""
    targets: Words = ("all-linear",)
    """Layers to adapt: all-linear, attention, mlp, experts (of a mixture; no other group means them), the end
    of a module's name (q_proj), or a regular expression over whole module names (re:layers\\.[0-3]\\..*). Of a
    model that sees these are of its language part; vision and projector mean the others."""
    rank_pattern: dict[str, Rank] = Field(default_factory=dict)
    """Other ranks by target: {mlp: 8, down_proj: 4}. Words as in `targets`; of several that mean a layer the
    last counts. Experts have, unless named here, `rank` divided by the experts of a token, in steps of 8."""
    alpha_pattern: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    """Other alphas by target, in the same words."""
    also_train: Words = ()
    """Modules trained in full in addition to the adapters, such as embed_tokens: the end of a module's name,
    vision or projector, or re: and a regular expression over whole names."""
    loraplus_ratio: Annotated[float, Field(ge=1)] = 1.0
    """LoRA+: rate of B over the rate of A, which is optim.lr."""


class LoraMethod(LowRankMethod):
    """Low-rank adaptation: the model is frozen, two small matrices next to each linear layer are trained."""

    name: Literal["lora"] = "lora"


class DoraMethod(LowRankMethod):
    """LoRA that also trains the length of each row of a weight; slower, for low ranks."""

    name: Literal["dora"] = "dora"


class PeftMethod(OptionGroup):
    """Any method of the installed peft library by its name, such as IA3, OFT or VERA."""

    name: Literal["peft"] = "peft"
    kind: str
    """peft's name of the method, in capitals or not. docs/guide/methods.md lists them, and which are
    refused."""
    settings: JsonObject = Field(default_factory=dict)
    """Its settings by peft's own names, such as {target_modules: [q_proj]}; what is left out has peft's
    default."""

    @field_validator("kind")
    @classmethod
    def _as_peft_writes_it(cls, value: str) -> str:
        return value.strip().upper().replace("-", "_").replace(" ", "_")


class QloraMethod(LowRankMethod):
    """LoRA on a base whose linear layers are kept in 4 bits; needs the package bitsandbytes."""

    name: Literal["qlora"] = "qlora"


class FullMethod(OptionGroup):
    """Full fine-tuning: every weight is trained, or those that are named."""

    name: Literal["full"] = "full"
    train: Words = ()
    """Weights to train: the end of a module's or weight's name (lm_head, layers.3, norm.weight), of a model
    that sees language, projector or vision, or re: and a regular expression over whole names of weights. Empty:
    all; where rows have images the language part."""
    freeze: Words = ()
    """Weights among them that stay frozen, in the same words."""


class AutoMethod(OptionGroup):
    """LoRA, unless the model is so small that training every weight is as cheap."""

    name: Literal["auto"] = "auto"


class RegisteredMethod(OptionGroup):
    """Base of the settings of a method that is added from outside: put the class into METHOD_OPTIONS."""

    name: str


_BUILT_IN: dict[str, type[OptionGroup]] = {
    "auto": AutoMethod,
    "lora": LoraMethod,
    "dora": DoraMethod,
    "qlora": QloraMethod,
    "full": FullMethod,
    "peft": PeftMethod,
}
METHOD_OPTIONS: dict[str, type[OptionGroup]] = dict(_BUILT_IN)
"""The settings of each method, by its name."""
_REGISTERED = "<registered>"
"""Tag of every method that is added from outside; no name that anybody types."""


def _tag(value: object) -> str:
    name = str(value.get("name", "auto")) if isinstance(value, dict) else str(getattr(value, "name", "auto"))
    return _REGISTERED if name in METHOD_OPTIONS.keys() - _BUILT_IN.keys() else name


def _registered(value: Any) -> Any:
    return METHOD_OPTIONS[value["name"]].model_validate(value) if isinstance(value, dict) else value


MethodOptions = Annotated[
    Annotated[AutoMethod, Tag("auto")]
    | Annotated[LoraMethod, Tag("lora")]
    | Annotated[DoraMethod, Tag("dora")]
    | Annotated[QloraMethod, Tag("qlora")]
    | Annotated[FullMethod, Tag("full")]
    | Annotated[PeftMethod, Tag("peft")]
    | Annotated[SerializeAsAny[RegisteredMethod], BeforeValidator(_registered), Tag(_REGISTERED)],
    Discriminator(_tag),
]
