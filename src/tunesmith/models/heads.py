"""The head of a model: everything outside the base model, and the pooler before it.

The weights of a head that is new to a model are drawn here, from the seed and the name of the weight alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence, Set
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from tunesmith.errors import ModelError
from tunesmith.types import HeadName, JsonObject, LabelKind, Labels

LABELS_FILE = "labels.json"

_PROBLEMS: Mapping[LabelKind, str] = {
    "one": "single_label_classification",
    "many": "multi_label_classification",
    "number": "regression",
}
_CLASSES: Mapping[str, HeadName] = {
    "ForSequenceClassification": "sequence",
    "ForTokenClassification": "tokens",
    "ForMaskedLM": "masked_token",
}


def head_of(model: PreTrainedModel) -> HeadName:
    """The head of the model, by the name of its class."""
    name = type(model).__name__
    if name.endswith("Model") and not name.endswith("HeadModel"):
        return "vector"
    return next((head for end, head in _CLASSES.items() if name.endswith(end)), "next_token")


def in_head(model: PreTrainedModel, name: str) -> bool:
    """True if the weight of this name belongs to the head."""
    if head_of(model) == "vector":
        return name.startswith("pooler.")
    return not name.startswith(f"{model.base_model_prefix}.") or ".pooler." in name


def pools_last(model: nn.Module) -> bool:
    """True if the model classifies a text at its last token, as causal models do."""
    return type(model).__name__.endswith("ForSequenceClassification") and hasattr(model, "score")


def new_head_names(model: PreTrainedModel) -> tuple[str, ...]:
    """The weights of a head that answers with classes or numbers, trained whole; none for other models."""
    if head_of(model) not in ("sequence", "tokens"):
        return ()
    return tuple(name for name, _ in model.named_parameters() if in_head(model, name))


def label_settings(labels: Labels) -> JsonObject:
    """The entries of a config for labels: names by id and back, and the kind of problem."""
    names = labels.names or ("LABEL_0",)
    return {
        "id2label": dict(enumerate(names)),
        "label2id": {name: index for index, name in enumerate(names)},
        "problem_type": _PROBLEMS.get(labels.kind),
    }


def labels_of(model: PreTrainedModel) -> Labels | None:
    """The labels of a head, in the order of its outputs; None for a model that answers with tokens."""
    head = head_of(model)
    if head not in ("sequence", "tokens"):
        return None
    return _labels(model.config, head)


def _labels(config: PreTrainedConfig, head: HeadName) -> Labels:
    names = tuple(str(config.id2label[index]) for index in range(config.num_labels))
    if head == "tokens":
        return Labels("tags", names)
    kinds: dict[str | None, LabelKind] = {problem: kind for kind, problem in _PROBLEMS.items()}
    kind = kinds.get(config.problem_type, "number" if config.num_labels == 1 else "one")
    return Labels(kind, () if kind == "number" else names)


def own_classes(config: PreTrainedConfig, head: HeadName) -> tuple[str, ...]:
    """The classes of a head that the model's files have, in their order; none where they were never named."""
    names = [str(name) for name in getattr(config, "architectures", None) or ()]
    if not any(_CLASSES.get(end) == head for name in names for end in _CLASSES if name.endswith(end)):
        return ()
    names_in_files = _labels(config, head).names
    return () if names_in_files == tuple(f"LABEL_{i}" for i in range(len(names_in_files))) else names_in_files


def same_labels(config: PreTrainedConfig, head: HeadName, labels: Labels) -> bool:
    """True if the head in the model's files has these labels, in this order."""
    in_files = _labels(config, head)
    return (in_files.kind, in_files.names) == (labels.kind, labels.names)


def fresh_names(model: PreTrainedModel, lacks: Set[str], *, keep: bool) -> tuple[str, ...]:
    """The weights to draw: those that the files lack, and the whole head if one of its weights is among them or
    if the head is not to be kept."""
    head = [name for name in new_head_names(model) if not name.startswith(f"{model.base_model_prefix}.")]
    redrawn = head if not keep or not lacks.isdisjoint(head) else []
    return tuple(name for name, _ in model.named_parameters() if name in lacks or name in redrawn)


@torch.no_grad()
def init_head(model: PreTrainedModel, names: Sequence[str], *, seed: int) -> None:
    """Fresh values for weights: matrices normal with the config's initializer_range, biases 0, norms' scales 1.

    Drawn on the CPU in float32, each from (seed, name): the same in every precision, on every device, and
    whatever random numbers the process has used or will use.
    """
    std = float(getattr(model.config, "initializer_range", 0.02))
    for name in names:
        weight = model.get_parameter(name)
        if weight.ndim == 1:
            weight.fill_(0.0 if name.endswith("bias") else 1.0)
        else:
            weight.copy_(torch.empty(weight.shape).normal_(0.0, std, generator=generator(seed, name)))
    model.new_param_names = tuple(names)


def new_param_names(model: nn.Module) -> tuple[str, ...]:
    """The weights that were drawn when the model was loaded."""
    return getattr(model, "new_param_names", ())


def generator(seed: int, name: str) -> torch.Generator:
    """The random generator of one weight, by its name."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def write_labels(model: PreTrainedModel, folder: Path) -> None:
    """Write the labels of the head into a result's folder; nothing for a model that answers with tokens."""
    labels = labels_of(model)
    if labels is not None:
        text = json.dumps({"kind": labels.kind, "names": labels.names}, indent=2, ensure_ascii=False)
        (folder / LABELS_FILE).write_text(text + "\n", encoding="utf-8")


def read_labels(folder: Path) -> Labels | None:
    """The labels of a result's head; None if it was saved without one. Raises ModelError if damaged."""
    path = folder / LABELS_FILE
    if not path.is_file():
        return None
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        return Labels(saved["kind"], tuple(saved["names"]))
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path}: damaged ({error!r}). Copy the result again.") from error


def check_labels(model: PreTrainedModel, folder: Path) -> None:
    """Raise ModelError if a result answers with other labels than the model that it is loaded into."""
    saved, labels = read_labels(folder), labels_of(model)
    if saved is not None and (labels is None or (saved.kind, saved.names) != (labels.kind, labels.names)):
        expected = "tokens" if labels is None else f"{labels.kind} of {list(labels.names)}"
        raise ModelError(
            f"{folder / LABELS_FILE}: {saved.kind} of {list(saved.names)}, but the model answers with "
            f"{expected}. Load the model with the labels of the result."
        )
