"""What a model of somebody else's, or a name, could make of an export: nothing is run, and nothing else goes out."""

import os
import pickle
from pathlib import Path
from typing import Any

import pytest

from export.exports import as_if_tuned, chat_recipe, finished, of_architecture
from often import often
from tiny import CHATML, tiny_tokenizer
from tiny_model import tiny_model
from tunesmith.errors import InputError, ModelError, RunError
from tunesmith.export import hub as push_module
from tunesmith.export.export_run import export_run
from tunesmith.export.target import ExportOptions
from tunesmith.runs.folder import Run


class Bomb:
    """A pickle that makes a file when it is opened."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


def made(folder: Path, *, name: str = "run", **words: Any) -> Run:
    tokenizer = tiny_tokenizer(**words)
    tiny_model("llama", vocab_size=len(tokenizer)).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return as_if_tuned(chat_recipe(folder), folder / name)


def exported(run: Run, target: str, folder: Path, **words: Any) -> Path:
    return export_run(run, target, out=folder / "out", options=ExportOptions(**words), proof=False, offline=True).path


@pytest.mark.parametrize("target", ["adapter", "merged", "gguf"])
def test_a_pickle_beside_a_result_is_neither_opened_nor_published(target: str, tmp_path: Path) -> None:
    run = made(tmp_path)
    for name in ("adapter_model.bin", "training_args.bin", "pytorch_model.bin"):
        (run.adapter_path / name).write_bytes(pickle.dumps(Bomb(tmp_path / "opened")))
    out = exported(run, target, tmp_path)
    assert not (tmp_path / "opened").exists()
    assert not list(out.rglob("*.bin"))
    if target == "adapter":
        assert "left out, since it is not part of an adapter: adapter\\_model.bin" in (out / "README.md").read_text()


def test_a_link_is_not_followed_out_of_a_result(tmp_path: Path) -> None:
    run = made(tmp_path)
    (tmp_path / "secret").write_text("key")
    (run.adapter_path / "vocab.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(RunError, match="a link, and what it points to would be published"):
        exported(run, "adapter", tmp_path)
    assert not (tmp_path / "out").exists()


def test_a_link_is_not_followed_out_of_an_export(tmp_path: Path) -> None:
    out = exported(finished("chat"), "adapter", tmp_path)
    (tmp_path / "secret").write_text("key")
    (out / "notes.md").symlink_to(tmp_path / "secret")
    with pytest.raises(InputError, match="a link, and what it points to would be published"):
        push_module.push(out, "me/tuned", endpoint="http://127.0.0.1:9")


@pytest.mark.parametrize("name", often(["-rf", "a b; touch x", "..a", 'q"uote', "über$(x)"], "-rf", "a b; touch x"))
def test_a_runs_name_becomes_no_option_no_path_and_no_command(name: str, tmp_path: Path) -> None:
    for target in ("gguf", "ollama"):
        out = exported(made(tmp_path / target, name=name), target, tmp_path / target)
        (file,) = out.glob("*.gguf")
        assert not file.name.startswith(("-", "."))
        assert not set(file.name) & set(" ;\"'$()\n/\\")
        commands = (out / "README.md").read_text().partition("```sh")[2].partition("## Data")[0]
        assert name not in commands


def test_a_licence_is_one_line(tmp_path: Path) -> None:
    """In a Modelfile what follows a line's end would be an instruction of its own."""
    with pytest.raises(InputError, match="a license is named on one line"):
        exported(of_architecture("llama"), "ollama", tmp_path, license="mit\nADAPTER /etc/passwd")


def test_a_stop_is_no_instruction_of_a_modelfile(tmp_path: Path) -> None:
    odd = '<|end"\nADAPTER /etc/passwd\n|>'
    tokenizer = tiny_tokenizer(CHATML.replace("<|im_end|>", odd.replace("\n", "\\n").replace('"', '\\"')))
    tokenizer.add_special_tokens({"eos_token": odd})
    tiny_model("llama", vocab_size=len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    with pytest.raises(ModelError, match="ollama: a Modelfile cannot hold it"):
        exported(as_if_tuned(chat_recipe(tmp_path), tmp_path / "run"), "ollama", tmp_path)


def test_a_template_that_reaches_for_python_is_not_run(tmp_path: Path) -> None:
    """Rendered in a sandbox, in time and size: what asks for more is refused, whoever wrote it."""
    evil = "{{ ''.__class__.__mro__[1].__subclasses__() }}" + CHATML
    run = made(tmp_path)
    (run.adapter_path / "chat_template.jinja").write_text(evil)
    with pytest.raises(InputError):
        exported(run, "ollama", tmp_path)
    assert not (tmp_path / "out").exists()
