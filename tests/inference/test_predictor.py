from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification, AutoTokenizer

from inference.headed import MANY, NUMBER, ONE, TAGS, headed
from tiny_run import model_folder
from tiny_tasks import encoder_decoder_folder, encoder_folder, texts
from tunesmith.errors import InputError, ModelError
from tunesmith.generation.padded import generate
from tunesmith.inference.load import LoadedModel, load_model
from tunesmith.inference.predict import Predictor, predict_list
from tunesmith.types import Example, Labels, Part, Problem, Source

ATOL = 1e-5
"""float32; padded in one pass and alone in another sum in another order."""


def speaker_of(path: Path) -> LoadedModel:
    speaker = load_model(str(path), offline=True)
    speaker.model.float()
    return speaker


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    kinds: dict[str, Labels] = {"one": ONE, "many": MANY, "number": NUMBER, "tags": TAGS}
    made = {name: headed(root / name, labels) for name, labels in kinds.items()}
    return {**made, "causal": headed(root / "causal", ONE, arch="llama"), "chat": model_folder(root / "chat")}


def logits_alone(path: Path, rows: Sequence[dict[str, Any]]) -> list[torch.Tensor]:
    """What transformers' own model of the folder answers to each row by itself."""
    model = AutoModelForSequenceClassification.from_pretrained(path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    with torch.no_grad():
        given = [tokenizer(row["text"], row.get("text_pair"), return_tensors="pt") for row in rows]
        return [model(**inputs).logits[0] for inputs in given]


def test_classes_are_those_of_the_model_alone(folders: dict[str, Path]) -> None:
    """Texts and pairs of many lengths, answered together: each as transformers answers it by itself."""
    rows = [{"text": text} for text in texts(9)]
    rows += [{"text": one, "text_pair": other} for one, other in zip(texts(4), texts(4, seed=1), strict=True)]
    lines = predict_list(Predictor(speaker_of(folders["one"])), rows)
    for row, line, logits in zip(rows, lines, logits_alone(folders["one"], rows), strict=True):
        assert {key: line[key] for key in row} == row
        chances = dict(zip(ONE.names, logits.softmax(-1).tolist(), strict=True))
        assert line["probabilities"] == pytest.approx(chances, abs=ATOL)
        assert line["label"] == max(chances, key=lambda name: chances[name])
    bad = [line["probabilities"]["bad"] for line in lines]
    assert max(bad) - min(bad) > 0.05  # texts make a difference


def test_a_causal_head_answers_in_company_as_alone(folders: dict[str, Path]) -> None:
    predictor = Predictor(speaker_of(folders["causal"]))
    rows = [{"text": text} for text in texts(9)]
    together = predict_list(predictor, rows, bare=True)
    for row, line in zip(rows, together, strict=True):
        [alone] = predict_list(predictor, [row], bare=True)
        assert alone["probabilities"] == pytest.approx(line["probabilities"], abs=ATOL)


def test_any_number_of_classes_hold_above_the_threshold(folders: dict[str, Path]) -> None:
    rows = [{"text": text} for text in texts(6)]
    speaker = speaker_of(folders["many"])
    for threshold in (0.3, 0.5, 0.9):
        lines = predict_list(Predictor(speaker, threshold=threshold), rows, bare=True)
        for line, logits in zip(lines, logits_alone(folders["many"], rows), strict=True):
            assert line["probabilities"] == pytest.approx(
                dict(zip(MANY.names, logits.sigmoid().tolist(), strict=True)), abs=ATOL
            )
            assert line["label"] == [name for name, p in line["probabilities"].items() if p > threshold]


def test_a_number_is_the_output_itself(folders: dict[str, Path]) -> None:
    rows = [{"text": text} for text in texts(4)]
    lines = predict_list(Predictor(speaker_of(folders["number"])), rows, bare=True)
    expected = [{"label": float(logits[0])} for logits in logits_alone(folders["number"], rows)]
    for line, wanted in zip(lines, expected, strict=True):
        assert line == pytest.approx(wanted, abs=1e-4)  # logits of weights five times as large


def test_tags_stand_beside_their_words(folders: dict[str, Path]) -> None:
    rows = [{"tokens": text.split()} for text in texts(5)]
    lines = predict_list(Predictor(speaker_of(folders["tags"])), rows)
    model = AutoModelForTokenClassification.from_pretrained(folders["tags"])
    tokenizer = AutoTokenizer.from_pretrained(folders["tags"])
    for row, line in zip(rows, lines, strict=True):
        inputs = tokenizer(row["tokens"], is_split_into_words=True, return_tensors="pt")
        with torch.no_grad():
            best = model(**inputs).logits[0].argmax(-1).tolist()[1:-1]  # a word is a token here
        assert line == {"tokens": row["tokens"], "tags": [TAGS.names[i] for i in best]}


@pytest.mark.parametrize("has_outside", [True, False])
def test_a_word_without_a_token_is_tagged_outside_and_counted(tmp_path: Path, has_outside: bool) -> None:
    """70 words where 62 tokens are left: the last eight are not read, and which is said; or no tag means that."""
    labels = TAGS if has_outside else Labels("tags", ("NOUN", "VERB"))
    predictor = Predictor(speaker_of(headed(tmp_path / "tags", labels)))
    words = ["Ada"] * 70
    warned: list[str] = []
    example = Example(tuple(Part("word", word, False) for word in words), Source("a", 1), "tokens_tags")
    [line] = predictor([example], lambda done: None, lambda problem: warned.append(problem.code))
    if has_outside:
        assert isinstance(line, dict)
        assert line["tags"][62:] == ["O"] * 8
        assert warned == ["cut", "no_tag"]
    else:
        assert isinstance(line, Problem)
        assert "8 of its words have no token that was read, and the model has no tag for that" in str(line)


def test_a_threshold_says_when_the_second_of_two_classes_is_answered(tmp_path: Path) -> None:
    speaker = speaker_of(headed(tmp_path / "two", Labels("one", ("no", "yes"))))
    rows = [{"text": text} for text in texts(9)]
    chances = [line["probabilities"]["yes"] for line in predict_list(Predictor(speaker), rows)]
    for threshold in (0.0, 0.5, sorted(chances)[4] + 1e-4, 1.0):
        lines = predict_list(Predictor(speaker, threshold=threshold), rows, bare=True)
        assert [line["label"] for line in lines] == ["yes" if chance >= threshold else "no" for chance in chances]
    assert Predictor(speaker, threshold=0.3).identity()["--threshold"] == "0.3"
    assert "--threshold" not in Predictor(speaker).identity()


def test_a_threshold_is_refused_where_it_says_nothing(folders: dict[str, Path]) -> None:
    for name in ("one", "number", "tags", "chat"):
        with pytest.raises(InputError, match="with any number of classes, or with one of two"):
            Predictor(speaker_of(folders[name]), threshold=0.3)


def test_written_answers_are_those_of_one_alone(folders: dict[str, Path]) -> None:
    speaker = speaker_of(folders["chat"])
    rows = [{"messages": [{"role": "user", "content": text}]} for text in texts(5)]
    lines = predict_list(Predictor(speaker, max_new_tokens=6), rows)
    for row, line in zip(rows, lines, strict=True):
        prompt = speaker.renderer.prompt_ids([Part("user", row["messages"][0]["content"], False)])
        [alone] = generate(speaker.model, speaker.renderer, [prompt], 6)
        assert line == {"messages": [*row["messages"], {"role": "assistant", "content": alone.text}]}
    assert predict_list(Predictor(speaker, max_new_tokens=6), rows[:1], bare=True) == [
        {"answer": lines[0]["messages"][-1]["content"]}
    ]


def test_rows_that_bring_an_answer_are_asked_without_it(folders: dict[str, Path]) -> None:
    predictor = Predictor(speaker_of(folders["chat"]), max_new_tokens=4)
    asked = [{"role": "user", "content": "the old apple"}]
    told = {"messages": [*asked, {"role": "assistant", "content": "a secret"}]}
    assert predict_list(predictor, [told]) == predict_list(predictor, [{"messages": asked}])


def test_rows_without_room_or_text_say_why(folders: dict[str, Path]) -> None:
    predictor = Predictor(speaker_of(folders["chat"]), max_new_tokens=500)
    [line] = predict_list(predictor, ["red " * 20])
    assert line["error"].startswith("too_long: its ")
    assert "12 that leave this model room for an answer" in line["error"]


def test_text_and_summaries_are_written_under_their_names(folders: dict[str, Path], tmp_path: Path) -> None:
    text = load_model(str(folders["chat"]), task="text", offline=True)
    [line] = predict_list(Predictor(text, max_new_tokens=3), ["the old"])
    assert list(line) == ["text", "continuation"]
    path = encoder_decoder_folder(tmp_path / "t5")
    summary = load_model(str(path), task="summarize", offline=True)
    [line] = predict_list(Predictor(summary, max_new_tokens=3), ["the old apple in Rome"])
    assert list(line) == ["document", "summary"]
    assert load_model(str(path), offline=True).recipe.task == "generate"


def test_a_model_that_cannot_answer_says_so(folders: dict[str, Path], tmp_path: Path) -> None:
    filler = load_model(str(encoder_folder(tmp_path / "masked")), offline=True)
    with pytest.raises(InputError, match="fills in masked tokens"):
        Predictor(filler)
    with pytest.raises(ModelError, match=r"no head for the task classify. Tune one: tunesmith train"):
        load_model(str(folders["chat"]), task="classify", offline=True)
