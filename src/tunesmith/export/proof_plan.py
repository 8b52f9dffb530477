"""The plan of a comparison: device and dtype of both sides, number of tokens, and how long it takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from tunesmith.export.run_result import RunResult
from tunesmith.export.target import Computing, ExportTarget
from tunesmith.models import machine
from tunesmith.models.size import model_size
from tunesmith.phrases import about
from tunesmith.planning import devices

MANY_TOKENS, FEW_TOKENS, FEWEST_TOKENS = 8192, 2048, 512
"""Tokens of all rows together, at most: of a processor that takes longer than `LONG_S`, or even than
`VERY_LONG_S`, fewer."""
SLACK = 1.2
"""Memory of a computing model, as a factor of its weights."""
LONG_S = 60.0
"""Seconds from which on the time is said before."""
VERY_LONG_S = 600.0
"""Seconds from which on a processor reads fewer tokens still, and in bfloat16 if it has that in hardware."""
REACHED = 0.4
"""Share of the speed of a large product that a model reaches with one row at a time. Measured: 0.3 to 0.5."""
FLOAT16 = 0.2
"""The speed of float16 on a processor as a share of float32's; measured: 6 to 10 of 20 to 37 GFLOP/s."""


@dataclass(frozen=True, slots=True)
class ProofPlan:
    """One device for the tuned model and for its export, and what they compute in there."""

    device: str
    tuned: str
    """Dtype of the tuned model and of its base."""
    exported: str
    tokens: int
    """Tokens of all compared rows together, at most."""
    seconds: float
    """Time of computing, estimated from its operations."""
    work: str
    """A description of the work."""

    @property
    def computing(self) -> Computing:
        """Device and dtype of the export."""
        return Computing(self.device, self.exported)

    @property
    def on(self) -> dict[str, str]:
        """Options of a recipe for the tuned model."""
        return {"device": self.device, "precision": self.tuned}

    @property
    def is_exact(self) -> bool:
        """Whether both sides are computed in float32."""
        return self.tuned == self.exported == "float32"

    def note(self) -> str:
        """A warning of a long comparison, to be printed before it; "" for less than a minute."""
        return f"the comparison takes {about(self.seconds)}: {self.work}" if self.seconds > LONG_S else ""


def plan_proof(result: RunResult, target: ExportTarget, written: str, *, num_tokens: int) -> ProofPlan:
    """The plan for an export whose weights are `written` in a dtype; "": in none of torch's.

    The card of the run, if it is free for the larger side: in float32, else in the precision of the run.
    Otherwise the processor: in float32, or in bfloat16 where float32 has no room or takes minutes longer. Files
    are computed in their own dtype; float16, which a processor is slow in, in float32 where that has room.
    `num_tokens`: of all rows.
    """
    params = model_size(result.weights).num_params
    # The tuned model, its export, its base, and that packed.
    passes = 2 + result.is_adapter + (result.quant is not None)
    run_device = result.recipe.device
    card = run_device if target.on_card and torch.device(run_device).type == "cuda" and is_here(run_device) else None
    sides = [("cpu", "float32"), ("cpu", "bfloat16")]
    if card is not None:
        sides = [*dict.fromkeys([(card, "float32"), (card, result.recipe.precision)]), *sides]
    for device, tuned in sides:
        exported = written or tuned
        if exported == "float16" and device == "cpu" and _fits(result, params, "cpu", "float32"):
            exported = "float32"
        tokens = num_tokens
        seconds = passes * _seconds(params, tokens, device, {tuned, exported})
        for limit_s, fewer in ((LONG_S, FEW_TOKENS), (VERY_LONG_S, FEWEST_TOKENS)) if device == "cpu" else ():
            if seconds > limit_s and tokens > fewer:
                tokens, seconds = fewer, seconds * fewer / tokens
        is_slow = (
            device == "cpu" and seconds > VERY_LONG_S and machine.choose_precision("auto", "cpu").value == "bfloat16"
        )
        of_device = {tuned} if device == "cpu" else {tuned, exported}  # an export's files are mapped
        if not is_slow and all(_fits(result, params, device, dtype) for dtype in of_device):
            break
    where = "the processor" if device == "cpu" else torch.cuda.get_device_name(device)
    dtypes = " and ".join(dict.fromkeys((tuned, exported)))
    work = f"{passes} × {tokens:,} tokens through {params / 1e9:.2g} B weights on {where}, in {dtypes}"
    return ProofPlan(device, tuned, exported, tokens, seconds, work)


def is_here(device: str) -> bool:
    """Whether the device of a run is on this machine."""
    return torch.device(device).type != "cuda" or torch.cuda.is_available()


def _fits(result: RunResult, params: int, device: str, dtype: str) -> bool:
    """Whether weights in `dtype` have room. Read as stored, they stay in their files on a processor."""
    stored: torch.dtype = getattr(torch, dtype)
    wanted = params * stored.itemsize * SLACK
    if device != "cpu":
        return wanted <= int(torch.cuda.mem_get_info(device)[0])
    stays_in_files = not result.weights.is_gguf and result.stored_dtype == stored
    return stays_in_files or wanted <= devices.room("cpu")


def _seconds(params: int, tokens: int, device: str, dtypes: set[str]) -> float:
    """Seconds of one forward pass, in the slower of the dtypes."""
    threads = torch.get_num_threads()

    def speed(dtype: str) -> float:
        slow = dtype == "float16" and device == "cpu"
        timed: Any = torch.float32 if slow else getattr(torch, dtype)
        return devices.here(device, threads=threads, dtype=timed).products * (FLOAT16 if slow else 1.0)

    return 2.0 * params * tokens / (REACHED * min(map(speed, dtypes)))
