"""A tokenizer.json that multiplies a text is refused before it is loaded."""

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from tiny_run import model_folder
from tunesmith.errors import ModelError
from tunesmith.models.growth import check_growth
from tunesmith.models.load import load_tokenizer
from tunesmith.models.resolve_model import resolve_model


def replaced(pattern: str, content: str, *, kind: str = "String") -> dict[str, Any]:
    return {"type": "Replace", "pattern": {kind: pattern}, "content": content}


def precompiled(*texts: str) -> dict[str, Any]:
    trie = b"\0" * 8
    raw = len(trie).to_bytes(4, "little") + trie + b"".join(text.encode() + b"\0" for text in texts)
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(raw).decode()}


HOSTILE = {
    "twelve times ten": [replaced(".", "." * 10)] * 12,
    "by an expression": [replaced("[.]", "." * 10, kind="Regex")] * 12,
    "next to each character": [replaced("(?=.)", ".", kind="Regex")] * 12,
    "by a map": [precompiled("a", "." * 300)],
    "by bytes": [{"type": "ByteLevel"}] * 12,
    "in a sequence": [{"type": "Sequence", "normalizers": [replaced(".", "." * 10)] * 6}] * 2,
}
USUAL = {
    "albert": [replaced("``", '"'), replaced("''", '"'), {"type": "NFKD"}, precompiled("صلى الله عليه وسلم"),
               replaced(" {2,}", " ", kind="Regex")],
    "gemma": [replaced(" ", "▁")],
    "t5": [precompiled("صلى الله عليه وسلم"), {"type": "Strip"}, replaced(" {2,}", "▁", kind="Regex")],
}  # fmt: skip


def written(folder: Path, part: str, steps: list[dict[str, Any]]) -> Path:
    file = model_folder(folder / "model") / "tokenizer.json"
    whole = json.loads(file.read_text("utf-8"))
    whole[part] = {"type": "Sequence", f"{part}s": steps}
    file.write_text(json.dumps(whole), "utf-8")
    return file


# trap: S28
@pytest.mark.parametrize("part", ["normalizer", "decoder"])
@pytest.mark.parametrize("attack", HOSTILE)
def test_a_tokenizer_that_multiplies_is_refused(tmp_path: Path, attack: str, part: str) -> None:
    if part == "decoder" and attack == "in a sequence":
        return
    file = written(tmp_path, part, HOSTILE[attack])
    with pytest.raises(ModelError, match=f"its {part} makes more than 256 characters of one"):
        load_tokenizer(resolve_model(str(file.parent)), None)


@pytest.mark.parametrize("usual", USUAL)
def test_usual_files_are_taken(tmp_path: Path, usual: str) -> None:
    check_growth(written(tmp_path, "normalizer", USUAL[usual]))


def test_a_file_that_cannot_be_read_is_left_to_its_reader(tmp_path: Path) -> None:
    check_growth(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer.json").write_text("{")
    check_growth(tmp_path / "tokenizer.json")


def test_a_check_that_counts_no_growth_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted bug."""
    monkeypatch.setattr("tunesmith.models.growth._factor", lambda step: 1)
    with pytest.raises(pytest.fail.Exception), pytest.raises(ModelError):
        check_growth(written(tmp_path, "normalizer", HOSTILE["twelve times ten"]))
