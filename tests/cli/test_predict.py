"""predict, eval and compare as they are typed: on models with heads, on a run of classes, on rows that went wrong."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from inference.headed import MANY, ONE, TAGS, headed
from tiny_tasks import rows_of, task_recipe, texts, write
from tunesmith.cli.app import app
from tunesmith.runs.folder import Run

Result = Any


def tunesmith(*words: str | Path, code: int = 0, given: str | None = None) -> Result:
    result = CliRunner().invoke(app, [str(word) for word in words], input=given)
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result


def told(result: Result) -> list[dict[str, Any]]:
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return headed(tmp_path_factory.mktemp("one") / "model", ONE)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("rows") / "rows.jsonl", [{"text": text} for text in texts(20)])


def predict(*words: str | Path, code: int = 0, given: str | None = None) -> Result:
    return tunesmith("predict", *words, "--offline", code=code, given=given)


def test_a_pipe_is_read_to_its_end(one: Path) -> None:
    lines = told(predict(one, "-", given='{"text": "the old"}\n{"text": "in Rome"}\n'))
    assert [line["source"] for line in lines] == ["stdin:1", "stdin:2"]


def test_files_of_another_encoding_are_read_as_their_refusal_advises(one: Path, tmp_path: Path) -> None:
    path, label = tmp_path / "rows.csv", ONE.names[0]
    path.write_bytes("".join(["text,label\n", *(f"café {i},{label}\n" for i in range(6))]).encode("cp1252"))
    advised = ("--set", "data.encoding=cp1252")
    for words in (("predict", one, path), ("eval", one, path), ("compare", one, one, "--data", path)):
        assert f"add {' '.join(advised)}" in tunesmith(*words, "--offline", code=2).output.replace("Add", "add")
        tunesmith(*words, *advised, "--offline")
    out = tmp_path / "answers.jsonl"
    predict(one, path, "--out", out, *advised)
    assert json.loads(out.read_text("utf-8").splitlines()[0])["text"] == "café 0"
    renamed = tmp_path / "renamed.csv"
    renamed.write_text(f"note,mood\ngood,{label}\nbad,{label}\n", "utf-8")
    columns = ("--set", "data.columns={text: note, label: mood}")
    for words in (("predict", one, renamed), ("eval", one, renamed)):
        tunesmith(*words, "--offline", code=2)
        tunesmith(*words, *columns, "--offline")
    assert "only options of reading" in predict(one, path, "--set", "optim.lr=1", code=2).output
    refused = tunesmith("compare", one, one, *advised, code=2)
    assert "no rows are read here. Give --data FILE" in refused.output


def test_a_line_a_row_that_can_be_read_as_a_row_again(one: Path, rows: Path, tmp_path: Path) -> None:
    result = predict(one, rows)
    lines = told(result)
    assert [line["source"] for line in lines] == [f"{rows}:{n}" for n in range(1, 21)]
    assert [line["text"] for line in lines] == texts(20)
    assert all(set(line["probabilities"]) == set(ONE.names) for line in lines)
    assert "20 rows answered" in result.stderr
    again = write(tmp_path / "again.jsonl", lines)
    assert [line["label"] for line in told(predict(one, again))] == [line["label"] for line in lines]
    bare = told(predict(one, rows, "--bare"))
    assert [list(line) for line in bare] == [["source", "label", "probabilities"]] * 20


def test_rows_that_cannot_be_used_say_why_in_their_place(one: Path, tmp_path: Path) -> None:
    path = tmp_path / "some.jsonl"
    path.write_text('{"text": "the old"}\nnot json\n{"words": 1}\n{"text": "in Rome"}\n')
    result = predict(one, path)
    lines = told(result)
    assert [set(line) & {"label", "error"} for line in lines] == [{"label"}, {"error"}, {"error"}, {"label"}]
    assert lines[1]["error"].startswith("bad_json: ")
    assert "2 rows answered; 2 rows could not be, and say why" in result.stderr


@pytest.mark.parametrize("content", ['{"words": 1}\nnot json\n', "words,more\na,b\n"])
def test_without_an_answer_nothing_is_left(one: Path, tmp_path: Path, content: str) -> None:
    path, out = tmp_path / "none", tmp_path / "out" / "answers.jsonl"
    path.write_text(content)
    out.parent.mkdir()
    error = predict(one, path, "--out", out, code=2).stderr
    assert "unknown_shape: " in error
    assert ("no row could be answered" in error) == ("not written" in error) == content.startswith("{")
    assert not list(out.parent.iterdir())


@pytest.mark.parametrize("kept", [0, 1, 7, 20])
def test_a_file_of_answers_is_gone_on_with(one: Path, rows: Path, tmp_path: Path, kept: int) -> None:
    whole, begun = tmp_path / "whole.jsonl", tmp_path / "begun.jsonl"
    predict(one, rows, "--out", whole)
    _begin(one, rows, begun, whole.read_bytes().splitlines(keepends=True)[:kept])
    result = predict(one, rows, "--out", begun, "--json")
    assert begun.read_bytes() == whole.read_bytes()
    assert told(result) == [{"kind": "result", "out": str(begun), "answered": 20, "errors": 0}]
    assert (f"continues after {kept} row" in result.stderr) == bool(kept)
    assert "is there already" in predict(one, rows, "--out", begun, code=2).stderr


def _begin(model: Path, rows: Path, out: Path, lines: list[bytes]) -> None:
    """What a call leaves that is killed after some lines, in the middle of the next."""
    from tunesmith.inference.load import load_model
    from tunesmith.inference.predict import Predictor, fingerprint
    from tunesmith.inference.rows import OutputFile

    predictor = Predictor(load_model(str(model), offline=True))
    output = OutputFile(out, fingerprint(predictor, str(rows), bare=False))
    output.part.write_bytes(b"".join(lines) + b'{"source": "ro')
    output.close()


def test_id_reference_and_answer_stand_in_one_line(one: Path, tmp_path: Path) -> None:
    path = tmp_path / "some.csv"
    path.write_text("id,text,label\n7,the old,a\n9,in Rome,b\n")
    lines = told(predict(one, path, "--keep", "id"))
    assert [(line["id"], line["reference"]) for line in lines] == [("7", "a"), ("9", "b")]
    assert list(lines[0]) == ["source", "id", "text", "label", "probabilities", "reference"]
    assert "id" in told(predict(one, path, "--keep", "id,reference", "--bare"))[0]
    out = tmp_path / "out.jsonl"
    predict(one, path, "--keep", "id", "--out", out)
    assert "reference" in out.read_text()
    assert [line["label"] for line in told(predict(one, out))]  # a file of answers is a file of rows


def test_a_column_that_is_not_there_or_is_the_answers_own_cannot_be_kept(one: Path, tmp_path: Path) -> None:
    path = tmp_path / "some.csv"
    path.write_text("idx,text,label\n7,the old,a\n")
    assert "no such field. Did you mean idx?" in predict(one, path, "--keep", "id", code=2).stderr
    assert "each line has a field of this name already" in predict(one, path, "--keep", "label", code=2).stderr


@pytest.mark.parametrize("wrong", ["out", "rows"])
def test_an_existing_output_or_missing_input_is_refused_before_loading(
    rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    monkeypatch.setattr("tunesmith.inference.load.load_any", lambda *rest, **options: pytest.fail("loaded"))
    out, none = write(tmp_path / "out.jsonl", []), tmp_path / "none.jsonl"
    words = (rows, "--out", out) if wrong == "out" else (none,)
    error = predict("model", *words, code=2).stderr
    expected = f"{out}: is there already" if wrong == "out" else f"{none}: no_such_file: there is no such file."
    assert expected in error.replace("\n", " ")


def test_other_rows_or_another_model_are_not_gone_on_with(one: Path, rows: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    _begin(one, rows, out, [b'{"source":"x"}\n'])
    other = write(tmp_path / "other.jsonl", [{"text": "the old"}])
    assert "rows was " in predict(one, other, "--out", out, code=2).stderr
    assert "--overwrite" in predict(one, rows, "--out", out, "--bare", code=2).stderr
    predict(one, other, "--out", out, "--overwrite")
    assert len(out.read_bytes().splitlines()) == 1
    assert "--overwrite" in predict(one, other, "--out", out, "--bare", code=2).stderr
    assert "the rows themselves" in predict(one, other, "--out", other, code=2).stderr


def test_ctrl_c_leaves_what_is_done_and_says_how_to_go_on(
    one: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tunesmith.inference import predict as module

    out, passes = tmp_path / "out.jsonl", iter(range(3))

    def forward(model: Any, batch: Any) -> Any:
        if next(passes, None) is None:
            raise KeyboardInterrupt
        return real(model, batch)

    real = module.sequence_logits
    monkeypatch.setattr(module, "sequence_logits", forward)
    monkeypatch.setattr(module.Predictor, "chunk_rows", 4)
    assert "the same command continues it" in predict(one, rows, "--out", out, code=3).stderr
    assert len(out.with_name("out.jsonl.part").read_bytes().splitlines()) == 12  # three chunks of one pass each
    monkeypatch.undo()
    predict(one, rows, "--out", out)
    assert [json.loads(line)["source"] for line in out.open()] == [f"{rows}:{n}" for n in range(1, 21)]


def test_one_text_is_answered(one: Path) -> None:
    [line] = told(predict(one, "--text", "the old", "--pair", "in Rome"))
    assert (line["text"], line["text_pair"]) == ("the old", "in Rome")
    assert line["label"] in ONE.names


def test_the_threshold_is_said_and_kept_to(tmp_path: Path) -> None:
    many = headed(tmp_path / "many", MANY)
    result = predict(many, "--text", "the old apple", "--threshold", "0")
    assert told(result)[0]["label"] == list(MANY.names)
    assert "above 0 (--threshold)" in result.stderr


def test_what_does_not_go_together_is_refused(one: Path, rows: Path, tmp_path: Path) -> None:
    tags = headed(tmp_path / "tags", TAGS)
    for words, said in [
        ((one,), "give one of FILE and --text"),
        ((one, rows, "--text", "x"), "give one of FILE and --text"),
        ((one, rows, "--threshold", "0.5"), "any number of classes"),
        ((one, rows, "--pair", "x"), "--pair goes with --text"),
        ((tags, "--text", "x", "--pair", "y"), "--pair: the task"),
        ((one, rows, "--task", "talk"), "there is no such task"),
        ((one, rows, "--base"), "--base needs a run"),
        ((one, tmp_path / "none.jsonl"), "no_such_file"),
    ]:
        assert said in predict(*words, code=2).stderr


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    from tunesmith.training import trainer as training

    folder = tmp_path_factory.mktemp("run")
    recipe = task_recipe(folder, "classify", "encoder", rows=40)
    return training.train(recipe, root=folder / "runs", offline=True)


def held_out(run: Run) -> str:
    return run.recipe().data.eval[0].path


def test_eval_finds_what_the_run_found(run: Run, tmp_path: Path) -> None:
    """On the run's own held-out rows: the same measures, and the same lines in another order."""
    out = tmp_path / "rows.jsonl"
    [found] = told(tunesmith("eval", run.path, held_out(run), "--out", out, "--json", "--offline"))
    after = [event for event in run.events() if event.kind == "evaluation"][-1].values
    assert (found["task"], found["rows"]) == ("classify", after["rows"])
    assert found["measures"].keys() == after["measures"].keys()
    for key, interval in found["measures"].items():  # 1e-5: float32 in micro-batches of other lengths
        assert interval == pytest.approx(after["measures"][key], abs=1e-5), "the same resamples too"
    kept = {line["hash"]: line["predicted"] for line in _lines(run.path / "evaluation" / "after.jsonl")}
    assert {line["hash"]: line["predicted"] for line in _lines(out)} == kept
    plain = tunesmith("eval", run.path, held_out(run), "--offline").stdout
    trained = f", {found['trained_on']} of them trained on by this run"
    head = f"classify: measured on {after['rows']} rows{trained}\nmetric\tvalue\t95 % interval\nloss\t"
    assert (found["trained_on"] > 0, plain.startswith(head)) == (True, True)
    assert "\naccuracy\t" in plain


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_eval_does_not_write_over_its_data(run: Run, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_bytes(before := Path(held_out(run)).read_bytes())
    result = tunesmith("eval", run.path, rows, "--out", tmp_path / "." / "rows.jsonl", "--offline", code=2)
    assert "is the data file itself" in result.stderr
    assert rows.read_bytes() == before


def test_eval_compares_a_classifier_with_the_commonest_class(run: Run) -> None:
    result = tunesmith("eval", run.path, held_out(run), "--json", "--offline")
    [found] = told(result)
    baseline = found["baseline"]
    assert (baseline["name"], baseline["from"], baseline["rows"]) == ("majority baseline", "the training rows", 8)
    counts = json.loads(run.report_path.read_text())["labels"]
    assert baseline["words"] == f"always answering `{max(counts, key=counts.get)}`"
    assert baseline["measures"]["accuracy"]["value"] == found["measures"]["majority"]["value"]
    plain = tunesmith("eval", run.path, held_out(run), "--offline").stdout
    assert found["headline"][0] in plain
    assert "8 rows are few: on other rows of the same kind this may turn out differently." in plain


def test_eval_of_a_model_takes_the_commonest_class_of_the_rows_and_says_so(one: Path, tmp_path: Path) -> None:
    path = write(
        tmp_path / "rows.jsonl", [{"text": text, "label": ONE.names[i > 6]} for i, text in enumerate(texts(9))]
    )
    [found] = told(tunesmith("eval", one, path, "--json", "--offline"))
    assert found["baseline"]["words"] == f"always answering `{ONE.names[0]}`"
    assert "(majority baseline of the rows measured): " in found["headline"][0]


def test_eval_of_the_untouched_model_is_the_evaluation_before(run: Run) -> None:
    [found] = told(tunesmith("eval", run.path, held_out(run), "--base", "--json", "--offline"))
    before = next(event for event in run.events() if event.kind == "evaluation").values
    assert found["measures"]["loss"]["value"] == pytest.approx(before["loss"], abs=1e-5)


def test_eval_says_how_many_rows_the_run_was_trained_on(run: Run, tmp_path: Path) -> None:
    trained = _lines(Path(run.recipe().data.train[0].path))
    new = [
        {"text": "a big plum tree in Oslo", "label": "fruit"},
        {**trained[0], "label": "fruit" if trained[0]["label"] == "place" else "place"},
    ]
    path = write(tmp_path / "some.jsonl", [*new, *trained[:3]])
    result = tunesmith("eval", run.path, path, "--json", "--offline")
    assert told(result)[0]["trained_on"] == 3
    assert "3 of 5 rows were trained on by this run" in result.stderr.replace("\n", " ")
    compared = tunesmith("compare", run.path, run.path, "--data", path, "--offline").stderr.replace("\n", " ")
    assert compared.count("3 of 5 rows were trained on by this run") == 2
    base = tunesmith("eval", run.path, path, "--base", "--json", "--offline")
    assert told(base)[0]["trained_on"] is None
    assert "trained on" not in base.stderr
    assert told(base)[0]["measures"]["majority"] == told(result)[0]["measures"]["majority"]


@pytest.fixture(scope="module")
def writer(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that held out rows of its training file."""
    from tunesmith.training import trainer as training

    folder = tmp_path_factory.mktemp("writer")
    sections = {"train": {"max_steps": 1}, "data": {"eval": [], "held_out": 0.3}, "evaluation": {"samples": 0}}
    return training.train(task_recipe(folder, "generate", "causal", **sections), root=folder / "runs", offline=True)


def test_rows_that_were_held_out_are_not_among_those_trained_on(writer: Run) -> None:
    held = next(event.values["rows"] for event in writer.events() if event.kind == "evaluation")
    path = writer.recipe().data.train[0].path
    [found] = told(tunesmith("eval", writer.path, path, "--json", "--offline"))
    assert found["rows"] == 24
    assert 0 < found["trained_on"] == 24 - held < 24


def test_eval_answers_fifty_rows_unless_told_otherwise(writer: Run, tmp_path: Path) -> None:
    import tunesmith as package

    short = write(tmp_path / "short.jsonl", rows_of("generate", 60, seed=5))
    assert len(told(tunesmith("eval", writer.path, short, "--json", "--offline"))[0]["samples"]) == 60
    long = [{**row, "completion": 3 * f" {row['prompt']}"} for row in rows_of("generate", 60, seed=5)]
    path = write(tmp_path / "rows.jsonl", long)
    result = tunesmith("eval", writer.path, path, "--json", "--offline")
    [found] = told(result)
    assert len(found["samples"]) == 50
    assert {"exact_match", "rougeL"} <= found["measures"].keys()
    assert "50 rows were answered, with 4 tokens at most (--samples; 0: none)" in result.stderr.replace("\n", " ")
    none = told(tunesmith("eval", writer.path, path, "--samples", "0", "--json", "--offline"))[0]
    assert none["samples"] == []
    assert "rougeL" not in none["measures"]
    assert "rougeL" in package.evaluate(writer, path, samples=2, offline=True)


def test_eval_of_a_model_that_writes_nothing_refuses_samples(run: Run) -> None:
    assert "writing" in tunesmith("eval", run.path, held_out(run), "--samples", "3", "--offline", code=2).stderr


def test_eval_makes_text_of_rows_only_where_it_is_kept(writer: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Millions of rows are measured without holding what they say."""
    from tunesmith.inference.load import load_run
    from tunesmith.inference.measure import evaluate_file

    speaker, path = load_run(writer, offline=True), writer.recipe().data.train[0].path
    lines: list[dict[str, Any]] = []
    evaluate_file(speaker, path, samples=0, keep=lines.extend)
    assert len(lines) == 24
    monkeypatch.setattr(type(speaker.renderer.tokenizer), "decode", lambda *rest, **options: pytest.fail("decoded"))
    assert evaluate_file(speaker, path, samples=0).num_rows == 24


def test_eval_names_a_label_that_the_model_does_not_know(run: Run, tmp_path: Path) -> None:
    path = write(tmp_path / "new.jsonl", [*rows_of("classify", 3), {"text": "a pear", "label": "friut"}])
    error = tunesmith("eval", run.path, path, "--offline", code=2).stderr
    assert f"{path}:4: unknown_label: " in error
    assert "Did you mean fruit?" in error


def test_eval_says_why_its_measures_are_not_those_of_the_report(run: Run, tmp_path: Path) -> None:
    from tunesmith.inference.load import load_any
    from tunesmith.inference.measure import evaluate_file
    from tunesmith.recipe.load import validate

    loaded = load_any(str(run.path), root=run.path.parent, offline=True)
    before = evaluate_file(loaded, held_out(run)).notes
    changed = {"evaluation": {**loaded.recipe.evaluation.model_dump(), "max_rows": 5}}
    recipe = validate({**loaded.recipe.model_dump(), **changed})
    rows, *others = evaluate_file(replace(loaded, recipe=recipe), held_out(run)).notes
    assert others == before
    assert rows == "all 8 rows are measured; the run's report is of at most 5 (evaluation.max_rows)"


def test_predict_of_a_run_and_its_python_face_agree(run: Run) -> None:
    import tunesmith as package

    said = texts(6, seed=3)
    file = write(run.path.parent / "said.jsonl", [{"text": text} for text in said])
    lines = told(predict(run.path, file, "--bare"))
    labels = [line["label"] for line in lines]
    assert [line["label"] for line in package.predict(run, said, offline=True)] == labels
    assert set(labels) <= {"fruit", "place"}
    measures = package.evaluate(run, held_out(run), offline=True)
    assert measures["accuracy"]["low"] <= measures["accuracy"]["value"] <= measures["accuracy"]["high"]


def test_compare_of_a_run_with_itself_finds_no_difference(run: Run) -> None:
    [found] = told(tunesmith("compare", run.path, run.path, "--json"))
    assert (found["rows"], found["won"], found["lost"]) == (8, [], [])
    assert "Hold out more: data.held_out" in tunesmith("compare", run.path, run.path).stdout
    refused = tunesmith("compare", run.path, run.path, "--model", "away", code=2).stderr
    assert "--model away: no run is measured here. Give --data FILE, or leave it out." in refused
    assert all(measure["b_minus_a"]["value"] == 0 for measure in found["measures"].values())
    rows = [{**row, "unused": 1} for row in map(json.loads, Path(held_out(run)).read_text().splitlines())]
    result = tunesmith("compare", run.path, run.path, "--data", write(run.path / "more.jsonl", rows), "--offline")
    plain = result.stdout
    assert plain.startswith(f"8 rows in common\nA is {run.path}, B is {run.path}; B − A: their difference on the same")
    assert (result.stderr.count("ignored_fields"), "--eval" in plain) == (1, False)
    assert "8 rows are few: on other rows of the same kind this may turn out differently. A larger file" in plain
    assert "is better on 0 rows, worse on 0, and as good on 8" in plain


def fake_run(path: Path, lines: list[dict[str, Any]]) -> Path:
    """A run that measured these rows, as far as compare looks."""
    (path / "evaluation").mkdir(parents=True)
    (path / "run.json").write_text('{"format": 1}')
    if lines:
        write(path / "evaluation" / "after.jsonl", lines)
    return path


def judged(number: int, predicted: str, label: str = "fruit") -> dict[str, Any]:
    told = {"source": f"a.jsonl:{number}", "hash": f"{number:016x}", "text": f"row \x1b[2J {number}"}
    return {**told, "loss": 0.5, "count": 1.0, "label": label, "predicted": predicted, "probability": 0.9}


def test_compare_lists_what_flipped(tmp_path: Path) -> None:
    a = fake_run(tmp_path / "a", [judged(n, "fruit" if n < 4 else "none") for n in range(6)])
    b = fake_run(tmp_path / "b", [judged(n, "none" if n == 1 else "fruit") for n in range(1, 7)])
    lines = tunesmith("compare", a, b).stdout.splitlines()
    assert lines[0] == f"5 rows in common; 1 only in {a}; 1 only in {b}"
    assert f"{b} is better on 2 rows, worse on 1, and as good on 2" in lines
    assert lines[-3] == "worse: a.jsonl:1: fruit → none, right is fruit: row ␛[2J 1"
    assert [line[:17] for line in lines[-2:]] == ["better: a.jsonl:4", "better: a.jsonl:5"]
    accuracy = next(line for line in lines if line.startswith("accuracy"))
    assert accuracy.startswith("accuracy\t60.0 %\t80.0 %\t+20.0 (")
    assert accuracy.endswith("points, may be chance")


def test_compare_counts_documents_and_says_which_losses_compare(tmp_path: Path) -> None:
    def window(count: int) -> dict[str, Any]:
        return {"source": "a.txt:1", "hash": "1", "text": "t", "loss": 4.0, "count": count, "bytes": 9, "correct": 1}

    a, b = (fake_run(tmp_path / name, [window(n)] * 3) for name, n in (("a", 4), ("b", 5)))
    lines = tunesmith("compare", a, b).stdout.splitlines()
    assert lines[0] == "1 document in common"
    assert lines[2].endswith("token accuracy cannot be compared; bits per byte can")
    bits = next(line for line in lines if line.startswith("bits per byte\t"))
    assert bits.startswith(f"bits per byte\t{4 / 9 / math.log(2):.4f}\t{4 / 9 / math.log(2):.4f}\tthe same")


def test_compare_orders_rows_by_the_loss_that_it_shows(tmp_path: Path) -> None:
    def row(n: int, loss: float, count: int) -> dict[str, Any]:
        return {"source": f"a:{n}", "hash": str(n), "text": "t", "loss": loss, "count": count, "correct": 0}

    a = fake_run(tmp_path / "a", [row(n, 0.0, n) for n in range(1, 8)])
    b = fake_run(tmp_path / "b", [row(n, 8.0 + n, n) for n in range(1, 8)])  # the longest row loses most, not a token
    worse = [line for line in tunesmith("compare", a, b).stdout.splitlines() if line.startswith("worse: ")]
    assert [line.split(": ")[1] for line in worse] == [f"a:{n}" for n in range(1, 6)]


def test_compare_pairs_the_answers_of_two_runs(tmp_path: Path) -> None:
    runs = [fake_run(tmp_path / name, [judged(1, "fruit")]) for name in "ab"]
    for run, score in zip(runs, (0.25, 0.75), strict=True):
        scores = dict.fromkeys(("exact_match", "rouge1", "rouge2", "rougeL"), score)
        lines = [{"source": f"a:{n}", "prompt": "p", "reference": "r", "answer": "x", **scores} for n in range(3)]
        write(run / "evaluation" / "answers-after.jsonl", lines)
    lines = tunesmith("compare", *runs).stdout.splitlines()
    assert "3 prompts answered by both" in lines
    assert "ROUGE-L\t0.2500\t0.7500\t+0.5000 (+0.5000 to +0.5000), too few rows to tell" in lines
    assert any(line.startswith("accuracy\t") and line.endswith("\tthe same") for line in lines)
    [found] = told(tunesmith("compare", *runs, "--json"))
    told_of = found["answers"]["measures"]["rougeL"]
    assert (found["answers"]["num"], told_of["b_minus_a"]["low"], told_of["is_clear"]) == (3, 0.5, False)
    assert "1 row is too few to conclude anything" in "\n".join(lines)


def test_compare_refuses_what_has_nothing_in_common(tmp_path: Path) -> None:
    a = fake_run(tmp_path / "a", [judged(1, "fruit")])
    b = fake_run(tmp_path / "b", [judged(2, "fruit")])
    none = fake_run(tmp_path / "none", [])
    assert f"tunesmith compare {a} {b} --data FILE" in tunesmith("compare", a, b, code=2).stderr
    assert "has not measured held-out rows" in tunesmith("compare", a, none, code=2).stderr
