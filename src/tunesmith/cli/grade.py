"""tunesmith grade"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import orjson
import typer

from tunesmith.cli.options import Json, Offline, ReadAs, Root, named, reading_options, refuse_missing
from tunesmith.cli.render import print_table
from tunesmith.cli.streams import console, json_line
from tunesmith.errors import InputError
from tunesmith.phrases import listed, one_line, plural, visible
from tunesmith.runs.atomic import refuse_existing, write_atomic, writing
from tunesmith.types import REWARD_KEY, JsonObject, Record

if TYPE_CHECKING:
    from tunesmith.graders.grade import Answer
    from tunesmith.graders.pool import Scorer
    from tunesmith.graders.prompts import Prompt
    from tunesmith.graders.schema import Grader, RewardRun
    from tunesmith.graders.trial import Graded
    from tunesmith.graders.verdict import Verdict

ROWS_OF_MODEL = 64
MOST_ERROR = 300
"""Characters of a failed grade that are printed."""
NumRows = Annotated[
    int | None,
    typer.Option(
        min=1, help="Rows taken, evenly over the file (default: all; with --model 64, but all where some are kept)."
    ),
]
Say = Callable[[str], None]
Tick = Callable[[str, int, int], None]


def grade(
    data: Annotated[
        str, typer.Argument(metavar="DATA", help="Rows with prompt or messages, and what the grader reads.")
    ],
    grader: Annotated[
        str, typer.Option(metavar="GRADER", help="file.py, file.py:FUNCTION, a grader in .json or .yaml, or run:RUN.")
    ],
    model: Annotated[
        str | None, typer.Option(metavar="RUN|MODEL", help="Grade answers of this run or model, too.")
    ] = None,
    samples: Annotated[int, typer.Option(min=2, max=64, help="Answers of the model to each prompt.")] = 8,
    max_new_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="Most tokens of an answer.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.1, max=2, help="Higher: the model's answers vary more.")] = 1.0,
    rows: NumRows = None,
    passes: Annotated[float, typer.Option("--pass", help="Least reward of an answer that counts as right.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Random numbers by which answers are drawn.")] = 0,
    keep: Annotated[
        str | None,
        typer.Option(metavar="LOW:HIGH", help="Write rows of a mean reward from LOW to HIGH to --out."),
    ] = None,
    keep_best: Annotated[
        bool, typer.Option("--keep-best", help="Write the rows to --out as chats with the model's best answer.")
    ] = False,
    out: Annotated[Path | None, typer.Option(metavar="FILE.jsonl", help="File of the rows that are kept.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Write over --out.")] = False,
    page: Annotated[Path | None, typer.Option(metavar="FILE.html", help="Write a page with pictures.")] = None,
    settings: ReadAs = None,
    root: Root = Path("runs"),
    offline: Offline = False,
    as_json: Json = False,
) -> None:
    """Try a grader before anything is trained with it: does it tell right answers from wrong ones, and can it
    be won?

    tunesmith grade prompts.jsonl --grader grader.py

    tunesmith grade prompts.jsonl --grader grader.json --model HuggingFaceTB/SmolLM2-135M-Instruct --page
    tried.html
    """
    bounds = _bounds(keep, out, model, page, overwrite, best=keep_best)
    screen = console(stderr=True)

    def say(words: str) -> None:
        screen.print(visible(words), style="bright_black")

    loaded, every = _read(data, settings or [], grader, model, say, offline=offline)
    num = min(rows or (ROWS_OF_MODEL if model and bounds is None else len(every)), len(every))
    prompts = [every[i * len(every) // num] for i in range(num)]
    if num < len(every):
        say(f"{num:,} of {plural(len(every), 'row')} are taken, evenly over the file (--rows)")
    drawing = None
    if model is not None:
        drawing = _Drawing(named(model, root), root, offline, seed, samples, max_new_tokens, temperature)
    graded = _graded(loaded, prompts, drawing, say, root=root, offline=offline)
    names = {"data": data, "grader": grader, "target": model}
    judged = _show(prompts, graded, passes, page, say, names, as_json=as_json)
    if bounds is not None and out is not None:
        _keep(prompts, graded, bounds, out, say, best=keep_best)
    if any(entry.refuses for entry in judged):
        raise typer.Exit(InputError.exit_code)


@dataclass(frozen=True, slots=True)
class _Drawing:
    """A model, and how its answers are drawn."""

    model: str
    root: Path
    offline: bool
    seed: int
    num: int
    """Answers to each prompt."""
    max_new_tokens: int
    temperature: float


def _read(
    path: str, settings: Sequence[str], grader: str, model: str | None, say: Say, *, offline: bool
) -> tuple[Grader, list[Prompt]]:
    """The grader and all rows. Raises InputError, before anything heavy is loaded."""
    from tunesmith.cli.display import pinned
    from tunesmith.graders import schema
    from tunesmith.graders.prompts import read_as, read_prompts
    from tunesmith.recipe.schema import Data, DataFile

    loaded = schema.load(grader)
    if model is None and any(getattr(part, "unit", "") == "tokens" for part in schema.parts_of(loaded).values()):
        raise InputError(f"{grader}: length in tokens: they are a model's. Give --model, or count words.")
    data = Data(train=(DataFile(path=path),)).model_copy(update=reading_options(settings))
    every, num_left_out = read_prompts(pinned(data, offline=offline))
    schema.check_variables(loaded, every[0].item, grader)
    notes = [f"{plural(num_left_out, 'row')} left out (data.bad_rows: skip)"] if num_left_out else []
    for note in [*notes, *read_as(every[0].item)]:
        say(f"note: {note}")
    return loaded, every


def _scorer(root: Path, offline: bool) -> Callable[[RewardRun], Scorer]:
    """The function that loads a reward run, only where there is one."""

    def scorer_of(part: RewardRun) -> Scorer:
        from tunesmith.inference.reward_scores import RewardScorer

        return RewardScorer(part, root=root, offline=offline)

    return scorer_of


def _graded(
    grader: Grader, prompts: Sequence[Prompt], drawing: _Drawing | None, say: Say, *, root: Path, offline: bool
) -> list[Graded]:
    from tunesmith.cli.display import phases
    from tunesmith.graders.pool import Pool
    from tunesmith.graders.trial import grade_all, played

    if drawing is not None:
        refuse_missing(drawing.model, drawing.root, offline=drawing.offline)
    with Pool(grader, scorer_of=_scorer(root, offline)) as pool, phases(console(stderr=True)) as tick:
        for text in pool.notes:
            say(f"note: {text}")
        answers = [*played(prompts)]
        if drawing is not None:
            answers = _with_model(drawing, prompts, answers, say, tick)
        return grade_all(pool, prompts, answers, tick)


def _show(
    prompts: Sequence[Prompt], graded: Sequence[Graded], passes: float, page: Path | None, say: Say,
    of: Record, *, as_json: bool,
) -> Sequence[Verdict]:  # fmt: skip
    """Print results and verdicts, and write the page."""
    from tunesmith.graders.trial import results
    from tunesmith.graders.verdict import verdicts

    values = results(prompts, graded, passes=passes)
    judged = verdicts(values)
    if as_json:
        shown = [{"words": entry.words, "refuses": entry.refuses} for entry in judged]
        json_line({"kind": "grade", **of, **values, "verdict": shown})
    else:
        _draw(values, judged)
    if page is not None:
        from tunesmith.graders.page import page_of

        write_atomic(page, page_of(values, judged, grader=of["grader"], data=of["data"]).encode())
        say(f"a page with pictures: {page}")
    return judged


def _bounds(
    keep: str | None, out: Path | None, model: str | None, page: Path | None, overwrite: bool, *, best: bool
) -> tuple[float, float] | None:
    """The least and the greatest mean reward of rows that are kept, infinite with --keep-best alone; None: no
    rows are kept. Raises InputError for options that do not go together, and a --page that is no page."""
    if page is not None and (page.suffix.lower() not in (".html", ".htm") or not page.parent.is_dir()):
        raise InputError(f"--page {page}: has to be FILE.html in a folder that exists. Choose another name.")
    if keep is None and out is None and not best:
        return None
    if out is None or model is None or not (keep or best):
        raise InputError(
            "grade: --keep or --keep-best, --out and --model go together: rows are kept by what the answers of the "
            "model get."
        )
    refuse_existing(out, overwrite=overwrite)
    if keep is None:
        return -math.inf, math.inf
    low, colon, high = keep.partition(":")
    try:
        bounds = float(low), float(high)
    except ValueError:
        bounds = 1.0, 0.0
    if not colon or not bounds[0] <= bounds[1]:
        raise InputError(f"--keep {keep}: not two rewards, the lower first. Write --keep 0.05:0.95")
    return bounds


def _with_model(
    drawing: _Drawing, prompts: Sequence[Prompt], played: list[tuple[str, int, Answer]], say: Say, tick: Tick
) -> list[tuple[str, int, Answer]]:
    """The answers that are played, with their tokens, and those of a model. Raises InputError where no row can
    be asked."""
    from tunesmith.graders.grade import Answer
    from tunesmith.graders.trial import MODEL
    from tunesmith.serve.samples import Question, SampledModel

    tick("load", 0, 1)
    streams, most = max(16, 2 * drawing.num), drawing.max_new_tokens
    source = SampledModel(drawing.model, root=drawing.root, offline=drawing.offline, streams=streams, note=say)
    questions = [Question(entry.messages, _seed(entry, drawing.seed), entry.tools) for entry in prompts]
    answers = source.answers(
        questions, num=drawing.num, max_new_tokens=most, temperature=drawing.temperature, progress=tick
    )
    refused = [(prompts[i].source, why) for i, why in enumerate(answers) if isinstance(why, str)]
    if refused:
        first = f"the first: {refused[0][0]}: {refused[0][1]}"
        if len(refused) == len(prompts):
            raise InputError(f"{drawing.model}: no row can be asked; {first}.")
        say(f"note: {len(refused):,} of {plural(len(prompts), 'row')} cannot be asked; {first}")
    drawn = [(i, entry) for i, samples in enumerate(answers) if not isinstance(samples, str) for entry in samples]
    cut = sum(not entry.ended for _, entry in drawn)
    if cut > 0.05 * len(drawn):
        say(f"note: {cut:,} of {plural(len(drawn), 'answer')} were cut at {most} tokens: --max-tokens")
    counted = [(kind, i, replace(entry, tokens=source.num_tokens(entry.text))) for kind, i, entry in played]
    of_model = [(i, Answer(entry.text, entry.calls, entry.ended, entry.tokens, entry.prefix)) for i, entry in drawn]
    return counted + [(MODEL, i, answer) for i, answer in of_model]


def _seed(prompt: Prompt, seed: int) -> int:
    """Seeds of a prompt's answers: from its row and `seed`, whatever other rows are there."""
    digest = hashlib.sha256(orjson.dumps([seed, dict(prompt.item)], default=str))  # as text: a date of Parquet
    return int.from_bytes(digest.digest()[:7], "big")


def _draw(values: JsonObject, judged: Sequence[Verdict]) -> None:
    from tunesmith.graders.grade import FAILURES
    from tunesmith.graders.trial import PLAYED
    from tunesmith.graders.verdict import lines_of

    screen = console()
    print_table(screen, ["", REWARD_KEY, "95 % interval", "from lowest to highest"], lines_of(values))
    for error in values["errors"]:
        first = error["first"][0]
        places = listed(dict.fromkeys(entry["source"] for entry in error["first"]), 3)
        screen.print(visible(f"{error['num']:,} without reward, {FAILURES[error['kind']]}: {places}"))
        screen.print(visible(f"  of {PLAYED[first['of']]}: {_end(first['error'])}"))
    for entry in values["left_out"]:
        first = f"{entry['source']}, {PLAYED[entry['of']]}: {entry['value']}"
        where = f"{entry['num']:,} of {plural(values['grades'], 'grade')}, the first of {first}"
        screen.print(visible(f"score {entry['name']} is no finite number in {where}: left out of its mean"))
    is_alike = len({entry[REWARD_KEY] for entry in (*values["best"], *values["worst"])}) < 2
    for title in () if is_alike else ("best", "worst"):
        screen.print(f"{title}:")
        for entry in values[title]:
            screen.print(visible(f"  {entry[REWARD_KEY]:.3g}  {entry['source']}  {one_line(entry['answer'], 90)}"))
    for entry in judged:
        screen.print(visible(("✗ " if entry.refuses else "") + entry.words))


def _end(error: str) -> str:
    """The end of an error, where its reason is, on a line."""
    line = " ".join(error.split())
    return line if len(line) <= MOST_ERROR else f"… {line[-MOST_ERROR:].partition(' ')[2]}"


def _keep(
    prompts: Sequence[Prompt], graded: Sequence[Graded], bounds: tuple[float, float], out: Path, say: Say,
    *, best: bool,
) -> None:  # fmt: skip
    """Write the rows whose mean reward of the model's answers is within the bounds. `best`: as chats, each with
    the best of its answers that have ended."""
    from tunesmith.evaluation.graded_scores import mean
    from tunesmith.graders.trial import MODEL, by_row

    low, high = bounds
    of_model = [entry for entry in graded if entry.kind == MODEL]
    rewards = by_row(of_model)
    chosen = [i for i, group in rewards.items() if low <= mean(group) <= high]
    items: list[Record] = [prompts[i].item for i in chosen]
    within = "" if math.isinf(high) else f"have a mean reward from {low:g} to {high:g} and "
    verb = "are"
    if best:
        ended = [entry for entry in of_model if entry.answer.ended and entry.grade.reward is not None]
        ended.sort(key=lambda entry: entry.grade.reward or 0.0, reverse=True)
        winners = {entry.row: entry.answer for entry in reversed(ended)}  # the first of the highest reward
        items = [_chat_of(prompts[i], winners[i]) for i in chosen if i in winners]
        verb = "have an answer that ended: the best of each is"
    with writing(out) as file:  # plain JSON: a text such as "NaN" stays as the row has it
        file.writelines(orjson.dumps(item, default=str, option=orjson.OPT_APPEND_NEWLINE) for item in items)
    say(f"{len(items):,} of {plural(len(prompts), 'row')} {within}{verb} in {out}")


def _chat_of(prompt: Prompt, answer: Answer) -> Record:
    """A row of task chat: the prompt, and this answer to it."""
    calls = {"tool_calls": list(answer.tools)} if answer.tools else {}
    turns = [*prompt.messages, {"role": "assistant", "content": answer.text, **calls}]
    return {"messages": turns, **({"tools": list(prompt.tools)} if prompt.tools else {})}
