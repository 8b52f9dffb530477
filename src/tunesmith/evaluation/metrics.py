"""Table of metrics: the label, form, direction and definition of each."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from tunesmith.errors import InputError
from tunesmith.phrases import percent
from tunesmith.types import REWARD_KEY, Record

Verdict = Literal["better", "worse", "unclear", "few", ""]
VERDICTS = {"better": "better", "worse": "worse", "unclear": "may be chance", "few": "too few rows to tell", "": ""}
"""Words for a verdict in a table."""
FEW_ROWS = 30
"""Rows below which percentile intervals are clearly too narrow: by 6 % at 30, 23 % at 6 (Hesterberg 2015)."""
FEWEST_ROWS = 6
"""Rows below which nothing is called better or worse: all of five pairs point one way by chance in 6 %."""


@dataclass(frozen=True, slots=True)
class MetricInfo:
    """One metric in words."""

    label: str
    form: Literal["number", "percent", "ratio"]
    """number: four digits after the point or fewer; percent: of a share; ratio: two digits."""
    better: Literal["lower", "higher", "neither"]
    doc: str

    def text(self, value: float) -> str:
        """A value as it is printed."""
        if math.isnan(value):
            return "–"
        form = ".2f" if self.form == "ratio" else ".4f" if abs(value) < 100 else ",.1f"
        return (percent(value) if self.form == "percent" else f"{value:{form}}").replace("-", "−")

    def bounds(self, interval: Record) -> str:
        """The ends of an interval, in fewer digits than its value; empty where there is none, or a point."""
        low, high = interval.get("low", math.nan), interval.get("high", math.nan)
        if not low < high:
            return ""
        if self.form == "percent":
            return f"{low * 100:.1f}–{high * 100:.1f}"
        dash = " to " if low < 0 else "–"
        text = f"{low:.2f}{dash}{high:.2f}" if self.form == "ratio" else f"{low:.3f}{dash}{high:.3f}"
        return text.replace("-", "−")

    def whole(self, interval: Record) -> str:
        """A value with its interval: 1.2300 (1.200–1.250)."""
        return with_bounds(self.text(interval["value"]), self.bounds(interval))

    def difference(self, interval: Record) -> str:
        """A difference of two values with its interval: +3.2 (+1.0 to +5.1) points."""
        if not math.isfinite(interval["value"]):
            return ""
        scale, unit = (100.0, " points") if self.form == "percent" else (1.0, "")
        digits = {"percent": 1, "ratio": 2, "number": 4}[self.form]
        value, low, high = (
            f"{interval.get(end, math.nan) * scale:+.{digits}f}".replace("-", "−") for end in ("value", "low", "high")
        )
        return f"{value} ({low} to {high}){unit}" if "nan" not in low + high else f"{value}{unit}"

    def worth(self, change: Record) -> str:
        """A paired difference and its verdict: +3.2 (+1.0 to +5.1) points, better."""
        words = filter(None, [self.difference(change), VERDICTS[self.verdict(change)]])
        return "the same" if change["value"] == 0 else ", ".join(words)

    def verdict(self, change: Record) -> Verdict:
        """Verdict on a paired difference: unclear where its interval holds 0, few where rows are too few."""
        if change["value"] == 0 or not math.isfinite(change["value"]):
            return ""
        if not change["is_clear"]:
            return "few" if change.get("low", 0) > 0 or change.get("high", 0) < 0 else "unclear"
        gain = {"lower": -1, "higher": 1, "neither": 0}[self.better] * change["value"]
        return "better" if gain > 0 else "worse" if gain < 0 else ""


def with_bounds(value: str, bounds: str) -> str:
    return f"{value} ({bounds})" if bounds else value


METRICS: Mapping[str, MetricInfo] = {
    "loss": MetricInfo("loss", "number", "lower", "Mean loss per target: nats, or squared error of numbers."),
    "perplexity": MetricInfo("perplexity", "ratio", "lower", "exp of the loss: choices the model wavers between."),
    "token_accuracy": MetricInfo("token accuracy", "percent", "higher", "Targets that were the first choice."),
    "bits_per_byte": MetricInfo(
        "bits per byte", "number", "lower", "Loss over the UTF-8 bytes of the text: comparable across tokenizers."
    ),
    "accuracy": MetricInfo("accuracy", "percent", "higher", "Rows whose most likely class is right (scikit-learn)."),
    "majority": MetricInfo(
        "majority baseline", "percent", "neither", "What always giving the training rows' commonest answer gets right."
    ),
    "macro_f1": MetricInfo("macro-F1", "number", "higher", "Mean over classes of the F1 score (scikit-learn)."),
    "micro_f1": MetricInfo("micro-F1", "number", "higher", "F1 over all classes and rows together (scikit-learn)."),
    "exact_rows": MetricInfo("subset accuracy", "percent", "higher", "Rows whose whole set of classes is right."),
    "label_accuracy": MetricInfo(
        "label accuracy",
        "percent",
        "higher",
        "Of all pairs of a row and a class, those answered rightly (1 - Hamming loss).",
    ),
    "roc_auc": MetricInfo("ROC AUC", "number", "higher", "Two classes: chance that a positive is above a negative."),
    "calibration_error": MetricInfo(
        "calibration error", "number", "lower", "Mean gap of confidence and accuracy, ten bins of equal width (ECE)."
    ),
    "mse": MetricInfo("mean squared error", "number", "lower", "Of numbers, in the square of their unit."),
    "baseline_mse": MetricInfo(
        "mean baseline", "number", "neither", "Squared error of always answering the training rows' mean."
    ),
    "spearman": MetricInfo("Spearman correlation", "number", "higher", "Rank correlation of numbers (scipy)."),
    "span_f1": MetricInfo("span F1", "number", "higher", "Whole spans with the right type (seqeval)."),
    "span_precision": MetricInfo("span precision", "number", "higher", "Spans found that are right (seqeval)."),
    "span_recall": MetricInfo("span recall", "number", "higher", "Right spans that are found (seqeval)."),
    "tag_accuracy": MetricInfo("tag accuracy", "percent", "higher", "Words with the right tag."),
    "exact_match": MetricInfo("exact match", "percent", "higher", "Answers equal to the reference."),
    "rouge1": MetricInfo("ROUGE-1", "number", "higher", "F1 of words shared with the reference (rouge-score)."),
    "rouge2": MetricInfo("ROUGE-2", "number", "higher", "F1 of word pairs shared with the reference (rouge-score)."),
    "rougeL": MetricInfo("ROUGE-L", "number", "higher", "F1 of the longest common subsequence (rouge-score)."),
    "length_ratio": MetricInfo("length ratio", "ratio", "neither", "Words of answers over words of references."),
    "preference_accuracy": MetricInfo(
        "preference accuracy",
        "percent",
        "higher",
        "Pairs whose chosen answer gained more, or has more reward; ties half.",
    ),
    "margin": MetricInfo(
        "margin", "number", "higher", "Mean difference that the loss compares; of preferences times β."
    ),
    "chosen_shift": MetricInfo(
        "shift of chosen", "number", "neither", "Log-probability a token that chosen answers gained, in nats."
    ),
    "rejected_shift": MetricInfo("shift of rejected", "number", "neither", "The same of rejected answers."),
    "longer_chosen": MetricInfo(
        "longer answer", "percent", "neither", "What always choosing the longer answer would get right."
    ),
    "likelier_chosen": MetricInfo(
        "likelier answer", "percent", "neither", "What choosing by the untouched model's likelihood a token gets right."
    ),
    REWARD_KEY: MetricInfo(REWARD_KEY, "number", "higher", "Mean reward of the answers drawn to a prompt."),
    "pass_1": MetricInfo("pass@1", "percent", "higher", "Chance that one answer to a prompt is right."),
    "pass_k": MetricInfo("pass@k", "percent", "higher", "Chance that one of all answers to a prompt is right."),
    "best_reward": MetricInfo("best reward", "number", "higher", "Highest reward of the answers to a prompt."),
    "ended": MetricInfo("ended", "percent", "neither", "Answers that end before reinforce.max_new_tokens."),
    "answer_tokens": MetricInfo("answer tokens", "ratio", "neither", "Mean length of the answers."),
    "repeated": MetricInfo(
        "repeated", "percent", "lower", "Answers with a phrase of four words more than three times."
    ),
    "nats_away": MetricInfo(
        "nats away", "ratio", "neither", "Log-ratio of an answer, by the model and by the untouched one."
    ),
    "agreement": MetricInfo(
        "agreement", "percent", "higher", "Targets at which the teacher's likeliest token is the model's."
    ),
    "answer_loss": MetricInfo(
        "loss of the rows' answers", "number", "neither", "Mean loss of the rows' tokens, in nats."
    ),
    "alike": MetricInfo("alike", "percent", "neither", "Answers equal to another one to the same prompt."),
    "reward_mean": MetricInfo("mean reward", "number", "neither", "Mean reward of all answers."),
    "win_rate": MetricInfo("win rate", "percent", "higher", "Answers that a judge prefers to those before; ties half."),
    "recall_1": MetricInfo("recall@1", "percent", "higher", "Anchors whose positive is the nearest of all documents."),
    "recall_10": MetricInfo("recall@10", "percent", "higher", "Anchors whose positive is among the ten nearest."),
    "mrr_10": MetricInfo("MRR@10", "number", "higher", "Mean of 1 / rank of the positive, 0 beyond the tenth."),
    "ndcg_10": MetricInfo("nDCG@10", "number", "higher", "Mean of 1 / log2(1 + rank) of the positive, 0 beyond."),
    "general_loss": MetricInfo("general text", "number", "lower", "Loss on the general text kept in the package."),
}

BASELINES = ("majority", "baseline_mse")
"""Metrics of a constant answer: they say something of the rows, not of the model."""
ANSWER_METRICS = ("exact_match", "rouge1", "rouge2", "rougeL", "length_ratio")
"""Metrics of the prompts that were answered, not of all rows."""

HEAD_METRICS: Mapping[str, tuple[str, ...]] = {
    "next_token": ("loss", "perplexity", "token_accuracy", "bits_per_byte"),
    "masked_token": ("loss", "perplexity", "token_accuracy"),
    "one": ("loss", "accuracy", "macro_f1", "roc_auc", "calibration_error"),
    "many": ("loss", "micro_f1", "macro_f1", "exact_rows", "label_accuracy"),
    "number": ("loss", "mse", "spearman"),
    "tags": ("loss", "tag_accuracy", "span_f1", "span_precision", "span_recall", "macro_f1"),
    "pairs": ("loss", "preference_accuracy", "margin"),
    "rewards": ("loss", "preference_accuracy", "margin", "calibration_error"),
    "graded": (REWARD_KEY, "pass_1", "loss"),
    "taught": ("loss", "agreement", "answer_loss"),
    "lists": ("loss", "recall_1", "mrr_10", "ndcg_10", "spearman"),
    "vectors": ("loss", "recall_1", "recall_10", "mrr_10", "ndcg_10", "spearman"),
}
"""Values of `evaluation.metric` by head, or by kind of label where there is one. Some need data of their own:
bits per byte documents, ROC AUC two classes, span metrics tags that mark spans."""


def is_restated(key: str, measures: Record) -> bool:
    """Whether another measure says the same: the loss of graded answers is their reward, turned round."""
    return key == "loss" and REWARD_KEY in measures


def info_of(key: str, drawn: int | None = None) -> MetricInfo:
    """The metric of that key; one of a newer version is shown under its key. `drawn`: the answers that were drawn
    to each prompt, which is the k of pass@k."""
    if key == "pass_k" and drawn:
        return replace(METRICS[key], label=f"pass@{drawn}")
    return METRICS.get(key) or MetricInfo(key, "number", "neither", "")


def refuse_no_answers(samples: int | None, judge: object, names: tuple[str, str] = ("--judge", "--samples 0")) -> None:
    """Raise InputError for a judge without answers to compare. `names`: the caller's words for the two."""
    if judge is not None and samples == 0:
        raise InputError(f"{names[0]}: compares answers, and with {names[1]} there are none. Leave one out.")
