"""A server that scores prompts in vLLM's form by a model of a folder: a teacher at an address, or a wrong one."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

Entries = list[dict[str, Any] | None]
MOST_LISTED = 20
"""vLLM's own limit, unless it is started with another."""


class ScoringServer(ThreadingHTTPServer):
    """`spoiled` makes of the ids that were sent and their entries what is given back; `replies` are given first, each
    a status and a body."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.asked: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.replies: list[tuple[int, Any]] = []
        self.spoiled: Callable[[list[int], Entries], Entries] = lambda ids, entries: entries
        self.open = self.most_open = 0
        self._lock = threading.Lock()
        super().__init__(("127.0.0.1", 0), _Handler)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    @property
    def prompts(self) -> list[list[int]]:
        return [body["prompt"] for body in self.asked]

    def handle_error(self, *words: object) -> None: ...

    def reply(self, body: dict[str, Any]) -> tuple[int, Any]:
        with self._lock:
            self.asked.append(body)
            if self.replies:
                return self.replies.pop(0)
            if body["prompt_logprobs"] > MOST_LISTED:
                words = f"Requested prompt logprobs of {body['prompt_logprobs']}, which is greater than max allowed: 20"
                return 400, {"error": {"message": words, "type": "BadRequestError", "param": None, "code": 400}}
            entries = self.spoiled(body["prompt"], self.scored(body["prompt"], body["prompt_logprobs"]))
        choice = {"index": 0, "text": "", "logprobs": None, "finish_reason": "length", "prompt_logprobs": entries}
        usage = {"prompt_tokens": len(entries), "completion_tokens": 1, "total_tokens": len(entries) + 1}
        return 200, {"id": "cmpl-1", "object": "text_completion", "choices": [choice], "usage": usage}

    @torch.no_grad()
    def scored(self, ids: list[int], top: int) -> Entries:
        logp_TV = self.model(torch.tensor([ids])).logits[0].log_softmax(-1)
        entries: Entries = [None]
        for place, token in enumerate(ids[1:]):
            best = [*logp_TV[place].topk(top).indices.tolist()]
            entries.append(
                {
                    str(listed): {
                        "logprob": float(logp_TV[place, listed]),
                        "rank": i + 1,
                        "decoded_token": self.tokenizer.decode([listed]),
                    }
                    for i, listed in enumerate([*best, *([] if token in best else [token])])
                }
            )
        return entries


class _Handler(BaseHTTPRequestHandler):
    server: ScoringServer

    def do_POST(self) -> None:
        self.server.open += 1
        self.server.most_open = max(self.server.most_open, self.server.open)
        try:
            self.server.headers.append(dict(self.headers))
            status, content = self.server.reply(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        finally:
            self.server.open -= 1
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(content).encode())

    def log_message(self, *words: object) -> None: ...


@contextmanager
def scoring(folder: Path) -> Iterator[ScoringServer]:
    """A server over the model in a folder, which has ended when the block ends."""
    server = ScoringServer(folder)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
