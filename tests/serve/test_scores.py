"""Prompts that are scored: what the model of a run finds likely at each place, whatever else is decoded."""

from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest
import torch

from serve.batches import RUNS, VOCAB, decoder, tuned
from serve.engines import OPTIONS
from tiny_run import model_folder
from tunesmith.generation import decoder as decoders
from tunesmith.generation.decoder import BatchedDecoder, SequentialDecoder
from tunesmith.serve.protocol import Finished, GenerationRequest
from tunesmith.serve.registry import open_registry
from tunesmith.serve.served_model import ServedModel
from tunesmith.serve.worker import Worker

IDS = [(7 * place + 3) % VOCAB for place in range(50)]


@pytest.mark.parametrize("kind", [BatchedDecoder, SequentialDecoder])
def test_a_prompt_has_the_logits_of_its_run_alone(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoders, "SCORED_AT_ONCE", 16)
    made = decoder("llama", kind)
    for run in (None, *RUNS):
        with torch.no_grad():
            alone_TV = tuned("llama", run)(torch.tensor([IDS])).logits[0]
        scored_TV = torch.cat(list(made.score(run, IDS)))
        torch.testing.assert_close(scored_TV, alone_TV, atol=1e-4, rtol=0)


def test_answers_under_way_are_as_they_would_be_without_it() -> None:
    made, again = decoder("llama"), decoder("llama")
    logits = []
    for each, scores in ((made, True), (again, False)):
        slot = each.open("first", 9)
        each.step({}, [(slot, IDS[:9])])
        (row,) = each.fork(slot, 1)
        if scores:
            list(each.score("second", IDS))
        _, logits_NV = each.step({row: IDS[9]}, [])
        logits.append(logits_NV)
    assert torch.equal(*logits)


def test_answers_go_on_between_the_pieces_of_a_prompt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoders, "SCORED_AT_ONCE", 16)
    registry = open_registry([str(model_folder(tmp_path / "model"))], root=tmp_path, options=OPTIONS, note=print)
    [(name, served)] = registry.models.items()
    assert isinstance(served, ServedModel)
    sent: list[Any] = []
    worker = Worker(registry, OPTIONS, SimpleQueue(), sent.append, {0, 1, 2}, limit=1 << 40)
    for key in (0, 1):
        worker.take(key, "read", name, IDS, {"top": 2})
    worker.take(1, "cancel")
    request = GenerationRequest(name, prompt="the quick", temperature=0, max_tokens=3)
    worker._start(2, served.prepare(2, request, OPTIONS))
    while not any(key == 0 for events in sent for key, _ in events):
        worker.step()
    events = [event for events in sent for event in events]
    assert {key for key, _ in events} == {0, 2}, "who has gone away gets no scores"
    assert isinstance(events[-2][1], Finished), "the answer of three tokens is done"
    key, scores = events[-1]
    assert (key, len(scores["prompt_logprobs"])) == (0, len(IDS)), "before the four pieces of the prompt are"
