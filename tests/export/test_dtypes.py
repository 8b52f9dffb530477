"""An export is computed in its own dtype for the comparison, on one device with the tuned model; `auto` takes the first
dtype that agrees; and what is merged never lies in memory as a whole."""

import gc
import json
import re
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from export.exports import LORA, RESOLVED, as_if_tuned, chat_recipe, finished, quick
from tiny import tiny_tokenizer
from tiny_model import tiny_model
from tiny_tasks import task_recipe
from tunesmith.errors import ExportError
from tunesmith.export import proof_plan, verify
from tunesmith.export.export_run import TARGETS, export_planned, export_run
from tunesmith.export.proof_plan import plan_proof
from tunesmith.export.run_result import open_result
from tunesmith.export.target import Computing, ExportOptions
from tunesmith.methods.adapter_format import WEIGHTS
from tunesmith.models import save
from tunesmith.models.load import load_model
from tunesmith.models.resolve_model import resolve_model
from tunesmith.planning import devices
from tunesmith.runs.folder import Run


def short_run(tmp_path: Path, *, size: float = 0.05) -> Run:
    """A run in 16 bits, on a base in 16 bits, whose adapter is so small that rounding to them loses it."""
    recipe = task_recipe(
        tmp_path, "chat", "causal", rows=8, method=LORA, data=RESOLVED["data"], precision="bfloat16",
        export={"to": ["merged"]},
    )  # fmt: skip
    base = Path(recipe.model)
    model = load_model(resolve_model(str(base), offline=True), dtype=torch.bfloat16, device="cpu")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "proj" in name:
                weight.mul_(40)  # far larger than what is added to them
    model.save_pretrained(base)
    run = as_if_tuned(recipe, tmp_path / "short")
    path = run.adapter_path / WEIGHTS
    tensors = {name: tensor * size if "lora_B" in name else tensor for name, tensor in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    return run


def dtype_of(folder: Path) -> torch.dtype:
    return load_file(folder / "model.safetensors")["model.norm.weight"].dtype


def test_a_float32_export_of_a_run_in_bfloat16_is_exact(tmp_path, monkeypatch):
    quick(monkeypatch)
    run = short_run(tmp_path)
    done = export_run(run, "merged", out=tmp_path / "out", offline=True, options=ExportOptions(dtype="float32"))
    assert done.found.kl < 1e-9
    assert dtype_of(done.path) == torch.float32
    facts = json.loads((done.path / "verify.json").read_text())
    assert (facts["device"], facts["computed"]) == ("cpu", {"tuned": "float32", "export": "float32"})


def test_an_export_is_not_judged_in_a_coarser_dtype_than_its_own(tmp_path, monkeypatch):  # trap: A20
    quick(monkeypatch)
    run = short_run(tmp_path)
    assert_float32_agrees(run, tmp_path / "right")
    monkeypatch.setattr(verify, "Computing", lambda device, precision: Computing(device, "bfloat16"))
    with pytest.raises(AssertionError):  # as all exports of a run in bfloat16 were once computed
        assert_float32_agrees(run, tmp_path / "wrong")


def assert_float32_agrees(run: Run, out: Path) -> None:
    try:
        export_run(run, "merged", out=out, offline=True, options=ExportOptions(dtype="float32"))
    except ExportError as error:
        raise AssertionError from error


@pytest.mark.parametrize("planned", [False, True])
def test_auto_takes_the_first_dtype_that_agrees_and_says_why(tmp_path, monkeypatch, planned):
    quick(monkeypatch)
    run = short_run(tmp_path)
    # planned: as of `train --export merged`
    done = export_planned(run, "merged") if planned else export_run(run, "merged", out=tmp_path / "out", offline=True)
    assert dtype_of(done.path) in (torch.float16, torch.float32)
    name = str(dtype_of(done.path)).removeprefix("torch.")
    [note] = [note for note in done.notes if note.startswith("dtype: ")]
    assert note.startswith(f"dtype: {name}: the first that agrees with the tuned model; not bfloat16: it")
    assert [path.name for path in done.path.parent.iterdir() if path.name.startswith(".")] == []


def test_a_dtype_that_was_named_is_refused_with_the_command_that_works(tmp_path, monkeypatch):
    quick(monkeypatch)
    run = short_run(tmp_path)
    with pytest.raises(ExportError, match=r"nothing was kept: bfloat16: ") as error:
        export_run(run, "merged", out=tmp_path / "out", offline=True, options=ExportOptions(dtype="bfloat16"))
    assert f"`tunesmith export {run.path} --to merged --dtype auto` takes the first dtype" in str(error.value)
    assert not (tmp_path / "out").exists()


def test_without_the_comparison_auto_says_that_it_does_not_know(tmp_path):
    done = export_run(short_run(tmp_path), "merged", out=tmp_path / "out", offline=True, proof=False)
    assert dtype_of(done.path) == torch.bfloat16
    assert "dtype: bfloat16: not compared, so whether a finer one is needed is not known" in done.notes


def card(monkeypatch: pytest.MonkeyPatch, *, free: int, products: float = 4e14) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (free, 16 * 2**30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device=None: 0)
    monkeypatch.setattr(devices, "_measured", lambda device, **how: (products, 3e11))
    monkeypatch.setattr(devices, "prepare_allocator", lambda device: None)
    monkeypatch.setattr(devices, "in_use", lambda device: "")


def on_a_card(run: Run, **given: Any) -> Run:
    text = run.recipe_path.read_text("utf-8")
    for key, value in {"device": "cuda", "precision": "float16", **given}.items():
        text = re.sub(rf"^{key}: .*$", f"{key}: {value}", text, flags=re.M)
    run.recipe_path.write_text(text, "utf-8")
    return run


@pytest.mark.parametrize(
    ("free", "written", "where"),
    [
        (10**12, "bfloat16", ("cuda", "float32", "bfloat16")),
        (12 * 10**9, "bfloat16", ("cpu", "float32", "bfloat16")),
        (20 * 10**9, "bfloat16", ("cuda", "float16", "bfloat16")),
        (20 * 10**9, "float32", ("cpu", "float32", "float32")),  # both sides fit one device, or none of them is on it
        (20 * 10**9, "", ("cuda", "float16", "float16")),
        (12 * 10**9, "float16", ("cpu", "float32", "float32")),
    ],
)
def test_both_sides_are_on_the_card_if_both_fit_it(tmp_path, monkeypatch, free, written, where):
    result = open_result(on_a_card(short_run(tmp_path)), offline=True)
    card(monkeypatch, free=free)
    monkeypatch.setattr(proof_plan, "model_size", lambda located: type("Size", (), {"num_params": 8 * 10**9}))
    monkeypatch.setattr(devices, "room", lambda device: 64 * 10**9)
    plan = plan_proof(result, TARGETS["merged"], written, num_tokens=8000)
    assert (plan.device, plan.tuned, plan.exported) == where
    assert plan.tokens == 8000  # so fast a device reads all of them


def test_a_processor_proves_large_models_on_fewer_tokens_and_says_the_time(tmp_path, monkeypatch):
    result = open_result(short_run(tmp_path), offline=True)
    monkeypatch.setattr(proof_plan, "model_size", lambda located: type("Size", (), {"num_params": 8 * 10**9}))
    monkeypatch.setattr(devices, "_measured", lambda device, **how: (50e9, 1e10))
    monkeypatch.setattr(devices, "room", lambda device: 12 * 10**9)
    plan = plan_proof(result, TARGETS["merged"], "bfloat16", num_tokens=8000)
    # 12 GB have no room for 8 B numbers of four bytes; those of two stay in their files
    assert (plan.device, plan.tuned, plan.exported, plan.tokens) == ("cpu", "bfloat16", "bfloat16", 512)
    assert plan.seconds == pytest.approx(3 * 2 * 8e9 * 512 / (50e9 * proof_plan.REACHED))
    assert plan.note() == (
        "the comparison takes about 20 min: 3 × 512 tokens through 8 B weights on the processor, in bfloat16"
    )
    monkeypatch.setattr(proof_plan, "model_size", lambda located: type("Size", (), {"num_params": 10**7}))
    assert plan_proof(result, TARGETS["merged"], "bfloat16", num_tokens=8000).note() == ""
    monkeypatch.setattr(proof_plan, "model_size", lambda located: type("Size", (), {"num_params": 5 * 10**8}))
    assert plan_proof(result, TARGETS["merged"], "bfloat16", num_tokens=8000).tokens == 2048


def test_a_run_of_a_card_that_is_full_is_exported_by_the_processor(tmp_path, monkeypatch):
    """The job of the other process and this one name the same device, and no model is loaded on the card."""
    jobs: list[dict[str, Any]] = []

    def launch(job: Path, tick: Any, **how: Any) -> None:
        jobs.append(json.loads(job.read_text()))
        verify.do_job(job, TARGETS)

    loaded: list[tuple[str, str]] = []
    run = on_a_card(short_run(tmp_path))
    card(monkeypatch, free=1000)
    monkeypatch.setattr(verify, "launch", launch)
    real = verify.load_run

    def load_run(run: Run, **how: Any) -> Any:
        loaded.append((how["on"]["device"], how["on"]["precision"]))
        if how["on"]["device"] != "cpu":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(run, **how)

    monkeypatch.setattr(verify, "load_run", load_run)
    monkeypatch.setattr(verify, "free_cached_memory", lambda: loaded.append(("freed", "")))
    done = export_run(run, "merged", out=tmp_path / "out", offline=True, options=ExportOptions(dtype="float32"))
    assert done.found is not None
    assert loaded == [("cpu", "float32"), ("freed", "")]
    assert jobs[0]["computing"] == {"device": "cpu", "precision": "float32"}


def large_run(tmp_path: Path) -> Run:
    """Of a base of 57 MB in bfloat16, whose largest tensor has 1 MB."""
    tokenizer = tiny_tokenizer()
    model = tiny_model(vocab_size=len(tokenizer), hidden=512, layers=12, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return as_if_tuned(chat_recipe(tmp_path), tmp_path / "large")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux counts anonymous memory by itself")
def test_merging_takes_a_tenth_of_the_model_in_memory(tmp_path):
    run = large_run(tmp_path)
    result = open_result(run, offline=True)
    gc.collect()
    done, most, begin = threading.Event(), [0], anonymous_bytes()

    def watch() -> None:
        while not done.wait(0.002):
            most[0] = max(most[0], anonymous_bytes() - begin)

    watcher = threading.Thread(target=watch)
    watcher.start()
    (tmp_path / "out").mkdir()
    try:
        TARGETS["merged"].write(result, tmp_path / "out", ExportOptions(dtype="bfloat16"))
    finally:
        done.set()
        watcher.join()
    size = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert size > 50e6
    # 0.1: a few tensors in float32, the adapter, and what the model is without its numbers
    assert most[0] < 0.1 * size, (most[0], size)


def anonymous_bytes() -> int:
    """Memory of this process that no file backs, as copied pages of a mapped file do not."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.findall(r"RssAnon:\s+(\d+)", status)[0])


def test_shards_are_those_that_transformers_writes(tmp_path, monkeypatch):
    """Several files with an index, tied weights once: as `save_pretrained` does, and it loads them."""
    monkeypatch.setattr(save, "SHARD_BYTES", 60_000)
    done = export_run(finished("chat"), "merged", out=tmp_path / "out", offline=True, proof=False)
    index = json.loads((done.path / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in done.path.glob("*.safetensors"))
    assert files == sorted(set(index["weight_map"].values()))
    assert len(files) > 2
    assert all((done.path / name).stat().st_size < 160_000 for name in files)  # the largest tensor has 64 kB
    model, found = AutoModelForCausalLM.from_pretrained(done.path, output_loading_info=True)
    assert not any(found[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    plain, attachment = open_result(finished("chat"), offline=True).load(torch.float32)
    attachment.merge()
    plain.save_pretrained(tmp_path / "plain", max_shard_size=10**9)
    expected = load_file(tmp_path / "plain" / "model.safetensors")
    assert expected.keys() == index["weight_map"].keys()
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in expected.items())
