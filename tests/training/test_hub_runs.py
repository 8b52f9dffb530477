"""Runs whose model and data come from the hub, over HTTP against a stand-in: pinned, resumed, repeated, refused."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from hub_server import Hub, hub_at, json_lines, parquet
from tiny_run import chats, model_folder, same_run, stop_at, tiny_recipe
from tunesmith.cli.app import app
from tunesmith.data import addresses
from tunesmith.errors import DataError, ModelError, Stopped
from tunesmith.inference.load import load_run
from tunesmith.models.resolve_model import resolve_model
from tunesmith.recipe.schema import DataFile
from tunesmith.runs.folder import Run, runs
from tunesmith.training.trainer import resume, train


@pytest.fixture
def server(tmp_path, monkeypatch):
    addresses.REGISTERED.clear()
    with hub_at(tmp_path, monkeypatch) as running:
        yield running


def model_files(folder: Path, seed: int = 0) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in model_folder(folder, seed=seed).iterdir()}


def chat_shards(folder: Path, num: int = 18, seed: int = 0) -> dict[str, bytes]:
    rows = [json.loads(line) for line in chats(folder / "rows.jsonl", num, seed=seed).read_text().splitlines()]
    half = num // 2
    return {"data/train-0.parquet": parquet(rows[:half]), "data/train-1.parquet": parquet(rows[half:])}


@pytest.fixture
def hub(server: Hub, tmp_path: Path) -> Hub:
    server.model("acme/tiny", model_files(tmp_path / "made"))
    server.dataset("acme/chats", chat_shards(tmp_path))
    return server


def recipe_of(tmp_path: Path, **sections: Any) -> Any:
    recipe = tiny_recipe(tmp_path, **sections)
    data = recipe.data.model_copy(update={"train": (DataFile(path="hf://datasets/acme/chats"),)})
    return recipe.model_copy(update={"model": "acme/tiny@main", "data": data})


def push_others(hub: Hub, tmp_path: Path) -> None:
    """What the branches are by tomorrow: other weights and other rows."""
    hub.repos["models/acme/tiny"].push(model_files(tmp_path / "other", seed=1))
    hub.repos["datasets/acme/chats"].push(chat_shards(tmp_path, seed=1))


def test_recipe_of_a_run_has_the_commits_and_repeats_it_after_a_push(hub, tmp_path):
    commits = [repo.branches["main"] for repo in hub.repos.values()]
    run = train(recipe_of(tmp_path), root=tmp_path / "runs")
    recipe = run.recipe()
    assert (recipe.model, recipe.revision) == ("acme/tiny", commits[0])
    assert [file.path for file in recipe.data.train] == [f"hf://datasets/acme/chats@{commits[1]}?split=train"]
    assert run.path.name.startswith("chats-")
    plan = next(event.values for event in run.events() if event.kind == "plan")
    assert any("hf://datasets/acme/chats: pinned to hf://datasets/acme/chats@" in note for note in plan["warnings"])
    assert {"key": "revision", "value": commits[0], "reason": "the commit that main of the model is now"} in plan[
        "choices"
    ]
    push_others(hub, tmp_path)
    again = train(recipe, root=tmp_path / "again")
    losses = [[event.values["loss"] for event in one.events() if event.kind == "step"] for one in (again, run)]
    assert losses[0] == losses[1]
    assert again.identity() == run.identity()


def test_stopped_run_is_resumed_with_its_commits_and_without_the_hub(hub, tmp_path, monkeypatch):
    straight = train(recipe_of(tmp_path), root=tmp_path / "straight")
    with pytest.raises(Stopped):
        train(recipe_of(tmp_path), root=tmp_path / "runs", listener=stop_at(3))
    push_others(hub, tmp_path)
    hub.down = True
    addresses.REGISTERED.clear()
    run = runs(tmp_path / "runs")[0]
    same_run(resume(run, offline=True), straight)
    assert load_run(Run(run.path), offline=True).head == "next_token"


def test_streamed_run_is_resumed_from_its_own_rows(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(addresses, "DISK_SHARE", 0.0)
    monkeypatch.setattr("tunesmith.data.encode.PART_BYTES", 1)
    with pytest.raises(Stopped):
        train(recipe_of(tmp_path), root=tmp_path / "runs", listener=stop_at(3))
    straight = train(recipe_of(tmp_path), root=tmp_path / "straight")
    addresses.REGISTERED.clear()
    run = resume(runs(tmp_path / "runs")[0])
    same_run(run, straight)
    assert not list((tmp_path / "cache" / "hub").glob("datasets--*/snapshots/*/data/*.parquet"))


def test_an_old_run_with_a_password_in_an_address_says_what_to_do(server, tmp_path, monkeypatch):
    import fsspec

    rows = chats(tmp_path / "rows.jsonl", 18).read_bytes()
    fsspec.filesystem("memory").pipe("/me:s3cret@bucket/rows.jsonl", rows)
    recipe = tiny_recipe(tmp_path)
    data = recipe.data.model_copy(update={"train": (DataFile(path="memory://me:s3cret@bucket/rows.jsonl"),)})
    old = recipe.model_copy(update={"data": data})
    with monkeypatch.context() as earlier:
        earlier.setattr(addresses, "_SECRET", re.compile("(?!)"))
        with pytest.raises(Stopped):
            train(old, root=tmp_path / "runs", listener=stop_at(3))
    with pytest.raises(DataError, match=r"made with it ends with the version that began it, or is made again") as said:
        resume(runs(tmp_path / "runs")[0])
    assert "s3cret" not in str(said.value)


def command(*words: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(word) for word in words])
    return result.exit_code, result.output + result.stderr


def test_eval_predict_and_check_take_addresses(hub, tmp_path):
    run = train(recipe_of(tmp_path), root=tmp_path / "runs")
    address = "hf://datasets/acme/chats"
    commit = hub.repos["datasets/acme/chats"].branches["main"]
    code, said = command("check", address)
    assert code == 0
    assert f"{address}: pinned to {address}@{commit}?split=train: 2 files" in said
    code, said = command("eval", run.path, address, "--samples", "0", "--json")
    assert code == 0, said
    assert '"rows":18' in said.replace(" ", "")
    out = tmp_path / "answers.jsonl"
    assert command("predict", run.path, f"{address}/data/train-1.parquet", "--out", out, "--max-tokens", "2")[0] == 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["source"] for line in lines] == [f"{address}@{commit}/data/train-1.parquet:{i}" for i in range(1, 10)]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("hf://datasets/acme/none", "no such data set on the hub"),
        ("hf://datasets/acme/chats?split=test", "no split 'test'. There are: train."),
        ("hf://datasets/acme/columns", "unknown_shape"),
        ("hf://datasets/acme/bad", "hf://datasets/acme/bad@"),
    ],
)
def test_wrong_data_ends_with_exit_code_2_before_weights_are_fetched(hub, tmp_path, data, message):
    hub.dataset("acme/columns", {"train.parquet": parquet([{"one": "a", "two": 3}])})
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": ""}]
    hub.dataset("acme/bad", {"train.jsonl": json_lines(rows)})
    code, said = command("train", "acme/tiny", data, "--runs", tmp_path / "runs")
    assert code == 2
    assert message in said.replace("\n", "")
    assert not [one for one in hub.downloads() if one.endswith("model.safetensors")]
    assert not runs(tmp_path / "runs")


def test_row_of_a_shard_is_named_in_its_problem(hub, tmp_path):
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": ""}]
    repo = hub.dataset("acme/bad", {"train.parquet": parquet(rows)})
    recipe = recipe_of(tmp_path)
    data = recipe.data.model_copy(update={"train": (DataFile(path="hf://datasets/acme/bad"),)})
    recipe = recipe.model_copy(update={"data": data, "task": "generate"})
    with pytest.raises(DataError) as refused:
        train(recipe, root=tmp_path / "runs")
    [problem] = refused.value.problems
    assert str(problem.source) == f"hf://datasets/acme/bad@{repo.branches['main']}/train.parquet:2"


# Models


@pytest.mark.parametrize("name", ["acme/tiny@v1", "hf://acme/tiny@v1"])
def test_revision_in_the_name_of_a_model(hub, tmp_path, name):
    commit = hub.repos["models/acme/tiny"].branches["main"]
    hub.repos["models/acme/tiny"].branches["v1"] = commit
    push_others(hub, tmp_path)
    located = resolve_model(name)
    assert (located.name, located.revision) == ("acme/tiny", commit)
    with pytest.raises(ModelError, match=r"revision is main too"):
        resolve_model(name, revision="main")


def test_refusals_of_models_say_why(hub, tmp_path, monkeypatch):
    files = model_files(tmp_path / "made")
    hub.tokens = {"mine"}
    hub.model("acme/gated", files, gated=True)
    hub.model("acme/private", files, private=True, readers=("mine",))
    for model, message in (
        ("acme/tiny@v9", "no revision 'v9' on the hub. Give a branch"),
        ("acme/gated", f"gated: accept its owner's terms first: {hub.url}/acme/gated. Then `hf auth login`"),
        ("acme/private", "neither a folder nor a model on the hub.* a private one needs `hf auth login`"),
        ("acme/none", "neither a folder nor a model on the hub"),
    ):
        with pytest.raises(ModelError, match=message):
            resolve_model(model)
    monkeypatch.setenv("HF_TOKEN", "wrong")
    with pytest.raises(ModelError, match="does not accept the token here"):
        resolve_model("acme/private")
    monkeypatch.setenv("HF_TOKEN", "mine")
    assert resolve_model("acme/private").has_weights
    hub.down = True
    with pytest.raises(ModelError, match=r"the hub cannot be reached"):
        resolve_model("acme/other")


def test_cut_download_of_weights_goes_on(hub):
    hub.cut_after = [100_000]
    located = resolve_model("acme/tiny")
    commit = hub.repos["models/acme/tiny"].commits[located.revision]
    assert (located.path / "model.safetensors").read_bytes() == commit["model.safetensors"]


# Size

STREAM = """
import json, os, sys, time
from pathlib import Path
sys.path[:0] = json.loads(sys.argv[3])
from tunesmith.data import addresses, encode
from tunesmith.data.addresses import pin
from tunesmith.data.dataset import build
from tunesmith.data.renderer import Renderer
from tunesmith.recipe.schema import Data, DataFile
from tunesmith.tasks import TASKS
from tiny import CHATML, tiny_tokenizer

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

addresses.DISK_SHARE, encode.PART_BYTES = 0.0, 1
data, _ = pin(Data(train=(DataFile(path=sys.argv[1]),)), offline=False)
renderer = Renderer(tiny_tokenizer(CHATML), TASKS["generate"], max_tokens=200, too_long="cut", control_tokens="error")
before = most = anonymous()
started = time.monotonic()
files = 0
def look(rows, done, total):
    global most, files
    most = max(most, anonymous())
    files = max(files, sum(path.stat().st_size for path in Path(os.environ["HF_HOME"]).rglob("*.parquet")))
store = build(Path(sys.argv[2]), data=data, files=data.train, renderer=renderer, on_problem=print, progress=look)
most = max(most, anonymous())
rate = len(store) / (time.monotonic() - started)
found = {"rows": len(store), "grown": (most - before) * 1024, "files": files, "most": most * 1024, "rate": rate}
print(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_a_million_rows_of_ten_shards_are_streamed_in_flat_memory(server, tmp_path, monkeypatch):
    """Memory grows by what the store keeps of each row in memory, 60 bytes, and by nothing else."""
    monkeypatch.undo()  # the other process has the stand-in by HF_ENDPOINT

    def shard(first: int, num: int) -> bytes:
        rows = [{"prompt": f"question {i}", "completion": f"answer {i}"} for i in range(first, first + num)]
        return parquet(rows, row_group_size=10_000)

    def streamed(rows: int) -> dict[str, int]:
        name = f"acme/rows{rows}"
        server.dataset(name, {f"train-{i}.parquet": shard(i * rows // 10, rows // 10) for i in range(10)})
        words = [f"hf://datasets/{name}", str(tmp_path / name), json.dumps(sys.path)]
        environment = {
            "HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "home"), "PATH": "/usr/bin:/bin",
            "OMP_NUM_THREADS": "1", "ARROW_DEFAULT_MEMORY_POOL": "system", "MALLOC_ARENA_MAX": "1",
        }  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-c", STREAM, *words], env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    few, many = streamed(100_000), streamed(1_000_000)
    print(few, many)
    assert (few["rows"], many["rows"]) == (100_000, 1_000_000)
    assert many["grown"] - few["grown"] < 900_000 * 100 + 50 * 2**20
    assert 0 < many["files"] < 2 * max(len(file) for file in server.repos["datasets/acme/rows1000000"].files().values())
