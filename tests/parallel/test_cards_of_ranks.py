"""Each rank has a card of its own: taken before imports can list the cards, looked at afterwards, and named."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tunesmith.environment.children import for_child
from tunesmith.errors import GroupError, InputError
from tunesmith.parallel import world as worlds
from tunesmith.parallel.own_card import card_of, take_card
from tunesmith.parallel.world import Place, World
from tunesmith.training import together
from tunesmith.training.resolve import _unlike

PLACE = Place(rank=1, size=2, local_rank=1, local_size=2)


def test_the_card_is_taken_before_the_library_of_models_is_imported(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    program = (
        "import os, sys\n"
        "import tunesmith.parallel.own_card as own\n"
        "def taken(place, device, environ):\n"
        "    print('torch' in sys.modules, 'transformers' in sys.modules, place.local_rank)\n"
        "    raise SystemExit(0)\n"
        "own.take_card = taken\n"
        "sys.argv = ['tunesmith', 'train', 'model', sys.argv[1], '--set', 'device=cuda']\n"
        "from tunesmith.cli import main; main()"
    )
    environ = for_child(RANK="1", WORLD_SIZE="2", LOCAL_RANK="1", LOCAL_WORLD_SIZE="2")
    command = [sys.executable, "-c", program, str(tmp_path / "rows.jsonl")]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["False", "False", "1"], done.stderr


def test_a_card_that_somebody_has_chosen_before_is_used_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's workers see all cards, and have set their own."""
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    environ = {"CUDA_VISIBLE_DEVICES": "0,1"}
    assert take_card(PLACE, "auto", environ) == "cuda:1"
    assert environ == {"CUDA_VISIBLE_DEVICES": "0,1"}
    assert take_card(PLACE, "cpu", environ) == ""


@pytest.fixture
def two_cards(monkeypatch: pytest.MonkeyPatch) -> Any:
    def seen(num: int) -> None:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: num)
        monkeypatch.setattr(torch._C, "_cuda_getDeviceCount", lambda: num, raising=False)
        found = SimpleNamespace(name="NVIDIA H100", uuid="77")
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: found)

    return seen


def test_a_rank_that_sees_the_cards_of_others_is_refused(two_cards: Any) -> None:
    two_cards(2)
    with pytest.raises(GroupError, match="rank 1: it sees 2 cards instead of its own"):
        card_of(PLACE, "cuda")
    assert card_of(PLACE, "cuda:1") == {"card": "NVIDIA H100", "uuid": "77"}
    two_cards(1)
    assert card_of(PLACE, "cuda") == {"card": "NVIDIA H100", "uuid": "77"}
    assert card_of(PLACE, "cpu") == {}


class FakeStore:
    """The values that all ranks have put."""

    def __init__(self, facts: list[dict[str, Any]]) -> None:
        own = [worlds._own_facts({"room": 1, "same": {"device": "cuda"}, **one}) for one in facts]
        self.values = {f"here/{rank}": json.dumps(one) for rank, one in enumerate(own)}
        self.late = 0

    def check(self, keys: list[str]) -> bool:
        if keys == ["here/1"] and self.late:
            self.late -= 1
            return False
        return keys[0] in self.values

    def set(self, key: str, value: str) -> None:
        self.values.setdefault(key, value)

    def get(self, key: str) -> str:
        return self.values[key]

    def add(self, key: str, num: int) -> int:
        return 0


def test_two_ranks_with_one_card_are_refused() -> None:
    one = {"card": "NVIDIA H100", "uuid": "77"}
    world = World(Place(rank=0, size=2, local_rank=0, local_size=2), FakeStore([one, one]))
    with pytest.raises(InputError, match=r"rank 1 and rank 0 on .* have one card, NVIDIA H100"):
        world.join(one)


def test_unlike_cards_are_named_and_take_the_first_ranks_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = [{"card": "NVIDIA A100", "uuid": "1"}, {"card": "NVIDIA H100", "uuid": "2"}]
    world = World(Place(rank=0, size=2, local_rank=0, local_size=2), FakeStore(facts))
    world.join(facts[0])
    assert "the cards are unlike: NVIDIA A100, NVIDIA H100: each step waits for the slowest" in _unlike(world)
    taken: list[Any] = []
    monkeypatch.setattr(together, "_broadcast_weights", taken.append)
    together.refuse_drift(SimpleNamespace(setup=SimpleNamespace(world=world)))
    assert len(taken) == 1
    assert _unlike(World()) == ""


def test_whoever_waits_says_who_has_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worlds, "SAY_S", 0.1)
    store = FakeStore([{}, {}])
    store.late = 6
    said: list[tuple[int, int]] = []
    World(Place(rank=0, size=2), store).join({}, lambda here, size: said.append((here, size)))
    assert said
    assert set(said) == {(1, 2)}
    assert worlds.JOIN_S == 600
