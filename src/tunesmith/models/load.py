"""Loading of config, tokenizer and weights through transformers.

Every weight comes from the file: a layer that the file does not fill is an error, never a random start, except
for the head of a task that is new to the model.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)

from tunesmith.errors import ModelError
from tunesmith.models import contention, heads
from tunesmith.models.folder import weight_files
from tunesmith.models.gguf import fix_tokenizer, read_once
from tunesmith.models.growth import check_growth
from tunesmith.models.modes import silence_transformers
from tunesmith.models.quantized import PackOnLoad
from tunesmith.models.resolve_model import ModelRef
from tunesmith.models.special_tokens import NewTokens, add_tokens, choose_pad_token
from tunesmith.models.vision import PROCESSOR_FILES, is_seeing, processor_template
from tunesmith.phrases import listed
from tunesmith.runs.atomic import sha256_file
from tunesmith.types import Aside, HeadName, JsonObject, Labels, ModelKind

OnNote = Callable[[str], None]
_HEAD_WEIGHT = re.compile(r"(^|\.)(cls|lm_head|pooler|classifier|score|qa_outputs|predictions)\.")

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "chat_template.json", "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model",
)  # fmt: skip
MAX_TEMPLATE_BYTES = 64 * 1024
_LIBRARY_ERRORS = (
    OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, ImportError, ArithmeticError,
    AssertionError, SafetensorError, StrictDataclassError,
)  # fmt: skip
"""Errors that transformers raises for files it cannot use; it has no class of its own for them."""


def load_config(located: ModelRef) -> PreTrainedConfig:
    """The model's config. Raises ModelError for an architecture that transformers does not have."""
    with wrap_errors(located, "its config cannot be used"):
        return AutoConfig.from_pretrained(**pretrained_args(located))


def pretrained_args(located: ModelRef) -> JsonObject:
    """The arguments of from_pretrained for a local model; they forbid network and remote code."""
    local_only: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    if located.is_gguf:
        files = {"pretrained_model_name_or_path": str(located.path.parent), "gguf_file": located.path.name}
    else:
        files = {"pretrained_model_name_or_path": str(located.path)}
    return {**files, **local_only}


@contextlib.contextmanager
def wrap_errors(located: ModelRef, what: str) -> Iterator[None]:
    """A block that calls transformers: its errors become a ModelError that names the model, and what it prints
    is kept off the terminal."""
    try:
        with silence_transformers(), _quiet_gguf() if located.is_gguf else contextlib.nullcontext():
            yield
    except _LIBRARY_ERRORS as error:
        text = re.sub(r"\s+", " ", str(error)).strip() or type(error).__name__
        raise ModelError(f"{located.path}: {what}: {text[:500]}") from error


@contextlib.contextmanager
def _quiet_gguf() -> Iterator[None]:
    # The GGUF loader's progress bar cannot be switched off; it writes to stderr.
    with contextlib.redirect_stderr(io.StringIO()), read_once():
        yield


def model_kind(located: ModelRef) -> ModelKind:
    """The kind of the model by its config; no weight is read. Raises ModelError if it is not of text."""
    if located.is_gguf:
        return "causal"
    config = load_config(located)
    if config.is_encoder_decoder:
        return "encoder_decoder"
    if is_seeing(config):
        return "causal"
    # BERT and its like are listed as causal too: they can be decoders, and then their config says so.
    if config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and (
        config.model_type not in MODEL_FOR_MASKED_LM_MAPPING_NAMES or getattr(config, "is_decoder", False)
    ):
        return "causal"
    if (
        config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES
        or config.model_type in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
    ):
        return "encoder"
    raise ModelError(
        f"{located.name}: {config.model_type}: not a model of text that transformers can train. Use another one."
    )


_TOKENIZER_PATTERNS = ("*token*", "*vocab*", "*.model", "tekken.json")


def load_tokenizer(
    located: ModelRef, template: str | None, *, on_note: OnNote = lambda text: None
) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with the chat template of the file `template` if one is given.

    `on_note` gets what the user should know: a template that was replaced, a GGUF's tokenizer that may differ.
    """
    try:
        check_growth(located.path / "tokenizer.json")
        with wrap_errors(located, "its tokenizer cannot be used"):
            tokenizer = AutoTokenizer.from_pretrained(**pretrained_args(located))
    except ModelError as error:  # transformers' own words are about tiktoken, whatever is missing
        has_files = any(any(located.path.glob(pattern)) for pattern in _TOKENIZER_PATTERNS)
        if located.path.is_dir() and not has_files:
            way_out = "Copy the tokenizer files of its base model into it, tokenizer.json above all."
            raise ModelError(f"{located.name}: no tokenizer in this folder. {way_out}") from error
        sentencepiece_files = sorted(path.name for path in located.path.glob("*.model"))
        if not sentencepiece_files or find_spec("sentencepiece"):
            raise
        way_out = f"to read {sentencepiece_files[0]} the package sentencepiece is needed: pip install sentencepiece"
        raise ModelError(f"{located.name}: its tokenizer has no tokenizer.json; {way_out}") from error
    if not tokenizer.is_fast:
        raise ModelError(f"{located.name}: its tokenizer has no fast form (tokenizer.json). Use a model that has one.")
    if located.is_gguf:
        fix_tokenizer(tokenizer, located.path, on_note)
    tokenizer.chat_template = processor_template(located.path) or tokenizer.chat_template
    if template is not None:
        text = _read_template(Path(template))
        if tokenizer.chat_template and tokenizer.chat_template != text:
            on_note(f"data.template: {template} takes the place of the model's own chat template")
        tokenizer.chat_template = text
    return tokenizer


def new_tokens_of(texts: Sequence[str], located: ModelRef) -> NewTokens:
    """The tokens that a run, whose `data.new_tokens` are given, adds to its base."""
    return add_tokens(load_tokenizer(located, None), texts) if texts else NewTokens()


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
    located: ModelRef,
    *,
    dtype: torch.dtype,
    device: str,
    head: HeadName = "next_token",
    labels: Labels | None = None,
    seed: int = 0,
    tokenizer: PreTrainedTokenizerBase | None = None,
    packing: PackOnLoad | None = None,
    on_note: OnNote = lambda text: None,
) -> PreTrainedModel:
    """The model with its weights in `dtype` on `device`, in eval mode, with a head that answers with `labels`.

    Weights are read straight onto the device, a GGUF's are moved there. Raises ModelError where a weight is missing
    or misshapen, unless it belongs to a new head, or where transformers has no such head for the model.

    Args:
        labels: a head that has these labels already is kept, any other is replaced. None: the model keeps its head.
        seed: alone decides the weights of a new head.
        tokenizer: the model's own, if it was loaded already.
        packing: the way in which weights are quantized on the device; None: they are not.
        on_note: gets notes on new weights, and on weights that the model does not use, which a save will lack.
    """
    contention.watch()  # whoever loads a model computes with it, next to whatever else runs on the machine
    # Reading a GGUF's config takes as long as its weights; it has no labels, and no architecture without heads.
    config = None if located.is_gguf else load_config(located)
    settings: dict[str, Any] = {} if labels is None else heads.label_settings(labels)
    if not located.is_gguf:
        settings["use_safetensors"] = True
        settings |= {} if torch.device(device).type == "cpu" else {"device_map": {"": device}}
        settings |= {} if packing is None else {"quantization_config": packing}
    # What transformers draws for missing weights is drawn again below: it leaves no trace in the process.
    with torch.random.fork_rng(devices=[]), wrap_errors(located, "its weights cannot be loaded"):
        model, report = auto_class(located, config, head).from_pretrained(
            **pretrained_args(located),
            **settings,
            dtype=dtype,
            ignore_mismatched_sizes=labels is not None,
            output_loading_info=True,
        )
    if head == "sequence" and not heads.pools_last(model) and model_kind(located) == "causal":
        what = f"the head of a {type(model).__name__} reads a text in its own way"
        raise ModelError(f"{located.name}: {what}. Use another model.")
    may_be_new = labels is not None or head in ("masked_token", "vector")
    missing = _missing_head_weights(located, model, report, may_be_new=may_be_new)
    if head == "vector" and missing:
        model.pooler, missing = None, set()  # it is not read
    keeps_head = labels is None or (config is not None and heads.same_labels(config, head, labels))
    new_names = heads.fresh_names(model, missing, keep=keeps_head)
    heads.init_head(model, new_names, seed=seed)
    if config is not None and not keeps_head and set(new_names).isdisjoint(report["missing_keys"]):
        on_note(f"{located.name} has a head for other labels ({listed(config.id2label.values())}): it is replaced")
    for note in _notes_on_weights(located, model, new=new_names, seed=seed, unused=sorted(report["unexpected_keys"])):
        on_note(note)
    if heads.pools_last(model) or (head == "vector" and config is not None and not located.is_gguf):
        choose_pad_token(model, tokenizer or load_tokenizer(located, None), on_note)
    if located.is_gguf:
        _forget_gguf(model, located)
    return model.to(device)


def _notes_on_weights(
    located: ModelRef, model: PreTrainedModel, *, new: Sequence[str], seed: int, unused: Sequence[str]
) -> Iterator[str]:
    """Notes on new weights, and on weights that were not loaded. They are asides where the weights belong to a
    head: a new one, or another one than the model gets."""
    if new:
        note = f"new weights, drawn from seed {seed}, which {located.name} lacks or cannot use: {listed(new)}"
        yield Aside(note) if set(new) <= set(heads.new_head_names(model)) else note
    if unused:
        note = f"{len(unused)} weights of {located.name} have no place in {type(model).__name__}, such as {unused[0]}"
        yield Aside(note) if all(map(_HEAD_WEIGHT.search, unused)) else note


def auto_class(located: ModelRef, config: PreTrainedConfig | None, head: HeadName) -> Any:
    """transformers' class that makes such a model with this head. Raises ModelError where it has none."""
    auto, known_configs = _AUTO_CLASSES[head]
    if head == "next_token" and config is not None and config.is_encoder_decoder:
        auto, known_configs = AutoModelForSeq2SeqLM, MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING
    elif head == "next_token" and is_seeing(config):
        auto, known_configs = AutoModelForImageTextToText, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    if config is not None and type(config) not in known_configs:
        abilities = {"next_token": "predicts the next token", "masked_token": "predicts masked tokens"}
        ability = abilities.get(head, "has such a head")
        raise ModelError(
            f"{located.name}: transformers has no {config.model_type} that {ability} ({auto.__name__}). "
            "Use another model."
        )
    return auto


_AUTO_CLASSES: dict[str, tuple[Any, Any]] = {
    "next_token": (AutoModelForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING),
    "masked_token": (AutoModelForMaskedLM, MODEL_FOR_MASKED_LM_MAPPING),
    "sequence": (AutoModelForSequenceClassification, MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING),
    "tokens": (AutoModelForTokenClassification, MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING),
    "vector": (AutoModel, MODEL_MAPPING),
}


def _missing_head_weights(
    located: ModelRef, model: PreTrainedModel, report: JsonObject, *, may_be_new: bool
) -> set[str]:
    """Weights of the head that the files lack, to be drawn. Raises ModelError if the files lack other weights,
    or any where no weight `may_be_new`."""
    missing = set(report["missing_keys"])
    misshapen = {str(entry[0] if isinstance(entry, tuple) else entry) for entry in report["mismatched_keys"]}
    to_draw = {name for name in missing | misshapen if may_be_new and heads.in_head(model, name)}
    for names, what in ((missing, "not in its files"), (misshapen, "of another shape than its config says")):
        if wrong := sorted(names - to_draw):
            raise ModelError(
                f"{located.name}: {len(wrong)} weights are {what}, such as {wrong[0]}: they would start as "
                f"random numbers. Use a whole {type(model).__name__}."
            )
    if report.get("error_msgs"):
        raise ModelError(f"{located.name}: its weights cannot be loaded: {report['error_msgs'][0]}")
    return to_draw


def _forget_gguf(model: PreTrainedModel, located: ModelRef) -> None:
    """Remove what marks the weights as quantized: they are plain by now, and the mark would prevent a save."""
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    for name in ("hf_quantizer", "quantization_method"):
        if hasattr(model, name):
            delattr(model, name)
    model.is_quantized = False
    model.config._name_or_path = located.name
    # A GGUF has numbers in float32: 1e-05 would be saved as 9.999999747378752e-06.
    for name, value in vars(model.config).items():
        if isinstance(value, float):
            setattr(model.config, name, float(f"{value:.7g}"))
    vars(model.config).pop("_model_name_or_path", None)


def fingerprint(located: ModelRef) -> dict[str, str]:
    """SHA-256 of every file of the model that a run depends on, by name."""
    if located.is_gguf:
        return {located.path.name: sha256_file(located.path)}
    names = ["config.json", "generation_config.json", *TOKENIZER_FILES]
    names += PROCESSOR_FILES if is_seeing(load_config(located)) else ()
    files = [located.path / name for name in names] + weight_files(located.path, located.name)
    return {file.name: _sha256(file) for file in files if file.is_file()}


def _sha256(file: Path) -> str:
    # The hub's cache keeps large files under the hash of their bytes: no need to read gigabytes for it.
    blob = file.resolve()
    if file.is_symlink() and blob.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", blob.name):
        return blob.name
    return sha256_file(file)
