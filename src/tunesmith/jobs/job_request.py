"""The body of POST /v1/fine_tuning/jobs, checked field by field."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator

from tunesmith.serve.request_schemas import Body, StrictModel, refuse, without_unused

MAX_METADATA = 16


def _auto_or_number(value: Any) -> Any:
    if value != "auto" and (isinstance(value, bool) or not isinstance(value, int | float)):
        raise ValueError('should be "auto" or a number')
    return value


_Auto = Annotated[Any, BeforeValidator(_auto_or_number)]


def _whole(most: int) -> Any:
    def check(value: Any) -> Any:
        if value != "auto" and not (isinstance(value, int) and 1 <= value <= most):
            raise ValueError(f'should be "auto" or a whole number from 1 to {most}')
        return value

    return BeforeValidator(check)


def _positive(value: Any) -> Any:
    if value != "auto" and not 0 < value < 1e6:
        raise ValueError('should be "auto" or a number above 0')
    return value


class Hyperparameters(StrictModel):
    """What a client may decide about training; "auto" is decided here."""

    n_epochs: Annotated[_Auto, _whole(50)] = "auto"
    batch_size: Annotated[_Auto, _whole(256)] = "auto"
    learning_rate_multiplier: Annotated[Any, BeforeValidator(_positive), BeforeValidator(_auto_or_number)] = "auto"

    @model_validator(mode="before")
    @classmethod
    def _known_parameters(cls, given: Any) -> Any:
        return without_unused(given, cls.model_fields) if isinstance(given, dict) else given


class Supervised(StrictModel):
    """Options of the method supervised."""

    hyperparameters: Hyperparameters | None = None


class MethodChoice(StrictModel):
    """The method of a job. Options of the other methods are accepted without effect, as there."""

    type: str
    supervised: Supervised | None = None
    dpo: dict[str, Any] | None = None
    reinforcement: dict[str, Any] | None = None


def _known_method(method: MethodChoice) -> MethodChoice:
    if method.type != "supervised":
        message = (
            f"method: {method.type[:40]!r} is not available here: jobs are supervised. tunesmith train --task prefer"
        )
        raise refuse("method_not_available", "method", f"{message} learns from preferences.")
    return method


class JobBody(Body):
    """POST /v1/fine_tuning/jobs"""

    training_file: str
    validation_file: str | None = None
    hyperparameters: Hyperparameters | None = None
    method: MethodChoice | None = None
    suffix: str | None = Field(None, min_length=1, max_length=64)
    seed: int | None = Field(None, ge=0, le=2**31 - 1)
    metadata: dict[str, str] | None = None
    integrations: list[dict[str, Any]] | None = Field(None, max_length=5)

    @model_validator(mode="after")
    def _consistent(self) -> JobBody:
        if self.method is not None:
            _known_method(self.method)
        inner = self.method.supervised.hyperparameters if self.method and self.method.supervised else None
        if inner is not None and self.hyperparameters not in (None, inner):
            message = "hyperparameters: differ from those in method. Give them once, in method."
            raise refuse("invalid_value", "hyperparameters", message)
        pairs = (self.metadata or {}).items()
        if len(pairs) > MAX_METADATA or any(len(key) > 64 or len(value) > 512 for key, value in pairs):
            message = f"metadata: at most {MAX_METADATA} pairs, of keys of 64 and values of 512 characters at most."
            raise refuse("invalid_value", "metadata", message)
        return self

    @property
    def chosen(self) -> Hyperparameters:
        """The hyperparameters, from either place."""
        inner = self.method.supervised.hyperparameters if self.method and self.method.supervised else None
        return inner or self.hyperparameters or Hyperparameters()
