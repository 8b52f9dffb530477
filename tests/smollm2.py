"""SmolLM2-135M-Instruct, a real chat model, where it is on this machine."""

import os
from pathlib import Path

import pytest

SMOLLM2 = Path(
    os.environ.get("TUNESMITH_SMOLLM2_GGUF", Path(__file__).parents[1] / "models/SmolLM2-135M-Instruct.gguf")
)
NEEDS_SMOLLM2 = pytest.mark.skipif(not SMOLLM2.exists(), reason="python scripts/get_model.py smollm2 fetches it")
