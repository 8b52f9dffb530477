"""A merged model stands by itself and is what was tuned; what is not is found out, and nothing is left of it."""

import dataclasses
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from export.exports import SHORT, card_head, finished, quick
from tiny_run import tiny_recipe
from tunesmith.errors import ExportError, InputError, RunError
from tunesmith.export import export_run as export_run_module
from tunesmith.export import merged, verify
from tunesmith.export.export_run import Exported, export_run
from tunesmith.export.run_result import open_result, tuned_tensors
from tunesmith.export.target import ExportOptions
from tunesmith.export.verify import find_rows
from tunesmith.methods.lora import LoraAttachment
from tunesmith.recipe.schema import DataFile
from tunesmith.runs.folder import Run
from tunesmith.training.trainer import train

QUANT_TYPES = [
    "chat",
    "full",
    "classify-encoder",
    "tag-encoder",
    "text-encoder",
    "summarize-encoder_decoder",
    "classify-causal",
]


def exported(name: str, tmp_path: Path, **words: Any) -> Exported:
    return export_run(finished(name), "merged", out=tmp_path / "out", offline=True, **words)


@pytest.mark.parametrize("name", QUANT_TYPES)
def test_every_head_is_merged_and_proven(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quick(monkeypatch)
    done = exported(name, tmp_path)
    assert done.found.same_ids
    assert done.found.kl < 1e-9  # float32 on both sides: only the order of additions differs
    assert done.found.rows == 2 if name == "chat" else done.found.rows >= 5
    if name != "full":
        assert done.found.carried == pytest.approx(1.0, abs=1e-4)
    assert json.loads((done.path / "verify.json").read_text())["verified"] is True


@pytest.mark.slow
def test_a_new_process_needs_nothing_but_the_folder(tmp_path: Path) -> None:
    """The real proof: nothing here stands in for its other process."""
    done = exported("chat", tmp_path)
    assert done.loaded_by.startswith("transformers ")
    assert done.found.kl < 1e-9


def test_weights_are_base_plus_delta_in_float32_and_rounded_once(tmp_path: Path) -> None:
    done = exported("chat", tmp_path, options=ExportOptions(dtype="bfloat16"), proof=False)
    saved = load_file(done.path / "model.safetensors")
    expected = dict(tuned_tensors(*open_result(finished("chat"), offline=True).load(torch.float32)))
    assert saved.keys() <= expected.keys()
    for name, tensor in saved.items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, expected[name].bfloat16()), name
    assert any("rounded from float32 to bfloat16" in note for note in done.notes)


def test_card_says_what_it_is_and_how_good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quick(monkeypatch)
    done = exported("chat", tmp_path, options=ExportOptions(license="apache-2.0"))
    head = card_head(done.path)
    report = json.loads(finished("chat").report_path.read_text())
    assert head.license == "apache-2.0"
    assert head["library_name"] == "transformers"
    assert head.pipeline_tag == "text-generation"
    loss = next(result for result in head.eval_results if result.metric_type == "loss")
    assert loss.metric_value == pytest.approx(report["metrics"]["after"]["loss"], abs=1e-6)
    text = (done.path / "README.md").read_text()
    before, after = (report["metrics"][name]["loss"] for name in ("before", "after"))
    assert f"| loss | {before:.4f} | {after:.4f} (" in text
    assert "16 rows to learn from, 2 held out, 0 skipped; `chats.jsonl`" in text
    assert "Loaded in a new process by transformers" in text
    assert str(finished("chat").path.parent) not in text  # a card is published: no folders of this machine


def test_a_run_that_held_nothing_out_is_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quick(monkeypatch)
    recipe = tiny_recipe(tmp_path, rows=4, **SHORT)
    data = recipe.data.model_copy(update={"held_out": 0})
    run = train(recipe.model_copy(update={"data": data}), root=tmp_path, out=tmp_path / "run", offline=True)
    done = export_run(run, "merged", out=tmp_path / "out", offline=True)
    assert done.rows == "training rows, since none is held out"
    assert "Nothing was held out, so nothing was measured." in (done.path / "README.md").read_text("utf-8")
    assert card_head(done.path).eval_results is None


def test_without_a_proof_the_card_says_so(tmp_path: Path) -> None:
    done = exported("chat", tmp_path, proof=False)
    text = (done.path / "README.md").read_text()
    assert "**Not verified**" in text
    assert "nobody has stated one" in text  # the licence
    assert json.loads((done.path / "verify.json").read_text())["verified"] is False


def lost(attachment: LoraAttachment) -> Any:
    attachment.unload()
    return ((name, weight.float()) for name, weight in attachment.model.state_dict().items())


def doubled(attachment: LoraAttachment) -> Any:
    for layer in attachment.layers.values():
        layer.scale *= 2
    return REAL_WEIGHTS(attachment)


def one_layer_lost(attachment: LoraAttachment) -> Any:
    name = next(name for name in attachment.layers if name.endswith("1.mlp.down_proj"))
    attachment.matrices(name)[1].detach().zero_()
    return REAL_WEIGHTS(attachment)


REAL_WEIGHTS = LoraAttachment.merged_weights


@pytest.mark.parametrize(
    ("bug", "says"),
    [
        (lost, "it keeps 0.0 % of the change from the base"),
        (doubled, "of the change from the base"),
        (one_layer_lost, "its KL divergence from the tuned model"),
    ],
)
def test_a_wrong_merge_fails_and_leaves_nothing(
    bug: Any, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # trap: A1
    quick(monkeypatch)
    monkeypatch.setattr(LoraAttachment, "merged_weights", bug)
    with pytest.raises(ExportError, match=r"nothing was kept: ") as error:
        exported("chat", tmp_path)
    assert says in str(error.value)
    assert list(tmp_path.iterdir()) == []
    wrong = exported("chat", tmp_path, proof=False)
    monkeypatch.undo()
    with pytest.raises(AssertionError):  # and without the proof the bug would have gone out
        assert_is_what_was_tuned(wrong)


def assert_is_what_was_tuned(done: Exported) -> None:
    saved = load_file(done.path / "model.safetensors")
    expected = dict(tuned_tensors(*open_result(finished("chat"), offline=True).load(torch.float32)))
    assert all(torch.allclose(saved[name], expected[name], atol=1e-6) for name in saved)


def test_another_base_is_refused_by_name() -> None:  # trap: A2
    source = finished("chat")
    assert_base_is_checked(source, Path(source.recipe().model), refuse=open_result)


def assert_base_is_checked(run: Run, base: Path, *, refuse: Any) -> None:
    weights = base / "model.safetensors"
    before = weights.read_bytes()
    changed = bytearray(before)
    changed[-5] ^= 1
    weights.write_bytes(bytes(changed))
    try:
        with pytest.raises(RunError, match=r"model\.safetensors: not the file that .* was tuned on"):
            refuse(run, offline=True)
    except pytest.fail.Exception as failed:
        raise AssertionError("the other base was taken") from failed
    finally:
        weights.write_bytes(before)


def test_the_check_of_the_base_would_be_missed() -> None:
    run = finished("chat")
    with pytest.raises(AssertionError, match="the other base was taken"):
        assert_base_is_checked(run, Path(run.recipe().model), refuse=lambda run, offline: None)


def test_what_a_kill_moved_aside_is_put_back(tmp_path: Path) -> None:
    first = exported("chat", tmp_path, proof=False).path
    first.rename(tmp_path / ".old-out")
    with pytest.raises(InputError, match="--dtype"):
        exported("chat", tmp_path, options=ExportOptions(dtype="int3"))
    export_run_module._clean_up(tmp_path / "out")
    assert (tmp_path / "out" / "verify.json").is_file()


@pytest.mark.parametrize(
    "name", ["chat", "classify-encoder", "tag-encoder", "summarize-encoder_decoder", "text-encoder"]
)
def test_rows_for_the_proof_are_found_without_the_data(name: str) -> None:
    source = open_result(finished(name), offline=True)
    data = source.recipe.data
    gone = data.model_copy(update={"train": (DataFile(path="/gone.jsonl"),), "eval": (DataFile(path="/gone.jsonl"),)})
    found = find_rows(replace(source, recipe=source.recipe.model_copy(update={"data": gone})))
    assert found.described == "fixed texts, since the run's data files are gone"
    rows = verify.encode_rows(source.renderer, found.examples, head=source.head, labels=source.labels, masked=0.15)
    assert len(rows) >= 1


def test_an_adapter_that_does_nothing_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quick(monkeypatch)
    monkeypatch.setattr(
        verify, "tuned_outputs", lambda *given: REAL_LOOK(*given)._replace(base=REAL_LOOK(*given).tuned)
    )
    done = exported("classify-encoder", tmp_path)
    assert "the adapter changes nothing on these rows" in done.notes


REAL_LOOK = verify.tuned_outputs


def test_an_earlier_export_is_replaced(tmp_path: Path) -> None:
    exported("chat", tmp_path, proof=False)
    again = exported("chat", tmp_path, proof=False, options=ExportOptions(dtype="float16"))
    assert load_file(again.path / "model.safetensors")["model.norm.weight"].dtype == torch.float16


def test_a_run_without_a_result_is_refused(tmp_path: Path) -> None:
    run = Run.create(tmp_path, "new", finished("chat").recipe_path.read_text())
    with pytest.raises(RunError, match="no result yet, so nothing to export"):
        export_run(run, "merged")


def test_rounding_that_eats_what_was_tuned_is_told_from_a_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick(monkeypatch)
    monkeypatch.setattr(merged, "ROUNDED", dataclasses.replace(merged.ROUNDED, carried=1e-9))
    with pytest.raises(ExportError, match=r"`tunesmith export \S+ --to merged --dtype auto` takes the first"):
        exported("chat", tmp_path, options=ExportOptions(dtype="bfloat16"))
