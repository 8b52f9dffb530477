"""Prompts that are scored: what the model of a run finds likely at each place, whatever else is decoded."""

from typing import Any

import pytest
import torch

from serve.batches import RUNS, VOCAB, decoder, tuned
from tunesmith.generation import decoder as decoders
from tunesmith.generation.decoder import BatchedDecoder, SequentialDecoder

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
