"""Notebooks of OpenAI's cookbook, their cells as they are, against a server of jobs with a tiny model.

They are not part of this repository: OPENAI_COOKBOOK names a checkout of github.com/openai/openai-cookbook. Run were
How_to_finetune_chat_models at commit 17207e25a5aa, Fine-tuned_classification at a9585a4d8c94 and
Fine_tuning_direct_preference_optimization_guide at 09c4d7007306.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from jobs.test_end_to_end import Live
from tiny import tiny_tokenizer
from tiny_model import tiny_model

COOKBOOK = os.environ.get("OPENAI_COOKBOOK", "")
BASES = """
bases:
  tiny:
    model: tiny
    aliases:
      gpt-3.5-turbo: gpt-3.5-turbo-0613
      babbage-002: babbage-002
      gpt-4.1-mini-2025-04-14: gpt-4.1-mini-2025-04-14
results_encoding: csv
"""
WAIT = """
import openai as _openai, time as _time
def wait(name):
    while (job := _openai.OpenAI().fine_tuning.jobs.retrieve(name)).status not in ("succeeded", "failed", "cancelled"):
        _time.sleep(0.2)
    assert job.status == "succeeded", job.error
"""
SPORTS = "puck ice stick goal rink", "bat pitch base run inning"


def recipes(folder: Path) -> None:
    """302 rows as RecipeNLG has them."""
    (folder / "data").mkdir()
    draw, lines = random.Random(0), ["title,ingredients,NER\n"]
    for i in range(302):
        what = draw.sample(["milk", "nuts", "sugar", "beef"], 2)
        lines.append(f"""Dish {i},"[""1 c. {what[0]}"", ""2 {what[1]}""]","[""{what[0]}"", ""{what[1]}""]"\n""")
    (folder / "data" / "cookbook_recipes_nlg_10k.csv").write_text("".join(lines))


def sports(folder: Path) -> None:
    """Rows as the tool of the openai package prepares them, which version 3 has no more."""
    draw = random.Random(0)
    for name, num in (("train", 24), ("valid", 6)):
        rows = []
        for i in range(num):
            text = " ".join(draw.choices(SPORTS[i % 2].split(), k=5))
            rows.append({"prompt": f"{text}\n\n###\n\n", "completion": (" hockey", " baseball")[i % 2]})
        path = folder / f"sport2_prepared_{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


PAIRS = """
from openai import OpenAI
sync_client, base_model = OpenAI(), "gpt-4.1-mini-2025-04-14"
pairs = [
    {"input": {"messages": [{"role": "system", "content": "Help."}, {"role": "user", "content": f"Where is {i}?"}]},
     "preferred_output": [{"role": "assistant", "content": "Hello there! It is on its way."}],
     "non_preferred_output": [{"role": "assistant", "content": "No."}]}
    for i in range(20)
]
"""
ASKED = """
wait(ft.id)
job = sync_client.fine_tuning.jobs.retrieve(ft.id)
ask = test_pairs[0]["input"]["messages"]
print(job.fine_tuned_model, sync_client.chat.completions.create(model=job.fine_tuned_model, messages=ask, max_tokens=9))
"""
NOTEBOOKS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "How_to_finetune_chat_models": (
        {"skip": ["!head"], "before": {"import pandas": WAIT, "response.trained_tokens": "wait(job_id)"}},
        ["The job has successfully completed", "model ID: ft:gpt-3.5-turbo-0613:tunesmith:recipe-ner:", "15 of 16"],
    ),
    "Fine-tuned_classification": (
        # Cells that get a data set, look at it and prepare it; the last but those that ask the model is run once more.
        {"skip": ["sports_dataset", "sport2.jsonl", ".plot()"],
         "before": {
             "train_file = ": f"{WAIT}\nimport pandas as pd\nclient = _openai.OpenAI()",
             "fine_tune_results.finished_at": "wait(fine_tuning_job.id)",
             "ft_model = ": "fine_tune_results = client.fine_tuning.jobs.retrieve(fine_tuning_job.id)",
         }},
        ["model='babbage-002'", "train_loss", "###", "[{' "],
    ),
    "Fine_tuning_direct_preference_optimization_guide": (
        # Cells that have the hosted service write pairs and judge answers, by Responses and Evals.
        {"skip": ["PROMPT_SEED_POOL", "generate_responses", "sync_client.evals", "JUDGE_SYSTEM"],
         "before": {"n = len(pairs)": f"{WAIT}\n{PAIRS}"}, "after": {"ft = sync_client": ASKED}},
        ["Fine-tuning job created: job_id = ftjob-", "ft:gpt-4.1-mini-2025-04-14:tunesmith::"],
    ),
}  # fmt: skip
"""Of each notebook: what is changed, and what it prints."""


@pytest.mark.slow
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_the_cells_of_a_notebook_run_as_they_are(tmp_path: Path, name: str) -> None:
    if not COOKBOOK:
        pytest.skip("OPENAI_COOKBOOK names no checkout of github.com/openai/openai-cookbook")
    tokenizer = tiny_tokenizer()
    for one in (tiny_model(vocab_size=len(tokenizer), max_position_embeddings=2048), tokenizer):
        one.save_pretrained(tmp_path / "tiny")
    (tmp_path / "bases.yaml").write_text(BASES)
    recipes(tmp_path)
    sports(tmp_path)
    changes, expected = NOTEBOOKS[name]
    live = Live.start(tmp_path, "--bases", "bases.yaml")
    try:
        words = [str(Path(__file__).with_name("notebook.py")), str(Path(COOKBOOK, "examples", f"{name}.ipynb"))]
        own = {"OPENAI_BASE_URL": str(live.client.base_url), "OPENAI_API_KEY": "none"}
        done = subprocess.run(
            [sys.executable, *words, json.dumps(changes)], cwd=tmp_path, env={**os.environ, **own},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        print(done.stdout)
        assert done.returncode == 0, done.stderr
        for text in expected:
            assert text in done.stdout
    finally:
        live.end()
