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
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from tunesmith.data.kept_replies import KeptReplies, key_of
from tunesmith.data.splits import Splits
from tunesmith.data.teacher_rows import MOST_IDS
from tunesmith.errors import RecipeError, TeacherError
from tunesmith.graders import remote
from tunesmith.graders.pool import JUDGED_AT_ONCE
from tunesmith.graders.schema import JUDGE_SECONDS
from tunesmith.phrases import plural
from tunesmith.recipe.distillation import Distil
from tunesmith.recipe.schema import Recipe, resolved
from tunesmith.types import JsonObject, Row

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
class ServedTeacher:
    """A model at an address that scores prompts and is not trained. It computes at temperature 1."""

    options: Distil
    tokenizer: PreTrainedTokenizerBase
    """The tokenizer of the model that learns."""
    offline: bool = False
    replies: KeptReplies | None = None
    """Replies to rows, kept until all are there: a server may charge for them."""
    drawn_replies: KeptReplies | None = None
    """Replies to drawn answers, so that a step that is made again gets the same numbers."""
    _is_proven: bool = False
    _same_text: set[int] = field(default_factory=set)
    """Ids whose text was compared with the server's."""

    @property
    def address(self) -> str:
        return (self.options.teacher or "").rstrip("/")

    @property
    def vocabulary(self) -> int:
        """Tokens that both models have."""
        return len(self.tokenizer)

    @property
    def digest(self) -> str:
        """SHA-256 of its address and name; nothing else of it is known."""
        return hashlib.sha256(orjson.dumps([self.address, self.options.model])).hexdigest()

    @property
    def computed(self) -> Mapping[str, Any]:
        """Nothing of this machine decides its numbers."""
        return {}

    @property
    def top(self) -> int:
        """Number of tokens in a list; at least one token of the vocabulary is left for the rest."""
        return min(resolved(self.options.top), self.vocabulary - 1)

    def free(self) -> None:
        """Do nothing: the model is not in this machine's memory."""

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
            self._entries(probe_ids(self.tokenizer), self._list_of, range(PROBED), self.top)
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
        """The number of each row, and [N, C] of its targets, as they come. Raises TeacherError for a row."""
        yield from self._asked(rows, self._list_of, self.replies)

    def logps(self, rows: Sequence[Row]) -> list[NDArray[np.float32]]:
        """[N] of each row, the log-probability of each target. Raises TeacherError for a row."""
        of_rows = dict(self._asked(rows, lambda entry, token: [_logp(entry, token)], self.drawn_replies, top=1))
        return [of_rows[i][:, 0] for i in range(len(rows))]

    def refuse_other(self, row: Row, before_NC: NDArray[np.float32], place: object) -> None:
        """Raise RecipeError if the server's numbers of a row differ from the kept ones."""
        ((_, now_NC),) = self._asked([row], self._list_of, None)
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
        self, rows: Sequence[Row], numbers: Numbers, replies: KeptReplies | None, *, top: int | None = None
    ) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """The number of each row and the `numbers` of each of its targets: of rows with a kept reply first.
        `top`: tokens that are listed at a place; None: as in a list."""
        self.prove()
        keys = [key_of(row.ids, row.trained) for row in rows]
        left = []
        for i, key in enumerate(keys):
            values_NC = None if replies is None else replies.get(key)
            if values_NC is None:
                left.append(i)
            else:
                yield i, values_NC
        pool, failures = ThreadPoolExecutor(JUDGED_AT_ONCE), list[TeacherError]()
        under_way, waiting = dict[Future[NDArray[np.float32]], int](), iter(left)
        try:
            while True:
                for i in islice(waiting, 0 if failures else JUDGED_AT_ONCE - len(under_way)):
                    under_way[pool.submit(self._numbers, rows[i], numbers, top or self.top)] = i
                if not under_way:
                    break
                for future in wait(under_way, return_when=FIRST_COMPLETED).done:
                    i = under_way.pop(future)
                    try:
                        values_NC = future.result()
                    except TeacherError as error:  # what is under way is paid for, and comes
                        failures.append(error)
                        continue
                    if replies is not None:
                        replies.put(keys[i], values_NC)
                    yield i, values_NC
        finally:
            pool.shutdown(wait=False)
        if failures:
            raise failures[0]

    def _numbers(self, row: Row, numbers: Numbers, top: int) -> NDArray[np.float32]:
        places = set(np.flatnonzero(row.trained).tolist())
        try:
            of_places = self._entries(row.ids.tolist(), numbers, places, top)
        except remote.RemoteError as error:
            raise TeacherError(f"{row.source}: the teacher does not answer: {error}.") from None
        except _ReplyError as error:
            raise TeacherError(f"{row.source}: the teacher at {self.address} {error}.") from None
        return np.array(of_places, np.float32)

    def _entries(self, ids: Sequence[int], numbers: Numbers, wanted: Container[int], top: int) -> list[list[float]]:
        """`numbers` of the entry at each wanted place of a prompt. Every entry is held against the prompt.
        Raises RemoteError, _ReplyError."""
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
        of_places = []
        for place in range(1, len(ids)):
            entry, token = entries[place], ids[place]
            if not isinstance(entry, dict) or str(token) not in entry:
                raise _ReplyError(f"does not score token {token} at place {place}, which it was sent there")
            if place in wanted:
                self._refuse_other_text(entry)
                of_places.append(numbers(entry, token))
        return of_places

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


def notes_on_asking(recipe: Recipe, rows: Splits) -> list[str]:
    """Notes of a plan on a teacher at an address: how often it is asked, and what the divergence is of."""
    if not recipe.distil.is_served:
        return []
    held, trained = len(rows.held_rows), 0 if recipe.distil.on_policy else len(rows.train_rows)
    name = f"distil.teacher: {recipe.distil.teacher}"
    steps = f", and {plural(resolved(recipe.train.rows_per_step), 'time')} in each step" * recipe.distil.on_policy
    words = f"asked {plural(held + trained + 1, 'time')} before the first step{steps}"
    top = resolved(recipe.distil.top)
    return [
        f"{name}: {words}: the time that it takes is not foreseen",
        f"{name}: the divergence from it is of its {top} likeliest tokens, and of all others as one",
    ]
