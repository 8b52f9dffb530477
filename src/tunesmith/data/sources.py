"""Source and target for encoder–decoder models, each in the tokenizer's own frame."""

# T tokens, S tokens of the source

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tunesmith.data.drafts import Draft, Drafted, Room
from tunesmith.data.pairs import pair_of
from tunesmith.data.prompts import PLACE
from tunesmith.data.tokens import ControlTokens, Encoder
from tunesmith.errors import ModelError, RecipeError
from tunesmith.types import Example, Part, Problem


class Sources:
    """What an encoder reads and a decoder writes, closed by EOS. `prompt`: what stands around a document.

    Each side may be as long as the room; only the source is ever cut, at its end. Raises `ModelError` for a tokenizer
    without EOS, `RecipeError` for a room without place for a token.
    """

    template_text = ""

    def __init__(self, tokenizer: Any, encoder: Encoder, room: Room, prompt: str | None) -> None:
        if encoder.eos_id is None:
            raise ModelError(
                f"{encoder.name}: its tokenizer has no EOS token: the tuned model would never stop. "
                "Name one as eos_token in its tokenizer_config.json."
            )
        self._eos_id = encoder.eos_id
        self._encoder = encoder
        self._room = room
        self._prompt = prompt or PLACE
        self._frame = encoder.frame(1)
        if room.max_tokens is not None and room.max_tokens <= self._frame.num_added():
            raise RecipeError(f"data.max_tokens: {room.max_tokens} leaves a text no token. Raise it.")
        self.control = ControlTokens(tokenizer, "")
        self.stop_ids = (self._eos_id,)

    def encode(self, examples: Sequence[Example]) -> list[Drafted]:
        """Aligned with `examples`."""
        pairs = [pair_of(example) for example in examples]
        good = [pair for pair in pairs if not isinstance(pair, Problem)]
        sources = iter(self._encoder.ids([self._prompt.replace(PLACE, text) for text, _ in good], plain=False))
        targets = iter(self._encoder.ids([text for _, text in good], plain=False))
        return [
            pair if isinstance(pair, Problem) else self._draft(example, pair, next(sources), next(targets))
            for example, pair in zip(examples, pairs, strict=True)
        ]

    def prompt_ids(
        self, parts: Sequence[Part], tools: Sequence[Any], *, on_cut: Callable[[int], None] = lambda num_tokens: None
    ) -> list[int]:
        """What serving feeds the encoder, cut as in training, which `on_cut` hears of. `tools` have no meaning."""
        text_T = self._encoder.ids([self._prompt.replace(PLACE, "".join(part.text for part in parts))], plain=False)[0]
        source_S = self._source(text_T)
        if cut := len(text_T) + self._frame.num_added() - len(source_S):
            on_cut(cut)
        return [int(token_id) for token_id in source_S]

    def _source(self, text_T: NDArray[np.int32]) -> NDArray[np.int32]:
        excess = self._room.excess(len(text_T) + self._frame.num_added()) if self._room.too_long == "cut" else 0
        return self._frame.around(text_T[: len(text_T) - excess])

    def _draft(
        self, example: Example, pair: tuple[str, str], text_T: NDArray[np.int32], target_T: NDArray[np.int32]
    ) -> Drafted:
        num_unspelled = self.control.num_unspelled(np.concatenate([text_T, target_T]), *pair, self._prompt)
        source_S = self._source(text_T)
        target_T = self._frame.around(target_T)
        if target_T[-1:].tolist() != [self._eos_id]:
            target_T = np.append(target_T, np.int32(self._eos_id))
        if not len(source_S):
            return Problem(example.source, "empty", "its prompt gives no token.", "Give it one, or remove the row.")
        for side, ids_T in (("prompt", source_S), ("answer", target_T)):
            if self._room.excess(len(ids_T)):
                return self._room.refusal(example.source, f"the {len(ids_T)} tokens of its {side}")
        draft = Draft(
            np.concatenate([source_S, target_T]),
            np.arange(len(source_S) + len(target_T)) >= len(source_S),
            num_unspelled=num_unspelled,
        )
        cut = len(text_T) + self._frame.num_added() - len(source_S)
        if cut:
            what = f"the {len(text_T) + self._frame.num_added()} tokens of its prompt"
            draft.warnings.append(self._room.cut_warning(example.source, what, cost=f"the last {cut} were cut off"))
        return [draft]
