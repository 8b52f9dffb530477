"""What a forecast becomes once a probe has been made."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from tunesmith.planning.duration import Duration
from tunesmith.planning.forecast import Forecast
from tunesmith.probing.found import Found, usual

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
            "seconds": None if self.duration is None else asdict(self.duration),
        }


def corrected(forecast: Forecast | None, found: Found, *, mean_tokens: float) -> Corrected:
    """`mean_tokens`: of a step. Without a forecast only what was measured is told."""
    if not found.steps:
        return Corrected(found, 0, None)
    if forecast is None or forecast.duration is None:
        return Corrected(found, found.peak + (forecast.later if forecast else 0), None)
    by_formula, counted = forecast.duration, usual(found.steps) or found.steps
    step = mean_tokens * sum(one.seconds for one in counted) / sum(one.tokens for one in counted)
    look = found.evaluation.seconds / by_formula.look if found.evaluation and by_formula.look else 1.0
    duration = replace(
        by_formula,
        step=step,
        training=by_formula.training * step / by_formula.step,
        looking=by_formula.looking * look,
        look=by_formula.look * look,
        answering=by_formula.words * found.word.seconds if found.word else by_formula.answering,
        saving=by_formula.saves * found.save.seconds if found.save else by_formula.saving,
        starting=found.starting.seconds if found.starting else by_formula.starting,
        spread=SPREAD if not found.ended else by_formula.spread,
    )
    return Corrected(found, found.peak + forecast.later, duration)
