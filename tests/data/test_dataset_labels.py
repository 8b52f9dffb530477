"""Rows with classes in a store: by the store's own ids until it is known what is learnt, then as targets."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.families import bert_like, t5_like
from tunesmith.data import encode as encoding_module
from tunesmith.data.dataset import RowStore, build
from tunesmith.data.renderer import Renderer
from tunesmith.data.row_targets import write_targets
from tunesmith.recipe.schema import Data, DataFile
from tunesmith.tasks import TASKS
from tunesmith.types import Labels

BERT = bert_like()


def store_of(
    folder: Path, rows: list[dict[str, Any]], task: Any = "classify", *, tokenizer: Any = BERT, **options: Any
) -> RowStore:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    settings = {"kind": "encoder", "max_tokens": 12, "too_long": "cut", "control_tokens": "error", **options}
    return build(
        folder / "store",
        data=Data(),
        files=[DataFile(path=str(file))],
        renderer=Renderer(tokenizer, TASKS[task], **settings),
        on_problem=lambda problem: None,
    )


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding_module, "CHUNK_EXAMPLES", 2)
    monkeypatch.setattr(encoding_module, "BATCH_ROWS", 2)


def texts(*labels: Any) -> list[dict[str, Any]]:
    return [{"text": f"the fox {i}", "label": label} for i, label in enumerate(labels)]


def labels_of(store: RowStore) -> list[Any]:
    return [store.row(i).labels.tolist() for i in range(len(store))]  # type: ignore[union-attr]


def test_class_ids_follow_first_appearance_until_the_labels_are_known(tmp_path: Path) -> None:
    store = store_of(tmp_path, texts("b", "a", "b", "c", "a"))
    assert store.labels.vocabulary == ("b", "a", "c")
    assert store.labels.firsts().tolist() == [0, 1, 0, 2, 1]
    assert [store.labels.at(i).tolist() for i in range(5)] == [[0], [1], [0], [2], [1]] == labels_of(store)
    assert store.summary.many is False
    assert store.denominators.tolist() == [1.0] * 5
    write_targets([(store, np.arange(len(store)))], labels=Labels("one", ("a", "b", "c"), np.array([0.5, 1.0, 4.0])))
    assert labels_of(store) == [[1], [0], [1], [2], [0]]
    assert store.row(0).labels.dtype == np.int64  # type: ignore[union-attr]
    assert store.denominators.tolist() == [1.0, 0.5, 1.0, 4.0, 0.5]
    assert store.labels.at(1).tolist() == [1]


def test_lists_of_classes_become_a_line_of_noughts_and_ones(tmp_path: Path) -> None:
    store = store_of(tmp_path, texts(["b", "a"], [], ["c"]))
    assert store.summary.many is True
    assert store.labels.firsts().tolist() == [0, -1, 2]
    assert labels_of(store) == [[0, 1], [], [2]]
    write_targets([(store, np.arange(len(store)))], labels=Labels("many", ("a", "b", "c")))
    assert labels_of(store) == [[[1, 1, 0]], [[0, 0, 0]], [[0, 0, 1]]]
    assert store.row(1).labels.dtype == np.float32  # type: ignore[union-attr]
    assert store.denominators.tolist() == [3.0] * 3


ROWS = [("b",), ("a", "b"), (), ("c", "a"), ("b",), ("d",)]


@pytest.mark.parametrize("chosen", [None, [], [1, 3], [5, 1, 4], [1, 1, 3]])
def test_labels_are_counted_as_row_by_row(chosen: list[int] | None, tmp_path: Path) -> None:
    store = store_of(tmp_path, texts(*map(list, ROWS)))
    seen = store.count_labels(None if chosen is None else np.array(chosen, np.int64))
    rows = range(len(ROWS)) if chosen is None else chosen
    assert seen.counts == Counter(name for i in rows for name in ROWS[i])
    for name in seen.counts:
        line = min(i for i in rows if name in ROWS[i]) + 1
        assert seen.place(seen.names.index(name)).line == line


def test_numbers_are_read_from_their_words(tmp_path: Path) -> None:
    store = store_of(tmp_path, texts(0.5, -2, 0.5))
    write_targets([(store, np.arange(len(store)))], labels=Labels("number"))
    assert labels_of(store) == [[0.5], [-2.0], [0.5]]
    assert store.denominators.tolist() == [1.0] * 3


def test_tags_weigh_what_their_words_weigh(tmp_path: Path) -> None:
    rows = [{"tokens": ["the", "fox"], "tags": ["O", "B"]}, {"tokens": ["fox"] * 3, "tags": ["B", "B", "O"]},
            {"tokens": ["the"] * 20, "tags": ["O"] * 20}]  # fmt: skip
    store = store_of(tmp_path, rows, "tag")
    assert store.targets.tolist() == [2, 3, 10] == store.denominators.tolist()
    assert store.labels.firsts().tolist() == [0, 1, 0]
    write_targets([(store, np.arange(len(store)))], labels=Labels("tags", ("B", "O"), np.array([2.0, 0.25])))
    assert labels_of(store) == [[1, 0], [0, 0, 1], [1] * 10]
    assert store.denominators.tolist() == [2.25, 4.25, 2.5]
    write_targets([(store, np.arange(len(store)))], labels=Labels("tags", ("B", "O")))
    assert store.denominators.tolist() == [2.0, 3.0, 10.0]


def test_pairs_keep_where_the_second_text_begins(tmp_path: Path) -> None:
    store = store_of(tmp_path, [{"text": "the fox", "text_pair": "the dog", "label": "x"}, *texts("y")])
    assert store.row(0).second > store.row(1).second == 0
    assert store.row(0).ids[store.row(0).second - 1] == BERT.sep_token_id


def test_windows_of_a_document_are_rows_of_one_source_and_one_hash(tmp_path: Path) -> None:
    store = store_of(tmp_path, [{"text": "the fox " * 30}, {"text": "the dog"}], "text")
    assert store.lines.tolist() == [1] * (len(store) - 1) + [2]
    assert len(store) > 3
    assert len(set(store.hashes[:-1].tolist())) == 1
    assert store.windows.tolist() == [*range(len(store) - 1), 0]
    assert store.hashes[-1] != store.hashes[0]
    assert store.num_bytes.sum() == len("the fox " * 30) + len("the dog")
    assert (store.summary.many, store.row(0).labels, store.labels.firsts().max()) == (None, None, -1)
    assert [store.row(i).num_bytes for i in range(len(store))] == store.num_bytes.tolist()


def test_rows_with_windows_and_labels_are_found_again(tmp_path: Path) -> None:
    first, again = (store_of(tmp_path, texts("b", "a", "b")) for _ in range(2))
    assert (first.reused, again.reused) == (False, True)
    assert again.labels.vocabulary == first.labels.vocabulary
    assert labels_of(again) == labels_of(first)


@pytest.mark.parametrize("options", [{"kind": "causal"}, {"stride": 3}])
def test_kind_and_stride_change_the_key(tmp_path: Path, options: dict[str, Any]) -> None:
    rows = [{"text": "the fox " * 9}]
    one, other = (store_of(tmp_path, rows, "text", **some) for some in ({}, options))
    assert one.key != other.key
    assert not other.reused


def test_a_prompt_changes_the_key(tmp_path: Path) -> None:
    rows = [{"document": "the fox", "summary": "fox"}]
    options: dict[str, Any] = {"tokenizer": t5_like(), "kind": "encoder_decoder", "max_tokens": 60}
    prompts = (None, "{document}!", "{document}?")
    assert len({store_of(tmp_path, rows, "summarize", prompt=prompt, **options).key for prompt in prompts}) == 3
