"""Graders that compare texts: no code of others runs.

BLEU: Papineni et al. 2002, of one sentence, n-grams of 1 to 4 words, above 1 with the add-one smoothing of Lin
& Och 2004, "ORANGE", section 4. GLEU: Wu et al. 2016, arXiv 1609.08144, section 4.4.
"""

from __future__ import annotations

import importlib
import json
import math
import re
from collections import Counter
from functools import lru_cache
from typing import Any

from tunesmith.environment.packages import install_command
from tunesmith.errors import InputError
from tunesmith.evaluation.scores import WordTokenizer
from tunesmith.graders import schema
from tunesmith.graders.grade import GradeError
from tunesmith.graders.templates import render
from tunesmith.types import Record

_NUMBER = re.compile(r"[-+−]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:[eE][-+]?\d+)?|[-+−]?\.\d+")
MOST_SCHEMA_ERRORS = 10
"""Errors of a schema that are counted: more make the reward no lower."""
NGRAMS = 4


def needed_package(grader: schema.Single) -> str:
    """The package of the extra `graders` that a grader needs; "" if it needs none."""
    if isinstance(grader, schema.TextSimilarity) and grader.evaluation_metric == "fuzzy_match":
        return "rapidfuzz"
    return "jsonschema" if isinstance(grader, schema.JsonSchema) else ""


def refuse_lacking(grader: schema.Single) -> None:
    """Raise InputError if a package is missing that a grader needs, or if its JSON schema is invalid."""
    package = needed_package(grader)
    if package:
        try:
            importlib.import_module(package)
        except ImportError:
            way = f"`{install_command('graders')}` installs it."
            raise InputError(f"{grader.type}: it needs {package}, which is not installed. {way}") from None
    if isinstance(grader, schema.JsonSchema):
        _validator(json.dumps(grader.json_schema))


def grade_text(grader: schema.TextGrader, sample: Record, item: Record) -> float:
    """The reward of one answer. Raises GradeError."""
    text = render(grader.input, sample, item)
    if isinstance(grader, schema.StringCheck):
        return _string_check(grader.operation, text, render(grader.reference, sample, item))
    if isinstance(grader, schema.TextSimilarity):
        return similarity(grader.evaluation_metric, text, render(grader.reference, sample, item))
    if isinstance(grader, schema.Regex):
        patterns = [grader.pattern] if isinstance(grader.pattern, str) else grader.pattern
        return sum(_has(render(pattern, sample, item), text) for pattern in patterns) / len(patterns)
    if isinstance(grader, schema.Number):
        return _number(grader, text, render(grader.reference, sample, item))
    if isinstance(grader, schema.Length):
        return _length(grader, text, sample["tokens"])
    return _schema(grader, text)


def _string_check(operation: str, text: str, reference: str) -> float:
    match operation:
        case "eq":
            return float(text == reference)
        case "ne" | "neq":
            return float(text != reference)
        case "like":
            return float(reference in text)
        case _:
            return float(reference.casefold() in text.casefold())


def similarity(metric: str, text: str, reference: str) -> float:
    """The similarity of two texts, from 0 to 1. Words are runs of letters and digits in lower case."""
    if metric == "fuzzy_match":
        from rapidfuzz import fuzz, utils

        return float(fuzz.WRatio(text, reference, processor=utils.default_process)) / 100
    if metric.startswith("rouge"):
        from rouge_score.rouge_scorer import RougeScorer

        name = "rougeL" if metric == "rouge_l" else f"rouge{metric[-1]}"
        return float(RougeScorer([name], tokenizer=WordTokenizer()).score(reference, text)[name].fmeasure)
    words, of_reference = (WordTokenizer().tokenize(words) for words in (text, reference))
    return _bleu(words, of_reference) if metric == "bleu" else _gleu(words, of_reference)


def _overlap(words: list[str], reference: list[str], n: int) -> tuple[int, int, int]:
    """Numbers of n-grams: shared ones, all of the words, all of the reference."""
    ours, theirs = (Counter(zip(*(side[i:] for i in range(n)), strict=False)) for side in (words, reference))
    return (ours & theirs).total(), ours.total(), theirs.total()


def _bleu(words: list[str], reference: list[str]) -> float:
    logs = []
    for n in range(1, NGRAMS + 1):
        same, ours, _ = _overlap(words, reference, n)
        if n == 1 and not same:
            return 0.0
        more = int(n > 1)
        logs.append(math.log((same + more) / (ours + more)))
    brevity = min(0.0, 1 - len(reference) / len(words))
    return math.exp(brevity + sum(logs) / NGRAMS)


def _gleu(words: list[str], reference: list[str]) -> float:
    counts = [_overlap(words, reference, n) for n in range(1, NGRAMS + 1)]
    same, ours, theirs = (sum(column) for column in zip(*counts, strict=True))
    return same / max(ours, theirs) if ours and theirs else 0.0


def _has(pattern: str, text: str) -> bool:
    try:
        return re.search(pattern, text) is not None
    except (re.error, RecursionError) as error:
        raise GradeError("exception", f"pattern {pattern!r}: {error}") from None


def _number(grader: schema.Number, text: str, reference: str) -> float:
    wanted = _as_number(reference)
    if wanted is None:
        raise GradeError("not_a_number", f"reference: {reference[:40]!r} is not a number")
    written = _NUMBER.findall(text)[-1:] if grader.last else [text]
    value = _as_number(written[0]) if written else None
    return float(value is not None and abs(value - wanted) <= grader.tolerance * max(1.0, abs(wanted)))


def _as_number(text: str) -> float | None:
    match = _NUMBER.fullmatch(text.strip())
    return float(match[0].replace(",", "").replace("−", "-")) if match else None


def _length(grader: schema.Length, text: str, tokens: int | None) -> float:
    """1 within [low, high]; below it rises from 0 at an empty text, above it falls to 0 at twice `high`."""
    lengths = {"words": len(text.split()), "characters": len(text)}
    num = lengths.get(grader.unit, tokens or 0)
    if num < grader.low:
        return num / grader.low
    return max(0.0, 1 - max(0.0, num - grader.high) / grader.high)


@lru_cache(64)
def _validator(text: str) -> Any:
    """The validator of a JSON schema, which may refer to itself and to the published drafts: nothing is read
    from an address or a file. Raises InputError for a schema that is invalid."""
    from jsonschema import exceptions, validators
    from jsonschema_specifications import REGISTRY

    of_schema = json.loads(text)
    try:
        kind = validators.validator_for(of_schema)
        kind.check_schema(of_schema)
    except (exceptions.SchemaError, TypeError, AttributeError) as error:
        why = getattr(error, "message", "$schema is no text")
        raise InputError(f"json_schema: schema: it is not a JSON schema: {why}") from None
    return kind(of_schema, registry=REGISTRY)


def _schema(grader: schema.JsonSchema, text: str) -> float:
    """1 / (1 + errors of the schema), so 1 for a text without errors; 0 for a text that is not JSON."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return 0.0
    from referencing.exceptions import Unresolvable

    errors = 0
    try:
        for _ in _validator(json.dumps(grader.json_schema)).iter_errors(value):
            errors += 1
            if errors == MOST_SCHEMA_ERRORS:
                break
    except Unresolvable as error:
        raise GradeError("exception", f"schema: it refers to {error.ref}, which is not in it") from None
    return 1 / (1 + errors)
