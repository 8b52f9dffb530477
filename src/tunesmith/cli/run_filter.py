"""Selection and order of runs by their fields: `--where "task=chat" --where "loss<1.7" --sort -created`."""

from __future__ import annotations

import difflib
import fnmatch
import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tunesmith.errors import InputError
from tunesmith.formatting import listed

_CONDITION = re.compile(r"\s*(?P<field>[\w.]+)\s*(?P<operator><=|>=|!=|==|=|<|>)\s*(?P<value>.*?)\s*", re.DOTALL)
_ORDERS: Mapping[str, Callable[[Any, Any], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
EXAMPLE = '--where "task=chat", --where "loss<1.7", --where "model=*SmolLM*"'
PLAIN = ("name", "state", "model", "task", "method", "step", "steps", "created")
"""Fields of every run. Its metrics (`loss`, before training `before.loss`) and the options of its recipe are others."""


@dataclass(frozen=True, slots=True)
class Condition:
    """One `FIELD OPERATOR VALUE`."""

    text: str
    field: str
    operator: str
    value: str

    @classmethod
    def parse(cls, text: str) -> Condition:
        """Raises InputError for text of another form."""
        match = _CONDITION.fullmatch(text)
        if match is None:
            raise InputError(f"--where {text}: not of the form FIELD=VALUE. Such as: {EXAMPLE}.")
        return cls(text, match["field"], match["operator"].replace("==", "="), match["value"])

    def holds(self, fields: Mapping[str, Any]) -> bool:
        """Whether it is true of a run; never of one without the field.

        Raises InputError where a number is compared with text, or text by size.
        """
        found = fields.get(self.field)
        if found is None:
            return False
        if isinstance(found, bool) or not isinstance(found, int | float):
            return self._of_text(str(found).lower() if isinstance(found, bool) else str(found))
        try:
            value = float(self.value)
        except ValueError:
            raise InputError(f"--where {self.text}: {self.field} is a number, such as {found:g}.") from None
        if self.operator in _ORDERS:
            return _ORDERS[self.operator](found, value)
        return (found == value) == (self.operator == "=")

    def _of_text(self, found: str) -> bool:
        if self.operator in _ORDERS:
            raise InputError(
                f"--where {self.text}: {self.field} is text, such as {found!r}: use = or !=, and * for any text."
            )
        return fnmatch.fnmatchcase(found, self.value) == (self.operator == "=")


def select(rows: Sequence[Mapping[str, Any]], where: Iterable[str], sort: str | None) -> list[int]:
    """The indices of the runs of which every condition holds, in the order of a field; each row has `fields`.

    `sort`: a field, with a minus in front from large to small; runs without it come last.
    Raises InputError for a condition that cannot be read, or a field that no run has.
    """
    if not rows:
        return []
    known = {*PLAIN, *(name for row in rows for name in row["fields"])}
    conditions = [_as_known(Condition.parse(text), known) for text in where]
    for condition in conditions:
        _refuse_unknown(f"--where {condition.text}", condition.field, known)
    chosen = [i for i, row in enumerate(rows) if all(one.holds(row["fields"]) for one in conditions)]
    if sort is None:
        return chosen
    field = sort.removeprefix("-")
    _refuse_unknown(f"--sort {sort}", field, known)
    values = {i: rows[i]["fields"].get(field) for i in chosen}
    has_value = [i for i in chosen if values[i] is not None]
    are_numbers = all(isinstance(values[i], int | float) for i in has_value)
    has_value.sort(key=lambda i: values[i] if are_numbers else str(values[i]), reverse=sort.startswith("-"))
    return [*has_value, *(i for i in chosen if values[i] is None)]


def _as_known(condition: Condition, known: set[str]) -> Condition:
    """The condition on our own name of a metric that was given another tool's name, such as eval_loss."""
    ours = condition.field.removeprefix("eval_")
    return condition if condition.field in known or ours not in known else replace(condition, field=ours)


def _refuse_unknown(place: str, field: str, known: set[str]) -> None:
    if field in known:
        return
    near = difflib.get_close_matches(field, sorted(known), n=2)
    metrics = sorted(name.removeprefix("before.") for name in known if name.startswith("before."))
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    such = listed(metrics or ["loss"])
    raise InputError(
        f"{place}: no run has a field {field}.{hint} There are: {', '.join(PLAIN)}; metrics such as "
        f"{such} (before.loss: before training); and options of the recipe, such as optim.lr."
    )
