"""bitsandbytes comes in without fetching code from the hub."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FAKE = """
import os
from pathlib import Path
def get_kernel(*a, **k):
    Path(__file__).with_name("asked-" + os.environ["FOLDER"]).touch()
    raise OSError
"""


CODE = """
import os, torch
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


@pytest.mark.skipif(not hasattr(os, "fork"), reason="imports torch once and forks")
def test_no_code_is_looked_for_on_the_hub(tmp_path: Path) -> None:
    """By the package `kernels`, which downloads and runs compiled code. Without our import it is."""
    pytest.importorskip("bitsandbytes", reason="needs the extra tunesmith[bitsandbytes]")
    (tmp_path / "kernels.py").write_text(FAKE)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT / "src")])}
    subprocess.run([sys.executable, "-c", CODE], env=env, check=True)
    assert [path.name for path in tmp_path.glob("asked-*")] == ["asked-theirs"]
