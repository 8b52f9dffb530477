"""Encoders whose tokens read their neighbours, padding among them: trained as transformers trains them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForSequenceClassification

from tiny_tasks import WORDS, task_recipe, word_tokenizer, write
from tunesmith.training.loop import training_steps
from tunesmith.training.setup import Setup, prepare

SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "mobilebert": {"embedding_size": 16, "intra_bottleneck_size": 32, "true_hidden_size": 32},
    "convbert": {"embedding_size": 32, "conv_kernel_size": 3, "head_ratio": 2},
    "fnet": {"tpu_short_seq_length": 64},
}


def setup_of(kind: str, folder: Path, *, pads_with: str) -> Setup:
    """A run of full tuning. The model's own padding is another token, so that its row can learn as any other."""
    tokenizer = word_tokenizer()
    tokenizer.pad_token = pads_with
    config = AutoConfig.for_model(
        kind, vocab_size=len(tokenizer), pad_token_id=tokenizer.unk_token_id, **{**SIZES, **KINDS[kind]}
    )
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder / kind)
    tokenizer.save_pretrained(folder / kind)
    options = {"rows_per_step": 6, "tokens_per_pass": 512, "max_steps": 1}
    rows = [{"text": " ".join(WORDS[: 2 + i % 7]), "label": "odd" if i % 2 else "even"} for i in range(24)]
    data = {"train": [str(write(folder / "rows.jsonl", rows))], "eval": [], "held_out": 0.0}
    settings = {"model": str(folder / kind), "train": options, "data": data, "optim": {"clip": None}}
    recipe = task_recipe(folder, "classify", "encoder", **settings)
    return prepare(recipe, root=folder / "runs")


def gradients_of(setup: Setup) -> dict[str, Tensor]:
    """Of the first step, before its update, by name."""
    found: dict[str, Tensor] = {}
    right = setup.optimizer.step

    def keep(*args: Any, **how: Any) -> None:
        found.update({name: t.grad.clone() for name, t in setup.attachment.trained.items() if t.grad is not None})
        right(*args, **how)

    setup.optimizer.step = keep  # type: ignore[method-assign]
    next(iter(training_steps(setup)))
    return found


# trap: T18
def assert_gradients_are_those_of_transformers(kind: str, folder: Path, *, pads_with: str, pad: int) -> None:
    setup = setup_of(kind, folder, pads_with=pads_with)
    theirs = AutoModelForSequenceClassification.from_pretrained(folder / kind, num_labels=2).train()
    theirs.load_state_dict(setup.model.state_dict())
    [members] = setup.sampler.step(1)
    rows = [setup.rows.store.row(i) for i in members]
    longest = max(len(row.ids) for row in rows)
    ids_BT = torch.full((len(rows), longest), pad)
    for line, row in zip(ids_BT, rows, strict=True):
        line[: len(row.ids)] = torch.tensor(row.ids)
    mask_BT = torch.arange(longest)[None] < torch.tensor([len(row.ids) for row in rows])[:, None]
    inputs = {"input_ids": ids_BT} | ({} if kind == "fnet" else {"attention_mask": mask_BT.long()})
    labels = torch.tensor([int(row.labels[0]) for row in rows])  # type: ignore[index]
    assert len({len(row.ids) for row in rows}) > 1, "nothing is padded"
    theirs(**inputs, labels=labels).loss.backward()
    ours = gradients_of(setup)
    name = next(n for n, m in theirs.named_modules() if m is theirs.get_input_embeddings()) + ".weight"
    expected = theirs.get_parameter(name).grad
    learning = expected.abs().sum(1).nonzero().flatten()
    assert pad in learning.tolist()
    whole = torch.zeros_like(expected)
    whole[setup_tokens(setup, pad)] = ours[name]
    torch.testing.assert_close(whole, expected, rtol=1e-4, atol=1e-6)


def setup_tokens(setup: Setup, pad: int) -> list[int]:
    tokens = sorted({*setup.rows.store.tokens.tolist(), pad})
    total: int = setup.model.get_input_embeddings().weight.shape[0]
    return tokens if len(tokens) < total else list(range(total))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pads_with", ["[PAD]", "[MASK]"])
def test_padding_learns_as_it_does_in_transformers(kind: str, pads_with: str, tmp_path: Path) -> None:
    """[PAD] has the number 0, [MASK] has not, as the padding of RoBERTa and its like."""
    pad = word_tokenizer().convert_tokens_to_ids(pads_with)
    assert_gradients_are_those_of_transformers(kind, tmp_path, pads_with=pads_with, pad=pad)


def test_padding_with_number_0_whatever_the_tokenizer_says_would_be_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tunesmith.training.setup.pad_id", lambda model, tokenizer: 0)  # planted: T18
    pad = word_tokenizer().mask_token_id
    with pytest.raises(AssertionError):
        assert_gradients_are_those_of_transformers("convbert", tmp_path, pads_with="[MASK]", pad=pad)
