"""The formula of a multi grader: numbers, names of graders, + - * / ^, brackets, and a few functions.

OpenAI, "Graders" (guide), section Multigraders. Python's parser reads it and nothing of it is run: a value is
computed node by node, and what is not in the list above is refused.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Mapping, Sequence

from tunesmith.errors import InputError
from tunesmith.graders.grade import GradeError
from tunesmith.phrases import did_you_mean, listed

FUNCTIONS: Mapping[str, Callable[..., float]] = {
    "min": min, "max": max, "abs": abs, "floor": lambda x: float(math.floor(x)), "ceil": lambda x: float(math.ceil(x)),
    "exp": math.exp, "sqrt": math.sqrt, "log": math.log,
}  # fmt: skip
_MANY = ("min", "max")
_OPERATORS: Mapping[type, Callable[..., float]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.Pow: math.pow, ast.USub: operator.neg, ast.UAdd: operator.pos,
}  # fmt: skip
MOST_FORMULA_CHARACTERS = 500
"""A longer formula could nest more deeply than Python can follow."""


def compute(node: ast.expr, rewards: Mapping[str, float]) -> float:
    """The finite value of a formula. Raises GradeError, for example where it divides by 0."""
    try:
        value = _value(node, rewards)
        if not math.isfinite(value):
            raise ValueError("it is not a finite number")
    except (ArithmeticError, ValueError) as error:
        parts = ", ".join(f"{name} {reward:g}" for name, reward in rewards.items())
        raise GradeError("formula", f"calculate_output: no value with {parts}: {error}") from None
    return float(value)


def _value(node: ast.expr, rewards: Mapping[str, float]) -> float:
    match node:
        case ast.Constant(value=number):
            return float(str(number))
        case ast.Name(id=name):
            return rewards[name]
        case ast.UnaryOp(op=op, operand=part):
            return _OPERATORS[type(op)](_value(part, rewards))
        case ast.BinOp(left=left, op=op, right=right):
            return _OPERATORS[type(op)](_value(left, rewards), _value(right, rewards))
        case ast.Call(func=ast.Name(id=name), args=args):
            values = [_value(part, rewards) for part in args]
            takes_one = len(values) == 1 and name not in _MANY
            return FUNCTIONS[name](*values) if takes_one else FUNCTIONS[name](values)
    raise AssertionError("`parse` has refused it")


def parse(text: str, names: Sequence[str], place: str) -> ast.expr:
    """The formula in `text`. Raises InputError where it is none, or names no grader of `names`."""
    try:
        if len(text) > MOST_FORMULA_CHARACTERS or "**" in text or "#" in text:
            raise SyntaxError(f"it has more than {MOST_FORMULA_CHARACTERS} characters, or ** or #")
        node = ast.parse(text.strip().replace("^", "**"), mode="eval").body
        _check(node, names)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        rule = f"Numbers, + - * / ^, brackets, {', '.join(FUNCTIONS)} and the graders {listed(names, 12)}."
        why = error.msg if isinstance(error, SyntaxError) else str(error) or "it nests too deeply"
        raise InputError(f"{place}: {text[:80]!r}: no formula: {why}. {rule}") from None
    return node


def _check(node: ast.expr, names: Sequence[str]) -> None:
    """Raise ValueError for what a formula may not have."""
    match node:
        case ast.Constant(value=int() | float()) if not isinstance(node.value, bool):
            return
        case ast.Name(id=name):
            if name not in names:
                raise ValueError(f"there is no grader {name}.{did_you_mean(name, names)}".rstrip(".?"))
        case ast.UnaryOp(op=ast.USub() | ast.UAdd(), operand=part):
            _check(part, names)
        case ast.BinOp(op=op, left=left, right=right) if type(op) in _OPERATORS:
            _check(left, names)
            _check(right, names)
        case ast.Call(func=ast.Name(id=name), args=[_, *more] as args, keywords=[]) if name in FUNCTIONS:
            if more and name not in _MANY:
                raise ValueError(f"{name} takes one value")
            for part in args:
                _check(part, names)
        case _:
            raise ValueError(f"{ast.unparse(node)[:40].replace('**', '^')} has no meaning")
