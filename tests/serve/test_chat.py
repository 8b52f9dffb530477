"""One model asked in this process: what is told is what generation answers, and giving up leaves nothing behind."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from serve.batches import Heard, sharp
from tiny_run import model_folder
from tiny_tasks import task_recipe
from tunesmith.cli.chat import ChatSpeaker, Conversation, open_speakers
from tunesmith.generation import padded
from tunesmith.inference import load as loading
from tunesmith.inference.load import LoadedModel
from tunesmith.serve.protocol import Delta, EngineOptions, GenerationRequest, RequestError
from tunesmith.serve.registry import LocalEngine
from tunesmith.training import trainer as training
from tunesmith.types import Part

OPTIONS = EngineOptions(max_new_tokens=12, streams=1)
QUESTIONS = ("hello", "The quick brown fox jumps over the lazy dog. What is the tallest mountain?")


def question(text: str, **how: Any) -> GenerationRequest:
    return GenerationRequest("", messages=({"role": "user", "content": text},), temperature=0.0, **how)


def speaker_of(folder: Path, arch: str) -> LoadedModel:
    path = model_folder(folder / arch, arch)
    sharp(arch).save_pretrained(path)
    return loading.load_model(str(path), offline=True)


def expected(speaker: LoadedModel, text: str) -> padded.GeneratedAnswer:
    prompt = speaker.renderer.prompt_ids([Part("user", text, trained=False)])
    return padded.generate(speaker.model, speaker.renderer, [prompt], 12)[0]


@pytest.mark.parametrize("arch", ["llama", "gpt2", "bloom"])
def test_what_is_told_is_what_generation_answers(tmp_path: Path, arch: str) -> None:
    speaker = speaker_of(tmp_path, arch)
    answers = [expected(speaker, text) for text in QUESTIONS]
    notes: list[str] = []
    alone = LocalEngine(speaker, notes.append)
    assert bool(notes) == (arch == "bloom"), "its attention is its own, which is said"
    for text, answer in zip(QUESTIONS, answers, strict=True):
        heard = Heard()
        for told in alone.generate(question(text), OPTIONS):
            heard.hear(told)
        assert heard.answer() == answer


def test_a_summary_is_asked_for_as_in_training(tmp_path: Path) -> None:
    recipe = task_recipe(tmp_path, "summarize", "encoder_decoder", train={"epochs": 1})
    speaker = loading.load_run(training.train(recipe, root=tmp_path / "runs", offline=True), offline=True)
    heard = Heard()
    for told in LocalEngine(speaker, lambda text: None).generate(question("red apple"), OPTIONS):
        heard.hear(told)
    assert heard.answer() == expected(speaker, "red apple")


def test_giving_up_leaves_nothing(tmp_path: Path) -> None:
    speaker = speaker_of(tmp_path, "llama")
    answer = expected(speaker, QUESTIONS[0])
    alone = LocalEngine(speaker, lambda text: None)
    told = alone.generate(question(QUESTIONS[1]), OPTIONS)
    next(told)
    told.close()
    pieces = [one.text for one in alone.generate(question(QUESTIONS[0]), OPTIONS) if isinstance(one, Delta)]
    assert "".join(pieces) == answer.text


class Interrupted(LocalEngine):
    """Somebody presses Ctrl-C after the first piece of the second answer."""

    num_asked = 0

    def generate(self, *asked: Any) -> Iterator[Any]:  # type: ignore[override]
        self.num_asked += 1
        for told in super().generate(*asked):
            yield told
            if self.num_asked == 2 and isinstance(told, Delta):
                raise KeyboardInterrupt


def talk_with(speaker: LoadedModel, kind: type[LocalEngine] = LocalEngine, **how: Any) -> Conversation:
    alone = kind(speaker, lambda text: None)
    return Conversation([ChatSpeaker("", alone)], GenerationRequest("", temperature=0.0), 5, **how)


def typed(talk: Conversation, monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    left = iter([*lines, "/exit"])
    monkeypatch.setattr("builtins.input", lambda prompt="": next(left))
    talk.run()


def test_ctrl_c_ends_an_answer_and_not_the_conversation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    talk = talk_with(speaker_of(tmp_path, "llama"), Interrupted)
    typed(talk, monkeypatch, "hello", "what is tallest", "yes please")
    said = [message["content"] for message in talk.messages if message["role"] == "user"]
    assert said == ["hello", "yes please"], "what was not answered is not part of the conversation"
    assert "(answer stopped)" in capsys.readouterr().out


def test_a_mistyped_command_is_not_sent_to_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    talk = talk_with(speaker_of(tmp_path, "llama"))
    typed(talk, monkeypatch, "/foo", "/usr/bin is full", "/reset")
    assert "no command /foo; /help lists them" in capsys.readouterr().out
    talk = talk_with(speaker_of(tmp_path, "llama"))
    typed(talk, monkeypatch, "/foo", "/usr/bin is full")
    assert [one["content"] for one in talk.messages if one["role"] == "user"] == ["/usr/bin is full"]


def test_a_full_window_is_said_with_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    talk = talk_with(speaker_of(tmp_path, "llama"))
    typed(talk, monkeypatch, "please " * 600, "hello")
    out = capsys.readouterr().out
    assert "are more than the 512" in out.replace("\n", " ")
    assert "/reset forgets the conversation" in out.replace("\n", " ")
    assert talk.messages[0]["content"] == "hello"


def test_an_answer_that_was_cut_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    talk = talk_with(speaker_of(tmp_path, "llama"))
    talk.send("hello")
    assert "cut after 5 tokens: --max-tokens for more" in capsys.readouterr().out
    with pytest.raises(RequestError):
        talk.send("please " * 600)


def test_compared_answers_come_from_one_model(tmp_path: Path) -> None:
    from serve.engines import two_runs

    first, _ = two_runs(tmp_path)
    heard: dict[str, Any] = {}
    voices = open_speakers(str(first.path), root=tmp_path, base=False, compare=True, offline=True, note=print)
    assert voices[0].engine is voices[1].engine
    for name, speaker in (("before", loading.load_base(first)), ("after", loading.load_run(first))):
        heard[name] = expected(speaker, "hello").text
    talk = Conversation(voices, GenerationRequest("", temperature=0.0), 12)
    assert talk.send("hello") == heard
    assert heard["before"] != heard["after"]
