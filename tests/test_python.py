"""The calls from Python: rows in memory, a progress line, measures of a run."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

import tunesmith
from tiny_run import chats, model_folder, tiny_recipe
from tunesmith.api import ProgressLine, _over
from tunesmith.data.in_memory import is_rows, write_rows
from tunesmith.errors import DataError, InputError, RunError
from tunesmith.recipe.load import load, validate


class Table:
    """As `datasets.Dataset` looks to who iterates over it."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows
        self.column_names = list(rows[0])

    def __iter__(self) -> Any:
        return iter(self.rows)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[tunesmith.Run, list[dict[str, Any]], Path, list[str]]:
    folder = tmp_path_factory.mktemp("python")
    recipe = tiny_recipe(folder, train={"epochs": 1})
    rows = [json.loads(line) for line in chats(folder / "more.jsonl", 18, seed=2).read_text("utf-8").splitlines()]
    kinds: list[str] = []
    run = tunesmith.train(
        data=rows, recipe=recipe, root=folder / "runs", offline=True, on_event=lambda event: kinds.append(event.kind)
    )
    return run, rows, folder, kinds


def test_rows_in_memory_train_and_stay_where_a_resume_finds_them(trained: Any) -> None:
    run, rows, folder, kinds = trained
    [file] = run.recipe().data.train
    assert Path(file.path).parent == folder / "runs" / "data"
    assert [json.loads(line) for line in Path(file.path).read_text("utf-8").splitlines()] == rows
    assert kinds[0] == "start"
    assert kinds[-1] == "end"


def test_metrics_of_a_run_are_those_of_its_report(trained: Any) -> None:
    run, rows, _folder, _ = trained
    loss = run.metrics["loss"]
    assert loss["value"] == run.report["metrics"]["after"]["loss"]
    assert tunesmith.evaluate(run, rows, samples=0, offline=True)["loss"]["value"] > 0


def test_a_run_that_has_not_ended_says_that_it_has_no_measures(tmp_path: Path) -> None:
    run = tunesmith.Run.create(tmp_path, "new", "model: x\n")
    with pytest.raises(RunError, match="no report yet: it is new"):
        _ = run.metrics


def test_what_is_no_path_and_no_rows_is_refused_in_words(trained: Any) -> None:
    run, *_ = trained
    with pytest.raises(InputError, match="neither a path nor rows"):
        tunesmith.evaluate(run, ["a.jsonl", "b.jsonl"], offline=True)


def test_tables_and_lists_of_mappings_are_rows_and_files_are_not() -> None:
    assert is_rows([{"text": "a"}])
    assert is_rows([{"path": "a", "text": "b"}])
    assert is_rows(Table([{"text": "a"}]))
    for files in ("a.jsonl", ["a.jsonl"], [{"path": "a.jsonl", "weight": 2}], {"path": "a.jsonl"}, Path("a"), ()):
        assert not is_rows(files)
    with pytest.raises(DataError, match="item 1 of the list is a row, item 0 is not"):
        is_rows(["a.jsonl", {"text": "a"}])


def test_the_same_rows_are_the_same_file(tmp_path: Path) -> None:
    rows = [{"text": "ä", "label": 1}, {"text": "b", "label": None}]
    assert write_rows(rows, tmp_path) == write_rows(rows, tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    assert write_rows(Table(rows), tmp_path).read_text("utf-8") == '{"text":"ä","label":1}\n{"text":"b"}\n'


def test_a_pandas_table_leaves_missing_values_out(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    assert not is_rows(pandas.Series(["a.jsonl"]))
    frame = pandas.DataFrame({"text": ["a", "b"], "label": [1.5, float("nan")], "when": [pandas.NaT, pandas.NaT]})
    assert write_rows(frame, tmp_path).read_text("utf-8") == '{"text":"a","label":1.5}\n{"text":"b"}\n'


def test_a_pandas_table_from_parquet_holds_its_lists_as_arrays(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    pandas.DataFrame({"messages": [turns], "tags": [["a", "b"]]}).to_parquet(tmp_path / "rows.parquet")
    path = write_rows(pandas.read_parquet(tmp_path / "rows.parquet"), tmp_path)
    [row] = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    assert row["tags"] == ["a", "b"]
    assert [turn["content"] for turn in row["messages"]] == ["hi", "ho"]
    with pytest.raises(DataError, match="column text: the table has several columns of this name"):
        write_rows(pandas.DataFrame([["a", "b"]], columns=["text", "text"]), tmp_path)


@pytest.mark.parametrize("given", [None, 3, ({"text": "a"} for _ in "a"), [("a", "b")], {"train": [{"text": "a"}]}])
def test_data_in_no_known_form_is_refused_in_words(given: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is neither files nor rows"):
        tunesmith.train("model", given, root=tmp_path, offline=True)


def test_a_value_that_json_cannot_hold_is_refused_by_row_and_field(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"row 1: field image: bytes b'\\x00' cannot be written as JSON"):
        write_rows([{"text": "a"}, {"text": "b", "image": b"\0"}], tmp_path)
    with pytest.raises(DataError, match="there are no rows"):
        write_rows(_empty(), tmp_path)
    assert list(tmp_path.iterdir()) == []


def _empty() -> Table:
    table = Table([{"text": "a"}])
    table.rows = []
    return table


def test_a_progress_line_goes_through_all_phases_to_the_last_step(tmp_path: Path) -> None:
    made: list[Any] = []

    class Bar:
        def __init__(self, total: int, desc: str, leave: bool) -> None:
            self.total, self.desc, self.n, self.facts, self.open = total, desc, 0, {}, True
            made.append(self)

        def update(self, more: int) -> None:
            self.n += more

        def set_postfix(self, facts: dict[str, str], refresh: bool) -> None:
            self.facts = facts

        def close(self) -> None:
            self.open = False

    line = ProgressLine(make=Bar)
    from tunesmith.training import trainer as training

    listener = training.Listener(on_event=line.event, on_progress=line.tick)
    run = training.train(tiny_recipe(tmp_path, train={"epochs": 1}), root=tmp_path, offline=True, listener=listener)
    line.close()
    steps = run.report["steps"]
    [bar] = [bar for bar in made if bar.desc == "training" and bar.n == steps]
    assert bar.total == steps
    assert "loss" in bar.facts
    assert "loading the model" in {bar.desc for bar in made}
    assert not any(bar.open for bar in made)
    later = ProgressLine(make=Bar)
    later.run(run)
    later.event(next(event for event in run.events() if event.kind == "step"))
    assert made[-1].total == steps, "a resumed run shows of how many steps it is, too"


def test_a_run_stops_when_it_is_asked_from_python(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path)
    with pytest.raises(tunesmith.Stopped):
        tunesmith.train(recipe=recipe, root=tmp_path, out=tmp_path / "r", offline=True, should_stop=lambda: True)
    run = tunesmith.resume(tmp_path / "r", offline=True)
    assert run.state() == "done"


@pytest.mark.parametrize("name", ["lion", "adafactor", "muon"])
def test_another_optimizer_from_python_has_its_own_defaults(name: str) -> None:
    start = load(None, base={}).model_dump()
    found = validate(_over(start, {"model": "m", "data": {"train": ["a"]}, "optim": {"name": name, "clip": 2.0}}))
    assert found.optim == load(None, [f"optim.name={name}", "optim.clip=2.0"]).optim
    kept = validate(_over(validate({"optim": {"eps": 1e-6}}).model_dump(), {"optim": {"name": "muon"}}))
    assert kept.optim.eps == 1e-6  # one that was chosen stays


def test_a_refusal_from_python_names_the_row_and_what_is_wrong(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "completion": "b"}] * 8 + [{"prompt": "a", "completion": ""}]
    with pytest.raises(DataError, match=r"jsonl:9: empty_answer: completion is empty") as refused:
        tunesmith.train(model_folder(tmp_path / "model"), rows, root=tmp_path, offline=True)
    assert refused.value.problems
    assert 'leave such rows out: recipe=tunesmith.Recipe(data={"bad_rows": "skip"}).' in str(refused.value)


def test_what_is_wrong_with_many_rows_is_written_once(tmp_path: Path) -> None:
    rows = [{"prompt": f"a{i}", "completion": ""} for i in range(9)] + [{"prompt": 3, "completion": "b"}]
    with pytest.raises(DataError) as refused:
        tunesmith.train(model_folder(tmp_path / "model"), rows, root=tmp_path, offline=True)
    _, empty, number = str(refused.value).splitlines()
    assert empty.endswith("empty. Write it, or remove the row. The same is wrong in 8 more rows.")
    assert ":10: wrong_type: " in number


def test_an_option_of_the_command_line_is_named_as_python_writes_it() -> None:
    with pytest.raises(tunesmith.RecipeError, match=r'epochs: unknown key, did you mean train=\{"epochs": \.\.\.\}\?'):
        tunesmith.train("model", "rows.jsonl", epochs=3)


def test_notes_of_a_run_reach_who_calls_it_from_python(tmp_path: Path) -> None:
    """Whatever `progress` is; as warnings at the caller's own line, and in run.notes."""
    recipe = tiny_recipe(tmp_path, train={"epochs": 1})
    rows = [json.loads(line) for line in chats(tmp_path / "rows.jsonl", 10).read_text("utf-8").splitlines()]
    for progress in (False, True):
        with pytest.warns(tunesmith.TunesmithWarning) as heard:
            run = tunesmith.train(
                data=rows, eval=rows[:5], recipe=recipe, root=tmp_path / "runs", offline=True, progress=progress
            )
        texts = [str(one.message) for one in heard]
        assert any("5 of 5 held-out rows are" in text or "of the 5" in text for text in texts), texts
        assert set(texts) <= set(run.notes)
        asides = [note for event in run.events() for note in event.values.get("asides", ())]
        assert not set(texts) & set(asides)  # which need no action; a terminal prints them with --verbose alone
        assert run.notes
        assert {Path(one.filename).name for one in heard} == {Path(__file__).name}


def test_a_run_is_opened_by_a_word_and_a_path_as_text(trained: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run, _, folder, _ = trained
    assert tunesmith.Run.open("last", str(folder / "runs")).path == run.path
    monkeypatch.chdir(folder)
    assert tunesmith.Run.open("last").path.resolve() == run.path.resolve()


def test_rows_in_memory_give_a_run_a_name_to_be_found_by(trained: Any) -> None:
    run, *_ = trained
    assert re.fullmatch(r"[\w-]+-chat-[0-9a-f]{4}", run.path.name)
    assert not run.path.name.startswith("rows-")


def test_a_refusal_of_rows_says_what_to_write_in_python(tmp_path: Path) -> None:
    file = tmp_path / "named.jsonl"
    file.write_text("".join(json.dumps({"txt": f"some text {i}", "lbl": "ab"[i % 2]}) + "\n" for i in range(6)))
    with pytest.raises(DataError) as error:
        tunesmith.train(str(model_folder(tmp_path / "model")), str(file), task="classify", root=tmp_path, offline=True)
    assert "--set" not in str(error.value)
    assert 'recipe=tunesmith.Recipe(data={"columns": {"' in str(error.value)


def test_it_is_asked_whether_to_stop_before_the_first_step_and_after_each(tmp_path: Path) -> None:
    """As docs/guide/python.md says: the third call, after the second step, stops there."""
    calls: list[int] = []

    def at_the_third() -> bool:
        calls.append(1)
        return len(calls) == 3

    with pytest.raises(tunesmith.Stopped, match="stopped after step 2 of"):
        tunesmith.train(
            recipe=tiny_recipe(tmp_path, train={"epochs": 2}), root=tmp_path, offline=True, should_stop=at_the_third
        )
