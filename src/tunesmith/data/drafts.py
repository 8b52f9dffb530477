"""An example as tokens, before it is a row: the parts of it that are known at a time."""

# T tokens, N targets

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

from tunesmith.types import Problem

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(slots=True)
class Draft:
    """An example, or one window of it, as tokens."""

    ids_T: NDArray[np.int32]
    trained_T: NDArray[np.bool_]
    warnings: list[Problem] = field(default_factory=list)
    classes_N: tuple[str, ...] | None = None
    """Names of the classes that are learnt at the trained tokens; None: tokens themselves; empty: any class."""
    second: int = 0
    num_bytes: int = 0
    branches: tuple[int, ...] = ()
    values: tuple[float, ...] = ()
    keys: tuple[int, ...] = ()
    images: tuple[int, ...] = ()


Drafts: TypeAlias = list[Draft] | Problem
"""The windows of an example, mostly one, or the problem that makes it unusable."""
