"""`python -m benchmarks.products`: every product of a step is counted and timed as it lay, and nothing else is."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from benchmarks.measured import Child, run_child
from benchmarks.peers import products_peer as peer

from benchmarks import products
from tiny_run import chats, model_folder, tiny_recipe
from tunesmith.errors import TunesmithError
from tunesmith.planning.tracing import Operand, Tracer
from tunesmith.training.setup import prepare

FOUND = {
    "precision": "bfloat16",
    "threads": 2,
    "tokens": 934,
    "seconds": [1.0, 0.5, 0.75],
    "num_products": 1234,
    "products_seconds": 0.5,
    "flops": 10**11,
}


def test_products_of_every_form_are_counted_and_nothing_else() -> None:
    a, b, c = torch.ones(3, 5), torch.ones(5, 2), torch.ones(3, 2)
    q = torch.ones(1, 2, 4, 8)
    with Tracer((), lambda: 0) as tracer:
        _ = a @ b, a @ b  # mm, twice
        torch.mm(a, b, out=c)
        c.addmm_(a, b).exp_().sum()
        torch.nn.functional.linear(a, b.t(), torch.ones(2))  # addmm
        torch.baddbmm(torch.zeros(1), q[0], q[0].transpose(1, 2))
        torch.bmm(q[0], q[0].transpose(1, 2))
        torch.nn.functional.scaled_dot_product_attention(q, q, q)  # a kernel of its own
    found = peer.products_of(tracer.close())
    counted = {str(product.call.func): num for product, num in found.items()}
    once = dict.fromkeys(("aten.mm.out", "aten.addmm_.default", "aten.addmm.default", "aten.bmm.default"), 1)
    assert counted == {"aten.mm.default": 2, **once, "aten.baddbmm.default": 1}
    flops = {str(product.call.func): product.flops for product in found}
    assert flops["aten.mm.default"] == flops["aten.mm.out"] == flops["aten.addmm_.default"] == 2 * 3 * 5 * 2


def test_operands_lie_as_they_did() -> None:
    transposed, repeated = Operand((3, 5), (1, 3), torch.bfloat16), Operand((2, 4), (0, 1), torch.float32)
    first, (second,), number = peer.drawn((transposed, (repeated,), 0.5))
    for made, operand in ((first, transposed), (second, repeated)):
        assert (tuple(made.shape), made.stride(), made.dtype) == (operand.shape, operand.stride, operand.dtype)
        assert made.unique().numel() > 1
    assert number == 0.5


def test_one_step_is_made_again_and_again(tmp_path: Path) -> None:
    setup = prepare(tiny_recipe(tmp_path, rows=12), root=tmp_path / "runs")
    passes = setup.plan.step(1)
    assert setup.plan.step(2) != passes
    again = peer.repeated(setup, 7)
    assert [again.plan.step(step) for step in range(1, 8)] == [passes] * 7
    assert again.total_steps == 7


def test_a_line_tells_the_share_and_what_failed() -> None:
    case = products.Case("lora", "AVX512_CORE_BF16")
    told = "| lora | AVX512_CORE_BF16 | bfloat16 | 2 | 934 | 750.0 (500.0–1,000.0) | 1,234 | 500.0 | 67% | 200 |"
    assert products.line(case, FOUND) == told
    failed = products.line(case, {"error": "a\nno disk"})
    assert "| failed: no disk |" in failed
    assert failed.count("|") == told.count("|")


def test_the_command_tells_of_a_run_and_of_one_that_failed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = []

    def in_this_process(words: Sequence[str], *, log: Path, settings: Mapping[str, str]) -> Child:
        """What `run_child` does, without the seconds that a new process needs to import torch."""
        limits.append(settings)
        try:
            peer.main(*words[3:])
        except TunesmithError as error:
            return Child(1, 1.0, 1, 0.0, str(error))
        return Child(0, 1.0, 1, 0.0, "")

    monkeypatch.setattr(products, "run_child", in_this_process)
    monkeypatch.setattr(products, "prepare_environment", lambda *_: None)  # this process goes on with other tests
    model, data = model_folder(tmp_path / "model"), chats(tmp_path / "rows.jsonl", 24)
    words = ["--model", str(model), "--train", str(data), "--method", "full", "--isa", "AVX2", "--rows-per-step", "4"]
    words += ["--steps", "1", "--set", "threads=1", "--set", "precision=float32"]
    assert products.main(words) == 0
    *_, last = capsys.readouterr().out.splitlines()
    _, method, instructions, precision, threads, tokens, _step, num, *_ = (cell.strip() for cell in last.split("|"))
    assert (method, instructions, precision, threads) == ("full", "AVX2", "float32", "1")
    assert limits == [{"ONEDNN_MAX_CPU_ISA": "AVX2"}]
    assert int(tokens) > 4
    # q, k, v, o, gate, up, down of two layers and the head: forward, gradients of inputs and of weights; attention more
    assert int(num) >= 3 * (7 * 2 + 1)
    assert products.main([*words, "--operations", "40"]) == 0
    _, told = capsys.readouterr().out.split("full, AVX2:\n")
    named = {line.split("|")[1].strip() for line in told.splitlines() if line.startswith("| ")}
    assert {"operation", "aten::mm", "aten::_fused_adamw_"} <= named
    assert len(named) == 1 + 40
    assert products.main([*words, "--train", str(tmp_path / "none.jsonl")]) == 1
    assert "| failed: " in capsys.readouterr().out


def test_settings_are_there_before_a_child_begins(tmp_path: Path) -> None:
    code = "import os; print(os.environ['ONEDNN_MAX_CPU_ISA'])"
    words = [sys.executable, "-c", code]
    assert run_child(words, log=tmp_path / "log", settings={"ONEDNN_MAX_CPU_ISA": "AVX2"}).tail == "AVX2"
