"""Measures of generated answers beside their references. Values are those of rouge-score and sacrebleu."""

# I answers

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from tunesmith.environment import installing
from tunesmith.errors import RecipeError
from tunesmith.evaluation import statistics
from tunesmith.evaluation.comparing import SCORES
from tunesmith.evaluation.intervals import Estimate, Interval, intervals

_ROUGES = ("rouge1", "rouge2", "rougeL")
_UNSPACED = "\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"  # Thai, Lao, kana, Han: no spaces between words
_WORD = re.compile(f"[{_UNSPACED}]|[^\\W_{_UNSPACED}]+")


class Words:
    """Words in lower case: those of rouge-score in ASCII text, where other letters would be lost in the original."""

    def tokenize(self, text: str) -> list[str]:
        """Runs of letters and digits; each letter of a script without spaces is a word."""
        return _WORD.findall(text.lower())


SHORT_WORDS = 3
"""An answer of at most so many words is right or wrong: a class, a name, a date."""
MOSTLY = 0.9


def is_short(reference: str) -> bool:
    """Whether an answer is so short that it is right or wrong as a whole."""
    return len(Words().tokenize(reference)) <= SHORT_WORDS


def are_short(references: Sequence[str]) -> bool:
    """Whether most answers are."""
    return bool(references) and sum(map(is_short, references)) >= MOSTLY * len(references)


def answer_measures(answers: Sequence[str], references: Sequence[str], *, bleu: bool) -> dict[str, Interval]:
    """exact_match, rouge1, rouge2, rougeL, length_ratio, and with `bleu` also bleu and chrf; {} for no answers.

    Without rouge2 where no reference has two words, since it is 0 for any answer then.

    Raises RecipeError where `bleu` is asked for and sacrebleu is not installed.
    """
    if not answers:
        return {}
    scores = answer_scores(answers, references)
    words = Words().tokenize
    measures: dict[str, Estimate] = {}
    for key in SCORES:
        if key == "rouge2" and all(len(words(reference)) < 2 for reference in references):
            continue
        values_I = np.array([score[key] for score in scores])
        measures[key] = (float(values_I.mean()), statistics.ratio(values_I))
    lengths_I2 = np.array(
        [[len(words(text)) for text in pair] for pair in zip(answers, references, strict=True)], np.float64
    )
    ratio = statistics.ratio(lengths_I2[:, 0], lengths_I2[:, 1])
    measures["length_ratio"] = (float(ratio(np.ones((1, len(scores))))[0]), ratio)
    if bleu:
        measures |= _corpus_measures(answers, references)
    return intervals(len(scores), measures)


def answer_scores(answers: Sequence[str], references: Sequence[str]) -> list[dict[str, float]]:
    """Each answer's own `SCORES`, from 0 to 1."""
    from rouge_score.rouge_scorer import RougeScorer  # now: what it imports takes as long as a model

    scorer = RougeScorer(_ROUGES, tokenizer=Words())
    found = []
    for answer, reference in zip(answers, references, strict=True):
        rouges = {key: score.fmeasure for key, score in scorer.score(reference, answer).items()}
        found.append({"exact_match": float(answer.strip() == reference.strip()), **rouges})
    return found


def _corpus_measures(answers: Sequence[str], references: Sequence[str]) -> Iterator[tuple[str, Estimate]]:
    """BLEU and chrF of all answers together, and of resamples from each answer's counts."""
    try:
        from sacrebleu.metrics import BLEU, CHRF
    except ImportError as error:
        raise RecipeError(
            "evaluation.bleu: true needs the package sacrebleu, which is not installed. "
            f"Run {installing('bleu')}, or set evaluation.bleu: false."
        ) from error
    # force: a warning about text that looks tokenized would be printed by sacrebleu's own logger.
    for key, metric in (("bleu", BLEU(force=True)), ("chrf", CHRF())):
        yield (
            key,
            (metric.corpus_score(list(answers), [list(references)]).score, _of_counts(metric, answers, references)),
        )


def _of_counts(metric: Any, answers: Sequence[str], references: Sequence[str]) -> Any:
    """The corpus score as a function of weights. sacrebleu sums counts per answer; there is no public way to them."""
    counts_IK = np.array(metric._extract_corpus_statistics(list(answers), [list(references)]), np.float64)

    def statistic(weights_RI: statistics.Floats) -> statistics.Floats:
        sums_RK = (weights_RI @ counts_IK).astype(np.int64)
        return np.array([metric._compute_score_from_stats(sums_K.tolist()).score for sums_K in sums_RK])

    return statistic
