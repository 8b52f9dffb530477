"""The command line: one file a verb, each of which parses, calls and prints."""

from __future__ import annotations


def main() -> None:
    """Run the words of the command line; exits with 0 done, 1 failed, 2 bad input, 3 stopped and resumable."""
    import os
    import warnings

    from tunesmith.cli.app import app

    # Threads that wait for each other soon go to sleep. Spinning on, as is the default, made training several times
    # slower beside one other busy program (docs/EXPERIMENTS.md). Read when torch is imported; what is set counts more.
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    if os.environ.get("TUNESMITH_DEBUG") != "1":
        warnings.simplefilter("ignore")  # those of libraries are for their programmers; ours arrive as events
    app(prog_name="tunesmith")
