"""A located model as transformers is told of it, and what transformers says of a model that it cannot use."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, PreTrainedConfig

from tunesmith.errors import ModelError
from tunesmith.models.gguf_once import read_once
from tunesmith.models.locate import Located
from tunesmith.models.quiet import quiet

_FOREIGN = (
    OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, ImportError, ArithmeticError,
    AssertionError, SafetensorError, StrictDataclassError,
)  # fmt: skip
"""What transformers raises at files it cannot use: it states no error of its own."""


def load_config(located: Located) -> PreTrainedConfig:
    """The model's config. Raises ModelError for an architecture that transformers does not have."""
    with blaming(located, "its config cannot be used"):
        return AutoConfig.from_pretrained(**source(located))


def source(located: Located) -> dict[str, Any]:
    """The arguments of from_pretrained that name a model that is here already, and forbid all else."""
    here: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    if located.is_gguf:
        return {"pretrained_model_name_or_path": str(located.path.parent), "gguf_file": located.path.name, **here}
    return {"pretrained_model_name_or_path": str(located.path), **here}


@contextlib.contextmanager
def blaming(located: Located, what: str) -> Iterator[None]:
    """Foreign errors become a ModelError that names the model; foreign output is kept off the terminal."""
    try:
        with quiet(), _gguf() if located.is_gguf else contextlib.nullcontext():
            yield
    except _FOREIGN as error:
        text = re.sub(r"\s+", " ", str(error)).strip() or type(error).__name__
        raise ModelError(f"{located.path}: {what}: {text[:500]}") from error


@contextlib.contextmanager
def _gguf() -> Iterator[None]:
    # The bar of the GGUF loader knows no switch; it writes to stderr.
    with contextlib.redirect_stderr(io.StringIO()), read_once():
        yield
