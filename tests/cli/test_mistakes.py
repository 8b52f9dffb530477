"""Sixty common mistakes: each ends with the right exit code, a way out, and a word for `tunesmith explain`."""

import json
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tiny_run import chats, model_folder, stopped, tiny_recipe
from tiny_tasks import encoder_folder
from tunesmith.cli.app import app
from tunesmith.cli.explain import parts
from tunesmith.planning import devices
from tunesmith.training.trainer import train

MISTAKES = [
    # options
    ("option misspelt", "train model chats.jsonl --epoch 3", "did you mean --epochs", ""),
    ("option of another tool", "train model chats.jsonl --learning-rate 1e-4", "did you mean --lr", ""),
    ("option of --set misspelt", "train model chats.jsonl --set optim.lrr=1", "did you mean optim.lr?", "options"),
    (
        "--set without the section",
        "train model chats.jsonl --set lr=1e-4",
        "did you mean optim.lr?",
        "options",
    ),
    ("text for a number", "train model chats.jsonl --set train.epochs=many", "a number above 0", "options"),
    ("text for a number, as an option", "train model chats.jsonl --lr fast", "must be a number", ""),
    ("below its range", "train model chats.jsonl --set train.epochs=-1", "a number above 0", "options"),
    ("--set without =", "train model chats.jsonl --set optim.lr", "such as method.rank=8", "options"),
    ("choice misspelt", "train model chats.jsonl --set optim.name=adam", "did you mean adamw?", "options"),
    ("method misspelt", "train model chats.jsonl --method lorra", "did you mean lora?", "options"),
    ("task unknown", "train model chats.jsonl --task translate", "summarize", "options"),
    ("device unknown", "train model chats.jsonl --set device=tpu", "Use auto, cpu", "options"),
    ("command misspelt", "trian model chats.jsonl", "Did you mean train?", ""),
    ("command of another tool", "finetune model chats.jsonl", "Did you mean train?", ""),
    ("argument left out", "chat", "RUN|MODEL", ""),
    ("target of an export left out", "export last", "merged, adapter, gguf, ollama, onnx", ""),
    ("one option twice", "train model chats.jsonl --lr 1 --set optim.lr=2", "Give one of them", ""),
    # recipes
    ("recipe not there", "train --recipe recipee.yaml", "Did you mean recipe.yaml?", "options"),
    ("recipe that is no YAML", "train --recipe broken.yaml", "tunesmith recipe", "options"),
    ("recipe that is a list", "train --recipe list.yaml", "write one `key: value` a line", "options"),
    ("recipe with a wrong key", "train --recipe recipe.yaml", "did you mean train.epochs", "options"),
    ("recipe of another tool", "train --recipe axolotl.yaml", "Save this as a recipe", "options"),
    # data
    ("file not there", "train model chat.jsonl", "Did you mean chats.jsonl?", "rows"),
    ("nothing to train on", "train model", "tunesmith train MODEL DATA", ""),
    ("model and data swapped", "train chats.jsonl model", "the model comes first", ""),
    ("empty file", "train model empty.jsonl", "Give a file with rows", "rows"),
    ("folder without texts", "train model nothing", "Give files by their names", "rows"),
    ("bad JSON", "train model bad.jsonl", "--set data.bad_rows=skip", "rows"),
    ("not UTF-8", "train model latin.jsonl", "data.encoding=cp1252", "rows"),
    ("rows of no known shape", "train model odd.jsonl", "data.columns", "rows"),
    (
        "column that is not there",
        "train encoder labels.csv --set data.columns.text=comment",
        "are: 'review'",
        "rows",
    ),
    ("labels that are all one", "train encoder one_label.csv --task classify", "Add rows of other classes", "rows"),
    ("an answer that is empty", "check silent.jsonl", "remove the row", ""),
    ("roles unknown", "train model roles.jsonl", "One of assistant", "rows"),
    ("rows of another task", "train encoder chats.jsonl --task classify", "Give --task chat", "rows"),
    (
        "table without a header",
        "train encoder headless.csv --task classify",
        "put the names of the columns above it",
        "rows",
    ),
    ("picture for a data file", "train model picture.png", "Save it as JSON lines", "rows"),
    ("held out more than there is", "train model chats.jsonl --set data.held_out=2", "below 1, or auto", "options"),
    # models
    ("model not there", "train modle chats.jsonl", "Did you mean model?", "model"),
    ("hub without a network", "train owner/name chats.jsonl --offline", "Run once without --offline", "model"),
    ("model without tokenizer", "train untokenized chats.jsonl", "Copy the tokenizer files", "model"),
    ("model without weights", "train weightless chats.jsonl", "Give the folder of a whole model", "model"),
    ("pickled weights", "train pickled chats.jsonl", "save_pretrained('converted')", "model"),
    ("remote code", "train foreign chats.jsonl", "take auto_map out", "model"),
    ("GGUF cut off", "train cut.gguf chats.jsonl", "Download or copy it again", "model"),
    ("encoder for chats", "train encoder chats.jsonl --task chat", "a task that this one can learn", "model"),
    ("model without config", "train nothing chats.jsonl", "Give the folder of a model", "model"),
    ("model larger than memory", "train model chats.jsonl --epochs 1", "memory=warn", "does-not-fit"),
    # runs
    ("run not there", "show doen", "did you mean dove or done?", "runs"),
    ("no runs yet", "show last --runs elsewhere", "tunesmith train", "runs"),
    ("resume of a done run", "resume done", "`tunesmith show` prints", "runs"),
    ("resume with another option", "resume stopped --set optim.lr=1", "start a new run with", "options"),
    ("export of a run without result", "export stopped --to gguf", "tunesmith resume", "runs"),
    ("export kind unknown", "export done --to guff", "Did you mean gguf?", ""),
    ("quant unknown", "export done --to gguf --quant q4", "q4_k_m", ""),
    ("output that is there", "export done --to adapter --out nothing-else", "Choose another --out", ""),
    ("run of a name that two have", "show do", "Give more of the name", "runs"),
    ("condition of no field", "runs --where los<1", "Did you mean loss?", ""),
    # use
    ("predict without rows", "predict done nowhere.jsonl", "Look at the path", "rows"),
    ("eval on rows without answers", "eval done prompts.jsonl", "Add one", "rows"),
    ("port in use", "serve done --port {port}", "Choose another with --host and --port", ""),
    ("open to others without a key", "serve done --host 0.0.0.0", "--key-file", ""),
    ("compare of one", "compare done", "tunesmith compare RUN RUN", ""),
    ("explain of no word", "explain memory", "out-of-memory", ""),
]


def lines(path: Path, *rows: object) -> None:
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows), "utf-8")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with models, rows and runs, right and wrong ones."""
    folder = tmp_path_factory.mktemp("mistakes")
    model = model_folder(folder / "model")
    encoder_folder(folder / "encoder")
    chat = json.loads(chats(folder / "chats.jsonl", 18).read_text().splitlines()[0])
    for name in ("untokenized", "weightless", "pickled", "foreign"):
        shutil.copytree(model, folder / name)
    for path in (folder / "untokenized").glob("*token*"):
        path.unlink()
    (folder / "weightless/model.safetensors").unlink()
    (folder / "pickled/model.safetensors").rename(folder / "pickled/pytorch_model.bin")
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": "novel", "architectures": ["Novel"], "auto_map": {"AutoModelForCausalLM": "novel.Novel"}}
    lines(folder / "foreign/config.json", config)
    (folder / "cut.gguf").write_bytes(b"GGUF\3\0\0\0")
    (folder / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR")
    (folder / "latin.jsonl").write_bytes('{"prompt": "café", "completion": "thé"}\n'.encode("latin-1") * 3)
    (folder / "nothing").mkdir()
    lines(folder / "nothing-else", "mine")
    lines(folder / "empty.jsonl")
    lines(folder / "bad.jsonl", chat, '{"messages": [\n', chat)
    lines(folder / "odd.jsonl", *[{"question_text": "a", "reply_text": "b"}] * 3)
    lines(folder / "prompts.jsonl", {"messages": chat["messages"][:1]})
    turns = [{"role": "customer", "content": "a"}, {"role": "agent", "content": "b"}]
    lines(folder / "roles.jsonl", {"messages": turns})
    lines(folder / "silent.jsonl", {"prompt": "a", "completion": ""})
    labelled = [f"red apple {i},{'good' if i % 2 else 'bad'}\n" for i in range(12)]
    lines(folder / "labels.csv", "review,label\n", *labelled)
    lines(folder / "headless.csv", *labelled)
    lines(folder / "one_label.csv", "text,label\n", *[f"red apple {i},good\n" for i in range(12)])
    lines(folder / "recipe.yaml", "model: model\ndata: {train: [chats.jsonl]}\ntrain: {epoch: 1}\n")
    lines(folder / "broken.yaml", "model: [model\n")
    lines(folder / "list.yaml", "- model\n")
    lines(folder / "axolotl.yaml", "base_model: model\nmicro_batch_size: 2\nadapter: lora\n")
    recipe = tiny_recipe(folder, train={"max_steps": 2}, evaluation={"samples": 0})
    stopped(recipe, folder / "runs", at=1).path.rename(folder / "runs/stopped")
    train(recipe, root=folder / "runs", out=folder / "runs/done")
    shutil.copytree(folder / "runs/done", folder / "runs/dove")
    return folder


@pytest.fixture
def port() -> Iterator[int]:
    """One that is taken."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.mark.parametrize("mistake", MISTAKES, ids=[name for name, *_ in MISTAKES])
def test_a_mistake_has_a_way_out(
    mistake: tuple[str, str, str, str], place: Path, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, words, way_out, topic = mistake
    monkeypatch.chdir(place)
    monkeypatch.setenv("COLUMNS", "300")
    if topic == "does-not-fit":
        monkeypatch.setattr("tunesmith.planning.devices.room", lambda device: devices.resident_bytes() // 2)
    result = CliRunner().invoke(app, words.format(port=port).split(" "))
    assert result.exit_code == 2, result.output
    assert way_out in result.output
    assert "Traceback" not in result.output
    more = [line for line in result.output.splitlines() if line.startswith("More: ")]
    assert more == ([f"More: tunesmith explain {topic}"] if topic else [])
    assert not topic or topic in parts()
    assert not topic or result.output.splitlines()[-1] == more[0]


def test_they_are_sixty() -> None:
    assert len({words for _, words, *_ in MISTAKES}) >= 60
