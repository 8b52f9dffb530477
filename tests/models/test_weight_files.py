"""Weight files that lie about themselves are named before a loader believes them."""

import json
import random
import struct

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tiny import tiny_tokenizer
from tiny_gguf import write_gguf
from tiny_model import tiny_model
from tunesmith.errors import ModelError
from tunesmith.models.folder import read_safetensors
from tunesmith.models.gguf import read_gguf

NUM_MUTATIONS = 400


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    save_file({"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}, path, {"format": "pt"})
    return path.read_bytes()


@pytest.fixture(scope="module")
def gguf_bytes(tmp_path_factory) -> bytes:
    tokenizer = tiny_tokenizer()
    model = tiny_model("llama", vocab_size=len(tokenizer), layers=1, hidden=32)
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", model, tokenizer).read_bytes()


def test_safetensors_header_is_read(weights, tmp_path):
    path = tmp_path / "w.safetensors"
    path.write_bytes(weights)
    found = read_safetensors(path)
    assert {name: (info.shape, info.dtype) for name, info in found.items()} == {
        "a": ((2, 3), "F32"),
        "b": ((4,), "BF16"),
    }


def with_header(weights: bytes, header: object) -> bytes:
    size = struct.unpack("<Q", weights[:8])[0]
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + weights[8 + size :]


def entry(dtype="F32", shape=(2, 3), offsets=(0, 24)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


B = entry("BF16", (4,), (24, 32))


@pytest.mark.parametrize(
    "damage",
    [
        lambda w: b"",
        lambda w: w[:5],
        lambda w: w[:20],
        lambda w: w[:-1],
        lambda w: w + b"\0",
        lambda w: b"\xff" * 8 + w[8:],
        lambda w: with_header(w, b"{"),
        lambda w: with_header(w, b"[" * 100_000),
        lambda w: with_header(w, []),
        lambda w: with_header(w, {"a": 1, "b": B}),
        lambda w: with_header(w, {"a": entry("F33"), "b": B}),
        lambda w: with_header(w, {"a": entry(["F32"]), "b": B}),
        lambda w: with_header(w, {"a": entry(shape=(2, 4)), "b": B}),
        lambda w: with_header(w, {"a": entry(shape=(-2, -3)), "b": B}),
        lambda w: with_header(w, {"a": entry(shape=(2.0, 3)), "b": B}),
        lambda w: with_header(w, {"a": entry(shape=(2**62, 8)), "b": B}),
        lambda w: with_header(w, {"a": entry(offsets=(24, 0)), "b": B}),
        lambda w: with_header(w, {"a": entry(), "b": entry("BF16", (4,), (20, 28))}),
        lambda w: with_header(w, {"a": entry(), "b": entry("BF16", (4,), (2**40, 2**40 + 8))}),
        lambda w: with_header(w, {"a": entry()}),
    ],
)
def test_damaged_safetensors_are_named(weights, tmp_path, damage):
    path = tmp_path / "w.safetensors"
    path.write_bytes(damage(weights))
    with pytest.raises(ModelError, match=r"w\.safetensors: a damaged safetensors file: "):
        read_safetensors(path)


def mutated(content: bytes, length: int, seed: int) -> bytes:
    """One to three changes in the first `length` bytes: flipped, removed, doubled or overwritten."""
    generator = random.Random(seed)
    changed = bytearray(content)
    for _ in range(generator.randint(1, 3)):
        place = generator.randrange(length)
        kind = generator.randrange(4)
        if kind == 0:
            changed[place] ^= 1 << generator.randrange(8)
        elif kind == 1:
            del changed[place]
        elif kind == 2:
            changed.insert(place, changed[place])
        else:
            changed[place : place + 4] = generator.randbytes(4)
    return bytes(changed)


def test_mutated_safetensors_are_refused_or_harmless(weights, tmp_path):
    """What passes the check, the safetensors library reads too, with the same names and shapes."""
    path, refused = tmp_path / "w.safetensors", 0
    header_end = 8 + struct.unpack("<Q", weights[:8])[0]
    for seed in range(NUM_MUTATIONS):
        path.write_bytes(mutated(weights, header_end, seed))
        try:
            found = read_safetensors(path)
        except ModelError:
            refused += 1
        else:
            loaded = load_file(path)
            assert {name: info.shape for name, info in found.items()} == {k: tuple(v.shape) for k, v in loaded.items()}
    assert refused > NUM_MUTATIONS // 2


def test_gguf_header_is_read(gguf_bytes, tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf_bytes)
    header = read_gguf(path)
    assert header.architecture == "llama"
    assert header.metadata["llama.embedding_length"] == 32
    assert header.metadata["tokenizer.ggml.tokens"] == len(tiny_tokenizer())
    assert header.tensors["blk.0.attn_k.weight"].shape == (16, 32)
    assert header.tensors["token_embd.weight"].dtype == "F32"


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda g: b"", "ends before its header does"),
        (lambda g: g[:10], "ends before its header does"),
        (lambda g: b"GGML" + g[4:], "does not begin with GGUF"),
        (lambda g: g[:4] + struct.pack("<I", 1) + g[8:], "version 1"),
        (lambda g: g[:4] + g[4:8][::-1] + g[8:], "version"),
        (lambda g: g[:8] + struct.pack("<Q", 2**60) + g[16:], "claims"),
        (lambda g: g[:24] + struct.pack("<Q", 2**60) + g[32:], "in the middle of its header"),
        (lambda g: g[:5000], "in the middle of its header"),
        (lambda g: g[:-100], "ends at byte"),
        (lambda g: g[: len(g) // 2], "ends at byte|in the middle"),
        (lambda g: g.replace(b"general.architecture", b"general.architecturs"), "general.architecture"),
    ],
)
def test_damaged_gguf_is_named(gguf_bytes, tmp_path, damage, said):
    path = tmp_path / "m.gguf"
    path.write_bytes(damage(gguf_bytes))
    with pytest.raises(ModelError, match=f"m.gguf: a damaged GGUF file: .*({said})"):
        read_gguf(path)


def test_mutated_gguf_is_refused_or_read(gguf_bytes, tmp_path):
    """Only ModelError ever comes out, and nothing is larger than the file."""
    path = tmp_path / "m.gguf"
    for seed in range(NUM_MUTATIONS):
        path.write_bytes(mutated(gguf_bytes, 2000 if seed % 2 else len(gguf_bytes) // 3, seed))
        try:
            header = read_gguf(path)
        except ModelError:
            continue
        assert all(np.prod(info.shape) * 4 <= len(gguf_bytes) * 40 for info in header.tensors.values())
