"""Public names: the file of bases, and the engines behind them."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from serve.fake import FakeEngine
from tunesmith.errors import InputError
from tunesmith.jobs.bases import bases_of_file, bases_of_model
from tunesmith.jobs.engines import Engines, EnginesFromThread
from tunesmith.serve.protocol import Finished, GenerationRequest

GOOD = """
bases:
  small:
    model: owner/model
    aliases: {gpt-4o-mini: gpt-4o-mini-2024-07-18}
    recipe: {method: {name: lora, rank: 4}}
min_examples: 3
"""


def read(tmp_path: Path, text: str):
    path = tmp_path / "bases.yaml"
    path.write_text(text)
    return bases_of_file(path)


def test_every_name_leads_to_its_base(tmp_path: Path) -> None:
    bases = read(tmp_path, GOOD)
    shown = ("small", "gpt-4o-mini-2024-07-18")
    expected = {"small": ("small", "small"), "gpt-4o-mini": shown, "gpt-4o-mini-2024-07-18": shown}
    assert bases.names == expected
    assert bases.min_examples == 3
    assert bases.bases["small"].model == "owner/model"


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("small:", "a/b:", "no colon and no slash"),
        ("gpt-4o-mini:", "ft-x:y:", ""),
        ("model: owner/model", "modle: owner/model", "bases.small.modle"),
        ("rank: 4", "rank: none", "method.rank"),
        ("name: lora, rank: 4", "name: full", "only lora can"),
        ("min_examples: 3", "min_examples: 0", "min_examples"),
        ("min_examples: 3", "  other: {model: m, aliases: {gpt-4o-mini: x}}", "a name of two bases, small and other"),
        (GOOD, "bases: {}", "bases"),
        (GOOD, "- 1", ""),
    ],
)
def test_a_fault_is_named(tmp_path: Path, old: str, new: str, words: str) -> None:
    with pytest.raises(InputError) as caught:
        read(tmp_path, GOOD.replace(old, new))
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("model", "name"),
    [("owner/Model-1.5B", "Model-1.5B"), ("owner/m@main", "m"), ("./a b", "a-b"), ("dir/x.gguf", "x")],
)
def test_the_one_model_has_the_last_part_of_its_name(model: str, name: str) -> None:
    assert list(bases_of_model(model).names) == [name]


def test_an_alias_is_answered_by_its_base(tmp_path: Path) -> None:
    engine = FakeEngine()
    engines = Engines({"small": engine}, read(tmp_path, GOOD))
    names = [card.name for card in engines.served]
    assert names[:3] == ["small", "gpt-4o-mini", "gpt-4o-mini-2024-07-18"]
    assert "owner/base" not in names

    async def ask(name: str) -> list[object]:
        messages = [{"role": "user", "content": "one two"}]
        return [event async for event in engines.generate(GenerationRequest(name, messages=messages))]

    for name in ("gpt-4o-mini", "small"):
        assert isinstance(asyncio.run(ask(name))[-1], Finished)
    assert {request.model for request in engine.asks} == {"owner/base"}
    assert engines.state() == engine.state()


def test_an_engine_that_does_not_answer_is_a_reason_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = list[str]()

    class Silent(FakeEngine):
        async def attach(self, name: str, run: Path) -> None:
            try:
                await asyncio.Event().wait()
            finally:
                ended.append(name)

    async def attach() -> None:
        models = EnginesFromThread(Engines({"small": Silent()}, read(tmp_path, GOOD)), asyncio.get_running_loop())
        with pytest.raises(TimeoutError, match=r"the engine did not answer within 0\.1 s"):
            await asyncio.to_thread(models.attach, "small", "ft:small", tmp_path)
        await asyncio.sleep(0.05)
        assert ended == ["ft:small"], "it would be served later, though its job failed"

    monkeypatch.setattr("tunesmith.jobs.engines.ATTACH_TIMEOUT_S", 0.1)
    asyncio.run(attach())
