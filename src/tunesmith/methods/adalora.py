"""AdaLoRA: all layers share one budget of ranks, which goes to those whose singular values matter most.

    ΔW = P Λ Q,   loss + orth_reg_weight · mean over all P and Q of ‖PᵀP − I‖, ‖Q Qᵀ − I‖   (Frobenius)

The layers and the rule that moves ranks are peft's; here is what the loop and its checkpoints need of them. Zhang et
al. 2023, "AdaLoRA", arXiv 2303.10512, section 3.
"""

# R rank

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.errors import RecipeError
from tunesmith.methods.peft_kinds import import_peft
from tunesmith.optim import OPTIMIZERS
from tunesmith.recipe.methods import PeftMethod
from tunesmith.recipe.schema import Optim

KIND = "ADALORA"
SUMS = ("ipt", "exp_avg_ipt", "exp_avg_unc")
"""peft's names of what it keeps of every matrix: the last sensitivity, the means of it and of how far it strays."""
MASK = "mask"
"""Of each layer's singular values, which count."""
_LEAST = {"tinit": 0, "tfinal": 0, "deltaT": 1, "orth_reg_weight": 0}


def for_steps(method: PeftMethod, num_steps: int) -> PeftMethod:
    """The method with `total_step` filled from the run's own number of steps.

    Raises RecipeError for another number, or a schedule that leaves no step to learn from and one to move ranks in.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(import_peft().AdaLoraConfig)}
    settings = {**method.settings, "total_step": method.settings.get("total_step") or num_steps}
    problems = _problems({**defaults, **settings}, num_steps)
    if problems:
        raise RecipeError("\n".join(f"method.settings.{problem}" for problem in problems))
    return method.model_copy(update={"settings": settings})


def resolve_steps(
    method: PeftMethod, optim: Optim, num_steps: Callable[[], int]
) -> tuple[PeftMethod, list[tuple[str, Any]]]:
    """AdaLoRA's settings for the run's number of steps, and what was chosen; those of other kinds as they are.

    Raises RecipeError where the steps leave no schedule, or the optimizer would undo it.
    """
    if method.kind != KIND:
        return method, []
    if OPTIMIZERS[optim.name].counters:
        raise RecipeError(
            f"optim.name: {optim.name}: keeps means of the weights, which bring back the ranks that "
            f"{method.kind} takes. Use another optimizer."
        )
    steps = num_steps()
    resolved = for_steps(method, steps)
    return resolved, [("method.settings.total_step", steps)] if resolved != method else []


def _problems(given: Mapping[str, Any], num_steps: int) -> list[str]:
    found = []
    if given["total_step"] != num_steps:
        found.append(f"total_step: {given['total_step']}: the run has {num_steps} steps. Leave it out, or say null.")
    if not 1 <= given["target_r"] < given["init_r"]:
        found.append(
            f"target_r: {given['target_r']}: ranks go down to it from init_r ({given['init_r']}) on average. Choose "
            "one from 1 to less than init_r."
        )
    found += [f"{key}: {given[key]}: must not be below {least}." for key, least in _LEAST.items() if given[key] < least]
    found += [f"{key}: {given[key]}: must lie between 0 and 1." for key in ("beta1", "beta2") if not 0 < given[key] < 1]
    if not max(1, given["tinit"]) < num_steps - given["tfinal"]:
        found.append(
            f"tfinal: tinit ({given['tinit']}) and tfinal ({given['tfinal']}) leave none of the run's {num_steps} "
            "steps to find out which ranks matter and to move them. Lower them, or train for more steps (train.epochs)."
        )
    return found


def freeze_scales(wrapped: Any) -> None:
    """Keep each layer's number of ranks, by which it divides, as it is and in float32: peft does not save it, yet where
    it casts it to bfloat16 a parameter comes of it that would be trained."""
    for name, parameter in wrapped.named_parameters():
        if ".ranknum." in name:
            parameter.requires_grad_(False)
            parameter.data = parameter.data.float()


class RankAllocation:
    """What AdaLoRA does at every step beside learning from the rows."""

    def __init__(self, wrapped: Any, inside: Mapping[str, str]) -> None:
        """`wrapped`: peft's own model. `inside`: of what is trained, the name in its model by the name in its files."""
        self._tuner = wrapped.base_model
        self._config = wrapped.peft_config[self._tuner.trainable_adapter_name]
        parameters = dict(self._tuner.model.named_parameters())
        self._parts = {short: (name, parameters[name]) for short, name in inside.items() if ".lora_" in short}
        # peft begins without one, and then looks for one after the last move: of a step that is tried alone, too.
        self._config.rank_pattern = {name: [True] * len(part) for name, part in self._values().items()}

    def note(self) -> str:
        """What happens to ranks, for a person."""
        config, layers = self._config, len(self._values())
        return (
            f"ADALORA: {layers} layers begin with {config.init_r} ranks each and keep {config.target_r} on average: "
            f"{(config.init_r - config.target_r) * layers} go between step {config.tinit} and step "
            f"{config.total_step - config.tfinal} of {config.total_step}"
        )

    def penalty(self) -> Tensor:
        """How far all P and Q are from orthogonal; section 3.1."""
        norms = []
        for name, (_, part) in self._parts.items():
            if name.endswith((".lora_A", ".lora_B")):
                gram_RR = part @ part.T if name.endswith(".lora_A") else part.T @ part
                norms.append((gram_RR - torch.eye(*gram_RR.shape, device=part.device)).norm())
        mean: Tensor = torch.stack(norms).mean() * self._config.orth_reg_weight
        return mean

    @contextmanager
    def around_update(self, step: int) -> Iterator[None]:
        """The update, and then, in peft's order, sensitivities and ranks: from the whole gradients of the step, which
        the update drops, and the weights that it made."""
        gradients = {name: part.grad for name, (_, part) in self._parts.items()}
        yield
        for name, (_, part) in self._parts.items():
            found = gradients[name]
            part.grad = torch.zeros_like(part) if found is None else found
        self._tuner.update_and_allocate(step)
        for _, part in self._parts.values():
            part.grad = None
        shorts = {name: short for short, (name, _) in self._parts.items()}
        pattern = self._config.rank_pattern
        # By the names of peft's files, which it takes too, and changes them to when it saves.
        self._config.rank_pattern = {shorts.get(name, name): kept for name, kept in pattern.items()}

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint holds of it."""
        sums = {key: getattr(self._tuner.rankallocator, key) for key in SUMS}
        found = {
            f"{short}/{key}": sums[key].get(name, torch.zeros_like(part).detach())
            for short, (name, part) in self._parts.items()
            for key in SUMS
        }
        return found | {f"{name}/{MASK}": torch.tensor(kept) for name, kept in self._config.rank_pattern.items()}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what `state` gave, bit for bit."""
        for key in SUMS:
            sums = getattr(self._tuner.rankallocator, key)
            for short, (name, part) in self._parts.items():
                sums[name] = tensors[f"{short}/{key}"].to(part.device, copy=True)
        self._config.rank_pattern = {name: tensors[f"{name}/{MASK}"].tolist() for name in self._values()}

    def _values(self) -> dict[str, nn.Parameter]:
        """Λ of every layer, by its name in peft's files."""
        return {name: part for name, (_, part) in self._parts.items() if name.endswith(".lora_E")}
