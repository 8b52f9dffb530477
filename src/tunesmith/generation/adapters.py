"""LoRA adapters of several runs on one base: each token of a pass goes through the
adapter of its own run, or none."""

# T tokens, I inputs, O outputs, R rank, K tokens of one adapter

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from tunesmith.errors import ModelError
from tunesmith.methods.targets import named_targets, replace_module


@dataclass(frozen=True, slots=True)
class LowRankPath:
    """The LoRA matrices of one run at one layer."""

    a_RI: Tensor
    b_OR: Tensor
    scale: float

    def add(self, x_TI: Tensor, y_TO: Tensor) -> Tensor:
        """[T, O], changed in place."""
        return y_TO.addmm_(x_TI @ self.a_RI.t(), self.b_OR.t(), alpha=self.scale)

    def to(self, device: torch.device, dtype: torch.dtype) -> LowRankPath:
        return LowRankPath(self.a_RI.to(device, dtype), self.b_OR.to(device, dtype), self.scale)


def joined_paths(adapters: Sequence[Mapping[str, tuple[Tensor, Tensor, float]]]) -> dict[str, LowRankPath]:
    """Join adapters that were tuned one on top of another into one, whose rank is the sum of their ranks."""
    joined: dict[str, LowRankPath] = {}
    for layer in sorted({layer for adapter in adapters for layer in adapter}):
        paths = [LowRankPath(*adapter[layer]) for adapter in adapters if layer in adapter]
        if len(paths) == 1:
            joined[layer] = paths[0]
            continue
        a_RI = torch.cat([path.a_RI.float() for path in paths])
        b_OR = torch.cat([path.b_OR.float() * path.scale for path in paths], dim=1)
        joined[layer] = LowRankPath(a_RI, b_OR, 1.0)
    return joined


@dataclass(slots=True)
class _Routing:
    """The adapter of each token of a pass; one object for all layers."""

    groups: list[tuple[str, Tensor | None]] = field(default_factory=list)
    """Name of an adapter and the places of its tokens; None: all of them."""
    num_tokens: int | None = None
    """Rows that each layer has to see; None: any number, since all use one adapter."""


class RowMismatchError(RuntimeError):
    """An adapted layer gets rows that are not the tokens of the pass, so no adapter can be assigned to them."""


class MultiLoraLinear(nn.Module):
    """A layer of the base with the LoRA paths of every run that adapts it."""

    def __init__(self, base: nn.Module, routing: _Routing) -> None:
        super().__init__()
        self.base = base
        self.routing = routing
        self.paths: dict[str, LowRankPath] = {}

    @property
    def weight(self) -> Tensor:
        """That of the base, for models that look at it: T5 reads its dtype."""
        return self.base.weight  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] -> [..., O]."""
        num_rows = x.numel() // x.shape[-1]
        if self.routing.num_tokens not in (None, num_rows):
            raise RowMismatchError(
                f"an adapted layer sees {num_rows} rows of a pass of {self.routing.num_tokens} tokens, as experts do"
            )
        out: Tensor = self.base(x)
        x_TI, y_TO = x.reshape(-1, x.shape[-1]), out.reshape(-1, out.shape[-1])
        for name, rows_K in self.routing.groups:
            path = self.paths.get(name)
            if path is not None and rows_K is None:
                y_TO = path.add(x_TI, y_TO)
            elif path is not None and rows_K is not None:
                x_KI, y_KO = x_TI.index_select(0, rows_K), y_TO.index_select(0, rows_K)
                y_TO.index_copy_(0, rows_K, path.add(x_KI, y_KO))
        return y_TO.view(out.shape)


class AdapterSet:
    """The adapters on a model, by the name of their run."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._routing = _Routing()

    def put(self, name: str, paths: Mapping[str, LowRankPath]) -> None:
        """Put an adapter on the model, between two passes. Raises ModelError if a layer is missing."""
        self.drop(name)
        layers = {layer: self.model.get_submodule(layer) for layer in paths}
        bare = [layer for layer, module in layers.items() if not isinstance(module, MultiLoraLinear)]
        for target in named_targets(self.model, bare):
            layers[target.name] = MultiLoraLinear(target.module, self._routing)
            replace_module(self.model, target, layers[target.name])
        for layer, path in paths.items():
            module = layers[layer]
            if not isinstance(module, MultiLoraLinear):
                raise ModelError(f"{name}: {layer} is not a linear layer of the base that is served.")
            module.paths[name] = path

    def drop(self, name: str) -> None:
        """Take an adapter off the model. No answer that is being written may use it."""
        for module in self.model.modules():
            if isinstance(module, MultiLoraLinear):
                module.paths.pop(name, None)

    @contextmanager
    def active(self, names: Sequence[str | None], *, mixed: bool = False) -> Iterator[None]:
        """Inside the block the tokens of a pass use the adapters of these names, one a token.

        `mixed`: the names can differ. Raises RowMismatchError if a layer then sees
        other rows than these tokens.
        """
        device = next(self.model.parameters()).device
        places: dict[str, list[int]] = {}
        for place, name in enumerate(names):
            if name is not None:
                places.setdefault(name, []).append(place)
        self._routing.groups = [
            (name, None if len(places_of_name) == len(names) else torch.tensor(places_of_name, device=device))
            for name, places_of_name in places.items()
        ]
        self._routing.num_tokens = len(names) if mixed else None
        try:
            yield
        finally:
            self._routing.groups, self._routing.num_tokens = [], None
