"""Memory does not grow with a file or a line. Measured in processes of their own, where nothing else was in memory."""

import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

MIB = 1024 * 1024
READ = """
import resource, sys
from tunesmith.data.read import read
from tunesmith.recipe.schema import DataFile, Limits
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
problems, num = [], 0
for row in read([DataFile(path=sys.argv[1])], limits=Limits(), on_problem=problems.append):
    num += 1
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print(num, grown, *(f"{p.code}:{p.source.line}" for p in problems))
"""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux")


def read_alone(path: Path) -> tuple[int, int, list[str]]:
    """Rows read, bytes by which the process grew, and what was said."""
    environment = {"PYTHONPATH": ":".join(sys.path), "OMP_NUM_THREADS": "1", "ARROW_DEFAULT_MEMORY_POOL": "system"}
    run = subprocess.run(
        [sys.executable, "-c", READ, str(path)], env=environment, capture_output=True, text=True, check=True
    )
    num, grown, *problems = run.stdout.split()
    return int(num), int(grown) * 1024, problems


# 8 MiB is data.limits.line_bytes; a line of it exists up to three times: read, cut, joined.
ALLOWED = 40 * MIB


def test_a_line_of_100_mb_is_skipped_without_being_held(tmp_path: Path):
    row = b'{"prompt": "a", "completion": "b"}\n'
    path = tmp_path / "rows.jsonl"
    with open(path, "wb") as file:
        file.write(row + b'{"prompt": "')
        for _ in range(100):
            file.write(b"x" * 1_000_000)
        file.write(b'"}\n' + row)
    num, grown, problems = read_alone(path)
    assert (num, problems) == (2, ["line_too_long:2"])
    assert grown < ALLOWED


def test_a_parquet_file_of_a_kilobyte_does_not_unpack_to_gigabytes(tmp_path: Path):
    dictionary = pa.array(["a" * (9 * MIB)])
    texts = pa.DictionaryArray.from_arrays(pa.array([0] * 400, pa.int32()), dictionary)
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"text": texts}), path, compression="zstd")
    assert path.stat().st_size < 2000
    num, grown, problems = read_alone(path)
    assert (num, len(problems)) == (0, 400)
    assert grown < 24 * ALLOWED  # 64 rows at once; 3.6 GB when rows are read by what the footer says
