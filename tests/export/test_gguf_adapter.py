"""An adapter as a GGUF is what was tuned, as llama.cpp adds it; what is more than low-rank paths is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import pre_tokenizers

from export.exports import as_if_tuned, card_head, chat_recipe, finished, of_architecture, quick
from tiny import tiny_tokenizer
from tiny_gguf import write_gguf
from tiny_model import tiny_model
from tunesmith.errors import ExportError, InputError, ModelError, RunError
from tunesmith.export import adapter as adapter_module
from tunesmith.export import run_result
from tunesmith.export.adapter import GGUF_ADAPTER, add_gguf_adapter
from tunesmith.export.export_run import Exported, export_run
from tunesmith.export.gguf_models import ARCHITECTURES, Architecture, deinterleave, find_architecture, interleave
from tunesmith.export.run_result import open_result, read_config
from tunesmith.export.target import ExportOptions
from tunesmith.models.gguf import read_gguf
from tunesmith.runs.atomic import sha256_file
from tunesmith.runs.folder import Run


def written(run: Run, tmp_path: Path, *, quant: str = "f16", proof: bool = True) -> Exported:
    return export_run(
        run, "gguf-adapter", out=tmp_path / "out", options=ExportOptions(quant=quant), proof=proof, offline=True
    )


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_architecture_is_read_back_as_what_was_tuned(
    arch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # trap: A14
    quick(monkeypatch)
    done = written(of_architecture(arch), tmp_path)
    assert done.found.same_ids
    assert done.found.kl < 1e-7  # only the adapter is in F16: 1e-11 to 4e-10 were measured
    assert done.found.carried == pytest.approx(1.0, abs=1e-3)
    assert_nothing_is_lost(done, of_architecture(arch))


def assert_nothing_is_lost(done: Exported, run: Run) -> None:
    """Two tensors for each layer that was adapted, beside the weight that llama.cpp adapts there."""
    header = read_gguf(next(done.path.glob("*.gguf")))
    assert (header.metadata["general.type"], header.metadata["adapter.type"]) == ("adapter", "lora")
    _, attachment = open_result(run, offline=True).load(torch.float32)
    assert len(header.tensors) == 2 * len(attachment.layers)
    shapes = sorted(header.tensors[name].shape for name in header.tensors)
    assert shapes == sorted(tuple(attachment.trained[name].shape) for name in attachment.trained)


def as_it_is(self: Architecture, name: str, b_OR: torch.Tensor, config: Any) -> torch.Tensor:
    return b_OR


def test_rows_in_another_order_fail_and_leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """llama.cpp's rotary embedding turns rows that stand next to each other."""
    quick(monkeypatch)
    run = of_architecture("llama")
    monkeypatch.setattr(Architecture, "lora_b_to_gguf", as_it_is)
    with pytest.raises(ExportError, match=r"(q|k)_proj\.weight differs"):
        written(run, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_halves_and_turns_undo_each_other() -> None:
    rows = torch.arange(24.0).reshape(12, 2)
    assert torch.equal(deinterleave(interleave(rows, 2), 2), rows)
    assert deinterleave(torch.arange(8.0)[:, None], 2).flatten().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_layers_of_other_scales_share_one_alpha(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # trap: A7
    assert_scales_arrive(tmp_path, monkeypatch)
    monkeypatch.setattr(adapter_module, "scaled_b", lambda b_OR, layer, rank, alpha: b_OR)
    with pytest.raises(AssertionError):
        assert_scales_arrive(tmp_path, monkeypatch)


def assert_scales_arrive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """llama.cpp knows one alpha and takes the rank from the tensors: what else scales a layer has to be in its B."""
    run = of_architecture("llama")
    source = open_result(run, offline=True)
    live, attachment = source.load(torch.float32)
    for i, layer in enumerate(attachment.layers.values()):
        layer.scale *= 1 + i % 3
    with monkeypatch.context() as patch:
        patch.setattr(type(source), "load", lambda self, dtype: (live, attachment))
        done = written(run, tmp_path, proof=False, quant="f32")
    model: Any = GGUF_ADAPTER.load(done.path, source.recipe)
    ids = torch.arange(20, 40)[None]
    with torch.no_grad():
        assert torch.allclose(model.model(ids).logits, live(ids).logits, atol=1e-4)  # float32: order of additions


def test_what_stands_beside_it(tmp_path: Path) -> None:
    run = of_architecture("llama")
    done = written(run, tmp_path, proof=False)
    names = {"llama-lora-f16.gguf", "chat_template.jinja", "base.json", "README.md", "verify.json"}
    assert {path.name for path in done.path.iterdir()} == names
    base = Path(run.recipe().model)
    facts = json.loads((done.path / "base.json").read_text())
    assert facts["sha256"]["model.safetensors"] == sha256_file(base / "model.safetensors")
    text = (done.path / "README.md").read_text()
    assert "--lora llama-lora-f16.gguf --jinja --chat-template-file chat_template.jinja" in text
    assert "convert_hf_to_gguf.py BASE --outfile base.gguf" in text
    assert str(base.parent) not in text  # a card is published: no folders of this machine
    assert card_head(done.path)["library_name"] == "gguf"
    assert any("it needs a GGUF of the base" in note for note in done.notes)


def test_an_adapter_of_a_gguf_goes_onto_that_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quick(monkeypatch)
    done = written(of_gguf(tmp_path / "from"), tmp_path)
    assert done.found.kl < 1e-7
    assert "llama-server -m base.gguf --lora" in (done.path / "README.md").read_text()


def of_gguf(folder: Path) -> Run:
    folder.mkdir()
    tokenizer = tiny_tokenizer()
    digits = pre_tokenizers.Digits(individual_digits=True)
    levels = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, levels])
    model = tiny_model("llama", vocab_size=len(tokenizer), tie_word_embeddings=False)
    write_gguf(folder / "base.gguf", model, tokenizer, pre="smollm")
    recipe = chat_recipe(folder).model_copy(update={"model": str(folder / "base.gguf")})
    return as_if_tuned(recipe, folder / "run")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"modules_to_save": ["lm_head"]}, "this adapter has more: it brings lm_head whole"),
        ({"use_dora": True}, r"it rescales rows of weights \(DoRA\)"),
        ({"trainable_token_indices": [5]}, "it brings rows of the embedding"),
        ({"target_modules": ["embed_tokens"]}, "it adapts embed_tokens"),
    ],
)
def test_more_than_low_rank_paths_is_refused_before_weights_are_loaded(
    change: dict[str, Any], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = read_config(of_architecture("llama").adapter_path)
    monkeypatch.setattr(run_result, "read_config", lambda folder: {**config, **change})
    with pytest.raises(ModelError, match=says):
        written(of_architecture("llama"), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_has_no_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"so there is no adapter\. Use --to gguf"):
        written(finished("full"), tmp_path)
    with pytest.raises(ModelError, match=r"it brings bert\.pooler, classifier whole"):
        written(finished("classify-encoder"), tmp_path)
    with pytest.raises(InputError, match=r"--quant: q8_0: not offered here\. One of f32, f16, bf16\.$"):
        written(of_architecture("llama"), tmp_path, quant="q8_0")


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    done = written(of_architecture("llama"), tmp_path, proof=False)
    source = open_result(of_architecture("gpt2"), offline=True)
    model, _ = source.load(torch.float32)
    with pytest.raises(ModelError, match="not an adapter of a gpt2"):
        add_gguf_adapter(model, next(done.path.glob("*.gguf")), source.config)
    source = open_result(of_architecture("llama"), offline=True)
    assert find_architecture(source.config, "x").name == "llama"
    smaller = tiny_model("llama", vocab_size=512, layers=1)
    with pytest.raises(ModelError, match=r"tensors belong to no weight, such as blk\.1\."):
        add_gguf_adapter(smaller, next(done.path.glob("*.gguf")), smaller.config)


def test_options_that_a_target_does_not_read_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--quant: is not for --to merged, only for gguf, gguf-adapter, ollama"):
        export_run(finished("chat"), "merged", out=tmp_path / "out", options=ExportOptions(quant="q8_0"))
    with pytest.raises(InputError, match=r"--bake-scale: is not for --to gguf, only for adapter"):
        export_run(finished("chat"), "gguf", out=tmp_path / "out", options=ExportOptions(bake_scale=True))
