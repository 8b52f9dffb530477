"""A saved model is whole, equal bit for bit, stops where it should, and carries the tokenizer it came with."""

import json
import os
import stat
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from often import often
from packed import CAN, CANNOT, OFTEN
from tiny import tiny_tokenizer
from tiny_model import tiny_model
from tunesmith.errors import StorageError
from tunesmith.models import save
from tunesmith.models.attention import use_packed_attention
from tunesmith.models.load import TOKENIZER_FILES, load_model, load_tokenizer
from tunesmith.models.resolve_model import ModelRef, resolve_model
from tunesmith.models.save import generation_config, save_model, save_tokenizer

IDS = torch.arange(3, 15)[None]
HOW = {"dtype": torch.float32, "device": "cpu"}


@pytest.fixture
def located(folder) -> ModelRef:
    return resolve_model(str(folder))


@pytest.fixture
def loaded(located):
    """A model, its tokenizer, and a function that saves both below the test's folder."""
    return load_model(located, **HOW), load_tokenizer(located, None)


def saved_equals_model(model, folder: Path, *, tokenizer, located) -> None:
    save_model(model, tokenizer, folder, located=located, stop_ids=[7])
    again = load_model(resolve_model(str(folder)), **HOW)
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, model(IDS).logits)
    ours, theirs = model.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("arch", often([*CAN, *CANNOT], *OFTEN))
def test_saved_model_loads_with_the_same_logits(arch, tmp_path, located):  # trap: R7
    """Bitwise in float32, with the ragged attention in place as after training; many of these tie their embeddings."""
    tokenizer = tiny_tokenizer()
    model = tiny_model(arch, vocab_size=len(tokenizer)).eval()
    use_packed_attention(model)
    expected = model(IDS).logits
    saved_equals_model(model, tmp_path / "out", tokenizer=tokenizer, located=located)
    assert torch.equal(model(IDS).logits, expected)
    assert "tunesmith" not in (tmp_path / "out" / "config.json").read_text()


@pytest.mark.parametrize("tied", [True, False])
def test_tied_embeddings_stay_tied_and_free_ones_free(tied, tmp_path, located, loaded):  # trap: R7
    model = tiny_model("llama", vocab_size=512, tie_word_embeddings=tied).eval()
    saved_equals_model(model, tmp_path / "out", tokenizer=loaded[1], located=located)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == tied
    assert again.config.tie_word_embeddings == tied


def test_round_trip_test_catches_a_lost_weight(tmp_path, located, loaded, monkeypatch):  # trap: R7 planted
    real = save._save_weights

    def forgetful(model, folder, *given):
        kept = model.model.norm.weight.data
        model.model.norm.weight.data = kept + 1
        real(model, folder, *given)
        model.model.norm.weight.data = kept

    monkeypatch.setattr(save, "_save_weights", forgetful)
    with pytest.raises(AssertionError):
        saved_equals_model(loaded[0], tmp_path / "out", tokenizer=loaded[1], located=located)


def test_weights_in_shards(tmp_path, located, loaded, monkeypatch):
    monkeypatch.setattr(save, "SHARD_BYTES", 100_000)
    saved_equals_model(loaded[0], tmp_path / "out", tokenizer=loaded[1], located=located)
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 1


def test_half_precision_is_saved_as_it_is(tmp_path, located, loaded):
    model = loaded[0].bfloat16()
    save_model(model, loaded[1], tmp_path / "out", located=located, stop_ids=[7])
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert again.dtype == torch.bfloat16
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)


def test_others_may_read_what_was_saved(tmp_path, located, loaded):
    save_model(*loaded, tmp_path / "out", located=located, stop_ids=[7])
    modes = {stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "out").iterdir()}
    umask = os.umask(0)
    os.umask(umask)
    assert modes == {0o666 & ~umask}


def tokenizer_files_are_those_of_the_source(source: Path, folder: Path) -> None:
    present = [name for name in TOKENIZER_FILES if (source / name).is_file()]
    assert len(present) >= 3
    assert all((folder / name).read_bytes() == (source / name).read_bytes() for name in present)
    assert not [name for name in TOKENIZER_FILES if name not in present and (folder / name).exists()]


def odd_but_valid(folder: Path) -> None:
    """What another version of a tool could have written: rewriting it would change every byte."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        value = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(value, indent=7, sort_keys=True) + "\n\n")
    (folder / "merges.txt").write_text("#version: 0.2\n")


def test_unchanged_tokenizer_is_copied_byte_for_byte(folder, tmp_path, located):  # trap: T10
    odd_but_valid(folder)
    tokenizer = load_tokenizer(located, None)
    tokenizer(["a b", "c"], padding=True, truncation=True, max_length=4)  # leaves its traces in the backend
    save_model(load_model(located, **HOW), tokenizer, tmp_path / "out", located=located, stop_ids=[7])
    tokenizer_files_are_those_of_the_source(folder, tmp_path / "out")


def test_copy_test_catches_a_tokenizer_written_anew(folder, tmp_path, located):  # trap: T10 planted
    odd_but_valid(folder)
    load_tokenizer(located, None).save_pretrained(tmp_path / "out")
    with pytest.raises(AssertionError):
        tokenizer_files_are_those_of_the_source(folder, tmp_path / "out")


def test_changed_tokenizer_is_written_anew(tmp_path, located, loaded):
    model, tokenizer = loaded
    tokenizer.add_tokens(["<new>"])
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    save_model(model, tokenizer, tmp_path / "out", located=located, stop_ids=[7])
    assert (
        load_tokenizer(resolve_model(str(tmp_path / "out")), None).convert_tokens_to_ids("<new>") == len(tokenizer) - 1
    )


def test_a_sentencepiece_only_tokenizer_is_whole_in_the_result(folder, tmp_path, monkeypatch):
    """As of DeBERTa-v3 (spm.model) and mBART: without it transformers makes another tokenizer of the rest."""
    right = load_tokenizer(resolve_model(str(folder)), None)
    monkeypatch.setattr(save, "load_tokenizer", lambda located, template: right)  # for which sentencepiece is needed
    (folder / "tokenizer.json").rename(folder / "spm.model")
    (tmp_path / "out").mkdir()
    save_tokenizer(right, tmp_path / "out", located=ModelRef("folder", folder, "m"))
    again = load_tokenizer(ModelRef("folder", tmp_path / "out", "m"), None)
    assert again("a fox, 1000 times").input_ids == right("a fox, 1000 times").input_ids


@pytest.mark.parametrize("inside", [True, False], ids=["template in tokenizer_config.json", "template in a file"])
def test_given_template_is_the_only_one_saved(folder, tmp_path, located, inside):
    if inside:
        old = (folder / "chat_template.jinja").read_text()
        (folder / "chat_template.jinja").unlink()
        config = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": old}))
    file = tmp_path / "mine.jinja"
    file.write_bytes("{{ messages[0].content }}\r\nübrig\n".encode())
    tokenizer = load_tokenizer(located, str(file))
    save_model(load_model(located, **HOW), tokenizer, tmp_path / "out", located=located, stop_ids=[7])
    assert (tmp_path / "out" / "chat_template.jinja").read_bytes() == file.read_bytes().replace(b"\r", b"")
    assert "chat_template" not in json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    again = load_tokenizer(resolve_model(str(tmp_path / "out")), None)
    assert again.chat_template == tokenizer.chat_template
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()


def saved_config_stops_at(stop_ids, folder: Path) -> None:
    ends = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    assert set(stop_ids) <= set([ends] if isinstance(ends, int) else ends)


@pytest.mark.parametrize(("own", "expected"), [(None, 7), (7, 7), (2, [7, 2]), ([2, 7, 9], [7, 2, 9])])
def test_saved_config_stops_at_the_end_of_a_turn(tmp_path, located, loaded, own, expected):  # trap: T3
    loaded[0].generation_config.eos_token_id = own
    save_model(*loaded, tmp_path / "out", located=located, stop_ids=[7])
    saved_config_stops_at([7], tmp_path / "out")
    assert GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == expected
    assert loaded[0].generation_config.eos_token_id == own  # the model in memory keeps its own


def test_stop_test_catches_the_models_own_config(tmp_path, loaded):  # trap: T3 planted
    loaded[0].save_pretrained(tmp_path / "out")
    with pytest.raises(AssertionError):
        saved_config_stops_at([7], tmp_path / "out")


def test_overfitted_row_stops_with_the_saved_config(tmp_path, located, loaded):  # trap: T3
    """Greedy generation of a reloaded model ends by itself, long before its 50 tokens."""
    model, tokenizer = loaded
    row = torch.tensor([[5, 9, 30, 31, 32, 33, 7]])
    descent = torch.optim.AdamW(model.train().parameters(), lr=1e-2)
    for _ in range(60):
        descent.zero_grad()
        model(row, labels=row).loss.backward()
        descent.step()
    model.generation_config.eos_token_id = 2
    save_model(model, tokenizer, tmp_path / "out", located=located, stop_ids=[7])
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert again.generate(row[:, :2], max_new_tokens=50, do_sample=False).tolist() == row.tolist()
    again.generation_config = model.generation_config
    assert again.generate(row[:, :2], max_new_tokens=50, do_sample=False).shape[1] > 7  # planted: it runs on


LEFTOVERS = [
    {"do_sample": False, "temperature": 0.9, "top_p": 0.6, "top_k": 3},
    {"temperature": 0.0},
    {"do_sample": False, "typical_p": 0.3, "min_p": 0.2, "epsilon_cutoff": 0.1, "eta_cutoff": 0.1},
    {"num_beams": 1, "early_stopping": True, "length_penalty": 2.0},
    {"pad_token_id": -1},
    {"do_sample": True, "temperature": 0.7, "top_p": 0.9},
    {"num_return_sequences": 4, "num_beams": 1, "do_sample": False},
    {"cache_implementation": "nonsense"},
    {"max_new_tokens": -5},
]


@pytest.mark.parametrize("leftovers", LEFTOVERS, ids=str)
def test_leftovers_in_a_generation_config_never_stop_a_save(leftovers, tmp_path, located, loaded):  # trap: A9
    for name, value in leftovers.items():
        setattr(loaded[0].generation_config, name, value)
    save_model(*loaded, tmp_path / "out", located=located, stop_ids=[7])
    config = GenerationConfig.from_pretrained(tmp_path / "out")
    config.validate(strict=True)
    saved_config_stops_at([7], tmp_path / "out")
    assert config.pad_token_id is not None
    assert config.pad_token_id >= 0
    if leftovers.get("do_sample"):
        assert (config.temperature, config.top_p) == (0.7, 0.9)  # what makes sense is kept


def test_leftovers_do_stop_transformers_own_save(tmp_path, loaded):  # trap: A9 planted
    for name, value in LEFTOVERS[0].items():
        setattr(loaded[0].generation_config, name, value)
    with pytest.raises(ValueError, match="temperature"):
        loaded[0].save_pretrained(tmp_path / "out")


def test_generation_config_without_any_end_is_valid_too():
    model = tiny_model("llama", vocab_size=8)
    model.generation_config = None
    config = generation_config(model, stop_ids=[])
    config.validate(strict=True)
    assert (config.eos_token_id, config.pad_token_id) == (None, None)


def test_failed_save_leaves_what_was_there(tmp_path, located, loaded, monkeypatch):
    model, tokenizer = loaded
    save_model(model, tokenizer, tmp_path / "out", located=located, stop_ids=[7])
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(save, "save_generation_config", full)
    with torch.no_grad():
        model.lm_head.weight += 1
    with pytest.raises(StorageError, match=r"bytes needed\): ENOSPC"):
        save_model(model, tokenizer, tmp_path / "out", located=located, stop_ids=[7])
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "tiny-llama"]


def test_save_replaces_an_older_model_whole(tmp_path, located, loaded):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "stale.safetensors").write_bytes(b"old")
    save_model(*loaded, tmp_path / "out", located=located, stop_ids=[7])
    assert not (tmp_path / "out" / "stale.safetensors").exists()


def test_nothing_is_printed(tmp_path, located, loaded, capfd):
    loaded[0].generation_config.temperature = 0.3
    save_model(*loaded, tmp_path / "out", located=located, stop_ids=[7])
    assert capfd.readouterr() == ("", "")
