"""A GGUF is read once a load, and what is found is what transformers finds without our help."""

from __future__ import annotations

import threading
from contextlib import nullcontext
from pathlib import Path

import gguf
import pytest
import torch

from tiny import tiny_tokenizer
from tiny_gguf import write_gguf
from tiny_model import tiny_model
from tunesmith.errors import ModelError
from tunesmith.models import source
from tunesmith.models.gguf_once import NAMES, read_once
from tunesmith.models.load import load_config, load_model, load_tokenizer
from tunesmith.models.locate import Located, locate
from tunesmith.models.source import blaming

HOW = {"dtype": torch.float32, "device": "cpu"}


@pytest.fixture(scope="module")
def located(tmp_path_factory) -> Located:
    tokenizer = tiny_tokenizer()
    model = tiny_model("llama", vocab_size=len(tokenizer), initializer_range=0.3)
    return locate(str(write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", model, tokenizer)))


def read(located: Located) -> tuple[dict, str, dict[str, torch.Tensor]]:
    config, tokenizer = load_config(located).to_dict(), load_tokenizer(located, None)
    return config, tokenizer.backend_tokenizer.to_str(), load_model(located, **HOW).state_dict()


def test_config_tokenizer_and_weights_are_those_of_the_plain_way(located, monkeypatch):
    config, tokenizer, weights = read(located)
    monkeypatch.setattr(source, "read_once", nullcontext)
    plain_config, plain_tokenizer, plain_weights = read(located)
    assert config == plain_config
    assert tokenizer == plain_tokenizer
    assert weights.keys() == plain_weights.keys()
    assert all(torch.equal(weights[name], plain_weights[name]) for name in weights)


def test_fields_and_tensors_are_those_of_the_plain_reader(located):
    plain = gguf.GGUFReader(str(located.path))
    with read_once():
        fast = gguf.GGUFReader(str(located.path))
    assert {name: field.contents() for name, field in fast.fields.items()} == {
        name: field.contents() for name, field in plain.fields.items()
    }
    assert [tensor.name for tensor in fast.tensors] == [tensor.name for tensor in plain.tensors]
    assert all((one.data == other.data).all() for one, other in zip(fast.tensors, plain.tensors, strict=True))


def test_loading_reads_the_file_once_and_makes_the_table_of_names_once(located, monkeypatch):
    asked: list[str] = []

    class Counted(gguf.GGUFReader):
        def __init__(self, path: str | Path) -> None:
            asked.append("GGUFReader")
            super().__init__(path)

    table = gguf.get_tensor_name_map
    monkeypatch.setattr(gguf, "GGUFReader", Counted)
    monkeypatch.setattr(gguf, "get_tensor_name_map", lambda *args: asked.append("names") or table(*args))
    load_model(located, **HOW)
    assert sorted(asked) == ["GGUFReader", "names"]


def test_the_package_is_as_it_was_behind_the_block():
    own = [getattr(gguf, name) for name in NAMES]
    with read_once(), read_once():
        assert [getattr(gguf, name) for name in NAMES] != own
    assert [getattr(gguf, name) for name in NAMES] == own


def test_a_second_thread_waits_until_the_first_has_put_the_package_right():
    own = [getattr(gguf, name) for name in NAMES]
    found = []

    def second() -> None:
        with read_once():
            found.append([getattr(gguf, name) for name in NAMES])

    thread = threading.Thread(target=second)
    with read_once():
        inside = [getattr(gguf, name) for name in NAMES]
        thread.start()
        thread.join(0.2)
        assert not found
        assert [getattr(gguf, name) for name in NAMES] == inside
    thread.join(10)
    assert len(found) == 1
    assert [getattr(gguf, name) for name in NAMES] == own


def test_the_package_is_as_it_was_behind_an_error(located):
    own = [getattr(gguf, name) for name in NAMES]
    with pytest.raises(ModelError), blaming(located, "no"):
        raise ValueError
    assert [getattr(gguf, name) for name in NAMES] == own


@pytest.mark.parametrize("name", NAMES)
def test_a_package_without_a_name_is_left_without_it(name, monkeypatch):
    monkeypatch.delattr(gguf, name)
    with read_once():
        assert not hasattr(gguf, name)
    assert not hasattr(gguf, name)
