"""Tokenizer and weights of a model that was located, through transformers.

Every weight comes from the file: a layer that the file does not fill is an error, never a random start; but for the
head of a task that the model meets for the first time.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from tunesmith.errors import ModelError
from tunesmith.models import gguf_tokenizer, heads, padding
from tunesmith.models.folder import weight_files
from tunesmith.models.locate import Located
from tunesmith.models.machine import choose_device, choose_precision
from tunesmith.models.source import blaming, load_config, source
from tunesmith.runs.atomic import sha256_file
from tunesmith.types import HeadName, Labels

__all__ = ["choose_device", "choose_precision", "fingerprint", "load_config", "load_model", "load_tokenizer"]

OnNote = Callable[[str], None]

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "chat_template.json", "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model",
)  # fmt: skip
MAX_TEMPLATE_BYTES = 64 * 1024


def load_tokenizer(
    located: Located, template: str | None, *, on_note: OnNote = lambda text: None
) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with the chat template of the file `template` if one is given.

    `on_note` is told what a person should know: a template that was replaced, a GGUF's tokenizer that was mended.
    """
    with blaming(located, "its tokenizer cannot be used"):
        tokenizer = AutoTokenizer.from_pretrained(**source(located))
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
    located: Located,
    *,
    dtype: torch.dtype,
    device: str,
    head: HeadName = "next_token",
    labels: Labels | None = None,
    seed: int = 0,
    tokenizer: PreTrainedTokenizerBase | None = None,
    on_note: OnNote = lambda text: None,
) -> PreTrainedModel:
    """The model with its weights in `dtype` on `device`, in eval mode, with a head that answers with `labels`.

    A head that answers with them already is kept, and without `labels` whatever head there is; any other is new, drawn
    from `seed` alone. `tokenizer` is the model's own, if it is at hand. `on_note` is told of new weights, and of
    weights that the model does not use, and so are not in what is saved.

    Raises ModelError where another weight is missing or of another shape than the config says, or where transformers
    has no such head for the model.
    """
    # Reading a GGUF's config takes as long as its weights; it has neither labels nor an architecture without heads.
    config = None if located.is_gguf else load_config(located)
    settings: dict[str, Any] = {} if labels is None else heads.label_settings(labels)
    # What transformers draws for missing weights is drawn again below: it leaves no trace in the process.
    with torch.random.fork_rng(devices=[]), blaming(located, "its weights cannot be loaded"):
        model, found = auto_class(located, config, head).from_pretrained(
            **source(located),
            **settings,
            **({} if located.is_gguf else {"use_safetensors": True}),
            dtype=dtype,
            ignore_mismatched_sizes=labels is not None,
            output_loading_info=True,
        )
    lacks = _lacking(located, model, found, drawable=labels is not None or head == "masked_token")
    keep = labels is None or (config is not None and heads.same_labels(config, head, labels))
    fresh = heads.fresh_names(model, lacks, keep=keep)
    heads.draw(model, fresh, seed=seed)
    if config is not None and not keep and set(fresh).isdisjoint(found["missing_keys"]):
        on_note(f"{located.name} has a head for other labels ({_listed(config.id2label.values())}): it is replaced")
    if fresh:
        on_note(f"new weights, drawn from seed {seed}, which {located.name} lacks or cannot use: {_listed(fresh)}")
    if unused := sorted(found["unexpected_keys"]):
        on_note(f"{len(unused)} weights of {located.name} have no place in {type(model).__name__}, such as {unused[0]}")
    if heads.pools_last(model):
        padding.choose(model, tokenizer or load_tokenizer(located, None), on_note)
    if located.is_gguf:
        _forget_gguf(model, located)
    return model.to(device)


def auto_class(located: Located, config: PreTrainedConfig | None, head: HeadName) -> Any:
    """transformers' class that makes such a model with this head. Raises ModelError where it has none."""
    translates = config is not None and config.is_encoder_decoder and head == "next_token"
    auto, known = _AUTO["translated" if translates else head]
    if config is not None and type(config) not in known:
        what = {"next_token": "goes on with a text", "masked_token": "guesses masked tokens"}.get(head, "answers so")
        raise ModelError(
            f"{located.name}: transformers has no {config.model_type} that {what} ({auto.__name__}). Use another model."
        )
    return auto


_AUTO: dict[str, tuple[Any, Any]] = {
    "next_token": (AutoModelForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING),
    "translated": (AutoModelForSeq2SeqLM, MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING),
    "masked_token": (AutoModelForMaskedLM, MODEL_FOR_MASKED_LM_MAPPING),
    "sequence": (AutoModelForSequenceClassification, MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING),
    "tokens": (AutoModelForTokenClassification, MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING),
}


def _lacking(located: Located, model: PreTrainedModel, found: dict[str, Any], *, drawable: bool) -> set[str]:
    """Weights of the head that the files lack and that may be drawn. Raises ModelError if they lack any other."""
    missing = set(found["missing_keys"])
    misshapen = {str(entry[0] if isinstance(entry, tuple) else entry) for entry in found["mismatched_keys"]}
    may_be_new = {name for name in missing | misshapen if drawable and heads.in_head(model, name)}
    for names, what in ((missing, "not in its files"), (misshapen, "of another shape than its config says")):
        if wrong := sorted(names - may_be_new):
            raise ModelError(
                f"{located.name}: {len(wrong)} weights are {what}, such as {wrong[0]}: they would start as random "
                f"numbers. Use a whole {type(model).__name__}."
            )
    if found.get("error_msgs"):
        raise ModelError(f"{located.name}: its weights cannot be loaded: {found['error_msgs'][0]}")
    return may_be_new


def _listed(names: Iterable[str]) -> str:
    listed = list(map(str, names))
    return ", ".join(listed[:6]) + (f" and {len(listed) - 6} more" if len(listed) > 6 else "")


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
