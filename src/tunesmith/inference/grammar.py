"""JSON of a schema and nothing else, token by token, by the xgrammar library (the extra `json`)."""

# V vocabulary

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from tunesmith.asking import Refused
from tunesmith.inference.choosing import Grammar

SCHEMA_CHARS = 32_768
"""Longest schema: one is compiled for seconds where it is much longer."""


class Grammars:
    """Compiled schemas of one tokenizer; xgrammar keeps those of before."""

    def __init__(self, tokenizer: Any, *, vocab_size: int, stop_ids: Sequence[int]) -> None:
        try:
            import xgrammar
        except ImportError as error:
            raise Refused(
                "answers in JSON need the extra json on the server: pip install 'tunesmith[json]'",
                status=400, code="unsupported_parameter", param="response_format",
            ) from error  # fmt: skip
        self._xgrammar = xgrammar
        self._vocab_size = vocab_size
        info = xgrammar.TokenizerInfo.from_huggingface(
            tokenizer, vocab_size=vocab_size, stop_token_ids=list(stop_ids) or None
        )
        self._compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_limit_bytes=64 * 1024**2)

    def compile(self, schema: Mapping[str, Any]) -> Callable[[], Grammar]:
        """What makes the grammar of one answer. Raises Refused for a schema that is none, or too long."""
        text = json.dumps(schema or {"type": "object"})
        if len(text) > SCHEMA_CHARS:
            raise _refused(f"the schema has {len(text):,} characters, at most {SCHEMA_CHARS:,} are taken")
        try:
            compiled = self._compiler.compile_json_schema(text, any_whitespace=False)
        except RuntimeError as error:  # what its C++ side raises, whatever is wrong
            raise _refused(f"the schema cannot be used: {_first_line(error)}") from error
        return lambda: _Matcher(self._xgrammar, compiled, self._vocab_size)


class _Matcher:
    def __init__(self, xgrammar: Any, compiled: Any, vocab_size: int) -> None:
        self._xgrammar = xgrammar
        self._matcher = xgrammar.GrammarMatcher(compiled, terminate_without_stop_token=True)
        self._bits = xgrammar.allocate_token_bitmask(1, vocab_size)

    def bar(self, logits_V: Tensor) -> None:
        self._matcher.fill_next_token_bitmask(self._bits)
        self._xgrammar.apply_token_bitmask_inplace(logits_V[None], self._bits.to(logits_V.device))

    def accept(self, token_id: int) -> None:
        self._matcher.accept_token(token_id)

    def is_complete(self) -> bool:
        return bool(self._matcher.is_terminated())


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1][:300]


def _refused(message: str) -> Refused:
    return Refused(message, status=400, code="invalid_schema", param="response_format")
