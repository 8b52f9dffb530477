"""A teacher at an address: asked for what one on this machine says, and refused where it says something else."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from scoring import Entries, ScoringServer, scoring
from tiny import tiny_tokenizer
from tiny_model import tiny_model
from tiny_run import copied, model_folder, same_run, stopped, tiny_recipe
from tunesmith.cli.check import _why_not
from tunesmith.data.teacher_rows import columns
from tunesmith.errors import InputError, RecipeError, TeacherError
from tunesmith.recipe.distillation import Distil
from tunesmith.recipe.origin import moved_to
from tunesmith.recipe.schema import Recipe
from tunesmith.runs.folder import Run
from tunesmith.runs.keyed_lines import KeyedLines
from tunesmith.tasks.policy_losses import VALUE_COLUMNS, token_losses
from tunesmith.training.resolve import resolve_run
from tunesmith.training.served_teacher import BY_TOKENS, PROBED, ServedTeacher, probe_ids
from tunesmith.training.trainer import resume, train
from tunesmith.types import Row, Source

TOP = 16


def taught(folder: Path, teacher: str, *, on_policy: bool = False, name: str | None = "large", **more: Any) -> Recipe:
    """6 steps of 3 rows; 2 are held out."""
    folder.mkdir(parents=True, exist_ok=True)
    distil = {"teacher": teacher, "top": TOP, "on_policy": on_policy, "model": name, **more.pop("distil", {})}
    distil |= {"max_new_tokens": 6} if on_policy else {}
    evaluation = {"samples": 1, "sample_tokens": 4, "general": False, "surprising": 0}
    settings = {"method": "full", "optim": {"lr": 3e-3}, "train": {"epochs": 2, "max_steps": 6}, **more}
    return tiny_recipe(folder, task="distil", distil=distil, evaluation=evaluation, **settings)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher that is sure of its tokens, so that a divergence from it is no matter of rounding."""

    def make() -> Any:
        tokenizer = tiny_tokenizer()
        return tiny_model("llama", vocab_size=len(tokenizer), initializer_range=0.3, seed=5), tokenizer

    return copied(tmp_path_factory.mktemp("teacher") / "large", "sure", make)


@pytest.fixture
def server(place: Path) -> Iterator[ScoringServer]:
    with scoring(place) as it:
        yield it


@pytest.fixture(scope="module")
def whole(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Run, ScoringServer]]:
    """A run, and its server, which lives on."""
    folder = tmp_path_factory.mktemp("whole")
    with scoring(place) as it:
        yield train(taught(folder, it.address), root=folder / "runs"), it


def teacher_at(server: ScoringServer, **options: Any) -> ServedTeacher:
    return ServedTeacher(Distil(teacher=server.address, model="large", top=TOP, **options), server.tokenizer)


def row_of(num: int = 12, line: int = 7) -> Row:
    ids_T = np.arange(30 + line, 30 + line + num, dtype=np.int32)
    return Row(ids_T, np.arange(num) >= 5, Source("chats.jsonl", line))


def steps_of(run: Run) -> list[dict[str, Any]]:
    return [event.values for event in run.events() if event.kind == "step"]


def lists_of(run: Run) -> np.ndarray:
    """[M, C] of all rows, which are in one file."""
    [path] = run.rows_path.glob("*/*.teacher")
    return np.fromfile(path, np.float32).reshape(-1, columns(TOP))


def test_it_teaches_what_it_would_teach_here(whole: tuple[Run, ScoringServer], place: Path, tmp_path: Path) -> None:
    run, server = whole
    here = train(taught(tmp_path, str(place), name=None), root=tmp_path / "runs")
    asked_MC, read_MC = lists_of(run), lists_of(here)
    assert (asked_MC[:, :TOP] == read_MC[:, :TOP]).all()
    # float32 of one row alone and of a padded batch; the rest is 1 − Σ of what is listed
    np.testing.assert_allclose(asked_MC[:, TOP:-1], read_MC[:, TOP:-1], atol=1e-4)
    np.testing.assert_allclose(asked_MC[:, -1], read_MC[:, -1], atol=1e-2)
    for at_address, local in zip(steps_of(run), steps_of(here), strict=True):
        assert at_address["rows"] == local["rows"]
        assert at_address["loss"] == pytest.approx(local["loss"], rel=1e-5)
    measures = [[e.values["measures"] for e in each.events() if e.kind == "evaluation"] for each in (run, here)]
    for at_address, local in zip(*measures, strict=True):
        assert at_address["loss"]["value"] == pytest.approx(local["loss"]["value"], rel=1e-5)
        assert at_address["agreement"]["value"] == local["agreement"]["value"]
    assert 1 <= server.most_open <= 8
    assert server.prompts[0] == probe_ids(server.tokenizer), "the probe comes first"
    assert len(server.asked) == 1 + 18


def test_a_list_is_of_the_token_at_its_place(server: ScoringServer) -> None:  # trap: G35
    row = row_of()
    ((_, values_NC),) = teacher_at(server).lists([row])
    with torch.no_grad():
        logp_NV = server.model(torch.tensor(row.ids[None].astype(np.int64))).logits[0, 4:-1].log_softmax(-1)
    best = logp_NV.topk(TOP)
    rest_N = logp_NV.scatter(1, best.indices, -math.inf).logsumexp(-1)
    assert (values_NC[:, :TOP] == best.indices.numpy()).all()
    # 1 − Σ has the rounding of the sum, a logarithm over the others has not
    np.testing.assert_allclose(values_NC[:, TOP:-1], best.values.numpy(), atol=1e-5)
    np.testing.assert_allclose(np.exp(values_NC[:, -1]), rest_N.exp().numpy(), atol=1e-6)


def test_a_server_that_is_believed_teaches_wrongly(server: ScoringServer, monkeypatch: Any) -> None:  # trap: G35
    """Planted: its entries are one place off."""
    server.spoiled = shifted

    def believed(self: ServedTeacher, ids: list[int], top: int) -> Entries:
        return server.spoiled(ids, server.scored(ids, top))

    monkeypatch.setattr(ServedTeacher, "_entries", believed)
    monkeypatch.setattr(ServedTeacher, "prove", lambda self: None)
    with pytest.raises(AssertionError):
        test_a_list_is_of_the_token_at_its_place(server)


def test_what_is_sent_is_what_vllm_takes(server: ScoringServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEACHER_KEY", "sk-1")
    list(teacher_at(server, key_env="TEACHER_KEY").lists([row_of()]))
    assert server.asked[1] == {
        "model": "large", "prompt": row_of().ids.tolist(), "prompt_logprobs": TOP, "max_tokens": 1, "temperature": 0,
    }  # fmt: skip
    assert server.headers[1]["Authorization"] == "Bearer sk-1"


def shifted(ids: list[int], entries: Entries) -> Entries:
    return [None, *entries[2:], entries[1]]


def swapped(ids: list[int], entries: Entries) -> Entries:
    """The vocabulary of another model: two of its tokens have each other's text."""
    one, other = ids[3], ids[4]
    texts = {str(one): entries[4][str(other)]["decoded_token"], str(other): entries[3][str(one)]["decoded_token"]}
    for entry in entries[1:]:
        for token, value in (entry or {}).items():
            value["decoded_token"] = texts.get(token, value["decoded_token"])
    return entries


def cut_to_one(ids: list[int], entries: Entries) -> Entries:
    best = [entry and max(entry, key=lambda token: entry[token]["logprob"]) for entry in entries]
    kept = zip(entries, best, ids, strict=True)
    return [entry and {t: entry[t] for t in {best_one, str(own)}} for entry, best_one, own in kept]


def truncated(ids: list[int], entries: Entries) -> Entries:
    return entries[:-1]


def changed(**values: Any) -> Callable[[list[int], Entries], Entries]:
    def change(ids: list[int], entries: Entries) -> Entries:
        for value in entries[5].values():
            value.update(values)
        return entries

    return change


SPOILED = {
    "off by one": (shifted, "does not score token"),
    "another vocabulary": (swapped, "has another vocabulary: token"),
    "cut to the likeliest": (cut_to_one, "of the 16 tokens that were asked for"),
    "a shorter prompt": (truncated, r"read \d+ tokens and scored \d+, of"),
    "no number": (changed(logprob=math.nan), "gives nan as the log-probability"),
    "probabilities": (changed(logprob=0.3), "gives 0.3 as the log-probability"),
    "too many": (changed(logprob=-0.5), "probabilities that sum to"),
    "no texts": (changed(decoded_token=None), "gives no text"),
}


@pytest.mark.parametrize("name", SPOILED)
def test_a_server_that_scores_wrongly_is_refused(server: ScoringServer, name: str) -> None:  # trap: G35
    server.spoiled, words = SPOILED[name]
    with pytest.raises(RecipeError, match=rf"(?s)http.*{words}.*train on these by task chat"):
        teacher_at(server).prove()


@pytest.mark.parametrize("name", [name for name in SPOILED if name not in ("another vocabulary", "no texts")])
def test_a_wrong_answer_names_its_row(server: ScoringServer, name: str) -> None:
    teacher = teacher_at(server)
    teacher.prove()
    server.spoiled, words = SPOILED[name]
    with pytest.raises(TeacherError, match=rf"chats.jsonl:7: .*{words}"):
        list(teacher.lists([row_of()]))


def test_a_text_that_the_probe_lacks_is_compared_in_its_row(server: ScoringServer) -> None:
    """Two vocabularies can spell a sample alike."""
    teacher, row = teacher_at(server), row_of()
    teacher.prove()
    token = next(int(t) for t in row.ids[5:] if int(t) not in teacher._same_text)
    teacher.tokenizer = AutoTokenizer.from_pretrained(server.tokenizer.name_or_path)
    decode = teacher.tokenizer.decode
    teacher.tokenizer.decode = lambda ids, **how: "else" if ids == [token] else decode(ids, **how)
    with pytest.raises(TeacherError, match=f"chats.jsonl:7: .*token {token} is .* there and 'else' here"):
        list(teacher.lists([row]))


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        ((200, {"choices": [{"message": {"content": "Hello"}}], "usage": {"prompt_tokens": 64}}), "no prompt_logprobs"),
        ((200, {"choices": []}), "a reply that is no completion"),
        ((404, {"detail": "Not Found"}), "status 404: .*Not Found"),
        (
            (404, {"error": {"message": "Ask elsewhere."}}),
            r"elsewhere\. http.*/completions was asked .*ends in /v1",
        ),
    ],
)
def test_a_server_that_only_writes_is_told_what_to_do(server: ScoringServer, reply: Any, words: str) -> None:
    server.replies = [reply]
    with pytest.raises(RecipeError, match=rf"{words}.*have the server write answers and train on these by task chat"):
        teacher_at(server).prove()


def test_a_server_that_wants_a_key_is_told_one(server: ScoringServer) -> None:
    server.replies = [(401, {"error": {"message": "no key"}})]
    with pytest.raises(RecipeError, match=r"status 401: no key\. .*name the variable by distil\.key_env\.$"):
        teacher_at(server).prove()


def test_a_server_that_lists_fewer_says_so_in_its_words(server: ScoringServer) -> None:
    teacher = teacher_at(server)
    teacher.options = teacher.options.model_copy(update={"top": 21})
    with pytest.raises(RecipeError, match=r"prompt logprobs of 21, .*max allowed: 20\. .*lower distil\.top"):
        teacher.prove()


def test_nothing_is_asked_offline_nor_without_its_key(server: ScoringServer) -> None:
    teacher = teacher_at(server)
    teacher.offline = True
    with pytest.raises(RecipeError, match="--offline forbids asking it"):
        list(teacher.lists([row_of()]))
    with pytest.raises(InputError, match=r"distil\.key_env: NO_SUCH_KEY"):
        teacher_at(server, key_env="NO_SUCH_KEY").prove()
    assert server.asked == []


def test_what_was_answered_is_not_asked_again(server: ScoringServer, tmp_path: Path) -> None:
    file, rows = tmp_path / "asked.jsonl", [row_of(line=line) for line in range(1, 7)]
    before = dict(teacher_at(server).lists(rows))
    teacher = teacher_at(server)
    teacher.prove()
    server.asked.clear()
    server.spoiled = lambda ids, entries: entries if len(server.asked) < 4 else truncated(ids, entries)
    teacher.replies = KeyedLines(file)
    with pytest.raises(TeacherError):
        list(teacher.lists(rows))
    lines = file.read_bytes().splitlines(keepends=True)
    assert 1 < len(lines) < 6
    damaged, torn = b"\0" * 20 + b"\n", lines[0][:40]
    file.write_bytes(b"".join([damaged, *lines[1:], torn]))
    server.spoiled = lambda ids, entries: entries
    server.asked.clear()
    teacher.replies = KeyedLines(file)
    after = dict(teacher.lists(rows))
    assert len(server.asked) == 6 - len(lines) + 1, "a damaged line does not count"
    assert all((before[i] == after[i]).all() for i in range(6))


def test_a_reply_counts_once_it_is_in_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of the same tokens are asked at the same time, and each looks for the reply to the other."""
    replies = KeyedLines(tmp_path / "asked.jsonl")
    seen: list[Any] = []

    def opened(path: Path, mode: str) -> Any:
        file: Any = open(path, mode)  # noqa: SIM115 (who asked for it closes it)
        if mode == "ab":
            write = file.write

            def noted(line: bytes) -> int:
                seen.append(replies.get("a"))
                return int(write(line))

            file.write = noted
        return file

    monkeypatch.setattr("tunesmith.runs.keyed_lines.open", opened, raising=False)
    replies.add({"a": {"values": 1}})
    assert seen == [None]
    assert replies.get("a") == {"key": "a", "values": 1}


@pytest.mark.slow
def test_a_run_that_was_left_by_its_teacher_goes_on(place: Path, tmp_path: Path, whole: tuple[Run, Any]) -> None:
    recipe, root = taught(tmp_path, whole[1].address), tmp_path / "runs"
    server = whole[1]
    server.asked.clear()
    server.spoiled = lambda ids, entries: entries if len(server.asked) < 9 else truncated(ids, entries)
    with pytest.raises(TeacherError, match=r"tokens and scored .*What it has said is kept\. .*tunesmith resume"):
        train(recipe, root=root, out=tmp_path / "run")
    server.spoiled = lambda ids, entries: entries
    run = Run.open(str(tmp_path / "run"), root)
    kept = len((run.rows_path / "asked.jsonl").read_bytes().splitlines())
    server.asked.clear()
    run = resume(run)
    assert len(server.asked) == 1 + 18 - kept, "the probe, and the rows that had no answer"
    assert steps_of(run) == steps_of(whole[0])
    assert not (run.rows_path / "asked.jsonl").exists()


def test_a_run_that_has_its_lists_needs_no_server(whole: tuple[Run, ScoringServer], tmp_path: Path) -> None:
    run, server = whole
    half = stopped(run.recipe(), tmp_path / "stopped", 4)
    server.asked.clear()
    same_run(resume(half, offline=True), run)
    assert server.asked == []


def test_lists_of_another_run_are_compared_once(
    whole: tuple[Run, ScoringServer], place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, server = whole
    recipe, root = moved_to(run.recipe()).model_copy(update={"name": "again"}), run.path.parent
    server.asked.clear()
    again = train(recipe, root=root)
    assert len(server.asked) == 2, "the probe, and a row"
    assert [values["loss"] for values in steps_of(again)] == [values["loss"] for values in steps_of(run)]
    with scoring(model_folder(tmp_path / "other", seed=9)) as other:
        monkeypatch.setattr(server, "model", other.model)
        with pytest.raises(RecipeError, match="another model has its name now"):
            train(recipe.model_copy(update={"name": "other"}), root=root)


def test_on_policy_it_is_asked_of_drawn_tokens_alone(server: ScoringServer, tmp_path: Path) -> None:
    run = train(taught(tmp_path, server.address, on_policy=True), root=tmp_path / "runs")
    assert len(server.asked) == 1 + 2 + sum(len(values["rows"]) for values in steps_of(run))
    assert {body["prompt_logprobs"] for body in server.asked[3:]} == {1}
    first = steps_of(run)[0]
    teacher_says = []
    for body in server.asked[3:6]:
        entries = server.scored(body["prompt"], 1)
        answer = range(len(body["prompt"]) - 6, len(body["prompt"]))
        teacher_says += [entries[t][str(body["prompt"][t])]["logprob"] for t in answer]
    assert first["answer_tokens"] == 6, "none has ended, so the last six tokens of each are the drawn ones"
    # the mean of log μ − log π_T is an estimate of the reverse divergence
    assert first["loss"] == pytest.approx(-first["surprise"] - np.mean(teacher_says), abs=1e-4)


@pytest.mark.slow
def test_on_policy_a_run_that_goes_on_is_one_that_never_stopped(server: ScoringServer, tmp_path: Path) -> None:
    run = train(taught(tmp_path, server.address, on_policy=True), root=tmp_path / "runs")
    half = stopped(run.recipe(), tmp_path / "stopped", 4)
    same_run(resume(half), run)


def test_advantages_of_tokens_have_the_gradient_of_the_divergence() -> None:
    """Every token of a vocabulary of five, each by how likely it is drawn."""
    logits_V = torch.tensor([0.3, -1.0, 0.8, 0.0, 2.0], dtype=torch.float64, requires_grad=True)
    teacher_V = torch.tensor([1.0, 0.2, -0.5, 0.1, 0.4], dtype=torch.float64).log_softmax(-1)
    logq_V = logits_V.log_softmax(-1)
    drawn_V = logq_V.detach()
    values_VC = torch.full((5, len(VALUE_COLUMNS)), math.nan, dtype=torch.float64)
    values_VC[:, 0], values_VC[:, 1], values_VC[:, 2] = teacher_V - drawn_V, 1.0, drawn_V
    losses_V, _ = token_losses(logq_V, values_VC, torch.arange(5), BY_TOKENS)
    (found_V,) = torch.autograd.grad((drawn_V.exp() * losses_V).sum(), logits_V, retain_graph=True)
    divergence = (logq_V.exp() * (logq_V - teacher_V)).sum()
    (expected_V,) = torch.autograd.grad(divergence, logits_V)
    torch.testing.assert_close(found_V, expected_V, rtol=0, atol=1e-12)


def test_a_plan_says_how_often_it_is_asked_and_asks_nothing(server: ScoringServer, tmp_path: Path) -> None:
    for on_policy, words in ((False, "asked 19 times before the first step:"), (True, "3 times in each step")):
        plan = resolve_run(taught(tmp_path, server.address, on_policy=on_policy), root=tmp_path / "runs")
        assert plan.forecast is not None
        assert plan.forecast.memory.other_models == 0
        assert any(words in note and "is not foreseen" in note for note in plan.notes)
        assert any(f"is of its {TOP} likeliest tokens" in note for note in plan.notes)
        assert "which a plan does not ask" in _why_not(plan, fits=True)
    assert server.asked == []


@pytest.mark.parametrize(
    ("teacher", "distil", "words"),
    [
        ("http://localhost:8000/v1", {"model": None}, r"distil\.model: is missing"),
        ("ftp://localhost/model", {}, "is no address such as"),
        ("http://me:secret@localhost/v1", {}, "distil.teacher: http://…@localhost/v1: is no address such as"),
        ("http://localhost:8000/v1", {"temperature": 2.0}, "scores prompts at temperature 1"),
        ("some/model", {}, r"distil\.model: large: is of a teacher at an address"),
        ("10.0.0.7:8000/v1", {}, r"distil\.model: large: .* begins with http:// or https://"),
        ("some/model", {"model": None, "key_env": "KEY"}, r"distil\.key_env: KEY: is of a teacher at an address"),
    ],
)
def test_options_that_its_place_does_not_take_are_refused(
    tmp_path: Path, teacher: str, distil: Any, words: str
) -> None:
    with pytest.raises(RecipeError, match=words):
        resolve_run(taught(tmp_path, teacher, distil=distil), root=tmp_path / "runs")


def test_its_lists_are_as_long_as_servers_give_them(server: ScoringServer, place: Path, tmp_path: Path) -> None:
    for teacher, name, top in ((server.address, "large", 20), (str(place), None, 64)):
        recipe = taught(tmp_path, teacher, name=name, distil={"top": "auto"})
        assert resolve_run(recipe, root=tmp_path / "runs").recipe.distil.top == top
    assert len(probe_ids(server.tokenizer)) == PROBED
