"""Classes, their order and what they weigh: from the words of the rows to the numbers that a head learns.

The order of classes is that of the recipe's data.labels, or the sorted classes of the training rows: whole numbers
first, by value, then all other words by code point. It never follows from the order of rows. Resolved, it is written
into the run's recipe, so a run that is repeated with more rows keeps every id.
"""

# C classes, I rows

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tunesmith.types import LabelKind


@dataclass(frozen=True, slots=True)
class Labels:
    """What a head learns."""

    kind: LabelKind
    names: tuple[str, ...] = ()
    """Classes by id; empty for numbers."""
    weights_C: NDArray[np.float64] | None = None
    """What an example of each class counts; None: all the same."""

    @property
    def num_outputs(self) -> int:
        """Outputs of the head."""
        return 1 if self.kind == "number" else len(self.names)
