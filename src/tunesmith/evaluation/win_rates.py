"""Rates at which answers of a tuned model win against those from before, by what a judge said of each prompt."""

# I prompts, R resamples, 2: constant, length

from __future__ import annotations

import numpy as np

from tunesmith.evaluation.bootstrap import Floats, Interval, intervals, ratio
from tunesmith.evaluation.predict_rows import sigmoid

RIDGE = (1e-3, 1.0)  # penalties of a² and b²: they stay finite where one side always wins


def win_rates(won_I: Floats, longer_I: Floats) -> dict[str, Interval]:
    """`win_rate`, and `win_rate_alike`, what it would be for answers as long as those before.

    `won_I`: 1 where the later answer is better, 0.5 a tie. `longer_I`: words that it has more. The second is σ(a) of
    P(won) = σ(a + b tanh(longer / spread)) (Dubois et al. 2024, arXiv 2404.04475, section 3, without the term of the
    prompt's difficulty).
    """
    given_I2 = np.stack([np.ones_like(longer_I), np.tanh(longer_I / (longer_I.std() or 1.0))], axis=1)

    def alike(weights_RI: Floats) -> Floats:
        ab_R2 = np.zeros((len(weights_RI), 2))
        for _ in range(20):  # Newton's method
            p_RI = sigmoid(ab_R2 @ given_I2.T)
            slope_R2 = (weights_RI * (won_I - p_RI)) @ given_I2 - RIDGE * ab_R2
            curve_R22 = np.einsum("ri,ij,ik->rjk", weights_RI * p_RI * (1 - p_RI), given_I2, given_I2) + np.diag(RIDGE)
            ab_R2 += np.linalg.solve(curve_R22, slope_R2[..., None])[..., 0]
        return sigmoid(ab_R2[:, 0])

    return intervals(len(won_I), {"win_rate": ratio(won_I), "win_rate_alike": alike})
