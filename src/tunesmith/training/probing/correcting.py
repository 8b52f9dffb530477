"""What a forecast becomes once a probe has been made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tunesmith.planning.forecast import Forecast
from tunesmith.planning.work import Duration
from tunesmith.training.probing.found import Found

SPREAD = 0.15
"""Of a total after a probe, either way."""


@dataclass(frozen=True, slots=True)
class Corrected:
    """Predicted beside measured, and what follows for the whole run."""

    found: Found
    memory: int
    """Bytes: the peak of the probe, and what comes only in the course of the run; 0: it ended before a step."""
    duration: Duration | None

    def values(self) -> dict[str, Any]:
        """As JSON."""
        return {
            **self.found.plain(),
            "memory": self.memory,
            "seconds": None if self.duration is None else self.duration.values(),
        }


def corrected(forecast: Forecast | None, found: Found, *, mean_tokens: float) -> Corrected:
    """`mean_tokens`: of a step. Without a forecast only what was measured is told."""
    if not found.steps:
        return Corrected(found, 0, None)
    if forecast is None or forecast.duration is None:
        return Corrected(found, found.peak + (forecast.later if forecast else 0), None)
    spread = SPREAD if not found.ended else forecast.duration.spread
    return Corrected(found, found.peak + forecast.later, forecast.duration.at(found.prices(mean_tokens), spread))
