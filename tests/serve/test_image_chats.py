"""Images in requests: the answer is that of `predict`, in this process and over HTTP; what is not read is refused."""

import base64
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from serve.batches import Heard
from serve.engines import engine_over
from serve.fake import MODELS, FakeEngine
from serve.running import running
from tiny_run import model_folder
from tiny_vision import EACH_FAMILY, picture, png, vision_folder
from tunesmith.cli.chat import ChatSpeaker, Conversation
from tunesmith.data.images import look_at
from tunesmith.errors import InputError
from tunesmith.generation.decoder import KEPT_BYTES
from tunesmith.generation.padded import generate
from tunesmith.inference import load as loading
from tunesmith.inference.predict import Predictor, predict_file, predict_to
from tunesmith.models.image_features import kept_vectors
from tunesmith.models.vision import Vision
from tunesmith.recipe.schema import Limits
from tunesmith.serve import served_model
from tunesmith.serve.protocol import EngineOptions, GenerationRequest, RequestError
from tunesmith.serve.registry import LocalEngine
from tunesmith.serve.request_schemas import ChatBody
from tunesmith.types import ImageRef, Part, images_of

OPTIONS = EngineOptions(max_new_tokens=8, streams=1)
CONTENT = png(picture(7, 20, 32))
IMAGE = [(0, 0, base64.b64encode(CONTENT).decode())]


def body(*parts: Any, role: str = "user") -> ChatBody:
    content = [*parts, {"type": "text", "text": "What is it?"}]
    return ChatBody(model="", messages=[{"role": role, "content": content}], temperature=0.0)


def image_part(content: bytes = CONTENT) -> dict[str, Any]:
    url = "data:image/png;base64," + base64.b64encode(content).decode()
    return {"type": "image_url", "image_url": {"url": url}}


def engine_of(folder: Path, family: str) -> LocalEngine:
    return LocalEngine(loading.load_model(str(vision_folder(folder / family, family)), offline=True), lambda text: None)


def answered(engine: LocalEngine, request: GenerationRequest) -> Any:
    heard = Heard()
    for told in engine.generate(request, OPTIONS):
        heard.hear(told)
    return heard.answer()


@pytest.mark.parametrize("family", EACH_FAMILY)
def test_an_answer_is_that_of_generation(family: str, tmp_path: Path) -> None:
    engine = engine_of(tmp_path, family)
    loaded = engine.model.loaded
    assert engine.model.card.sees
    for shown in ([image_part()], [image_part(), image_part(png(picture(8, 16, 16)))], []):
        request = body(*shown).to_request()
        refs = [look_at(ImageRef(data=base64.b64decode(content)), Path(), Limits()) for *_, content in request.images]
        part = Part("user", "What is it?", False, images=tuple((0, ref) for ref in refs))
        ids = loaded.renderer.prompt_ids([part])
        (expected,) = generate(loaded.model, loaded.renderer, [ids], 8, images=[images_of([part])])
        assert answered(engine, request) == expected


def test_another_image_is_another_answer(tmp_path: Path) -> None:  # trap: I14
    """A test that passes with any image shows nothing: a fresh Gemma 3 has a projector of zeros."""
    engine = engine_of(tmp_path, "gemma3")
    model = engine.model.loaded.model

    def check() -> None:
        logits = []
        for number in (7, 8):
            prepared = engine.model.prepare(0, body(image_part(png(picture(number)))).to_request(), OPTIONS)
            decoder = engine.model.decoder_of(prepared)
            slot = decoder.open(None, len(prepared.prompt))
            decoder.show(slot, prepared.images)
            logits.append(decoder.step({}, [(slot, prepared.prompt)])[1])
        assert not torch.allclose(*logits)

    check()
    with torch.no_grad():
        model.base_model.multi_modal_projector.mm_input_projection_weight.zero_()
    with pytest.raises(AssertionError):
        check()


@pytest.mark.parametrize(
    ("url", "code"),
    [
        ("https://example.org/a.png", "invalid_messages"),
        ("http://169.254.169.254/latest", "invalid_messages"),
        ("/etc/passwd", "image_address"),
        ("../secret.png", "image_address"),
        ("data:image/png;base64,@@", "invalid_messages"),
    ],
)
def test_no_address_and_no_file_is_opened(url: str, code: str) -> None:  # trap: I12
    with pytest.raises(RequestError) as refused:
        body({"type": "image_url", "image_url": {"url": url}}).to_request()
    assert (refused.value.status, refused.value.code) == (400, code)

    def check(request: GenerationRequest) -> None:
        assert all(base64.b64decode(content) for *_, content in request.images)

    check(body(image_part()).to_request())
    with pytest.raises(AssertionError):  # a path that were taken along
        check(GenerationRequest("", images=((0, 0, ""),)))


def test_a_damaged_image_is_refused_and_so_is_one_for_a_text_model(tmp_path: Path) -> None:
    engine = engine_of(tmp_path, "llava")
    with pytest.raises(RequestError) as refused:
        answered(engine, body(image_part(CONTENT[:200])).to_request())
    assert "damaged_image" in str(refused.value)
    with pytest.raises(RequestError, match="not an image"):
        answered(engine, body(image_part(b"<html>")).to_request())
    text = LocalEngine(loading.load_model(str(model_folder(tmp_path / "text")), offline=True), lambda text: None)
    with pytest.raises(RequestError, match="reads text alone"):
        answered(text, body(image_part()).to_request())
    with pytest.raises(RequestError, match="role assistant"):
        body(image_part(), role="assistant").to_request()


def test_images_are_prepared_before_the_step_that_reads_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever fails there is that request's error: the step has answers of others in it."""
    engine = engine_of(tmp_path, "qwen3_vl")
    vision, seen = engine.model.renderer.placeholders, list[Any]()

    def prepared(picture: Any, **how: Any) -> Any:
        seen.append(picture)
        return Vision.pixels(vision, picture, **how)

    monkeypatch.setattr(vision, "pixels", prepared)
    request = body(image_part(), image_part(png(picture(8, 16, 16)))).to_request()
    small = engine.model.prepare(0, request, OPTIONS)
    assert len(seen) == 2
    for image in small.images:
        image.pixels()
    assert len(seen) == 2
    monkeypatch.setattr(served_model, "PREPARED_BYTES", 1)
    large = engine.model.prepare(0, request, OPTIONS)
    for image in large.images:
        image.pixels()
    assert len(seen) == 6

    def fails(picture: Any, **how: Any) -> Any:
        raise ValueError("the model's processor refuses 20 × 32 pixels: no such patch.")

    monkeypatch.setattr(vision, "pixels", fails)
    with pytest.raises(RequestError, match=r"messages\[0\]: its image cannot be prepared: .* no such patch") as refused:
        engine.model.prepare(0, request, OPTIONS)
    assert (refused.value.status, refused.value.code) == (400, "damaged_image")


def test_what_images_take_of_a_server_is_bounded(tmp_path: Path) -> None:
    engine = engine_of(tmp_path, "llava")
    request = body(*[image_part()] * (Limits().images + 1)).to_request()
    with pytest.raises(RequestError, match="at most 64") as refused:
        engine.model.prepare(0, request, OPTIONS)
    assert (refused.value.status, refused.value.code) == (400, "too_many_images")
    assert engine.model.prepare(0, body(image_part()).to_request(), OPTIONS).sampling.images == ()
    assert kept_vectors(engine.model.decoder.model).room <= KEPT_BYTES


def test_a_model_for_single_prompts_refuses_images(tmp_path: Path) -> None:
    """Its prompt would have no place for them, and the pass would end the process of the server."""
    folder = str(vision_folder(tmp_path / "llava", "llava"))
    engine = LocalEngine(loading.load_model(folder, task="generate", offline=True), lambda text: None)
    assert not engine.model.card.sees
    request = GenerationRequest("", messages=({"role": "user", "content": "What is it?"},), images=IMAGE)
    with pytest.raises(RequestError, match="reads text alone"):
        engine.model.prepare(0, request, OPTIONS)


def test_chat_shows_an_image_and_remembers_it(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(CONTENT)
    conversation = Conversation(
        [ChatSpeaker("", engine_of(tmp_path, "llava"))], GenerationRequest("", temperature=0.0), 4, as_json=True
    )
    conversation.show(tmp_path / "a.png")
    conversation.send("What is it?")
    conversation.send("And now?")
    assert [(message, place) for message, place, _ in conversation.images] == [(0, 0)]
    with pytest.raises(InputError, match="cannot be read"):
        conversation.show(tmp_path / "missing.png")
    conversation.show(tmp_path / "a.png")
    conversation.reset()
    assert conversation.images == conversation.pending == []


def test_predict_answers_rows_and_writes_rows(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(CONTENT)
    rows = [{"images": ["a.png"], "prompt": "What is it?"}, {"images": ["b.png"], "prompt": "What is it?"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    loaded = loading.load_model(str(vision_folder(tmp_path / "model", "llava")), task="chat", offline=True)
    lines: list[Any] = []
    predict_file(Predictor(loaded, max_new_tokens=4), str(tmp_path / "rows.jsonl"), lines.extend)
    asked, answer = lines[0]["messages"]
    assert asked["content"][0] == {"type": "image_url", "image_url": {"url": str((tmp_path / "a.png").resolve())}}
    assert answer["role"] == "assistant"
    assert lines[1]["error"].startswith("no_such_image")


def test_a_continued_file_of_answers_sees_a_changed_image(tmp_path: Path) -> None:
    """Rows name an image by its path: with new pixels under it the file would have answers to two pictures."""
    lines = []
    for number in range(70):  # more than a chunk
        (tmp_path / f"{number}.png").write_bytes(png(picture(number)))
        lines.append({"images": [f"{number}.png"], "prompt": "What is it?"})
    path, out = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    loaded = loading.load_model(str(vision_folder(tmp_path / "model", "llava")), task="chat", offline=True)
    predictor = Predictor(loaded, max_new_tokens=1)

    def stop(done: int, total: int) -> None:
        if out.with_name("out.jsonl.part").stat().st_size:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        predict_to(out, predictor, str(path), progress=stop)
    (tmp_path / "3.png").write_bytes(png(picture(99)))
    with pytest.raises(InputError, match="started with something else: images was"):
        predict_to(out, predictor, str(path))
    (tmp_path / "3.png").write_bytes(png(picture(3)))
    assert predict_to(out, predictor, str(path)).answered == 70


def test_a_body_may_be_large_where_a_model_sees() -> None:
    large = image_part(CONTENT + bytes(2 << 20))
    asked = {"model": "support", "messages": [{"role": "user", "content": [large, {"type": "text", "text": "What?"}]}]}
    for sees, status in ((False, 413), (True, 200)):
        engine = FakeEngine(served=[replace(card, sees=sees) for card in MODELS])
        with running(engine=engine) as server:
            assert server.ask("POST", "/v1/chat/completions", asked)[0] == status
            assert server.ask("POST", "/v1/completions", {"model": "support", "prompt": "x" * (2 << 20)})[0] == 413
        if sees:
            ((message, place, content),) = engine.asks[0].images
            assert (message, place, base64.b64decode(content)[: len(CONTENT)]) == (0, 0, CONTENT)


@pytest.mark.slow
def test_a_worker_answers_as_this_process_does(tmp_path: Path) -> None:
    """Images cross to the process that holds the model, and text alone is answered among others as ever."""
    folder = vision_folder(tmp_path / "qwen", "qwen2_5_vl")
    here = LocalEngine(loading.load_model(str(folder), offline=True), lambda text: None)
    with engine_over([str(folder)], tmp_path) as asked:
        for shown in ([image_part()], []):
            request = replace(body(*shown).to_request(), model="qwen", max_tokens=8)
            assert asked.answer(request).answer() == answered(here, request)
