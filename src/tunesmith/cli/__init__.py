"""The command line: one file a verb, each of which parses, calls and prints."""

from __future__ import annotations


def main() -> None:
    """Run the words of the command line; exits with 0 done, 1 failed, 2 bad input, 3 stopped and resumable."""
    from tunesmith.cli.app import app

    app(prog_name="tunesmith")
