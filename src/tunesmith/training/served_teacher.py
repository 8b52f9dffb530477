"""A teacher at an address: a server that scores prompts, as vLLM and `tunesmith serve` do.

    POST ADDRESS/completions {model, prompt: [ids], prompt_logprobs: K, max_tokens: 1, temperature: 0}
    choices[0].prompt_logprobs [null, {"id": {"logprob", "rank", "decoded_token"}, ...}, ...]

Entry t has the K likeliest tokens at place t of the prompt, given those before it, and the prompt's own token
there. Every reply is checked: it needs an entry for each token sent, each entry needs that token, every id that
it names needs the text that it has here, and its numbers have to be log-probabilities. Servers that return
texts of tokens in place of ids (`echo` with `logprobs`) are not supported: two ids can have the same text.
"""

# T tokens of a prompt, N targets of a row, K listed tokens, C numbers of a target

from __future__ import annotations

import hashlib
import math
from base64 import b64decode, b64encode
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from tunesmith.data.teacher_rows import MOST_IDS
from tunesmith.errors import RecipeError, TeacherError
from tunesmith.generation.draws import DrawnAnswer
from tunesmith.graders import remote
from tunesmith.graders.pool import JUDGED_AT_ONCE
from tunesmith.graders.schema import JUDGE_SECONDS
from tunesmith.models.fused_loss import OutputLayer
from tunesmith.recipe.reinforcement import Reinforce
from tunesmith.runs.keyed_lines import KeyedLines
from tunesmith.tasks.policy_losses import policy_loss_sum
from tunesmith.training.draw import numbers_of
from tunesmith.training.teacher import Teacher, sha256_of
from tunesmith.types import JsonObject, LossSum, Row

PROBED = 64
"""Tokens of the prompt that is scored before anything is trained."""
ENTRY_BYTES, HEAD_BYTES = 512, 2**20
"""Most bytes of a listed token in a reply, and of all else in it."""
SURE = 1e-3
"""Most that rounding adds to probabilities that sum to one."""
SAME = 0.1
"""Nats by which the likeliest tokens of a kept list may be off, in the mean, from what the server says now:
another batch moves a model in bfloat16 by less, another model by more."""
UNCHECKED = "\ufffd"
"""Text of a piece of a character, which servers put together with its neighbours."""
BY_TOKENS = Reinforce()
"""The loss `clip` of task reinforce at temperature 1, with its correction of rounding: one update a draw."""
_OTHER_WAYS = (
    "Name a server that scores prompts (vLLM, tunesmith serve), or a model on this machine; or have the server write "
    "answers and train on these by task chat, or grade answers as a `score_model` of task reinforce."
)
Entry = Mapping[str, Any]
"""Tokens at one place of a prompt, by their ids."""
Numbers = Callable[[Entry, int], list[float]]
"""Makes numbers of an entry and the prompt's own token there."""


class _ReplyError(Exception):
    """A reply that cannot be used; its text goes on from "the teacher ..."."""


@dataclass
class ServedTeacher(Teacher):
    """A model at an address that scores prompts. It computes at temperature 1."""

    offline: bool = False
    replies: KeyedLines | None = None
    """Replies to rows, kept until all are there: a server may charge for them."""
    drawn_replies: KeyedLines | None = None
    """Replies to drawn answers, so that a step that is made again gets the same numbers."""
    _is_proven: bool = False
    _same_text: set[int] = field(default_factory=set)
    """Ids whose text was compared with the server's."""

    @property
    def address(self) -> str:
        return (self.options.teacher or "").rstrip("/")

    @property
    def digest(self) -> str:
        """SHA-256 of its address and name; nothing else of it is known."""
        return sha256_of([self.address, self.options.model])

    @contextmanager
    def keeping(self, folder: Path, of_rank: str) -> Iterator[None]:
        """Replies to rows are kept until all are there, and those to drawn answers as long as the run."""
        self.drawn_replies = KeyedLines(folder / f"drawn{of_rank}.jsonl")
        self.replies = KeyedLines(folder / f"asked{of_rank}.jsonl")
        yield
        self.replies.remove()
        self.replies = None

    def prove(self) -> None:
        """Have a prompt of tokens from everywhere in the vocabulary scored, once. Raises RecipeError for a
        server that cannot, and for one whose tokens are others; InputError for a key that is not set."""
        if self._is_proven:
            return
        name = f"distil.teacher: {self.address}"
        if self.offline:
            raise RecipeError(
                f"{name}: --offline forbids asking it. Leave --offline out, or name a model that is here."
            )
        if self.vocabulary >= MOST_IDS:
            raise RecipeError(f"{name}: {self.vocabulary:,} tokens are more than lists hold. Use another model.")
        remote.key_of(self.options.key_env, "distil.key_env")
        try:
            self._numbers(probe_ids(self.tokenizer), range(1, PROBED), self._list_of, self.top)
        except remote.RemoteError as error:
            raise RecipeError(f"distil.teacher: {error}. {self._way_out(error.status)}") from None
        except _ReplyError as error:
            sent = f"a prompt of {PROBED} tokens was sent, and the server"
            raise RecipeError(f"{name}: {sent} {error}. {_OTHER_WAYS}") from None
        self._is_proven = True

    def _way_out(self, status: int | None) -> str:
        """The way out where the server refuses a prompt by this HTTP status, or does not answer (None)."""
        if status is None:
            return f"See that it runs and can be reached from here. {_OTHER_WAYS}"
        if status in (401, 403):
            return "Set an environment variable to its key, and name the variable by distil.key_env."
        if status == 404:
            asked = f"{self.address}/completions was asked for {self.options.model!r} (distil.model)"
            return f"{asked}: an address mostly ends in /v1, and ADDRESS/models lists the names. {_OTHER_WAYS}"
        too_many = f"If {self.top} log-probabilities are too many for it, lower distil.top, or start it for more"
        return f"{too_many} (vLLM: --max-logprobs {self.top}). {_OTHER_WAYS}"

    def lists(self, rows: Sequence[Row]) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """As `Teacher.lists`. Raises TeacherError for a row."""
        yield from enumerate(self._asked(rows, self._list_of, self.top, self.replies))

    def taught(
        self, rows: Sequence[Row], answers: Sequence[DrawnAnswer], output: OutputLayer | None
    ) -> tuple[list[NDArray[np.float32]], LossSum]:
        """The advantage of each token, log π_T − log μ, without discount and without baseline. Raises TeacherError.

        Its mean over drawn tokens has the gradient of the reverse divergence, and the loss of a step is an
        estimate of it: Lu and Thinking Machines Lab 2025, "On-Policy Distillation".
        """
        logps = self._asked(rows, lambda entry, token: [_logp(entry, token)], 1, self.drawn_replies)
        values = [
            numbers_of(answer, logp_N1[:, 0] - np.array(answer.logps, np.float32))
            for answer, logp_N1 in zip(answers, logps, strict=True)
        ]
        return values, partial(policy_loss_sum, options=BY_TOKENS, output=output)

    def refuse_other(self, row: Row, before_NC: NDArray[np.float32], place: Path) -> None:
        (now_NC,) = self._asked([row], self._list_of, self.top, None)
        listed = [dict(zip(now_C[: self.top], now_C[self.top :], strict=False)) for now_C in now_NC]
        pairs = zip(listed, before_NC, strict=True)
        off = [abs(of_token.get(before_C[0], -math.inf) - before_C[self.top]) for of_token, before_C in pairs]
        if (mean := sum(min(part, 1.0) for part in off) / len(off)) > SAME:
            raise RecipeError(
                f"distil.teacher: {self.address}: {self.options.model} says otherwise of {row.source} than when its "
                f"lists were kept, by {mean:.2g} nats a token: another model has its name now. Remove {place}, or "
                "serve it by another name (distil.model)."
            )

    def _asked(
        self, rows: Sequence[Row], numbers: Numbers, top: int, replies: KeyedLines | None
    ) -> Iterator[NDArray[np.float32]]:
        """`numbers` of each target of each row, [N, C], from entries of `top` tokens. Several rows are asked at a
        time, and none of which there is a reply."""
        self.prove()
        pool = ThreadPoolExecutor(JUDGED_AT_ONCE)
        try:
            yield from pool.map(lambda row: self._numbers_of_row(row, numbers, top, replies), rows)
        except TeacherError:
            pool.shutdown()  # what is under way is paid for, and is kept
            raise
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _numbers_of_row(self, row: Row, numbers: Numbers, top: int, replies: KeyedLines | None) -> NDArray[np.float32]:
        key = hashlib.sha256(row.ids.astype(np.int32).tobytes() + row.trained.tobytes()).hexdigest()
        places = np.flatnonzero(row.trained).tolist()
        if replies is not None and (reply := replies.get(key)) is not None:
            return np.frombuffer(b64decode(reply["values"]), np.float32).reshape(len(places), -1)
        try:
            values_NC = self._numbers(row.ids.tolist(), places, numbers, top)
        except remote.RemoteError as error:
            raise TeacherError(f"{row.source}: the teacher does not answer: {error}.") from None
        except _ReplyError as error:
            raise TeacherError(f"{row.source}: the teacher at {self.address} {error}.") from None
        if replies is not None:
            replies.add({key: {"values": b64encode(values_NC.tobytes()).decode()}})
        return values_NC

    def _numbers(self, ids: Sequence[int], places: Sequence[int], numbers: Numbers, top: int) -> NDArray[np.float32]:
        """[N, C], `numbers` at N places of a prompt. Raises RemoteError, _ReplyError."""
        entries = self._entries(ids, top)
        for place in places:
            self._refuse_other_text(entries[place])
        return np.array([numbers(entries[place], ids[place]) for place in places], np.float32)

    def _entries(self, ids: Sequence[int], top: int) -> Sequence[Entry]:
        """The entries of a prompt, each held against the token at its place; the first place has none. Raises
        RemoteError, _ReplyError."""
        body: JsonObject = {"model": self.options.model, "prompt": ids, "prompt_logprobs": top}
        body |= {"max_tokens": 1, "temperature": 0}
        reply = remote.post(
            self.address,
            "completions",
            body,
            key=remote.key_of(self.options.key_env, "distil.key_env"),
            seconds=JUDGE_SECONDS,
            most_bytes=HEAD_BYTES + ENTRY_BYTES * len(ids) * (top + 1),
        )
        try:
            entries, num_read = reply["choices"][0].get("prompt_logprobs"), reply["usage"]["prompt_tokens"]
        except (KeyError, IndexError, TypeError, AttributeError):
            raise _ReplyError("gives a reply that is no completion") from None
        if not isinstance(entries, list):
            raise _ReplyError("gives no prompt_logprobs: it does not score prompts")
        if len(entries) != len(ids) or num_read != len(ids):
            raise _ReplyError(f"read {num_read} tokens and scored {len(entries)}, of {len(ids)} that were sent")
        for place, (entry, token) in enumerate(zip(entries, ids, strict=True)):
            if place and (not isinstance(entry, dict) or str(token) not in entry):
                raise _ReplyError(f"does not score token {token} at place {place}, which it was sent there")
        return entries

    def _refuse_other_text(self, entry: Entry) -> None:
        for name, value in entry.items():
            if not name.isdecimal() or not isinstance(value, dict):
                raise _ReplyError(f"lists {name!r}, which is no token with its log-probability")
            token = int(name)
            if token in self._same_text or token >= self.vocabulary:
                continue
            ours, theirs = self.tokenizer.decode([token]), value.get("decoded_token")
            if not isinstance(theirs, str):
                raise _ReplyError(f"gives no text (decoded_token) of token {token}, by which vocabularies are compared")
            without_cleaning = self.tokenizer.decode([token], clean_up_tokenization_spaces=False)
            if theirs not in (ours, without_cleaning) and UNCHECKED not in ours + theirs:
                raise _ReplyError(
                    f"has another vocabulary: token {token} is {theirs!r} there and {ours!r} here, so its "
                    "probabilities cannot be compared"
                )
            self._same_text.add(token)

    def _list_of(self, entry: Entry, token: int) -> list[float]:
        """[C] of a place, see `data.teacher_rows.columns`. An output that is no token is left to the rest."""
        logp_of = {int(name): _logp(entry, name) for name in entry}
        likeliest = sorted((-logp, listed) for listed, logp in logp_of.items() if listed < self.vocabulary)[: self.top]
        if len(likeliest) < self.top:
            beyond = sum(listed >= self.vocabulary for listed in logp_of)
            other = f", and {beyond} beyond the {self.vocabulary:,} tokens of the model that learns" if beyond else ""
            asked = f"{len(likeliest)} of the {self.top} tokens that were asked for (distil.top)"
            raise _ReplyError(f"lists {asked}{other}")
        total = math.fsum(math.exp(-negative) for negative, _ in likeliest)
        if total > 1 + SURE:
            raise _ReplyError(f"gives probabilities that sum to {total:.3f}")
        rest = math.log1p(-total) if total < 1 else -math.inf
        return [*(float(listed) for _, listed in likeliest), *(-negative for negative, _ in likeliest), rest]


def _logp(entry: Entry, token: int | str) -> float:
    value = entry[str(token)].get("logprob")
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value > SURE:
        raise _ReplyError(f"gives {value!r} as the log-probability of token {token}")
    return float(value)


def probe_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids from everywhere in a vocabulary, its first and last ones too, that are plain text."""
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    plain = [token for token in range(len(tokenizer)) if token not in special] or list(range(len(tokenizer)))
    return [plain[int(place)] for place in np.linspace(0, len(plain) - 1, PROBED)]
