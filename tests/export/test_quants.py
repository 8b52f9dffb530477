"""Every kind of number of a GGUF: made, read back, held to its bound; where the llama_cpp fails, nothing is left."""

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fresh
from export.exports import of_architecture, quick
from faults import limited_files
from often import often
from tunesmith.environment.packages import install_command
from tunesmith.errors import ExportError, ModelError, StorageError
from tunesmith.export import gguf as gguf_module
from tunesmith.export import llama_cpp, verify
from tunesmith.export.export_run import Exported, export_run
from tunesmith.export.gguf import QUANT_TYPES, ggml_type
from tunesmith.export.target import ExportOptions
from tunesmith.models.gguf import read_gguf
from tunesmith.runs.folder import Run

needs_llama_cpp = pytest.mark.skipif(not llama_cpp.is_installed(), reason="llama-cpp-python is not installed")
OURS = [name for name, kind in QUANT_TYPES.items() if not kind.by_llama_cpp]
THEIRS = [name for name, kind in QUANT_TYPES.items() if kind.by_llama_cpp]
MOST_KL = {"f32": 1e-12, "f16": 1e-7, "bf16": 1e-5, "q8_0": 1e-4, "q6_k": 1e-3, "q5_k_m": 4e-3, "q5_k_s": 4e-3,
           "q5_1": 4e-3, "q5_0": 4e-3, "q4_k_m": 2e-2, "q4_k_s": 2e-2, "q4_1": 2e-2, "q4_0": 2e-2}  # fmt: skip
"""About six times what was measured on the model of blocks."""


def written(run: Run, folder: Path, quant: str, *, target: str = "gguf", proof: bool = True) -> Exported:
    return export_run(run, target, out=folder / "out", options=ExportOptions(quant=quant), proof=proof, offline=True)


def kinds_of(done: Exported) -> dict[str, str]:
    return {name: info.dtype for name, info in read_gguf(next(done.path.glob("*.gguf"))).tensors.items()}


OFTEN = ("f16", "q8_0", "q5_1")
"""Numbers, whole blocks, and blocks with an offset; the others are in the slow set."""


@pytest.mark.parametrize(
    "quant", [pytest.param(name, marks=[] if name in OFTEN else pytest.mark.slow) for name in OURS]
)
def test_every_kind_of_ours_is_read_back(quant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quick(monkeypatch)
    done = written(of_architecture("llama", hidden=256), tmp_path, quant)
    assert_is(done, quant, of_layers=quant.upper(), of_output="Q8_0" if quant[1] in "45" else quant.upper())


@needs_llama_cpp
@pytest.mark.parametrize("quant", often(THEIRS, "q4_k_m"))
def test_every_kind_of_llama_cpp_is_read_back(quant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quick(monkeypatch)
    done = written(of_architecture("llama", hidden=256), tmp_path, quant)
    assert_is(done, quant, of_layers=quant[:4].upper(), of_output="Q6_K")
    assert {path.name for path in done.path.iterdir()} == {f"llama-{quant}.gguf", "README.md", "verify.json"}


def assert_is(done: Exported, quant: str, *, of_layers: str, of_output: str) -> None:
    kinds = kinds_of(done)
    assert (kinds["blk.1.attn_q.weight"], kinds["output.weight"]) == (of_layers, of_output)
    assert kinds["output_norm.weight"] == "F32"  # vectors always are
    facts = read_gguf(next(done.path.glob("*.gguf"))).metadata
    assert facts["general.file_type"] == int(QUANT_TYPES[quant].file)
    assert done.found.kl < MOST_KL[quant]


def test_matrices_that_make_no_blocks_of_32_are_told(tmp_path: Path) -> None:
    done = written(of_architecture("llama", hidden=48), tmp_path, "q8_0", proof=False)
    assert any("matrices cannot be cut into blocks of 32 and are F16" in note for note in done.notes)


def test_without_llama_cpp_its_kinds_are_refused_before_weights_are_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llama_cpp, "is_installed", lambda: False)
    monkeypatch.setattr(verify, "tuned_outputs", lambda *given: pytest.fail("weights were loaded"))
    for target in ("gguf", "ollama"):
        with pytest.raises(ModelError) as error:
            written(of_architecture("llama"), tmp_path, "q4_k_m", target=target)
        assert str(error.value) == (
            "--quant: q4_k_m: needs llama.cpp's quantizer, and llama-cpp-python is not installed. Install it by "
            f"`{install_command('llama-cpp')}`, or use one of "
            "f32, f16, bf16, q8_0, q5_1, q5_0, q4_1, q4_0."
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("quant", ["q4_0", pytest.param("q4_k_m", marks=needs_llama_cpp)])
def test_a_quant_past_its_bound_fails_names_a_finer_one_and_leaves_nothing(
    quant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick(monkeypatch)
    kind = QUANT_TYPES[quant]
    narrow = dataclasses.replace(kind, tolerances=dataclasses.replace(kind.tolerances, kl=1e-9))
    monkeypatch.setitem(QUANT_TYPES, quant, narrow)
    with pytest.raises(ExportError, match=r"nothing was kept: its KL divergence .* --quant q8_0` has less of it\."):
        written(of_architecture("llama", hidden=256), tmp_path, quant)
    assert list(tmp_path.iterdir()) == []


def test_other_weights_are_past_the_bound_of_every_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The widest tolerances of all still tell a lost adapter from rounding."""
    quick(monkeypatch)
    widest = max((kind.tolerances for kind in QUANT_TYPES.values()), key=lambda tolerances: tolerances.kl)
    monkeypatch.setitem(QUANT_TYPES, "f16", dataclasses.replace(QUANT_TYPES["f16"], tolerances=widest))
    monkeypatch.setattr(gguf_module, "tuned_tensors", untuned)
    with pytest.raises(ExportError, match=r"it keeps -?\d+\.\d % of the change from the base"):
        written(of_architecture("llama", hidden=256), tmp_path, "f16")


def untuned(model: Any, attachment: Any) -> Iterator[tuple[str, Any]]:
    attachment.unload()
    yield from model.state_dict().items()


def test_every_phase_says_how_far_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", str(fresh.python()))
    monkeypatch.setattr(llama_cpp, "TICK_S", 0.02)
    heard: dict[str, list[tuple[int, int]]] = {}
    export_run(
        of_architecture("llama"), "gguf", out=tmp_path / "out", offline=True,
        on_progress=lambda what, done, total: heard.setdefault(what, []).append((done, total)),
    )  # fmt: skip
    assert list(heard) == ["tuned", "base", "write", "verify"]
    tensors = len(read_gguf(next((tmp_path / "out").glob("*.gguf"))).tensors)
    assert heard["write"][1:] == [(i, tensors) for i in range(1, tensors + 1)]
    assert heard["base"] == [(i, 6) for i in range(1, 7)] == heard["tuned"][1:]
    assert len(heard["verify"]) > 5, "the other process takes seconds"


@needs_llama_cpp
def test_what_the_quantiser_says_is_told_and_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_module, "_write_file", lambda path, *rest: path.write_bytes(b"no GGUF") and 0)
    with pytest.raises(ExportError, match=r"llama\.cpp's quantizer failed: .*magic"):
        written(of_architecture("llama", hidden=256), tmp_path, "q4_k_m", proof=False)
    assert list(tmp_path.iterdir()) == []


@needs_llama_cpp
def test_a_disk_that_fills_under_the_quantiser_is_told_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own words are of streams; here the size of files is limited, and the disk says that it is full."""
    real = llama_cpp.run_module

    def in_little_room(module: str, *words: str, **how: Any) -> None:
        with limited_files(200_000):
            real(module, *words, **how)

    monkeypatch.setattr(llama_cpp, "run_module", in_little_room)
    with pytest.raises(ExportError, match=r"llama\.cpp's quantizer failed"):
        written(of_architecture("llama", hidden=256), tmp_path, "q4_k_m", proof=False)
    full = np.rec.array([(0, 0, 10)], names="a,b,free")[0]
    monkeypatch.setattr(llama_cpp.shutil, "disk_usage", lambda path: full)
    with pytest.raises(StorageError, match=r"cannot be written: ENOSPC: .* Free some space"):
        written(of_architecture("llama", hidden=256), tmp_path, "q4_k_m", proof=False)
    assert list(tmp_path.iterdir()) == []


def test_an_embedding_that_is_the_output_layer_is_as_fine_as_one() -> None:
    quant = QUANT_TYPES["q4_0"]
    assert ggml_type("token_embd.weight", (512, 64), quant, is_tied=True).name == "Q8_0"
    assert ggml_type("token_embd.weight", (512, 64), quant, is_tied=False).name == "Q4_0"
