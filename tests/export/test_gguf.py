"""A GGUF is what was tuned: weights of every architecture, tokens, template; what cannot be written is said before."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tokenizers import AddedToken, pre_tokenizers

from export.exports import as_if_tuned, card_head, chat_recipe, finished, of_architecture, quick
from often import often
from tiny import tiny_tokenizer
from tiny_gguf import write_gguf
from tiny_model import tiny_model
from tunesmith.errors import ExportError, ModelError
from tunesmith.export import gguf_models
from tunesmith.export.export_run import Exported, export_run
from tunesmith.export.gguf import QUANT_TYPES
from tunesmith.export.gguf_models import ARCHITECTURES, interleave
from tunesmith.export.gguf_tokenizer import HASHES, find_pre_tokenizer, pre_tokenizer_of_steps, probe_hash
from tunesmith.export.run_result import open_result
from tunesmith.export.target import ExportOptions
from tunesmith.models import load
from tunesmith.models.gguf import read_gguf
from tunesmith.models.resolve_model import resolve_model
from tunesmith.runs.folder import Run

ARCHS = list(ARCHITECTURES)


def written(run: Run, tmp_path: Path, *, quant: str = "f16", proof: bool = True, **words: Any) -> Exported:
    options = ExportOptions(quant=quant, **words)
    return export_run(run, "gguf", out=tmp_path / "out", options=options, proof=proof, offline=True)


@pytest.mark.parametrize("arch", often(ARCHS, "llama", "gemma2", "phi3", "gpt2"))
def test_every_architecture_is_read_back_as_what_was_tuned(
    arch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # trap: A14
    quick(monkeypatch)
    done = written(of_architecture(arch), tmp_path)
    assert done.found.same_ids
    assert done.found.kl < 1e-6  # measured 1e-9 to 7e-9 in F16; the rule of this trap is 1e-3
    assert done.found.carried == pytest.approx(1.0, abs=2e-3)
    assert_nothing_is_lost(done, of_architecture(arch))


def assert_nothing_is_lost(done: Exported, run: Run) -> None:
    """Every weight of the model is in the file, once."""
    header = read_gguf(next(done.path.glob("*.gguf")))
    model, attachment = open_result(run, offline=True).load(torch.float32)
    attachment.unload()
    assert sum(int(np.prod(info.shape)) for info in header.tensors.values()) == model.num_parameters()


def halves(tensor: torch.Tensor, num_heads: int) -> torch.Tensor:
    return tensor


def no_norm_offset(self: Any, name: str, tensor: torch.Tensor, config: Any) -> torch.Tensor:
    return tensor


@pytest.mark.parametrize(
    ("arch", "planted"),
    [
        ("llama", (gguf_models, "interleave", halves)),
        ("gemma2", (gguf_models.Architecture, "to_gguf", no_norm_offset)),
    ],
)
def test_a_wrong_layout_fails_and_leaves_nothing(
    arch: str, planted: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick(monkeypatch)
    run = of_architecture(arch)
    # The right file has 7e-9 at most; attention is weak in a model that is not trained.
    exact = dataclasses.replace(QUANT_TYPES["f16"].tolerances, kl=1e-7)
    monkeypatch.setitem(QUANT_TYPES, "f16", dataclasses.replace(QUANT_TYPES["f16"], tolerances=exact))
    monkeypatch.setattr(*planted)
    with pytest.raises(ExportError, match="nothing was kept: its KL divergence"):
        written(run, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_queries_and_keys_are_put_in_turns() -> None:
    rows = torch.arange(8.0)[:, None]
    assert interleave(rows, 2).flatten().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_scaled_rotary_embeddings_are_written_as_factors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quick(monkeypatch)
    folder = tmp_path / "scaled"
    tokenizer = tiny_tokenizer()
    scaling = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 64}  # fmt: skip
    tiny_model("llama", vocab_size=len(tokenizer), rope_parameters=scaling).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    done = written(as_if_tuned(chat_recipe(folder), folder / "run"), tmp_path, quant="f32")
    assert done.found.kl < 1e-9
    reader = gguf.GGUFReader(next(done.path.glob("*.gguf")))
    factors = next(tensor.data for tensor in reader.tensors if tensor.name == "rope_freqs.weight")
    assert factors[0] == pytest.approx(1.0)  # fast frequencies stay
    assert factors[-1] == pytest.approx(8.0)  # slow ones are stretched by the factor


@pytest.mark.parametrize(
    ("arch", "settings", "says"),
    [
        ("opt", {}, "gguf: a opt cannot be written. Those that can: llama, "),
        (
            "mistral",
            {"sliding_window": 8},
            "llama.cpp would compute another model: it attends to the last 8 tokens only",
        ),
        ("gemma2", {"query_pre_attn_scalar": 20}, "its scores are scaled by 20, not by the 16 of a head"),
        ("gemma3_text", {"sliding_window_pattern": 2}, "do not alternate in sixes"),
    ],
)
def test_what_cannot_be_written_is_said_before_weights_are_loaded(
    arch: str, settings: dict[str, Any], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    tokenizer = tiny_tokenizer()
    tiny_model(arch, vocab_size=len(tokenizer), **settings).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    run = as_if_tuned(chat_recipe(folder), folder / "run")
    monkeypatch.setattr(load, "load_model", lambda *args, **words: pytest.fail("weights were loaded"))
    with pytest.raises(ModelError) as error:
        written(run, tmp_path)
    assert says in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_head_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"\(causal\) is tuned for classify"):
        written(finished("classify-causal"), tmp_path)
    with pytest.raises(ModelError, match=r"\(encoder_decoder\) is tuned for summarize"):
        written(finished("summarize-encoder_decoder"), tmp_path)


def test_template_tokens_and_ends_are_in_the_file(tmp_path: Path) -> None:
    run = of_architecture("llama")
    done = written(run, tmp_path, proof=False, license="mit")
    path = next(done.path.glob("*.gguf"))
    tokenizer = load.load_tokenizer(resolve_model(str(path)), None)
    source = open_result(run, offline=True)
    assert tokenizer.chat_template == source.tokenizer.chat_template
    header = read_gguf(path).metadata
    assert header["tokenizer.ggml.eos_token_id"] == source.renderer.stop_ids[0]
    assert header["tokenizer.ggml.add_bos_token"] is False  # this tokenizer puts none in front: a second one is trap T1
    assert header["general.license"] == "mit"
    assert path.name == "llama-f16.gguf"
    head = card_head(done.path)
    assert head["library_name"] == "gguf"
    text = (done.path / "README.md").read_text()
    assert "llama-server -m llama-f16.gguf --jinja" in text


def test_a_gguf_that_was_tuned_goes_back_to_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quick(monkeypatch)
    folder = tmp_path / "from"
    folder.mkdir()
    tokenizer = smollm_like()
    model = tiny_model("llama", vocab_size=len(tokenizer), tie_word_embeddings=False)
    write_gguf(folder / "base.gguf", model, tokenizer, pre="smollm")
    recipe = chat_recipe(folder).model_copy(update={"model": str(folder / "base.gguf")})
    run = as_if_tuned(recipe, folder / "run")
    done = written(run, tmp_path, quant="f32")
    assert done.found.kl < 1e-9
    assert read_gguf(next(done.path.glob("*.gguf"))).metadata["tokenizer.ggml.pre"] == "smollm"
    adapter = export_run(run, "adapter", out=tmp_path / "adapter", proof=False, offline=True).path
    [code] = re.findall(r"```python\n(.*?)```", (adapter / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(folder)  # where the base is
    exec(code.replace("PATH", str(adapter)), names := {})
    assert torch.isfinite(names["model"](torch.arange(5, 12)[None]).logits).all()


def smollm_like() -> Any:
    tokenizer = tiny_tokenizer()
    digits = pre_tokenizers.Digits(individual_digits=True)
    levels = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, levels])
    return tokenizer


def test_the_pre_tokenizer_is_found_and_never_overridden_silently() -> None:  # trap: A13
    assert_rule_is_found(find_pre_tokenizer)
    with pytest.raises(AssertionError):
        assert_rule_is_found(lambda tokenizer, *, of_gguf: find_pre_tokenizer(tiny_tokenizer(), of_gguf=None))


def assert_rule_is_found(find: Any) -> None:
    tokenizer = smollm_like()
    assert find(tokenizer, of_gguf=None) == "smollm"
    tokenizer.add_tokens([AddedToken("<new>", special=True)])  # which changes the hash, and not the rule
    assert find(tokenizer, of_gguf=None) == "smollm"


def test_a_rule_that_contradicts_the_tokenizer_is_refused() -> None:
    with pytest.raises(ModelError, match="names the pre-tokenizer llama-bpe, but its tokenizer follows smollm"):
        find_pre_tokenizer(smollm_like(), of_gguf="llama-bpe")


def test_an_unknown_rule_is_refused_with_a_way_out() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Punctuation(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    with pytest.raises(ModelError, match=r"is unknown .* convert_hf_to_gguf\.py"):
        find_pre_tokenizer(tokenizer, of_gguf=None)
    assert pre_tokenizer_of_steps(tokenizer) is None


def test_a_published_tokenizer_is_known_by_its_hash(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tiny_tokenizer()
    monkeypatch.setitem(HASHES, probe_hash(tokenizer), "llama-bpe")
    assert find_pre_tokenizer(tokenizer, of_gguf=None) == "llama-bpe"
