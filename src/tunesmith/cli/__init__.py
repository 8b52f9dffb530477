"""The command line: one file a command, each of which parses, calls and prints."""

from __future__ import annotations

from tunesmith.cli.signals import leave_at_once


def main() -> None:
    """Run the command line; exits with 0 done, 1 failed, 2 bad input, 3 stopped and resumable."""
    leave_at_once()  # before anything else is imported: on a busy machine each import is a moment for Ctrl-C
    import os
    import sys
    import warnings

    from tunesmith.cli.streams import closing_words, prepare_streams

    prepare_streams()
    from tunesmith.cli.app import commands_with_options
    from tunesmith.environment.settings import prepare_environment

    prepare_environment(os.environ)
    if os.environ.get("TUNESMITH_DEBUG") != "1":
        warnings.simplefilter("ignore")  # libraries' warnings are for their programmers; ours arrive as events
    code: int | str | None = 0
    try:
        commands_with_options(prog_name="tunesmith")
    except SystemExit as end:
        code = end.code
    if not code and (words := closing_words()):
        print(f"error: {words}", file=sys.stderr)
        code = 1
    sys.exit(code)
