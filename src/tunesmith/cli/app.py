"""The app: its verbs, and the one place where errors end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from tunesmith import __version__
from tunesmith.cli import failing
from tunesmith.cli.chat import chat
from tunesmith.cli.check import check
from tunesmith.cli.compare import compare
from tunesmith.cli.doctor import doctor
from tunesmith.cli.eval import evaluate
from tunesmith.cli.export import export
from tunesmith.cli.plan import plan
from tunesmith.cli.predict import predict
from tunesmith.cli.push import push
from tunesmith.cli.recipe import recipe
from tunesmith.cli.resume import resume
from tunesmith.cli.runs import runs
from tunesmith.cli.selftest import selftest
from tunesmith.cli.serve import serve
from tunesmith.cli.show import show
from tunesmith.cli.stopping import interruptible, was_interrupted
from tunesmith.cli.train import train
from tunesmith.errors import TunesmithError


class Verb(TyperCommand):
    """One verb, whose help has no type beside a flag: it takes no value."""

    def get_params(self, ctx: Any) -> list[Any]:
        params = super().get_params(ctx)
        for param in params:
            if getattr(param, "is_flag", False) and param.metavar is None:
                param.metavar = ""
        return params


class Verbs(TyperGroup):
    """Every verb's errors become one block of text and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            interruptible()
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort, BrokenPipeError, typer.BadParameter):
            raise
        except (Exception, KeyboardInterrupt) as error:
            if _is_usage(error):
                raise
            if was_interrupted() and not isinstance(error, TunesmithError):
                raise typer.Exit(failing.report(KeyboardInterrupt())) from None
            raise typer.Exit(failing.report(error, as_json=bool(ctx.meta.get("json")))) from None


def _is_usage(error: BaseException) -> bool:
    """Whether the words of the command line were wrong: typer says so itself, with the verb's usage."""
    return any(kind.__name__ == "ClickException" for kind in type(error).__mro__)


app = typer.Typer(
    name="tunesmith",
    cls=Verbs,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Exit codes: 0 done, 1 failed, 2 bad input, 3 stopped and resumable.",
)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"tunesmith {__version__}")
        raise typer.Exit


@app.callback()
def about(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Fine-tune language models on your own data, on the machine you have, and prove that it worked.

    [bold]tunesmith train[/] HuggingFaceTB/SmolLM2-135M-Instruct support.jsonl

    [bold]tunesmith chat[/] last
    """


GROUPS: dict[str, tuple[Callable[..., None], ...]] = {
    "Tune": (check, plan, train, resume),
    "Look and talk": (runs, show, chat),
    "Use and measure": (serve, predict, evaluate, compare, export, push),
    "More": (selftest, recipe, doctor),
}
NAMES = {evaluate: "eval"}  # which as a function's name would hide Python's own
for group, verbs in GROUPS.items():
    for verb in verbs:
        app.command(NAMES.get(verb), cls=Verb, rich_help_panel=group)(verb)
