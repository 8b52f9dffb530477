"""Whatever happens while an export is written, there is all of it or nothing, and what stood there before is kept."""

import errno
from functools import lru_cache
from pathlib import Path
from tempfile import mkdtemp

import pytest

from export.exports import of_architecture
from faults import Faults, in_child, limited_files, tree
from often import often
from tunesmith.errors import InputError, StorageError
from tunesmith.export import llama_cpp
from tunesmith.export.export_run import TARGETS, export_run
from tunesmith.export.target import ExportOptions

needs_llama_cpp = pytest.mark.skipif(not llama_cpp.is_installed(), reason="llama-cpp-python is not installed")
QUANTS = {"gguf": "q8_0", "gguf q4_k_m": "q4_k_m"}
WRITTEN = [
    "merged",
    "adapter",
    "gguf",
    "ollama",
    pytest.param("gguf q4_k_m", marks=needs_llama_cpp),
    pytest.param("onnx", marks=pytest.mark.slow),  # seconds to trace, each time
]
SHARES = (0.05, 0.5, 0.95)


def exported(what: str, out: Path) -> None:
    options = ExportOptions(quant=QUANTS.get(what, "f16"))
    export_run(of_architecture("llama"), what.split(maxsplit=1)[0], out=out, options=options, proof=False, offline=True)


@lru_cache
def undisturbed(what: str) -> tuple[dict[str, bytes], int]:
    """The files of an export and how many calls made them."""
    of_architecture("llama")  # made before anything is counted
    out = Path(mkdtemp(prefix="faults-")) / "out"
    with Faults(paths=True) as counted:
        exported(what, out)
    return tree(out), counted.num_calls


def test_every_target_is_here() -> None:
    names = {getattr(one, "values", (one,))[0].split()[0] for one in WRITTEN}
    assert names == set(TARGETS)


@pytest.mark.parametrize("share", often(SHARES, 0.5))
@pytest.mark.parametrize("what", WRITTEN)
def test_killed_it_is_absent_or_complete(what: str, share: float, tmp_path: Path) -> None:
    whole, num_calls = undisturbed(what)

    def act() -> None:
        with Faults(max(1, int(share * num_calls)), None, paths=True):
            exported(what, tmp_path / "out")

    assert in_child(act) == -9
    assert_absent_or(whole, tmp_path)
    exported(what, tmp_path / "out")  # again: what was left behind is in nobody's way
    assert_complete(whole, tmp_path)


@pytest.mark.parametrize("what", WRITTEN)
def test_a_full_disk_leaves_nothing_and_is_named(what: str, tmp_path: Path) -> None:
    assert_fails_well_now_and_then(what, errno.ENOSPC, tmp_path)


def test_a_forbidden_disk_leaves_nothing_and_is_named(tmp_path: Path) -> None:
    assert_fails_well_now_and_then("merged", errno.EACCES, tmp_path)


def assert_fails_well_now_and_then(what: str, code: int, folder: Path) -> None:
    _, num_calls = undisturbed(what)
    raised = [fails_well(what, max(1, int(share * num_calls)), code, folder / str(share)) for share in SHARES]
    assert raised[1]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("what", [one for one in WRITTEN if one in ("adapter", "gguf", "ollama")])
def test_a_disk_that_is_full_at_any_call(what: str, tmp_path: Path) -> None:
    _, num_calls = undisturbed(what)
    raised = [fails_well(what, at, errno.ENOSPC, tmp_path / str(at)) for at in range(1, num_calls + 1)]
    assert sum(raised) > num_calls // 2


def fails_well(what: str, at: int, code: int, folder: Path) -> bool:
    """Whether it failed; if not, then what was refused was not needed, as is the last of the clearing up."""
    folder.mkdir()
    said = ""
    with Faults(at, code, paths=True):
        try:
            exported(what, folder / "out")
        except StorageError as error:
            said = str(error)
    if said:
        assert "cannot be written" in said
        assert errno.errorcode[code] in said
        assert_absent_or(undisturbed(what)[0], folder)
    else:
        assert_complete(undisturbed(what)[0], folder)
    left = [path.name for path in folder.iterdir() if path.name != "out"]
    assert left == [] or (len(left) == 1 and left[0].startswith(".tmp-out-")), left
    return bool(said)


def assert_absent_or(whole: dict[str, bytes], folder: Path) -> None:
    if (folder / "out").exists():
        assert_complete(whole, folder)


def assert_complete(whole: dict[str, bytes], folder: Path) -> None:
    found = tree(folder / "out")
    assert found.keys() == whole.keys()
    # A graph that is traced anew may number its values in another way; every other file is the same to the byte.
    assert all(found[name] == whole[name] for name in whole if not name.startswith("model.onnx"))


@pytest.mark.parametrize("target", TARGETS)
def test_what_is_no_export_is_not_overwritten(target: str, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "diary.txt").write_text("dear")
    with pytest.raises(InputError, match="is not an earlier export"):
        exported(target, tmp_path / "out")
    assert tree(tmp_path / "out") == {"diary.txt": b"dear"}


@pytest.mark.parametrize(("what", "limit"), [("gguf", 60_000), ("ollama", 60_000)])
def test_a_disk_that_fills_under_the_numbers_is_named(what: str, limit: int, tmp_path: Path) -> None:
    """Numbers go to disk by numpy, which tells how many arrived, and not why."""
    with limited_files(limit), pytest.raises(StorageError, match=r"cannot be written: (EIO|ENOSPC|EFBIG)"):
        exported(what, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
