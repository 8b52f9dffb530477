"""Prompt and completion as plain text to ids and trained flags, without a template."""

# T tokens, P tokens of the prompt

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tunesmith.data.drafts import Draft, Drafted, Room
from tunesmith.data.tokens import ControlTokens, Encoder
from tunesmith.errors import ModelError
from tunesmith.types import Example, Part, Problem


class Pairs:
    """Tokenizes a prompt as serving does, and its completion, closed by EOS.

    Raises `ModelError` for a tokenizer without EOS, or one that writes anything behind a text.
    """

    template_text = ""

    def __init__(self, tokenizer: Any, encoder: Encoder, room: Room) -> None:
        self._encoder = encoder
        self._room = room
        if encoder.eos_id is None:
            raise ModelError(
                f"{encoder.name}: its tokenizer has no EOS token: the tuned model would never stop. "
                "Name one as eos_token in its tokenizer_config.json."
            )
        self._eos_id = encoder.eos_id
        self.control = ControlTokens(tokenizer, "")
        self.stop_ids = (self._eos_id,)
        alone = encoder.ids(["a"], plain=True)[0]
        self._num_added = int(self.control.are_reserved(alone).sum())
        if self.control.are_reserved(alone[-1:]).any():
            raise ModelError(
                f"{encoder.name}: its tokenizer writes a control token behind every text, so no prompt can be "
                "continued. Set add_eos_token to false in its tokenizer_config.json."
            )

    def encode(self, examples: Sequence[Example]) -> list[Drafted]:
        """Aligned with `examples`."""
        pairs = [pair_of(example) for example in examples]
        good = [pair for pair in pairs if not isinstance(pair, Problem)]
        prompts = iter(self._encoder.ids([prompt for prompt, _ in good], plain=True))
        wholes = iter(self._encoder.ids([prompt + completion for prompt, completion in good], plain=True))
        return [
            pair if isinstance(pair, Problem) else self._draft(example, pair, next(prompts), next(wholes))
            for example, pair in zip(examples, pairs, strict=True)
        ]

    def prompt_ids(self, parts: Sequence[Part], tools: Sequence[Any]) -> list[int]:
        """What serving feeds: the tokenizer's ids of the text, BOS included if it adds one. `tools` have no meaning."""
        text = "".join(part.text for part in parts)
        return [int(token_id) for token_id in self._encoder.ids([text], plain=True)[0]]

    def _draft(
        self, example: Example, pair: tuple[str, str], prompt_P: NDArray[np.int32], whole_T: NDArray[np.int32]
    ) -> Drafted:
        prompt, completion = pair
        num_prompt = len(prompt_P)
        if not np.array_equal(whole_T[:num_prompt], prompt_P):
            # The last token of the prompt would join the completion: keep the prompt as it is served.
            apart = np.concatenate([prompt_P, self._encoder.ids([completion], plain=False)[0]])
            if self._encoder.decode(apart) != self._encoder.decode(whole_T):
                return Problem(
                    example.source,
                    "token_boundary",
                    "the prompt's last token joins the start of the completion, and apart they give another text.",
                    "Move the white space between them to the start of the completion.",
                )
            whole_T = apart
        num_control = int(self.control.are_reserved(whole_T).sum()) - self._num_added
        if not len(whole_T) or whole_T[-1] != self._eos_id:
            whole_T = np.append(whole_T, np.int32(self._eos_id))
        num_spelled = self.control.count(prompt) + self.control.count(completion)
        draft = Draft(whole_T, np.arange(len(whole_T)) >= num_prompt, num_unspelled=num_control - num_spelled)
        return self._room.fit(example.source, draft)


def pair_of(example: Example) -> tuple[str, str] | Problem:
    """The prompt and the completion of an example that is plain text."""
    if not example.plain:
        return Problem(
            example.source,
            "not_a_pair",
            "it is a conversation; generate takes a prompt and a completion, both plain text.",
            "Use task: chat for conversations.",
        )
    trained = [part.trained for part in example.parts]
    if not trained or any(trained[:-1]) or not trained[-1]:
        return Problem(
            example.source,
            "not_a_pair",
            f"{sum(trained)} of its {len(trained)} parts are trained; generate takes a prompt and one completion.",
            "Use task: chat for conversations.",
        )
    return "".join(part.text for part in example.parts[:-1]), example.parts[-1].text
