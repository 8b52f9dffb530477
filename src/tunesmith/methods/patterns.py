"""Regular expressions of recipes and adapters, which may come from anywhere: matched within a time.

`re` cannot be interrupted while it tries one way after the other; `regex`, which transformers brings, reads the same
expressions and takes a limit.
"""

from __future__ import annotations

import math
import re
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import regex

from tunesmith.errors import ModelError

LIMIT_S = 5.0
"""For all names that one expression is tried on."""
CONFIG = "adapter_config.json"
PATTERNS = (
    "target_modules", "exclude_modules", "rank_pattern", "alpha_pattern", "layers_pattern", "modules_to_save",
)  # fmt: skip
"""What of it peft reads as expressions."""
PLAIN = re.compile(r"\^?[\w.\\]*\$?")
"""An expression that has one way to match."""

MOST_REPEATS = 10_000
"""Product of the counts of one expression, which is written out as often to be compiled."""
MOST_CHARS = 1_000

_spent: defaultdict[str, float] = defaultdict(float)
"""Seconds by expression."""


def searches(pattern: str, name: str) -> bool:
    """Whether the expression is found in a name. Raises ModelError where that takes too long, re.error if it is not
    one."""
    return _tried(pattern, name, whole=False)


def fits(pattern: str, name: str) -> bool:
    """Whether the expression is all of a name; raises likewise."""
    return _tried(pattern, name, whole=True)


def fits_end(pattern: str, name: str) -> bool:
    """Whether peft takes the key of a rank_pattern or alpha_pattern to mean the layer of this name."""
    return fits(rf"(.*\.)?({pattern})", name)


def _tried(pattern: str, name: str, *, whole: bool) -> bool:
    _refuse_bombs(pattern)
    begun = time.perf_counter()
    try:
        compiled = regex.compile(pattern, regex.VERSION0)
        way = compiled.fullmatch if whole else compiled.search
        return way(name, timeout=max(LIMIT_S - _spent[pattern], 0.01)) is not None
    except TimeoutError:
        raise ModelError(
            f"{pattern[:80]!r}: this regular expression takes more than {LIMIT_S:g} s on the names of the model's "
            "modules. Write it without a repeat inside a repeat, or list the names."
        ) from None
    except regex.error as error:
        raise re.error(str(error), pattern) from None
    finally:
        _spent[pattern] += time.perf_counter() - begun


def _refuse_bombs(pattern: str) -> None:
    counts = [int(number) for found in re.findall(r"\{([\d,]*)\}", pattern) for number in found.split(",") if number]
    if len(pattern) > MOST_CHARS or math.prod(max(count, 1) for count in counts) > MOST_REPEATS:
        raise ModelError(
            f"{pattern[:80]!r}: this regular expression is too large: at most {MOST_CHARS:,} characters, and counts "
            f"whose product is {MOST_REPEATS:,}. List the names of the modules instead."
        )


def spelled_out(config: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """An adapter's config whose expressions are replaced by those of `names` that they mean, so that peft, which takes
    as long as they ask for, meets lists alone. Raises ModelError as above, also for expressions that it leaves."""
    told = dict(config)
    for key in ("target_modules", "exclude_modules"):
        words = told.get(key)
        if isinstance(words, str) and words != "all-linear":
            told[key] = [name for name in names if fits(words, name)]
    for key in ("rank_pattern", "alpha_pattern"):
        if odd := {pattern for pattern in told.get(key) or () if not PLAIN.fullmatch(pattern)}:
            told[key] = {
                one: value
                for pattern, value in told[key].items()
                for one in ([f"^{name}" for name in names if fits_end(pattern, name)] if pattern in odd else [pattern])
            }
    for key in ("layers_pattern", "modules_to_save"):
        words = told.get(key) or ()
        if bad := [word for word in ([words] if isinstance(words, str) else words) if not PLAIN.fullmatch(word)]:
            raise ModelError(f"{CONFIG}: {key}: {bad[0][:80]!r}: only names are read here, no expressions.")
    return told
