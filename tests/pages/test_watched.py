"""A run that is watched is the run that nobody watched, and the command of a page is the run that the page starts."""

from __future__ import annotations

import json
import re
import shlex
import threading
from html import unescape
from pathlib import Path

import pytest

import fresh
from pages.sites import OWN, answered, entered, fork_children, run_of, site_in
from serve.running import wait_for
from tiny_run import chats, model_folder, tiny_recipe, values_of
from tunesmith.runs.folder import Run, runs
from tunesmith.training.trainer import train


def test_pages_change_nothing_of_a_run(tmp_path: Path) -> None:
    recipe, ended, states = tiny_recipe(tmp_path), threading.Event(), set()
    alone = train(recipe, root=tmp_path / "alone")
    client = entered(site_in(tmp_path))

    def watch() -> None:
        while not ended.is_set():
            for run in runs(tmp_path / "runs"):
                assert client.get(f"/ui/runs/{run.path.name}").status_code == 200
                states.add(client.get(f"/v1/runs/{run.path.name}").json()["state"])
            assert client.get("/ui/").status_code == 200

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        watched = train(recipe, root=tmp_path / "runs")
    finally:
        ended.set()
        watcher.join()
    assert "running" in states
    assert values_of(watched.events()) == values_of(alone.events())


@pytest.mark.slow  # two runs in processes of their own
def test_the_command_of_a_page_makes_the_run_that_it_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fork_children(monkeypatch)
    monkeypatch.chdir(tmp_path)
    model = model_folder(tmp_path / "model")
    chats(tmp_path / "rows.jsonl", 24)
    settings = {"train.epochs": "2", "threads": "1", "evaluation.general": "false", "evaluation.samples": "2"}
    site = site_in(tmp_path)
    client = entered(site)
    query = "".join(f"&set.{key}={value}" for key, value in settings.items())
    page = answered(client, f"/ui/new?file=rows.jsonl&model={model}{query}")
    [line] = re.findall(r'id="as-command">([^<]*)</code>', page)
    body = {"model": str(model), "data": "rows.jsonl", "settings": settings}
    name = client.post("/v1/runs", json=body, headers=OWN).json()["name"]
    words = shlex.split(unescape(line))
    typed = tmp_path / "typed"
    fresh.done("-m", "tunesmith", *words[words.index("train") :], "--out", typed, "--offline", "--json")
    wait_for(lambda: site.runs.find(name) is not None and run_of(site, name).state() == "done", timeout_s=60)
    assert values_of(run_of(site, name).events()) == values_of(Run(typed).events()), json.dumps(words)
    site.commands.close()
