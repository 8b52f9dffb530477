"""One contestant of `benchmarks serve`: reads a job, writes its rates and greedy answers."""

from __future__ import annotations

import atexit
import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

QUESTIONS = (
    "Tell me a story about a fox and a raven.", "What is the capital of France?", "Write a poem about the sea.",
    "How does a plane fly?", "Why is the sky blue?", "Name three things that bees make.", "What is a prime number?",
    "Explain how bread is baked.",
)  # fmt: skip
Answers = list[list[int]]
Ask = Callable[[Sequence[Sequence[int]]], Answers]


def contest(job: Mapping[str, Any]) -> dict[str, Any]:
    """Rates by the number of streams, the greedy answers of the most streams, and facts."""
    import torch
    from transformers import AutoTokenizer

    torch.set_num_threads(job["threads"])
    tokenizer = AutoTokenizer.from_pretrained(job["tokenizer"])
    prompts = [_prompt(tokenizer, f"{QUESTIONS[i % len(QUESTIONS)]} ({i})") for i in range(max(job["streams"]))]
    ask, facts = KINDS[job["kind"]](job)
    ask(prompts[:1])
    rates, answers = {}, []
    for streams in job["streams"]:
        begun = time.perf_counter()
        answers = ask(prompts[:streams])
        rates[streams] = sum(map(len, answers)) / (time.perf_counter() - begun)
    return {"rates": rates, "answers": answers, "facts": facts}


def _prompt(tokenizer: Any, question: str) -> list[int]:
    messages = [{"role": "user", "content": question}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def generate(job: Mapping[str, Any]) -> tuple[Ask, dict[str, Any]]:
    """transformers, a request after the other."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.bfloat16).eval()

    def ask(prompts: Sequence[Sequence[int]]) -> Answers:
        answers = []
        for prompt in prompts:
            ids = torch.tensor([prompt])
            with torch.inference_mode():
                out = model.generate(
                    ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=job["new_tokens"],
                    eos_token_id=None, pad_token_id=0, repetition_penalty=1.0,
                )  # fmt: skip
            answers.append(out[0, len(prompt) :].tolist())
        return answers

    return ask, {}


def tunesmith(job: Mapping[str, Any]) -> tuple[Ask, dict[str, Any]]:
    """The batch of the engine, every request at once."""
    from tunesmith.generation.adapters import AdapterSet
    from tunesmith.generation.decoder import BatchedDecoder
    from tunesmith.generation.scheduler import PreparedRequest, Scheduler
    from tunesmith.inference.load import load_model
    from tunesmith.serve.protocol import GenerationRequest

    speaker = load_model(job["model"], offline=True)
    decoder = BatchedDecoder(speaker.model, AdapterSet(speaker.model))

    class Kept(Scheduler):
        """Which notes the tokens beside the text."""

        def _write(self, answer: Any, choice: Any) -> Any:
            kept[answer.request.key].append(choice.token_id)
            return super()._write(answer, choice)

    kept: dict[int, list[int]] = {}

    def ask(prompts: Sequence[Sequence[int]]) -> Answers:
        kept.clear()
        batch = Kept(decoder, streams=len(prompts))
        for key, prompt in enumerate(prompts):
            kept[key] = []
            tokenizer = speaker.renderer.tokenizer
            greedy = GenerationRequest("", temperature=0.0)
            batch.add(PreparedRequest(key, tuple(prompt), tokenizer, greedy, max_new_tokens=job["new_tokens"]))
        while batch.is_busy:
            batch.step()
        return [list(kept[key]) for key in range(len(prompts))]

    return ask, {"precision": str(speaker.model.dtype).removeprefix("torch.")}


def served(job: Mapping[str, Any]) -> tuple[Ask, dict[str, Any]]:
    """`tunesmith serve` and as many clients as there are streams, each of which reads events as they come.

    An answer ends where its turn does: whoever has not had all his tokens then asks the next question for the others.
    """
    import subprocess
    from concurrent.futures import ThreadPoolExecutor

    import httpx
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(job["tokenizer"])
    words = [sys.executable, "-m", "tunesmith", "serve", job["model"], "--port", "0", "--json", "--offline"]
    words += ["--threads", str(job["threads"]), "--streams", str(max(job["streams"]))]
    out = tempfile.NamedTemporaryFile("w+", suffix=".jsonl")  # noqa: SIM115 (open as long as the process is)
    process = subprocess.Popen(words, stdout=out)
    atexit.register(process.terminate)
    while not (lines := [line for line in Path(out.name).read_text("utf-8").splitlines() if '"serving"' in line]):
        if process.poll() is not None:
            raise RuntimeError(f"tunesmith serve ended with {process.returncode}")
        time.sleep(0.1)
    begun = json.loads(lines[0])
    client = httpx.Client(base_url=begun["url"], timeout=600, limits=httpx.Limits(max_connections=None))
    body = {"model": begun["models"][0]["name"], "temperature": 0}
    body |= {"stream": True, "stream_options": {"include_usage": True}}

    def listen(prompts: Sequence[Sequence[int]], first: int) -> list[int]:
        """As many zeros as there were tokens: their ids are not told over HTTP."""
        left, number = job["new_tokens"], first
        while left:
            asked = {**body, "prompt": tokenizer.decode(prompts[number % len(prompts)]), "max_tokens": left}
            with client.stream("POST", "/v1/completions", json=asked) as answer:
                *_, last = [line for line in answer.iter_lines() if line.startswith("data: {")]
            left -= json.loads(last.removeprefix("data: "))["usage"]["completion_tokens"]
            number += 1
        return [0] * job["new_tokens"]

    def ask(prompts: Sequence[Sequence[int]]) -> Answers:
        with ThreadPoolExecutor(len(prompts)) as pool:
            return list(pool.map(lambda first: listen(prompts, first), range(len(prompts))))

    return ask, {}


def llama_cpp(job: Mapping[str, Any]) -> tuple[Ask, dict[str, Any]]:
    """llama.cpp by its Python binding: its own batch, one sequence a stream, greedy."""
    import llama_cpp as lib
    import numpy as np

    streams, new_tokens = max(job["streams"]), job["new_tokens"]
    lib.llama_backend_init()
    params = lib.llama_model_default_params()
    params.n_gpu_layers = 0
    model = lib.llama_model_load_from_file(job["model"].encode(), params)
    how = lib.llama_context_default_params()
    how.n_ctx, how.n_batch, how.n_ubatch, how.n_seq_max = 512 * streams, 2048, 512, streams
    how.n_threads = how.n_threads_batch = job["threads"]
    context = lib.llama_init_from_model(model, how)
    num_words = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))

    def decode(tokens: Sequence[tuple[int, int, int, bool]]) -> list[int]:
        """Feed (token, position, sequence, wanted); the likeliest next tokens of those wanted."""
        batch = lib.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for i, (token, position, sequence, wanted) in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position, 1
            batch.seq_id[i][0], batch.logits[i] = sequence, wanted
        if lib.llama_decode(context, batch):
            raise RuntimeError("llama_decode failed")
        said = [
            int(np.ctypeslib.as_array(lib.llama_get_logits_ith(context, i), (num_words,)).argmax())
            for i, (*_, wanted) in enumerate(tokens)
            if wanted
        ]
        lib.llama_batch_free(batch)
        return said

    def ask(prompts: Sequence[Sequence[int]]) -> Answers:
        lib.llama_memory_clear(lib.llama_get_memory(context), True)
        said = decode([
            (token, place, stream, place == len(prompt) - 1)
            for stream, prompt in enumerate(prompts)
            for place, token in enumerate(prompt)
        ])  # fmt: skip
        answers = [[token] for token in said]
        for step in range(new_tokens - 1):
            said = decode([(said[s], len(prompt) + step, s, True) for s, prompt in enumerate(prompts)])
            for answer, token in zip(answers, said, strict=True):
                answer.append(token)
        return answers

    return ask, {"llama-cpp-python": version("llama-cpp-python")}


KINDS: dict[str, Callable[[Mapping[str, Any]], tuple[Ask, dict[str, Any]]]] = {
    "tunesmith": tunesmith, "served": served, "generate": generate, "llama_cpp": llama_cpp,
}  # fmt: skip

if __name__ == "__main__":
    told = contest(json.loads(Path(sys.argv[1]).read_text("utf-8")))
    Path(sys.argv[2]).write_text(json.dumps(told), "utf-8")
