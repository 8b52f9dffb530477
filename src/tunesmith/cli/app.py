"""The app: its commands, and the one place where errors are caught."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from tunesmith.cli import errors, jobs
from tunesmith.cli.chat import chat
from tunesmith.cli.check import check, plan, recipe
from tunesmith.cli.doctor import doctor, selftest
from tunesmith.cli.eval import compare, evaluate
from tunesmith.cli.explain import explain
from tunesmith.cli.export import export, push
from tunesmith.cli.grade import grade
from tunesmith.cli.options import OPTIONS
from tunesmith.cli.predict import predict
from tunesmith.cli.runs import prune, rm, runs, show
from tunesmith.cli.serve import serve
from tunesmith.cli.signals import interruptible
from tunesmith.cli.sweep import sweep
from tunesmith.cli.train import resume, track, train
from tunesmith.cli.ui import ui
from tunesmith.environment.version import __version__


def without_types(params: list[Any]) -> list[Any]:
    """The parameters, flags without a type after them in the help."""
    for param in params:
        if getattr(param, "is_flag", False) and param.metavar is None:
            param.metavar = ""
    return params


class PlainFlags:
    """Leaves out the type after a flag in the help of a command."""

    def get_params(self, ctx: Any) -> list[Any]:
        return without_types(super().get_params(ctx))  # type: ignore[misc]


class Subcommands(PlainFlags, TyperGroup):
    """A command with others below it."""


class Command(PlainFlags, TyperCommand):
    """One command. An unknown option gets a suggestion."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except Exception as error:  # typer's own copy of click has it, where older ones use click itself
            _explain(error)
            if type(error).__name__ == "MissingParameter":
                error.message = error.message or getattr(error.param, "help", "")  # type: ignore[attr-defined]
            if type(error).__name__ == "NoSuchOption" and any("--set" in param.opts for param in self.params):
                _suggest(error, {name for param in self.params for name in param.opts})
            raise


OTHER_COMMANDS = {
    "finetune": "train", "fine-tune": "train", "tune": "train", "fit": "train", "continue": "resume", "list": "runs",
    "test": "eval", "evaluate": "eval", "infer": "predict", "generate": "predict", "convert": "export",
    "merge": "export", "upload": "push", "deploy": "serve", "report": "show", "version": "--version", "help": "--help",
}  # fmt: skip
"""Commands by names that other programs have for them."""


class Commands(TyperGroup):
    """Turns the errors of every command into one block of text and an exit code. An unknown command gets a
    suggestion."""

    def get_params(self, ctx: Any) -> list[Any]:
        return without_types(super().get_params(ctx))

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        try:
            return super().resolve_command(ctx, args)
        except Exception as error:
            names = self.list_commands(ctx)
            near = difflib.get_close_matches(args[0].lower(), names, n=1, cutoff=0.6) if args else []
            if args and type(error).__name__ == "UsageError":
                name = OTHER_COMMANDS.get(args[0].lower(), near[0] if near else "")
                error.message = f"No such command {args[0]!r}." + (f" Did you mean {name}?" if name else "")  # type: ignore[attr-defined]
            raise

    def invoke(self, ctx: Any) -> Any:
        try:
            interruptible()
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort, BrokenPipeError, typer.BadParameter):
            raise
        except (Exception, KeyboardInterrupt) as error:
            if any(kind.__name__ == "ClickException" for kind in type(error).__mro__):  # typer reports it
                raise
            raise typer.Exit(errors.report(error, as_json=bool(ctx.meta.get("json")))) from None


def _explain(error: Any) -> None:
    """Put a value that typer's checks refuse into plain words."""
    for fault in getattr(error.__cause__, "errors", list)()[:1]:
        rule, _, expected = fault["msg"].partition("Input should be ")
        if not rule:
            expected = expected.partition(",")[0].replace("valid integer", "whole number").replace("valid ", "")
            error.message = f"it is {fault['input']}, and must be {expected}. Correct it, or leave the option out."


def _suggest(error: Any, flags: set[str]) -> None:
    from tunesmith.recipe.docs import options
    from tunesmith.recipe.load import OTHER_NAMES, similar

    name = error.option_name.lstrip("-").replace("-", "_")
    option = next(iter(difflib.get_close_matches(error.option_name, flags, n=1, cutoff=0.8)), None)
    key = next((key for key in similar(name) if key in options()), None)
    if option is None and key is None:
        return
    is_exact = key is not None and (name in OTHER_NAMES or key.rpartition(".")[2] == name)
    if option is None or is_exact:
        option = OPTIONS.get(key or "")
    else:
        key = next((key for key, spelled in OPTIONS.items() if spelled == option), None)
    suggestion = f"{option} ({key})" if key else option
    error.message += f", did you mean {suggestion if option in flags else f'--set {key}=...'}?"
    error.possibilities = None


HELP = {"help_option_names": ["-h", "--help"]}
app = typer.Typer(
    name="tunesmith",
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={**HELP, "max_content_width": 100},
    epilog="Exit codes: 0 done, 1 failed, 2 bad input, 3 stopped and resumable, 130 interrupted.",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"tunesmith {__version__}")
        raise typer.Exit


@app.callback()
def about(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Fine-tune language models on your own data, on the machine you have, and see whether it worked.

    [bold]tunesmith train[/] HuggingFaceTB/SmolLM2-135M-Instruct support.jsonl

    [bold]tunesmith chat[/] last
    """


COMMAND_GROUPS: dict[str, tuple[Callable[..., None], ...]] = {
    "Tune": (check, plan, train, resume, sweep),
    "Look and talk": (ui, show, chat),
    "Use and measure": (serve, predict, evaluate, grade, compare, export, push, track),
    "More": (explain, selftest, recipe, doctor),
}
COMMAND_NAMES = {evaluate: "eval"}  # which as a function's name would hide Python's own
for group, commands in COMMAND_GROUPS.items():
    for command in commands:
        app.command(COMMAND_NAMES.get(command), cls=Command, rich_help_panel=group)(command)

of_runs = typer.Typer(cls=Subcommands, invoke_without_command=True, callback=runs, context_settings=HELP)
for command in (rm, prune):
    of_runs.command(cls=Command)(command)
app.add_typer(of_runs, name="runs", rich_help_panel="Look and talk")
of_keys = typer.Typer(cls=Subcommands, no_args_is_help=True, help="Keys of a server of jobs.", context_settings=HELP)
of_keys.command("create", cls=Command)(jobs.make_key)
of_keys.command("list", cls=Command)(jobs.list_keys)
of_keys.command("revoke", cls=Command)(jobs.end_key)
app.add_typer(of_keys, name="keys", rich_help_panel="Use and measure")
of_jobs = typer.Typer(cls=Subcommands, invoke_without_command=True, callback=jobs.jobs, context_settings=HELP)
for command in (jobs.list_jobs, jobs.show, jobs.follow, jobs.cancel, jobs.pause, jobs.resume):
    of_jobs.command("list" if command is jobs.list_jobs else None, cls=Command)(command)
app.add_typer(of_jobs, name="jobs", rich_help_panel="Use and measure")
commands_with_options = typer.main.get_command(app)
"""The commands with all their options, which takes a tenth of a second: a process that waits for its command
has made them by then."""
