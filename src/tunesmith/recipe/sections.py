"""What every group of knobs is made of."""

from __future__ import annotations

from datetime import date
from typing import Annotated, Literal, TypeAlias

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

Auto: TypeAlias = Literal["auto"]
Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]


def _is_day(text: str) -> str:
    date.fromisoformat(text)
    return text


Day = Annotated[str, Field(pattern=r"^\d{4}-\d{2}-\d{2}$"), AfterValidator(_is_day)]


class Section(BaseModel):  # noqa: PLW1641 (pydantic gives frozen models a hash)
    """A group of knobs: immutable, and an unknown key is an error."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False, validate_default=True
    )

    def __eq__(self, other: object) -> bool:
        """Whether both say the same; where the files of a run are now is no part of it."""
        return type(self) is type(other) and self.__dict__ == other.__dict__
