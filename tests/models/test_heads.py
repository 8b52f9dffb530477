"""A head that fits is kept, any other is drawn from the seed alone, and nothing else may be missing."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from often import often
from tiny import tiny_tokenizer
from tiny_gguf import write_gguf
from tiny_model import ENCODERS, TRANSLATORS, tiny_model
from tunesmith.errors import ModelError
from tunesmith.models import heads
from tunesmith.models.load import load_model, model_kind
from tunesmith.models.resolve_model import resolve_model
from tunesmith.models.size import UNBOUNDED, model_size
from tunesmith.types import HeadName, Labels

HOW = {"dtype": torch.float32, "device": "cpu"}
THREE = Labels("one", ("a", "b", "c"))
TAGS = Labels("tags", ("B", "I", "O"))


def saved(folder: Path, arch: str, head: HeadName = "next_token", labels: Labels | None = None, **how) -> Path:
    """A model folder without a tokenizer; encoders are saved with the head that guesses masked tokens."""
    if arch in ENCODERS and head == "next_token":
        head = "masked_token"
    tiny_model(arch, vocab_size=512, head=head, labels=labels, **how).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def load(folder: Path, head: HeadName, labels: Labels | None, notes: list[str] | None = None, **how) -> PreTrainedModel:
    listen = {} if notes is None else {"on_note": notes.append}
    return load_model(resolve_model(str(folder)), **{**HOW, **how}, head=head, labels=labels, **listen)


HEAD_WEIGHTS = {
    "bert": ["bert.pooler.dense.weight", "bert.pooler.dense.bias", "classifier.weight", "classifier.bias"],
    "roberta": [
        "classifier.dense.weight", "classifier.dense.bias", "classifier.out_proj.weight", "classifier.out_proj.bias",
    ],
    "distilbert": ["pre_classifier.weight", "pre_classifier.bias", "classifier.weight", "classifier.bias"],
    "deberta-v2": ["pooler.dense.weight", "pooler.dense.bias", "classifier.weight", "classifier.bias"],
    "modernbert": ["head.dense.weight", "head.norm.weight", "classifier.weight", "classifier.bias"],
    "llama": ["score.weight"],
    "gpt2": ["score.weight"],
}  # fmt: skip


@pytest.mark.parametrize("arch", HEAD_WEIGHTS)
def test_a_new_head_is_drawn_and_said_and_all_else_is_that_of_the_file(arch: str, tmp_path: Path) -> None:
    notes: list[str] = []
    model = load(saved(tmp_path / arch, arch), "sequence", THREE, notes)
    assert list(heads.new_head_names(model)) == HEAD_WEIGHTS[arch]
    # ModernBERT's head stands before its masked-token decoder too: its weights are in the file, and a part of a new
    # head all the same.
    assert list(heads.new_param_names(model)) == HEAD_WEIGHTS[arch]
    assert ", ".join(HEAD_WEIGHTS[arch]) in notes[0]
    stored = load_file(tmp_path / arch / "model.safetensors")
    rest = {name: weight for name, weight in model.named_parameters() if name not in HEAD_WEIGHTS[arch]}
    assert all(torch.equal(weight, stored[name]) for name, weight in rest.items())
    assert (model.config.id2label, model.config.num_labels) == ({0: "a", 1: "b", 2: "c"}, 3)
    assert (model.config.label2id, model.config.problem_type) == (
        {"a": 0, "b": 1, "c": 2},
        "single_label_classification",
    )
    assert heads.labels_of(model) == THREE
    assert not model.training


def test_new_weights_depend_on_the_seed_alone_and_leave_no_trace(tmp_path: Path) -> None:
    folder = saved(tmp_path / "bert", "bert")
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = load(folder, "sequence", THREE, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    again, half = load(folder, "sequence", THREE, seed=3), load(folder, "sequence", THREE, seed=3, dtype=torch.bfloat16)
    other = load(folder, "sequence", THREE, seed=4)
    for name in HEAD_WEIGHTS["bert"]:
        weight = first.get_parameter(name)
        assert torch.equal(weight, again.get_parameter(name))
        assert torch.equal(weight.bfloat16(), half.get_parameter(name))
        assert torch.equal(weight, other.get_parameter(name)) == name.endswith("bias")
    # 64 · 64 draws of standard deviation 0.02: their own is within 5 %.
    assert first.bert.pooler.dense.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert not first.classifier.bias.any()


@pytest.mark.parametrize(
    "labels", [THREE, Labels("many", ("a", "b")), Labels("number"), TAGS], ids=lambda labels: labels.kind
)
def test_a_head_for_the_same_labels_is_kept_and_for_others_replaced(labels: Labels, tmp_path: Path) -> None:
    head: HeadName = "tokens" if labels.kind == "tags" else "sequence"
    folder, notes = saved(tmp_path / "bert", "bert", head, labels), []
    stored = load_file(folder / "model.safetensors")
    for asked in (labels, None):
        kept = load(folder, head, asked, notes)
        assert torch.equal(kept.classifier.weight, stored["classifier.weight"])
        assert heads.labels_of(kept) == labels
    assert notes == []
    # Of the same shape in the first case, but with other names: a class would take over the weights of another.
    for names in ((*labels.names[:-1], "z"), (*labels.names, "z")):
        asked = Labels("tags" if head == "tokens" else "one", names)
        replaced = load(folder, head, asked, notes)
        assert replaced.classifier.weight.shape[0] == len(names)
        assert not torch.equal(replaced.classifier.weight[:1], stored["classifier.weight"][:1])
        assert torch.equal(
            replaced.bert.encoder.layer[0].output.dense.bias, stored["bert.encoder.layer.0.output.dense.bias"]
        )
        assert heads.labels_of(replaced) == asked
        assert "has a head for other labels" in notes[-2]
        assert "new weights, drawn from seed 0" in notes[-1]
        if head == "sequence":  # the pooler is the model's own
            assert heads.new_param_names(replaced) == ("classifier.weight", "classifier.bias")


def test_a_missing_head_without_labels_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"classifier\.dense\.bias: they would start as random numbers"):
        load(saved(tmp_path / "roberta", "roberta"), "sequence", None)


def test_a_missing_weight_of_the_base_is_an_error_beside_a_new_head(tmp_path: Path) -> None:
    folder = saved(tmp_path / "bert", "bert")
    tensors = load_file(folder / "model.safetensors")
    del tensors["bert.encoder.layer.1.output.dense.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"1 weights are not in its files, such as bert\.encoder\.layer\.1\.output"):
        load(folder, "sequence", THREE)


def test_a_masked_language_head_is_the_models_own_or_new_and_said(tmp_path: Path) -> None:
    notes: list[str] = []
    own = load(saved(tmp_path / "bert", "bert"), "masked_token", None, notes)
    assert notes == []
    assert heads.new_param_names(own) == ()
    saved(tmp_path / "classifier", "bert", "sequence", THREE)
    new = load(tmp_path / "classifier", "masked_token", None, notes)
    assert heads.new_param_names(new) == tuple(name for name, _ in new.named_parameters() if name.startswith("cls."))
    assert "cls.predictions.transform.dense.weight" in notes[0]
    assert new.cls.predictions.decoder.weight is new.bert.embeddings.word_embeddings.weight


@pytest.mark.parametrize(("arch", "head"), [("granite", "sequence"), ("opt", "tokens"), ("t5", "masked_token")])
def test_a_head_that_transformers_lacks_is_named(arch: str, head: HeadName, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=f"transformers has no {arch} that"):
        load(saved(tmp_path / arch, arch), head, None if head == "masked_token" else THREE)


def test_a_causal_head_that_reads_more_than_the_last_token_is_refused(tmp_path: Path) -> None:
    """Decoders of ModernBERT (Ettin) have a head of two layers behind a pooling by the pad token."""
    folder = saved(tmp_path / "m", "modernbert-decoder", pad_token_id=3)
    assert model_kind(resolve_model(str(folder))) == "causal"
    with pytest.raises(ModelError, match="head of a ModernBertDecoderForSequenceClassification reads"):
        load(folder, "sequence", THREE)


def test_a_gguf_gets_a_head_on_the_weights_of_its_file(tmp_path: Path) -> None:
    whole = tiny_model("llama", vocab_size=512, rms_norm_eps=1e-5)
    path = write_gguf(tmp_path / "tiny.gguf", whole, tiny_tokenizer())
    model = load(path, "sequence", THREE)
    assert type(model).__name__ == "LlamaForSequenceClassification"
    weights = whole.model.state_dict()
    assert all(torch.equal(weight, weights[name]) for name, weight in model.model.state_dict().items())
    assert model.score.weight.std().item() == pytest.approx(0.02, rel=0.2)  # 192 draws


@pytest.mark.parametrize("arch", often([*ENCODERS, *TRANSLATORS, "llama", "gpt2"], "roberta", "t5", "gpt2"))
def test_kind_and_size_are_read_off_the_config(arch: str, tmp_path: Path) -> None:
    folder = saved(tmp_path / arch, arch)
    expected = "encoder" if arch in ENCODERS else "encoder_decoder" if arch in TRANSLATORS else "causal"
    located = resolve_model(str(folder))
    assert model_kind(located) == expected
    found = model_size(located)
    limits = {"roberta": 510, "mpnet": 510, "t5": UNBOUNDED}
    assert found.max_tokens == limits.get(arch, 512)


def test_a_bert_that_decodes_is_causal(tmp_path: Path) -> None:
    folder = saved(tmp_path / "bert", "bert")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "is_decoder": True}))
    assert model_kind(resolve_model(str(folder))) == "causal"


def test_a_model_that_is_not_of_text_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path / "bert", "bert")
    (folder / "config.json").write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(ModelError, match="vit: not a model of text"):
        model_kind(resolve_model(str(folder)))
