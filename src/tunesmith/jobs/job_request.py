"""The body of POST /v1/fine_tuning/jobs, checked field by field."""

from __future__ import annotations

from collections.abc import Callable
from types import UnionType
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, StringConstraints, field_validator, model_validator

from tunesmith.phrases import listed
from tunesmith.serve.protocol import RequestError
from tunesmith.serve.request_schemas import Body, Parameters, StrictModel
from tunesmith.types import JsonObject

MAX_METADATA = 16
GRADER = "method.reinforcement.grader"
"""Place of a job's grader in its request."""


def _auto_or(what: str, fits: Callable[[Any], bool], kind: type | UnionType = int) -> Any:
    def check(value: Any) -> Any:
        if value != "auto" and (isinstance(value, bool) or not isinstance(value, kind) or not fits(value)):
            raise ValueError(f'should be "auto" or {what}')
        return value

    return BeforeValidator(check)


def _whole(most: int) -> Any:
    return _auto_or(f"a whole number from 1 to {most}", lambda value: 1 <= value <= most)


LEAST = 1e-6
"""Smallest factor: below it a step changes no weight."""
_FACTOR = _auto_or("a number from 0.000001 to 1,000,000", lambda value: LEAST <= value <= 1 / LEAST, int | float)
_UP_TO_TEN = _auto_or("a number from 0.00001 to 10", lambda value: 1e-5 <= value <= 10, int | float)
_UP_TO_TWO = _auto_or("a number from 0.000001 to 2", lambda value: LEAST <= value <= 2, int | float)


class Hyperparameters(Parameters):
    """Options of training that a client may set; "auto" is decided here."""

    n_epochs: Annotated[Any, _whole(50)] = "auto"
    batch_size: Annotated[Any, _whole(256)] = "auto"
    learning_rate_multiplier: Annotated[Any, _FACTOR] = "auto"


class DpoHyperparameters(Hyperparameters):
    """Options of a job that learns from preferences."""

    beta: Annotated[Any, _UP_TO_TWO] = "auto"


def _usual_effort(value: Any) -> Any:
    if value != "default":
        raise ValueError('should be "default": models here have no levels of reasoning. Leave it out')
    return value


class ReinforcementHyperparameters(Hyperparameters):
    """Options of a job that learns from a grader; `reinforcement.sections_of` says what becomes of them."""

    compute_multiplier: Annotated[Any, _UP_TO_TEN] = "auto"
    eval_interval: Annotated[Any, _whole(100_000)] = "auto"
    eval_samples: Annotated[Any, _whole(64)] = "auto"
    reasoning_effort: Annotated[str, BeforeValidator(_usual_effort)] = "default"


class Supervised(StrictModel):
    """Options of the method supervised."""

    hyperparameters: Hyperparameters | None = None


class Dpo(StrictModel):
    """Options of the method dpo."""

    hyperparameters: DpoHyperparameters | None = None


class Reinforcement(StrictModel):
    """Options of the method reinforcement."""

    grader: JsonObject
    """`graders.strangers.runnable` checks it."""
    hyperparameters: ReinforcementHyperparameters | None = None
    response_format: JsonObject | None = None

    @field_validator("response_format")
    @classmethod
    def _unforced(cls, value: JsonObject | None) -> JsonObject | None:
        if value is not None and value.get("type") != "text":
            raise ValueError(
                "answers are drawn as the model writes them, and forced into no format. Leave it out, and let a "
                "json_schema grader of a multi grader reward answers that have it"
            )
        return value


_SCHEMAS: dict[str, type[Hyperparameters]] = {
    "supervised": Hyperparameters, "dpo": DpoHyperparameters, "reinforcement": ReinforcementHyperparameters,
}  # fmt: skip
"""The methods, and the hyperparameters of each."""


class MethodChoice(StrictModel):
    """The method of a job. Options of the other methods are accepted without effect, as there."""

    type: str
    supervised: Supervised | None = None
    dpo: Dpo | None = None
    reinforcement: Reinforcement | None = None

    @property
    def hyperparameters(self) -> Hyperparameters | None:
        """The hyperparameters of the method's own type."""
        options: Supervised | Dpo | Reinforcement | None = getattr(self, self.type)
        return None if options is None else options.hyperparameters


_Word = Annotated[str, StringConstraints(max_length=128, pattern=r"^[^\x00]*$")]
"""Becomes a variable of a process's environment, which can have no NUL."""


class WandbProject(StrictModel):
    """A project in Weights & Biases that gets the run."""

    project: _Word = Field(min_length=1)
    name: _Word | None = None
    entity: _Word | None = None
    tags: list[_Word] | None = Field(None, max_length=50)

    @property
    def environment(self) -> dict[str, str]:
        """As wandb reads it."""
        settings = {
            "PROJECT": self.project,
            "NAME": self.name,
            "ENTITY": self.entity,
            "TAGS": ",".join(self.tags or ()),
        }
        return {f"WANDB_{key}": value for key, value in settings.items() if value}


class Integration(StrictModel):
    """A service that gets the metrics of a job."""

    type: Literal["wandb"]
    wandb: WandbProject


class JobBody(Body):
    """POST /v1/fine_tuning/jobs"""

    training_file: str
    validation_file: str | None = None
    hyperparameters: Hyperparameters | None = None
    method: MethodChoice | None = None
    suffix: str | None = Field(None, min_length=1, max_length=64)
    seed: int | None = Field(None, ge=0, le=2**31 - 1)
    metadata: dict[str, str] | None = None
    integrations: list[Integration] | None = Field(None, max_length=1)

    @model_validator(mode="after")
    def _consistent(self) -> JobBody:
        if self.kind not in _SCHEMAS:
            message = f"method: {self.kind[:40]!r} is not available here. Use {listed(tuple(_SCHEMAS), 3)}."
            raise RequestError(message, code="method_not_available", param="method")
        if self.kind == "reinforcement" and self.grader is None:
            message = f"{GRADER}: is missing: it says how good an answer is."
            raise RequestError(message, code="missing_required_parameter", param=GRADER)
        if self.kind == "reinforcement" and self.validation_file is None:
            message = (
                "validation_file: is missing: a reinforcement job needs prompts that it does not learn from, on which "
                "its rewards are measured."
            )
            raise RequestError(message, code="missing_required_parameter", param="validation_file")
        inner = None if self.method is None else self.method.hyperparameters
        outer = {} if self.hyperparameters is None else self.hyperparameters.model_dump()
        if inner is not None and any(getattr(inner, key) != value for key, value in outer.items()):
            message = "hyperparameters: differ from those in method. Give them once, in method."
            raise RequestError(message, param="hyperparameters")
        pairs = (self.metadata or {}).items()
        if len(pairs) > MAX_METADATA or any(len(key) > 64 or len(value) > 512 for key, value in pairs):
            message = f"metadata: at most {MAX_METADATA} pairs, of keys of 64 and values of 512 characters at most."
            raise RequestError(message, param="metadata")
        return self

    @property
    def kind(self) -> str:
        """Type of the method."""
        return "supervised" if self.method is None else self.method.type

    @property
    def chosen(self) -> JsonObject:
        """The hyperparameters of its method, from either place."""
        inner = None if self.method is None else self.method.hyperparameters
        sent = inner or self.hyperparameters or Hyperparameters()
        return _SCHEMAS[self.kind](**sent.model_dump()).model_dump()

    @property
    def grader(self) -> JsonObject | None:
        """The grader of a reinforcement job, as it was sent."""
        if self.method is None or self.method.reinforcement is None or self.kind != "reinforcement":
            return None
        return self.method.reinforcement.grader
