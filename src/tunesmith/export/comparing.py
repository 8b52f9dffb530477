"""Two models by what was seen of them: how far apart they are, and whether that is within bounds."""

# N positions, V vocabulary or classes

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from tunesmith.export.options import Bounds
from tunesmith.export.probe import Seen
from tunesmith.export.sketches import furthest
from tunesmith.types import Labels

KL, COSINE, RELATIVE = "KL divergence", "1 − cosine", "relative error"
"""What is between two models: of next tokens and classes in nats, of vectors of texts, of numbers."""
CHANCE = 2.0
"""Standard errors by which a held-out loss may be past its bound."""
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Comparison:
    """How far what was exported is from the tuned model."""

    rows: int
    positions: int
    """Places where next tokens or classes were compared."""
    same_ids: bool
    """Whether both tokenizers made the same tokens of every row and prompt."""
    difference: str
    """Where the first other token is."""
    kl: float
    """Mean KL divergence, tuned from exported, in nats; of numbers and vectors what `measure` says."""
    kl_max: float
    top1: float
    """Share of positions with the same first choice; of numbers 1; of vectors the share of texts that the same other
    text is nearest to."""
    loss_tuned: float | None
    loss_exported: float | None
    loss_error: float | None
    """Standard error of their difference over the rows that were compared; None for fewer than two."""
    carried: float | None
    """How much of what tuning changed is in the export: the slope of (exported − base) on (tuned − base), over all
    logits. 1: all of it, 0: none. None where there is no base to compare with, or tuning changed nothing."""
    error_to_effect: float | None
    """Size of the error over the size of what tuning changed."""
    answers: int
    same_answers: int
    furthest: str
    """The weight that is furthest from base plus delta; empty where weights were not compared."""
    distance: float
    """How far, over its size; estimated from sketches."""
    measure: str = KL

    def problems(self, bounds: Bounds) -> list[str]:
        """What is past its bound, in words."""
        found = [] if self.same_ids else [f"its tokens are others: {self.difference}"]
        most = bounds.cosine if self.measure == COSINE else bounds.kl
        if self.same_ids and not self.kl <= most:
            unit = " nats" if self.measure == KL else ""
            found.append(f"its {self.measure} from the tuned model is {self.kl:.2g}{unit}, at most {most:g} allowed")
        if self.loss_tuned is not None and self.loss_exported is not None:
            moved = self.loss_exported - self.loss_tuned
            # On few rows rounding moves the loss this way or that by chance alone; the KL divergence has a bound too.
            chance = CHANCE * (self.loss_error or 0.0)
            if not (abs(moved) <= bounds.loss + chance or (bounds.loss_may_fall and moved <= 0)):
                limit = f"{bounds.loss:g} allowed" + (f", and {chance:.4f} by chance on few rows" if chance else "")
                found.append(f"its held-out loss is {moved:+.4f} from the tuned model's, at most {limit}")
        if self.carried is not None and not abs(self.carried - 1) <= bounds.carried:
            found.append(
                f"it carries {round(self.carried, 3) + 0.0:.1%} of what tuning changed, "
                f"at most {bounds.carried:.0%} off 100 % allowed"
            )
        if not self.distance <= bounds.weights:
            found.append(
                f"{self.furthest} differs by {self.distance:.2g} of its size, at most {bounds.weights:g} allowed"
            )
        elif found and self.furthest:
            found.append(f"{self.furthest} differs most, by {self.distance:.2g} of its size")
        return found

    def values(self) -> dict[str, object]:
        """As verify.json has it."""
        return asdict(self)


def compare(tuned: Seen, exported: Seen, *, base: Seen | None, labels: Labels | None) -> Comparison:
    """`base`: the model without its adapter, on the same rows."""
    difference = _first_difference(tuned, exported)
    is_same = not difference
    weight, distance = furthest(tuned.weights, exported.weights) if exported.weights else ("", 0.0)
    kl_N, top_N = np.zeros(0), np.ones(0, np.bool_)
    carried = share = None
    if is_same:
        pairs = list(zip(tuned.logits, exported.logits, strict=True))
        if tuned.vectors:
            kl_N, top_N = _between_vectors(tuned.logits, exported.logits)
        else:
            kl_N = np.concatenate([np.zeros(0), *(_divergence(a.astype(np.float64), b, labels) for a, b in pairs)])
            top_N = np.concatenate([top_N, *(_same_choice(a, b, labels) for a, b in pairs)])
        if base is not None:
            carried, share = _effect(tuned, exported, base)
    return Comparison(
        rows=len(tuned.ids),
        positions=len(kl_N),
        same_ids=is_same,
        difference=difference,
        kl=float(kl_N.mean()) if len(kl_N) else (0.0 if is_same else float("nan")),
        kl_max=float(kl_N.max(initial=0.0)),
        top1=float(top_N.mean()) if len(top_N) else 1.0,
        loss_tuned=tuned.loss,
        loss_exported=exported.loss,
        loss_error=_loss_error(tuned, exported),
        carried=carried,
        error_to_effect=share,
        answers=len(tuned.answers),
        same_answers=sum(a == b for a, b in zip(tuned.answers, exported.answers, strict=False)),
        furthest=weight,
        distance=distance,
        measure=COSINE if tuned.vectors else RELATIVE if labels is not None and labels.kind == "number" else KL,
    )


def _first_difference(tuned: Seen, exported: Seen) -> str:
    pairs = (
        ("row", tuned.ids, exported.ids),
        ("prompt", tuned.prompts, exported.prompts),
        ("fixed text", tuned.texts, exported.texts),
    )
    for what, ours, theirs in pairs:
        if len(ours) != len(theirs):
            return f"{len(ours)} {what}s were made of the probes, {len(theirs)} by the export"
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            if a != b:
                place = next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
                return f"{what} {i + 1} at token {place + 1}: {a[place : place + 4]} became {b[place : place + 4]}"
    return ""


def _loss_error(tuned: Seen, exported: Seen) -> float | None:
    """Standard error of the difference of two losses a target on the same rows, which are of different lengths: that of
    a ratio, rows being what was drawn (Cochran, "Sampling Techniques", 1977, section 6.4)."""
    num = len(tuned.losses)
    if num < 2 or len(exported.losses) != num:
        return None
    moved, counts = np.asarray(exported.losses) - np.asarray(tuned.losses), np.asarray(tuned.counts, np.float64)
    total = max(float(counts.sum()), 1.0)
    rest = moved - moved.sum() / total * counts
    return float(np.sqrt((rest**2).sum() * num / (num - 1)) / total)


def _divergence(tuned_NV: Floats, exported_NV: NDArray[np.float32], labels: Labels | None) -> Floats:
    other_NV = exported_NV.astype(np.float64)
    if labels is not None and labels.kind == "number":
        return np.asarray(np.abs(other_NV - tuned_NV)[:, 0] / np.maximum(np.abs(tuned_NV[:, 0]), 1.0))
    if labels is not None and labels.kind == "many":
        p, q = (np.stack([x, np.zeros_like(x)], -1) for x in (tuned_NV, other_NV))
        return np.asarray(_kl(p, q).mean(-1))
    return _kl(tuned_NV, other_NV)


def _kl(logits: Floats, others: Floats) -> Floats:
    log_p, log_q = (x - x.max(-1, keepdims=True) for x in (logits, others))
    log_p, log_q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (log_p, log_q))
    return np.asarray(np.maximum((np.exp(log_p) * (log_p - log_q)).sum(-1), 0.0))


def _same_choice(
    tuned_NV: NDArray[np.float32], exported_NV: NDArray[np.float32], labels: Labels | None
) -> NDArray[np.bool_]:
    if labels is not None and labels.kind == "number":
        return np.ones(len(tuned_NV), np.bool_)
    if labels is not None and labels.kind == "many":
        return np.asarray(((tuned_NV > 0) == (exported_NV > 0)).all(-1))
    return np.asarray(tuned_NV.argmax(-1) == exported_NV.argmax(-1))


def _between_vectors(
    tuned: Sequence[NDArray[np.float32]], exported: Sequence[NDArray[np.float32]]
) -> tuple[Floats, NDArray[np.bool_]]:
    """1 − cosine of each text, and whether the same other text is nearest to it."""
    ours_ND, theirs_ND = (np.concatenate(vectors).astype(np.float64) for vectors in (tuned, exported))
    ours_ND, theirs_ND = (
        x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12) for x in (ours_ND, theirs_ND)
    )
    nearest = [(x @ x.T - 2 * np.eye(len(x))).argmax(-1) for x in (ours_ND, theirs_ND)]
    return np.maximum(1 - (ours_ND * theirs_ND).sum(-1), 0.0), nearest[0] == nearest[1]


def _effect(tuned: Seen, exported: Seen, base: Seen) -> tuple[float | None, float | None]:
    """Share of the effect that is carried, and size of the error over size of the effect; logits less their mean,
    which no probability depends on."""
    inner = moved = error = 0.0
    for a, b, c in zip(tuned.logits, exported.logits, base.logits, strict=True):
        ours, theirs, before = (x.astype(np.float64) - _level(x) for x in (a, b, c))
        effect = ours - before
        inner += float(((theirs - before) * effect).sum())
        moved += float((effect**2).sum())
        error += float(((theirs - ours) ** 2).sum())
    size = sum(x.size for x in tuned.logits)
    if moved <= 1e-12 * max(size, 1):
        return None, None
    return inner / moved, (error / moved) ** 0.5


def _level(logits_NV: NDArray[np.float32]) -> Floats | float:
    return logits_NV.astype(np.float64).mean(-1, keepdims=True) if logits_NV.shape[-1] > 1 else 0.0
