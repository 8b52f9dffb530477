"""Knobs of the update: part of knobs.py, in a file of their own for their length."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, model_validator

from tunesmith.recipe.sections import Auto, Fraction, Section

T = TypeVar("T")
OptimizerName = Literal["adamw", "adamw_8bit", "lion", "adafactor", "muon", "schedule_free"]
_ADAM = {"schedule": "linear", "betas": (0.9, 0.999), "eps": 1e-8}
USUAL: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "adamw": _ADAM,
        "adamw_8bit": _ADAM,
        "lion": {"schedule": "linear", "betas": (0.9, 0.99)},
        "adafactor": {"schedule": "linear"},
        "muon": {**_ADAM, "momentum": 0.95},
        "schedule_free": {**_ADAM, "schedule": "constant"},
    }
)
"""What each optimizer has of the knobs that not all have, and its value where the recipe says null."""


class Optim(Section):
    """The update: the optimizer and the rate of each step."""

    name: OptimizerName = "adamw"
    """Optimizer. adamw_8bit keeps its state in 8 bits, lion and adafactor keep less of it, muon makes the updates of
    the matrices inside the layers orthogonal, schedule_free averages weights instead of lowering the rate."""
    lr: Annotated[float, Field(gt=0)] | Auto = "auto"
    """Peak learning rate. LoRA wants roughly ten times the rate of full tuning."""
    schedule: Literal["linear", "cosine", "constant"] | None = None
    """Shape of the rate after warm-up; linear and cosine end at zero after the last step. null: linear, of
    schedule_free constant, which it has to be."""
    warmup: Annotated[float, Field(ge=0)] = 0.05
    """Warm-up: below 1 a share of all steps, from 1 up a number of steps. The first step's rate is not zero."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay; never on norms, biases and embeddings."""
    betas: tuple[Fraction, Fraction] | None = None
    """Decay of the running means of the gradient and of its square. null: 0.9 and 0.999, of lion 0.9 and 0.99;
    adafactor has none."""
    eps: Annotated[float, Field(gt=0)] | None = None
    """Added to the root of the second mean, so that no update divides by zero. null: 1e-8; lion and adafactor have
    none."""
    momentum: Fraction | None = None
    """Of muon alone: decay of the running mean of the gradient that is made orthogonal. null: 0.95."""
    clip: Annotated[float, Field(gt=0)] | None = 1.0
    """Largest norm of the gradient; null never clips."""

    @model_validator(mode="before")
    @classmethod
    def _as_usual(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        name, betas = data.get("name", "adamw"), data.get("betas")
        usual = USUAL.get(name, {}) if isinstance(name, str) else {}
        filled = {key: value for key, value in usual.items() if data.get(key) is None}
        return {**data, **({"betas": tuple(betas)} if isinstance(betas, list) else {}), **filled}

    @model_validator(mode="after")
    def _has_what_it_is_given(self) -> Optim:
        for knob in ("betas", "eps", "momentum"):
            if getattr(self, knob) is not None and knob not in USUAL[self.name]:
                raise ValueError(f"optim.{knob}: {self.name} has none: drop it or set optim.name: adamw")
        if self.name == "schedule_free":
            if self.schedule != "constant":
                raise ValueError(f"optim.schedule: {self.schedule}: schedule_free needs constant: it averages instead")
            if self.betas is not None and self.betas[0] == 0:
                raise ValueError("optim.betas: schedule_free needs a first number above 0: its weights are such a mean")
        return self


def given(value: T | None) -> T:
    """The value of a knob that its section has filled in where it was null."""
    if value is None:
        raise AssertionError("a knob that this optimizer does not have was asked for")
    return value
