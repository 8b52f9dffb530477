"""An adapter that others can load: whose base it needs, how it is scaled, and where it loads."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from export.exports import card_head, finished, quick
from often import often
from tunesmith.errors import InputError
from tunesmith.export.adapter import ADAPTER, servers
from tunesmith.export.export_run import Exported, export_run
from tunesmith.export.run_result import open_result
from tunesmith.export.target import Computing
from tunesmith.models.resolve_model import ModelRef
from tunesmith.runs.atomic import sha256_file


def exported(name: str, tmp_path: Path, **words: Any) -> Exported:
    return export_run(finished(name), "adapter", out=tmp_path / "out", offline=True, **words)


@pytest.mark.parametrize(
    "name", often(["chat", "classify-encoder", "summarize-encoder_decoder"], "chat", "classify-encoder")
)
def test_peft_loads_it_and_it_is_what_was_tuned(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quick(monkeypatch)
    done = exported(name, tmp_path)
    assert done.loaded_by == f"peft {peft.__version__}"
    assert done.found.kl < 1e-9
    assert done.found.carried == pytest.approx(1.0, abs=1e-4)
    head = card_head(done.path)
    assert (head["library_name"], head.license) == ("peft", "unknown")


def test_the_base_is_named_by_its_hash_and_not_by_a_local_folder(tmp_path: Path) -> None:  # trap: A8
    done = exported("chat", tmp_path, proof=False)
    base = Path(finished("chat").recipe().model)
    assert_travels(done.path, base)
    with pytest.raises(AssertionError):  # what the run keeps for itself names the folder
        assert_travels(finished("chat").adapter_path, base)
    facts = json.loads((done.path / "base.json").read_text())
    assert facts["sha256"]["model.safetensors"] == sha256_file(base / "model.safetensors")
    assert facts["model"] == base.name
    ends = json.loads((done.path / "generation_config.json").read_text())["eos_token_id"]
    assert set(open_result(finished("chat"), offline=True).renderer.stop_ids) <= set(ends)


def assert_travels(folder: Path, base: Path) -> None:
    text = "".join(path.read_text() for path in folder.iterdir() if path.suffix in (".json", ".md", ".jinja"))
    assert str(base.parent) not in text


def test_a_head_arrives_with_the_adapter(tmp_path: Path) -> None:  # trap: A5
    done = exported("classify-encoder", tmp_path, proof=False)
    assert_head_arrives(done.path)
    config, weights = done.path / "adapter_config.json", done.path / "adapter_model.safetensors"
    config.write_text(json.dumps({**json.loads(config.read_text()), "modules_to_save": None, "task_type": None}))
    save_file({name: tensor for name, tensor in load_file(weights).items() if "lora_" in name}, weights)
    with pytest.raises(AssertionError):
        assert_head_arrives(done.path)


def assert_head_arrives(folder: Path) -> None:
    source = open_result(finished("classify-encoder"), offline=True)
    live, _ = source.load(torch.float32)
    model: Any = ADAPTER.load(folder, source.recipe, Computing("cpu", "float32"))
    with torch.no_grad():
        ids = torch.arange(5, 12)[None]
        assert torch.allclose(model.model(ids).logits, live(ids).logits, atol=1e-5)  # float32: order of additions


def test_a_head_brings_its_labels(tmp_path: Path) -> None:
    done = exported("classify-encoder", tmp_path, proof=False)
    assert json.loads((done.path / "labels.json").read_text()) == {"kind": "one", "names": ["fruit", "place"]}
    assert "num_labels=2" in (done.path / "README.md").read_text()


def test_a_full_run_has_no_adapter(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"so there is no adapter\. Use --to merged"):
        exported("full", tmp_path)


def loads_in(name: str, **config: Any) -> str:
    usual = {"peft_type": "LORA", "r": 4, "base_model_name_or_path": "owner/base"}
    return servers(open_result(finished(name), offline=True), {**usual, **config})


def test_where_it_loads_is_known_before_it_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "`vllm serve owner/base --enable-lora --max-lora-rank 8 --lora-modules tuned=PATH`" in loads_in("chat")
    assert "--max-lora-rank 320" in loads_in("chat", r=257, use_rslora=True)
    more: list[dict[str, Any]] = [
        {"r": 600}, {"modules_to_save": ["lm_head"]}, {"use_dora": True}, {"trainable_token_indices": [7]},
        {"peft_type": "IA3"}, {"bias": "all"},
    ]  # fmt: skip
    said = {loads_in("chat", **one) for one in more} | {loads_in("classify-encoder")}
    assert said == {"Loads in peft. For other programs export merged."}
    source = open_result(finished("chat"), offline=True)
    monkeypatch.setattr(ModelRef, "is_gguf", property(lambda self: True))
    on_gguf = servers(source, {"peft_type": "LORA", "r": 4, "base_model_name_or_path": "owner/base"})
    assert on_gguf in said, "vLLM reads adapters on folders"
