"""bitsandbytes comes in without fetching code from the hub."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FAKE = """
from pathlib import Path
place = Path(__file__).with_name("asked")
assert not place.exists(), "it was asked already"
place.touch()
def get_kernel(*a, **k): raise OSError
"""


CODE = """
import sys
from pathlib import Path
from tunesmith.models.quantized import import_bitsandbytes
import_bitsandbytes().optim.AdamW8bit
assert "kernels" not in sys.modules
import kernels  # afterwards the package is there for who asks for it
"""


def test_no_code_is_looked_for_on_the_hub(tmp_path: Path) -> None:
    """By the package `kernels`, which downloads and runs compiled code."""
    pytest.importorskip("bitsandbytes", reason="needs the extra tunesmith[bitsandbytes]")
    (tmp_path / "kernels.py").write_text(FAKE)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT / "src")])}
    subprocess.run([sys.executable, "-c", CODE], env=env, check=True)
    assert (tmp_path / "asked").exists()
