"""A GGUF file is a model like any other: its weights, its tokens, its template, and a folder when it is saved."""

import json

import pytest
import torch
from gguf import GGUFReader
from transformers import PreTrainedModel

from smollm2 import NEEDS_SMOLLM2, SMOLLM2
from tiny import tiny_tokenizer
from tiny_gguf import write_gguf
from tiny_model import tiny_model
from tunesmith.errors import ModelError
from tunesmith.models.load import fingerprint, load_model, load_tokenizer
from tunesmith.models.resolve_model import ModelRef, resolve_model
from tunesmith.models.save import save_model
from tunesmith.models.size import model_size

HOW = {"dtype": torch.float32, "device": "cpu"}
TEXT = "Hello  12 and\n\n345!"
"""Blanks and line ends in front of digits: where the splitting rules differ."""


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[ModelRef, PreTrainedModel]:
    """A GGUF and the model that is in it."""
    tokenizer = tiny_tokenizer()
    model = tiny_model("llama", vocab_size=len(tokenizer), initializer_range=0.3).eval()
    path = write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", model, tokenizer)
    return resolve_model(str(path)), model


def test_weights_are_those_of_the_file(made, capfd):
    """Within 1e-5 of logits of several units: the file holds float32. Rotary halves taken wrong move them by 1."""
    located, model = made
    loaded = load_model(located, **HOW)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert (loaded(ids).logits - model(ids).logits).abs().max() <= 1e-5
    assert capfd.readouterr() == ("", "")


def test_tokens_template_and_limits_are_those_of_the_file(made, capfd):
    notes: list[str] = []
    found, original = load_tokenizer(made[0], None, on_note=notes.append), tiny_tokenizer()
    assert found.get_vocab() == original.get_vocab()
    assert found.chat_template == original.chat_template
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(found, name) == getattr(original, name)
    assert found.model_max_length == 512
    assert notes == []
    assert capfd.readouterr() == ("", "")


def pieces(tokenizer) -> list[str]:
    return [piece for piece, _ in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(TEXT)]


def test_digits_are_cut_apart_where_the_file_says_so(made):
    expected = ["Hello", "ĠĠ", "1", "2", "Ġand", "ĊĊ", "3", "4", "5", "!"]
    assert pieces(load_tokenizer(made[0], None)) == expected


def test_unknown_splitting_rule_is_told(tmp_path):
    tokenizer = tiny_tokenizer()
    model = tiny_model("llama", vocab_size=len(tokenizer), layers=1, hidden=32)
    located = resolve_model(str(write_gguf(tmp_path / "odd.gguf", model, tokenizer, pre="martian")))
    notes: list[str] = []
    load_tokenizer(located, None, on_note=notes.append)
    assert len(notes) == 1
    assert "its rule for splitting text, 'martian', is not known here" in notes[0]


def test_saved_folder_is_a_plain_model(made, tmp_path):
    located, _ = made
    model, tokenizer = load_model(located, **HOW), load_tokenizer(located, None)
    save_model(model, tokenizer, tmp_path / "out", located=located, stop_ids=[tokenizer.eos_token_id])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["rms_norm_eps"] == 1e-6
    plain = resolve_model(str(tmp_path / "out"))
    again, tokens = load_model(plain, **HOW), load_tokenizer(plain, None)
    assert torch.equal(again(torch.arange(20)[None]).logits, model(torch.arange(20)[None]).logits)
    assert tokens(TEXT).input_ids == tokenizer(TEXT).input_ids
    assert "local_files_only" not in (tmp_path / "out" / "tokenizer_config.json").read_text()


def test_size_and_fingerprint_need_no_weights(made):
    located, model = made
    found = model_size(located)
    assert (found.num_params, found.max_tokens) == (model.num_parameters(), 512)
    assert list(fingerprint(located)) == ["tiny.gguf"]


def test_missing_tensor_is_an_error_not_a_random_start(made, tmp_path):
    """Renamed in place, so that sizes still fit."""
    path = tmp_path / "renamed.gguf"
    path.write_bytes(made[0].path.read_bytes().replace(b"blk.1.ffn_up.weight", b"blk.1.ffn_xx.weight"))
    with pytest.raises(ModelError, match=r"renamed.gguf|such as model.layers.1.mlp.up_proj.weight"):
        load_model(resolve_model(str(path)), **HOW)


def test_unknown_architecture_is_named(made, tmp_path):
    path = tmp_path / "brain.gguf"
    path.write_bytes(made[0].path.read_bytes().replace(b"llama", b"brain"))
    with pytest.raises(ModelError, match=r"brain.gguf: .*brain"):
        load_model(resolve_model(str(path)), **HOW)


def test_folder_with_one_gguf_is_that_file(made, tmp_path):
    folder = tmp_path / "download"
    folder.mkdir()
    (folder / "a.gguf").write_bytes(made[0].path.read_bytes())
    assert resolve_model(str(folder)).path == folder / "a.gguf"
    (folder / "b.gguf").write_bytes(made[0].path.read_bytes())
    with pytest.raises(ModelError, match="2 GGUF files"):
        resolve_model(str(folder))


def test_everything_about_a_gguf_is_read_without_a_socket(made, no_sockets):
    located = resolve_model(str(made[0].path), offline=True)
    load_tokenizer(located, None)
    load_model(located, **HOW)


@pytest.mark.slow
@NEEDS_SMOLLM2
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_smollm2_knows_the_capital_of_france(dtype):
    located = resolve_model(str(SMOLLM2))
    tokenizer = load_tokenizer(located, None)
    model = load_model(located, dtype=dtype, device="cpu")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|im_end|>"]) == [0, 1, 2]
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )
    assert tokenizer.tokenize("\n\n1.  23") == ["ĊĊ", "1", ".", "ĠĠ", "2", "3"]
    question = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**ids, max_new_tokens=30, do_sample=False)[0, ids.input_ids.shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"
    assert len(GGUFReader(SMOLLM2).tensors) == 272
