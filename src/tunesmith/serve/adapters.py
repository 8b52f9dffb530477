"""Adapters of several runs on one base: of each pass, every row goes through the adapter of its own run, or none."""

# T tokens, I inputs, O outputs, R rank

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from tunesmith.errors import ModelError
from tunesmith.methods.lora import LoraAttachment
from tunesmith.methods.targets import named_targets, replace_module


@dataclass(frozen=True, slots=True)
class Path:
    """The low-rank path of one run beside one layer."""

    a_RI: Tensor
    b_OR: Tensor
    scale: float

    def add(self, x_TI: Tensor, y_TO: Tensor) -> Tensor:
        """[T, O] changed in place."""
        return y_TO.addmm_(x_TI @ self.a_RI.t(), self.b_OR.t(), alpha=self.scale)


@dataclass(slots=True)
class Plan:
    """Which tokens of the pass at hand go through which adapter; one for all layers."""

    groups: list[tuple[str, Tensor | None]] = field(default_factory=list)
    """Name of the adapter and the places of its tokens; None: all of them."""
    num_tokens: int | None = None
    """Rows that each layer has to see; None: any number, since all go through one adapter."""


class OtherRowsError(RuntimeError):
    """An adapted layer sees other rows than the tokens of the pass, so that each cannot go through its own adapter."""


class SharedLinear(nn.Module):
    """A layer of the base with the paths of every run that adapts it."""

    def __init__(self, base: nn.Module, plan: Plan) -> None:
        super().__init__()
        self.base = base
        self.plan = plan
        self.paths: dict[str, Path] = {}

    @property
    def weight(self) -> Tensor:
        """That of the base, for models that look at it: T5 asks for its precision."""
        return self.base.weight  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] → [..., O]."""
        num_rows = x.numel() // x.shape[-1]
        if self.plan.num_tokens not in (None, num_rows):
            raise OtherRowsError(
                f"an adapted layer sees {num_rows} rows of a pass of {self.plan.num_tokens} tokens, as experts do"
            )
        out: Tensor = self.base(x)
        groups = [(self.paths[name], rows_K) for name, rows_K in self.plan.groups if name in self.paths]
        if not groups:
            return out
        x_TI, y_TO = x.reshape(-1, x.shape[-1]), out.reshape(-1, out.shape[-1])
        for path, rows_K in groups:
            if rows_K is None:
                y_TO = path.add(x_TI, y_TO)
            else:
                y_TO.index_copy_(0, rows_K, path.add(x_TI.index_select(0, rows_K), y_TO.index_select(0, rows_K)))
        return y_TO.view(out.shape)


class Adapters:
    """The adapters on a model, by the name of their run."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.names: list[str] = []
        self._plan = Plan()
        self._held: dict[str, dict[str, Path]] = {}

    def take(self, name: str, attachment: LoraAttachment) -> None:
        """Take the matrices of an adapter that is on the model, and the adapter off it. `install` puts all back.

        Raises ModelError for an adapter that is more than low-rank paths, so that others could not share its base.
        """
        if why := attachment.unshareable:
            raise ModelError(
                f"{name}: {why}, so its base cannot be shared with other adapters. Export it as merged and serve that."
            )
        self._held[name] = {
            layer: Path(*module.with_start(module.lora_A.detach(), module.lora_B.detach()), module.scale)
            for layer, module in attachment.layers.items()
        }
        attachment.unload()

    def install(self) -> None:
        """Put the adapters that were taken beside the layers of the model."""
        wanted = sorted({layer for paths in self._held.values() for layer in paths})
        for target in named_targets(self.model, wanted):
            shared = SharedLinear(target.module, self._plan)
            shared.paths = {name: paths[target.name] for name, paths in self._held.items() if target.name in paths}
            replace_module(self.model, target, shared)
        self.names, self._held = list(self._held), {}

    def adapts(self, module: nn.Module | None) -> bool:
        """Whether an adapter was put beside this layer of the model."""
        return isinstance(module, SharedLinear)

    @contextmanager
    def serving(self, names: Sequence[str | None], *, mixed: bool = False) -> Iterator[None]:
        """Inside the block the tokens of a pass go through the adapters of these names, one a token.

        `mixed`: the names can differ. Raises OtherRowsError where a layer then sees other rows than these tokens.
        """
        device = next(self.model.parameters()).device
        places: dict[str, list[int]] = {}
        for place, name in enumerate(names):
            if name is not None:
                places.setdefault(name, []).append(place)
        self._plan.groups = [
            (name, None if len(some) == len(names) else torch.tensor(some, device=device))
            for name, some in places.items()
        ]
        self._plan.num_tokens = len(names) if mixed else None
        try:
            yield
        finally:
            self._plan.groups, self._plan.num_tokens = [], None
