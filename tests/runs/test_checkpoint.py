"""A checkpoint comes back bit for bit or is known to be damaged; rotation never takes the best or the newest."""

import json
import os
import random
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.errors import CheckpointError
from tunesmith.runs import atomic as files
from tunesmith.runs import checkpoint

DTYPES = list(checkpoint._DTYPES)


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    """Every type and awkward form: scalars, empty, transposed, strided, NaN, a name with a dot and an accent."""
    draw = torch.Generator().manual_seed(seed)
    bits = torch.randint(0, 256, (64,), generator=draw, dtype=torch.uint8)
    found = {str(dtype): bits.clone().view(dtype).reshape(2, -1) for dtype in DTYPES if dtype is not torch.bool}
    matrix = torch.randn(5, 7, generator=draw)
    return {
        **found,
        "bool": bits > 127,
        "scalar": matrix[0, 0].clone(),
        "empty": torch.empty(0, 3),
        "layers.0.é": matrix.t(),
        "strided": matrix[:, ::2],
        "bfloat16": matrix.bfloat16(),
        "special": torch.tensor([float("nan"), float("inf"), -0.0, 5e-324], dtype=torch.float64),
        "leaf": torch.nn.Parameter(matrix.clone()),
    }


def same_bits(ours, theirs) -> bool:
    if ours.keys() != theirs.keys():
        return False
    return all(
        a.dtype == b.dtype and a.shape == b.shape and raw(a) == raw(b)
        for a, b in ((ours[name], theirs[name]) for name in ours)
    )


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def saved(folder: Path, step: int, seed: int | None = None) -> Path:
    content = tensors(step if seed is None else seed)
    half = len(content) // 2
    weights, optimizer = dict(list(content.items())[:half]), dict(list(content.items())[half:])
    return checkpoint.save(folder, step, weights=weights, optimizer=optimizer, state={"step": step, "loss": 0.1 * step})


def never(path: Path, reason: str) -> None:
    raise AssertionError(f"{path} is called damaged: {reason}")


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "checkpoints"


def test_round_trip_is_bitwise(folder):
    path = saved(folder, 7)
    loaded = checkpoint.load(path)
    assert (loaded.path, loaded.step, loaded.state) == (folder / "step-7", 7, {"step": 7, "loss": 0.1 * 7})
    assert same_bits({**loaded.weights, **loaded.optimizer}, tensors(7))
    assert same_bits(safetensors.torch.load_file(path / "weights.safetensors"), loaded.weights)
    assert sorted(os.listdir(path)) == ["manifest.json", "optimizer.safetensors", "state.json", "weights.safetensors"]


def check_tied_tensors_all_come_back(save, folder: Path) -> None:
    table = torch.randn(4, 3)
    tied = {"embed": table, "head": table, "transposed": table.t(), "row": table[1]}
    save(folder, 0, weights=tied, optimizer={}, state={})
    assert same_bits(checkpoint.load(folder / "step-0").weights, tied)


def save_without_duplicates(folder, step, *, weights, optimizer, state):
    """Planted bug: of tensors that share memory one is kept, as torch's savers do for speed."""
    by_memory = {tensor.untyped_storage().data_ptr(): (name, tensor) for name, tensor in weights.items()}
    return checkpoint.save(folder, step, weights=dict(by_memory.values()), optimizer=optimizer, state=state)


def test_tied_tensors_all_come_back(folder):  # trap: R7
    check_tied_tensors_all_come_back(checkpoint.save, folder)


def test_the_check_catches_a_lost_tied_tensor(folder):  # trap: R7 planted
    with pytest.raises(AssertionError):
        check_tied_tensors_all_come_back(save_without_duplicates, folder)


def test_loaded_tensors_outlive_their_file(folder):
    loaded = checkpoint.load(saved(folder, 1))
    shutil.rmtree(folder)
    loaded.weights["scalar" if "scalar" in loaded.weights else "torch.float32"].add_(1)
    assert same_bits(loaded.optimizer, dict(list(tensors(1).items())[len(tensors()) // 2 :]))


def test_same_step_again_replaces(folder):
    saved(folder, 3, seed=1)
    saved(folder, 3, seed=2)
    assert same_bits(checkpoint.load(folder / "step-3").weights, dict(list(tensors(2).items())[: len(tensors()) // 2]))
    assert os.listdir(folder) == ["step-3"]


def test_newest_is_numeric(folder):
    for step in (9, 10, 200_000, 1_000_000, 99_999):
        saved(folder, step)
    assert checkpoint.steps(folder) == [9, 10, 99_999, 200_000, 1_000_000]
    assert checkpoint.newest(folder, never).step == 1_000_000


def test_no_checkpoint_is_none(folder):
    folder.mkdir()
    (folder / "step-x").mkdir()
    (folder / "notes.txt").write_text("x")
    assert checkpoint.newest(folder, never) is None
    assert checkpoint.steps(folder) == []


def edit(path: Path, change) -> None:
    content = bytearray(path.read_bytes())
    path.write_bytes(change(content))


def flipped(content: bytearray, at: float) -> bytes:
    content[int(len(content) * at)] ^= 1
    return bytes(content)


WEIGHTS, OPTIMIZER, STATE, MANIFEST = (*checkpoint._FILES, "manifest.json")
DAMAGES = {
    "weights truncated": (WEIGHTS, lambda path: edit(path, lambda c: c[:-1])),
    "weights empty": (WEIGHTS, lambda path: edit(path, lambda c: b"")),
    "weights longer": (WEIGHTS, lambda path: edit(path, lambda c: c + b"\0")),
    "weights bit flip in data": (WEIGHTS, lambda path: edit(path, lambda c: flipped(c, 0.99))),
    "weights bit flip in header": (WEIGHTS, lambda path: edit(path, lambda c: flipped(c, 0.1))),
    "weights zeroed tail": (WEIGHTS, lambda path: edit(path, lambda c: c[:-64] + bytes(64))),
    "weights missing": (WEIGHTS, Path.unlink),
    "optimizer truncated": (OPTIMIZER, lambda path: edit(path, lambda c: c[: len(c) // 2])),
    "optimizer bit flip": (OPTIMIZER, lambda path: edit(path, lambda c: flipped(c, 0.9))),
    "optimizer missing": (OPTIMIZER, Path.unlink),
    "state bit flip": (STATE, lambda path: edit(path, lambda c: flipped(c, 0.5))),
    "state empty": (STATE, lambda path: edit(path, lambda c: b"")),
    "state missing": (STATE, Path.unlink),
    "manifest empty": (MANIFEST, lambda path: edit(path, lambda c: b"")),
    "manifest truncated": (MANIFEST, lambda path: edit(path, lambda c: c[: len(c) // 2])),
    "manifest missing": (MANIFEST, Path.unlink),
    "manifest without files": (MANIFEST, lambda path: path.write_text('{"format": 1, "step": 20, "files": {}}')),
    "manifest of zeros": (MANIFEST, lambda path: edit(path, lambda c: bytes(len(c)))),
    "another step's folder": (
        MANIFEST,
        lambda path: shutil.copytree(path.parents[1] / "step-10", path.parent, dirs_exist_ok=True),
    ),
}


def check_damage_is_found_and_the_one_before_used(newest, folder: Path, damage: str) -> None:
    saved(folder, 10)
    path = saved(folder, 20)
    name, harm = DAMAGES[damage]
    harm(path / name)
    found: list[tuple[Path, str]] = []
    loaded = newest(folder, lambda path, reason: found.append((path, reason)))
    assert [path for path, _ in found] == [folder / "damaged-step-20"]
    assert found[0][1]
    assert loaded.step == 10
    assert same_bits({**loaded.weights, **loaded.optimizer}, tensors(10))
    assert sorted(os.listdir(folder)) == ["damaged-step-20", "step-10"]
    assert checkpoint.steps(folder) == [10]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found_and_the_one_before_used(folder, damage):
    check_damage_is_found_and_the_one_before_used(checkpoint.newest, folder, damage)


def test_every_bit_of_the_manifest_matters(folder):
    path = saved(folder, 20) / MANIFEST
    content = path.read_bytes()
    for at in range(0, len(content), 3):
        path.write_bytes(flipped(bytearray(content), at / len(content)))
        if json_or_none(path) == json.loads(content):
            continue  # white space
        with pytest.raises(CheckpointError, match="damaged"):
            checkpoint.load(path.parent)


def json_or_none(path: Path):
    try:
        return json.loads(path.read_bytes())
    except ValueError:
        return None


def test_damage_is_named(folder):
    path = saved(folder, 20)
    edit(path / WEIGHTS, lambda c: c[:-1])
    size = (path / WEIGHTS).stat().st_size
    with pytest.raises(
        CheckpointError, match=rf"step-20: damaged: weights\.safetensors has {size:,} bytes, not {size + 1:,}\."
    ):
        checkpoint.load(path)
    saved(folder, 20)
    edit(path / STATE, lambda c: flipped(c, 0.5))
    with pytest.raises(
        CheckpointError, match=r"state\.json is not what was written: its SHA-256 is \w{12}…, not \w{12}…"
    ):
        checkpoint.load(path)


def test_none_to_trust_is_an_error_and_never_a_start_from_nothing(folder):
    for step in (10, 20):
        (saved(folder, step) / WEIGHTS).unlink()
    found: list[Path] = []
    for _ in range(2):  # the second time all are set aside already
        with pytest.raises(CheckpointError, match=r"no checkpoint can be trusted \(.*damaged-step-\d0"):
            checkpoint.newest(folder, lambda path, reason: found.append(path))
    assert [path.name for path in found] == ["damaged-step-20", "damaged-step-10"]
    assert sorted(os.listdir(folder)) == ["damaged-step-10", "damaged-step-20"]


def test_newer_format_is_refused_and_left_alone(folder, monkeypatch):
    saved(folder, 10)
    with monkeypatch.context() as newer:
        newer.setattr(checkpoint, "CHECKPOINT_FORMAT", 2)
        saved(folder, 20)
    with pytest.raises(CheckpointError, match="step-20: format 2, this version of tunesmith knows up to 1"):
        checkpoint.newest(folder, never)
    assert sorted(os.listdir(folder)) == ["step-10", "step-20"]
    checkpoint.rotate(folder, keep=1, best=None)
    assert sorted(os.listdir(folder)) == ["step-10", "step-20"]


def test_leftovers_are_removed(folder):
    saved(folder, 10)
    (folder / ".tmp-step-20-12345678").mkdir()
    (folder / ".tmp-step-20-12345678" / WEIGHTS).write_bytes(b"half")
    assert checkpoint.newest(folder, never).step == 10
    assert os.listdir(folder) == ["step-10"]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_safetensors_reads_what_we_write(tmp_path_factory, seed):
    """The format is the library's, whatever names and shapes come."""
    draw = random.Random(seed)
    shapes = [[draw.randint(0, 4) for _ in range(draw.randint(0, 3))] for _ in range(draw.randint(0, 6))]
    content = {
        f"{draw.choice('aé/.')}{number}": torch.randn(shape).to(
            draw.choice([torch.float32, torch.bfloat16, torch.int8])
        )
        for number, shape in enumerate(shapes)
    }
    path = tmp_path_factory.mktemp("tensors") / "x.safetensors"
    facts = checkpoint._write_tensors(path, content)
    assert same_bits(safetensors.torch.load_file(path), content)
    assert facts == {"bytes": path.stat().st_size, "sha256": files.sha256_file(path)}
