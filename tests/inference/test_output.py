import errno
import json
import signal
from pathlib import Path

import pytest

from faults import Faults, in_child
from tunesmith.errors import InputError, StorageError
from tunesmith.inference.rows import OutputFile

ROOT = Path(__file__).resolve().parents[2]
IDENTITY = {"input a.jsonl": "0" * 64, "model": "m"}


def line(number: int) -> dict[str, object]:
    return {"source": f"a.jsonl:{number}", "text": "wörds " * (number % 7), "value": number}


WHOLE = [line(n) for n in range(1, 41)]


def go_on(path: Path, *, most: int = 1000) -> None:
    """What a call does: the lines that are missing, in chunks of five."""
    output = OutputFile(path, IDENTITY)
    rest = WHOLE[output.num_lines :][:most]
    try:
        for start in range(0, len(rest), 5):
            output.write(rest[start : start + 5])
        if output.num_lines + len(rest) == len(WHOLE):
            output.finish()
    finally:
        output.close()


def part(path: Path) -> Path:
    return path.with_name(f"{path.name}.part")


def size(path: Path) -> int:
    """Bytes that were written so far."""
    return next((one.stat().st_size for one in (path, part(path)) if one.exists()), 0)


def lines_in(path: Path) -> list[dict[str, object]]:
    return [json.loads(text) for text in path.read_text("utf-8").splitlines()]


@pytest.mark.parametrize("cut", [0, 1, 17, 10_000])
def test_a_file_is_gone_on_with_after_its_last_whole_line(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "out.jsonl"
    go_on(path, most=20)
    assert not path.exists()
    begun = part(path).read_bytes()
    part(path).write_bytes(begun[: max(0, len(begun) - cut)])
    go_on(path)
    assert lines_in(path) == WHOLE
    assert list(tmp_path.iterdir()) == [path]


def test_lines_without_an_answer_are_counted_again(tmp_path: Path) -> None:
    output = OutputFile(tmp_path / "out", IDENTITY)
    output.write([line(1), {"source": "a.jsonl:2", "error": "x"}, {"source": "a.jsonl:3", "error": "x", "value": 1}])
    output.close()
    output = OutputFile(tmp_path / "out", IDENTITY)
    assert (output.num_lines, output.num_errors) == (3, 1)


def test_what_was_made_from_something_else_is_refused_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "out"
    go_on(path, most=5)
    before = part(path).read_bytes()
    with pytest.raises(InputError, match=r"input a.jsonl was 000000000000…, is 1; threshold was absent, is 0.5"):
        OutputFile(path, {**IDENTITY, "input a.jsonl": "1", "threshold": "0.5"})
    assert part(path).read_bytes() == before
    OutputFile(path, {"input": "1"}, overwrite=True).close()
    assert not list(tmp_path.iterdir())  # without a line there is nothing to go on with


def test_a_complete_file_is_never_written_over_unasked(tmp_path: Path) -> None:
    path = tmp_path / "out"
    go_on(path)
    with pytest.raises(InputError, match="is there already"):
        OutputFile(path, IDENTITY)
    assert lines_in(path) == WHOLE
    anew = OutputFile(path, IDENTITY, overwrite=True)
    assert anew.num_lines == 0
    anew.close()
    assert lines_in(path) == WHOLE  # until the new one is complete


def test_a_part_that_says_nothing_of_itself_is_kept(tmp_path: Path) -> None:
    (tmp_path / "out.part").write_text("{}\n")
    with pytest.raises(InputError, match="model was absent, is m"):
        OutputFile(tmp_path / "out", IDENTITY)
    assert (tmp_path / "out.part").read_text() == "{}\n"


def test_two_processes_do_not_write_one_file(tmp_path: Path) -> None:
    output = OutputFile(tmp_path / "out", IDENTITY)
    with pytest.raises(InputError, match="another process is writing it"):
        OutputFile(tmp_path / "out", IDENTITY)
    output.close()
    OutputFile(tmp_path / "out", IDENTITY).close()


def test_what_a_kill_left_of_the_progress_file_is_removed_at_once(tmp_path: Path) -> None:
    left = tmp_path / ".tmp-out.progress.json-01234567"
    left.write_text("half")
    go_on(tmp_path / "out")
    assert not left.exists()


def test_a_full_disk_leaves_whole_lines_and_a_way_on(tmp_path: Path) -> None:
    """Every call that touches the disk fails in turn; the next call ends with the same file."""
    at = 0
    while True:
        at += 1
        path = tmp_path / f"out-{at}"
        with Faults(at, errno.ENOSPC) as faults:
            try:
                go_on(path)
            except StorageError:
                pass
            except OSError:
                assert faults.failed == "ftruncate"  # the disk fails twice: nothing can be put right
        if path.exists():
            assert lines_in(path) == WHOLE, "under its own name it is complete"
        elif part(path).exists():
            assert all(json.loads(text) for text in part(path).read_text("utf-8").splitlines())
        if faults.failed is None:
            break
        if not path.exists():
            go_on(path)
        assert lines_in(path) == WHOLE
    assert at > 15


def test_a_kill_at_any_call_leaves_a_file_to_go_on_with(tmp_path: Path) -> None:
    """A killed write has written half; what follows the last line end is dropped by the next call."""

    def killed(path: Path, at: int) -> None:
        with Faults(at, None):
            go_on(path)

    at = 0
    while True:
        at += 1
        path = tmp_path / f"out-{at}"
        ended = in_child(lambda path=path, at=at: killed(path, at))  # type: ignore[misc]
        if ended == 0:
            break
        assert ended == -signal.SIGKILL
        if part(path).exists() and part(path).read_bytes():
            *whole, _ = part(path).read_bytes().split(b"\n")
            assert [json.loads(text) for text in whole] == WHOLE[: len(whole)]
        if not path.exists():
            go_on(path)
        assert lines_in(path) == WHOLE
    assert at > 15
