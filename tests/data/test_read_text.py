"""Documents are read whole and byte for byte, folders in an order of their own, CoNLL files sentence by sentence."""

import gzip
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data.rows_of import json_lines, put, rows_in, said
from tunesmith.data import read_text
from tunesmith.data.check import check
from tunesmith.data.read import expand_folders
from tunesmith.errors import DataError
from tunesmith.recipe.schema import Data, DataFile
from tunesmith.types import Problem

WORDS = st.text(st.characters(exclude_categories=("C", "Z")), min_size=1, max_size=5)


def records(path: Path, **options: Any) -> list[tuple[int, Any]]:
    rows, problems = rows_in(path, **options)
    assert problems == []
    return rows


# documents


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1).filter(str.strip))
def test_any_document_comes_back_byte_for_byte(text: str, tmp_path: Path):
    text = f"It says: {text}"  # so that it is not taken for rows
    for name, payload in (("a.txt", text.encode()), ("a.md.gz", gzip.compress(text.encode(), 1))):
        assert records(put(tmp_path, name, payload)) == [(1, {"text": text})]


@pytest.mark.parametrize(
    "payload",
    [
        b"Hello, world; one\ttwo\nthree, four",
        b"[1] Introduction\n[2] End\n",
        b"[\n",
        b"{\\rtf1 text}",
        b"{ braces }",
        b"# A title\r\n\r\nA line.\r\n",
        b"text\n",
        b"He said O\nand went.\n",
        b"\n\n  indented\n",
        b"x" * 70_000,
    ],
)
def test_prose_is_a_document_however_it_begins(payload: bytes, tmp_path: Path):
    assert records(put(tmp_path, "a.txt", payload)) == [(1, {"text": payload.decode()})]


@pytest.mark.parametrize(
    ("payload", "num"),
    [
        (json_lines([{"text": "a"}, {"text": "b"}]), 2),
        (b'[{"text": "a"}]', 1),
        (b"text,label\na,b\n", 1),
        (b"text\tlabel\na\tb\n", 1),
        (b"Ann B-PER\nsings O\n", 1),
    ],
)
def test_rows_in_a_file_named_as_text_are_rows(payload: bytes, num: int, tmp_path: Path):
    rows = records(put(tmp_path, "a.txt", payload))
    assert len(rows) == num
    assert payload.decode() not in [record.get("text") for _, record in rows]


# folders


def a_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "books"
    for name in ("b.txt", "a/z.md", "a/b/c.txt.gz", "a.txt", ".hidden.txt", ".git/x.txt", "rows.jsonl", "a/p.pdf"):
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        packed = gzip.compress(b"Packed.") if name.endswith("gz") else b"Text."
        target.write_bytes(b"%PDF-1.7 \xff" if name.endswith("pdf") else packed)
    return folder


def test_a_folder_is_walked_in_the_order_of_its_names(tmp_path: Path):
    folder, heard = a_folder(tmp_path), []
    found = expand_folders([DataFile(path=str(folder), weight=2.0)], heard.append)
    assert [Path(file.path).relative_to(folder).as_posix() for file in found] == [
        "a/b/c.txt.gz", "a/z.md", "a.txt", "b.txt",
    ]  # fmt: skip
    assert {file.weight for file in found} == {2.0}
    (problem,) = heard
    assert str(problem) == (
        f"{folder}: left_out: 2 files were left out, since the documents (.txt, .md) of this folder are read: "
        "'a/p.pdf', 'rows.jsonl'. "
        "Give files of rows by name."
    )
    assert expand_folders(found, heard.append) == found


def test_models_and_runs_in_a_folder_are_no_documents(tmp_path: Path) -> None:
    """Their vocabularies and reports would be trained, and `config.json` alone makes no model of a folder."""
    made = {
        "minilm": ("config.json", "tokenizer_config.json", "vocab.txt"),
        "runs/one": ("run.json", "events.jsonl", "report.md"),
    }
    for name, files in {**made, "notes": ("config.json", "a.txt")}.items():
        (tmp_path / name).mkdir(parents=True)
        for file in files:
            (tmp_path / name / file).write_text("Text.")
    heard: list[Problem] = []
    found = expand_folders([DataFile(path=str(tmp_path))], heard.append)
    assert [Path(file.path).name for file in found] == ["a.txt"]
    assert str(heard[0]) == (
        f"{tmp_path}: left_out: folders of a model or a run were left out: 'minilm', 'runs/one'. "
        "If they hold documents of yours, give those by name."
    )
    within = expand_folders([DataFile(path=str(tmp_path / "minilm"))], heard.append)  # which was named
    assert [Path(file.path).name for file in within] == ["vocab.txt"]


def test_a_folder_of_held_out_documents_is_not_trained_with_its_siblings(tmp_path: Path):
    for name in ("Train/a.txt", "Test/b.txt", "dev/c.txt"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("Text.")
    folder = [DataFile(path=str(tmp_path))]
    with pytest.raises(DataError) as refused:
        expand_folders(folder, lambda problem: None, trained=True)
    fix = f"Give by name: {tmp_path / 'Train'} --eval {tmp_path / 'Test'} --eval {tmp_path / 'dev'}"
    assert str(refused.value).endswith(f"these are held-out rows: 'Test', 'dev'. They would be trained. {fix}")
    assert len(expand_folders(folder, lambda problem: None)) == 3  # nothing is trained there
    report = check(Data(eval=tuple(folder)))
    assert (report.files[0].is_readable, check(Data(train=tuple(folder))).files[0].is_readable) == (True, False)


def test_a_folder_of_rows_is_read_in_the_order_of_its_names(tmp_path: Path):
    for name in ("b.jsonl", "a.csv", "README.md"):
        put(tmp_path, name, b"x,y\n")
    heard: list[Any] = []
    found = expand_folders([DataFile(path=str(tmp_path))], heard.append)
    assert [Path(file.path).name for file in found] == ["a.csv", "b.jsonl"]
    assert ["README.md" in problem.message for problem in heard] == [True]
    put(tmp_path, "test.jsonl", b"{}")
    with pytest.raises(DataError, match=r"held-out rows: 'test.jsonl'.* --eval .*test.jsonl"):
        expand_folders([DataFile(path=str(tmp_path))], heard.append, trained=True)


# CoNLL


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sentences=st.lists(st.lists(st.tuples(WORDS, WORDS, WORDS), min_size=1, max_size=4), min_size=1, max_size=4),
    separator=st.sampled_from([" ", "\t"]),
    end=st.sampled_from(["\n", "\r\n"]),
)
def test_words_and_tags_are_the_first_and_last_columns(
    sentences: list[list[tuple[str, str, str]]], separator: str, end: str, tmp_path: Path
):
    for sentence in sentences:
        for word, *_ in sentence:
            if word.startswith("#"):
                return
    text = f"{end}{end}".join(end.join(separator.join(line) for line in sentence) for sentence in sentences)
    found = records(put(tmp_path, "a.conll", text.encode()))
    assert [(record["tokens"], record["tags"]) for _, record in found] == [
        ([word for word, _, _ in sentence], [tag for _, _, tag in sentence]) for sentence in sentences
    ]


def test_sentences_carry_their_first_line_and_marks_are_counted(tmp_path: Path):
    payload = b"-DOCSTART- -X- O\n\n# id 7 of it\nAnn NNP B-PER\nsings VB O\n\n\n# id 8 of it\nBob NNP B-PER"
    rows, problems = rows_in(put(tmp_path, "a.bio", payload))
    assert rows == [
        (4, {"tokens": ["Ann", "sings"], "tags": ["B-PER", "O"]}),
        (9, {"tokens": ["Bob"], "tags": ["B-PER"]}),
    ]
    assert said(problems) == [("document_marks", 0)]
    assert problems[0].message.startswith("3 lines hold no word")


def no_sentence_is_lost(payload: bytes, words: list[list[str]], tmp_path: Path) -> None:
    rows, _ = rows_in(put(tmp_path, "a.conll", payload))
    assert [record["tokens"] for _, record in rows] == words


LOST = [
    (b"Ann B-PER\nsings O\n-DOCSTART- O\nBob B-PER\n", [["Ann", "sings"], ["Bob"]]),
    (b"Ann B-PER\n-DOCSTART- O\n", [["Ann"]]),
    (b"# O\n1 O\n\n# O\n2 O\n", [["#", "1"], ["#", "2"]]),
    (b"# NN B-NP O\nAnn NNP I-NP B-PER\n", [["#", "Ann"]]),
]


@pytest.mark.parametrize(("payload", "words"), LOST)
def test_marks_end_sentences_and_a_first_line_can_be_a_word(payload: bytes, words: list[list[str]], tmp_path: Path):
    no_sentence_is_lost(payload, words, tmp_path)


def test_a_reader_that_takes_marks_for_words_would_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(read_text, "_is_mark", lambda raw, num_columns, *, is_first: False)
    with pytest.raises(AssertionError):
        no_sentence_is_lost(*LOST[0], tmp_path)
