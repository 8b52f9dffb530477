"""Each family that sees: its rows, answers and gradients are those of its own processor and its own forward."""

from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from tempfile import mkdtemp
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from often import often
from tiny_vision import EACH_FAMILY, FAMILIES, rows_with_images, vision_folder
from tunesmith.data.collate import build_batch, pad_to_multiple
from tunesmith.data.examples import examples
from tunesmith.data.images import pixels_of
from tunesmith.data.renderer import Renderer
from tunesmith.methods.targets import is_inside
from tunesmith.models import attention, image_features
from tunesmith.models.attention import use_packed_attention
from tunesmith.models.forward import logits_at_targets
from tunesmith.models.image_features import kept_vectors
from tunesmith.models.load import load_model, load_tokenizer
from tunesmith.models.modes import eval_mode
from tunesmith.models.packing_check import PackingCheck, check_packing
from tunesmith.models.resolve_model import ModelRef
from tunesmith.models.vision import part_modules, vision_of
from tunesmith.recipe.schema import Data, DataFile
from tunesmith.tasks import TASKS
from tunesmith.types import IGNORE, Batch, Example, Layout, Row, images_of

PACKED_FAMILIES = often([name for name in FAMILIES if name not in ("gemma3", "gemma4", "qwen3_5")], "qwen3_vl")


@lru_cache
def seen(family: str) -> Any:
    """(model, renderer, examples, rows) of the four rows of `tiny_vision.ROWS`."""
    folder = Path(mkdtemp())
    located = ModelRef("folder", vision_folder(folder / "model", family), family)
    tokenizer = load_tokenizer(located, None)
    data = Data(train=(DataFile(path=str(rows_with_images(folder / "rows"))),))
    problems: list[Any] = []
    read = [example for _, example in examples(data.train, data, problems.append)]
    renderer = Renderer(
        tokenizer, TASKS["chat"], max_tokens=2048, too_long="error", control_tokens="error",
        placeholders=vision_of(tokenizer),
    )  # fmt: skip
    rows = [row for encoded in renderer.encode(read) for row in encoded]
    assert problems == []
    assert all(isinstance(row, Row) for row in rows)
    model = load_model(located, dtype=torch.float32, device="cpu", tokenizer=tokenizer)
    processor = renderer.placeholders._processor
    processor.video_processor = SimpleNamespace(num_frames=1, fps=1, video_sampling={}, size={})  # which SmolVLM's asks
    return model, renderer, read, rows


def as_batch(
    renderer: Renderer,
    read: list[Example],
    rows: list[Row],
    members: tuple[int, ...] = (0, 1, 2, 3),
    layout: Layout = "padded",
) -> Batch:
    batch = build_batch([rows[i] for i in members], tuple(members), layout=layout, device="cpu")
    return replace(batch, images=renderer.batch_images([read[i].images for i in members]))


def conversation(example: Example, *, answered: bool = True) -> list[dict[str, Any]]:
    """The row as transformers' processors take it, with its pictures."""
    messages = []
    for part in example.parts if answered else example.last_prompt:
        pieces, start = [], 0
        for place, image in part.images:
            pieces += [{"type": "text", "text": part.text[start:place]}] if place > start else []
            pieces.append({"type": "image", "image": pixels_of(image)})
            start = place
        pieces += [{"type": "text", "text": part.text[start:]}] if start < len(part.text) else []
        messages.append({"role": part.role, "content": pieces})
    return messages


def own_inputs(renderer: Renderer, read: list[Example]) -> dict[str, Any]:
    """What the model's own processor makes of all rows together."""
    processor = renderer.placeholders._processor
    processor.tokenizer.padding_side = "right"
    texts = [processor.apply_chat_template(conversation(example), tokenize=False) for example in read]
    pictures = [[pixels_of(image) for image in example.images] for example in read]
    flat = [picture for of_row in pictures for picture in of_row]
    nested = type(processor).__mro__[1].__name__ in (
        "Idefics3Processor", "SmolVLMProcessor", "Gemma3Processor", "Gemma4Processor", "LlavaOnevisionProcessor"
    )  # fmt: skip
    made = processor(
        images=pictures if nested else flat, text=texts, return_tensors="pt", padding=True, padding_side="right",
        add_special_tokens=False,
    )  # fmt: skip
    return {key: value for key, value in made.items() if key not in ("num_crops",)}


@pytest.mark.parametrize("family", EACH_FAMILY)
def test_the_ids_of_a_row_are_those_of_the_processor(family: str) -> None:
    _, renderer, read, rows = seen(family)
    processor = renderer.placeholders._processor
    for example, row in zip(read, rows, strict=True):
        made = processor.apply_chat_template(conversation(example), tokenize=True, return_dict=True)
        assert row.ids.tolist() == list(made["input_ids"][0])
        assert row.images == tuple(image.number for image in images_of(example.parts))


@pytest.mark.parametrize("family", EACH_FAMILY)
def test_logits_loss_and_gradients_are_those_of_the_own_forward(family: str) -> None:
    model, renderer, read, rows = seen(family)
    batch = as_batch(renderer, read, rows)
    model.requires_grad_(True)
    model.zero_grad()
    logits_NV = logits_at_targets(model, batch)
    loss = F.cross_entropy(logits_NV, batch.targets_N, reduction="sum")
    loss.backward()
    logits_NV = logits_NV.detach()
    ours = {name: weight.grad for name, weight in model.named_parameters()}
    model.zero_grad(set_to_none=True)

    inputs = own_inputs(renderer, read)
    labels_BT = hand_labelled(renderer, read, inputs["input_ids"])
    own_BTV = model(**inputs).logits
    own_loss = F.cross_entropy(own_BTV[:, :-1].flatten(0, 1), labels_BT[:, 1:].flatten(), reduction="sum")
    own_loss.backward()
    places = (labels_BT[:, 1:] != IGNORE).nonzero()
    own_NV = own_BTV[places[:, 0], places[:, 1]].detach()
    assert (logits_NV - own_NV).abs().max() <= 1e-5 * own_NV.abs().max()
    assert loss.item() == pytest.approx(own_loss.item(), rel=1e-5)
    for name, weight in model.named_parameters():
        if weight.grad is None:  # Siglip's pooling head, which nothing reads
            assert ours[name] is None or not ours[name].any()
            continue
        assert (ours[name] - weight.grad).norm() <= 1e-5 * max(float(weight.grad.norm()), 1e-3), name
    model.zero_grad(set_to_none=True)


def hand_labelled(renderer: Renderer, read: list[Example], ids_BT: torch.Tensor) -> torch.Tensor:
    """The answers with the token that closes them, found by tokenizing what is before them."""
    processor = renderer.placeholders._processor
    labels_BT = torch.full_like(ids_BT, IGNORE)
    for b, example in enumerate(read):
        for index, part in enumerate(example.parts):
            if not part.trained:
                continue
            if renderer.placeholders.sees_several:  # a beginning with fewer images is another text
                answer = processor.tokenizer(f"{part.text}<|im_end|>", add_special_tokens=False).input_ids
                (start,) = (t for t in range(len(ids_BT[b])) if ids_BT[b, t : t + len(answer)].tolist() == answer)
                labels_BT[b, start : start + len(answer)] = ids_BT[b, start : start + len(answer)]
                continue
            lengths = []
            for shown, prompt in ((index, True), (index + 1, False)):
                messages = conversation(example)[:shown]
                made = processor.apply_chat_template(
                    messages, tokenize=True, return_dict=True, add_generation_prompt=prompt
                )
                lengths.append(len(made["input_ids"][0]))
            start, end = lengths[0], lengths[1] - 1  # without the line break of the template
            labels_BT[b, start:end] = ids_BT[b, start:end]
    return labels_BT


def learnt(model: Any, batch: Batch) -> tuple[torch.Tensor, float, dict[str, torch.Tensor]]:
    """Logits, loss and gradients of a batch."""
    model.requires_grad_(True)
    model.zero_grad(set_to_none=True)
    logits_NV = logits_at_targets(model, batch)
    loss = F.cross_entropy(logits_NV, batch.targets_N, reduction="sum")
    loss.backward()
    gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad(set_to_none=True)
    return logits_NV.detach(), loss.item(), gradients


def checked(family: str, dtype: torch.dtype = torch.float32) -> PackingCheck:
    """Whether the family's four rows may be packed, as a run finds it out."""
    model, renderer, read, rows = seen(family)
    of_row = {row.images: example.images for row, example in zip(rows, read, strict=True)}
    model.to(dtype)
    try:
        return check_packing(model, "causal", rows, images_of=lambda row: renderer.batch_images([of_row[row.images]]))
    finally:
        model.to(torch.float32)
        kept_vectors(model).entries.clear()  # of another type


@pytest.mark.parametrize("family", PACKED_FAMILIES)
def test_packed_rows_are_learnt_as_padded_ones(family: str, monkeypatch: pytest.MonkeyPatch) -> None:  # trap: I21
    model, renderer, read, rows = seen(family)
    found = checked(family)
    assert (found.reason, found.error < 1e-5) == ("", True)
    padded_NV, padded_loss, padded = learnt(model, as_batch(renderer, read, rows))
    use_packed_attention(model)

    def check() -> None:
        batch = pad_to_multiple(as_batch(renderer, read, rows, layout="packed"))
        packed_NV, loss, packed = learnt(model, batch)
        assert batch.filling
        assert (packed_NV - padded_NV).abs().max() <= 1e-5 * padded_NV.abs().max()
        assert loss == pytest.approx(padded_loss, rel=1e-5)
        assert packed.keys() == padded.keys()
        for name, gradient in packed.items():
            assert (gradient - padded[name]).norm() <= 1e-5 * max(float(padded[name].norm()), 1e-3), name

    def of_one_kind(body: Any, ids_1T: Any, is_image_1T: Any, grids: Any, lengths: Any) -> torch.Tensor:
        return torch.cat([torch.arange(num) for num in lengths]).expand(3, 1, -1)

    try:
        check()
        if hasattr(model.base_model, "get_rope_index"):
            monkeypatch.setattr(image_features, "_packed_positions", of_one_kind)
            with pytest.raises(AssertionError):
                check()
    finally:
        model.set_attn_implementation("sdpa")


@pytest.mark.slow
def test_gemma_4_is_packed_where_it_reads_one_way(monkeypatch: pytest.MonkeyPatch) -> None:
    model, renderer, read, rows = seen("gemma4")
    monkeypatch.setattr(model.config.get_text_config(), "use_bidirectional_attention", None)
    assert checked("gemma4").reason == ""
    padded_NV, *_ = learnt(model, as_batch(renderer, read, rows))
    use_packed_attention(model)
    try:
        packed_NV, *_ = learnt(model, as_batch(renderer, read, rows, layout="packed"))
    finally:
        model.set_attn_implementation("sdpa")
    assert (packed_NV - padded_NV).abs().max() <= 1e-5 * padded_NV.abs().max()


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("gemma3", "it reads the tokens of an image in both directions"),
        pytest.param("gemma4", "it reads the tokens of an image in both directions", marks=pytest.mark.slow),
        pytest.param("qwen3_5", "linear_attention layers: they carry a state", marks=pytest.mark.slow),
    ],
)
def test_rows_are_padded_where_packing_would_change_them(
    family: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:  # trap: I22
    def check() -> None:
        assert checked(family, torch.bfloat16).reason.startswith(reason)

    def unseen(*args: Any, **settings: Any) -> Any:
        return None if attention._TRACE.get() is not None else attention.sdpa_mask(*args, **settings)

    check()
    if family == "gemma3":  # in bfloat16 the difference is within what rounding may be
        monkeypatch.setattr(attention, "packed_mask", unseen)
        with pytest.raises(AssertionError):
            check()


@torch.no_grad()
def test_tokens_of_an_image_are_read_both_ways_where_the_model_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # trap: I4
    model, renderer, read, rows = seen("gemma3")
    batch = as_batch(renderer, read, rows)
    inputs = own_inputs(renderer, read)
    with eval_mode(model):
        own_NV = model(**inputs).logits.flatten(0, 1)[batch.predict_N]

        def check() -> None:
            assert torch.allclose(logits_at_targets(model, batch), own_NV, atol=1e-5)

        check()
        monkeypatch.setattr(image_features, "TYPE_NAMES", ())
        with pytest.raises(AssertionError):
            check()


def test_a_placeholder_that_a_user_typed_is_a_problem_of_the_row() -> None:  # trap: I11
    _, renderer, read, _ = seen("llava")
    asked = read[1].parts[0]
    typed = replace(read[1], parts=(replace(asked, text=f"{asked.text} <image>"), *read[1].parts[1:]))

    def check(one: Renderer) -> None:
        assert [problem.code for problem in one.encode([typed])[0]] == ["control_token"]

    check(renderer)
    trusting = Renderer(
        renderer.tokenizer, TASKS["chat"], max_tokens=2048, too_long="error", control_tokens="allow",
        placeholders=renderer.placeholders,
    )  # fmt: skip
    with pytest.raises(AssertionError):
        check(trusting)
    assert [problem.code for problem in trusting.encode([typed])[0]] == ["template_error"]


def test_a_template_that_takes_lists_gets_lists() -> None:  # trap: I15
    _, renderer, _, rows = seen("idefics3")

    def check(one: Any) -> None:
        assert "What is the" in renderer.tokenizer.decode(one.ids)

    check(rows[0])
    strings = renderer.tokenizer.apply_chat_template([{"role": "user", "content": "What is the 0?"}], return_dict=True)
    with pytest.raises(AssertionError):
        check(SimpleNamespace(ids=strings["input_ids"]))


@pytest.mark.parametrize("family", EACH_FAMILY)
def test_parts_cover_the_model_and_share_nothing(family: str) -> None:
    model = seen(family)[0]
    parts = part_modules(model)
    owners = [
        [word for word, modules in parts.items() if is_inside(name, modules)] for name, _ in model.named_parameters()
    ]
    assert {len(of_weight) for of_weight in owners} == {1}
    assert {word for (word,) in owners} == {"language", "projector", "vision"}


@torch.no_grad()
@pytest.mark.parametrize("family", EACH_FAMILY)
def test_vectors_that_are_kept_give_the_same_bits(family: str) -> None:
    model, renderer, read, rows = seen(family)
    model.requires_grad_(False)
    try:
        before = kept_vectors(model).computed
        first, again = (logits_at_targets(model, as_batch(renderer, read, rows)) for _ in range(2))
        assert torch.equal(first, again)
        assert kept_vectors(model).computed == before + 5
    finally:
        model.requires_grad_(True)


def test_an_image_of_several_is_read_in_another_way_than_alone() -> None:  # trap: I23
    """LLaVA-OneVision cuts one into tiles that stands alone in its row."""
    _, renderer, read, _ = seen("llava_onevision")
    vision = renderer.placeholders
    width, height = read[1].images[0].width, read[1].images[0].height
    assert vision.expand(width, height, several=True) != vision.expand(width, height)

    def check(images: Any) -> None:
        alone, first, *_ = images
        assert alone.key == (alone.key[0], False) != first.key
        tiles = [int(image.pixels()["pixel_values"].shape[1]) for image in (alone, first)]
        assert tiles[0] > tiles[1] == 1

    check(renderer.batch_images([example.images for example in read]))
    with pytest.raises(AssertionError):
        check(renderer.batch_images([[image] for example in read for image in example.images]))
