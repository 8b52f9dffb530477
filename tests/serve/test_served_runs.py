"""Runs whose template writes a date are served with that of their training."""

from __future__ import annotations

import datetime
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import transformers.utils.chat_template_utils as chat_templates

from often import often
from serve.batches import Heard, hear
from serve.engines import OPTIONS, says
from tiny_run import tiny_recipe
from tunesmith.api import predict
from tunesmith.generation.scheduler import Scheduler
from tunesmith.inference import load as loading
from tunesmith.runs.folder import Run
from tunesmith.serve.protocol import GenerationRequest
from tunesmith.serve.registry import Registry, open_registry
from tunesmith.training import trainer as training


def served(run: Run, notes: list[str] | None = None) -> Registry:
    heard = [] if notes is None else notes
    return open_registry([str(run.path)], root=Path("runs"), options=OPTIONS, note=heard.append)


def answered(serving: Registry, ask: GenerationRequest) -> str:
    voice = serving.models[ask.model]
    batch = Scheduler(voice.decoder, streams=1)
    batch.add(voice.prepare(0, ask, OPTIONS))
    heard: dict[int, Heard] = defaultdict(Heard)
    while batch.is_busy:
        hear(batch.step(), heard)
    return heard[0].ended[0].reason


def trained(recipe: Any, folder: Path) -> Run:
    return training.train(recipe, root=folder / "runs", offline=True)


_WRITE = (
    "{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' + m.content + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
_HEAD = "<|start_header_id|>system<|end_header_id|>\n\n"
DATED = {
    "Llama 3.2": "{% if not date_string is defined %}{% if strftime_now is defined %}"
    '{% set date_string = strftime_now("%d %b %Y") %}{% else %}{% set date_string = "26 Jul 2024" %}{% endif %}'
    "{% endif %}{{ bos_token + '" + _HEAD.replace("\n", "\\n") + "Today: ' + date_string + '<|eot_id|>' }}" + _WRITE,
    "SmolLM3": "{% set today = strftime_now('%d %B %Y') %}" + _HEAD + "Today's date: {{ today }}<|eot_id|>" + _WRITE,
    "Granite 3": "{% if messages[0].role != 'system' %}{% set system = 'Date: ' + strftime_now('%B %d, %Y') %}"
    "{{ '" + _HEAD.replace("\n", "\\n") + "' + system + '<|eot_id|>' }}{% endif %}" + _WRITE,
    "Mistral Small": "{% set today = strftime_now('%Y-%m-%d') %}{% set system = 'It is ' + today + '.' %}" + _HEAD
    + "{{ system }}<|eot_id|>" + _WRITE,
    "gpt-oss": "{% macro head() %}{{ 'Current date: ' + strftime_now('%Y-%m-%d') }}{% endmacro %}" + _HEAD
    + "{{ head() }}<|eot_id|>" + _WRITE,
}  # fmt: skip
DAY, NEXT_DAY = "2026-11-20", "2026-11-21"


class Clock:
    """The day that this process has."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch

    def turn_to(self, day: str) -> None:
        now = datetime.datetime.fromisoformat(day)

        class Then(datetime.datetime):
            @classmethod
            def now(cls, tz: Any = None) -> Any:
                return now

        class Day(datetime.date):
            @classmethod
            def today(cls) -> Any:
                return now.date()

        self._monkeypatch.setattr(chat_templates, "datetime", Then)
        self._monkeypatch.setattr("tunesmith.training.inputs.date", Day, raising=False)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock(monkeypatch)
    clock.turn_to(DAY)
    return clock


def dated_recipe(folder: Path, family: str, **sections: Any) -> Any:
    recipe = tiny_recipe(folder, **{"train": {"max_steps": 6}, "evaluation": {"samples": 0}, **sections})
    (Path(recipe.model) / "chat_template.jinja").write_text(DATED[family], "utf-8")
    tokenizer = json.loads((Path(recipe.model) / "tokenizer_config.json").read_text("utf-8"))
    tokenizer["eos_token"] = "<|eot_id|>"
    (Path(recipe.model) / "tokenizer_config.json").write_text(json.dumps(tokenizer), "utf-8")
    return recipe


# trap: T16
def assert_day_of_training(run: Run) -> None:
    notes: list[str] = []
    serving = served(run, notes)
    assert f"{run.path}: its chat template writes the date: {DAY}, as in training" in notes
    voice = serving.models[run.path.name]
    prompt = voice.renderer.tokenizer.decode(voice.prompt_ids(says(run.path.name, "hello")))
    assert "20" in prompt
    assert "21" not in prompt
    assert answered(serving, says(run.path.name, "hello")) in ("stop", "length")


@pytest.mark.parametrize("family", often(DATED, "Llama 3.2", "gpt-oss"))
def test_a_template_that_writes_the_date_is_served_and_asked_the_day_after(
    family: str, clock: Clock, tmp_path: Path
) -> None:
    run = trained(dated_recipe(tmp_path, family), tmp_path)
    assert run.recipe().data.date == DAY
    choices = next(event.values for event in run.events() if event.kind == "plan")["choices"]
    assert any("data.date" in str(choice) and DAY in str(choice) for choice in choices)
    clock.turn_to(NEXT_DAY)
    assert_day_of_training(run)
    [line] = predict(run, {"messages": [{"role": "user", "content": "hello"}]}, max_new_tokens=4, offline=True)
    assert "answer" in line


def test_a_date_of_the_day_of_serving_would_be_seen(
    clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The planted bug: what serves renders with today's date."""
    run = trained(dated_recipe(tmp_path, "SmolLM3"), tmp_path)
    own = loading.make_renderer

    def today(recipe: Any, *rest: Any) -> Any:
        return own(recipe.model_copy(update={"data": recipe.data.model_copy(update={"date": NEXT_DAY})}), *rest)

    monkeypatch.setattr(loading, "make_renderer", today)
    with pytest.raises(AssertionError):
        assert_day_of_training(run)


def test_a_run_is_resumed_the_day_after_as_if_nothing_had_happened(clock: Clock, tmp_path: Path) -> None:
    straight = trained(dated_recipe(tmp_path, "Llama 3.2"), tmp_path)
    stop = iter([False, False, False, True])
    listener = training.Listener(should_stop=lambda: next(stop, False))
    with pytest.raises(training.Stopped):
        training.train(
            dated_recipe(tmp_path, "Llama 3.2"), root=tmp_path / "runs", out=tmp_path / "stopped", offline=True,
            listener=listener,
        )  # fmt: skip
    clock.turn_to(NEXT_DAY)
    resumed = training.resume(Run(tmp_path / "stopped"), offline=True)
    weights = [(run.adapter_path / "adapter_model.safetensors").read_bytes() for run in (straight, resumed)]
    assert weights[0] == weights[1]


def test_a_template_without_a_date_has_none(tmp_path: Path) -> None:
    run = trained(tiny_recipe(tmp_path, train={"max_steps": 1}, evaluation={"samples": 0}), tmp_path)
    assert run.recipe().data.date is None
