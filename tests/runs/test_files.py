"""Files are as they were or complete, after every fault there is."""

import errno
import math
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from faults import Faults, in_child, tree
from tunesmith.errors import StorageError
from tunesmith.runs import atomic as files

DISK_ERRNOS = ("ENOSPC", "EDQUOT", "EIO", "EROFS", "EMFILE")


def written_in_place(path: Path, content: bytes) -> None:
    """Planted bug: the file is opened where it stands."""
    with open(path, "wb") as file:
        file.write(content)
        os.fsync(file.fileno())


def check_old_or_new_after_every_fault(write, folder: Path, *, code: int | None) -> None:
    path = folder / "file"
    path.write_bytes(b"old" * 1000)
    with Faults() as counted:
        write(path, b"new" * 2000)
    assert counted.num_calls > 3 or write is written_in_place
    for number in range(1, counted.num_calls + 1):
        path.write_bytes(b"old" * 1000)

        def attempt(number=number) -> None:
            with Faults(number, code):
                write(path, b"new" * 2000)

        if code is None:
            assert in_child(attempt) == -9
        else:
            with pytest.raises((StorageError, OSError)):
                attempt()
            assert [name for name in os.listdir(folder) if name != "file"] == []
        assert path.read_bytes() in (b"old" * 1000, b"new" * 2000)
        files.clean(folder)
        assert os.listdir(folder) == ["file"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, None], ids=["disk full", "disk broken", "killed"])
def test_write_atomic_leaves_old_or_new(tmp_path, code):  # trap: R5
    check_old_or_new_after_every_fault(files.write_atomic, tmp_path, code=code)


@pytest.mark.slow
@pytest.mark.parametrize("code", [errno.ENOSPC, None])
def test_the_sweep_catches_a_write_in_place(tmp_path, code):  # trap: R5 planted
    with pytest.raises(AssertionError):
        check_old_or_new_after_every_fault(written_in_place, tmp_path, code=code)


@pytest.mark.parametrize("name", DISK_ERRNOS)
def test_disk_errors_name_path_cause_and_bytes(tmp_path, name):
    path = tmp_path / "report.json"
    with Faults(2, getattr(errno, name)), pytest.raises(StorageError) as caught:
        files.write_atomic(path, b"x" * 12345)
    assert str(caught.value).startswith(f"{path}: cannot be written (12,345 bytes needed): {name}: ")
    assert str(caught.value).endswith(".")
    assert (caught.value.path, caught.value.errno_name, caught.value.bytes_needed) == (str(path), name, 12345)
    assert caught.value.exit_code == 1
    assert os.listdir(tmp_path) == []


def test_failing_fsync_is_a_failed_write(tmp_path):
    (tmp_path / "file").write_bytes(b"old")
    with Faults() as counted:
        files.write_atomic(tmp_path / "probe", b"x")
    failures = 0
    for number in range(1, counted.num_calls + 1):
        with Faults(number, errno.EIO) as faults, pytest.raises(StorageError):
            files.write_atomic(tmp_path / "file", b"new")
        failures += faults.failed == "fsync"
    assert failures == 2  # of the file, and of its folder


def made_folder(parent: Path, name: str, content: bytes) -> Path:
    temporary = files.temporary_folder(parent, name)
    (temporary / "inner").mkdir()
    (temporary / "a").write_bytes(content)
    (temporary / "inner" / "b").write_bytes(content)
    return temporary


def removed_then_renamed(tmp: Path, final: Path, *, swap: bool) -> None:
    """Planted bug: the old folder goes before the new one stands."""
    files.remove(final)
    os.rename(tmp, final)


def check_folder_is_old_or_new(replace, parent: Path) -> None:
    final = parent / "result"
    files.replace_folder(made_folder(parent, "result", b"old"), final)
    old = tree(final)
    with Faults() as counted:
        replace(made_folder(parent, "result", b"new"), final, swap=True)
    new = tree(final)
    for number in range(1, counted.num_calls + 1):
        files.replace_folder(made_folder(parent, "result", b"old"), final, swap=True)
        temporary = made_folder(parent, "result", b"new")

        def attempt(number=number, temporary=temporary) -> None:
            with Faults(number, None):
                replace(temporary, final, swap=True)

        assert in_child(attempt) in (-9, 0)  # the order of os.walk decides how many calls there are
        files.clean(parent)
        assert final.exists()
        assert tree(final) in (old, new)
        assert os.listdir(parent) == ["result"]


def test_replaced_folder_is_old_or_new_after_a_kill(tmp_path):  # trap: R5
    check_folder_is_old_or_new(files.replace_folder, tmp_path)


@pytest.mark.slow
def test_the_sweep_catches_a_folder_removed_too_early(tmp_path):  # trap: R5 planted
    with pytest.raises(AssertionError):
        check_folder_is_old_or_new(removed_then_renamed, tmp_path)


def test_replace_folder_refuses_what_is_there(tmp_path):
    files.replace_folder(made_folder(tmp_path, "result", b"old"), tmp_path / "result")
    newer = made_folder(tmp_path, "result", b"new")
    with pytest.raises(FileExistsError):
        files.replace_folder(newer, tmp_path / "result")
    assert (tmp_path / "result" / "a").read_bytes() == b"old"


def test_failing_swap_keeps_the_old_folder_at_once(tmp_path, monkeypatch):
    final = tmp_path / "result"
    files.replace_folder(made_folder(tmp_path, "result", b"old"), final)
    newer = made_folder(tmp_path, "result", b"new")
    real = os.rename

    def rename(source, target):
        if Path(target) == final and Path(source) == newer:
            raise OSError(errno.EIO, "broken")
        real(source, target)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(StorageError, match="EIO"):
        files.replace_folder(newer, final, swap=True)
    assert (final / "a").read_bytes() == b"old"


def test_clean_leaves_everything_else(tmp_path):
    (tmp_path / ".tmpfile").write_bytes(b"")
    (tmp_path / "step-1").mkdir()
    files.temporary_folder(tmp_path, "x")
    (tmp_path / ".tmp-report.json-12345678").write_bytes(b"half")
    assert len(files.clean(tmp_path)) == 2
    assert sorted(os.listdir(tmp_path)) == [".tmpfile", "step-1"]


def test_clean_in_a_shared_folder_takes_only_what_is_old_and_named(tmp_path):
    (tmp_path / ".tmp-somebody-else").mkdir()
    files.temporary_folder(tmp_path, "new-run")
    assert files.clean(tmp_path, name="new-run", older_than_s=3600) == []
    assert len(files.clean(tmp_path, name="new-run")) == 1
    assert os.listdir(tmp_path) == [".tmp-somebody-else"]


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


def same(a, b) -> bool:
    """Equal in type and, for floats, in every bit but the payload of NaN."""
    if isinstance(a, float) and isinstance(b, float):
        return (math.isnan(a) and math.isnan(b)) or (a == b and math.copysign(1, a) == math.copysign(1, b))
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return isinstance(b, list) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


@given(JSON_VALUES)
def test_json_round_trip_is_exact(value):
    assert same(files.from_json(files.to_json(value)), value)


@pytest.mark.parametrize("text", ["NaN", "Infinity", "-Infinity", "\\NaN", "\\\\Infinity"])
def test_text_that_looks_like_a_number_stays_text(text):
    assert files.from_json(files.to_json({"answer": text})) == {"answer": text}


def test_json_refuses_what_it_would_change():
    with pytest.raises(TypeError, match="has no JSON form"):
        files.to_json({"path": Path("x")})


def test_json_spells_out_a_file_name_that_is_not_utf8():
    assert files.from_json(files.to_json(os.fsdecode(b"caf\xe9.jsonl"))) == "caf\\udce9.jsonl"
