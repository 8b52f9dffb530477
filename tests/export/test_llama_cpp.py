"""llama.cpp itself computes what was tuned, where llama-cpp-python is installed; without it nothing asks for it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from export.exports import of_architecture, quick
from tunesmith.errors import ExportError
from tunesmith.export import export_run as export_run_module
from tunesmith.export import llama_cpp, verify
from tunesmith.export.export_run import Exported, export_run
from tunesmith.export.gguf_models import ARCHITECTURES, Architecture
from tunesmith.export.target import ExportOptions

needs_llama_cpp = pytest.mark.skipif(not llama_cpp.is_installed(), reason="llama-cpp-python is not installed")


def exported(arch: str, target: str, folder: Path, quant: str = "f16") -> Exported:
    return export_run(
        of_architecture(arch), target, out=folder / "out", options=ExportOptions(quant=quant), offline=True
    )


@needs_llama_cpp
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_llama_cpp_computes_what_was_tuned(
    arch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # trap: A14
    quick(monkeypatch)
    done = exported(arch, "gguf", tmp_path)
    assert_agrees(done)
    assert any("llama-cpp-python" in note for note in done.notes)
    assert json.loads((done.path / "verify.json").read_text())["llama_cpp"]["same_ids"] is True


def assert_agrees(done: Exported) -> None:
    assert done.in_llama_cpp.same_ids
    assert done.in_llama_cpp.kl < 1e-6, done.in_llama_cpp
    assert done.in_llama_cpp.carried == pytest.approx(1.0, abs=0.02)


@needs_llama_cpp
def test_rows_in_another_order_are_seen_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Our own reader is not asked: what it would have in common with the writer, llama.cpp has not."""
    quick(monkeypatch)
    monkeypatch.setattr(Architecture, "num_interleaved", lambda self, name, config: 0)
    monkeypatch.setattr(export_run_module, "judge", judged_right)
    with pytest.raises(AssertionError):
        assert_agrees(exported("llama", "gguf", tmp_path))


def judged_right(result: Any, seen: verify.TunedOutputs, exported: Any, **words: Any) -> Any:
    return verify.compare(seen.tuned, exported, base=seen.base, labels=None)


def test_without_it_nothing_asks_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quick(monkeypatch)
    monkeypatch.setattr(llama_cpp, "is_installed", lambda: False)
    done = exported("llama", "gguf", tmp_path)
    assert done.in_llama_cpp is None
    assert json.loads((done.path / "verify.json").read_text())["llama_cpp"] is None


def test_what_llama_cpp_says_is_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process that finds something else fails the export, whoever it is."""
    quick(monkeypatch)

    def doubled(source: Any, export: Any, folder: Path, probes: Any, *, work: Path) -> Any:
        seen = verify.Outputs.load(work.parent)
        seen.logits[:] = [torch.from_numpy(rows).mul(2).numpy() for rows in seen.logits]
        return seen

    monkeypatch.setattr(verify, "llama_cpp_outputs", doubled)
    with pytest.raises(ExportError, match="nothing was kept"):
        exported("llama", "gguf", tmp_path)
    assert list(tmp_path.iterdir()) == []
