"""Checkpoints: everything a run needs to resume bit for bit, complete or absent.

    checkpoints/step-200/
      weights.safetensors     trained tensors, and the state of a method
      optimizer.safetensors   state of the optimizer, one or more tensors a trained tensor
      state.json              position, counters, best so far, digest of the run's log until then
      manifest.json           format, step, size and SHA-256 of each file above; written last

A checkpoint is written under a temporary name, synced, and renamed. Only the holder of the lock writes here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import safetensors
import torch
from torch import Tensor

from tunesmith.errors import CheckpointError
from tunesmith.runs.atomic import (
    clean,
    from_json,
    fsync_dir,
    remove,
    replace_folder,
    sha256_file,
    storing,
    temporary_folder,
    to_json,
    write_atomic,
    writing,
)
from tunesmith.types import JsonObject, Record

CHECKPOINT_FORMAT = 1
"""Version of the folder's layout; a newer one is refused."""

ALONE_BYTES = 2**18
"""Size from which a tensor is hashed by a second thread while it is written: below,
the handover takes longer."""
_PREFIX = "step-"
_FILES = ("weights.safetensors", "optimizer.safetensors", "state.json")
_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint that was read and verified; tensors are on the CPU."""

    path: Path
    step: int
    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: JsonObject


class _Damaged(Exception):
    """A checkpoint that cannot be trusted, with the reason."""


def save(
    folder: Path,
    step: int,
    *,
    weights: Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor],
    state: Record,
) -> Path:
    """Write the checkpoint `folder/step-N`, complete or not at all; it replaces one of the same step.

    Raises StorageError if the disk refuses; earlier checkpoints are then untouched.
    """
    final = folder / f"{_PREFIX}{step}"
    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in (*weights.values(), *optimizer.values()))
    with storing(final, num_bytes=num_bytes):
        temporary = temporary_folder(folder, final.name)
        try:
            written = {
                _FILES[0]: _write_tensors(temporary / _FILES[0], weights),
                _FILES[1]: _write_tensors(temporary / _FILES[1], optimizer),
                _FILES[2]: _write_bytes(temporary / _FILES[2], to_json(state, indent=True)),
            }
            manifest = {"format": CHECKPOINT_FORMAT, "step": step, "files": written}
            write_atomic(temporary / "manifest.json", to_json({**manifest, "sha256": _seal(manifest)}, indent=True))
            replace_folder(temporary, final, swap=True)
        except BaseException:
            with suppress(OSError):
                remove(temporary)
            raise
    return final


def load(path: Path) -> Checkpoint:
    """Read the checkpoint in `path`. Raises CheckpointError for a wrong size, hash or format."""
    try:
        return _load(path)
    except _Damaged as damage:
        raise CheckpointError(f"{path}: damaged: {damage}. Use the checkpoint before it.") from damage


def steps(folder: Path) -> list[int]:
    """List the steps of complete checkpoints in `folder`, in numeric order, by the sizes of their files."""
    complete = []
    for step, path in _folders(folder):
        try:
            _check_sizes(path, _manifest(path))
        except (_Damaged, CheckpointError):
            continue
        complete.append(step)
    return complete


def newest(folder: Path, on_damaged: Callable[[Path, str], None]) -> Checkpoint | None:
    """Return the newest intact checkpoint, or None if there never was one.

    A damaged one is renamed to damaged-step-N, never deleted, and `on_damaged` gets its new path and the
    reason. Raises CheckpointError if all are damaged, or one was written by a newer version.
    """
    clean(folder)
    damaged = []
    for step, path in reversed(_folders(folder)):
        try:
            return _load(path)
        except _Damaged as damage:
            aside = _set_aside(path, step)
            damaged.append(aside.name)
            on_damaged(aside, str(damage))
    damaged += [path.name for path in _matching(folder, "damaged-step-*") if path.name not in damaged]
    if damaged:
        names = ", ".join(damaged)
        raise CheckpointError(
            f"{folder}: no checkpoint can be trusted ({names} set aside). Restore one from a backup or start anew."
        )
    return None


def rotate(folder: Path, *, keep: int, best: int | None) -> list[int]:
    """Delete all checkpoints but the `keep` newest and the one of step `best`; return the deleted steps.

    Call after `save` has returned. Only complete checkpoints count as kept; others are left for `newest`.
    """
    if keep < 1:
        raise ValueError(f"keep is {keep}, and at least the newest checkpoint is kept")
    complete = steps(folder)
    doomed = [step for step in complete[:-keep] if step != best]
    for step in doomed:
        path = folder / f"{_PREFIX}{step}"
        with storing(path):
            remove(path)
    if doomed:
        with storing(folder):
            fsync_dir(folder)
    return doomed


def _load(path: Path) -> Checkpoint:
    manifest = _manifest(path)
    _check_sizes(path, manifest)
    for name, facts in manifest["files"].items():
        try:
            digest = sha256_file(path / name)
        except OSError as error:
            raise _Damaged(f"{name} cannot be read: {error.strerror}") from error
        if digest != facts["sha256"]:
            raise _Damaged(
                f"{name} is not what was written: its SHA-256 is {digest[:12]}…, not {facts['sha256'][:12]}…"
            )
    weights, optimizer = (_read_tensors(path / name) for name in _FILES[:2])
    state = from_json((path / _FILES[2]).read_bytes())
    return Checkpoint(path, manifest["step"], weights, optimizer, state)


def _manifest(path: Path) -> JsonObject:
    """The manifest, sealed by its own hash: a flipped bit in it is damage, not a newer format."""
    try:
        content = from_json((path / "manifest.json").read_bytes())
        seal = content.pop("sha256")
        intact = seal == _seal(content)
    except OSError as error:
        raise _Damaged(f"manifest.json cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise _Damaged("manifest.json is empty or not what was written") from error
    if not intact:
        raise _Damaged("manifest.json is not what was written")
    if content["format"] > CHECKPOINT_FORMAT:
        raise CheckpointError(
            f"{path}: format {content['format']}, this version of tunesmith knows up to {CHECKPOINT_FORMAT}. "
            "Use a newer version."
        )
    if path.name != f"{_PREFIX}{content['step']}":
        raise _Damaged(f"it is the checkpoint of step {content['step']} under another name")
    return dict(content)


def _seal(manifest: Record) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _check_sizes(path: Path, manifest: Record) -> None:
    missing = set(_FILES) - set(manifest["files"])
    if missing:
        raise _Damaged(f"manifest.json does not list {', '.join(sorted(missing))}")
    for name, facts in manifest["files"].items():
        try:
            size = (path / name).stat().st_size
        except OSError as error:
            raise _Damaged(f"{name} is missing") from error
        if size != facts["bytes"]:
            raise _Damaged(f"{name} has {size:,} bytes, not {facts['bytes']:,}")


def _folders(folder: Path) -> list[tuple[int, Path]]:
    """(step, path) of everything named as a checkpoint, in numeric order: step-1000 is after step-200."""
    numbered = ((path.name.removeprefix(_PREFIX), path) for path in _matching(folder, f"{_PREFIX}*"))
    return sorted((int(number), path) for number, path in numbered if number.isascii() and number.isdigit())


def _matching(folder: Path, pattern: str) -> list[Path]:
    return sorted(folder.glob(pattern)) if folder.is_dir() else []


def _set_aside(path: Path, step: int) -> Path:
    name = f"damaged-{_PREFIX}{step}"
    names = (name, *(f"{name}-{number}" for number in range(2, 1000)))
    aside = next(path.with_name(name) for name in names if not path.with_name(name).exists())
    with storing(aside):
        path.rename(aside)
        fsync_dir(aside.parent)
    return aside


def _write_bytes(path: Path, content: bytes) -> JsonObject:
    write_atomic(path, content)
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> JsonObject:
    """Write safetensors one tensor at a time, hashing on the way; returns size and SHA-256.

    The library's own writer takes all bytes at once: for full tuning that would double the memory at every
    save. Format: https://github.com/huggingface/safetensors#format.
    """
    order = _order(tensors)
    header: JsonObject = {}
    end = 0
    for name in order:
        tensor = tensors[name]
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    digest = hashlib.sha256()
    num_bytes = 8 + len(head) + end
    with writing(path, num_bytes=num_bytes) as file, ThreadPoolExecutor(1) as hasher:
        for block in (len(head).to_bytes(8, "little"), head):
            digest.update(block)
            file.write(block)
        for name in order:
            flat = _whole(tensors[name]).detach().cpu().contiguous().reshape(-1)
            content = flat.view(torch.uint8).numpy().data
            if content.nbytes < ALONE_BYTES:
                digest.update(content)
                file.write(content)
                continue
            hashing = hasher.submit(digest.update, content)  # both take as long, neither holds Python's lock
            file.write(content)
            hashing.result()
    return {"bytes": num_bytes, "sha256": digest.hexdigest()}


def gather(tensors: Mapping[str, Tensor]) -> None:
    """Take part, on another rank, in the writing of tensors that are split over a group."""
    for name in _order(tensors):
        _whole(tensors[name])


def _order(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names in the order of the file, which keeps every tensor aligned."""
    return sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))


def _whole(tensor: Tensor) -> Tensor:
    """A tensor with what other ranks have of it."""
    full: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            # A copy of its own: what was mapped from the file would keep a rotated checkpoint's space taken.
            return {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise _Damaged(f"{path.name} cannot be read: {error}") from error
