"""The formula of a multi grader: numbers, names of graders, + - * / ^, brackets, and a few functions.

OpenAI, "Graders" (guide), section Multigraders. A parser of its own, since Python's would run anything.

    sum = product (("+" | "-") product)*
    product = sign (("*" | "/") sign)*
    sign = ("+" | "-") sign | power
    power = atom ("^" sign)?
    atom = number | name | function "(" sum ("," sum)* ")" | "(" sum ")"
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tunesmith.errors import InputError
from tunesmith.graders.grade import GradeError
from tunesmith.phrases import did_you_mean, listed

Value = Callable[[Mapping[str, float]], float]
"""Rewards of the parts -> the formula's value."""
FUNCTIONS: Mapping[str, Callable[..., float]] = {
    "min": min, "max": max, "abs": abs, "floor": lambda x: float(math.floor(x)), "ceil": lambda x: float(math.ceil(x)),
    "exp": math.exp, "sqrt": math.sqrt, "log": math.log,
}  # fmt: skip
_MANY = ("min", "max")
_OPERATORS: Mapping[str, Callable[[float, float], float]] = {
    "+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv, "^": operator.pow,
}  # fmt: skip
_TOKEN = re.compile(r"\s*(\d+\.?\d*(?:[eE][+-]?\d+)?|\.\d+|[A-Za-z_]\w*|[-+*/^(),])")
MOST_TOKENS, MOST_DEPTH = 200, 30
"""A longer or deeper formula would nest more deeply than Python can follow."""


def compute(value: Value, rewards: Mapping[str, float]) -> float:
    """The finite value of a formula. Raises GradeError, for example where it divides by 0."""
    try:
        found = value(rewards)
        if isinstance(found, complex) or not math.isfinite(found):
            raise ValueError("it is not a finite number")
    except (ArithmeticError, ValueError) as error:
        parts = ", ".join(f"{name} {reward:g}" for name, reward in rewards.items())
        raise GradeError("formula", f"calculate_output: no value with {parts}: {error}") from None
    return float(found)


def parse(text: str, names: Sequence[str], place: str) -> Value:
    """The formula in `text`. Raises InputError where it is none, or names no grader of `names`."""
    return _Parser(text, names, place).whole()


class _Parser:
    def __init__(self, text: str, names: Sequence[str], place: str) -> None:
        self.text, self.names, self.place = text, names, place
        self.at, self.num, self.depth = 0, 0, 0

    def whole(self) -> Value:
        value = self._sum()
        if self._peek():
            raise self._error(f"{self._peek()!r} does not fit")
        return value

    def _error(self, why: str) -> InputError:
        rule = f"Numbers, + - * / ^, brackets, {', '.join(FUNCTIONS)} and the graders {listed(self.names, 12)}."
        return InputError(f"{self.place}: {self.text!r}, character {self.at + 1}: {why}. {rule}")

    def _peek(self) -> str:
        rest = self.text[self.at :]
        match = _TOKEN.match(rest)
        if match is None and rest.strip():
            raise self._error(f"{rest.strip()[0]!r} has no meaning")
        return match[1] if match else ""

    def _take(self) -> str:
        token = self._peek()
        match = _TOKEN.match(self.text, self.at)
        self.at = match.end() if match else len(self.text)
        self.num += 1
        if self.num > MOST_TOKENS:
            raise self._error(f"it has more than {MOST_TOKENS} parts")
        return token

    def _left(self, signs: str, part: Callable[[], Value]) -> Value:
        value = part()
        while (sign := self._peek()) and sign in signs:
            self._take()
            value = _applied(_OPERATORS[sign], value, part())
        return value

    def _sum(self) -> Value:
        return self._left("+-", self._product)

    def _product(self) -> Value:
        return self._left("*/", self._sign)

    def _sign(self) -> Value:
        self.depth += 1
        if self.depth > MOST_DEPTH:
            raise self._error(f"it nests more than {MOST_DEPTH} deep")
        value = self._signed()
        self.depth -= 1
        return value

    def _signed(self) -> Value:
        if self._peek() in ("+", "-"):
            sign, value = self._take(), self._sign()
            return _applied(operator.neg, value) if sign == "-" else value
        base = self._atom()
        if self._peek() != "^":
            return base
        self._take()
        return _applied(operator.pow, base, self._sign())

    def _atom(self) -> Value:
        token = self._take()
        if token == "(":
            return self._closed(self._sum())
        if token[:1].isdigit() or token[:1] == ".":
            number = float(token)
            return lambda rewards: number
        if token in FUNCTIONS and self._peek() == "(":
            return self._call(token)
        if token in self.names:
            return lambda rewards: rewards[token]
        if token[:1].isalpha() or token[:1] == "_":
            raise self._error(f"there is no grader {token}.{did_you_mean(token, self.names)}".rstrip(".?"))
        raise self._error(f"{token!r} is not a value" if token else "a value is missing")

    def _closed(self, value: Value) -> Value:
        if self._take() != ")":
            raise self._error("a bracket is not closed")
        return value

    def _call(self, name: str) -> Value:
        self._take()
        values = [self._sum()]
        while self._peek() == ",":
            self._take()
            values.append(self._sum())
        if len(values) > 1 and name not in _MANY:
            raise self._error(f"{name} takes one value")
        if len(values) == 1 and name in _MANY:
            return self._closed(values[0])
        return self._closed(_applied(FUNCTIONS[name], *values))


def _applied(function: Callable[..., Any], *values: Value) -> Value:
    return lambda rewards: function(*(value(rewards) for value in values))
