"""Tokenizer and weights of a model that was located, through transformers.

Every weight comes from the file: a layer that the file does not fill is an error, never a random start.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from tunesmith.errors import ModelError
from tunesmith.files import sha256_file
from tunesmith.models import gguf_tokenizer
from tunesmith.models.folder import weight_files
from tunesmith.models.locate import Located
from tunesmith.models.machine import choose_device, choose_precision
from tunesmith.models.quiet import quiet

__all__ = ["choose_device", "choose_precision", "fingerprint", "load_config", "load_model", "load_tokenizer"]

OnNote = Callable[[str], None]

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "chat_template.json", "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model",
)  # fmt: skip
MAX_TEMPLATE_BYTES = 64 * 1024

_FOREIGN = (
    OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, ImportError, ArithmeticError,
    AssertionError, SafetensorError, StrictDataclassError,
)  # fmt: skip
"""What transformers raises at files it cannot use: it states no error of its own."""


def load_config(located: Located) -> PreTrainedConfig:
    """The model's config. Raises ModelError for an architecture that transformers does not have."""
    with _blaming(located, "its config cannot be used"):
        return AutoConfig.from_pretrained(**_source(located))


def load_tokenizer(
    located: Located, template: str | None, *, on_note: OnNote = lambda text: None
) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with the chat template of the file `template` if one is given.

    `on_note` is told what a person should know: a template that was replaced, a GGUF's tokenizer that was mended.
    """
    with _blaming(located, "its tokenizer cannot be used"):
        tokenizer = AutoTokenizer.from_pretrained(**_source(located))
    if not tokenizer.is_fast:
        raise ModelError(f"{located.name}: its tokenizer has no fast form (tokenizer.json). Use a model that has one.")
    if located.is_gguf:
        gguf_tokenizer.mend(tokenizer, located.path, on_note)
    if template is not None:
        text = _read_template(Path(template))
        if tokenizer.chat_template and tokenizer.chat_template != text:
            on_note(f"data.template: {template} takes the place of the model's own chat template")
        tokenizer.chat_template = text
    return tokenizer


def _read_template(path: Path) -> str:
    try:
        content = path.read_bytes()
        text = content.decode("utf-8")
    except OSError as error:
        raise ModelError(f"data.template: {path}: {error.strerror}. Name a file with a Jinja chat template.") from error
    except UnicodeDecodeError as error:
        raise ModelError(
            f"data.template: {path}: not UTF-8 ({error}). Name a file with a Jinja chat template."
        ) from error
    if len(content) > MAX_TEMPLATE_BYTES:
        raise ModelError(f"data.template: {path}: {len(content):,} bytes; at most {MAX_TEMPLATE_BYTES:,} are allowed.")
    # As transformers will read it from the saved folder, and as Jinja reads any template.
    return text.replace("\r\n", "\n").replace("\r", "\n")


def load_model(
    located: Located, *, dtype: torch.dtype, device: str, on_note: OnNote = lambda text: None
) -> PreTrainedModel:
    """The model with its weights in `dtype` on `device`, in eval mode.

    Raises ModelError where a weight is missing or of another shape than the config says. `on_note` is told of weights
    that the model does not use, and so are not in what is saved.
    """
    with _blaming(located, "its weights cannot be loaded"):
        model, found = AutoModelForCausalLM.from_pretrained(
            **_source(located), dtype=dtype, output_loading_info=True, **({} if located.is_gguf else _SAFE)
        )
    _check_filled(located, found)
    if unused := sorted(found["unexpected_keys"]):
        on_note(f"{len(unused)} weights of {located.name} have no place in {type(model).__name__}, such as {unused[0]}")
    if located.is_gguf:
        _forget_gguf(model, located)
    return model.to(device)


_SAFE = {"use_safetensors": True}


def _check_filled(located: Located, found: dict[str, Any]) -> None:
    missing = sorted(found["missing_keys"])
    misshapen = sorted(str(entry[0] if isinstance(entry, tuple) else entry) for entry in found["mismatched_keys"])
    for names, what in ((missing, "not in its files"), (misshapen, "of another shape than its config says")):
        if names:
            raise ModelError(
                f"{located.name}: {len(names)} weights are {what}, such as {names[0]}: they would start as random "
                "numbers. Use a whole causal language model."
            )
    if found.get("error_msgs"):
        raise ModelError(f"{located.name}: its weights cannot be loaded: {found['error_msgs'][0]}")


def _forget_gguf(model: PreTrainedModel, located: Located) -> None:
    """The weights are plain numbers by now; what says otherwise would keep them from being saved and read again."""
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    for name in ("hf_quantizer", "quantization_method"):
        if hasattr(model, name):
            delattr(model, name)
    model.is_quantized = False
    model.config._name_or_path = located.name
    # Numbers come as float32: 1e-05 would be saved as 9.999999747378752e-06.
    for name, value in vars(model.config).items():
        if isinstance(value, float):
            setattr(model.config, name, float(f"{value:.7g}"))
    vars(model.config).pop("_model_name_or_path", None)


def _source(located: Located) -> dict[str, Any]:
    """The arguments of from_pretrained that name a model that is here already, and forbid all else."""
    here: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    if located.is_gguf:
        return {"pretrained_model_name_or_path": str(located.path.parent), "gguf_file": located.path.name, **here}
    return {"pretrained_model_name_or_path": str(located.path), **here}


@contextlib.contextmanager
def _blaming(located: Located, what: str) -> Iterator[None]:
    """Foreign errors become a ModelError that names the model; foreign output is kept off the terminal."""
    try:
        # The bar of the GGUF loader knows no switch; it writes to stderr.
        gguf_bar = contextlib.redirect_stderr(io.StringIO()) if located.is_gguf else contextlib.nullcontext()
        with quiet(), gguf_bar:
            yield
    except _FOREIGN as error:
        text = re.sub(r"\s+", " ", str(error)).strip() or type(error).__name__
        raise ModelError(f"{located.path}: {what}: {text[:500]}") from error


def fingerprint(located: Located) -> dict[str, str]:
    """SHA-256 of every file of the model that a run depends on, by name."""
    if located.is_gguf:
        return {located.path.name: sha256_file(located.path)}
    names = ["config.json", "generation_config.json", *TOKENIZER_FILES]
    files = [located.path / name for name in names] + weight_files(located.path, located.name)
    return {file.name: _sha256(file) for file in files if file.is_file()}


def _sha256(file: Path) -> str:
    # The hub's cache keeps large files under the hash of their bytes: no need to read gigabytes for it.
    blob = file.resolve()
    if file.is_symlink() and blob.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", blob.name):
        return blob.name
    return sha256_file(file)
