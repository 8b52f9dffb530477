"""Weights that are packed as they are read are those that are packed afterwards, and never all there unpacked."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

import fresh
from tiny import tiny_tokenizer
from tiny_model import tiny_model
from tunesmith.errors import ModelError
from tunesmith.methods import METHODS
from tunesmith.models import load
from tunesmith.models.quantized import QuantizedLinear, num_weights
from tunesmith.models.resolve_model import resolve_model
from tunesmith.recipe.methods import QloraMethod
from tunesmith.types import Labels

NF4 = QloraMethod(rank=4)


def saved(folder: Path, arch: str, **settings: Any) -> Path:
    model, tokenizer = tiny_model(arch, vocab_size=512, **settings), tiny_tokenizer()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def loaded(folder: Path, settings: QloraMethod, *, at_once: bool, **how: Any) -> tuple[PreTrainedModel, int, Any]:
    method = METHODS["qlora"]
    packing = method.packing(settings) if at_once else None
    arguments = {"dtype": torch.float32, "device": "cpu", **how}
    model = load.load_model(resolve_model(str(folder), offline=True), packing=packing, **arguments)
    assert any(isinstance(module, QuantizedLinear) for module in model.modules()) == at_once
    weights = num_weights(model)
    return model, weights, method.prepare_base(model, settings, device="cpu")


@pytest.mark.parametrize(
    ("arch", "settings", "how"),
    [
        ("llama", NF4, {"dtype": torch.bfloat16}),
        ("qwen2", NF4, {}),  # biases
        ("gpt2", NF4, {"dtype": torch.float16}),  # weights that lie transposed
        ("llama", QloraMethod(rank=4, also_train=("re:1.mlp.down_proj$",), targets=("attention",)), {}),
        ("bert", NF4, {"head": "sequence", "labels": Labels("one", ("a", "b", "c"))}),  # a head that the file lacks
        ("t5", NF4, {}),
    ],
    ids=str,
)
def test_they_are_the_same_weights(tmp_path, arch, settings, how):
    folder = saved(tmp_path / "model", arch)
    expected, found = (loaded(folder, settings, at_once=at_once, **how) for at_once in (False, True))
    assert found[1:] == expected[1:]
    ours, theirs = found[0].state_dict(), expected[0].state_dict()
    assert list(ours) == list(theirs)
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name
        assert ours[name].dtype == tensor.dtype
    buffers = dict(expected[0].named_buffers())
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in found[0].named_buffers())


def test_nothing_is_left_that_says_so(tmp_path):
    model, *_ = loaded(saved(tmp_path / "model", "llama"), NF4, at_once=True)
    assert not model.is_quantized
    assert not hasattr(model, "hf_quantizer")
    assert not hasattr(model, "quantization_method")
    model.config.save_pretrained(tmp_path / "config")
    assert "quantization_config" not in json.loads((tmp_path / "config" / "config.json").read_text("utf-8"))


def test_a_weight_of_another_shape_is_an_error(tmp_path):
    folder = saved(tmp_path / "model", "llama")
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    weights[name] = weights[name][:-1].clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"its weights cannot be loaded|of another shape"):
        loaded(folder, NF4, at_once=True)


def test_a_missing_weight_is_an_error(tmp_path):
    folder = saved(tmp_path / "model", "llama")
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"not in its files, such as model.layers.1.mlp.up_proj.weight"):
        loaded(folder, NF4, at_once=True)


HELD = """
import ctypes, gc, os, sys, threading, time, torch
from pathlib import Path
from tunesmith.methods import METHODS
from tunesmith.models import load
from tunesmith.models.resolve_model import resolve_model
from tunesmith.recipe.methods import QloraMethod
ctypes.CDLL(None).mallopt(-3, 65536)  # M_MMAP_THRESHOLD: what is freed is given back

def anonymous():
    return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) * 1024

def watch():
    while True:
        peaks.append(anonymous())
        time.sleep(0.002)

settings = QloraMethod(rank=4)
packing = METHODS["qlora"].packing(settings)

def made(folder, at_once):
    located = resolve_model(folder, offline=True)
    model = load.load_model(located, dtype=torch.float16, device="cpu", packing=at_once)
    METHODS["qlora"].prepare_base(model, settings, device="cpu")
    return model

for at_once in (None, packing):  # what is imported on the way is there before anything is counted
    made(sys.argv[2], at_once)
gc.collect()
for at_once in (None, packing):
    if os.fork() == 0:
        before, peaks = anonymous(), []
        threading.Thread(target=watch, daemon=True).start()
        model = made(sys.argv[1], at_once)
        gc.collect()
        print(max(peaks) - before, anonymous() - before, flush=True)
        os._exit(0)
    os.wait()
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads what the kernel says a process holds")
def test_the_whole_model_is_never_in_memory_and_unpacked_weights_are_freed(tmp_path):
    """4 layers of 768: 21 M weights in float16 are 43 MB, packed 11 MB. The file holds them in bfloat16."""
    folder = saved(tmp_path / "model", "llama", hidden=768, layers=4, dtype=torch.bfloat16)
    small = saved(tmp_path / "small", "llama", dtype=torch.bfloat16)
    said = fresh.done("-c", HELD, folder, small)
    (peak, left), (peak_at_once, left_at_once) = (map(int, line.split()) for line in said.splitlines())
    assert peak > 41e6
    assert peak_at_once < 0.6 * peak, said
    assert max(left, left_at_once) < 11e6 + 10e6, said  # a few MB are left of the work
