"""Asks without end, from sixteen at once, of which some are given up and some cannot be answered."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from inference.engines import OPTIONS, Asked, engine_over, heard, says, two_runs
from inference.soak import CLIENTS, Case, Watch, cases
from tunesmith.serve.protocol import Piece, Refused

RUNS, BASE = ("first", "second"), "model-llama"
ROOMY = replace(OPTIONS, streams=8, queue=64)
HUGE = "please " * 600
"""More than the window of the model."""

# What the child does wrong, as a module that Python imports before anything else.
PLANTED = """
import sys
if "tunesmith.serve.child" in sys.orig_argv:
    import threading
    def plant():
        {body}
    from tunesmith.serve import adapters, batch, voices
    plant()
"""
LEAK = """
        kept, right = [], voices.Voice.job
        def job(*asked):
            kept.append(bytearray(b"x" * (1 << 20)))
            return right(*asked)
        voices.Voice.job = job
"""
MIXED = """
        right = adapters.Adapters.serving
        adapters.Adapters.serving = lambda self, names, **how: right(self, names[::-1], **how)
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("soak")
    two_runs(folder)
    return folder / "runs"


def soak(asked: Asked, known: list[Case], num: int) -> Counter[str]:
    """How many asks ended how. AssertionError for an answer that is not the model's own, and for memory that grows."""
    counts: Counter[str] = Counter()
    todo = iter(range(num))
    watch = Watch({"the child": asked.engine._life._process.pid}, lambda: sum(counts.values()) / num)  # type: ignore[union-attr]

    async def client() -> None:
        for number in todo:
            draw = random.Random(number)
            counts[await one_ask(asked, draw.choice(known), draw)] += 1

    async def all_clients() -> None:
        await asyncio.gather(*(client() for _ in range(CLIENTS)))

    with watch.watching():
        asked.loop.run_until_complete(all_clients())
    watch.assert_flat()
    state = asked.engine.state()
    assert (state.restarts, state.running, state.waiting) == (0, 0, 0)
    return counts


async def one_ask(asked: Asked, case: Case, draw: random.Random) -> str:
    ask = says(case.model, case.text, max_tokens=case.max_tokens)
    kind = draw.choices(("answered", "given up", "sampled", "refused"), weights=(75, 10, 8, 7))[0]
    if kind == "answered":
        assert (await heard(asked.engine.ask(ask))).answer() == case.answer, case
    elif kind == "given up":
        left = draw.randint(0, 3)
        async with aclosing(cast(Any, asked.engine.ask(ask))) as telling:
            async for told in telling:
                left -= isinstance(told, Piece)
                if left < 0:
                    break
    elif kind == "sampled":
        drawn = says(case.model, case.text, max_tokens=6, temperature=1.0, n=draw.randint(1, 3), logprobs=2)
        assert (await heard(asked.engine.ask(drawn))).ended
    else:
        wrong: dict[str, Any] = draw.choice([{"max_tokens": 99}, {"top_p": 2.0}, {"temperature": -1.0}])
        text = draw.choice([HUGE, case.text])
        bad = says(case.model, text, **({} if text == HUGE else wrong))
        with pytest.raises(Refused):
            await heard(asked.engine.ask(bad))
    return kind


def test_a_few_hundred_asks(root: Path) -> None:
    known = cases(root, RUNS, BASE, num_texts=9)
    with engine_over(RUNS, root, ROOMY) as asked:
        assert set(soak(asked, known, 300)) == {"answered", "given up", "sampled", "refused"}


@pytest.mark.parametrize(("body", "said"), [(LEAK, "memory of the child grows"), (MIXED, "Case")])
def test_a_soak_sees(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, said: str) -> None:
    """The planted bugs: every ask leaves 1 MiB behind; the tokens of a pass go through each other's adapters."""
    (tmp_path / "sitecustomize.py").write_text(PLANTED.replace("        {body}\n", body), "utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    known = cases(root, RUNS, BASE, num_texts=3)
    with engine_over(RUNS, root, ROOMY) as asked, pytest.raises(AssertionError, match=said):
        soak(asked, known, 200)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_ten_thousand_asks(root: Path) -> None:
    known = cases(root, RUNS, BASE, num_texts=40)
    with engine_over(RUNS, root, ROOMY) as asked:
        print(soak(asked, known, 10_000))
