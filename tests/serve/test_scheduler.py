"""Answers written together are those written alone, whoever comes and goes beside them."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch

from lora_reference import lora_forward_reference
from often import often
from serve.batches import (
    RENDERER,
    RUNS,
    Heard,
    adapt,
    alone,
    decoder,
    hear,
    job,
    prompts,
    put_on,
    run,
    sharp,
    taken,
)  # fmt: skip
from tunesmith.generation import kv_cache
from tunesmith.generation.adapters import AdapterSet, LowRankPath, MultiLoraLinear, RowMismatchError
from tunesmith.generation.decoder import BatchedDecoder, SequentialDecoder, why_unlike
from tunesmith.generation.padded import generate
from tunesmith.generation.scheduler import Scheduler
from tunesmith.methods import lora
from tunesmith.models.heads import generator
from tunesmith.recipe.methods import LoraMethod
from tunesmith.serve.protocol import GenerationRequest

WHO = (None, *RUNS)
TOGETHER = (
    "llama", "gpt2", "qwen3", "gemma2", "gemma3_text", "mistral", "phi3", "opt", "gpt_neox", "smollm3", "cohere",
)  # fmt: skip


# trap: A6, A7, A11
def assert_ragged_answers_are_those_alone(arch: str, make: Callable[[str], Any], seed: int) -> None:
    """Asks of three models join at random times, some leave, and each answer is that of `generation.answer` alone."""
    draw = random.Random(seed)
    batch = Scheduler(make(arch), streams=5)
    asked: dict[int, tuple[str | None, tuple[int, ...], int]] = {}
    heard: dict[int, Heard] = defaultdict(Heard)
    gone: set[int] = set()
    coming = [(draw.choice(WHO), prompt, draw.choice((1, 4, 24))) for prompt in prompts(12, seed=seed)]
    while coming or batch.is_busy:
        while coming and draw.random() < 0.4:
            key = len(asked)
            asked[key] = coming.pop()
            adapter, prompt, most = asked[key]
            batch.add(job(key, prompt, adapter=adapter, max_new_tokens=most))
        if asked and draw.random() < 0.05:
            gone.add(draw.randrange(len(asked)))
            batch.cancel(max(gone))
        hear(batch.step(), heard)
    for key, (adapter, prompt, most) in asked.items():
        if key not in gone:
            assert heard[key].started == len(prompt)
            assert heard[key].answer() == alone(arch, adapter, prompt, most), (key, adapter)
    assert len({heard[key].texts[0] for key in asked}) > len(asked) // 2
    assert batch.running == 0


@pytest.fixture
def small_rooms(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pools of 4, 8, 16, ... tokens, so that texts move between them, and prompts that are read in parts."""
    monkeypatch.setattr(kv_cache, "SMALLEST", 4)
    monkeypatch.setattr("tunesmith.generation.scheduler.PREFILL_TOKENS", 7)
    monkeypatch.setattr("tunesmith.generation.scheduler.PREFILL_TOKENS_ALONE", 16)


@pytest.mark.usefixtures("small_rooms")
@pytest.mark.parametrize(
    ("arch", "seed"),
    often(
        [*((arch, number % 3) for number, arch in enumerate(TOGETHER)), ("llama", 1), ("llama", 2)],
        "llama",
        "gpt2",
        "gemma2",
        "gemma3_text",
    ),
)
def test_answers_together_are_those_alone(arch: str, seed: int) -> None:
    assert_ragged_answers_are_those_alone(arch, decoder, seed)


@pytest.mark.usefixtures("small_rooms")
@pytest.mark.parametrize(
    "arch", often(["llama", "gemma3_text", "bloom", "falcon", "t5", "bart"], "llama", "bloom", "t5")
)
def test_answers_apart_are_those_alone(arch: str) -> None:
    assert_ragged_answers_are_those_alone(arch, lambda arch: decoder(arch, SequentialDecoder), 0)


def with_one_adapter_for_all(arch: str) -> BatchedDecoder:
    """The planted bug: the first adapter answers for everyone."""

    class First(AdapterSet):
        def active(self, names: Any, **how: Any) -> Any:
            return super().active(["first"] * len(names), **how)

    model = sharp(arch)
    adapters = First(model)
    put_on(adapters, {name: taken(adapt(model, name)) for name in RUNS})
    return BatchedDecoder(model, adapters)


def with_adapters_ignored(arch: str) -> Any:
    """The planted bug: names of layers do not fit, and nothing says so."""
    made = decoder(arch)
    for module in made.model.modules():  # type: ignore[attr-defined]
        if isinstance(module, MultiLoraLinear):
            module.paths = {}
    return made


def with_the_scale_lost(arch: str) -> Any:
    """The planted bug: alpha / rank is 1."""
    made = decoder(arch)
    for module in made.model.modules():  # type: ignore[attr-defined]
        if isinstance(module, MultiLoraLinear):
            module.paths = {name: type(path)(path.a_RI, path.b_OR, 1.0) for name, path in module.paths.items()}
    return made


@pytest.mark.slow
@pytest.mark.usefixtures("small_rooms")
@pytest.mark.parametrize("planted", [with_one_adapter_for_all, with_adapters_ignored, with_the_scale_lost])
def test_the_test_sees_wrong_adapters(planted: Callable[[str], Any]) -> None:
    with pytest.raises(AssertionError):
        assert_ragged_answers_are_those_alone("llama", planted, 0)


@pytest.mark.usefixtures("small_rooms")
@pytest.mark.parametrize("arch", ["llama", "mistral"])
def test_the_test_sees_a_row_that_reads_too_far(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted bugs: rows of a pool read what lies behind them, or before their window."""

    def everything(rows: Any, window: int | None, dtype: torch.dtype) -> torch.Tensor | None:
        return None if arch == "llama" else own(rows, None, dtype)

    own = kv_cache.DecodeRows.mask
    monkeypatch.setattr(kv_cache.DecodeRows, "mask", everything)
    found = []
    for seed in range(3):  # what lies behind them are zeros, which not every answer shows
        with suppress(AssertionError):
            assert_ragged_answers_are_those_alone(arch, decoder, seed)
            found.append(seed)
    assert len(found) < 3


def test_a_row_moved_into_a_hole_keeps_its_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted bug: the last row takes the place of one that has ended, and leaves its keys behind."""

    def without_keys(pool: Any, row: int) -> None:
        last = pool.slots.pop()
        if row != len(pool.slots):
            pool.slots[row], last.row = last, row

    monkeypatch.setattr(kv_cache.KVPool, "free", without_keys)
    with pytest.raises(AssertionError):
        assert_ragged_answers_are_those_alone("llama", decoder, 0)


@pytest.mark.parametrize("arch", ["llama", "bart"])
def test_answers_of_one_ask_share_its_prompt_and_differ(arch: str) -> None:
    kind = SequentialDecoder if arch == "bart" else BatchedDecoder
    [prompt] = prompts(1)
    how = GenerationRequest("", temperature=5.0, seed=7)
    found = run(Scheduler(decoder(arch, kind), streams=4), job(0, prompt, sampling=how, n=3))[0]
    assert len({found.texts[i] for i in range(3)}) == 3
    greedy = run(Scheduler(decoder(arch, kind), streams=4), job(0, prompt, n=3))[0]
    assert {greedy.answer(i) for i in range(3)} == {alone(arch, None, prompt, 64)}


def test_the_same_seed_answers_the_same_in_company() -> None:
    made = prompts(6)
    how = GenerationRequest("", temperature=2.0, top_p=0.9, seed=11)
    by_itself = run(Scheduler(decoder("llama"), streams=8), job(0, made[0], sampling=how))[0]
    others = [
        job(key, made[key], sampling=GenerationRequest("", temperature=1.0), adapter="first") for key in range(1, 6)
    ]
    in_company = run(Scheduler(decoder("llama"), streams=8), *others, job(0, made[0], sampling=how))[0]
    assert in_company.texts == by_itself.texts
    other_seed = run(
        Scheduler(decoder("llama"), streams=8),
        job(0, made[0], sampling=GenerationRequest("", temperature=2.0, seed=12)),
    )[0]
    assert other_seed.texts != by_itself.texts


def test_asks_wait_for_a_place_in_their_order() -> None:
    batch = Scheduler(decoder("llama"), streams=2)
    for key, prompt in enumerate(prompts(4)):
        batch.add(job(key, prompt, max_new_tokens=3, n=2 if key == 1 else 1))
    begun: list[int] = []
    while batch.is_busy:
        begun += [key for key, told in batch.step() if type(told).__name__ == "Started"]
        assert batch.running <= 2
    assert begun == [0, 1, 2, 3]


def test_numbers_that_are_not_finite_end_the_ask_and_no_other() -> None:
    made = decoder("llama")
    model: Any = made.model  # type: ignore[attr-defined]
    with torch.no_grad():
        model.get_input_embeddings().weight[300] = float("nan")
    found = run(Scheduler(made, streams=4), job(0, [301, 300], n=2), job(1, [301, 302], max_new_tokens=5))
    assert (found[0].refused.status, found[0].refused.code) == (500, "non_finite")
    assert not found[0].ended
    assert found[1].answer() == alone("llama", None, (301, 302), 5)


def test_a_shared_layer_is_each_tokens_own_adapter() -> None:
    """Token by token through the reference of `methods.lora`, with tokens of all adapters mixed."""
    made: Any = decoder("llama")
    layer = next(module for module in made.model.modules() if isinstance(module, MultiLoraLinear))
    x_TI = torch.randn(9, layer.weight.shape[1], generator=torch.Generator().manual_seed(0))
    names = [WHO[i % 3] for i in range(9)]
    with made.adapters.active(names), torch.no_grad():
        found_TO = layer(x_TI[None])[0]
        for x_I, name, y_O in zip(x_TI, names, found_TO, strict=True):
            path = layer.paths.get(name or "")
            expected_O = layer.base(x_I)
            if path is not None:
                base: Any = layer.base
                expected_O = lora_forward_reference(x_I, base.weight, base.bias, path.a_RI, path.b_OR, scale=path.scale)
            torch.testing.assert_close(y_O, expected_O, rtol=1e-5, atol=1e-5)  # float32, sums in another order


def head_runs() -> tuple[Any, dict[str, Any]]:
    """A base with two runs, of which one adapts its head alone, and the model of each run by itself."""

    def one(name: str) -> tuple[Any, Any]:
        model = sharp("llama", tie_word_embeddings=False)
        targets = ("lm_head",) if name == "head" else ("attention",)
        attachment = lora.attach(model, LoraMethod(rank=3, alpha=24, targets=targets), seed=3)
        for key, tensor in attachment.trained.items():
            if "lora_B" in key:
                tensor.data.normal_(0.0, 0.3, generator=generator(4, key))
        attachment.publish()
        return model, attachment

    made = {name: one(name) for name in ("head", "inner")}
    base = sharp("llama", tie_word_embeddings=False)
    adapters = AdapterSet(base)
    for name, (_, attachment) in made.items():
        paths = {
            layer: LowRankPath(module.lora_A.detach(), module.lora_B.detach(), module.scale)
            for layer, module in attachment.layers.items()
        }
        adapters.put(name, paths)
    return BatchedDecoder(base, adapters), {name: model for name, (model, _) in made.items()}


# trap: A16
def assert_an_adapted_head_answers_its_own_run() -> None:
    together, models = head_runs()
    asked = [(name, prompt) for prompt in prompts(6, seed=5) for name in models]
    jobs = [job(key, prompt, adapter=name, max_new_tokens=6) for key, (name, prompt) in enumerate(asked)]
    found = run(Scheduler(together, streams=5), *jobs)
    for key, (name, prompt) in enumerate(asked):
        [expected] = generate(models[name], RENDERER, [prompt], 6)
        assert found[key].answer() == expected, name
    assert len({one.texts[0] for one in found.values()}) > 8


def test_a_run_that_adapts_the_head_is_answered_beside_others(monkeypatch: pytest.MonkeyPatch) -> None:
    assert_an_adapted_head_answers_its_own_run()
    # The planted bug: the head sees the last token of each text alone, and its rows are taken for the pass's tokens.
    monkeypatch.setattr("tunesmith.generation.decoder.MultiLoraLinear", str)
    with pytest.raises(RowMismatchError, match=r"rows of a pass of \d+ tokens"):
        assert_an_adapted_head_answers_its_own_run()
    served = AdapterSet.active
    monkeypatch.setattr(AdapterSet, "active", lambda adapters, names, mixed=False: served(adapters, names))
    with pytest.raises((AssertionError, IndexError)):
        assert_an_adapted_head_answers_its_own_run()


def test_a_model_whose_adapted_layers_see_other_rows_is_run_apart() -> None:
    """As experts in a list do, each of which sees the tokens that are sent to it."""

    class Half(torch.nn.Module):
        def __init__(self, inner: Any) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            half = x.shape[1] // 2
            return torch.cat((self.inner(x[:, :half]), self.inner(x[:, half:])), 1)

    made: Any = decoder("llama")
    mlp = made.model.model.layers[0].mlp
    assert isinstance(mlp.up_proj, MultiLoraLinear)
    assert why_unlike(BatchedDecoder, made.model, made.adapters) == ""
    mlp.up_proj = Half(mlp.up_proj)
    assert "an adapted layer sees" in why_unlike(BatchedDecoder, made.model, made.adapters)


def test_a_text_that_was_not_finite_leaves_nothing_to_the_next() -> None:
    """The third text takes the row of the first, and is longer than what was copied into it."""
    made = decoder("llama")
    batch = Scheduler(made, streams=3)
    heard: dict[int, Heard] = defaultdict(Heard)
    fine = [301, 302, 303]
    batch.add(job(0, fine, max_new_tokens=30))
    batch.add(job(1, [301] * 44, max_new_tokens=2))
    while batch.running < 2 or not all(slot.pool for slot in batch._answers):
        hear(batch.step(), heard)
    for slot, one in batch._answers.items():
        if one.request.key == 1:
            with torch.inference_mode():
                for key_NGLD, value_NGLD in slot.pool.layers.values():
                    key_NGLD[slot.row] = value_NGLD[slot.row] = float("nan")  # what an overflow leaves
    batch.add(job(2, fine[:2], max_new_tokens=30))
    while batch.is_busy:
        hear(batch.step(), heard)
    assert heard[1].refused.code == "non_finite"
    assert heard[0].answer() == alone("llama", None, tuple(fine), 30)
    assert heard[2].answer() == alone("llama", None, tuple(fine[:2]), 30)


def test_an_answer_whose_grammar_bars_every_token_is_refused() -> None:
    class Nothing:
        def mask(self, logits_V: torch.Tensor) -> None:
            logits_V.fill_(float("-inf"))

        def accept(self, token_id: int) -> None:
            raise AssertionError("nothing may be written")

        def is_complete(self) -> bool:
            return False

    [first, second] = prompts(2)
    found = run(
        Scheduler(decoder("llama"), streams=2), job(0, first, grammar=Nothing), job(1, second, max_new_tokens=5)
    )
    assert (found[0].refused.status, found[0].refused.code) == (400, "invalid_schema")
    assert found[1].answer() == alone("llama", None, tuple(second), 5)
