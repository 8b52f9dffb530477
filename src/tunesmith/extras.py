"""Packages that only some uses need: the command that installs them."""

from __future__ import annotations

import re
import shlex
import sys
from importlib.metadata import PackageNotFoundError, requires

_NEEDED_BY = re.compile(r"(?P<package>[^;]+?)\s*;\s*extra\s*==\s*[\"'](?P<extra>[^\"']+)[\"']")


def installing(extra: str) -> str:
    """The command that installs what an extra of tunesmith needs, into the Python that runs.

    It names the packages and not `tunesmith[extra]`, which an index would have to know: tunesmith is installed from a
    checkout.
    """
    python = shlex.quote(sys.executable or "python")
    try:
        found = [_NEEDED_BY.fullmatch(text) for text in requires("tunesmith") or ()]
    except PackageNotFoundError:  # its source runs without being installed
        found = []
    packages = [match["package"] for match in found if match and match["extra"] == extra]
    return f"{python} -m pip install {' '.join(map(shlex.quote, packages)) or shlex.quote('.[' + extra + ']')}"
