"""AdaLoRA: all layers share one budget of ranks, which goes to those whose singular values matter most.

    ΔW = P Λ Q,   loss + orth_reg_weight · mean over all P and Q of ‖PᵀP − I‖, ‖Q Qᵀ − I‖   (Frobenius)

peft has the layers and the rule that moves ranks; the loop and its checkpoints need the rest. Zhang et al. 2023,
"AdaLoRA", arXiv 2303.10512, section 3.
"""

# R rank

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.types import StepHook

KIND = "ADALORA"
SUMS = ("ipt", "exp_avg_ipt", "exp_avg_unc")
"""peft's names of its state of every matrix: the last sensitivity, the means of it and of its deviation."""
MASK = "mask"
"""Mask of a layer's singular values that count."""


def schedule_problems(config: Any) -> list[str]:
    """Settings of peft's config with which ranks cannot move, each with its rule; peft refuses none of these."""
    whole = {key: getattr(config, key) for key in ("init_r", "target_r", "deltaT")}
    found = [
        f"{key}: {value!r}: must be a whole number above 0. Leave it out for peft's own."
        for key, value in whole.items()
        if type(value) is not int or value < 1
    ]
    if not found and config.target_r >= config.init_r:
        found.append(
            f"target_r: {config.target_r}: must be below init_r ({config.init_r}), from which ranks go down to it. "
            "Lower it, or raise init_r."
        )
    means = {key: getattr(config, key) for key in ("beta1", "beta2")}
    found += [
        f"{key}: {value!r}: must be above 0 and below 1. Leave it out for peft's own."
        for key, value in means.items()
        if not isinstance(value, float) or not 0 < value < 1
    ]
    return found


def freeze_rank_counts(wrapped: Any) -> None:
    """Freeze each layer's number of ranks, by which it divides, in float32: peft does not save it, yet would train it
    after a cast to bfloat16."""
    for name, parameter in wrapped.named_parameters():
        if ".ranknum." in name:
            parameter.requires_grad_(False)
            parameter.data = parameter.data.float()


class RankAllocation(StepHook):
    """AdaLoRA's penalty, and its reallocation of ranks after every update."""

    def __init__(self, wrapped: Any, inside: Mapping[str, str]) -> None:
        """`wrapped`: the PeftModel. `inside`: names of trained weights in its model, by their names in peft's files."""
        self._tuner = wrapped.base_model
        self._config = wrapped.peft_config[self._tuner.trainable_adapter_name]
        parameters = dict(self._tuner.model.named_parameters())
        self._parts = {short: (name, parameters[name]) for short, name in inside.items() if ".lora_" in short}
        # peft begins without a pattern, and looks for one after the last move, even of a step that is run alone.
        self._config.rank_pattern = {name: [True] * len(part) for name, part in self._values().items()}

    def note(self) -> str:
        """The schedule of ranks, for a person."""
        config, layers = self._config, len(self._values())
        return (
            f"ADALORA: {layers} layers begin with {config.init_r} ranks each and keep {config.target_r} on average: "
            f"{(config.init_r - config.target_r) * layers} go between step {config.tinit} and step "
            f"{config.total_step - config.tfinal} of {config.total_step}"
        )

    def penalty(self) -> Tensor:
        """The distance of all P and Q from orthogonal; section 3.1."""
        norms = []
        for name, (_, part) in self._parts.items():
            if name.endswith((".lora_A", ".lora_B")):
                gram_RR = part @ part.T if name.endswith(".lora_A") else part.T @ part
                norms.append((gram_RR - torch.eye(*gram_RR.shape, device=part.device)).norm())
        mean: Tensor = torch.stack(norms).mean() * self._config.orth_reg_weight
        return mean

    @contextmanager
    def around_update(self, step: int) -> Iterator[None]:
        """Update, then sensitivities and ranks, in peft's order: from the whole gradients of the step, which the update
        drops, and the new weights."""
        gradients = {name: part.grad for name, (_, part) in self._parts.items()}
        yield
        for name, (_, part) in self._parts.items():
            found = gradients[name]
            part.grad = torch.zeros_like(part) if found is None else found
        self._tuner.update_and_allocate(step)
        for _, part in self._parts.values():
            part.grad = None
        shorts = {name: short for short, (name, _) in self._parts.items()}
        # By the names of peft's files, which peft reads too, and changes them to when it saves.
        self._config.rank_pattern = {shorts.get(name, name): kept for name, kept in self._config.rank_pattern.items()}

    def state(self) -> dict[str, Tensor]:
        sums = {key: getattr(self._tuner.rankallocator, key) for key in SUMS}
        found = {
            f"{short}/{key}": sums[key].get(name, torch.zeros_like(part).detach())
            for short, (name, part) in self._parts.items()
            for key in SUMS
        }
        return found | {f"{name}/{MASK}": torch.tensor(kept) for name, kept in self._config.rank_pattern.items()}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        for key in SUMS:
            sums = getattr(self._tuner.rankallocator, key)
            for short, (name, part) in self._parts.items():
                sums[name] = tensors[f"{short}/{key}"].to(part.device, copy=True)
        self._config.rank_pattern = {name: tensors[f"{name}/{MASK}"].tolist() for name in self._values()}

    def _values(self) -> dict[str, nn.Parameter]:
        """Λ of every layer, by its name in peft's files."""
        return {name: part for name, (_, part) in self._parts.items() if name.endswith(".lora_E")}
