"""tunesmith check"""

from __future__ import annotations


def check() -> None:
    """Check."""
