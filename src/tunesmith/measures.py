"""What can be measured on held-out rows: how each is called, written, and which way is better. Read by every face."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class MeasureInfo:
    """One measure in words."""

    label: str
    form: Literal["number", "percent", "ratio"]
    """number: four digits after the point or fewer; percent: of a share; ratio: two digits."""
    better: Literal["lower", "higher", "neither"]
    doc: str

    def text(self, value: float) -> str:
        """A value as it is printed."""
        if math.isnan(value):
            return "–"
        if self.form == "percent":
            return f"{value:.1%}"
        if self.form == "ratio":
            return f"{value:.2f}"
        return f"{value:.4f}" if abs(value) < 100 else f"{value:,.1f}"


MEASURES: Mapping[str, MeasureInfo] = {
    "loss": MeasureInfo("held-out loss", "number", "lower", "Mean loss per target: nats, or squared error of numbers."),
    "perplexity": MeasureInfo("perplexity", "ratio", "lower", "exp of the loss: choices the model wavers between."),
    "token_accuracy": MeasureInfo("tokens guessed right", "percent", "higher", "Targets that were the first choice."),
    "bits_per_byte": MeasureInfo(
        "bits per byte", "number", "lower", "Loss over the UTF-8 bytes of the text: comparable across tokenizers."
    ),
    "accuracy": MeasureInfo("accuracy", "percent", "higher", "Rows whose most likely class is right (scikit-learn)."),
    "majority": MeasureInfo(
        "always the commonest class", "percent", "neither", "Accuracy of answering the training rows' commonest class."
    ),
    "macro_f1": MeasureInfo("macro-F1", "number", "higher", "Mean over classes of the F1 score (scikit-learn)."),
    "micro_f1": MeasureInfo("micro-F1", "number", "higher", "F1 over all classes and rows together (scikit-learn)."),
    "exact_rows": MeasureInfo("rows all right", "percent", "higher", "Rows whose whole set of classes is right."),
    "roc_auc": MeasureInfo("ROC AUC", "number", "higher", "Two classes: chance that a positive is above a negative."),
    "calibration_error": MeasureInfo(
        "calibration error", "number", "lower", "Mean gap of confidence and accuracy, ten bins of equal width (ECE)."
    ),
    "mse": MeasureInfo("mean squared error", "number", "lower", "Of numbers, in the square of their unit."),
    "baseline_mse": MeasureInfo(
        "always the mean", "number", "neither", "Squared error of answering the training rows' mean."
    ),
    "spearman": MeasureInfo("Spearman correlation", "number", "higher", "Rank correlation of numbers (scipy)."),
    "span_f1": MeasureInfo("span F1", "number", "higher", "Whole spans with the right type (seqeval)."),
    "span_precision": MeasureInfo("span precision", "number", "higher", "Spans found that are right (seqeval)."),
    "span_recall": MeasureInfo("span recall", "number", "higher", "Right spans that are found (seqeval)."),
    "tag_accuracy": MeasureInfo("tags right", "percent", "higher", "Words with the right tag."),
    "exact_match": MeasureInfo("answers exactly right", "percent", "higher", "Answers equal to the reference."),
    "rouge1": MeasureInfo("ROUGE-1", "number", "higher", "F1 of words shared with the reference (rouge-score)."),
    "rouge2": MeasureInfo("ROUGE-2", "number", "higher", "F1 of word pairs shared with the reference (rouge-score)."),
    "rougeL": MeasureInfo("ROUGE-L", "number", "higher", "F1 of the longest common subsequence (rouge-score)."),
    "length_ratio": MeasureInfo("length ratio", "ratio", "neither", "Words of answers over those of references."),
    "bleu": MeasureInfo("BLEU", "ratio", "higher", "Corpus BLEU, 0 to 100 (sacrebleu)."),
    "chrf": MeasureInfo("chrF", "ratio", "higher", "Corpus chrF, 0 to 100 (sacrebleu)."),
    "general_loss": MeasureInfo("general text", "number", "lower", "Loss on the general text kept in the package."),
}

OF_ANSWERS = ("exact_match", "rouge1", "rouge2", "rougeL", "length_ratio", "bleu", "chrf")
"""Measures of the prompts that were answered, not of all rows."""

MEASURED: Mapping[str, tuple[str, ...]] = {
    "next_token": ("loss", "perplexity", "token_accuracy", "bits_per_byte"),
    "masked_token": ("loss", "perplexity", "token_accuracy"),
    "one": ("loss", "accuracy", "macro_f1", "roc_auc", "calibration_error"),
    "many": ("loss", "micro_f1", "macro_f1", "exact_rows"),
    "number": ("loss", "mse", "spearman"),
    "tags": ("loss", "tag_accuracy", "span_f1", "span_precision", "span_recall", "macro_f1"),
}
"""What `evaluation.metric` can be, by head, or by kind of label where there is one; some need data of their own: bits
per byte documents, ROC AUC two classes, spans tags that mark them."""
