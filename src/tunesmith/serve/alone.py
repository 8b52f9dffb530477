"""One model asked in this process, an ask at a time: what `tunesmith chat` talks through."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, nullcontext

from tunesmith.inference.load import LoadedModel
from tunesmith.serve.adapters import Adapters
from tunesmith.serve.batch import Batch
from tunesmith.serve.protocol import Ask, EngineOptions, Refused, Told
from tunesmith.serve.serving import Note, choose_decoder, make_voice


class Alone:
    """Answers as the server does: prompts, limits and choices are those of the engine."""

    def __init__(self, speaker: LoadedModel, note: Note) -> None:
        decoder = choose_decoder(speaker, Adapters(speaker.model), note, streams=1)
        self.voice = make_voice(speaker, "", decoder)
        self._batch = Batch(decoder, streams=1)

    def ask(
        self, ask: Ask, options: EngineOptions, mode: Callable[[], AbstractContextManager[None]] = nullcontext
    ) -> Generator[Told, None, None]:
        """What is told of one ask; closing the iterator gives it up. `mode` is entered around each step.

        Raises Refused.
        """
        self._batch.add(self.voice.job(0, ask, options))
        try:
            while self._batch.is_busy:
                with mode():
                    news = self._batch.step()
                for _, told in news:
                    if isinstance(told, Refused):
                        raise told
                    yield told
        finally:
            self._batch.cancel(0)
