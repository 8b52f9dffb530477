"""What a model can learn: to go on with a text, to read a whole one, or to read one and write another."""

from __future__ import annotations

from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_MASKED_LM_MAPPING_NAMES as MASKED,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as SEQUENCE,
)

from tunesmith.errors import ModelError
from tunesmith.models.locate import Located
from tunesmith.models.source import load_config
from tunesmith.types import Layout, ModelKind


def layouts_of(kind: ModelKind) -> tuple[Layout, ...]:
    """The layouts of a batch of such a model: the first one it can run is taken, the last one it can always run."""
    return ("encoder_decoder",) if kind == "encoder_decoder" else ("ragged", "padded")


def model_kind(located: Located) -> ModelKind:
    """What the model is by its config; no weight is read. Raises ModelError for a model that is not of text."""
    if located.is_gguf:
        return "causal"
    config = load_config(located)
    if config.is_encoder_decoder:
        return "encoder_decoder"
    # BERT and its like are listed as causal too, for use as a decoder, which their config then says.
    if config.model_type in CAUSAL and (config.model_type not in MASKED or getattr(config, "is_decoder", False)):
        return "causal"
    if config.model_type in MASKED or config.model_type in SEQUENCE:
        return "encoder"
    raise ModelError(
        f"{located.name}: {config.model_type}: not a model of text that transformers can train. Use another one."
    )
