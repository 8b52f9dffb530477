"""`python -m benchmarks experts`: steps with adapters on experts, beside PEFT's `target_parameters`.

A random mixture in the form of Qwen3-MoE, and the same adapters of one rank on attention and experts: ours, and PEFT's
on the same model, in turns, each in a process of its own. A step is a forward and a backward of the model's loss and an
update by torch's AdamW, alike on both sides.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.measured import machine, run_child, versions

SIDES = ("ours", "peft", "attention alone")
WARM = 2


def add_experts(verbs: Any) -> None:
    experts = verbs.add_parser(
        "experts",
        help="adapters on the experts of a mixture, beside PEFT's target_parameters",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = experts.add_argument
    add("--layers", type=int, default=8)
    add("--experts", type=int, default=16, help="in each layer")
    add("--per-token", type=int, default=2, help="experts of a token")
    add("--hidden", type=int, default=512)
    add("--width", type=int, default=256, help="of an expert")
    add("--tokens", type=int, default=512, help="of a step")
    add("--rank", type=int, default=8, help="of every adapter, on both sides")
    add("--dtype", default="float32", choices=["float32", "bfloat16"])
    add("--steps", type=int, default=8, help=f"the first {WARM} do not count")
    add("--rounds", type=int, default=3)
    add("--threads", type=int, default=1)
    experts.set_defaults(run=_experts)


def _experts(options: argparse.Namespace, words: Sequence[str]) -> int:
    sizes = {key: value for key, value in vars(options).items() if isinstance(value, str | int)}
    turns: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(options.rounds):
            for side in SIDES:
                log = Path(folder) / "log"
                words = [sys.executable, "-m", "benchmarks.experts", side, json.dumps(sizes)]
                child = run_child(words, log=log, settings={"OMP_NUM_THREADS": str(options.threads)})
                if child.code:
                    print(f"{side} failed:\n{child.tail}", file=sys.stderr)
                    return 1
                turns[side].append(json.loads(child.tail.splitlines()[-1]))
    print(
        "| | trained, million | ms a step | beside ours, in pairs | memory of a step, MiB |\n|---|---:|---:|---:|---:|"
    )
    for side, results in turns.items():
        ratios = [theirs["seconds"] / ours["seconds"] for ours, theirs in zip(turns["ours"], results, strict=True)]
        print(
            f"| {side} | {results[0]['trained'] / 1e6:.2f} | {_spread([1e3 * one['seconds'] for one in results], 0)} | "
            f"{_spread(ratios, 2)} | {_spread([one['bytes'] / 2**20 for one in results], 0)} |"
        )
    losses = ", ".join(f"{side} {results[0]['loss']:.5f}" for side, results in turns.items())
    print(f"\nlosses of the last step: {losses}")
    print(json.dumps({"machine": machine(), "versions": versions()}))
    return 0


def _spread(values: Sequence[float], digits: int) -> str:
    low, middle, high = (f"{value:.{digits}f}" for value in (min(values), statistics.median(values), max(values)))
    return f"{middle} ({low} to {high})"


def _turn(side: str, sizes: dict[str, Any]) -> dict[str, float]:
    """Median seconds of a step of one side, and what the process grew by in its steps."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.set_num_threads(sizes["threads"])
    config = AutoConfig.for_model(
        "qwen3_moe",
        vocab_size=1024,
        hidden_size=sizes["hidden"],
        num_hidden_layers=sizes["layers"],
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=sizes["hidden"] // 8,
        num_experts=sizes["experts"],
        num_experts_per_tok=sizes["per_token"],
        moe_intermediate_size=sizes["width"],
        norm_topk_prob=True,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, sizes["dtype"]))
    trained, publish = _adapted(side, model, sizes["rank"])
    ids = torch.randint(0, 1024, (1, sizes["tokens"]), generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    before, seconds, value = _resident(), [], 0.0
    for _ in range(sizes["steps"]):
        begun = time.perf_counter()
        loss = model(ids, labels=ids).loss
        loss.backward()
        publish(optimizer)
        seconds.append(time.perf_counter() - begun)
        value = float(loss.detach())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    num_trained = sum(tensor.numel() for tensor in trained)
    return {"seconds": statistics.median(seconds[WARM:]), "bytes": peak - before, "loss": value, "trained": num_trained}


def _adapted(side: str, model: Any, rank: int) -> tuple[list[Any], Any]:
    """The trained tensors, and what updates them."""
    if side == "peft":
        import peft

        names = [f"{name}_proj" for name in "qkvo"]
        parameters = ["experts.gate_up_proj", "experts.down_proj"]
        settings = {"r": rank, "lora_alpha": 2 * rank, "target_modules": names, "target_parameters": parameters}
        theirs = peft.get_peft_model(model, peft.LoraConfig(**settings))
        trained = [weight for weight in theirs.parameters() if weight.requires_grad]

        def update(optimizer: Any) -> None:
            optimizer.step()
            optimizer.zero_grad()

        return trained, update
    from tunesmith.methods.lora import attach
    from tunesmith.recipe.methods import LoraMethod

    targets = ("all-linear", "experts") if side == "ours" else ("all-linear",)
    patterns = {"experts": rank} if side == "ours" else {}
    attachment = attach(model, LoraMethod(rank=rank, alpha=2 * rank, targets=targets, rank_pattern=patterns), seed=0)

    def collect(optimizer: Any) -> None:
        attachment.collect_gradients()
        optimizer.step()
        optimizer.zero_grad()
        attachment.publish()

    return list(attachment.trained.values()), collect


def _resident() -> int:
    """Bytes of this process in memory."""
    pages = int(Path("/proc/self/statm").read_text("ascii").split()[1])
    return pages * resource.getpagesize()


if __name__ == "__main__":
    print(json.dumps(_turn(sys.argv[1], json.loads(sys.argv[2]))))
