"""A head is trained whole beside the adapters, saved with them in peft's format, and found again."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

import fresh
from methods.saved import save_adapter
from methods.test_adapter_format import rewrite
from often import often
from tiny import tiny_tokenizer
from tiny_model import ENCODERS, TRANSLATORS, tiny_model
from tunesmith.errors import ModelError, RecipeError
from tunesmith.methods import METHODS
from tunesmith.methods.adapter_format import CONFIG, WEIGHTS, load_adapter
from tunesmith.methods.lora import LoraAttachment, attach
from tunesmith.methods.lora_layer import LoraLinear
from tunesmith.models import heads
from tunesmith.models.load import load_model, load_tokenizer
from tunesmith.models.resolve_model import ModelRef, resolve_model
from tunesmith.recipe.methods import FullMethod, LoraMethod, OptionGroup
from tunesmith.types import HeadName, Labels

VOCAB = 512
THREE = Labels("one", ("a", "b", "c"))
TAGS = Labels("tags", ("B", "I", "O"))
IDS = torch.randint(3, VOCAB, (3, 11), generator=torch.Generator().manual_seed(0))
SETTINGS: dict[str, OptionGroup] = {"lora": LoraMethod(rank=4), "full": FullMethod()}
WITH_HEADS = [*ENCODERS, "llama", "gpt2"]
OFTEN = ("bert", "roberta", "gpt2")
"""Run each time: a pooler that is trained too, a head of two layers, one that reads the last token."""


def labels_for(head: HeadName) -> Labels | None:
    return {"sequence": THREE, "tokens": TAGS}.get(head)


def base(arch: str, head: HeadName = "sequence", **how: object) -> PreTrainedModel:
    wide = {} if arch == "t5" else {"init_std" if arch == "bart" else "initializer_range": 0.1}
    pad = {} if arch in ENCODERS or arch in TRANSLATORS else {"pad_token_id": 0}
    return tiny_model(arch, vocab_size=VOCAB, head=head, labels=labels_for(head), **wide, **pad, **how).eval()


def logits(model: nn.Module) -> Tensor:
    """[3, C] or [3, 11, C], of rows that end in no token that pads."""
    with torch.no_grad():
        out: Tensor = model(IDS).logits
    return out


def randomise(attachment: LoraAttachment) -> None:
    """Adapters and a head as training could have left them."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for tensor in attachment.trained.values():
            tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.1)
    attachment.publish()


@pytest.mark.parametrize("head", ["sequence", "tokens"])
@pytest.mark.parametrize("arch", often(WITH_HEADS, *OFTEN))
def test_head_and_pooler_are_trained_whole_and_nothing_else_of_the_base(arch: str, head: HeadName) -> None:
    model = base(arch, head)
    attachment = attach(model, LoraMethod(rank=4), seed=0)
    assert attachment.whole.head == heads.new_head_names(model)
    whole = {name for name in attachment.trained if ".lora_" not in name}
    assert whole == {
        name
        for name, _ in base(arch, head).named_parameters()
        if not name.startswith(f"{model.base_model_prefix}.") or ".pooler." in name
    }
    moving = {name for name, weight in model.named_parameters() if weight.requires_grad and ".lora_" not in name}
    assert moving == whole


@pytest.mark.parametrize(
    ("arch", "head"),
    often(
        [*((arch, "sequence") for arch in WITH_HEADS), ("bert", "tokens"), ("gpt2", "tokens"), ("t5", "next_token"),
         ("bart", "next_token"), ("bert", "masked_token")],
        *OFTEN, "t5",
    ),
)  # fmt: skip
def test_peft_reads_our_folder_and_computes_the_same(arch: str, head: HeadName, tmp_path: Path) -> None:
    model = base(arch, head)
    attachment = attach(model, LoraMethod(rank=4), seed=0)
    randomise(attachment)
    save_adapter(attachment, tmp_path / "adapter", base="tiny/base")
    how = {"decoder_input_ids": IDS} if arch in TRANSLATORS else {}
    theirs = peft.PeftModel.from_pretrained(base(arch, head), tmp_path / "adapter").eval()
    with torch.no_grad():
        ours_out, theirs_out, fresh = (one(input_ids=IDS, **how).logits for one in (model, theirs, base(arch, head)))
    assert (ours_out - fresh).abs().max() > 0.1
    # Logits of up to ten, float32, the same sums in the same order.
    assert (ours_out - theirs_out).abs().max() <= 1e-5
    task = {"sequence": "SEQ_CLS", "tokens": "TOKEN_CLS", "next_token": "SEQ_2_SEQ_LM", "masked_token": None}[head]
    assert theirs.peft_config["default"].task_type == task


@pytest.mark.parametrize("arch", ["bert", "roberta", "llama"])
def test_adapters_and_heads_of_peft_are_read(arch: str, tmp_path: Path) -> None:
    whole = ["bert.pooler"] if arch == "bert" else None  # peft adds what is called classifier or score
    targets = ["q_proj", "down_proj"] if arch == "llama" else ["query", "value"]
    config = peft.LoraConfig(r=4, target_modules=targets, task_type="SEQ_CLS", modules_to_save=whole)
    theirs = peft.get_peft_model(base(arch), config).eval()
    with torch.no_grad():
        for name, weight in theirs.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                weight.normal_(0, 0.1, generator=torch.Generator().manual_seed(2))
    theirs.save_pretrained(tmp_path)
    model = base(arch)
    attachment = load_adapter(model, tmp_path)
    assert attachment.whole.head == heads.new_head_names(model)
    assert (logits(model) - logits(theirs)).abs().max() <= 1e-5


def save_whole(folder: Path, names: list[str]) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, "modules_to_save": names}))


HEAD_KEY = "base_model.model.classifier.weight"
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no head": (lambda f: rewrite(f, lambda t: t.pop(HEAD_KEY)), "no weights for classifier.weight"),
    "a head of another width": (
        lambda f: rewrite(f, lambda t: t.update({HEAD_KEY: t[HEAD_KEY][:2].clone()})),
        r"classifier.weight has shape \(2, 64\), expected \(3, 64\)",
    ),
    "a head that the config does not name": (
        lambda f: save_whole(f, ["bert.pooler"]),
        "no weights for the head's classifier.weight",
    ),
    "a part of the base": (
        lambda f: save_whole(f, ["bert.pooler", "classifier", "LayerNorm"]),
        "no weights for bert.embeddings.LayerNorm.weight",
    ),
    "other labels": (
        lambda f: (f / heads.LABELS_FILE).write_text('{"kind": "one", "names": ["a", "c", "b"]}'),
        r"one of \['a', 'c', 'b'\], but the model answers with one of \['a', 'b', 'c'\]",
    ),
    "broken labels": (lambda f: (f / heads.LABELS_FILE).write_text("[1]"), "labels.json: damaged"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_head_that_does_not_fit_is_refused_and_the_model_left_alone(damage: str, tmp_path: Path) -> None:
    trained = base("bert")
    save_adapter(attach(trained, LoraMethod(rank=4), seed=0), tmp_path / "adapter", base="tiny/base")
    heads.write_labels(trained, tmp_path / "adapter")
    harm, message = DAMAGE[damage]
    harm(tmp_path / "adapter")
    model = base("bert")
    before = logits(model)
    with pytest.raises(ModelError, match=message):
        load_adapter(model, tmp_path / "adapter")
    assert torch.equal(logits(model), before)
    assert not any(isinstance(module, LoraLinear) for module in model.modules())


def test_a_new_masked_language_head_is_refused_beside_adapters(tmp_path: Path) -> None:
    base("bert").save_pretrained(tmp_path / "bert")
    located = ModelRef("folder", tmp_path / "bert", "bert")
    model = load_model(located, dtype=torch.float32, device="cpu", head="masked_token")
    with pytest.raises(RecipeError, match=r"cls.predictions.bias is new, .* Use method: full"):
        attach(model, LoraMethod(), seed=0)


# trap: A5
IN_A_NEW_PROCESS = """
import json, sys, torch
from pathlib import Path
from safetensors.torch import load_file, save_file
from tunesmith.methods import METHODS
from tunesmith.models.heads import read_labels
from tunesmith.models.load import load_model
from tunesmith.models.resolve_model import resolve_model
torch.manual_seed(99)
folder = Path(sys.argv[1])
ids = load_file(folder / "ids.safetensors")["ids"]
out = {}
for case in json.loads((folder / "cases.json").read_text()):
    arch, method = case.split("-")
    result = folder / case
    start = result if method == "full" else folder / arch
    labels = read_labels(result)
    head = "tokens" if labels.kind == "tags" else "sequence"
    model = load_model(resolve_model(str(start)), dtype=torch.float32, device="cpu", head=head, labels=labels, seed=7)
    if method == "lora":
        METHODS["lora"].load_result(model, result)
    with torch.no_grad():
        out[case] = model(ids).logits
save_file(out, folder / "out.safetensors")
"""
REMADE = ("llama", "bert", "distilbert", "roberta", "modernbert")
"""Heads called score, classifier, pre_classifier and classifier, classifier of two layers, head and classifier."""


def trained_result(folder: Path, arch: str, method: str) -> Tensor:
    """A model without a head gets one, is trained, and its result saved; what it answers."""
    if not (folder / arch).exists():
        tiny_model(arch, vocab_size=VOCAB, head="masked_token" if arch in ENCODERS else "next_token").save_pretrained(
            folder / arch
        )
        tiny_tokenizer().save_pretrained(folder / arch)
    located = resolve_model(str(folder / arch))
    model = load_model(located, dtype=torch.float32, device="cpu", head="sequence", labels=THREE, seed=1)
    attachment = METHODS[method].attach(model, SETTINGS[method], seed=0)
    randomise(attachment)  # type: ignore[arg-type]
    renderer = SimpleNamespace(tokenizer=load_tokenizer(located, None), stop_ids=(2,), pooling=None)
    METHODS[method].save_result(
        attachment, folder / f"{arch}-{method}", model=model, renderer=renderer, located=located
    )
    return logits(model)


def answers_of_a_new_process(folder: Path, cases: list[str]) -> dict[str, Tensor]:
    save_file({"ids": IDS}, folder / "ids.safetensors")
    (folder / "cases.json").write_text(str(cases).replace("'", '"'))
    fresh.done("-c", IN_A_NEW_PROCESS, folder)
    return load_file(folder / "out.safetensors")


def assert_found_again(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for case, answers in expected.items():
        # 1e-5: float32 with perhaps another number of threads; a head lost moves answers by tenths and more.
        assert (found[case] - answers).abs().max() <= 1e-5, case


def test_heads_are_found_again_in_a_new_process(tmp_path: Path) -> None:
    expected = {
        f"{arch}-{method}": trained_result(tmp_path, arch, method)
        for arch in REMADE
        for method in (("lora", "full") if arch in ("llama", "roberta") else ("lora",))
    }
    assert_found_again(answers_of_a_new_process(tmp_path, list(expected)), expected)
    adapter = tmp_path / "roberta-lora"
    assert (adapter / heads.LABELS_FILE).read_text() == (tmp_path / "roberta-full" / heads.LABELS_FILE).read_text()


def test_the_test_sees_a_head_that_was_not_saved(tmp_path: Path) -> None:
    trained_result(tmp_path, "bert", "lora")
    trained = load_file(tmp_path / "bert-lora" / WEIGHTS)
    # The planted bug: the adapter alone comes back, the head is the new one that every loading draws.
    located = resolve_model(str(tmp_path / "bert"))
    model = load_model(located, dtype=torch.float32, device="cpu", head="sequence", labels=THREE, seed=1)
    attachment = attach(model, LoraMethod(rank=4), seed=0)
    with torch.no_grad():
        for name, tensor in attachment.trained.items():
            if ".lora_" in name:
                tensor.copy_(trained["base_model.model." + name])
    lost = logits(model)
    found = load_model(located, dtype=torch.float32, device="cpu", head="sequence", labels=THREE)
    load_adapter(found, tmp_path / "bert-lora")
    with pytest.raises(AssertionError):
        assert_found_again({"bert": lost}, {"bert": logits(found)})


# trap: A10
def assert_transformers_alone_pools_the_last_token(folder: Path, expected: Tensor, rows: list[str]) -> None:
    """Texts that end in the end token, batched by the saved tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        batch = tokenizer(rows, return_tensors="pt", padding=True)
        assert (model(**batch).logits - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("method", ["full", "lora"])
def test_padding_of_a_saved_model_is_no_end_token(method: str, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(pad="<|im_end|>")
    start = tiny_model("llama", vocab_size=VOCAB, initializer_range=0.1, pad_token_id=None)
    start.config.eos_token_id = start.config.pad_token_id = tokenizer.eos_token_id
    start.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    located, notes = resolve_model(str(tmp_path / "base")), []
    model = load_model(located, dtype=torch.float32, device="cpu", head="sequence", labels=THREE, on_note=notes.append)
    assert "padding is <pad> (3) from now on" in notes[-1]
    rows = [text + tokenizer.eos_token for text in ("Hello there", "The quick brown fox jumps over the lazy dog", "a")]
    alone = [tokenizer(text, return_tensors="pt").input_ids for text in rows]
    renderer = SimpleNamespace(
        tokenizer=load_tokenizer(located, None), stop_ids=(tokenizer.eos_token_id,), pooling=None
    )
    attachment = METHODS[method].attach(model, SETTINGS[method], seed=0)
    randomise(attachment)  # type: ignore[arg-type]
    METHODS[method].save_result(attachment, tmp_path / "result", model=model, renderer=renderer, located=located)
    assert renderer.tokenizer.pad_token == "<|im_end|>"  # the caller's own is as it was
    if method == "lora":
        attachment.merge()  # type: ignore[arg-type]
        model.save_pretrained(tmp_path / "merged")
        AutoTokenizer.from_pretrained(tmp_path / "result").save_pretrained(tmp_path / "merged")
        (tmp_path / "merged").rename(tmp_path / "result" / "merged")
    with torch.no_grad():
        expected = torch.cat([model.eval()(ids).logits for ids in alone])
    folder = tmp_path / "result" / ("merged" if method == "lora" else "")
    assert_transformers_alone_pools_the_last_token(folder, expected, rows)
    # The planted bug: the model that is saved keeps its own padding.
    tokenizer.save_pretrained(folder)
    with pytest.raises(AssertionError):
        assert_transformers_alone_pools_the_last_token(folder, expected, rows)
