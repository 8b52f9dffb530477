"""Jobs by reinforcement: their requests, what of a client's grader may run, routes that try it, runs and metrics."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

openai = pytest.importorskip("openai", reason="the openai package is the client of these tests")

from openai.types.fine_tuning import FineTuningJob  # noqa: E402

from jobs.places import BASES, FakeLauncher, FakeModels, dispatcher, put_file, put_job  # noqa: E402
from jobs.served import Served, serving  # noqa: E402
from jobs.test_end_to_end import Live  # noqa: E402
from rewarded import QUESTIONS  # noqa: E402
from tiny_run import model_folder  # noqa: E402
from tunesmith.graders import strangers  # noqa: E402
from tunesmith.graders.strangers import GraderRefusedError, GraderRules, JudgeAccess, runnable  # noqa: E402
from tunesmith.jobs import grader_routes, reinforcement  # noqa: E402
from tunesmith.jobs.job_request import JobBody  # noqa: E402
from tunesmith.jobs.objects import job_object  # noqa: E402
from tunesmith.jobs.run_events import EventTranslator, metrics_by_step, results_file  # noqa: E402
from tunesmith.jobs.store import Store  # noqa: E402
from tunesmith.jobs.tables import events  # noqa: E402
from tunesmith.recipe.load import validate  # noqa: E402
from tunesmith.serve.protocol import RequestError  # noqa: E402
from tunesmith.serve.responses import _problem  # noqa: E402
from tunesmith.training.trainer import train  # noqa: E402

SOURCE = """
def grade(sample, item):
    text = sample["output_text"]
    return sum(letter.isdigit() for letter in text) / max(1, len(text))
"""
EQUAL = {
    "type": "string_check", "name": "equal", "input": "{{sample.output_text}}", "reference": "{{item.answer}}",
    "operation": "like",
}  # fmt: skip
CODE = {"type": "python", "name": "digits", "source": SOURCE}
MULTI = {
    "type": "multi", "name": "both", "graders": {"equal": EQUAL, "digits": CODE},
    "calculate_output": "0.5 * equal + digits",
}  # fmt: skip
OPEN = GraderRules(python=True, judges={"o3": JudgeAccess(address="http://127.0.0.1:1/v1", model="judge", key_env="")})
ALLOWING = BASES.model_copy(update={"graders": OPEN})
JUDGE = {"type": "score_model", "name": "j", "model": "o3", "input": [{"role": "user", "content": "Good?"}]}


def questions(num: int) -> bytes:
    asked = [f"{QUESTIONS[i % len(QUESTIONS)]} {i}?" for i in range(num)]
    lines = [{"messages": [{"role": "user", "content": text}], "answer": str(i)} for i, text in enumerate(asked)]
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


def by(grader: Any, **hyperparameters: Any) -> dict[str, Any]:
    options = {"grader": grader, "hyperparameters": hyperparameters}
    return {"method": {"type": "reinforcement", "reinforcement": options}, "validation_file": "file-b"}


@pytest.fixture
def opened() -> type[Store]:
    """SQLite alone."""
    return Store


@pytest.fixture(scope="module")
def allowing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("allowing"), ALLOWING) as it:
        yield it


@pytest.mark.parametrize(
    ("grader", "code", "words"),
    [
        (CODE, "grader_not_allowed", "--python-graders"),
        ({**MULTI}, "grader_not_allowed", "graders.digits: type python: code of clients does not run here"),
        ({"type": "unit_tests"}, "grader_not_allowed", "--python-graders"),
        ({"type": "function", "file": "/etc/passwd"}, "grader_not_allowed", "names a file of the server"),
        (JUDGE, "grader_not_allowed", "o3: is no judge here; there is none"),
        ({**JUDGE, "address": "http://10.0.0.1/v1"}, "grader_not_allowed", "address: is decided by who runs"),
        ({"type": "regex", "pattern": "a", "seconds": 3600}, "grader_not_allowed", "seconds: is decided by who runs"),
        ({**EQUAL, "operation": "equals"}, "invalid_grader", "operation"),
        ({**EQUAL, "reference": "{{row.answer}}"}, "invalid_grader", "{{row.answer}}: not a variable"),
        ({**MULTI, "graders": {"equal": EQUAL}}, "invalid_grader", "there is no grader digits"),
        ({"type": "label_model"}, "invalid_grader", "Let a `score_model` grader give a number"),
        ({}, "invalid_grader", ""),
        ({"type": ["regex"]}, "invalid_grader", ""),
        ({"type": "json_schema", "schema": {"$schema": []}}, "invalid_grader", "$schema is no text"),
        ({**MULTI, "graders": {f"g{i}": EQUAL for i in range(33)}, "calculate_output": "g0"}, "invalid_grader", "33"),
    ],
)
def test_what_of_a_strangers_grader_does_not_run(grader: dict[str, Any], code: str, words: str) -> None:
    with pytest.raises(GraderRefusedError) as caught:
        runnable(grader, GraderRules(), "grader")
    assert caught.value.code == code
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("rules", "named", "unnamed"),
    [
        (GraderRules(), {"regex", "multi"}, {"python", "unit_tests", "score_model", "function", "reward_run"}),
        (OPEN, {"regex", "python", "unit_tests", "score_model"}, {"function", "reward_run"}),
    ],
)
def test_a_slip_in_a_type_names_those_that_clients_may_use(
    rules: GraderRules, named: set[str], unnamed: set[str]
) -> None:
    inner = {"type": "multi", "graders": {"a": {"type": "functions"}}, "calculate_output": "a"}
    for sent in ({"type": "functions"}, {"input": "x"}, inner):
        with pytest.raises(GraderRefusedError) as caught:
            runnable(sent, rules, "grader")
        words = set(str(caught.value).replace(",", " ").replace(".", " ").replace("?", " ").split())
        assert words >= named - {"multi"}, str(caught.value)
        assert not words & unnamed, str(caught.value)


@pytest.mark.parametrize(
    ("source", "words"), [("def grade(:", "line 1: invalid syntax"), ("def score(a, b): ...", "no function grade")]
)
def test_code_that_is_none_is_refused_without_being_run(source: str, words: str) -> None:
    with pytest.raises(GraderRefusedError, match=words):
        runnable({**CODE, "source": source}, OPEN, "grader")


@pytest.mark.parametrize("grader", [{**CODE, "env": ["OPENAI_API_KEY"]}, {**CODE, "memory_gib": 100.0}])
def test_code_that_is_allowed_gets_no_secret_and_no_more_memory(grader: dict[str, Any]) -> None:  # trap: S29
    with pytest.raises(GraderRefusedError, match="is decided by who runs the server"):
        runnable(grader, OPEN, "grader")


def test_options_that_nobody_refuses_are_found(monkeypatch: pytest.MonkeyPatch) -> None:  # trap: S29 planted
    monkeypatch.setattr(strangers, "SERVERS_OPTIONS", ())
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        test_code_that_is_allowed_gets_no_secret_and_no_more_memory({**CODE, "env": ["OPENAI_API_KEY"]})


def test_a_judge_is_asked_where_the_server_says() -> None:
    made = runnable({**MULTI, "graders": [JUDGE], "calculate_output": "j"}, OPEN, "grader")
    assert made["graders"] == [{**JUDGE, "model": "judge", "address": "http://127.0.0.1:1/v1", "key_env": ""}]


def test_a_request_names_what_it_lacks() -> None:
    body = {"model": "tiny", "training_file": "file-a"}
    with pytest.raises(RequestError, match="validation_file: is missing"):
        JobBody(**body, **{**by(EQUAL), "validation_file": None})
    for how in ({"response_format": {"type": "json_schema"}}, {"hyperparameters": {"reasoning_effort": "high"}}):
        with pytest.raises(ValueError, match=r"forced into no format|no levels of reasoning"):
            JobBody(**body, method={"type": "reinforcement", "reinforcement": {"grader": EQUAL, **how}})


def test_what_is_no_object_is_refused_in_plain_words() -> None:
    found = {"type": "dict_type", "msg": "Input should be a valid dictionary", "loc": ("body", "grader")}
    assert _problem(found, None) == ("grader", "invalid_value", "grader: should be an object.")


def test_hyperparameters_become_options_of_the_run(store: Store) -> None:
    put_file(store, questions(12))
    put_file(store, questions(4), "file-b")
    numbers = {"n_epochs": 2, "batch_size": 3, "compute_multiplier": 0.1, "eval_interval": 4, "eval_samples": 2}
    name = put_job(store, "file-a", bases=ALLOWING, **by(MULTI, learning_rate_multiplier=3.0, **numbers))
    working = dispatcher(store, FakeLauncher(), FakeModels(), ALLOWING)
    for _ in range(14):
        working.round()
    assert store.job(name)["status"] == "succeeded"
    recipe = json.loads((store.recipes_path / f"{name}.yaml").read_text())
    grader = store.recipes_path / f"{name}.grader.json"
    assert json.loads(grader.read_bytes()) == MULTI
    assert recipe["task"] == "reinforce"
    assert recipe["reinforce"] == {"grader": str(grader), "samples": 2, "held_out_samples": 2}
    assert recipe["evaluation"] == {"every": 4, "keep": "last"}
    assert recipe["train"] == {"epochs": 2.0, "rows_per_step": 3}
    assert (recipe["optim"]["lr_times"], recipe["data"]["too_long"]) == (3.0, "drop")
    shown = job_object(store.job(name))
    of_client = FineTuningJob.construct(**shown).method.reinforcement
    assert (of_client.hyperparameters.batch_size, of_client.hyperparameters.eval_samples) == (2, 2)
    assert shown["method"]["reinforcement"]["grader"] == MULTI
    assert set(shown["hyperparameters"]) == {"n_epochs", "batch_size", "learning_rate_multiplier"}
    messages = [row["message"] for row in store.page(events, limit=100)[0]]
    assert "compute_multiplier 0.1 is taken as 0.25: 2 answers are the bound" in messages
    assert "Rewards of the validation file are measured each 4 steps, with 2 answers to each prompt" in messages


@pytest.mark.parametrize(
    ("rows", "validation", "interval"), [(100, 5, 11), (100, 100, 25), (8, 5, 10)], ids=["few", "many", "one step"]
)
def test_auto_measures_so_seldom_that_it_draws_a_quarter_at_most(rows: int, validation: int, interval: int) -> None:
    sent = {**dict.fromkeys(("n_epochs", "batch_size", "eval_interval", "eval_samples"), "auto")}
    made = reinforcement.decided({**sent, "compute_multiplier": "auto"}, num_rows=rows, num_validation=validation)
    assert made["eval_interval"] == interval, made
    assert made["eval_interval"] * 64 >= 4 * validation * made["eval_samples"]


@pytest.mark.parametrize(
    ("content", "grader", "code", "words"),
    [
        (questions(12), {**EQUAL, "reference": "{{item.reply}}"}, "invalid_grader", "item has no reply"),
        (b'{"text": "x"}\n' * 12, EQUAL, "invalid_training_file", "Line 1: it has neither prompt nor messages"),
    ],
)
def test_rows_that_the_grader_cannot_read_are_the_jobs_error(
    store: Store, content: bytes, grader: dict[str, Any], code: str, words: str
) -> None:
    put_file(store, content)
    put_file(store, questions(4), "file-b")
    name = put_job(store, "file-a", **by(grader))
    working = dispatcher(store, FakeLauncher(), FakeModels())
    for _ in range(2):
        working.round()
    error = store.job(name)["error"]
    assert error["code"] == code
    assert words in error["message"]
    assert str(store.folder) not in error["message"]


OTHER_FIELD = b'{"messages": [{"role": "user", "content": "Is it?"}], "reply": "yes"}\n'


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (questions(1) + b"{oops\n", "Line 2: not JSON"),
        (questions(1) + b'{"messages": [{"role": "assistant", "content": "x"}]}\n', "Add the user's message."),
        (OTHER_FIELD, "Line 1: method.reinforcement.grader: reference: {{item.answer}}: item has no answer."),
        (OTHER_FIELD, "Give its rows the fields that the training file has."),
    ],
)
def test_rows_of_the_validation_file_are_named_as_training_rows_are(store: Store, content: bytes, words: str) -> None:
    """A field that only the training file had was the grader's fault."""
    put_file(store, questions(12))
    put_file(store, content, "file-b")
    name = put_job(store, "file-a", **by(EQUAL))
    working = dispatcher(store, FakeLauncher(), FakeModels())
    for _ in range(2):
        working.round()
    error = store.job(name)["error"]
    assert (error["code"], error["param"]) == ("invalid_validation_file", "validation_file")
    assert words in error["message"]
    assert str(store.folder) not in error["message"]


def test_prompts_are_no_chats_to_learn_by_heart(store: Store) -> None:
    name = put_job(store, put_file(store, questions(12)))
    dispatcher(store, FakeLauncher(), FakeModels()).round()
    assert store.job(name)["error"]["code"] == "invalid_training_file"


def test_graders_are_checked_and_tried_by_the_client(allowing: Served) -> None:
    graders = allowing.client.fine_tuning.alpha.graders
    assert graders.validate(grader=MULTI).grader.to_dict() == MULTI
    made = graders.run(grader=MULTI, model_sample="say 12", item={"answer": "12"})
    assert made.reward == pytest.approx(0.5 + 2 / 6)
    assert made.sub_rewards == {"equal": 1.0, "digits": pytest.approx(2 / 6)}
    assert (made.metadata.name, made.metadata.type, made.metadata.scores) == ("both", "multi", {})
    assert not any(value for value in made.metadata.errors.to_dict().values())


@pytest.mark.parametrize(
    ("grader", "error", "details"),
    [
        (
            {**CODE, "source": "def grade(sample, item):\n    return item['x']"},
            "python_grader_runtime_error",
            "KeyError",
        ),
        ({**CODE, "source": "import nothing\ndef grade(s, i): ..."}, "python_grader_runtime_error", "nothing"),
        ({**CODE, "source": "def grade(sample, item): return None"}, "unresponsive_reward_error", None),
        (EQUAL, "invalid_variable_error", None),
        ({**EQUAL, "input": "{{sample.output_json.a}}", "reference": "b"}, "sample_parse_error", None),
        (
            {**MULTI, "graders": [EQUAL | {"reference": "x"}], "calculate_output": "1 / equal"},
            "formula_parse_error",
            None,
        ),
        (JUDGE, "model_grader_server_error", "127.0.0.1:1"),
    ],
)
def test_a_grade_that_fails_says_why(
    allowing: Served, grader: dict[str, Any], error: str, details: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tunesmith.graders.remote.FIRST_WAIT_S", 0.01)
    made = allowing.client.fine_tuning.alpha.graders.run(grader=grader, model_sample="a")
    errors = made.metadata.errors.to_dict()
    assert [name for name, value in errors.items() if value is True] == [error]
    assert made.reward == 0
    assert details is None or details in errors[f"{error}_details"]


def test_what_is_not_allowed_is_not_tried(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    graders = served.client.fine_tuning.alpha.graders
    for verb in (lambda: graders.validate(grader=CODE), lambda: graders.run(grader=CODE, model_sample="a")):
        with pytest.raises(openai.BadRequestError, match="code of clients does not run here") as caught:
            verb()
        assert (caught.value.code, caught.value.param) == ("grader_not_allowed", "grader")
    with pytest.raises(openai.BadRequestError, match="code of clients") as caught:
        served.client.fine_tuning.jobs.create(model="tiny", training_file="x", **{**by(CODE), "validation_file": "y"})


def test_so_many_graders_are_tried_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grader_routes, "MOST_AT_ONCE", 0)
    with serving(tmp_path) as served:
        status, answer, _ = served.running.ask(
            "POST", "/v1/fine_tuning/alpha/graders/run", {"grader": EQUAL, "model_sample": "a"}
        )
    assert (status, answer["error"]["code"]) == (429, "rate_limit_exceeded")


def test_a_run_of_a_job_is_told_in_openais_words(store: Store, tmp_path: Path) -> None:
    """The recipe that a job leads to, run here."""
    model_folder(tmp_path / "tiny")
    tiny = BASES.bases["tiny"].model_copy(update={"model": str(tmp_path / "tiny"), "recipe": QUICK})
    bases = ALLOWING.model_copy(update={"bases": {"tiny": tiny}})
    put_file(store, questions(10))
    put_file(store, questions(3), "file-b")
    numbers = {"n_epochs": 1, "batch_size": 5, "compute_multiplier": 0.5, "eval_interval": 1, "eval_samples": 2}
    name = put_job(store, "file-a", bases=bases, **by(MULTI, **numbers))
    dispatcher(store, FakeLauncher(), FakeModels(), bases).round()
    recipe = json.loads((store.recipes_path / f"{name}.yaml").read_text())
    run_events = list(train(validate(recipe), root=tmp_path / "runs").events())

    told = EventTranslator(name)(run_events)
    step = next(row for row in told if row["message"].startswith("Step 1/2 , train mean reward="))
    data = step["data"]
    assert (data["step"], data["total_steps"], data["mean_unresponsive_rewards"]) == (1, 2, 0)
    assert data["train_mean_reward"] == data["scores"]["train_reward_mean"]
    assert [part["name"] for part in data["scores"]["graders"]] == ["digits", "equal"]
    assert set(data["timing"]["step"]) == {"sampling", "grading", "full_iteration"}
    measured = next(row for row in told if row["message"].startswith("Step 2/2 , train") and "full" in row["message"])
    assert measured["data"]["full_valid_mean_reward"] == metrics_by_step(run_events)[2]["full_valid_mean_reward"]

    lines = list(csv.DictReader(io.StringIO(results_file(run_events).decode())))
    assert [line["step"] for line in lines] == ["1", "2"]
    assert float(lines[0]["train_mean_reward"]) == data["train_mean_reward"]
    assert float(lines[1]["full_valid_mean_reward"]) == measured["data"]["full_valid_mean_reward"]
    assert float(lines[0]["scores/graders/digits/train_reward_mean"]) >= 0


QUICK = {
    "reinforce": {"max_new_tokens": 6}, "evaluation": {"general": False, "samples": 1}, "device": "cpu", "threads": 1,
    "method": {"name": "lora", "rank": 2}, "precision": "float32",
}  # fmt: skip


@pytest.mark.slow
def test_the_client_goes_from_prompts_to_a_model_that_was_rewarded(tmp_path: Path) -> None:
    """A server process, a tiny model, `multi` of string_check and python. Half a minute."""
    model_folder(tmp_path / "tiny")
    content = {"bases": {"tiny": {"model": "tiny", "recipe": {**QUICK, "optim": {"lr": 1e-2}}}}}
    (tmp_path / "bases.yaml").write_text(json.dumps(content))
    live = Live.start(tmp_path, "--bases", "bases.yaml", "--python-graders")
    try:
        client = live.client
        files = [
            client.files.create(file=(name, questions(num)), purpose="fine-tune").id
            for name, num in (("train.jsonl", 24), ("valid.jsonl", 6))
        ]
        assert client.fine_tuning.alpha.graders.run(grader=MULTI, model_sample="7", item={"answer": "7"}).reward == 1.5
        how = {"n_epochs": 4, "batch_size": 6, "eval_interval": 8, "learning_rate_multiplier": 1.0}
        made = client.fine_tuning.jobs.create(
            model="tiny", training_file=files[0], validation_file=files[1], suffix="digits", seed=3,
            method={"type": "reinforcement", "reinforcement": {"grader": MULTI, "hyperparameters": how}},
        )  # fmt: skip
        before = live.answer("tiny")
        job, tuned = live.finished(made)
        assert tuned != before
        assert job.method.reinforcement.grader.to_dict() == MULTI
        told = list(client.fine_tuning.jobs.list_events(job.id, limit=100))
        curve = {
            row.data["step"]: row.data["train_mean_reward"] for row in told if "train_mean_reward" in (row.data or {})
        }
        assert sorted(curve) == list(range(1, 17))
        text = client.files.content(job.result_files[0]).read()
        print(made.id, before, tuned, [round(curve[step], 3) for step in sorted(curve)])
        import base64

        assert base64.b64decode(text).startswith(b"step,train_mean_reward,full_valid_mean_reward,")
    finally:
        live.end()
