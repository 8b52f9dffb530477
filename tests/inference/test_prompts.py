"""One rule says how long a prompt may be: rows to predict, samples of a run and of an evaluation are asked alike."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tiny_tasks import task_recipe, texts, write
from tunesmith.generation.padded import GeneratedAnswer
from tunesmith.generation.writer import AnswerWriter
from tunesmith.inference.load import LoadedModel
from tunesmith.inference.measure import evaluate_file
from tunesmith.inference.predict import Predictor, predict_file
from tunesmith.training.setup import Setup, prepare

NEW_TOKENS = 4


def prepared(folder: Path, kind: str, data: dict[str, Any]) -> Setup:
    """A run about to begin whose documents have some three times the tokens there is room for."""
    recipe = task_recipe(folder, "summarize", kind, evaluation={"sample_tokens": NEW_TOKENS}, data=data)
    document = " ".join(texts(40))
    rows = [{"document": f"{word} {document}", "summary": "the old"} for word in ("red", "old", "big")]
    for (file,) in (recipe.data.train, recipe.data.eval):
        write(Path(file.path), rows[: 3 if file is recipe.data.train[0] else 1])
    return prepare(recipe, root=folder / "runs", offline=True)


@pytest.mark.parametrize(
    ("kind", "data"),
    [("causal", {"max_tokens": 100}), ("causal", {}), ("encoder_decoder", {"max_tokens": 48})],
)
def test_a_document_is_cut_alike_wherever_it_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, data: dict[str, Any]
) -> None:
    setup = prepared(tmp_path, kind, data)
    asked: list[list[int]] = []

    def answer(self: AnswerWriter, prompts: Sequence[Sequence[int]], *_: Any, **how: Any) -> list[GeneratedAnswer]:
        asked.extend(list(prompt) for prompt in prompts)
        return [GeneratedAnswer("x", stopped=True) for _ in prompts]

    monkeypatch.setattr(AnswerWriter, "write", answer)
    speaker = LoadedModel(setup.model, setup.renderer, setup.recipe, setup.head, setup.located)
    held = setup.recipe.data.eval[0].path
    tally = predict_file(Predictor(speaker, NEW_TOKENS), held, lambda lines: None)
    evaluated = evaluate_file(speaker, held, samples=1)
    [sample] = setup.samples
    assert asked == [list(sample.ids)] * 2
    # In training the summary takes room of its own: a causal prompt is asked with more of the document.
    row = setup.rows.held_store.row(0)
    trained = row.ids[: int(row.trained.argmax())].tolist()
    num_same = next((n for n, (a, b) in enumerate(zip(asked[0], trained, strict=False)) if a != b), len(trained))
    num_behind = (
        0
        if kind == "encoder_decoder"
        else len(setup.renderer.tokenizer("<|im_end|>\n<|im_start|>assistant\n").input_ids)
    )
    assert num_same >= len(trained) - num_behind
    assert len(asked[0]) >= len(trained)
    assert tally.warnings == {"cut": 1}
    assert "they were cut off" in tally.notes()[0]
    for notes in (setup.notes, evaluated.notes):
        assert any("1 of 1 sample prompt was cut at the end" in note for note in notes)
