"""What the command line sets for torch: memory that does not grow with shapes, and threads that fit the machine."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import tunesmith
from tiny_run import chats, model_folder, tiny_recipe
from tunesmith.cli.app import app
from tunesmith.environment.children import for_child
from tunesmith.environment.process import refuse_ranks
from tunesmith.environment.settings import HEAP_KEPT_FREE, SHAPE_CACHE_SIZE, in_force, prepare_environment
from tunesmith.errors import InputError, Stopped
from tunesmith.training.trainer import Listener, train

SHAPED = """
import ctypes, torch
torch.set_num_threads(1)

def used():  # MiB in use on the heap: what the C library holds free is no growth
    info = mallinfo2()
    return (info.uordblks + info.hblkhd) / 2**20

class Info(ctypes.Structure):
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]

mallinfo2 = ctypes.CDLL(None).mallinfo2
mallinfo2.restype = Info
weight = torch.randn(32, 64).bfloat16()
marks = []
for tokens in range(20, 1420):  # each pass has another number of tokens
    torch.nn.functional.linear(torch.ones(tokens, 64).bfloat16(), weight)
    if tokens % 700 == 19:  # after 700 shapes, when a cache of 192 is full, and after twice as many
        marks.append(used())
print(marks[1] - marks[0])
"""


def growth(environment: dict[str, str]) -> float:
    """MiB that a process grows by from its 700th shape of a product to its 1,400th."""
    words = [sys.executable, "-c", SHAPED]
    done = subprocess.run(words, env={**os.environ, **environment}, capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout))


def mallinfo2_is_here() -> bool:
    import ctypes

    return sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallinfo2")


needs_caches = pytest.mark.skipif(
    not mallinfo2_is_here() or not torch.ops.mkldnn._is_mkldnn_bf16_supported(),
    reason="needs glibc's mallinfo2 and a processor on which products in bfloat16 are oneDNN's",
)


@needs_caches
@pytest.mark.slow
def test_memory_does_not_grow_with_the_shapes_of_passes() -> None:
    environment: dict[str, str] = {}
    prepare_environment(environment)
    assert growth(environment) < 16  # MiB: a few shapes more or less in the caches


@needs_caches
@pytest.mark.slow
def test_the_test_sees_one_of_two_caches_without_a_bound() -> None:
    """It keeps what the other drops."""
    assert growth({"ONEDNN_PRIMITIVE_CACHE_CAPACITY": SHAPE_CACHE_SIZE, "LRU_CACHE_CAPACITY": "4096"}) > 64


def test_what_a_person_has_set_counts_more_and_is_told() -> None:
    environment = {"GOMP_SPINCOUNT": "5", "LRU_CACHE_CAPACITY": "7", "MALLOC_MMAP_MAX_": "9"}
    prepare_environment(environment)
    assert in_force(environment) == {
        "GOMP_SPINCOUNT": "5",
        "ONEDNN_PRIMITIVE_CACHE_CAPACITY": SHAPE_CACHE_SIZE,
        "LRU_CACHE_CAPACITY": "7",
        "MALLOC_MMAP_MAX_": "9",
        "MALLOC_TRIM_THRESHOLD_": HEAP_KEPT_FREE,
        "MALLOC_ARENA_MAX": "1",
        "PYTORCH_ALLOC_CONF": "the library's",
    }
    assert in_force({})["GOMP_SPINCOUNT"] == "the library's"


@pytest.mark.parametrize("verb", ["train", "resume", "selftest", "plan"])
def test_one_of_several_ranks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str) -> None:
    model, data, root = model_folder(tmp_path / "model"), chats(tmp_path / "rows.jsonl", 20), tmp_path / "runs"
    words = {"train": [model, data], "plan": [model, data], "selftest": [model], "resume": ["half"]}[verb]
    if verb == "resume":
        with pytest.raises(Stopped):
            train(tiny_recipe(tmp_path), root=root, out=root / "half", listener=Listener(should_stop=lambda: True))
    monkeypatch.setenv("WORLD_SIZE", "2")
    done = CliRunner().invoke(app, [verb, *map(str, words), "--runs", str(root), "--offline"])
    assert done.exit_code == 2
    expected = {"train": "RANK=: not a number", "resume": "RANK=: not a number"}
    assert expected.get(verb, "WORLD_SIZE=2: torchrun or its like started 2") in " ".join(done.output.split())
    assert not [path for path in root.glob("*") if path.name not in ("half", ".rows")]


def test_one_of_several_ranks_is_refused_by_the_python_api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="RANK=: not a number, but WORLD_SIZE"):
        tunesmith.train(recipe=tiny_recipe(tmp_path), root=tmp_path / "runs")


@pytest.mark.parametrize("ranks", ["1", "", "many"])
def test_a_launcher_of_one_process_is_no_obstacle(ranks: str) -> None:
    refuse_ranks({"WORLD_SIZE": ranks, "RANK": "0"})


FREED = """
import resource, sys
from tunesmith.environment.settings import prepare_environment
if sys.argv[1] == "set":
    prepare_environment({})
import torch
torch.set_num_threads(1)

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

for _ in range(20):
    if _ == 10:
        before = faults()
    torch.zeros(64 * 2**20, dtype=torch.uint8)
print(faults() - before)
"""


def faults(how: str) -> int:
    """Pages that the kernel clears while 64 MiB are taken and freed ten times, with our settings or without."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    words = [sys.executable, "-c", FREED, how]
    return int(subprocess.run(words, env=plain, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(not mallinfo2_is_here(), reason="needs glibc")
def test_memory_that_a_step_frees_is_there_for_the_next() -> None:
    assert faults("set") < 100


@pytest.mark.slow
@pytest.mark.skipif(not mallinfo2_is_here(), reason="needs glibc")
def test_without_settings_all_pages_are_cleared_each_time() -> None:
    assert faults("plain") > 10 * 100


FREED_ELSEWHERE = """
import os, threading
from tunesmith.environment.settings import prepare_environment
prepare_environment(os.environ)

def held():  # MiB
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE") / 2**20

def take():
    return [bytearray(b"1" * 2**16) for _ in range(800)]

before = held()
thread = threading.Thread(target=take)
thread.start()
thread.join()
taken = take()
print(held() - before)
"""


@pytest.mark.skipif(not mallinfo2_is_here(), reason="needs glibc")
def test_memory_that_a_thread_frees_is_there_for_the_others() -> None:
    """50 MiB taken and freed by a thread, then by another: with a heap for each both stay."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}

    def growth(environment: Mapping[str, str]) -> float:
        words = [sys.executable, "-c", FREED_ELSEWHERE]
        return float(subprocess.run(words, env=environment, capture_output=True, text=True, check=True).stdout)

    assert growth(plain) < 70
    assert growth({**plain, "MALLOC_ARENA_MAX": "8"}) > 90


def test_a_child_finds_this_package_first_and_keeps_what_was_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    monkeypatch.setenv("KEPT", "1")
    child = for_child(MORE="2")
    package, *others = child["PYTHONPATH"].split(os.pathsep)
    assert (Path(package) / "tunesmith" / "__init__.py").is_file()
    assert others == ["/elsewhere"]
    assert (child["KEPT"], child["MORE"]) == ("1", "2")
    monkeypatch.delenv("PYTHONPATH")
    assert for_child()["PYTHONPATH"] == package  # an empty entry would be the working folder
