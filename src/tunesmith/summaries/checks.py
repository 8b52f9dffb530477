"""The findings of `check` in sentences: from the values that `tunesmith check --json` prints."""

from __future__ import annotations

from collections.abc import Iterator

from tunesmith.phrases import percent, plural
from tunesmith.summaries.words import label_counts, mix_text
from tunesmith.types import Record

_LABEL_KINDS = {"one": "one a row", "many": "any number a row", "tags": "a tag for each word"}


def problem_counts(check: Record) -> Iterator[str]:
    """Errors and warnings, counted by their codes, a line each."""
    for what in ("error", "warning"):
        if counts := check[f"{what}s"]:
            by_code = ", ".join(f"{number:,} {code}" for code, number in sorted(counts.items()))
            yield f"{plural(sum(counts.values()), what)}: {by_code}"


def file_lines(check: Record) -> Iterator[str]:
    """The content of each file. One that cannot be read is named by its problem already."""
    named = {problem["source"]["path"] for problem in check["problems"] if problem["severity"] == "error"}
    for file in check["files"]:
        if file["is_readable"] or file["path"] not in named:
            shape = f"{file['shape']} in {file['format']}" if file["shape"] else file["format"] or "unreadable"
            yield f"{file['path']}: {shape}: {file['usable']:,} of {plural(file['rows'], 'row')} can be used"
    if check["mix"]:
        yield f"mix, before rows are held out: {mix_text(check['mix'])}"


def token_lines(check: Record) -> Iterator[str]:
    """The tokens of each side, and the classes."""
    for side, stats in check["tokens"].items():
        share = percent(stats["trained"] / stats["tokens"])
        yield (
            f"{side}: {stats['tokens']:,} tokens, {stats['trained']:,} of them trained ({share}); a row has "
            f"{stats['shortest']:,} to {stats['longest']:,}, half have {stats['median']:,} or less, 95 % have "
            f"{stats['p95']:,} or less"
        )
    if check["labels"]:
        yield f"labels: {label_counts(dict(check['labels']))}; {_LABEL_KINDS[str(check['label_kind'])]}"


def other_lines(check: Record) -> Iterator[str]:
    """The held-out rows, and notes."""
    if any(file["usable"] for file in check["files"]):
        yield f"held out: {plural(check['held_out'], 'row')}"
    for note in check["notes"]:
        yield f"note: {note}"


def refusals(check: Record) -> list[str]:
    """Why training would refuse this data, without what a problem of a file says already."""
    named = {problem["source"]["path"] for problem in check["problems"] if problem["severity"] == "error"}
    listed = {f"{path} cannot be used as it is" for path in named}
    return [refusal for refusal in check["refusals"] if refusal not in listed] or list(check["refusals"])


def verdict(check: Record) -> tuple[str, bool]:
    """The last line on data that is not refused, and whether its measures will be worth what they seem to be:
    held-out rows that are trained make them worth less, or nothing."""
    seen, held = check["warnings"].get("overlap", 0), check["held_out"]
    if not seen:
        return "can be trained on", True
    worth = "worthless" if 2 * seen >= held else "too good"
    which = f"{seen:,} of {plural(held, 'held-out row')} {'is' if seen == 1 else 'are'} also trained"
    return f"can be trained on, but the measures will be {worth}: {which}", False
