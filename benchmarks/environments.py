"""`python -m benchmarks.environments FOLDER [PEER ...]`: a virtual environment for each peer of `benchmarks train`.

Peers pin libraries of their own, so each gets its own folder; one that is whole already is left as it is. Exit code 1
where one cannot be installed, with what the installer said.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import venv
from collections.abc import Sequence
from pathlib import Path

ENVIRONMENTS = {
    "trl": ("torch>=2.13", "transformers==5.24.*", "trl==1.16.*", "peft==0.21.*"),
    "st": ("torch>=2.13", "transformers==5.24.*", "sentence-transformers==6.2.*", "simple-icd-10-cm==1.5.*"),
    "llamafactory": ("torch>=2.13", "llamafactory==0.9.5"),
    "litgpt": ("torch>=2.13", "litgpt==0.5.13", "requests"),
}
"""What is installed for each peer: releases that the tables of docs/inside/performance.md were measured with."""


def build(folder: Path, name: str) -> str:
    """What went wrong; empty where the environment is there."""
    place = folder / name
    done = place / "installed.txt"
    wanted = "\n".join(ENVIRONMENTS[name])
    if done.exists() and done.read_text("utf-8") == wanted:
        return ""
    venv.create(place, with_pip=True, clear=True)
    words = [str(place / "bin" / "python"), "-m", "pip", "install", "--quiet", *ENVIRONMENTS[name]]
    child = subprocess.run(words, capture_output=True, text=True, check=False)
    if child.returncode:
        return child.stderr.strip()
    done.write_text(wanted, "utf-8")
    return ""


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.environments", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("peers", nargs="*", default=list(ENVIRONMENTS), metavar="PEER")
    options = parser.parse_args(words)
    code = 0
    for name in options.peers:
        if name not in ENVIRONMENTS:
            parser.error(f"{name}: there is no such peer. One of {', '.join(ENVIRONMENTS)}.")
        if why := build(options.folder, name):
            print(f"{name}: cannot be installed:\n{why}", file=sys.stderr)
            code = 1
        else:
            print(f"{name}: {options.folder / name}")
    return code


if __name__ == "__main__":
    sys.exit(main())
