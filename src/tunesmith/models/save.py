"""Saving a model: safetensors, the original tokenizer, a generation config with the tokens that end answers.

A folder is written next to its place and renamed: there is a whole model or none.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from tunesmith.errors import StorageError
from tunesmith.models import heads
from tunesmith.models.load import TOKENIZER_FILES, load_tokenizer
from tunesmith.models.modes import generating_by, silence_transformers
from tunesmith.models.pooling import find_pooling, write_pooling
from tunesmith.models.resolve_model import ModelRef
from tunesmith.models.special_tokens import with_pad_token
from tunesmith.models.streamed_weights import stored_names, write_streamed
from tunesmith.models.vision import PROCESSOR_FILES
from tunesmith.runs.atomic import writing_folder
from tunesmith.types import JsonObject, Pooling

SHARD_BYTES = 5 * 1000**3
"""Largest weights file; what the hub and most tools write."""


@dataclass(frozen=True, slots=True)
class Stream:
    """Weights to write in place of a model's own, in the order of its state_dict, one at a time."""

    tensors: Iterable[tuple[str, Tensor]]
    """By their names in the model; a tied one under each of its names."""
    dtype: torch.dtype
    """They are rounded to it."""
    tick: Callable[[int, int], None] = lambda done, total: None
    """Gets the number of weights written, and of all."""


def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    located: ModelRef,
    stop_ids: Sequence[int],
    pooling: Pooling | None = None,
    weights: Mapping[str, Tensor] | Stream | None = None,
) -> None:
    """Write the model to `folder`, whole or not at all; an existing one is replaced.

    `located` is where the tokenizer came from: its files are copied byte for byte if nothing in them changed.
    `stop_ids` end an answer and go into the generation config of a model that writes; a head's labels go into
    labels.json. `pooling`: of a model that makes vectors. `weights`: those to write in place of the model's
    own. An encoder that guesses masked words keeps the files at `located` that say how its vectors are pooled.
    Raises StorageError where the disk refuses.
    """
    dtype = weights.dtype if isinstance(weights, Stream) else None
    num_bytes = sum(weight.numel() * (dtype or weight.dtype).itemsize for weight in model.parameters())
    with writing_folder(folder, num_bytes=num_bytes) as staged:
        _save_weights(model, staged, num_bytes, weights)
        save_tokenizer(with_pad_token(model, tokenizer), staged, located=located)
        heads.write_labels(model, staged)
        if type(model).__name__.endswith("ForMaskedLM"):
            pooling = find_pooling(located.path)
        if pooling is not None:
            write_pooling(pooling, staged, size=model.config.get_text_config().hidden_size)
        if model.can_generate():
            save_generation_config(model, staged, stop_ids=stop_ids)


def _save_weights(
    model: PreTrainedModel, folder: Path, num_bytes: int, weights: Mapping[str, Tensor] | Stream | None
) -> None:
    if isinstance(weights, Stream):
        with writing_weights(folder, num_bytes):
            _save_stream(model, folder, weights)
        return
    # Its own generation config may be one that transformers refuses to save; the mended one is written later.
    with writing_weights(folder, num_bytes), silence_transformers(), generating_by(model, GenerationConfig()):
        model.save_pretrained(folder, max_shard_size=SHARD_BYTES, state_dict=weights)
    for file in folder.glob("*.safetensors"):
        shutil.copymode(folder / "config.json", file)  # safetensors lets nobody but the owner read


def _save_stream(model: PreTrainedModel, folder: Path, weights: Stream) -> None:
    names = stored_names(model)
    if names is None:  # all of them in memory
        rounded = {name: tensor.to(weights.dtype) for name, tensor in weights.tensors}
        model.to(weights.dtype)
        with torch.no_grad():
            for name, tensor in model.state_dict().items():
                tensor.copy_(rounded[name])
        _save_weights(model, folder, 0, None)
        return
    model.config.dtype = str(weights.dtype).removeprefix("torch.")
    model.config.architectures = [type(model).__name__]
    with silence_transformers():
        model.config.save_pretrained(folder)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items() if name in names}
    settings: dict[str, Any] = {"names": names, "shapes": shapes, "shard_bytes": SHARD_BYTES, "tick": weights.tick}
    write_streamed(folder, weights.tensors, dtype=weights.dtype, **settings)


@contextmanager
def writing_weights(folder: Path, num_bytes: int) -> Iterator[None]:
    """Raise StorageError where safetensors cannot write: a full disk is its own error, not an OSError."""
    try:
        yield
    except SafetensorError as error:
        message = f"{folder}: the weights cannot be written ({num_bytes:,} bytes needed): {error}"
        raise StorageError(message, path=str(folder), errno_name="EIO", bytes_needed=num_bytes) from error


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path, *, located: ModelRef) -> None:
    """The tokenizer's files: copies of those it came from, unless it was changed or they have no
    tokenizer.json, as in a GGUF and in older models that bring a sentencepiece file.

    The processor's files, of a model that sees, are copied as they are. A chat template that was given by file
    is written too, and replaces any other.
    """
    for name in PROCESSOR_FILES:
        if (located.path / name).is_file():
            shutil.copyfile(located.path / name, folder / name)
    source = load_tokenizer(located, None) if (located.path / "tokenizer.json").is_file() else None
    if source is None or not _same(source, tokenizer):
        with silence_transformers():
            tokenizer.save_pretrained(folder)
        return
    for name in TOKENIZER_FILES:
        if (located.path / name).is_file():
            shutil.copyfile(located.path / name, folder / name)
    if (located.path / "additional_chat_templates").is_dir():
        shutil.copytree(located.path / "additional_chat_templates", folder / "additional_chat_templates")
    if tokenizer.chat_template != source.chat_template:
        _write_template(tokenizer.chat_template, folder)


def _same(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> bool:
    """True if both make the same tokens of a text; truncation and padding of batches are not compared."""
    if (one.special_tokens_map, one.model_max_length) != (other.special_tokens_map, other.model_max_length):
        return False
    texts = [tokenizer.backend_tokenizer.to_str() for tokenizer in (one, other)]
    return texts[0] == texts[1] or _contents(texts[0]) == _contents(texts[1])  # megabytes are rarely to be read


def _contents(backend: str) -> JsonObject:
    contents: JsonObject = json.loads(backend)
    del contents["truncation"], contents["padding"]
    return contents


def _write_template(template: Any, folder: Path) -> None:
    if not isinstance(template, str):
        raise AssertionError("only a template that was read from one file can differ from the model's own")
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8", newline="")
    (folder / "chat_template.json").unlink(missing_ok=True)
    shutil.rmtree(folder / "additional_chat_templates", ignore_errors=True)
    config_file = folder / "tokenizer_config.json"
    if config_file.is_file():
        config = json.loads(config_file.read_text("utf-8"))
        # Two templates in one folder: some tools would read the one, some the other.
        if config.pop("chat_template", None) is not None:
            config_file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def save_generation_config(model: PreTrainedModel, folder: Path, *, stop_ids: Sequence[int]) -> None:
    """Write generation_config.json: the model's own, valid, and ending at `stop_ids` too."""
    with silence_transformers():
        generation_config(model, stop_ids=stop_ids).save_pretrained(folder)


_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
_BEAMS = ("early_stopping", "length_penalty")


def generation_config(model: PreTrainedModel, *, stop_ids: Sequence[int]) -> GenerationConfig:
    """The model's generation config with `stop_ids` among its ends, rid of contradictory settings."""
    config = copy.deepcopy(model.generation_config or GenerationConfig())
    config._from_model_config = False
    model_ends = config.eos_token_id if config.eos_token_id is not None else []
    ends = list(dict.fromkeys([*stop_ids, *([model_ends] if isinstance(model_ends, int) else model_ends)]))
    config.eos_token_id = ends[0] if len(ends) == 1 else ends or None
    if config.pad_token_id is None or config.pad_token_id < 0:
        config.pad_token_id = ends[0] if ends else None
    # Without sampling or beams these have no effect, and transformers refuses to save them.
    for name in (*(() if config.do_sample else _SAMPLING), *(_BEAMS if config.num_beams in (None, 1) else ())):
        setattr(config, name, getattr(GenerationConfig(), name, None))
    try:
        with silence_transformers():
            config.validate(strict=True)
    except ValueError:
        # What else contradicts itself says nothing that could be kept.
        ids = {"bos_token_id": config.bos_token_id, "eos_token_id": ends, "pad_token_id": config.pad_token_id}
        return GenerationConfig(**ids)
    return config
