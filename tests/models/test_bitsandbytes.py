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
def get_kernel(*a, **k):
    Path(__file__).with_name("asked").touch()
    raise OSError
"""


@pytest.mark.parametrize("code", ["from tunesmith.environment import import_bitsandbytes as load", "load = None"])
def test_no_code_is_looked_for_on_the_hub(tmp_path: Path, code: str) -> None:
    """By the package `kernels`, which downloads and runs compiled code. Without our import it is."""
    pytest.importorskip("bitsandbytes", reason="needs the extra tunesmith[bitsandbytes]")
    (tmp_path / "kernels.py").write_text(FAKE)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT / "src")])}
    code += "\nload() if load else __import__('bitsandbytes')\nimport bitsandbytes\nbitsandbytes.optim.AdamW8bit"
    subprocess.run([sys.executable, "-c", code], env=env, check=True)
    assert (tmp_path / "asked").exists() == ("None" in code)
