"""bitsandbytes comes in without fetching code from the hub."""

import os
from pathlib import Path

import pytest

import fresh

FAKE = """
import os
from pathlib import Path
def get_kernel(*a, **k):
    Path(__file__).with_name("asked-" + os.environ["FOLDER"]).touch()
    raise OSError
"""


CODE = """
import os, sys
sys.path.insert(0, sys.argv[1])
for folder in ("ours", "theirs"):
    if os.fork() == 0:
        os.environ["FOLDER"] = folder
        if folder == "ours":
            from tunesmith.environment import import_bitsandbytes
            import_bitsandbytes()
        import bitsandbytes
        bitsandbytes.optim.AdamW8bit
        os._exit(0)
    assert os.wait()[1] == 0
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_no_code_is_looked_for_on_the_hub(tmp_path: Path) -> None:
    """By the package `kernels`, which downloads and runs compiled code. Without our import it is."""
    pytest.importorskip("bitsandbytes", reason="needs the extra tunesmith[bitsandbytes]")
    (tmp_path / "kernels.py").write_text(FAKE)
    fresh.done("-c", CODE, tmp_path)
    assert [path.name for path in tmp_path.glob("asked-*")] == ["asked-theirs"]
