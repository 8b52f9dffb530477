"""An ONNX model is what was tuned: every head, every architecture, large ones too; what does not go is said before."""

import json
from collections.abc import Callable
from pathlib import Path
from shutil import copytree

import numpy as np
import onnxruntime
import pytest
import torch
from transformers import AutoTokenizer

from export.exports import card_head, finished, of_architecture, of_encoder, quick
from tiny_model import ENCODERS
from tunesmith.data.collate import build_batch
from tunesmith.errors import ExportError, ModelError
from tunesmith.export import onnx, verify
from tunesmith.export.export_run import TARGETS, Exported, export_run
from tunesmith.export.onnx import KNOWN
from tunesmith.export.run_result import open_result
from tunesmith.methods.lora import LoraAttachment
from tunesmith.models import load
from tunesmith.models.forward import sequence_logits
from tunesmith.runs.folder import Run
from tunesmith.types import Batch, Row
from tunesmith.types import Source as Place


def exported(run: Run, tmp_path: Path, *, proof: bool = True) -> Exported:
    return export_run(run, "onnx", out=tmp_path / "out", proof=proof, offline=True)


@pytest.mark.slow  # each takes seconds to trace; BERT and a Llama with a head: below
@pytest.mark.parametrize("arch", KNOWN)
def test_every_architecture_is_what_was_tuned(arch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quick(monkeypatch)
    done = exported(of_encoder(arch) if arch in ENCODERS else of_architecture(arch), tmp_path)
    assert done.loaded_by == f"onnxruntime {onnxruntime.__version__}"
    assert done.found.same_ids
    assert not (done.path / "model.onnx.data").exists()
    assert done.found.kl < 1e-9  # float32 on both sides, added up in another order: 1e-15 to 1e-12 were measured
    assert done.found.carried == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize("name", ["full", "tag-encoder", "text-encoder", "classify-causal"])
@pytest.mark.slow
def test_every_head(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quick(monkeypatch)
    done = exported(finished(name), tmp_path)
    assert done.found.kl < 1e-9


@pytest.mark.slow
def test_the_folder_alone_is_enough_with_external_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The card's own lines, on rows of other lengths than those that were traced, padded on the right."""
    quick(monkeypatch)
    monkeypatch.setattr(onnx, "MAX_FILE_BYTES", 1000)
    done = exported(of_encoder("bert"), tmp_path)
    assert (done.path / "model.onnx.data").stat().st_size > 10 * 1000
    assert (done.path / "model.onnx").stat().st_size < 1_000_000
    assert any("are in model.onnx.data" in note for note in done.notes)
    text = (done.path / "README.md").read_text()
    assert 'padding_side="right"' in text
    assert card_head(done.path)["library_name"] == "onnx"
    assert done.found is not None
    assert done.found.kl < 1e-9
    names = {"model.onnx", "model.onnx.data", "config.json", "tokenizer.json", "tokenizer_config.json", "labels.json"}
    assert names | {"README.md", "verify.json"} == {path.name for path in done.path.iterdir()}
    source = Path(of_encoder("bert").recipe().model) / "tokenizer.json"
    assert (done.path / "tokenizer.json").read_bytes() == source.read_bytes()
    assert_computes_as_tuned(done.path)


def test_the_last_token_is_known_by_the_mask(tmp_path: Path) -> None:  # trap: A10
    assert_padding_changes_nothing(tmp_path / "masked")


@pytest.mark.slow
def test_the_test_sees_a_last_token_known_by_its_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx, "pools_last", lambda model: False)  # the model's own rule: not the padding's id
    with pytest.raises(AssertionError):
        assert_padding_changes_nothing(tmp_path / "by-id")


def assert_padding_changes_nothing(folder: Path) -> None:
    """A row whose last token has the padding's id, alone and beside a longer one."""
    done = exported(finished("classify-causal"), folder, proof=False)
    pad = json.loads((done.path / "config.json").read_text())["pad_token_id"]
    session = onnxruntime.InferenceSession(done.path / "model.onnx")
    short, long = [30, 31, 32, pad], [40, 41, 42, 43, 44, 45]
    alone = session.run(["logits"], {"input_ids": np.array([short]), "attention_mask": np.ones((1, 4), np.int64)})[0]
    both = session.run(
        ["logits"],
        {
            "input_ids": np.array([[*short, pad, pad], long]),
            "attention_mask": np.array([[1, 1, 1, 1, 0, 0], [1] * 6]),
        },
    )[0]
    live, _ = open_result(finished("classify-causal"), offline=True).load(torch.float32)
    with torch.no_grad():
        expected = sequence_logits(live, batch_of(short)).numpy()
    assert np.allclose(alone, expected, atol=1e-5)
    assert np.allclose(both[:1], expected, atol=1e-5)


def batch_of(ids: list[int]) -> Batch:
    trained = np.arange(len(ids)) == len(ids) - 1
    row = Row(np.array(ids, np.int32), trained, Place("x", 1), labels=np.array([0]))
    return build_batch([row], [0], layout="padded", device="cpu")


@pytest.mark.parametrize(
    ("run", "says"),
    [
        ("summarize-encoder_decoder", "a t5 has not been shown to compute the same there"),
        ("qwen3_moe", "a qwen3_moe has not been shown to compute the same there. Those that do: llama, gpt2,"),
    ],
)
def test_what_does_not_go_is_said_before_weights_are_loaded(
    run: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = finished(run) if "-" in run else of_architecture(run)
    monkeypatch.setattr(load, "load_model", lambda *args, **words: pytest.fail("weights were loaded"))
    with pytest.raises(ModelError) as error:
        exported(made, tmp_path)
    assert says in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_without_the_extra_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx, "NEEDED", ("onnxscript", "no_such_package"))
    with pytest.raises(ModelError, match=r"no_such_package is not installed\. `.* -m pip install 'onnx"):
        exported(of_encoder("bert"), tmp_path)


@pytest.mark.slow  # the rule is that of every target: test_quants.py
def test_a_lost_adapter_fails_names_the_weight_and_leaves_nothing(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:  # trap: A1
    proven = tmp_path_factory.mktemp("proven")

    def prove(job: Path, tick: Callable[[int, int], None], **how: float) -> None:
        copytree(json.loads(job.read_text())["exported"], proven, dirs_exist_ok=True)
        verify.do_job(job, TARGETS)

    monkeypatch.setattr(verify, "launch", prove)
    monkeypatch.setattr(LoraAttachment, "merge", LoraAttachment.unload)
    with pytest.raises(ExportError, match=r"it keeps 0\.0 % of the change from the base"):
        exported(of_encoder("bert"), tmp_path)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(AssertionError, match="allclose"):  # and without the proof the bug would have gone out
        assert_computes_as_tuned(proven)


def assert_computes_as_tuned(folder: Path) -> None:
    tokens = AutoTokenizer.from_pretrained(folder)(["Ada eats the plum", "red"], return_tensors="np", padding=True)
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    inputs = {one.name: tokens[one.name].astype("int64") for one in session.get_inputs()}
    assert set(inputs) == {"input_ids", "attention_mask", "token_type_ids"}
    live, _ = open_result(of_encoder("bert"), offline=True).load(torch.float32)
    with torch.no_grad():
        expected = live(**{name: torch.from_numpy(array) for name, array in inputs.items()}).logits.numpy()
    assert np.allclose(session.run(["logits"], inputs)[0], expected, atol=1e-5)  # float32: order of additions
