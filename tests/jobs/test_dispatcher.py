"""Jobs from the queue to a model, with every transaction of the store as a place where the server can be killed."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from jobs.places import BASES, SNAPSHOT, STEPS, FakeLauncher, FakeModels, FakeRun, dispatcher, put_file, put_job, rows
from tunesmith.errors import RunError
from tunesmith.jobs.bases import PublicBase
from tunesmith.jobs.names import snapshot_name
from tunesmith.jobs.run_events import missing_exports
from tunesmith.jobs.store import Store
from tunesmith.jobs.tables import events, jobs
from tunesmith.jobs.training_files import rounds
from tunesmith.runs.folder import Run
from tunesmith.runs.prune import removable
from tunesmith.serve.protocol import RequestError
from tunesmith.types import Event

TRANSACTIONS = 12
"""From the first round to the model."""


Opened = Callable[..., Store]


class Killed(BaseException):
    """The process is gone: nothing after this runs, and no handler of Exception sees it."""


def outcome(store: Store, name: str, models: FakeModels) -> tuple[object, ...]:
    job = store.job(name)
    said = [row["message"] for row in store.page(events, events.c.job == name, limit=100)[0]]
    results = base64.b64decode(store.content_path(job["result_file"]).read_bytes())
    values = (job["status"], job["tuned_name"] in models.served, job["trained_tokens"], job["numbers"])
    names = {
        name: "JOB",
        job["tuned_name"]: "MODEL",
        snapshot_name("tiny", "tunesmith", None, name, SNAPSHOT): "SNAPSHOT",
    }
    for old, new in names.items():
        said = [one.replace(old, new) for one in said]
    assert set(models.served) == {row["name"] for row in store.tuned()}
    return (*values, results, sorted(said))


def work(store: Store, launcher: FakeLauncher, models: FakeModels, *, num: int = 14) -> None:
    working = dispatcher(store, launcher, models)
    working.recover()
    for _ in range(num):
        working.round()


def test_a_job_becomes_a_model(store: Store) -> None:
    models = FakeModels()
    name = put_job(store, put_file(store, rows(12)), suffix="My Suffix!", seed=3)
    assert store.job(name)["status"] == "validating_files"
    work(store, FakeLauncher(), models)
    job = store.job(name)
    assert job["status"] == "succeeded"
    assert job["trained_tokens"] == 10 * STEPS
    assert job["numbers"] == {"n_epochs": 1, "batch_size": 2, "learning_rate_multiplier": 1.0}
    assert job["tuned_name"].startswith("ft:tiny:tunesmith:my-suffix-:")
    assert [row["name"] for row in store.tuned()] == list(models.served)
    results = base64.b64decode(store.content_path(job["result_file"]).read_bytes()).decode().splitlines()
    columns = "train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy"
    assert results[0] == f"step,{columns},full_valid_loss,full_valid_mean_token_accuracy"
    assert results[1] == "1,1.0,,,,,"
    said = [row["message"] for row in store.page(events, newest_first=False, limit=100)[0]]
    chosen = "Chosen: optim.lr = 0.1: usual\noptim.warmup = 0.03: short"
    assert said[said.index("Plan: 6 steps") + 1 :][:2] == [chosen, "Step 1/6: training loss=1.00"], "one event"
    assert len(results) == STEPS + 1


@pytest.fixture(scope="module")
def expected(opened: Opened, tmp_path_factory: pytest.TempPathFactory) -> tuple[object, ...]:
    """The outcome without a kill."""
    store, models = opened(tmp_path_factory.mktemp("whole")), FakeModels()
    name = put_job(store, put_file(store, rows(12)), seed=3)
    work(store, FakeLauncher(), models, num=12)
    found = outcome(store, name, models)
    store.close()
    return found


@pytest.mark.parametrize("is_committed", [False, True])
@pytest.mark.parametrize("at", range(1, TRANSACTIONS + 1))
def test_a_server_killed_at_any_transaction_goes_on(
    opened: Opened, tmp_path: Path, expected: tuple[object, ...], at: int, is_committed: bool
) -> None:
    store, models, launcher = opened(tmp_path / "killed"), FakeModels(), FakeLauncher()
    name = put_job(store, put_file(store, rows(12)), seed=3)
    writing, left = store.writing, [at]

    @contextmanager
    def killing(**how: bool):
        left[0] -= 1
        with writing(**how) as connection:
            yield connection
            if left[0] == 0 and not is_committed:
                raise Killed
        if left[0] == 0:
            raise Killed

    store.writing = killing
    with pytest.raises(Killed):
        work(store, launcher, models)
    store.close()
    store, models = opened(tmp_path / "killed"), FakeModels()
    for row in store.tuned():
        models.attach(row["base"], row["name"], store.runs_path / row["job"])
    work(store, launcher, models, num=14)
    assert outcome(store, name, models) == expected
    store.close()


@pytest.mark.parametrize("with_checkpoint", [False, True])
def test_a_run_that_is_killed_thrice_without_a_new_checkpoint_fails(store: Store, with_checkpoint: bool) -> None:
    launcher = FakeLauncher()
    name = put_job(store, put_file(store, rows(12)))
    working = dispatcher(store, launcher, FakeModels())
    for start in range(3):
        working.round()
        if with_checkpoint:
            working.round()
            if not start:  # every run has the one of step 0, which each start reads again
                Run(store.runs_path / name).append(Event("checkpoint", 0, 1.0, {"path": "checkpoints/step-0"}, {}))
                working.round()
        launcher.started[-1].is_dead = True
        working.round()
    job = store.job(name)
    assert (job["status"], job["error"]["code"], len(launcher.started)) == ("failed", "run_crashed", 3)


class RefusingModels(FakeModels):
    """Refuses the next calls with these status codes, the last first."""

    def __init__(self, refusals: list[int]) -> None:
        super().__init__()
        self.refusals = refusals

    def attach(self, base: str, name: str, run: Path) -> None:
        if self.refusals:
            raise RequestError("no engine", status=self.refusals.pop())
        super().attach(base, name, run)


@pytest.mark.parametrize("status", ["paused", "cancelled"])
def test_a_paused_job_gets_a_model_without_an_engine_a_cancelled_one_none(store: Store, status: str) -> None:
    models = RefusingModels([503, 503, 503])
    name = put_job(store, put_file(store, rows(12)))
    working = dispatcher(store, FakeLauncher(), models)
    for _ in range(3):
        working.round()
    store.change_job(name, if_status=["running"], status=status)
    for _ in range(8):
        working.round()
    assert len(store.tuned(job=name)) == len(models.served) == (status == "paused")


def test_a_result_waits_for_an_engine_that_is_started_again(store: Store) -> None:
    refusals = [503, 503]
    models = RefusingModels(refusals)
    name, states = put_job(store, put_file(store, rows(12))), list[str]()
    store.on_job = lambda job: states.append(job["status"])
    work(store, FakeLauncher(), models)
    assert (store.job(name)["status"], refusals) == ("succeeded", [])
    assert states == ["queued", "running", "succeeded"], "a line each, however long the engine takes"
    assert len(store.tuned(job=name)) == len(models.served) == 2

    refusals += [400, 400, 400]  # the end of an epoch, twice, then the result
    name = put_job(store, "file-a")
    work(store, FakeLauncher(), models)
    assert store.job(name)["error"]["code"] == "result_not_served"


class CrashingModels(FakeModels):
    """Crashes when a result is put on it, so often."""

    def __init__(self, num: int) -> None:
        super().__init__()
        self.num = num

    def attach(self, base: str, name: str, run: Path) -> None:
        if "ckpt" not in name and self.num:
            self.num -= 1
            raise RequestError("the engine ended", status=500, code="engine_crashed")
        super().attach(base, name, run)


@pytest.mark.parametrize(("crashes", "status"), [(2, "succeeded"), (3, "failed")])
def test_kills_of_a_run_do_not_count_when_its_result_is_put_on(store: Store, crashes: int, status: str) -> None:
    launcher, name = FakeLauncher(), put_job(store, put_file(store, rows(12)))
    working = dispatcher(store, launcher, CrashingModels(crashes))
    for _ in range(2):
        working.round()
        launcher.started[-1].is_dead = True
        working.round()
    assert store.job(name)["attempts"] == 2
    while store.job(name)["finished_at"] is None:
        working.round()
    assert (store.job(name)["status"], len(launcher.started)) == (status, 3)


def test_a_job_cancelled_while_its_result_waits_for_an_engine_is_tidied(store: Store) -> None:
    name = put_job(store, put_file(store, rows(12)))
    working = dispatcher(store, FakeLauncher(), RefusingModels([503] * 100))
    while name not in working.unfinished:
        working.round()
    store.act(name, "cancel", "Fine-tuning job cancelled")
    working.round()
    version = store.version
    for _ in range(20):
        working.round()
    assert (store.version, working.unfinished) == (version, {})
    assert store.content_path(store.job(name)["result_file"]).exists()


@pytest.mark.parametrize("refusals", [0, 9])
def test_what_cannot_be_removed_after_a_success_is_said_once(
    store: Store, monkeypatch: pytest.MonkeyPatch, refusals: int
) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tunesmith.jobs.dispatcher.remove", refuse)
    name, notes, models = put_job(store, put_file(store, rows(12))), list[str](), RefusingModels([503] * refusals)
    working = dispatcher(store, FakeLauncher(), models)
    working.on_note = notes.append
    for _ in range(20):
        working.round()
    assert (store.job(name)["status"], models.refusals) == ("succeeded", [])
    assert notes == [f"{name}: what it no longer needs cannot be removed: [Errno 13] Permission denied"]


@pytest.mark.parametrize(("num", "status"), [(2, "succeeded"), (3, "failed")])
def test_an_engine_killed_while_attaching_a_result_is_not_the_jobs_fault(store: Store, num: int, status: str) -> None:
    """The third time it is: then the result itself ends the engine."""
    models = FakeModels()
    name = put_job(store, put_file(store, rows(12)))
    attach, crashes = models.attach, [500] * num

    def crashing(base: str, tuned: str, run: Path) -> None:
        if crashes and tuned == store.job(name)["tuned_name"]:
            raise RequestError("the engine ended", status=crashes.pop(), code="engine_crashed")
        attach(base, tuned, run)

    models.attach = crashing
    work(store, FakeLauncher(), models, num=20)
    assert (store.job(name)["status"], crashes) == (status, [])


def test_what_a_run_says_while_the_store_fails_is_taken_over_later(store: Store) -> None:
    name = put_job(store, put_file(store, rows(12)))
    change, refusals = store.change_job, [503]

    def refusing(job: str, messages: object = (), **how: object) -> bool:
        if "numbers" in how and "is_checked" not in how and refusals:
            raise RequestError("the store is gone", status=refusals.pop())
        return change(job, messages, **how)

    store.change_job = refusing
    working = dispatcher(store, FakeLauncher(), FakeModels())
    for _ in range(16):
        with suppress(RequestError):
            working.round()
    assert refusals == []
    assert store.job(name)["numbers"] == {"n_epochs": 1, "batch_size": 2, "learning_rate_multiplier": 1.0}


def test_a_run_whose_start_clears_a_request_to_stop_is_asked_again(store: Store) -> None:
    launcher = FakeLauncher()
    name = put_job(store, put_file(store, rows(12)))
    working = dispatcher(store, launcher, FakeModels())
    for _ in range(2):
        working.round()
    store.act(name, "cancel", "cancelled")
    [run] = launcher.started
    stop, requests = run.stop, []
    run.stop = lambda: requests.append(1) or (len(requests) == 3 and stop())
    for _ in range(5):
        working.round()
    assert (run.is_dead, len(requests), working.active) == (True, 3, {})


def test_one_run_at_a_time_in_the_order_of_creation(store: Store) -> None:
    launcher, models = FakeLauncher(), FakeModels()
    file = put_file(store, rows(12))
    names = [put_job(store, file) for _ in range(3)]
    working = dispatcher(store, launcher, models)
    for _ in range(40):
        working.round()
        assert len(working.active) <= 1
    assert [one.path.name for one in launcher.started] == names
    assert {store.job(name)["status"] for name in names} == {"succeeded"}


def test_a_run_that_only_makes_steps_lets_the_store_read_nothing(store: Store) -> None:
    put_job(store, put_file(store, rows(12)))
    working = dispatcher(store, FakeLauncher(), FakeModels())
    for _ in range(3):
        working.round()  # started, planned, and seen so
    read, num_reads = store._read, []
    store._read = lambda *given: num_reads.append(1) or read(*given)
    working.round()
    assert store.page(events, limit=1)[0][0]["message"].startswith("Step 3/")
    assert num_reads == []


@pytest.mark.parametrize(
    ("content", "code", "words"),
    [
        (rows(9), "invalid_n_examples", "Training file has 9 example(s), but must have at least 10 examples"),
        (
            rows(11) + b'{"messages": [{"role": "user", "content": "q"}]}\nnope\n',
            "invalid_training_file",
            "The job failed due to an invalid training file. Invalid file format. Line 12: it has no message of the "
            "assistant: there is nothing to learn. Add one. Line 13: not JSON",
        ),
        (b'{"text": "a", "label": "b"}\n' * 12, "invalid_training_file", "expected either prompt/completion pairs"),
        (b'{"foo": 1}\n' * 12, "invalid_training_file", "The job failed due to an invalid training file."),
    ],
)  # fmt: skip
def test_faults_of_rows_are_the_jobs_error(store: Store, tmp_path: Path, content: bytes, code: str, words: str) -> None:
    launcher = FakeLauncher()
    name = put_job(store, put_file(store, content))
    work(store, launcher, FakeModels(), num=2)
    job = store.job(name)
    assert (job["status"], job["error"]["code"], job["error"]["param"]) == ("failed", code, "training_file")
    assert words in job["error"]["message"]
    [last] = [row["message"] for row in store.page(events, events.c.job == name, limit=1)[0]]
    assert last.count("The job failed") == 1
    assert last.removeprefix("The job failed: ") == job["error"]["message"]
    assert str(tmp_path) not in job["error"]["message"]
    assert job["finished_at"] is not None
    assert launcher.started == []


def test_a_file_of_an_open_job_is_kept_until_it_ends(store: Store) -> None:
    file = put_file(store, rows(12))
    put_job(store, file)
    assert store.delete_file(file)
    assert not store.delete_file(file)
    assert store.file(file) is None
    assert store.content_path(file).exists()
    work(store, FakeLauncher(), FakeModels())
    assert not store.content_path(file).exists()


@pytest.mark.parametrize(("num", "epochs"), [(10, 10), (3, 25), (33, 3), (34, 3), (8333, 3), (8334, 2), (30_000, 1)])
def test_epochs_follow_the_published_rule(num: int, epochs: int) -> None:
    assert rounds(num) == epochs


def test_a_recipe_that_does_not_fit_fails_its_job_and_holds_up_no_other(opened: Opened, tmp_path: Path) -> None:
    store, models = opened(tmp_path), FakeModels()
    file = put_file(store, rows(12))
    odd = put_job(store, file, hyperparameters={"learning_rate_multiplier": 2.0})
    usual = put_job(store, file)
    bases = BASES.model_copy(update={"bases": {"tiny": PublicBase(model="tiny", recipe={"optim": {"lr": 1e-4}})}})
    working = dispatcher(store, FakeLauncher(), models, bases)
    working.recover()
    for _ in range(14):
        working.round()
    assert [store.job(name)["status"] for name in (odd, usual)] == ["failed", "succeeded"]
    assert "optim.lr_times: is a factor of the usual rate" in store.job(odd)["error"]["message"]
    store.close()


def test_a_job_whose_base_is_gone_fails_and_holds_up_no_other(opened: Opened, tmp_path: Path) -> None:
    store, models = opened(tmp_path), FakeModels()
    file = put_file(store, rows(12))
    gone, usual = put_job(store, file), put_job(store, file)
    store.update(jobs, {"base": "removed"}, id=gone)
    work(store, FakeLauncher(), models)
    assert [store.job(name)["status"] for name in (gone, usual)] == ["failed", "succeeded"]
    assert store.job(gone)["error"]["code"] == "model_not_available"
    store.close()


@pytest.mark.parametrize(("made", "refusals"), [(["gguf-q8_0"], 0), ([], 0), ([], 9)])
def test_an_export_that_was_not_made_is_said_and_the_model_is_there(
    store: Store, monkeypatch: pytest.MonkeyPatch, made: list[str], refusals: int
) -> None:
    """`tunesmith train` makes the exports of `export.to` after the run, which is done then whatever comes of them."""

    def error(run: FakeRun) -> dict[str, object] | None:
        for folder in made:
            (run.path / "exports" / folder).mkdir(parents=True, exist_ok=True)
        return None if made else {"code": "StorageError", "message": f"{store.folder}/runs/x: the disk is full."}

    monkeypatch.setattr(FakeRun, "error", error)
    base = PublicBase(model="tiny-model", recipe={"export": {"to": ["gguf:q8_0", "merged:float32"][: 2 - len(made)]}})
    bases, models = BASES.model_copy(update={"bases": {"tiny": base}}), RefusingModels([503] * refusals)
    working = dispatcher(store, FakeLauncher(), models, bases)
    name = put_job(store, put_file(store, rows(12)))
    for _ in range(20):
        working.round()
    assert models.refusals == []
    said = [row["message"] for row in store.page(events, events.c.level == "warn", limit=100, newest_first=False)[0]]
    way = f"runs/x: the disk is full. Make it on the server: tunesmith export runs/{name} --to"
    expected = [
        f"Not made: the export gguf --quant q8_0. {way} gguf --quant q8_0",
        f"Not made: the export merged --dtype float32. {way} merged --dtype float32",
    ]
    assert said == ([] if made else expected)
    job = store.job(name)
    assert (job["status"], [row["name"] for row in store.tuned()][-1]) == ("succeeded", job["tuned_name"])


def test_an_export_is_made_where_its_own_folder_is(tmp_path: Path) -> None:
    """One of another quantisation, and what a user put next to it, is not it."""
    words = ["merged:float32", "adapter", "onnx", "gguf", "gguf:q4_k_m", "ollama", "ollama:q8_0"]
    recipe = {"model": "m", "data": {"train": ["a.jsonl"]}, "export": {"to": words}}
    run = Run.create(tmp_path, "x", json.dumps(recipe))
    folders = [run.export_path(word) for word in words]
    for folder in folders:
        folder.mkdir(parents=True)
        folder.with_name(f"{folder.name}-old").mkdir()
    for word, folder in zip(words, folders, strict=True):
        assert missing_exports("ftjob-x", run, "") == []
        folder.rmdir()
        [said] = missing_exports("ftjob-x", run, "")
        assert f"the export {word.partition(':')[0]}" in said["message"]
        folder.mkdir()


def test_the_run_of_a_job_is_neither_removed_nor_pruned(store: Store) -> None:
    name = put_job(store, put_file(store, rows(12)))
    work(store, FakeLauncher(), FakeModels())
    for whole in (True, False):
        with pytest.raises(RunError, match=r"ftjob-.*: belongs to a job of `tunesmith serve --jobs`.*keep_runs_days"):
            removable([Run(store.runs_path / name)], whole=whole)
