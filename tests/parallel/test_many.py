"""Twelve runs of every kind on 1, 2 and 4 processes, and a run that is killed again and again. Slow."""

import json
import os
import random
import signal
import socket
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from parallel.group import begin, finish, start
from parallel.scenarios import IN_PARTS, SPLIT, TWELVE, in_float32, make_inputs, recipe_of, steps_of
from parallel.test_agent import begin as begin_agent
from parallel.test_agent import end, train_words, wait_for_step
from tiny_run import tiny_recipe, values_of
from tiny_tasks import task_recipe
from tunesmith.recipe.docs import as_yaml
from tunesmith.recipe.load import validate
from tunesmith.recipe.schema import Recipe
from tunesmith.runs.folder import Run
from tunesmith.training.setup import prepare

KILLS = int(os.environ.get("TUNESMITH_KILLS", "50"))


def twelve(folder: Path) -> dict[str, Recipe]:
    """Every task and method, a weight above 1, rows that share prefixes, steps of similar lengths; without dropout.

    All compute in float32 (`in_float32`), and Muon once more as it is, with its products in bfloat16.
    """

    def of(name: str, task: str, kind: str, **sections: Any) -> Recipe:
        own = folder / name
        own.mkdir(parents=True, exist_ok=True)
        given = {"optim": {"lr": 1e-3}, "train": {"tokens_per_pass": 64}, **sections}
        return task_recipe(own, task, kind, dropout=0.0, rows=24, **given)

    adapter = {"name": "lora", "rank": 4, "dropout": 0.0}
    (folder / "chats").mkdir(parents=True, exist_ok=True)
    return {
        "chats": tiny_recipe(folder / "chats", optim={"lr": 1e-3}, train=IN_PARTS),
        "chat-full": of("chat-full", "chat", "causal"),
        "dora": of("dora", "chat", "causal", method={"name": "dora", "rank": 4, "dropout": 0.0}),
        "ia3": of("ia3", "generate", "causal", method={"name": "peft", "kind": "IA3"}),
        "text": of("text", "text", "causal", method=adapter),
        "masked": of("masked", "text", "encoder"),
        "classes": of("classes", "classify", "encoder"),
        "classes-causal": of("classes-causal", "classify", "causal", method=adapter),
        "tags": of("tags", "tag", "encoder", method=adapter),
        "summaries": of("summaries", "summarize", "encoder_decoder"),
        "muon": of("muon", "generate", "causal", optim={"name": "muon", "lr": 1e-3}),
        "muon-bfloat16": of("muon-bfloat16", "generate", "causal", optim={"name": "muon", "lr": 1e-3}),
        "generate": of("generate", "generate", "encoder_decoder"),
    }


def write_twelve(folder: Path) -> dict[str, Any]:
    """Their recipes by name, also in a file that ranks read."""
    values = {name: recipe.model_dump(mode="json") for name, recipe in twelve(folder).items()}
    (folder / TWELVE).write_text(json.dumps(values))
    return values


def steps_alone(folder: Path, recipes: dict[str, Any]) -> dict[str, Any]:
    found = {}
    for name, given in recipes.items():
        with in_float32(name):
            found[name] = steps_of(prepare(validate(given), root=folder / "alone"))
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("twelve")
    assert len(write_twelve(made)) == 13
    return made


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, Any]:
    return steps_alone(folder, json.loads((folder / TWELVE).read_text()))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("size", [2, 4])
def test_twelve_runs_take_the_same_steps(folder: Path, alone: dict[str, Any], size: int) -> None:
    """Losses of about 5 to 1e-6 in float32; Muon's products in bfloat16 make differences of rounding larger."""
    ranks = start(folder / f"of-{size}", "twelve", size=size)
    away = {name: _away(ranks[0]["twelve"][name], expected) for name, expected in alone.items()}
    print(json.dumps({name: f"{one:.1e}" for name, one in away.items()}))
    for name, expected in alone.items():
        found = [rank["twelve"][name] for rank in ranks]
        assert all(one == found[0] for one in found), name
        assert list(map(sorted, found[0]["rows"])) == list(map(sorted, expected["rows"])), name
        assert found[0]["losses"][0] == pytest.approx(expected["losses"][0], abs=1e-6), name
        largest = 1e-4 if name == "muon-bfloat16" else 1e-6
        assert found[0]["losses"] == pytest.approx(expected["losses"], abs=largest), name


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("size", [2, 4])
def test_runs_with_split_layers_take_the_same_steps(folder: Path, alone: dict[str, Any], size: int) -> None:
    """float32, to 1e-6 at the first step; pieces of weights whose rows four ranks do not divide among them."""
    ranks = start(folder / f"split-over-{size}", "twelve_split", size=size)
    found = ranks[0]["twelve_split"]
    assert set(found) == set(SPLIT)
    print(json.dumps({name: f"{_away(one, alone[name]):.1e}" for name, one in found.items()}))
    for name, one in found.items():
        assert one["losses"][0] == pytest.approx(alone[name]["losses"][0], abs=1e-6), name
        assert one["losses"] == pytest.approx(alone[name]["losses"], abs=1e-5), name


def _away(found: dict[str, Any], expected: dict[str, Any]) -> float:
    return max(abs(a - b) for a, b in zip(found["losses"], expected["losses"], strict=True))


@dataclass(frozen=True)
class KilledRun:
    straight: Run
    killed: Run
    kills: int


def killed_run(folder: Path, *, kills: int, seed: int) -> KilledRun:
    """A run of two whose ranks are killed at random moments until it is done, and one that nothing happens to.

    As an agent does, the rank that is left is ended if it does not end by itself, and both are started again.
    """
    make_inputs(folder)
    start(folder, "longer")
    out, draw, done = folder / "killed", random.Random(seed), 0
    total = _steps(folder / "straight")
    for _ in range(4 * kills):
        ranks, reached = begin(folder, "longer_killed", KILLED="[0, 1]"), _steps(out)
        if done < kills:
            if draw.random() < 0.3:  # while they start, load and connect
                time.sleep(draw.uniform(0, 2))
            else:
                wait_for_step(out, min(total - 1, reached + draw.randint(1, max(1, 2 * total // kills))))
            killed = ranks[draw.randint(0, 1)]
            with suppress(ProcessLookupError):
                killed.send_signal(signal.SIGKILL)
            finish(ranks, 10)
            done += killed.returncode == -signal.SIGKILL
        else:
            finish(ranks, 200)
        if (out / "run.json").exists() and Run(out).state() == "done":
            break
    return KilledRun(Run(folder / "straight"), Run(out), done)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_run_ends_with_the_same_bits_however_often_a_rank_is_killed(tmp_path: Path) -> None:
    found = killed_run(tmp_path, kills=KILLS, seed=int(os.environ.get("TUNESMITH_KILL_SEED", "0")))
    print(f"{found.kills} kills")
    assert found.kills >= KILLS // 2
    assert values_of(found.killed.events()) == values_of(found.straight.events())


def _steps(out: Path) -> int:
    path = out / "events.jsonl"
    lines = path.read_bytes().splitlines() if path.exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith(b"}")), default=0)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_agents_are_two_machines(tmp_path: Path) -> None:
    """Both on the loopback: each has a torchrun of its own and encodes its rows for itself."""
    make_inputs(tmp_path)
    (tmp_path / "recipe.yaml").write_text(as_yaml(recipe_of(tmp_path), comments=False))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    agent = (
        "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d",
        "--rdzv-endpoint", f"localhost:{port}", "--rdzv-id", "two", "--local-addr", "localhost", "-m", "tunesmith",
    )  # fmt: skip
    roots = [tmp_path / f"machine-{number}" for number in range(2)]
    words = train_words(tmp_path, tmp_path / "run")
    agents = [begin_agent(*agent, *words, "--runs", root) for root in roots]
    assert [end(started, 200)[0] for started in agents] == [0, 0]
    assert all(list((root / ".rows").glob("*.arrow")) for root in roots)
    found = [event.values["loss"] for event in Run(tmp_path / "run").events() if event.kind == "step"]
    expected = steps_of(prepare(recipe_of(tmp_path), root=tmp_path / "alone"))
    assert found == pytest.approx(expected["losses"], abs=1e-6)
