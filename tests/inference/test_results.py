"""A result is what its run left, or is refused; a foreign run folder neither hangs anything nor writes elsewhere."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tiny_run import tiny_recipe
from tunesmith import api
from tunesmith.errors import ModelError, NonFiniteError, RunError
from tunesmith.export.export_run import export_run
from tunesmith.inference.load import load_any, load_run
from tunesmith.inference.measure import evaluate_file
from tunesmith.methods.adapter_format import check_patterns
from tunesmith.methods.targets import matches
from tunesmith.runs.atomic import temporary_folder
from tunesmith.runs.folder import Run
from tunesmith.training import trainer as training

WEIGHTS = "adapter/adapter_model.safetensors"
HANGING = "(.*)*x"


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("done")
    return training.train(tiny_recipe(folder, train={"max_steps": 2}), root=folder, offline=True)


@pytest.fixture
def run(done: Run, tmp_path: Path) -> Run:
    shutil.copytree(done.path, tmp_path / "run")
    return Run(tmp_path / "run")


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-2] ^= 0x40
    path.write_bytes(content)


def fill_with_nan(run: Run) -> None:
    tensors = {name: torch.full_like(tensor, float("nan")) for name, tensor in load_file(run.path / WEIGHTS).items()}
    save_file(tensors, run.path / WEIGHTS)


def forget_hashes(run: Run) -> None:
    (run.path / "result.json").unlink(missing_ok=True)


def test_a_flipped_bit_of_the_result_is_refused_by_the_name_of_its_file(run: Run) -> None:  # trap: A17
    flip(run.path / WEIGHTS)
    with pytest.raises(RunError, match=r"adapter_model\.safetensors: not as the run left it"):
        load_run(run, offline=True)
    with pytest.raises(RunError, match="not as the run left it"):
        export_run(run, "adapter", proof=False, offline=True)
    with pytest.raises(RunError, match="not as the run left it"):
        api.evaluate(run, str(data_of(run)), offline=True)


def test_without_the_hashes_a_flipped_bit_would_answer(run: Run, done: Run) -> None:
    flip(run.path / WEIGHTS)
    forget_hashes(run)
    with pytest.raises(AssertionError):
        assert weights(run) == weights(done)


def weights(run: Run) -> list[float]:
    attachment = load_run(run, offline=True).attachment
    return [float(tensor.sum()) for tensor in attachment.trained.values()]


def data_of(run: Run) -> Path:
    return Path(run.recipe().data.train[0].path)


def test_a_result_without_hashes_is_loaded_and_a_line_says_so(run: Run, done: Run) -> None:
    forget_hashes(run)
    assert "noted no hashes" in load_run(run, offline=True).note
    assert load_run(done, offline=True).note == ""


def test_weights_that_are_no_numbers_are_refused_by_name(run: Run) -> None:
    fill_with_nan(run)
    forget_hashes(run)
    with pytest.raises(ModelError, match=r"lora_A\.weight holds NaN"):
        load_run(run, offline=True)


def test_an_evaluation_whose_loss_is_no_number_fails(done: Run) -> None:
    speaker = load_any(str(done.path), root=done.path.parent, offline=True)
    with torch.no_grad():
        next(iter(speaker.model.parameters())).fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="loss of its rows is nan"):
        evaluate_file(speaker, str(data_of(done)), samples=0)


@pytest.mark.parametrize("key", ["target_modules", "exclude_modules"])
def test_an_expression_of_a_foreign_adapter_that_never_ends_does_not_hang(run: Run, key: str) -> None:
    edit(run, {key: HANGING})
    with pytest.raises(ModelError, match="could take forever"):
        load_run(run, offline=True)


def edit(run: Run, update: dict[str, object]) -> None:
    path = run.path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **update}))
    forget_hashes(run)


@pytest.mark.parametrize("pattern", ["((a{1000}){1000}){1000}", "a" * 2000, r"(a+)+$", ".*a.*b.*c.*d.*e", "a{99999}"])
def test_an_expression_that_could_take_forever_is_refused(pattern: str) -> None:
    with pytest.raises(ModelError, match="could take forever"):
        matches(pattern, "model")
    with pytest.raises(ModelError, match="could take forever"):
        check_patterns({"rank_pattern": {pattern: 2}})


@pytest.mark.parametrize("name", ["evaluation", "exports", "checkpoints", "rows", "rollouts"])
def test_a_folder_of_a_run_that_is_a_link_is_refused(run: Run, tmp_path: Path, name: str) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.rmtree(run.path / name, ignore_errors=True)
    (run.path / name).symlink_to(elsewhere)
    with pytest.raises(RunError, match=f"{name}: a link to"), run.lock():
        pass
    with pytest.raises(RunError, match=f"{name}: a link to"):
        export_run(run, "adapter", proof=False, offline=True)
    assert not list(elsewhere.iterdir())


def test_leftovers_of_a_killed_writer_are_removed_by_the_next(run: Run) -> None:
    left = [run.path / name / ".tmp-after.jsonl-01234567" for name in ("evaluation", "rows/train")]
    for path in left:
        path.write_text("half")
    with run.lock():
        assert not any(path.exists() for path in left)


def test_the_next_export_removes_a_killed_ones_copy_not_a_live_ones(run: Run) -> None:
    exports = run.path / "exports"
    dead, alive = temporary_folder(exports, "adapter"), temporary_folder(exports, "adapter")
    (dead / "model.safetensors").write_bytes(b"0" * 100)
    os.utime(dead, (0, 0))
    export_run(run, "adapter", proof=False, offline=True)
    assert not dead.exists()
    assert alive.exists()


AT_WORK = """
import sys, time
from pathlib import Path
from tunesmith.runs.atomic import at_work, temporary_folder
folder = temporary_folder(Path(sys.argv[1]), "adapter")
(folder / "model.safetensors").write_bytes(b"0" * 100)
with at_work(folder):
    print(folder, flush=True)
    time.sleep(60)
"""


def test_the_copy_of_a_killed_export_is_removed_not_that_of_one_at_work(run: Run) -> None:
    """Of a large model the copy takes as much of the disk as the model."""
    words = [sys.executable, "-c", AT_WORK, str(run.path / "exports")]
    children = [subprocess.Popen(words, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    try:
        dead, alive = (Path(child.stdout.readline().strip()) for child in children if child.stdout)
        children[0].kill()
        children[0].wait()
        for folder in (dead, alive):
            os.utime(folder, (time.time() - 60,) * 2)
        export_run(run, "adapter", proof=False, offline=True)
        assert not dead.exists()
        assert alive.exists()
    finally:
        for child in children:
            child.kill()
            child.communicate()
