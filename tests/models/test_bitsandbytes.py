"""bitsandbytes comes in without fetching code from the hub."""

from pathlib import Path

import pytest

import fresh

FAKE = """
from pathlib import Path
def get_kernel(*a, **k):
    Path(__file__).with_name("asked").touch()
    raise OSError
"""


CODE = """
import sys
sys.path.insert(0, sys.argv[1])
if sys.argv[2] == "ours":
    from tunesmith.environment.packages import import_bitsandbytes
    import_bitsandbytes()
import bitsandbytes
bitsandbytes.optim.AdamW8bit
"""


@pytest.mark.slow
@pytest.mark.parametrize("whose", ["ours", "theirs"])
def test_no_code_is_looked_for_on_the_hub(tmp_path: Path, whose: str) -> None:
    """By the package `kernels`, which downloads and runs compiled code. Without our import it is."""
    pytest.importorskip("bitsandbytes", reason="needs the extra tunesmith[bitsandbytes]")
    (tmp_path / "kernels.py").write_text(FAKE)
    fresh.done("-c", CODE, tmp_path, whose)
    assert (tmp_path / "asked").exists() == (whose == "theirs")
