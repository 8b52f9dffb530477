"""Losses of pairs as TRL computes them, for fixed log-probabilities: run it where TRL is installed.

python tests/tasks/trl_losses.py > tests/tasks/trl_losses.json
"""

import json
from collections import defaultdict
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any

import torch
from trl import DPOTrainer, KTOTrainer, RewardTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer

NAMES = {"dpo": "sigmoid", "robust": "robust", "hinge": "hinge", "ipo": "ipo", "dpo_norm": "sigmoid_norm"}
NAMES["apo_zero"] = "apo_zero"


def pairs() -> list[dict[str, Any]]:
    """Log-probabilities of each token of both answers, of different lengths, and sums of a reference."""
    draw = torch.Generator().manual_seed(7)
    found = []
    for chosen, rejected in ((3, 3), (1, 9), (12, 4), (40, 41), (2, 1)):
        logps = [(-3 * torch.rand(n, generator=draw, dtype=torch.float64)).tolist() for n in (chosen, rejected)]
        moved = (2 * torch.randn(2, generator=draw, dtype=torch.float64)).tolist()
        found.append({"logps": logps, "reference": [sum(of) - by for of, by in zip(logps, moved, strict=True)]})
    return found


def dpo(pair: dict[str, Any], loss: str, beta: float, smoothing: float) -> float:
    """One pair through DPOTrainer's own computation, with a prompt of one token."""
    length = 1 + max(map(len, pair["logps"]))
    logps = torch.zeros(2, length - 1, dtype=torch.float64)
    mask = torch.zeros(2, length, dtype=torch.int64)
    for side, tokens in enumerate(pair["logps"]):
        logps[side, : len(tokens)] = torch.tensor(tokens, dtype=torch.float64)
        mask[side, 1 : 1 + len(tokens)] = 1
    outputs = SimpleNamespace(
        log_probs=logps, entropy=logps, mean_logits=logps, is_top1=torch.zeros_like(logps, dtype=torch.bool)
    )
    chosen, rejected = torch.tensor(pair["reference"], dtype=torch.float64)
    same = lambda value: value  # noqa: E731
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=False),
        accelerator=SimpleNamespace(device="cpu", gather=same, gather_for_metrics=same),
        aux_loss_enabled=False, ld_alpha=None, precompute_ref_logps=True, f_divergence_type="reverse_kl",
        loss_types=[NAMES[loss]], loss_weights=[1.0], beta=beta, label_smoothing=smoothing, use_weighting=False,
        _metrics={"eval": defaultdict(list)}, _total_train_tokens=0,
    )  # fmt: skip
    inputs = {
        "input_ids": mask, "completion_mask": mask, "attention_mask": mask,
        "ref_chosen_logps": chosen[None], "ref_rejected_logps": rejected[None],
    }  # fmt: skip
    return float(DPOTrainer._compute_loss(trainer, lambda **kwargs: outputs, inputs, False))


def free(pair: dict[str, Any], loss: str, beta: float) -> float:
    """CPO, SimPO and ORPO, with their likelihood of the chosen answer as `_get_batch_loss_metrics` adds it."""
    sums = [sum(of) for of in pair["logps"]]
    means = [total / len(of) for total, of in zip(sums, pair["logps"], strict=True)]
    chosen, rejected = (torch.tensor([one], dtype=torch.float64) for one in (sums if loss == "cpo" else means))
    if loss == "orpo":
        losses, *_ = ORPOTrainer.odds_ratio_loss(SimpleNamespace(beta=beta, accelerator=_CPU), chosen, rejected)
        return float(-means[0] - losses)
    kind = "sigmoid" if loss == "cpo" else "simpo"
    trainer = SimpleNamespace(
        alpha=0.0, accelerator=_CPU, loss_type=kind, simpo_gamma=beta / 2, beta=beta, label_smoothing=0.0
    )
    losses, *_ = CPOTrainer.cpo_loss(trainer, chosen, rejected)
    return float(losses) - (means[0] if loss == "cpo" else 0.0)


_CPU = SimpleNamespace(device="cpu")
_SAME: Any = SimpleNamespace(device="cpu", gather=lambda value: value, gather_for_metrics=lambda value: value)


def answers() -> dict[str, Any]:
    """A batch of answers with labels: sums of their log-probabilities and those of mismatched ones, and references."""
    draw = torch.Generator().manual_seed(11)
    own, ref, kl, kl_ref = (-20 * torch.rand(7, generator=draw, dtype=torch.float64) for _ in range(4))
    labels = [True, False, True, True, False, True, True]
    found = {"logps": own, "reference": ref, "mismatched": kl, "mismatched_reference": kl_ref - 3}
    return {**{key: value.tolist() for key, value in found.items()}, "label": labels}


def kto(batch: dict[str, Any], beta: float, desirable: float, undesirable: float) -> float:
    """A batch through KTOTrainer's own computation, with answers of one token."""
    own, ref, kl, kl_ref = (torch.tensor(batch[key], dtype=torch.float64)
                            for key in ("logps", "reference", "mismatched", "mismatched_reference"))  # fmt: skip
    ids = torch.ones(len(own), 2, dtype=torch.int64)
    outputs = SimpleNamespace(log_probs=own[:, None], entropy=own[:, None], mean_logits=own[:, None])
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=False), accelerator=_SAME, aux_loss_enabled=False, precompute_ref_logps=True,
        calculate_KL=True, loss_type="kto", beta=beta, desirable_weight=desirable, undesirable_weight=undesirable,
        _compute_kl_logps=lambda model, batch: kl, _metrics={"eval": defaultdict(list)}, _total_train_tokens=0,
    )  # fmt: skip
    inputs = {"input_ids": ids, "completion_mask": ids, "label": torch.tensor(batch["label"]), "ref_logps": ref}
    loss = KTOTrainer._compute_loss(trainer, lambda **kwargs: outputs, {**inputs, "ref_KL_logps": kl_ref}, False)
    return float(loss[0] if isinstance(loss, tuple) else loss)


def rewards() -> dict[str, Any]:
    draw = torch.Generator().manual_seed(5)
    chosen, rejected = ((3 * torch.randn(6, generator=draw, dtype=torch.float64)).tolist() for _ in range(2))
    return {"chosen": chosen, "rejected": rejected, "margin": [0.0, 1.0, 0.5, 0.0, 2.0, 0.25]}


def reward(batch: dict[str, Any], center: float | None, *, margin: bool) -> float:
    """A batch through RewardTrainer's own computation."""
    logits = torch.tensor(batch["chosen"] + batch["rejected"], dtype=torch.float64)[:, None]
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=False), accelerator=_SAME,
        args=SimpleNamespace(center_rewards_coefficient=center), _metrics={"eval": defaultdict(list)},
        _total_train_tokens=0,
    )  # fmt: skip
    inputs = {"margin": torch.tensor(batch["margin"], dtype=torch.float64)} if margin else {}
    return float(RewardTrainer.compute_loss(trainer, lambda **kwargs: SimpleNamespace(logits=logits), inputs))


def main() -> None:
    found: dict[str, Any] = {"trl": version("trl"), "pairs": pairs(), "losses": {}}
    for loss in NAMES:
        beta, smoothing = (5.0 if loss == "dpo_norm" else 0.1), (0.2 if loss == "robust" else 0.0)
        found["losses"][loss] = [dpo(pair, loss, beta, smoothing) for pair in found["pairs"]]
    for loss, beta in (("simpo", 2.0), ("cpo", 0.1), ("orpo", 0.1)):
        found["losses"][loss] = [free(pair, loss, beta) for pair in found["pairs"]]
    found["answers"], found["rewards"] = answers(), rewards()
    found["kto"] = [{"beta": b, "weights": [d, u], "loss": kto(found["answers"], b, d, u)}
                    for b, d, u in ((0.1, 1.0, 1.0), (0.3, 1.0, 2.5), (0.1, 1.5, 1.0))]  # fmt: skip
    found["reward"] = [{"center": c, "margin": m, "loss": reward(found["rewards"], c, margin=m)}
                       for c, m in ((None, False), (None, True), (0.01, False), (0.5, True))]  # fmt: skip
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
