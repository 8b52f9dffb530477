"""`python -m benchmarks.gpu_acceptance` where no card is: the cheap checks run, and a wrong answer is found."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.gpu_acceptance import main
from benchmarks.gpu_models import Bench, mixed_lengths

from benchmarks import gpu_acceptance


def run(folder: Path, only: str, *more: str) -> tuple[int, dict[str, Any]]:
    out = folder / "accept.json"
    code = main(["--device", "cpu", "--only", only, "--out", str(out), *more])
    return code, json.loads(out.read_text("utf-8"))


@pytest.mark.parametrize(
    "families", [("llama",), pytest.param(("llama", "qwen3", "mistral", "gemma2", "gpt2"), marks=pytest.mark.slow)]
)
def test_cheap_checks_pass_on_a_processor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, families: tuple[str, ...]
) -> None:
    assert set(families) <= set(gpu_acceptance.FAMILIES)
    monkeypatch.setattr(gpu_acceptance, "FAMILIES", {name: gpu_acceptance.FAMILIES[name] for name in families})
    monkeypatch.setattr(gpu_acceptance, "mixed_lengths", partial(mixed_lengths, mean=60, most=120))
    code, found = run(tmp_path, "facts,plan,losses,repeats,memory_ends")
    assert code == 0, found
    assert found["facts"]["found"]["torch"] == torch.__version__
    assert found["plan"]["found"]["predicted GiB"] > 0
    assert {name: ok["float32"] for name, ok in found["losses"]["found"].items()} == dict.fromkeys(families, 0.0)
    assert found["repeats"]["found"] == {"usual": {"repeats": True, "resumes": True}}
    assert found["memory_ends"]["found"] == "needs a card"


def test_attention_is_compared_in_all_its_shapes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_acceptance, "HEAD_SIZES", (16, 20))
    code, found = run(tmp_path, "attention")
    assert code == 0, found
    assert found["attention"]["found"]["cases"] == 2 * 2 * 6 * 3


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


def test_bench_keeps_models_between_checks(tmp_path: Path) -> None:
    bench = Bench("cpu", tmp_path)
    made = (bench.family("llama") / "model.safetensors").stat().st_mtime_ns
    assert (bench.family("llama") / "model.safetensors").stat().st_mtime_ns == made
