"""Traps of docs/inside/correctness.md on the way out: what no export may lose, and a planted copy of each bug."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from export.exports import as_if_tuned, chat_recipe, of_architecture, quick
from tiny import template, tiny_tokenizer
from tiny_model import tiny_model
from tunesmith.errors import ExportError
from tunesmith.export import adapter as adapter_module
from tunesmith.export import gguf as gguf_module
from tunesmith.export import gguf_tokenizer, ollama
from tunesmith.export.export_run import Exported, export_run
from tunesmith.export.run_result import open_result
from tunesmith.export.target import ExportOptions
from tunesmith.models import save
from tunesmith.models.gguf import read_gguf
from tunesmith.models.modes import silence_transformers
from tunesmith.runs.folder import Run


def exported(run: Run, target: str, folder: Path, *, proof: bool = False, **words: Any) -> Exported:
    return export_run(run, target, out=folder / target, options=ExportOptions(**words), proof=proof, offline=True)


def tuned(
    folder: Path, *, tokenizer: Any = None, change: Callable[[Path], None] = lambda model: None, **settings: Any
) -> Run:
    tokenizer = tokenizer or tiny_tokenizer()
    tiny_model("llama", **{"vocab_size": len(tokenizer), **settings}).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    change(folder / "model")
    return as_if_tuned(chat_recipe(folder), folder / "run")


def gguf_of(done: Exported) -> Path:
    return next(done.path.glob("*.gguf"))


def test_tied_embeddings_stay_tied_and_are_written_once(tmp_path: Path) -> None:
    run = tuned(tmp_path, tie_word_embeddings=True)
    assert_is_tied(run, tmp_path)
    config = tmp_path / "merged" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "tie_word_embeddings": False}))
    with pytest.raises(AssertionError):
        assert_loads_as_tuned(run, tmp_path / "merged")


def assert_is_tied(run: Run, folder: Path) -> None:
    merged = exported(run, "merged", folder).path
    assert "lm_head.weight" not in load_file(merged / "model.safetensors")
    assert "output.weight" not in read_gguf(gguf_of(exported(run, "gguf", folder, quant="f32"))).tensors
    assert_loads_as_tuned(run, merged)


def assert_loads_as_tuned(run: Run, merged: Path) -> None:
    live, _ = open_result(run, offline=True).load(torch.float32)
    with silence_transformers():
        model = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    ids = torch.arange(20, 40)[None]
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, live(ids).logits, atol=1e-5)  # float32: order of additions


def test_rows_of_a_padded_vocabulary_are_kept(tmp_path: Path) -> None:
    """Embeddings have more rows than there are tokens, and a file with fewer is no model."""
    run = tuned(tmp_path, vocab_size=len(tiny_tokenizer()) + 8)
    assert_rows_are_kept(run, tmp_path / "right")
    with pytest.raises(AssertionError):
        assert_rows_are_kept(run, tmp_path / "wrong", cut=8)


def assert_rows_are_kept(run: Run, folder: Path, *, cut: int = 0) -> None:
    rows = len(tiny_tokenizer()) + 8
    real = gguf_module.num_embeddings
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf_module, "num_embeddings", lambda model: real(model) - cut)
        fields = gguf.GGUFReader(gguf_of(exported(run, "gguf", folder))).fields
    assert len(fields["tokenizer.ggml.tokens"].data) == rows
    merged = exported(run, "merged", folder).path
    assert load_file(merged / "model.safetensors")["model.embed_tokens.weight"].shape[0] == rows
    assert json.loads((merged / "config.json").read_text())["vocab_size"] == rows


def test_an_adapter_that_others_would_ignore_does_not_go_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # trap: A6
    """peft drops names that it does not know with a warning: the base then answers."""
    quick(monkeypatch)
    run = of_architecture("llama")
    assert exported(run, "adapter", tmp_path / "right", proof=True).found is not None
    real = adapter_module.write_base_facts

    def renamed(source: Any, folder: Path) -> None:
        real(source, folder)
        weights = folder / "adapter_model.safetensors"
        save_file(
            {name.replace("model.model.", "model.net."): one for name, one in load_file(weights).items()}, weights
        )

    monkeypatch.setattr(adapter_module, "write_base_facts", renamed)
    with pytest.raises(ExportError, match=r"it keeps -?0\.0 % of the change from the base"):
        exported(run, "adapter", tmp_path / "wrong", proof=True)
    assert list((tmp_path / "wrong").iterdir()) == []
    with pytest.raises(AssertionError):  # and without the proof it would have gone out
        assert_has_an_effect(run, exported(run, "adapter", tmp_path / "wrong").path)


def assert_has_an_effect(run: Run, folder: Path) -> None:
    import peft

    base = AutoModelForCausalLM.from_pretrained(run.recipe().model, dtype=torch.float32)
    ids = torch.arange(20, 40)[None]
    with torch.no_grad(), silence_transformers():
        before = base(ids).logits
        assert not torch.allclose(peft.PeftModel.from_pretrained(base, str(folder))(ids).logits, before, atol=1e-3)


def leftovers(model: Path) -> None:
    """As published models have them: a temperature for a config that does not sample."""
    config = {"do_sample": False, "temperature": 0.9, "top_p": 0.6, "eos_token_id": 1}
    (model / "generation_config.json").write_text(json.dumps(config))


def test_leftovers_of_a_generation_config_stop_no_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # trap: A9
    run = tuned(tmp_path, change=leftovers)
    assert_generates(run, tmp_path / "right")
    monkeypatch.setattr(save, "save_generation_config", as_it_is)
    monkeypatch.setattr(adapter_module, "save_generation_config", as_it_is)
    with pytest.raises(AssertionError):
        assert_generates(run, tmp_path / "wrong")


def assert_generates(run: Run, folder: Path) -> None:
    stops = set(open_result(run, offline=True).renderer.stop_ids)
    for target in ("merged", "adapter"):
        try:
            config = GenerationConfig.from_pretrained(exported(run, target, folder).path)
        except ValueError as error:
            raise AssertionError(f"{target}: {error}") from error
        assert stops <= set(config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id])
        config.validate(strict=True)


def as_it_is(model: PreTrainedModel, folder: Path, *, stop_ids: Any) -> None:
    model.generation_config.save_pretrained(folder)


@pytest.mark.parametrize("adds_bos", [True, False])
def test_there_is_one_bos_whoever_writes_it(
    adds_bos: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # trap: T1
    """The template writes one; llama.cpp adds its own where the file says so, and Ollama runs another template."""
    run = tuned(tmp_path, tokenizer=tiny_tokenizer(template("llama3"), bos="<|begin_of_text|>", adds_bos=adds_bos))
    assert_one_bos(run, tmp_path / "right", adds_bos=adds_bos)
    monkeypatch.setattr(ollama, "begins_with_bos", lambda source: not adds_bos)
    with pytest.raises(AssertionError):
        assert_one_bos(run, tmp_path / "wrong", adds_bos=adds_bos)


def assert_one_bos(run: Run, folder: Path, *, adds_bos: bool) -> None:
    done = exported(run, "ollama", folder)
    added = read_gguf(gguf_of(done)).metadata["tokenizer.ggml.add_bos_token"]
    assert added is adds_bos
    text = (done.path / "Modelfile").read_text()
    without_system = re.sub(r'\{\{ if eq \.Role "system" \}\}.*?\{\{ else', "{{ else", text, flags=re.DOTALL)
    assert int(added) + without_system.count("<|begin_of_text|>") == 1


def test_every_export_stops_where_answers_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # trap: T3
    """The end of a turn is not the end of a text here, as in a base model that learns to chat."""
    run = tuned(tmp_path, tokenizer=tiny_tokenizer(eos="<|endoftext|>"))
    assert_stops(run, tmp_path / "right")
    monkeypatch.setattr(gguf_tokenizer, "_end_of_turn", lambda source: None)
    with pytest.raises(AssertionError):
        assert_stops(run, tmp_path / "wrong")


def assert_stops(run: Run, folder: Path) -> None:
    source = open_result(run, offline=True)
    (stop,) = source.renderer.stop_ids
    assert source.tokenizer.convert_ids_to_tokens(stop) == "<|im_end|>"
    for target in ("merged", "adapter"):
        assert stop in GenerationConfig.from_pretrained(exported(run, target, folder).path).eos_token_id
    facts = read_gguf(gguf_of(exported(run, "gguf", folder))).metadata
    assert stop in (facts["tokenizer.ggml.eos_token_id"], facts.get("tokenizer.ggml.eot_token_id"))
    assert 'PARAMETER stop "<|im_end|>"' in (exported(run, "ollama", folder).path / "Modelfile").read_text()


def test_another_template_does_not_go_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # trap: T7
    """Good in training, nonsense in the server: the prompts of the proof are rendered from the file itself."""
    quick(monkeypatch)
    run = of_architecture("llama")
    assert_same_template(run, tmp_path / "right")
    real = gguf.GGUFWriter.add_chat_template
    monkeypatch.setattr(
        gguf.GGUFWriter, "add_chat_template", lambda writer, text: real(writer, text.replace("im_start", "im_end"))
    )
    with pytest.raises(ExportError, match=r"its tokens differ: (row|prompt) 1 at token"):
        exported(run, "gguf", tmp_path / "wrong", proof=True)
    with pytest.raises(AssertionError):
        assert_same_template(run, tmp_path / "wrong")


def assert_same_template(run: Run, folder: Path) -> None:
    text = open_result(run, offline=True).tokenizer.chat_template
    for target in ("merged", "adapter"):
        assert (exported(run, target, folder).path / "chat_template.jinja").read_text() == text
    assert read_gguf(gguf_of(exported(run, "gguf", folder))).metadata["tokenizer.chat_template"] == text


def test_tokenizer_files_go_out_byte_for_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # trap: T10
    """The file below is as a person or another library wrote it: a library that saves it again writes it otherwise."""

    def spaced(model: Path) -> None:
        path = model / "tokenizer.json"
        path.write_text(json.dumps(json.loads(path.read_text()), indent=3, ensure_ascii=True))

    run = tuned(tmp_path, change=spaced)
    for target in ("merged", "adapter"):  # ONNX: tests/export/test_onnx.py
        assert_same_bytes(run, target, tmp_path / "right")

    def again(tokenizer: Any, folder: Path, *, located: Any) -> None:
        tokenizer.save_pretrained(folder)

    monkeypatch.setattr(save, "save_tokenizer", again)
    with pytest.raises(AssertionError):
        assert_same_bytes(run, "merged", tmp_path / "wrong")


def assert_same_bytes(run: Run, target: str, folder: Path) -> None:
    found = exported(run, target, folder).path / "tokenizer.json"
    assert found.read_bytes() == (Path(run.recipe().model) / "tokenizer.json").read_bytes()
