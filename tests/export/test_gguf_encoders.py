"""An encoder's GGUF gives the vectors, or the classes, of what was tuned: read back, and in llama.cpp itself."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from tokenizers import normalizers

from export.exports import LABELS, LORA, RESOLVED, as_if_tuned, card_head, of_encoder, quick
from tiny_model import tiny_model
from tiny_tasks import piece_tokenizer, rows_of, write
from tunesmith.errors import ExportError, ModelError
from tunesmith.export import gguf_encoders, gguf_file, llama_cpp_read, verify
from tunesmith.export.comparing import COSINE, KL, RELATIVE, compare
from tunesmith.export.exporting import Exported, export_run
from tunesmith.export.gguf_word_pieces import read_word_pieces
from tunesmith.export.options import Options
from tunesmith.export.pre_tokenizers import PROBE
from tunesmith.export.probe import Seen
from tunesmith.models import load
from tunesmith.models.gguf import read_gguf
from tunesmith.recipe.load import validate
from tunesmith.runs.folder import Run

LLAMA_CPP = llama_cpp_read.is_installed()


def exported(run: Run, folder: Path, *, quant: str = "f16", **words: Any) -> Exported:
    return export_run(run, "gguf", out=folder / "out", options=Options(quant=quant), offline=True, **words)


def header(done: Exported) -> Mapping[str, Any]:
    return read_gguf(next(done.path.glob("*.gguf"))).metadata


@pytest.mark.parametrize(("pooling", "number"), [("", 1), ("mean_tokens", 1), ("cls_token", 2)])
def test_vectors_are_those_of_the_tuned_model(
    pooling: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick(monkeypatch)
    done = exported(of_encoder("bert", task="text", pooling=pooling), tmp_path)
    for found in filter(None, (done.found, done.in_llama_cpp)):
        assert found.same_ids
        assert found.measure == COSINE
        # F16, and GELU by tanh: 1e-7 of a cosine and less than 1 % of an effect were measured.
        assert found.kl < 1e-5
        assert found.carried == pytest.approx(1.0, abs=0.01)
        assert found.top1 == 1.0
    assert (done.in_llama_cpp is not None) == LLAMA_CPP
    assert header(done)["bert.pooling_type"] == number
    assert not [name for name in read_gguf(next(done.path.glob("*.gguf"))).tensors if name.startswith("cls")]
    assert any("its head for masked words stays behind" in note for note in done.notes)
    assert card_head(done.path).pipeline_tag == "feature-extraction"
    text = (done.path / "README.md").read_text("utf-8")
    assert "--embeddings" in text
    assert "| 1 − cosine at 6 places, mean (most) |" in text
    assert json.loads((done.path / "verify.json").read_text("utf-8"))["measure"] == COSINE


def test_classes_are_those_of_the_tuned_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quick(monkeypatch)
    done = exported(of_encoder("bert"), tmp_path)
    for found in filter(None, (done.found, done.in_llama_cpp)):
        assert found.same_ids
        assert found.measure == KL
        assert found.kl < 1e-5
        assert found.top1 == 1.0
        assert found.carried == pytest.approx(1.0, abs=0.02)
    assert done.found is not None
    assert done.found.distance < 1e-3  # F16: every weight of the head is there too
    assert (done.in_llama_cpp is not None) == LLAMA_CPP
    labels = gguf.GGUFReader(next(done.path.glob("*.gguf"))).fields["bert.classifier.output_labels"].contents()
    assert labels == ["fruit", "place"]
    assert "llama-embedding -m bert-f16.gguf" in (done.path / "README.md").read_text("utf-8")


@pytest.mark.parametrize("task", ["text", "classify"])
def test_a_weight_that_is_not_there_fails_and_leaves_nothing(
    task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick(monkeypatch)
    unpack = gguf_encoders.unpack_encoder

    def without(path: Path, header: Any, dtype: torch.dtype) -> Any:
        model = unpack(path, header, dtype)
        with torch.no_grad():
            model.bert.encoder.layer[0].attention.self.query.weight.zero_()
        return model

    monkeypatch.setattr("tunesmith.export.gguf_read.unpack_encoder", without)
    with pytest.raises(ExportError, match=r"layer\.0\.attention\.self\.query\.weight differs by .* of its size"):
        exported(of_encoder("bert", task=task), tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not LLAMA_CPP, reason="llama-cpp-python is not installed")
@pytest.mark.parametrize("task", ["text", "classify"])
def test_wrong_names_are_seen_there(task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # trap: A14
    """Our own reader has the names in common with the writer; llama.cpp has not."""
    quick(monkeypatch)
    names = gguf_encoders.tensor_names

    def swapped(*asked: Any) -> dict[str, str]:
        turned = {"attn_v.weight": "attn_output.weight", "attn_output.weight": "attn_v.weight"}
        found = names(*asked)
        return {ours: theirs[:6] + turned.get(theirs[6:], theirs[6:]) for ours, theirs in found.items()}

    monkeypatch.setattr(gguf_encoders, "tensor_names", swapped)
    with pytest.raises(ExportError, match=r"in llama\.cpp .*: not what was tuned"):
        exported(of_encoder("bert", task=task), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_where_llama_cpp_is_not_there_it_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_file, "is_installed", lambda: False)
    done = exported(of_encoder("bert"), tmp_path, proof=False)
    assert any("transformers reads no GGUF of a bert, and llama-cpp-python is not installed" in n for n in done.notes)


def test_vectors_that_turned_are_seen() -> None:
    ours = [torch.randn(1, 8, generator=torch.Generator().manual_seed(i)).numpy() for i in range(4)]
    same = Seen([[1]] * 4, logits=ours, vectors=True)
    found = compare(same, Seen([[1]] * 4, logits=[2 * v for v in ours], vectors=True), base=None, labels=None)
    assert (found.kl, found.top1) == (pytest.approx(0.0, abs=1e-12), 1.0)  # length is no matter of direction
    turned = compare(same, Seen([[1]] * 4, logits=[ours[1], *ours[:3]], vectors=True), base=None, labels=None)
    assert turned.kl > 0.1
    assert turned.problems(verify.Bounds(kl=9, loss=9, carried=9, weights=9, cosine=0.1))


@pytest.mark.parametrize("lowercase", [True, False])
def test_its_tokens_are_read_back(lowercase: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Accents, marks, other scripts and what no piece is known of; llama.cpp splits them so itself."""
    quick(monkeypatch)
    tokenizer = piece_tokenizer(lowercase=lowercase)
    run = classifier(tmp_path, tokenizer)
    done = exported(run, tmp_path)
    there = read_word_pieces(next(done.path.glob("*.gguf")))
    for text in (PROBE, "Ada ÉATS unpeared apples!?", "the_the", "北京 big\tred\n plum"):
        assert there(text)["input_ids"] == tokenizer(text)["input_ids"], text
    assert "token_type_ids" not in there("a")
    assert done.found is not None
    assert done.found.same_ids
    assert done.in_llama_cpp is None or done.in_llama_cpp.same_ids


@pytest.mark.parametrize(
    ("labels", "answers"),
    [
        ({"label_kind": "number"}, [0.5, 1.0]),
        ({**LABELS["classify"], "label_kind": "many"}, [["fruit"], ["fruit", "place"]]),
    ],
)
def test_numbers_and_several_classes(
    labels: Any, answers: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick(monkeypatch)
    rows = [{"text": row["text"], "label": answers[i % 2]} for i, row in enumerate(rows_of("classify", 6))]
    done = exported(classifier(tmp_path, piece_tokenizer(), rows=rows, labels=labels), tmp_path)
    for found in filter(None, (done.found, done.in_llama_cpp)):
        assert found.kl < 1e-3  # F16 and GELU by tanh; of numbers it is the mean relative error
        assert found.measure == (RELATIVE if labels["label_kind"] == "number" else KL)
    assert (done.in_llama_cpp is not None) == LLAMA_CPP


def classifier(folder: Path, tokenizer: Any, *, rows: Any = None, labels: Any = None, **settings: Any) -> Run:
    model = folder / "m" / "model"
    tiny_model("bert", vocab_size=len(tokenizer), head="masked_token", **settings).save_pretrained(model)
    tokenizer.save_pretrained(model)
    data = {"train": [str(write(folder / "m" / "rows.jsonl", rows or rows_of("classify", 6)))], **RESOLVED["data"],
            **(labels or LABELS["classify"])}  # fmt: skip
    whole = {"model": str(model), "task": "classify", "method": LORA, "data": data, "train": {}, "threads": 1}
    return as_if_tuned(validate({**whole, "precision": "float32", "device": "cpu"}), folder / "m" / "run")


def other_steps() -> Any:
    tokenizer = piece_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    return tokenizer


PAIRS = [{"text": "red apple", "text_pair": "Rome", "label": "fruit"}] * 4


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (
            lambda folder: of_encoder("roberta"),
            "a roberta cannot be written here, and read back as a proof. Of encoders",
        ),
        (lambda folder: of_encoder("bert", task="tag"), "llama.cpp has no head that answers word by word"),
        (lambda folder: of_encoder("bert", task="text", pooling="max_tokens"), "does not pool by max"),
        (
            lambda folder: classifier(folder, piece_tokenizer(), rows=PAIRS),
            "in pairs of texts the second has the type 1",
        ),
        (lambda folder: classifier(folder, piece_tokenizer(), hidden_act="relu"), "its activation is relu"),
        (
            lambda folder: classifier(folder, other_steps()),
            "in another way than BERT's, which is all that llama.cpp knows",
        ),
    ],
)
def test_what_llama_cpp_does_not_compute_is_said_before_weights_are_loaded(
    make: Any, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make(tmp_path)
    monkeypatch.setattr(load, "load_model", lambda *args, **words: pytest.fail("weights were loaded"))
    with pytest.raises(ModelError) as error:
        exported(run, tmp_path)
    assert says in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("target", "says"), [("ollama", "Export gguf: Ollama takes an encoder's file by `FROM` alone"),
                         ("gguf-adapter", "llama.cpp reads low-rank paths alone")]
)  # fmt: skip
def test_of_an_encoder_there_is_a_gguf_and_no_more(target: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=says):
        export_run(of_encoder("bert"), target, out=tmp_path / "out", offline=True)


def test_a_merged_encoder_keeps_how_its_vectors_are_pooled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quick(monkeypatch)
    run = of_encoder("bert", task="text", pooling="cls_token")
    done = export_run(run, "merged", out=tmp_path / "out", offline=True)
    assert json.loads((done.path / "1_Pooling" / "config.json").read_text("utf-8")) == {"pooling_mode_cls_token": True}
    assert (done.path / "modules.json").is_file()
    assert (done.path / "2_Normalize").is_dir()


@pytest.mark.skipif(not LLAMA_CPP, reason="llama-cpp-python is not installed")
def test_small_kinds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quick(monkeypatch)
    done = exported(of_encoder("bert", task="text", hidden=256), tmp_path, quant="q4_k_m")
    assert done.in_llama_cpp is not None
    assert done.in_llama_cpp.kl < 1e-2  # two layers of 4 and 6 bits
    kinds = {name: info.dtype for name, info in read_gguf(next(done.path.glob("*.gguf"))).tensors.items()}
    assert kinds["position_embd.weight"] == kinds["token_types.weight"] == "F32"
    assert kinds["blk.0.attn_q.weight"] == "Q4_K"
