"""No command imports from the folder in which it is started: a file torch.py there is data that somebody else wrote."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import fresh
import tunesmith
from tiny_run import chats, model_folder
from tunesmith.environment import children
from tunesmith.environment.children import DROP_FOLDER, for_child, python_words, spawning
from tunesmith.parallel import cluster

PACKAGES = [
    "jinja2",
    "numpy",
    "orjson",
    "psutil",
    "pydantic",
    "tokenizers",
    "torch",
    "transformers",
    "tunesmith",
    "typer",
    "uvicorn",
    "yaml",
]
MODULES = sorted({*sys.stdlib_module_names, *PACKAGES} - set(sys.builtin_module_names))
QUICK = (
    *("method=lora", "train.max_steps=2", "train.rows_per_step=3", "evaluation.samples=0"),
    *("evaluation.general=false", "precision=float32", "device=cpu", "threads=1"),
)
SWEEP = """
base: {model: model, data: {train: [chats.jsonl]}, train: {max_steps: 2, rows_per_step: 3}, device: cpu, threads: 1,
       precision: float32, evaluation: {samples: 0, general: false}, method: {name: lora}}
grid: {optim.lr: [1e-2]}
"""


def hostile(folder: Path, *, without: tuple[str, ...] = ()) -> Path:
    """A folder with files that write their names into a file `ran` when they are run, in place of MODULES."""
    for name in MODULES:
        if name not in without:
            note = f"import _io\n_io.FileIO({str(folder / 'ran')!r}, 'a').write(b'{name} ')\n"
            (folder / f"{name}.py").write_text(f"{note}raise ImportError('hostile')\n")
    return folder


@pytest.fixture
def place(tmp_path: Path) -> Path:
    model_folder(tmp_path / "model")
    chats(tmp_path / "chats.jsonl", 18)
    (tmp_path / "sweep.yaml").write_text(SWEEP)
    return hostile(tmp_path)


def were_run(folder: Path) -> str:
    return (folder / "ran").read_text() if (folder / "ran").exists() else ""


def run(place: Path, *words: str) -> None:
    settings = [word for setting in QUICK for word in ("--set", setting)] if words[0] in ("plan", "train") else []
    process = fresh.Process("-m", "tunesmith", *words, *settings, cwd=place)
    said, errors = process.communicate()
    assert (process.returncode, were_run(place)) == (0, ""), said + errors


# trap: S20
def test_what_is_planted_would_be_run(tmp_path: Path) -> None:
    hostile(tmp_path)
    subprocess.run([sys.executable, "-m", "json.tool"], cwd=tmp_path, capture_output=True, check=False)
    with pytest.raises(AssertionError):
        assert were_run(tmp_path) == ""


@pytest.mark.parametrize("module", ["tunesmith", "tunesmith.data.template_trial"])
def test_a_module_of_ours_runs_nothing_of_the_folder(tmp_path: Path, module: str) -> None:
    words = [*python_words(module), *(["--version"] if module == "tunesmith" else [])]
    given = json.dumps({"texts": ["a"], "tokens": {}, "limit_s": 1})
    done = subprocess.run(
        words, cwd=hostile(tmp_path), env=for_child(), input=given, capture_output=True, text=True, check=False
    )
    assert (done.returncode, were_run(tmp_path)) == (0, ""), done.stderr


def test_python_that_knows_no_safe_path_is_given_another_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(children.sys, "version_info", (3, 10, 0))
    words = python_words("tunesmith")
    monkeypatch.undo()
    child = {name: value for name, value in for_child().items() if name != "PYTHONSAFEPATH"}
    hostile(tmp_path)
    done = subprocess.run([*words, "--version"], cwd=tmp_path, env=child, capture_output=True, text=True, check=False)
    assert (done.returncode, were_run(tmp_path)) == (0, ""), done.stderr
    assert DROP_FOLDER in words[2]


SPAWNS = """
import multiprocessing, os, sys
from tunesmith.environment.children import spawning
os.environ.pop("PYTHONSAFEPATH", None)
if __name__ == "__main__":
    with {block}:
        process = multiprocessing.get_context("spawn").Process(target=print, args=("came",))
        process.start()
    process.join()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows starts them otherwise")
def test_processes_that_multiprocessing_starts_run_nothing_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "here").mkdir()
    hostile(tmp_path / "here")
    environ = {name: value for name, value in for_child().items() if name != "PYTHONSAFEPATH"}
    said = []
    for block in ("spawning()", "open(os.devnull)"):  # the second is as multiprocessing does it by itself
        script = tmp_path / "elsewhere" / "script.py"
        script.write_text(SPAWNS.format(block=block))
        words = [sys.executable, str(script)]
        done = subprocess.run(words, cwd=tmp_path / "here", env=environ, capture_output=True, text=True, check=False)
        said.append((done.stdout, bool(were_run(tmp_path / "here"))))
    assert said == [("came\n", False), ("", True)]


def test_python_dash_m_leaves_the_folder_out_as_soon_as_it_is_ours(tmp_path: Path) -> None:
    """What Python itself imports before, it imports from there: no program can help that."""
    environ = {name: value for name, value in for_child().items() if name != "PYTHONSAFEPATH"}
    (tmp_path / "plain.py").write_text("import sys; print(*{name.partition('.')[0] for name in sys.modules})")
    words = [sys.executable, "-m", "plain"]
    told = subprocess.run(words, cwd=tmp_path, env=environ, capture_output=True, text=True, check=True).stdout
    before = ("tunesmith", *told.split())
    done = subprocess.run(
        [sys.executable, "-m", "tunesmith", "--version"],
        cwd=hostile(tmp_path, without=before), env=environ, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, were_run(tmp_path)) == (0, ""), done.stderr


def test_what_a_person_has_put_on_the_path_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text("print('mine')")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}")
    words = [sys.executable, "-c", "import sys, mine; print('' in sys.path)"]
    done = subprocess.run(words, cwd=tmp_path, env=for_child(), capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["mine", "False"]


def test_ray_is_begun_in_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It puts the folder of its driver on the path of its workers."""
    monkeypatch.chdir(tmp_path)
    with cluster._elsewhere():
        assert (Path.cwd() / "tunesmith" / "__init__.py").is_file()
    assert Path.cwd() == tmp_path


def test_spawning_leaves_multiprocessing_as_it_was() -> None:
    from multiprocessing import util

    before = util.spawnv_passfds  # type: ignore[attr-defined]
    with spawning():
        assert util.spawnv_passfds is not before  # type: ignore[attr-defined]
    assert util.spawnv_passfds is before  # type: ignore[attr-defined]


def test_no_child_is_started_in_another_way() -> None:
    source = Path(tunesmith.__file__).parent
    names = {
        path.relative_to(source).as_posix()
        for path in source.rglob("*.py")
        if "sys.executable" in path.read_text("utf-8")
    }
    # `children` starts them; the others print the path for a person, or look whether there is one.
    printing = {
        "phrases.py",
        "environment/packages.py",
        "cli/doctor.py",
        "trackers/libraries.py",
        "data/template_trial.py",
        "graders/child.py",
        "jobs/routes.py",
    }
    assert names == {"environment/children.py", *printing}


def test_check_of_rows_in_two_processes(place: Path) -> None:
    run(place, "check", "chats.jsonl", "--model", "model", "--set", "data.num_proc=2")


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ("plan", "model", "chats.jsonl"),
        ("train", "model", "chats.jsonl", "--out", "run"),
        ("train", "model", "chats.jsonl", "--out", "run", "--set", "devices=2"),
        ("train", "model", "chats.jsonl", "--out", "run", "--set", "export.to=[merged]"),
        ("sweep", "sweep.yaml"),
        ("selftest", "model"),
    ],
    ids=" ".join,
)
def test_commands_that_start_processes(place: Path, words: tuple[str, ...]) -> None:
    run(place, *words, "--offline")


@pytest.mark.slow
@pytest.mark.parametrize(
    "words", [("serve", "model"), ("serve", "--jobs", "--store", "jobs", "--bases", "bases.yaml")], ids=" ".join
)
def test_servers(place: Path, words: tuple[str, ...]) -> None:
    (place / "bases.yaml").write_text(f"bases: {{tiny: {{model: {place / 'model'}}}}}\n")
    process = fresh.Process("-m", "tunesmith", *words, "--port", "0", "--offline", cwd=place)
    until = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < until and not _has_engine(process.pid):
        time.sleep(0.2)
    time.sleep(8)  # it imports torch
    process.send_signal(signal.SIGINT)
    said, errors = process.communicate()
    assert were_run(place) == "", said + errors
    assert "hostile" not in errors
    assert time.monotonic() < until, said + errors


def _has_engine(pid: int) -> bool:
    import psutil

    return any("tunesmith.serve.worker" in " ".join(one.cmdline()) for one in psutil.Process(pid).children())
