"""A tokenizer longer than the model's embedding: a text with such a token is refused, others are answered."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from inference.headed import ONE, headed
from tiny_run import model_folder, tiny_recipe
from tiny_tasks import encoder_folder
from tunesmith.errors import ModelError
from tunesmith.inference.load import load_model
from tunesmith.inference.measure import evaluate_file
from tunesmith.inference.predict import Predictor, predict_list
from tunesmith.serve.protocol import EngineOptions, GenerationRequest, RequestError
from tunesmith.serve.registry import LocalEngine, open_registry
from tunesmith.training import trainer as training

SAID = r"token '<extra>' \(\d+\) has no vector, for the embedding of the model has \d+ rows.*resize_token_embeddings"
BAD, GOOD = "an <extra> apple", "hello"
OPTIONS = EngineOptions(max_new_tokens=3, offline=True)


def longer(folder: Path) -> Path:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.add_tokens(["<extra>"]) == 1
    tokenizer.save_pretrained(folder)
    return folder


def user(text: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}]}


def test_predict_refuses_the_row_and_answers_the_others(tmp_path: Path) -> None:
    chat, encoder = longer(model_folder(tmp_path / "chat")), longer(headed(tmp_path / "one", ONE))
    for folder, rows in ((chat, [user(BAD), user(GOOD)]), (encoder, [BAD, GOOD])):
        bad, good = predict_list(Predictor(load_model(str(folder), offline=True), max_new_tokens=3), rows, bare=True)
        assert "error" not in good
        with pytest.raises(ValueError, match=SAID):
            raise ValueError(bad["error"])


def test_chat_and_serve_refuse_the_request(tmp_path: Path) -> None:
    chat, encoder = longer(model_folder(tmp_path / "chat")), longer(encoder_folder(tmp_path / "encoder"))
    engine = LocalEngine(load_model(str(chat), offline=True), lambda text: None)
    for request, param in ((user(BAD), "messages"), ({"prompt": BAD}, "prompt")):
        with pytest.raises(RequestError, match=SAID) as refusal:
            list(engine.generate(GenerationRequest("", **request), OPTIONS))
        assert refusal.value.param == param
    assert list(engine.generate(GenerationRequest("", **user(GOOD)), OPTIONS))
    embedder = open_registry([str(encoder)], root=Path("runs"), options=OPTIONS, note=lambda text: None).models[
        "encoder"
    ]
    with pytest.raises(RequestError, match=rf"input\[1\]: the {SAID}"):
        embedder.embed([GOOD, BAD])


def test_train_and_eval_refuse_the_rows(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path)
    longer(Path(recipe.model))
    rows = tmp_path / "chats.jsonl"
    answer = {"role": "assistant", "content": "yes"}
    rows.write_text(
        "".join(json.dumps({"messages": [*user(BAD)["messages"], answer], "n": i}) + "\n" for i in range(9))
    )
    with pytest.raises(ModelError, match=SAID):
        training.train(recipe, root=tmp_path / "runs", offline=True)
    with pytest.raises(ModelError, match=SAID):
        evaluate_file(load_model(recipe.model, offline=True), str(rows))
