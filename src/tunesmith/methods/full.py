"""Full fine-tuning: every weight is trained, or those that are named; in float32 whatever the model computes in, or in
bfloat16 alone with updates rounded at random."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tunesmith.errors import ModelError, RecipeError
from tunesmith.methods.chosen import choose, notes
from tunesmith.methods.masters import Masters
from tunesmith.methods.token_rows import ROWS, TokenRows, sole_embedding
from tunesmith.models.heads import check_labels
from tunesmith.models.save import save_model
from tunesmith.recipe.methods import FullMethod
from tunesmith.types import Attachment

if TYPE_CHECKING:
    from tunesmith.data.renderer import Renderer
    from tunesmith.models.resolve_model import ModelRef


class FullAttachment(Attachment):
    """Parameters of a model by their own names, tied ones once; the others are frozen."""

    method = "full"

    def __init__(
        self,
        model: PreTrainedModel,
        chosen: Mapping[str, nn.Parameter],
        *,
        has_masters: bool = True,
        spread: int | None = None,
        tokens: Sequence[int] | None = None,
    ) -> None:
        """Without masters the trained tensors are the parameters themselves, whose gradients add up in float32.

        `spread`: the seed of where masters begin, as Masters has it. `tokens`: in ascending order all that a pass can
        hold; of an embedding that nothing else reads only their rows are trained, under the name of the whole."""
        self.model = model
        model.requires_grad_(False)
        self._rows, remark = _rows_of(model, chosen, tokens)
        if self._rows is not None:
            rows = {f"{key.removesuffix(ROWS)}.weight": tensor for key, tensor in self._rows.parameters.items()}
            chosen = {name: rows.get(name, parameter) for name, parameter in chosen.items()}
        self._masters = Masters(chosen if has_masters else {}, free_early=True, spread=spread)
        self.trained: Mapping[str, Tensor] = self._masters.trained if has_masters else dict(chosen)
        if not has_masters:
            for parameter in chosen.values():
                parameter.requires_grad_(True).grad_dtype = torch.float32
        self.notes: tuple[str, ...] = (*notes(model, chosen), *remark)

    def collect_gradients(self) -> None:
        self._masters.collect()

    def publish(self) -> None:
        self._masters.publish()
        if self._rows is not None:
            self._rows.publish()

    def unload(self) -> None:
        """Leave the model as it is and stop taking its gradients."""
        self._masters.release()
        if self._rows is not None:
            self._rows.unload()


def _rows_of(
    model: PreTrainedModel, chosen: Mapping[str, nn.Parameter], tokens: Sequence[int] | None
) -> tuple[TokenRows | None, tuple[str, ...]]:
    """The rows of the embedding that can learn, where that can be said, and what to say of it."""
    name = None if tokens is None else sole_embedding(model)
    if tokens is None or name is None or f"{name}.weight" not in chosen:
        return None, ()
    weight = model.get_parameter(f"{name}.weight")
    if len(tokens) == len(weight):
        return None, ()
    remark = (
        f"{name}: {len(tokens):,} of {len(weight):,} rows are trained, those of the tokens in the data: the others get "
        "no gradient, and stay as they are"
    )
    return TokenRows(model, tokens, among={name: weight}), (remark,)


def attach(
    model: PreTrainedModel, settings: FullMethod, *, seed: int, tokens: Sequence[int] | None = None
) -> FullAttachment:
    """Train what `settings` name of `model`; `seed` draws where in their cells of bfloat16 the masters begin.

    `tokens`: all that a pass can hold, in ascending order; None: that is not known.

    Raises RecipeError for words that mean nothing, or stochastic rounding where nothing is rounded.
    """
    is_stochastic = settings.rounding == "stochastic"
    if is_stochastic and model.dtype != torch.bfloat16:
        raise RecipeError(
            "method.rounding: stochastic: is for weights in bfloat16, and these are float32, which nothing rounds. "
            "Set precision: bfloat16, or leave it out."
        )
    chosen = choose(model, train=settings.train, freeze=settings.freeze)
    return FullAttachment(model, chosen, has_masters=not is_stochastic, spread=seed, tokens=tokens)


def learning_rate(settings: FullMethod, kind: str, num_parameters: int) -> tuple[float, str]:
    """The usual peak rate with AdamW, and why."""
    if kind != "causal":
        rate = 1e-4 if num_parameters < 50e6 else 3e-5 if kind == "encoder" else 1e-4
        return rate, f"usual for full tuning of an {kind.replace('_', '–')} of this size"
    is_small = num_parameters < 1e9
    where = "below" if is_small else "above"
    return (5e-5 if is_small else 1e-5), f"usual for full tuning {where} a billion weights"


def required_precision(settings: FullMethod) -> tuple[str, str] | None:
    """The precision that the rounding of updates needs, and why; None: any."""
    if settings.rounding == "stochastic":
        return "bfloat16", "stochastic rounding is for weights in bfloat16"
    return None


def save_result(
    attachment: FullAttachment, folder: Path, *, model: PreTrainedModel, renderer: Renderer, located: ModelRef
) -> None:
    """Write a Hugging Face model folder, weights in the dtype the model computes in; it stands without its base."""
    save_model(model, renderer.tokenizer, folder, located=located, stop_ids=renderer.stop_ids)


def load_result(model: PreTrainedModel, folder: Path) -> FullAttachment:
    """Copy the weights of a saved folder into a model of the same shape.

    Raises:
        ModelError: a weight that is missing, left over, or of another shape, or a head for other labels; the model was
            not changed.
    """
    check_labels(model, folder)
    try:
        saved, info = type(model).from_pretrained(
            folder, dtype=model.dtype, use_safetensors=True, local_files_only=True, output_loading_info=True
        )
    except (OSError, RuntimeError) as error:
        raise ModelError(f"{folder}: cannot be read as a {type(model).__name__}: {error}") from error
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[kind]:
            raise ModelError(f"{folder}: {kind.replace('_', ' ')}: {', '.join(map(str, sorted(info[kind])[:5]))}")
    weights = dict(saved.named_parameters())
    parameters = dict(model.named_parameters())
    for name in sorted(weights.keys() | parameters.keys()):
        if name not in weights or name not in parameters or weights[name].shape != parameters[name].shape:
            raise ModelError(f"{folder}: {name} does not fit the model that it is loaded into")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])
    return FullAttachment(model, dict(model.named_parameters()))
