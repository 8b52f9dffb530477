"""Full fine-tuning of every weight, or of named ones, with float32 masters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tunesmith.errors import ModelError, RecipeError
from tunesmith.methods.master_weights import MasterWeights, is_split
from tunesmith.methods.new_token_embeddings import ROWS_SUFFIX, TokenRows, sole_embedding
from tunesmith.methods.targets import check_word, is_inside, matches, means, near_words
from tunesmith.models.heads import check_labels, new_param_names
from tunesmith.models.save import save_model
from tunesmith.models.vision import part_modules
from tunesmith.phrases import percent
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
        spread: int | None = None,
        tokens: Sequence[int] | None = None,
    ) -> None:
        """`spread`: see MasterWeights. `tokens`: all ids that training can meet, ascending; of an embedding
        that nothing else reads only their rows are trained, under the name of the whole."""
        self.model = model
        model.requires_grad_(False)
        self._rows, remark = _rows_of(model, chosen, tokens)
        if self._rows is not None:
            rows = {f"{key.removesuffix(ROWS_SUFFIX)}.weight": tensor for key, tensor in self._rows.parameters.items()}
            chosen = {name: rows.get(name, parameter) for name, parameter in chosen.items()}
        self._masters = MasterWeights(chosen, free_early=True, spread=spread)
        self.trained: Mapping[str, Tensor] = self._masters.trained
        self.shards = {name: parameter.shape for name, parameter in chosen.items() if is_split(parameter)}
        self.notes: tuple[str, ...] = _frozen_note(model, chosen)
        self.details: tuple[str, ...] = remark

    @property
    def trains_token_rows(self) -> bool:
        return self._rows is not None

    def collect_gradients(self) -> None:
        self._masters.collect()

    def publish(self) -> None:
        self._masters.publish()
        if self._rows is not None:
            self._rows.publish()

    def unload(self) -> None:
        """Remove the hooks from the model."""
        self._masters.release()
        if self._rows is not None:
            self._rows.unload()


def _rows_of(
    model: PreTrainedModel, chosen: Mapping[str, nn.Parameter], tokens: Sequence[int] | None
) -> tuple[TokenRows | None, tuple[str, ...]]:
    """The rows of the embedding that can get a gradient, and a note; none if unknown or they are all."""
    name = None if tokens is None else sole_embedding(model)
    if tokens is None or name is None or f"{name}.weight" not in chosen:
        return None, ()
    weight = model.get_parameter(f"{name}.weight")
    if len(tokens) == len(weight):
        return None, ()
    remark = (
        f"{name}: {len(tokens):,} of {len(weight):,} rows are trained, for the tokens in the data: the others "
        "get no gradient, and stay as they are"
    )
    return TokenRows(model, tokens, among={name: weight}), (remark,)


def attach(
    model: PreTrainedModel, settings: FullMethod, *, seed: int, tokens: Sequence[int] | None = None
) -> FullAttachment:
    """Train the weights of `model` that `settings` name; `seed` draws the start of masters in their cells.

    `tokens`: all ids that training can meet, ascending; None: unknown.

    Raises RecipeError for words that mean nothing.
    """
    chosen = choose_weights(model, train=settings.train, freeze=settings.freeze)
    return FullAttachment(model, chosen, spread=seed, tokens=tokens)


def describe(settings: FullMethod) -> str:
    """One sentence for a model card."""
    only = f"Only the weights of {', '.join(settings.train)} were tuned" if settings.train else "Every weight was tuned"
    return f"{only}{', except ' + ', '.join(settings.freeze) if settings.freeze else ''}."


def learning_rate(settings: FullMethod, kind: str, num_parameters: int) -> tuple[float, str]:
    """The usual peak rate with AdamW, and why."""
    if kind != "causal":
        rate = 1e-4 if num_parameters < 50e6 else 3e-5 if kind == "encoder" else 1e-4
        return rate, f"usual for full tuning of an {kind.replace('_', '–')} of this size"
    is_small = num_parameters < 1e9
    where = "below" if is_small else "above"
    return (5e-5 if is_small else 1e-5), f"usual for full tuning {where} a billion weights"


def save_result(
    attachment: FullAttachment,
    folder: Path,
    *,
    model: PreTrainedModel,
    renderer: Renderer,
    located: ModelRef,
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a Hugging Face model folder, complete in itself, in the dtype that the model computes in.
    `weights`: of a model whose layers are split."""
    ends, pooling = renderer.stop_ids, renderer.pooling
    save_model(model, renderer.tokenizer, folder, located=located, stop_ids=ends, pooling=pooling, weights=weights)


def load_result(model: PreTrainedModel, folder: Path) -> FullAttachment:
    """Copy the weights of a saved folder into a model of the same shape.

    Raises:
        ModelError: a weight that is missing, left over, or of another shape, or a head for other labels; the
            model was not changed.
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


def choose_weights(model: nn.Module, *, train: Sequence[str], freeze: Sequence[str]) -> dict[str, nn.Parameter]:
    """The parameters to train, by name, in the order of the model: those that `train` means (all if it is
    empty) without those that `freeze` means. Words are as in `targets`; a weight with two names (tied) is meant
    by either.

    Raises:
        RecipeError: a word that means no weight, nothing left to train, or a frozen weight that is random.
    """
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    parts = part_modules(model)
    meant = {option: _meant(words, names, option, parts) for option, words in (("train", train), ("freeze", freeze))}
    chosen = {
        name: parameter
        for name, parameter in model.named_parameters()
        if (not train or id(parameter) in meant["train"]) and id(parameter) not in meant["freeze"]
    }
    if not chosen:
        raise RecipeError("method.freeze: every weight that would be trained is frozen. Name less of it.")
    if random := [name for name in new_param_names(model) if name not in chosen]:
        raise RecipeError(
            f"method.{'freeze' if not train else 'train'}: {random[0]} is new, and would stay the random "
            f"numbers that it is. {'Name it too' if train else 'Leave it out'}."
        )
    return chosen


def _frozen_note(model: nn.Module, chosen: Mapping[str, nn.Parameter]) -> tuple[str, ...]:
    """A note on the weights that are frozen."""
    frozen = [(name, weight) for name, weight in model.named_parameters() if name not in chosen]
    if not frozen:
        return ()
    num = sum(parameter.numel() for _, parameter in frozen)
    total = sum(parameter.numel() for parameter in model.parameters())
    return (f"frozen: {len(frozen)} weights, {percent(num / total)} of the model, such as {frozen[0][0]}",)


def _meant(
    words: Sequence[str], names: Mapping[int, Sequence[str]], option: str, modules: Mapping[str, Sequence[str]]
) -> set[int]:
    """Ids of the parameters that `words` mean. `modules`: of a model that sees, its parts by their words."""
    problems: list[str] = []
    meant: set[int] = set()
    for word in words:
        check_word(word, f"method.{option}")
        inside = modules.get(word)
        matching = {
            key
            for key, known in names.items()
            if any(is_inside(name, inside) if inside is not None else _means(word, name) for name in known)
        }
        if not matching:
            parts = {part for known in names.values() for name in known for part in name.split(".")}
            hint = near_words(word.rpartition(".")[2], parts)
            problems.append(f"method.{option}: {word!r} means no weight.{hint}")
        meant |= matching
    if problems:
        raise RecipeError("\n".join(problems))
    return meant


def _means(word: str, name: str) -> bool:
    if word.startswith("re:"):
        return matches(word[3:], name)
    parts = name.split(".")
    return any(means(word, ".".join(parts[:end])) for end in range(1, len(parts) + 1))
