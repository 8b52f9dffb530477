"""bitsandbytes comes in without fetching code from the hub."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FAKE = "from pathlib import Path\nPath(__file__).with_name('asked').touch()\ndef get_kernel(*a, **k): raise OSError\n"


def importing(folder: Path, code: str) -> bool:
    """Whether the package `kernels`, which downloads and runs compiled code, was looked at."""
    pytest.importorskip("bitsandbytes", reason="needs the extra tunesmith[bitsandbytes]")
    (folder / "kernels.py").write_text(FAKE)
    path = os.pathsep.join([str(folder), str(ROOT / "src")])
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, check=True)
    return (folder / "asked").exists()


def test_no_code_is_looked_for_on_the_hub(tmp_path):
    code = (
        "import sys\nfrom tunesmith.models.quantized import import_bitsandbytes as load\nload().optim.AdamW8bit\n"
        "assert 'kernels' not in sys.modules\nimport kernels"
    )
    before = code.removesuffix("import kernels")
    assert not importing(tmp_path, before)
    assert importing(tmp_path, code)  # afterwards the package is there for who asks for it
