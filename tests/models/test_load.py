"""Weights come from the file, all of them; tokenizer and template are the model's unless the person says otherwise."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from tiny import template
from tiny_model import tiny_model
from tunesmith.errors import ModelError
from tunesmith.models import load
from tunesmith.models.load import fingerprint, load_config, load_model, load_tokenizer
from tunesmith.models.resolve_model import resolve_model
from tunesmith.models.size import UNBOUNDED, model_size

HOW = {"dtype": torch.float32, "device": "cpu"}


def change_weights(folder, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def change_config(folder, **changes) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_weight_is_that_of_the_file(folder, dtype):
    model = load_model(resolve_model(str(folder)), dtype=dtype, device="cpu")
    stored = load_file(folder / "model.safetensors")
    assert set(stored) == set(model.state_dict())
    assert all(torch.equal(weight, stored[name].to(dtype)) for name, weight in model.state_dict().items())
    assert not model.training


@pytest.mark.parametrize("name", ["lm_head.weight", "model.norm.weight", "model.layers.1.mlp.up_proj.weight"])
def test_missing_weight_is_an_error_not_a_random_start(folder, name):
    change_weights(folder, lambda tensors: tensors.pop(name))
    with pytest.raises(ModelError, match=f"1 weights are not in its files, such as {name}: they would start as random"):
        load_model(resolve_model(str(folder)), **HOW)


def test_missing_tied_output_layer_is_no_loss(folder):
    change_weights(folder, lambda tensors: tensors.pop("lm_head.weight"))
    change_config(folder, tie_word_embeddings=True)
    model = load_model(resolve_model(str(folder)), **HOW)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_weight_of_another_shape_is_an_error(folder):
    change_weights(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(7)}))
    with pytest.raises(ModelError, match=r"tiny-llama: .*(another shape|size mismatch|mismatch)"):
        load_model(resolve_model(str(folder)), **HOW)


def test_weights_without_a_place_are_told(folder):
    change_weights(folder, lambda tensors: tensors.update({"vision.weight": torch.ones(2)}))
    notes: list[str] = []
    load_model(resolve_model(str(folder)), **HOW, on_note=notes.append)
    assert len(notes) == 1
    assert "1 weights" in notes[0]
    assert "vision.weight" in notes[0]


@pytest.mark.parametrize(
    "changes",
    [{"hidden_size": 2**40}, {"num_hidden_layers": 3}, {"vocab_size": 7},  # do not fit the weights
     {"model_type": "brain"}, {"model_type": "bert"}, {"num_attention_heads": "many"}, {"hidden_act": "leap"},
     {"rope_parameters": {"rope_type": "spiral"}}, {"num_attention_heads": 0}],
)  # fmt: skip
def test_config_that_cannot_be_used_is_a_model_error(folder, changes):
    change_config(folder, **changes)
    with pytest.raises(ModelError, match="tiny-llama"):
        load_model(resolve_model(str(folder)), **HOW)


def test_pickle_beside_safetensors_is_not_touched(folder):
    (folder / "pytorch_model.bin").write_bytes(b"not even a pickle")
    load_model(resolve_model(str(folder)), **HOW)


def test_nothing_is_printed(folder, capfd):
    located = resolve_model(str(folder))
    load_tokenizer(located, None)
    load_model(located, **HOW)
    assert capfd.readouterr() == ("", "")


def test_tokenizer_has_the_models_template(folder):
    notes: list[str] = []
    tokenizer = load_tokenizer(resolve_model(str(folder)), None, on_note=notes.append)
    assert tokenizer.chat_template == template("chatml")
    assert notes == []


def test_given_template_takes_its_place_and_is_told(folder, tmp_path):
    file = tmp_path / "mine.jinja"
    file.write_text("{{ messages[0].content }}")
    notes: list[str] = []
    tokenizer = load_tokenizer(resolve_model(str(folder)), str(file), on_note=notes.append)
    assert tokenizer.chat_template == "{{ messages[0].content }}"
    assert notes == [f"data.template: {file} takes the place of the model's own chat template"]


def test_template_of_a_model_without_one_needs_no_word(folder, tmp_path):
    (folder / "chat_template.jinja").unlink()
    file = tmp_path / "mine.jinja"
    file.write_text("x")
    notes: list[str] = []
    assert load_tokenizer(resolve_model(str(folder)), None).chat_template is None
    assert load_tokenizer(resolve_model(str(folder)), str(file), on_note=notes.append).chat_template == "x"
    assert notes == []


@pytest.mark.parametrize("content", [None, b"\xff\xfe", b"x" * 65537])
def test_unusable_template_file_is_named(folder, tmp_path, content):
    file = tmp_path / "mine.jinja"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ModelError, match=f"data.template: {file}"):
        load_tokenizer(resolve_model(str(folder)), str(file))


def test_missing_or_broken_tokenizer_is_named(folder):
    located = resolve_model(str(folder))
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="its tokenizer cannot be used"):
        load_tokenizer(located, None)
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(ModelError, match=r"no tokenizer in this folder\. Copy the tokenizer files of its base model"):
        load_tokenizer(located, None)


def test_an_unreadable_sentencepiece_file_is_named_with_what_reads_it(folder, monkeypatch):
    """As of DeBERTa-v3. transformers asks for tiktoken, which does not read it."""
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>")
    monkeypatch.setattr("tunesmith.models.load.find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"no tokenizer.json; to read tokenizer.model the package sentencepiece is"):
        load_tokenizer(resolve_model(str(folder)), None)
    monkeypatch.setattr("tunesmith.models.load.find_spec", lambda name: name)
    with pytest.raises(ModelError, match="its tokenizer cannot be used"):
        load_tokenizer(resolve_model(str(folder)), None)


def test_fingerprint_changes_with_weights_tokenizer_and_template(folder):
    first = fingerprint(resolve_model(str(folder)))
    assert set(first) == {
        "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
        "model.safetensors",
    }  # fmt: skip
    (folder / "README.md").write_text("words")
    assert fingerprint(resolve_model(str(folder))) == first
    change_weights(folder, lambda tensors: tensors["lm_head.weight"][0].add_(1))
    second = fingerprint(resolve_model(str(folder)))
    assert {name for name in first if first[name] != second[name]} == {"model.safetensors"}


def test_size_counts_as_the_model_does(folder):
    located = resolve_model(str(folder))
    found, model = model_size(located), load_model(located, **HOW)
    assert found.num_params == model.num_parameters()
    assert found.max_tokens == 512


@pytest.mark.parametrize(("arch", "max_tokens"), [("gpt2", 512), ("bloom", UNBOUNDED), ("opt", 512)])
def test_size_of_other_architectures_and_tied_weights(tmp_path, arch, max_tokens):
    model = tiny_model(arch, vocab_size=96)
    model.save_pretrained(tmp_path / arch)
    if arch == "bloom":  # its positions have no limit, so a real config names none
        change_config(tmp_path / arch, max_position_embeddings=None)
    located = resolve_model(str(tmp_path / arch))
    found = model_size(located)
    assert found.num_params == model.num_parameters()
    assert found.max_tokens == max_tokens
    assert load_config(located).model_type == arch


@pytest.mark.parametrize(
    ("device", "expected"), [("cpu", {}), ("cuda:1", {"device_map": {"": "cuda:1"}})], ids=["processor", "card"]
)
def test_weights_are_read_straight_onto_a_card(folder, monkeypatch, device, expected):
    asked: list[dict[str, object]] = []

    class Read(Exception):
        pass

    def read(**settings):
        asked.append(settings)
        raise Read

    monkeypatch.setattr(load, "auto_class", lambda *args: SimpleNamespace(from_pretrained=read))
    with pytest.raises(Read):
        load_model(resolve_model(str(folder), offline=True), dtype=torch.bfloat16, device=device)
    kept = ("device_map", "quantization_config")
    assert {name: value for name, value in asked[0].items() if name in kept} == expected


def test_whoever_loads_a_model_gives_way_to_other_programs(folder, monkeypatch):
    """Met once: `serve` waited for threads that had no core, 88 s in place of 12."""
    calls = []
    monkeypatch.setattr(load.contention, "watch", lambda: calls.append("watch"))
    load_model(resolve_model(str(folder)), **HOW)
    assert calls == ["watch"]
