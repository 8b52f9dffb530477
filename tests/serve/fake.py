"""An engine without a model: it answers with what it was asked, so that a test can say what must come out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from tunesmith.serve.protocol import (
    Delta,
    EngineState,
    Finished,
    GenerationRequest,
    ModelCard,
    RequestError,
    Started,
    StreamEvent,
    Token,
)

MODELS = (
    ModelCard("support", "chat", "text", 512, is_base=False, created=1_700_000_000),
    ModelCard("owner/base", "chat", "text", 512, is_base=True, created=1_600_000_000, calls="hermes"),
    ModelCard("mood", "classify", "labels", 64, is_base=False, created=1_700_000_001, labels=("good", "bad")),
    ModelCard("vectors", "text", "embeddings", 64, is_base=True, created=1_600_000_000),
)


def words_of(ask: GenerationRequest) -> list[str]:
    """The tokens of the answer: the last thing that was said, word by word."""
    said = str(ask.messages[-1]["content"]) if ask.messages else ask.prompt
    return [word if i == 0 else f" {word}" for i, word in enumerate(str(said).split(" "))]


@dataclass
class FakeEngine:
    """Says each word of the question, of which the first can tell it how: SLOW, CRASH, FULL, FAULT; then ENDLESS."""

    served: Sequence[ModelCard] = MODELS
    asks: list[GenerationRequest] = field(default_factory=list)
    open: int = 0
    most_open: int = 0
    closed_with: float | None = None
    alive: bool = True
    pause_s: float = 0.05
    last_said: ClassVar[str] = ""

    async def generate(self, ask: GenerationRequest) -> AsyncGenerator[StreamEvent, None]:
        self.asks.append(ask)
        words = words_of(ask)
        FakeEngine.last_said = "".join(words)
        first, second = [*words, "", ""][:2]
        if first == "FULL":
            raise RequestError("The queue is full.", status=429, code="queue_full")
        if first == "FAULT":
            raise RuntimeError("the prompt was: my secret")
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        try:
            await asyncio.sleep(0)
            yield Started(len(words) + 2)
            limit = len(words) if ask.max_tokens is None else ask.max_tokens
            for index in range(ask.n):
                for i, word in enumerate(words[:limit]):
                    await asyncio.sleep(self.pause_s if first == "SLOW" else 0)  # as for events of a worker
                    if self.closed_with is not None and second == " ENDLESS":
                        raise RequestError("The server is ending.", status=503, code="stopping")
                    yield Delta(index, word, self._chances(word, ask.logprobs))
                    if first == "CRASH" and i == 0:
                        raise RequestError("The model crashed; it is started again.", status=500, code="engine_crashed")
                yield Finished(index, "stop" if limit >= len(words) else "length", min(limit, len(words)))
        finally:
            self.open -= 1

    @staticmethod
    def _chances(word: str, num: int | None) -> list[Token]:
        def token(text: str, logprob: float) -> dict[str, object]:
            return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

        likeliest = [token(word if i == 0 else f"other{i}", -0.5 - i) for i in range(num or 0)]
        return [] if num is None else [{**token(word, -0.5), "top_logprobs": likeliest}]

    async def read(self, model: str, texts: object, **how: object) -> object:
        return await (self.embed if model == "vectors" else self.classify)(model, texts)  # type: ignore[arg-type]

    async def classify(self, model: str, texts: Sequence[str | tuple[str, str]]) -> list[Mapping[str, object]]:
        return [{"label": "good", "probabilities": {"good": 0.75, "bad": 0.25}} for _ in texts]

    async def embed(self, model: str, texts: Sequence[str]) -> tuple[list[list[float]], int]:
        return [[float(len(text)), 0.5] for text in texts], sum(len(text.split()) for text in texts)

    async def detach(self, name: str) -> None:
        self.served = tuple(card for card in self.served if card.name != name)

    def state(self) -> EngineState:
        return EngineState(self.alive, self.open, 0, 3, 100, 200)

    async def close(self, grace_s: float) -> None:
        begun = asyncio.get_running_loop().time()
        while self.open and asyncio.get_running_loop().time() - begun < grace_s:
            await asyncio.sleep(0.01)
        self.closed_with = grace_s
