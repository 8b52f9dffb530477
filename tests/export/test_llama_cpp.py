"""llama.cpp itself computes what was tuned and makes the same tokens, where llama-cpp-python is installed."""

from pathlib import Path
from typing import Any

import pytest
import torch

from export.exports import of_architecture
from often import often
from tunesmith.export.export_run import export_run
from tunesmith.export.gguf_models import ARCHITECTURES, Architecture
from tunesmith.export.gguf_tokenizer import PROBE
from tunesmith.export.target import ExportOptions
from tunesmith.inference.load import load_run
from tunesmith.runs.folder import Run
from tunesmith.types import Part

llama_cpp: Any = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")


def assert_computes_what_was_tuned(run: Run, folder: Path) -> None:
    options = ExportOptions(quant="f16")
    done = export_run(run, "gguf", out=folder / "out", options=options, proof=False, offline=True)
    tuned = load_run(run, offline=True)
    llama = llama_cpp.Llama(str(next(done.path.glob("*.gguf"))), n_ctx=256, logits_all=True, verbose=False)
    ids = tuned.renderer.prompt_ids((Part("user", "what is the tallest mountain", trained=False),))
    llama.eval(ids)
    with torch.no_grad():
        ours_TV = tuned.model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    theirs_TV = torch.from_numpy(llama.scores[: len(ids)]).double().log_softmax(-1)
    assert float((ours_TV.exp() * (ours_TV - theirs_TV)).sum(-1).mean()) < 1e-6  # F16
    plain = tuned.renderer.tokenizer.backend_tokenizer.encode(PROBE, add_special_tokens=False).ids
    assert llama.tokenize(PROBE.encode(), add_bos=False, special=False) == plain


@pytest.mark.parametrize("arch", often(ARCHITECTURES, "llama", "gpt2"))
def test_llama_cpp_computes_what_was_tuned(arch: str, tmp_path: Path) -> None:  # trap: A14
    assert_computes_what_was_tuned(of_architecture(arch), tmp_path)


def test_rows_in_another_order_are_seen_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What our own reader would have in common with the writer, llama.cpp has not."""
    monkeypatch.setattr(Architecture, "num_interleaved", lambda self, name, config: 0)
    with pytest.raises(AssertionError):
        assert_computes_what_was_tuned(of_architecture("llama"), tmp_path)
