"""JSON of a schema and nothing else, token by token, by the xgrammar library (the extra `json`)."""

# V vocabulary

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any

import torch
from torch import Tensor

from tunesmith.environment import for_child
from tunesmith.serve import schemas
from tunesmith.serve.choosing import Grammar
from tunesmith.serve.protocol import Refused

SCHEMA_CHARS = 32_768
"""Longest schema: one is compiled for seconds where it is much longer."""
COMPILE_S = 10.0
"""Longest time for one schema; common ones take some hundredths of a second."""
START_S = 120.0
"""For the process that tries schemas to be ready."""
KEPT_BYTES = 64 * 1024**2
"""Of compiled schemas, for the next ask with the same one."""
_LOOK_S = 0.05
_CONTROL = re.compile(rb"[\x00-\x1f]")


class Grammars:
    """Compiled schemas of one tokenizer, those used last kept."""

    def __init__(self, tokenizer: Any, *, vocab_size: int, stop_ids: Sequence[int]) -> None:
        try:
            import xgrammar
        except ImportError as error:
            raise Refused(
                "answers in JSON need the package xgrammar, which is not installed on the server",
                status=400, code="unsupported_parameter", param="response_format",
            ) from error  # fmt: skip
        self._xgrammar = xgrammar
        self._vocab_size = vocab_size
        info = xgrammar.TokenizerInfo.from_huggingface(
            tokenizer, vocab_size=vocab_size, stop_token_ids=list(stop_ids) or None
        )
        self._tokenizer: str = info.serialize_json()
        # Its lengths and formats of strings let these through, which JSON writes as escapes.
        self._controls = torch.tensor(
            [i for i, text in enumerate(info.decoded_vocab) if i not in stop_ids and _CONTROL.search(text)],
            dtype=torch.long,
        )
        self._compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)
        self._kept: OrderedDict[str, Any] = OrderedDict()

    def compile(self, schema: Mapping[str, Any], is_wanted: Callable[[], bool]) -> Callable[[], Grammar]:
        """What makes the grammar of one answer. Called by one thread at a time.

        Raises Refused for a schema that is none, is not kept in full, or takes too long, and where it is not wanted any
        more.
        """
        text = json.dumps(schema or {"type": "object"})
        if len(text) > SCHEMA_CHARS:
            raise _refused(f"the schema has {len(text):,} characters, at most {SCHEMA_CHARS:,} are taken")
        if problems := schemas.check(schema):
            raise _refused(f"the schema would not be kept: {problems}")
        if text not in self._kept:
            # Nothing can interrupt the compiler: a process of its own that can be ended tries it first.
            _TRIAL.compile(text, self._tokenizer, is_wanted)
            self._kept[text] = self._compiler.compile_json_schema(text, any_whitespace=False)
        self._kept.move_to_end(text)
        compiled = self._kept[text]
        while len(self._kept) > 1 and sum(one.memory_size_bytes for one in self._kept.values()) > KEPT_BYTES:
            self._kept.popitem(last=False)
        return lambda: _Matcher(self._xgrammar, compiled, self._vocab_size, self._controls)


class _Trial:
    """A process that compiles a schema to see whether it can be, and how long it takes. Started when first needed."""

    def __init__(self) -> None:
        self._tokenizer = ""
        self._process: subprocess.Popen[str] | None = None
        self._said: SimpleQueue[str] = SimpleQueue()

    def compile(self, text: str, tokenizer: str, is_wanted: Callable[[], bool]) -> None:
        """Raises Refused where the schema cannot be compiled in time, or is not wanted any more."""
        self._prepare(tokenizer)
        why = self._ask({"schema": text}, COMPILE_S, is_wanted)
        if why is None:
            self._end()
            raise _refused(
                f"the schema takes more than {COMPILE_S:g} s, or too much memory, to compile: make it simpler"
            )
        if why:
            raise _refused(f"the schema cannot be used: {why}")

    def _prepare(self, tokenizer: str) -> None:
        """A process that compiles for this tokenizer."""
        if self._process is None or self._process.poll() is not None:
            words = [sys.executable, "-m", "tunesmith.serve.schemas"]
            self._process = subprocess.Popen(
                words,
                text=True,
                env=for_child(),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
            self._said, self._tokenizer = SimpleQueue(), ""
            threading.Thread(target=_listen, args=(self._process, self._said), daemon=True).start()
        if tokenizer != self._tokenizer:
            if self._ask({"tokenizer": tokenizer}, START_S, lambda: True) != "ready":
                self._end()
                message = "the compiler of schemas did not start: try again"
                raise Refused(message, status=503, code="engine_unavailable")
            self._tokenizer = tokenizer

    def _ask(self, message: Mapping[str, str], seconds: float, is_wanted: Callable[[], bool]) -> str | None:
        """What the process says to a message; None: nothing in time."""
        process = self._process
        assert process is not None, "it has been started"
        assert process.stdin is not None, "it has a pipe"
        with suppress(OSError):  # it has ended, which is seen below
            process.stdin.write(json.dumps(message) + "\n")
            process.stdin.flush()
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            with suppress(Empty):
                return self._said.get(timeout=_LOOK_S)
            if process.poll() is not None:
                return None
            if not is_wanted():
                self._end()
                raise _refused("nobody waits for this answer any more")
        return None

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


_TRIAL = _Trial()
"""One for all tokenizers: it holds torch, which xgrammar imports."""


def _listen(process: subprocess.Popen[str], said: SimpleQueue[str]) -> None:
    assert process.stdout is not None, "it has a pipe"
    for line in process.stdout:
        said.put(str(json.loads(line)))


class _Matcher:
    def __init__(self, xgrammar: Any, compiled: Any, vocab_size: int, controls: Tensor) -> None:
        self._xgrammar = xgrammar
        self._controls = controls
        self._matcher = xgrammar.GrammarMatcher(compiled, terminate_without_stop_token=True)
        self._bits = xgrammar.allocate_token_bitmask(1, vocab_size)

    def bar(self, logits_V: Tensor) -> None:
        self._matcher.fill_next_token_bitmask(self._bits)
        self._xgrammar.apply_token_bitmask_inplace(logits_V[None], self._bits.to(logits_V.device))
        logits_V[self._controls.to(logits_V.device)] = -math.inf

    def accept(self, token_id: int) -> None:
        self._matcher.accept_token(token_id)

    def is_complete(self) -> bool:
        return bool(self._matcher.is_terminated())


def _refused(message: str) -> Refused:
    return Refused(message, status=400, code="invalid_schema", param="response_format")
