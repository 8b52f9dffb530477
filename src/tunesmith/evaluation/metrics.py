"""What can be measured on held-out rows: how each is called, written, and which way is better. Read by every face."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Verdict = Literal["better", "worse", "unclear", ""]
VERDICTS: Mapping[Verdict, str] = {"better": "better", "worse": "worse", "unclear": "may be chance", "": ""}
"""In a table."""
FEW_ROWS = 30
"""Rows below which percentile intervals are noticeably too narrow: by 6 % at 30 rows, 23 % at 6 (Hesterberg 2015)."""
LEAST_ROWS = 6
"""Rows below which nothing is called better or worse: of five pairs all point one way by chance in 6 % of cases."""


@dataclass(frozen=True, slots=True)
class MeasureInfo:
    """One measure in words."""

    label: str
    form: Literal["number", "percent", "ratio"]
    """number: four digits after the point or fewer; percent: of a share; ratio: two digits."""
    better: Literal["lower", "higher", "neither"]
    doc: str

    @property
    def phrase(self) -> str:
        """The label as the subject of a sentence."""
        of = {"exactly right": "answers exactly right"}.get(self.label, self.label)
        return f"the share of {of}" if of.endswith("right") else of

    def text(self, value: float) -> str:
        """A value as it is printed."""
        if math.isnan(value):
            return "–"
        if self.form == "percent":
            return f"{value:.1%}"
        if self.form == "ratio":
            return f"{value:.2f}"
        return f"{value:.4f}" if abs(value) < 100 else f"{value:,.1f}"

    def bounds(self, interval: Mapping[str, Any]) -> str:
        """The ends of an interval, in fewer digits than its value; empty where there is none, or a point."""
        low, high = interval.get("low", math.nan), interval.get("high", math.nan)
        if not low < high:
            return ""
        if self.form == "percent":
            return f"{low * 100:.1f}–{high * 100:.1f}"
        return f"{low:.2f}–{high:.2f}" if self.form == "ratio" else f"{low:.3f}–{high:.3f}"

    def difference(self, interval: Mapping[str, Any]) -> str:
        """A difference of two values with its interval: +3.2 (+1.0 to +5.1) points."""
        if not math.isfinite(interval["value"]):
            return ""
        scale, unit = (100.0, " points") if self.form == "percent" else (1.0, "")
        digits = {"percent": 1, "ratio": 2, "number": 4}[self.form]
        value, low, high = (
            f"{interval.get(end, math.nan) * scale:+.{digits}f}".replace("-", "−") for end in ("value", "low", "high")
        )
        return f"{value} ({low} to {high}){unit}" if "nan" not in low + high else f"{value}{unit}"

    def verdict(self, change: Mapping[str, Any]) -> Verdict:
        """What a paired difference is worth: unclear where its interval holds 0 or it rests on too few rows."""
        if self.better == "neither" or change["value"] == 0 or not math.isfinite(change["value"]):
            return ""
        if not change["is_clear"]:
            return "unclear"
        return "better" if (change["value"] < 0) == (self.better == "lower") else "worse"


MEASURES: Mapping[str, MeasureInfo] = {
    "loss": MeasureInfo("held-out loss", "number", "lower", "Mean loss per target: nats, or squared error of numbers."),
    "perplexity": MeasureInfo("perplexity", "ratio", "lower", "exp of the loss: choices the model wavers between."),
    "token_accuracy": MeasureInfo("tokens guessed right", "percent", "higher", "Targets that were the first choice."),
    "bits_per_byte": MeasureInfo(
        "bits per byte", "number", "lower", "Loss over the UTF-8 bytes of the text: comparable across tokenizers."
    ),
    "accuracy": MeasureInfo("accuracy", "percent", "higher", "Rows whose most likely class is right (scikit-learn)."),
    "majority": MeasureInfo(
        "majority baseline", "percent", "neither", "What always giving the training rows' commonest answer gets right."
    ),
    "macro_f1": MeasureInfo("macro-F1", "number", "higher", "Mean over classes of the F1 score (scikit-learn)."),
    "micro_f1": MeasureInfo("micro-F1", "number", "higher", "F1 over all classes and rows together (scikit-learn)."),
    "exact_rows": MeasureInfo("rows all right", "percent", "higher", "Rows whose whole set of classes is right."),
    "label_accuracy": MeasureInfo(
        "labels right",
        "percent",
        "higher",
        "Of all pairs of a row and a class, those answered rightly (1 - Hamming loss).",
    ),
    "roc_auc": MeasureInfo("ROC AUC", "number", "higher", "Two classes: chance that a positive is above a negative."),
    "calibration_error": MeasureInfo(
        "calibration error", "number", "lower", "Mean gap of confidence and accuracy, ten bins of equal width (ECE)."
    ),
    "mse": MeasureInfo("mean squared error", "number", "lower", "Of numbers, in the square of their unit."),
    "baseline_mse": MeasureInfo(
        "mean baseline", "number", "neither", "Squared error of always answering the training rows' mean."
    ),
    "spearman": MeasureInfo("Spearman correlation", "number", "higher", "Rank correlation of numbers (scipy)."),
    "span_f1": MeasureInfo("span F1", "number", "higher", "Whole spans with the right type (seqeval)."),
    "span_precision": MeasureInfo("span precision", "number", "higher", "Spans found that are right (seqeval)."),
    "span_recall": MeasureInfo("span recall", "number", "higher", "Right spans that are found (seqeval)."),
    "tag_accuracy": MeasureInfo("tags right", "percent", "higher", "Words with the right tag."),
    "exact_match": MeasureInfo("exactly right", "percent", "higher", "Answers equal to the reference."),
    "rouge1": MeasureInfo("ROUGE-1", "number", "higher", "F1 of words shared with the reference (rouge-score)."),
    "rouge2": MeasureInfo("ROUGE-2", "number", "higher", "F1 of word pairs shared with the reference (rouge-score)."),
    "rougeL": MeasureInfo("ROUGE-L", "number", "higher", "F1 of the longest common subsequence (rouge-score)."),
    "length_ratio": MeasureInfo("length ratio", "ratio", "neither", "Words of answers over those of references."),
    "bleu": MeasureInfo("BLEU", "ratio", "higher", "Corpus BLEU, 0 to 100 (sacrebleu)."),
    "chrf": MeasureInfo("chrF", "ratio", "higher", "Corpus chrF, 0 to 100 (sacrebleu)."),
    "general_loss": MeasureInfo("general text", "number", "lower", "Loss on the general text kept in the package."),
}

BASELINES = ("majority", "baseline_mse")
"""What a constant answer gets: a measure of the rows, not of the model."""
OF_ANSWERS = ("exact_match", "rouge1", "rouge2", "rougeL", "length_ratio", "bleu", "chrf")
"""Measures of the prompts that were answered, not of all rows."""

MEASURED: Mapping[str, tuple[str, ...]] = {
    "next_token": ("loss", "perplexity", "token_accuracy", "bits_per_byte"),
    "masked_token": ("loss", "perplexity", "token_accuracy"),
    "one": ("loss", "accuracy", "macro_f1", "roc_auc", "calibration_error"),
    "many": ("loss", "micro_f1", "macro_f1", "exact_rows", "label_accuracy"),
    "number": ("loss", "mse", "spearman"),
    "tags": ("loss", "tag_accuracy", "span_f1", "span_precision", "span_recall", "macro_f1"),
}
"""What `evaluation.metric` can be, by head, or by kind of label where there is one; some need data of their own: bits
per byte documents, ROC AUC two classes, spans tags that mark them."""


def info_of(key: str) -> MeasureInfo:
    """What is known of a measure; one of a newer version is shown under its key."""
    return MEASURES.get(key) or MeasureInfo(key, "number", "neither", "")
