"""Examples that are encoded at once, and the columns of their rows; both as bytes, for a process beside this one."""

# T tokens

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
from numpy.typing import NDArray

from tunesmith.data.examples import both_hashes
from tunesmith.data.render import Renderer
from tunesmith.types import Example, Part, Problem, Row, Source

SCHEMA = pa.schema(
    [
        ("ids", pa.list_(pa.int32())),
        ("trained", pa.list_(pa.bool_())),
        ("length", pa.int32()),
        ("targets", pa.int32()),
        ("file", pa.int32()),
        ("line", pa.int64()),
        ("hash", pa.uint64()),
        ("input", pa.uint64()),
        ("labels", pa.list_(pa.int64())),
        ("second", pa.int32()),
        ("bytes", pa.int32()),
    ]
)
Chunk = Sequence[tuple[int, Example]]
"""Examples, each with the index of its file."""
_Found = tuple[int, tuple[int, int], Row]
"""The index of a file, the hashes of an example's content and input, and one row of it."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """What became of a chunk."""

    rows: pa.RecordBatch
    """Labels by the order of `classes`."""
    problems: Sequence[Problem]
    classes: tuple[str, ...]
    """By first appearance."""
    many: bool | None
    """Whether classes came as lists; None: rows without classes."""

    @property
    def num_tokens(self) -> int:
        return len(self.rows.column("ids").values)


def encode(renderer: Renderer, chunk: Chunk) -> Encoded:
    """The rows of a chunk. Raises as `Renderer.encode`."""
    problems: list[Problem] = []
    vocabulary: dict[str, int] = {}
    examples = [example for _, example in chunk]
    rows: list[_Found] = []
    many: bool | None = None
    encoded = renderer.encode(examples, on_warning=problems.append, vocabulary=vocabulary)
    for (file, example), result in zip(chunk, encoded, strict=True):
        content = both_hashes(example)
        for item in result:
            if isinstance(item, Problem):
                problems.append(item)
                continue
            rows.append((file, content, item))
            if item.labels is not None:
                many = bool(many) or example.many
    return Encoded(_columns(rows), problems, tuple(vocabulary), many)


def joined(parts: Sequence[Encoded], vocabulary: dict[str, int]) -> pa.RecordBatch:
    """The rows of all parts, their labels by `vocabulary`, to which classes that it does not have are added."""
    batches = []
    for part in parts:
        ids = [vocabulary.setdefault(name, len(vocabulary)) for name in part.classes]
        batches.append(part.rows if ids == list(range(len(ids))) else _renamed(part.rows, np.array(ids, np.int64)))
    (whole,) = pa.Table.from_batches(batches).combine_chunks().to_batches()
    return whole


def _columns(rows: Sequence[_Found]) -> pa.RecordBatch:
    def numbers(values: Iterator[int], dtype: Any) -> pa.Array:
        return pa.array(np.fromiter(values, dtype, len(rows)))

    nothing = np.empty(0, np.int64)
    trained = [row.trained for _, _, row in rows]
    columns = [
        _lists([row.ids for _, _, row in rows], np.int32),
        _lists(trained, np.bool_),
        numbers((len(row.ids) for _, _, row in rows), np.int32),
        numbers((int(np.count_nonzero(trained_T)) for trained_T in trained), np.int32),
        numbers((file for file, _, _ in rows), np.int32),
        numbers((row.source.line for _, _, row in rows), np.int64),
        numbers((content for _, (content, _), _ in rows), np.uint64),
        numbers((read for _, (_, read), _ in rows), np.uint64),
        _lists([nothing if row.labels is None else row.labels for _, _, row in rows], np.int64),
        numbers((row.second for _, _, row in rows), np.int32),
        numbers((row.num_bytes for _, _, row in rows), np.int32),
    ]
    return pa.record_batch(columns, schema=SCHEMA)


def _lists(arrays: Sequence[NDArray[Any]], dtype: Any) -> pa.ListArray:
    offsets = np.cumsum([0, *(len(array) for array in arrays)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate([np.empty(0, dtype), *arrays])))


def _renamed(rows: pa.RecordBatch, ids: NDArray[np.int64]) -> pa.RecordBatch:
    at = SCHEMA.get_field_index("labels")
    labels = rows.column(at)
    local = labels.values.to_numpy()
    values = np.where(local < 0, local, ids[np.maximum(local, 0)])
    return rows.set_column(at, SCHEMA.field(at), pa.ListArray.from_arrays(labels.offsets, pa.array(values)))


def chunk_bytes(chunk: Chunk) -> bytes:
    """Read again by `chunk_of`."""
    return orjson.dumps(
        {
            "files": [file for file, _ in chunk],
            "examples": [
                [e.source.path, e.source.line, e.shape, e.plain, e.labels, e.many, len(e.parts), len(e.tools)]
                for _, e in chunk
            ],
            # In lists of their own: what stands in them may nest as deeply as can be written.
            "parts": [[part.role, part.text, part.trained, part.fields] for _, e in chunk for part in e.parts],
            "tools": [tool for _, e in chunk for tool in e.tools],
        }
    )


def chunk_of(content: bytes) -> Chunk:
    told = orjson.loads(content)
    parts, tools = (Part(*part) for part in told["parts"]), iter(told["tools"])
    return [
        (
            file,
            Example(
                tuple(next(parts) for _ in range(num_parts)),
                Source(path, line),
                shape,
                tuple(next(tools) for _ in range(num_tools)),
                plain=plain,
                labels=tuple(labels),
                many=many,
            ),
        )
        for file, (path, line, shape, plain, labels, many, num_parts, num_tools) in zip(
            told["files"], told["examples"], strict=True
        )
    ]


def encoded_bytes(encoded: Encoded) -> bytes:
    """Read again by `encoded_of`."""
    told = {
        "problems": [
            {**asdict(problem), "source": [problem.source.path, problem.source.line]} for problem in encoded.problems
        ],
        "classes": encoded.classes,
        "many": encoded.many,
    }
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, SCHEMA.with_metadata({"told": orjson.dumps(told)})) as stream:
        stream.write_batch(encoded.rows)
    return sink.getvalue()


def encoded_of(content: bytes) -> Encoded:
    with pa.ipc.open_stream(content) as stream:
        told = orjson.loads(stream.schema.metadata[b"told"])
        rows = stream.read_next_batch().replace_schema_metadata(None)
    problems = [Problem(**{**fields, "source": Source(*fields["source"])}) for fields in told["problems"]]
    return Encoded(rows, problems, tuple(told["classes"]), told["many"])
