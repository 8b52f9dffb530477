"""Cases of one mechanism: some run each time, the others before a release (`make test-slow`)."""

from collections.abc import Iterable
from typing import Any

import pytest


def often(cases: Iterable[Any], *names: Any) -> list[Any]:
    """`cases` for `parametrize`, in their order: all but `names` are marked slow. A tuple counts by its first value.

    Raises ValueError for a name that is no case.
    """
    listed = list(cases)
    firsts = [case[0] if isinstance(case, tuple) else case for case in listed]
    missing = [name for name in names if name not in (*listed, *firsts)]
    if missing:
        raise ValueError(f"{missing}: no cases; there are {listed}")
    return [case if case in names or first in names else slow(case) for case, first in zip(listed, firsts, strict=True)]


def slow(case: Any) -> Any:
    """A case that runs before a release."""
    values = case if isinstance(case, tuple) else (case,)
    return pytest.param(*values, marks=pytest.mark.slow)
