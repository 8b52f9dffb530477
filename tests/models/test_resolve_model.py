"""Models are found, or what is wrong is said with a way out; nothing that could run code is opened."""

import json
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tunesmith.errors import ModelError
from tunesmith.models.folder import check_folder, weight_files
from tunesmith.models.resolve_model import resolve_model


def refusal(model: object, **how) -> str:
    with pytest.raises(ModelError) as caught:
        resolve_model(str(model), **how)
    return str(caught.value)


def change_json(file: Path, **changes: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_folder_is_found(folder):
    located = resolve_model(str(folder))
    assert (located.kind, located.path, located.revision) == ("folder", folder, None)


def test_nothing_heavy_is_imported(folder):
    code = (
        "import sys; from tunesmith.models.resolve_model import resolve_model; "
        f"resolve_model({str(folder)!r}); print({{'torch', 'transformers'}} & set(sys.modules))"
    )
    source = Path(__file__).parents[2] / "src"
    environment = {"PYTHONPATH": str(source)}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert run.stdout == "set()\n", run.stderr


@pytest.mark.parametrize("model", ["", "  "])
def test_no_model_named(model):
    assert "no model was named" in refusal(model)


def test_misspelled_folder_is_met_with_its_neighbour(folder):
    assert refusal(folder.parent / "tiny-lama") == (
        f"{folder.parent}/tiny-lama: no such folder or file. Did you mean {folder}?"
    )


@pytest.mark.parametrize(
    "model", ["./nope", "../nope", "/nope/nope", "~/nope-tunesmith", "a/b/c", "x.gguf", "a b", "\0"]
)
def test_what_cannot_be_a_hub_id_is_not_looked_for_there(model, no_sockets):
    assert "no such folder or file" in refusal(model)


def test_folder_without_config_points_to_the_one_inside(folder):
    assert f"Did you mean {folder}?" in refusal(folder.parent)
    (folder / "config.json").unlink()
    assert "no config.json" in refusal(folder)


def test_revision_of_a_folder_is_refused(folder):
    assert "revision main: a folder has no revisions" in refusal(folder, revision="main")


def test_file_of_a_model_points_to_its_folder(folder):
    assert f"Give its folder: {folder}" in refusal(folder / "model.safetensors")
    (folder / "notes.txt").write_text("hello")
    assert "not a model" in refusal(folder / "notes.txt")


def test_run_of_full_tuning_is_its_model(folder, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.yaml").write_text("model: x\n")
    assert "This is a run" in refusal(run)
    shutil.move(folder, run / "model")
    assert resolve_model(str(run)).path == run / "model"


def test_adapter_is_not_a_model(folder):
    (folder / "adapter_config.json").write_text("{}")
    assert "a model and an adapter" in refusal(folder)
    (folder / "config.json").unlink()
    assert "This is an adapter" in refusal(folder)


class Marker:
    """Unpickling this creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize(
    ("architectures", "named"),
    [
        (["BertForMaskedLM"], "BertForMaskedLM"),
        (["x as M; boom"], "AutoModelForCausalLM"),
        ("T5", "AutoModelForCausalLM"),
    ],
)
def test_the_conversion_names_the_class_of_the_config(folder, architectures, named):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": architectures}))
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert f"import {named} as M" in refusal(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "model.ckpt"])
def test_pickles_are_refused_unread(folder, tmp_path, name):
    marker = tmp_path / "ran"
    (folder / name).write_bytes(pickle.dumps(Marker(marker)))
    (folder / "model.safetensors").unlink()
    said = refusal(folder)
    assert name in said
    assert "can run code" in said
    assert "save_pretrained('converted')" in said
    assert "can run code" in refusal(folder / name)
    assert not marker.exists()
    pickle.loads((folder / name).read_bytes())
    assert marker.exists()  # the trap works: reading it would have been seen


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_of_a_model_is_refused_before_any_import(folder, tmp_path, file):
    marker = tmp_path / "ran"
    (folder / "modeling_evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass Evil: pass\n")
    change_json(folder / file, auto_map={"AutoConfig": "modeling_evil.Evil", "AutoTokenizer": "modeling_evil.Evil"})
    before = set(sys.modules)
    assert "auto_map" in refusal(folder)
    assert not marker.exists()
    assert not {name for name in set(sys.modules) - before if "evil" in name}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"quantization_config": {"quant_method": "gptq"}}, "quantized (gptq)"),
        ({"quantization_config": 1}, "quantized (unknown)"),
    ],
)
def test_models_that_cannot_be_tuned_are_refused(folder, changes, said):
    change_json(folder / "config.json", **changes)
    assert said in refusal(folder)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b'"x"', b"\xff", b"[" * 10**5])
def test_broken_config_is_named(folder, content):
    (folder / "config.json").write_bytes(content)
    assert str(folder / "config.json") in refusal(folder)


def test_huge_config_is_not_read(folder):
    with open(folder / "config.json", "r+b") as file:
        file.truncate(2**40)  # a sparse file: a terabyte in name
    assert "more than the" in refusal(folder)


def test_truncated_weights_are_named(folder):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-1])
    assert f"{folder / 'model.safetensors'}: a damaged safetensors file" in refusal(folder)


def in_shards(folder: Path) -> Path:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for i, name in enumerate(sorted(tensors)):
        file = f"model-0000{i % 2 + 1}-of-00002.safetensors"
        weight_map[name] = file
    for file in set(weight_map.values()):
        save_file(
            {name: tensors[name] for name in tensors if weight_map[name] == file}, folder / file, {"format": "pt"}
        )
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index


def test_shards_are_found_and_missing_ones_named(folder):
    in_shards(folder)
    assert [file.name[:11] for file in weight_files(resolve_model(str(folder)).path, "x")] == [
        "model-00001",
        "model-00002",
    ]
    (folder / "model-00002-of-00002.safetensors").unlink()
    assert "names model-00002-of-00002.safetensors, which is not there" in refusal(folder)


@pytest.mark.parametrize(
    "shard",
    ["../other.safetensors", "/etc/x.safetensors", "a/b.safetensors", "..\\x.safetensors", ".safetensors", "x.bin",
     "x\0.safetensors", "x.safetensors/../y", "", 7, None],
)  # fmt: skip
def test_index_cannot_leave_its_folder(folder, shard):
    index = in_shards(folder)
    save_file({}, folder.parent / "other.safetensors")
    change_json(index, weight_map={"model.norm.weight": shard})
    assert "must be a .safetensors file in the index's folder" in refusal(folder)


@pytest.mark.parametrize("weight_map", [{}, [], None, "x"])
def test_index_without_map_is_named(folder, weight_map):
    change_json(in_shards(folder), weight_map=weight_map)
    assert "no weight_map" in refusal(folder)


def test_safetensors_of_another_name_are_not_guessed(folder):
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    assert "only weights.safetensors" in refusal(folder)
    (folder / "weights.safetensors").unlink()
    assert "no weights: no model.safetensors" in refusal(folder)


def check_with_planted_import(folder: Path) -> None:
    check_folder(folder, "x")
    exec((folder / "modeling_evil.py").read_text(), {})


def test_code_test_catches_an_import(folder, tmp_path):  # planted
    marker = tmp_path / "ran"
    (folder / "modeling_evil.py").write_text(f"open({str(marker)!r}, 'w')")
    check_with_planted_import(folder)
    with pytest.raises(AssertionError):
        assert not marker.exists()


def test_conversion_command_in_the_refusal_is_valid_python(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    command = re.search(r'python -c "(.*)"', refusal(folder))
    assert command
    compile(command.group(1), "refusal", "exec")
