"""Encoded rows on disk: what goes in comes out, once, complete or not at all."""

import gc
import itertools
import json
import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tiny import CHATML, template, tiny_tokenizer
from tunesmith.data import dataset as dataset_module
from tunesmith.data import encode as encoding_module
from tunesmith.data import tokenizer as tokenizer_module
from tunesmith.data.dataset import RowStore, build, open_kept
from tunesmith.data.examples import examples
from tunesmith.data.renderer import Renderer
from tunesmith.errors import DataError
from tunesmith.recipe.schema import Data, DataFile, Limits
from tunesmith.summaries.rows import rows_as_read
from tunesmith.tasks import TASKS
from tunesmith.types import Pooling, Problem, Row


def line(user: str, answer: str) -> str:
    return json.dumps({"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]})


def write(path: Path, *lines: str) -> DataFile:
    path.write_text("".join(f"{text}\n" for text in lines), "utf-8")
    return DataFile(path=str(path))


def make_renderer(**options: Any) -> Renderer:
    text = options.pop("template", CHATML)
    return Renderer(
        tiny_tokenizer(text),
        TASKS["chat"],
        **{"max_tokens": 200, "too_long": "error", "control_tokens": "error", **options},
    )


def make(
    folder: Path, *files: DataFile, renderer: Renderer | None = None, data: Data | None = None
) -> tuple[RowStore, list[Problem]]:
    heard: list[Problem] = []
    store = build(
        folder, data=data or Data(), files=files, renderer=renderer or make_renderer(), on_problem=heard.append
    )
    return store, heard


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


@pytest.fixture
def files(tmp_path: Path) -> list[DataFile]:
    first = write(tmp_path / "a.jsonl", *(line(f"question {i} 山", f"answer {i} " * (i + 1)) for i in range(7)))
    second = write(tmp_path / "b.jsonl", *(line(f"other {i}", "😀" * i + "!") for i in range(5)))
    return [first, second]


def test_rows_are_those_of_the_renderer(tmp_path: Path, files: list[DataFile], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding_module, "CHUNK_EXAMPLES", 2)
    monkeypatch.setattr(encoding_module, "BATCH_ROWS", 4)
    store, heard = make(tmp_path / "rows", *files)
    expected = make_renderer().encode([example for _, example in examples(files, Data(), heard.append)])
    assert len(store) == len(expected) == 12
    for i, (row,) in enumerate(expected):
        assert isinstance(row, Row)
        found = store.row(i)
        assert (found.ids.tolist(), found.trained.tolist(), found.source) == (
            row.ids.tolist(), row.trained.tolist(), row.source)  # fmt: skip
        assert (found.ids.dtype, found.trained.dtype) == (np.int32, np.bool_)
        assert (store.lengths[i], store.targets[i]) == (len(row.ids), row.trained.sum())
    assert store.file_index.tolist() == [0] * 7 + [1] * 5
    assert store.lines.tolist() == [*range(1, 8), *range(1, 6)]
    assert str(store.source(8)) == f"{files[1].path}:2"
    assert (store.skipped, heard) == (0, [])
    assert len(set(store.hashes.tolist())) == 12


@pytest.mark.parametrize("family", ["chatml", "llama3", "gemma", "mistral", "qwen3"])
def test_marks_of_rows_that_are_shown_are_what_is_trained(tmp_path: Path, family: str) -> None:
    lines = (line(f"question {i} 山", f"answer {i} é 😀 " * (1 + i % 3)) for i in range(40))
    file, renderer = write(tmp_path / "a.jsonl", *lines), make_renderer(template=template(family))
    store, _ = make(tmp_path / "rows", file, renderer=renderer)
    shown = rows_as_read(Data(train=(file,)), "chat", renderer, 1, 40)
    assert len(store) == len(shown) == 40
    for index, row in enumerate(shown):
        trained = store.row(index).trained
        runs = [learnt for learnt, _ in itertools.groupby(trained.tolist())]
        assert ([learnt for _, learnt in row["spans"]], row["trained"]) == (runs, int(trained.sum()))
        assert (row["line"], row["tokens"]) == (store.lines[index], store.lengths[index])
        assert "".join(text for text, _ in row["spans"]) == renderer.tokenizer.decode(store.row(index).ids.tolist())


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
@pytest.mark.parametrize("name", ["stem", "prompt"])  # of no shape; a prompt whose completion is missing
def test_rows_that_cannot_be_used_are_shown_as_they_are(tmp_path: Path, name: str, suffix: str) -> None:
    """A person who has to name the columns has to see them."""
    rows = [{name: f"Stem {i}?", "key": "yes"} for i in range(4)]
    table = [f"{name},key", *(f"{row[name]},{row['key']}" for row in rows)]
    lines = table if suffix == "csv" else [json.dumps(row) for row in rows]
    first = 2 if suffix == "csv" else 1
    shown = rows_as_read(Data(train=(write(tmp_path / f"a.{suffix}", *lines),)), None, None, first + 1, first + 2)
    assert [row["line"] for row in shown] == [first + 1, first + 2]
    assert shown[0]["spans"] == [(f"{name}: Stem 1?\n", False), ("key: yes\n", False)]


def test_rows_are_encoded_once(tmp_path: Path, files: list[DataFile], monkeypatch: pytest.MonkeyPatch) -> None:
    first, _ = make(tmp_path / "rows", *files)
    renderer = make_renderer()
    monkeypatch.setattr(renderer, "encode", lambda *_, **__: pytest.fail("encoded again"))
    again, _ = make(tmp_path / "rows", *files, renderer=renderer)
    assert (first.reused, again.reused) == (False, True)
    assert again.key == first.key
    assert all((again.row(i).ids == first.row(i).ids).all() for i in range(12))


def test_problems_of_rows_that_are_found_name_the_file_of_now(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl"):
        file = write(tmp_path / name, line("one", "two"), "{broken")
        store, heard = make(tmp_path / "rows", file)
        assert [(problem.source.path, problem.source.line) for problem in heard] == [(file.path, 2)]
    assert store.reused


def test_problems_of_rows_that_are_found_have_their_ways_out(tmp_path: Path) -> None:
    file = write(tmp_path / "rows.jsonl", json.dumps({"Frage": "Wann?", "Antwort": "Am Montag."}), line("one", "two"))
    heard = [make(tmp_path / "rows", file)[1] for _ in range(2)]
    assert heard[0] == heard[1]
    assert [way.settings for way in heard[1][0].ways] == [{"data.columns": "{prompt: Frage, completion: Antwort}"}]


def test_a_program_that_froze_its_objects_keeps_them_so(tmp_path: Path, files: list[DataFile]) -> None:
    """As these tests do, for which every run would look through all libraries otherwise: half of their time."""
    gc.freeze()
    make(tmp_path / "rows", *files)
    assert gc.get_freeze_count() > 0


def with_words(*pairs: tuple[str, str], **options: Any) -> Renderer:
    """A tokenizer whose vocabulary has other words in place of some: the file edited, the same ids."""
    made = tiny_tokenizer()
    state = json.loads(made.backend_tokenizer.to_str())
    swapped = dict(pairs)
    state["model"]["vocab"] = {swapped.get(word, word): i for word, i in state["model"]["vocab"].items()}
    if not options.pop("merges", True):
        state["model"]["merges"] = state["model"]["merges"][:-1]
    made._tokenizer = Tokenizer.from_str(json.dumps(state))
    return Renderer(
        made, TASKS["chat"], **{"max_tokens": 200, "too_long": "error", "control_tokens": "error", **options}
    )


def make_renderer_of(task: str) -> Renderer:
    how: dict[str, Any] = {"max_tokens": 200, "too_long": "error", "control_tokens": "error"}
    return Renderer(tiny_tokenizer(CHATML), TASKS[task], **how)


def with_special(**names: str) -> Renderer:
    how: dict[str, Any] = {"max_tokens": 200, "too_long": "error", "control_tokens": "error"}
    return Renderer(tiny_tokenizer(CHATML, **names), TASKS["chat"], **how)


DATED = CHATML + "{# {{ strftime_now('%d %b') }} #}"
CHANGES: dict[str, Callable[[], tuple[Renderer, Data]]] = {
    "two words of the vocabulary": lambda: (with_words(("Ġa", "Ġb"), ("Ġb", "Ġa")), Data()),
    "merges": lambda: (with_words(merges=False), Data()),
    "special token": lambda: (with_special(bos="<bos>"), Data()),
    "end token": lambda: (with_special(eos="</s>"), Data()),
    "padding token": lambda: (with_special(pad="<unk>"), Data()),
    "task": lambda: (make_renderer_of("generate"), Data()),
    "stride": lambda: (make_renderer(stride=20), Data()),
    "prompt": lambda: (make_renderer(prompt="x"), Data()),
    "kind": lambda: (make_renderer(kind="encoder_decoder"), Data()),
    "pooling": lambda: (make_renderer(pooling=Pooling("cls")), Data()),
    "prompt of a query": lambda: (make_renderer(pooling=Pooling(query_prompt="q: ")), Data()),
    "prompt of a document": lambda: (make_renderer(pooling=Pooling(document_prompt="d: ")), Data()),
    "date": lambda: (make_renderer(template=DATED, date="2026-01-02"), Data()),
    "encoding": lambda: (make_renderer(), Data(encoding="latin-1")),
    "suffixes": lambda: (make_renderer(), Data(suffixes=(".log",))),
    "template": lambda: (make_renderer(template=template("trim")), Data()),
    "max_tokens": lambda: (make_renderer(max_tokens=150), Data()),
    "too_long": lambda: (make_renderer(too_long="cut"), Data()),
    "control_tokens": lambda: (make_renderer(control_tokens="allow"), Data()),
    "columns": lambda: (make_renderer(), Data(columns={"tools": "functions"})),
    "limits": lambda: (make_renderer(), Data(limits=Limits(messages=10))),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_setting_that_matters_changes_the_key(tmp_path: Path, files: list[DataFile], change: str) -> None:
    usual = make_renderer(template=DATED, date="2026-01-01") if change == "date" else None
    first, _ = make(tmp_path / "rows", *files, renderer=usual)
    renderer, data = CHANGES[change]()
    other, _ = make(tmp_path / "rows", *files, renderer=renderer, data=data)
    assert not other.reused
    assert other.key != first.key


def parts_of_key(renderer: Renderer, data: Data, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What goes into the key of rows, by name."""
    parts: list[dict[str, Any]] = []
    with patch.context() as seen:
        dumps = dataset_module.orjson.dumps
        seen.setattr(dataset_module.orjson, "dumps", lambda given, **how: parts.append(given) or dumps(given, **how))
        dataset_module._key(["hash"], [".jsonl"], data, renderer)
    return parts[0]


def test_each_part_of_the_key_is_changed_by_one_of_these_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    usual = parts_of_key(make_renderer(), Data(), monkeypatch)
    seen = {"version", "data", "formats"}  # the tests below
    for change in CHANGES.values():
        parts = parts_of_key(*change(), monkeypatch)
        seen |= {name for name in {*parts, *usual} if parts.get(name) != usual.get(name)}
        usual_names = {*usual, "reading", "pooling", "date"}
        assert set(parts) <= usual_names
    assert seen == usual_names


def test_rows_of_a_file_whose_encoding_was_named_are_read_in_it(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", json.dumps(json.loads(line("naïve", "café")), ensure_ascii=False))
    known, _ = make(tmp_path / "rows", file, data=Data())
    Path(file.path).write_bytes(Path(file.path).read_text("utf-8").encode("cp1252"))
    store, heard = make(tmp_path / "rows", file, data=Data(encoding="cp1252"))
    assert heard == []
    assert store.row(0).ids.tolist() == known.row(0).ids.tolist()
    assert make(tmp_path / "rows", file, data=Data(encoding="cp1252"))[0].reused


def word_level(*words: str) -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(["[UNK]", "[CLS]", "[SEP]", *words])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")


def assert_rows_are_those_of_their_own_tokenizer(folder: Path) -> None:  # trap: T21
    """Three-letter words of a trade, of which the probe spells none: it is the same for every such vocabulary."""
    file = write(
        folder / "rows.jsonl", *(json.dumps({"text": f"{a} {b}", "label": a}) for a, b in (CODES, CODES[::-1]))
    )
    for words in (CODES, CODES[::-1], (CODES[0], "CGT")):
        tokenizer = word_level(*words)
        how: dict[str, Any] = {"max_tokens": 20, "too_long": "error", "control_tokens": "error", "kind": "encoder"}
        store, _ = make(folder / "rows", file, renderer=Renderer(tokenizer, TASKS["classify"], **how), data=Data())
        expected = [tokenizer(f"{a} {b}", add_special_tokens=False).input_ids for a, b in (CODES, CODES[::-1])]
        assert [store.row(i).ids.tolist() for i in range(2)] == expected


CODES = ("ACG", "TTA")


def test_rows_are_those_of_their_own_tokenizer(tmp_path: Path) -> None:
    assert_rows_are_those_of_their_own_tokenizer(tmp_path)


def test_knowing_a_tokenizer_by_a_probe_would_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    by_probe = partial(tokenizer_module.fingerprint, vocabulary=False)
    monkeypatch.setattr("tunesmith.data.renderer.fingerprint", by_probe)
    monkeypatch.setattr(dataset_module, "serialized", lambda tokenizer: "")
    with pytest.raises(AssertionError):
        assert_rows_are_those_of_their_own_tokenizer(tmp_path)


def test_padding_and_truncation_that_a_call_left_behind_are_not_in_the_key(
    tmp_path: Path, files: list[DataFile]
) -> None:
    first, _ = make(tmp_path / "rows", *files)
    renderer = make_renderer()
    renderer.tokenizer("one two three", padding="max_length", max_length=2, truncation=True)
    assert make(tmp_path / "rows", *files, renderer=renderer)[0].key == first.key


def test_rows_that_an_earlier_version_kept_are_read_but_not_trained(tmp_path: Path, files: list[DataFile]) -> None:
    store, _ = make(tmp_path / "rows", *files)
    (summary,) = (tmp_path / "rows").glob("*.json")
    summary.write_text(json.dumps({**json.loads(summary.read_text()), "version": 4}))
    kept = open_kept(tmp_path / "rows", store.key)
    assert kept is not None
    assert len(kept) == 12
    assert not make(tmp_path / "rows", *files)[0].reused


def test_the_same_bytes_under_a_name_of_another_format_are_other_rows(tmp_path: Path) -> None:
    """A table of one column that is known is a document where its name says so."""
    renderer, found = make_renderer_of("text"), []
    for name in ("a.csv", "a.txt"):
        store, _ = make(tmp_path / "rows", write(tmp_path / name, "text,note", "one two,x"), renderer=renderer)
        found.append((store.row(0).ids.tolist(), store.reused))
    assert found[0][0] != found[1][0]
    assert not found[1][1]


def test_one_changed_byte_changes_the_key_although_size_and_time_stay(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", line("one", "two"))
    stat = os.stat(file.path)
    first, _ = make(tmp_path / "rows", file)
    write(tmp_path / "a.jsonl", line("one", "tw0"))
    os.utime(file.path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    again, _ = make(tmp_path / "rows", file)
    assert not again.reused
    assert first.data_hashes.keys() == again.data_hashes.keys()
    assert first.data_hashes != again.data_hashes


def bad_files(folder: Path) -> DataFile:
    return write(
        folder / "bad.jsonl",
        line("fine", "yes"),
        line("Hi <|im_end|>", "and <|im_start|>"),
        line("long", "word " * 300),
        line("also fine", "yes"),
    )


@pytest.mark.parametrize("reused", [False, True])
def test_rows_left_out_are_counted_and_told_also_when_found_again(tmp_path: Path, reused: bool) -> None:
    file = bad_files(tmp_path)
    if reused:
        make(tmp_path / "rows", file)
    store, heard = make(tmp_path / "rows", file)
    assert store.reused == reused
    assert (len(store), store.skipped) == (2, 2)
    assert store.lines.tolist() == [1, 4]
    assert store.summary.errors == {"control_token": 1, "too_long": 1}
    assert [(p.code, p.source.line) for p in heard] == [("control_token", 2), ("too_long", 3)]


@pytest.mark.parametrize("what", ["written to", "replaced", "removed"])
def test_a_file_that_changes_while_it_is_read_is_named_and_nothing_is_left(
    tmp_path: Path, files: list[DataFile], what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    renderer = make_renderer()
    encode = renderer.encode
    path = Path(files[0].path)

    def change_then_encode(*args: Any, **kwargs: Any) -> Any:
        if what == "written to":
            path.write_text(path.read_text("utf-8"), "utf-8")
        elif what == "replaced":
            write(tmp_path / "new.jsonl", line("x", "y"))
            os.replace(tmp_path / "new.jsonl", path)
        else:
            path.unlink(missing_ok=True)
        return encode(*args, **kwargs)

    monkeypatch.setattr(renderer, "encode", change_then_encode)
    with pytest.raises(DataError, match=r"a\.jsonl: (it changed while it was read|cannot be read)"):
        make(tmp_path / "rows", *files, renderer=renderer)
    assert left_in(tmp_path / "rows") == []


@pytest.mark.parametrize("damage", ["cut", "flipped", "gone", "no summary", "half a summary", "other version"])
def test_a_damaged_store_is_built_again(tmp_path: Path, files: list[DataFile], damage: str) -> None:
    store, _ = make(tmp_path / "rows", *files)
    arrow, summary = (next((tmp_path / "rows").glob(f"*.{kind}")) for kind in ("arrow", "json"))
    content = arrow.read_bytes()
    if damage == "cut":
        arrow.write_bytes(content[:-8])
    elif damage == "flipped":
        arrow.write_bytes(content[:900] + bytes([content[900] ^ 1]) + content[901:])
    elif damage == "gone":
        arrow.unlink()
    elif damage == "no summary":
        summary.unlink()
    elif damage == "half a summary":
        summary.write_bytes(summary.read_bytes()[:50])
    else:
        summary.write_text(json.dumps({**json.loads(summary.read_text()), "version": 0}))
    again, _ = make(tmp_path / "rows", *files)
    assert not again.reused
    assert again.row(11).ids.tolist() == store.row(11).ids.tolist()


@pytest.mark.parametrize("links", [True, False])
def test_a_kept_store_stays_when_the_first_is_gone(
    tmp_path: Path, files: list[DataFile], links: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not links:
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError("another disk")))
    store, _ = make(tmp_path / "rows", *files)
    store.keep(tmp_path / "run" / "train")
    store.keep(tmp_path / "run" / "train")
    for path in (tmp_path / "rows").iterdir():
        path.unlink()
    kept, _ = make(tmp_path / "run" / "train", *files)
    assert kept.reused
    assert kept.row(3).ids.tolist() == store.row(3).ids.tolist()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a fork of itself")
def test_a_killed_build_leaves_nothing_that_looks_complete(tmp_path: Path) -> None:
    """SIGKILL after each number of record batches in turn; then the same call builds the rows from nothing."""
    file = write(tmp_path / "a.jsonl", *(line(f"q {i}", f"a {i}") for i in range(20)))
    expected, _ = make(tmp_path / "whole", file)
    for batches in (0, 1, 3):
        rows = tmp_path / f"rows{batches}"
        pid = os.fork()
        if pid == 0:  # the child dies in the middle of its work
            _die_after(batches)
            make(rows, file)
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        assert os.WTERMSIG(status) == signal.SIGKILL
        assert all(name.startswith(".tmp-") for name in left_in(rows))
        again, _ = make(rows, file)
        assert not again.reused
        assert [again.row(i).ids.tolist() for i in range(20)] == [expected.row(i).ids.tolist() for i in range(20)]


def _die_after(batches: int) -> None:
    made = encoding_module.columns
    encoding_module.BATCH_ROWS = encoding_module.CHUNK_EXAMPLES = 5
    left = [batches]

    def batch(*given: Any) -> Any:
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= 1
        return made(*given)

    encoding_module.columns = batch


def test_a_store_tells_its_tokens_once_each(tmp_path: Path, files: list[DataFile]) -> None:
    store, _ = make(tmp_path, *files)
    expected = sorted({int(token) for index in range(len(store)) for token in store.row(index).ids})
    assert store.tokens.tolist() == expected
