"""`python -m benchmarks.gpu_acceptance` where no card is: every check is walked, and a wrong answer is found."""

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from benchmarks.gpu_acceptance import main, table
from benchmarks.gpu_models import Bench, CheckError, mixed_lengths, steps_of
from benchmarks.gpu_speed import measured, profiled
from benchmarks.gpu_walk import FakeCard, walking

from benchmarks import gpu_acceptance, gpu_models


def run(folder: Path, only: str, *more: str) -> tuple[int, dict[str, Any]]:
    out = folder / "accept.json"
    code = main(["--device", "cpu", *(["--only", only] if only else []), "--out", str(out), *more])
    return code, json.loads(out.read_text("utf-8"))


def few_rows(monkeypatch: pytest.MonkeyPatch, *families: str) -> None:
    monkeypatch.setattr(gpu_acceptance, "FAMILIES", {name: gpu_acceptance.FAMILIES[name] for name in families})
    monkeypatch.setattr(gpu_acceptance, "mixed_lengths", partial(mixed_lengths, mean=60, most=120))


def test_memory_that_ends_is_seen_with_what_was_measured_before_it(tmp_path: Path) -> None:
    """An earlier peak of 3 GiB, of the whole process, made the limit too high for memory to end."""
    code, found = run(tmp_path, "facts,memory_ends")
    assert code == 0, found
    assert found["facts"]["found"]["torch"] == torch.__version__
    assert found["facts"]["found"]["card"] == "none (walked on a processor)"
    assert found["memory_ends"]["found"]["halved to"][0] > 0
    assert found["memory_ends"]["found"]["losses differ by"] < 1e-5
    page = (tmp_path / "accept.md").read_text("utf-8")
    assert page.startswith("| Check | | Seconds | Found |")
    assert "| `memory_ends` | ok |" in page
    assert torch.cuda.memory_allocated.__module__ == "torch.cuda.memory", "the faked functions are taken back"


@pytest.fixture
def short(tmp_path: Path) -> Iterator[tuple[Bench, Any]]:
    with walking("cpu"):
        bench = Bench("cpu", tmp_path)
        yield bench, bench.setup(bench.family("llama"), bench.chats("rows", [80] * 40))


def test_a_profile_is_of_steps_that_the_run_has_and_busy_of_usual_ones(short: Any, monkeypatch: Any) -> None:
    bench, setup = short
    usual = measured(bench, setup)
    found = profiled(bench, setup, usual)
    assert (found["kernels"], found["busy"]) == (0, 0.0)
    assert found["passes"] >= 1
    # A card that works for half of the time that the tokens of a step take in usual steps.
    tokens = steps_of(setup, 3)[-1]["tokens"]
    kernel = SimpleNamespace(device_type=torch.autograd.DeviceType.CUDA, device_time_total=5e5)
    record = SimpleNamespace(events=lambda: [kernel], key_averages=lambda: SimpleNamespace(table=lambda **how: ""))

    class Profile:
        def __init__(self, **how: Any) -> None: ...
        def __enter__(self) -> Any:
            return record

        def __exit__(self, *error: Any) -> None: ...

    monkeypatch.setattr(torch.profiler, "profile", Profile)
    assert profiled(bench, setup, {**usual, "tokens/s": tokens})["busy"] == 0.5
    setup.total_steps = 2
    with pytest.raises(CheckError, match="the run has 2 steps, and 3 are needed"):
        profiled(bench, setup, usual)


def test_checks_that_a_card_cannot_make_are_left_out_with_a_line(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(FakeCard, "total", 12 * 2**30)
    code, found = run(tmp_path, "one_billion,eight_billion")
    assert code == 0, found
    assert found["one_billion"]["ok"] is found["eight_billion"]["ok"] is None
    assert found["one_billion"]["found"] == "left out: needs 14 GiB, and this card has 12.0"


def test_a_card_of_capability_7_computes_in_float16(tmp_path: Path, monkeypatch: Any) -> None:
    with walking("cpu"):
        assert Bench("cpu", tmp_path).half == "bfloat16"
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
        assert Bench("cpu", tmp_path).half == "float16"


@pytest.mark.slow
def test_every_check_is_walked_on_a_processor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three minutes: all families, and every check of a card with a faked one."""
    few_rows(monkeypatch, *gpu_acceptance.FAMILIES)
    monkeypatch.setattr(gpu_acceptance, "HEAD_SIZES", (16, 20))
    code, found = run(tmp_path, "")
    assert code == 0, found
    assert list(found) == [check.__name__ for check in gpu_acceptance.CHECKS]
    assert [name for name, result in found.items() if result["ok"] is not True] == []
    assert found["serving"]["found"]["tokens/s, 16 streams"] > 0
    assert found["starting"]["found"]["seconds: first step"] > 0
    assert found["export"]["found"].keys() == {"seconds: merged", "seconds: adapter"}
    assert found["plan"]["found"]["predicted GiB"] > 0
    assert {ok["float32"] for ok in found["losses"]["found"].values()} == {0.0}
    assert found["repeats"]["found"] == {"usual": {"repeats": True, "resumes": True}}


def test_attention_is_compared_in_all_its_shapes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_acceptance, "HEAD_SIZES", (20,))
    code, found = run(tmp_path, "attention")
    assert code == 0, found
    assert found["attention"]["found"]["cases"] == 2 * 6 * 3


def test_a_wrong_answer_and_a_traceback_are_failures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_acceptance, "HEAD_SIZES", (16,))
    right = gpu_acceptance.packed_attention

    def wrong(*args: Any, **how: Any) -> Any:
        if args[1].dtype == torch.bfloat16 and not getattr(args[0], "is_causal", True):
            raise NotImplementedError("no such kernel")
        return right(*args, **how)

    monkeypatch.setattr(gpu_acceptance, "packed_attention", wrong)
    code, found = run(tmp_path, "attention")
    assert code == 1
    text = found["attention"]["found"]
    assert "CheckError: 2 cases" in text
    assert "torch.bfloat16 16 2 both ways: NotImplementedError: no such kernel" in text
    assert "| `attention` | **failed** |" in table(found)


def test_checks_that_no_time_is_left_for_are_named(tmp_path: Path) -> None:
    code, found = run(tmp_path, "facts,plan", "--limit", "-1")
    assert code == 0
    assert [one["ok"] for one in found.values()] == [None, None]


def test_a_check_that_does_not_exist_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--device", "cpu", "--only", "attentoin", "--out", str(tmp_path / "accept.json")])
    assert ended.value.code == 2
    assert "attentoin: no such check: facts, plan, attention" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_a_card_that_is_not_there_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--out", str(tmp_path / "accept.json")])
    assert "torch sees no CUDA device here" in capsys.readouterr().err


def test_models_of_the_speed_checks_have_the_sizes_they_are_named_by() -> None:
    import transformers
    from benchmarks.gpu_models import EIGHT_BILLION, ONE_BILLION, SMALL_135M

    def weights(sizes: dict[str, Any]) -> float:
        with torch.device("meta"):
            config = transformers.AutoConfig.for_model("llama", **sizes)
            return transformers.AutoModelForCausalLM.from_config(config).num_parameters()

    assert weights(SMALL_135M) == pytest.approx(135e6, rel=0.01)
    assert weights(ONE_BILLION) == pytest.approx(1.24e9, rel=0.01)
    assert weights({**EIGHT_BILLION, "num_hidden_layers": 32}) == pytest.approx(8.03e9, rel=0.01)
    assert gpu_models.WALKED.keys() <= EIGHT_BILLION.keys() | {"num_hidden_layers"}


def test_bench_keeps_models_between_checks(tmp_path: Path) -> None:
    bench = Bench("cpu", tmp_path)
    made = (bench.family("llama") / "model.safetensors").stat().st_mtime_ns
    assert (bench.family("llama") / "model.safetensors").stat().st_mtime_ns == made
