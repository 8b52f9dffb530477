"""Files and recipes changed at random, from a seed: what a disk, an editor or a script may make of good ones."""

import gzip
import io
import json
import random
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import pyarrow as pa
import pyarrow.parquet as pq

PIECES = (
    *(b'"', b"'", b"{", b"}", b"[", b"]", b",", b":", b"\n", b"\r", b"\r\n", b"\t", b" ", b"\\", b"\\u", b"\x00", b";"),
    *(b"\xff", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\xf0\x9f\x98\x80", b"\\ud800", b"null", b"true", b"NaN", b"1e999"),
    *(b"9" * 400, b"[" * 300, b'{"a":' * 100, b"&a *a", b"!!python/x", b"<<: {}", b"a." * 200, b"# ", b"- ", b"? "),
)


def data_seeds() -> list[tuple[str, bytes]]:
    """(file name, content) of a good file of each kind."""
    chat = {"messages": [{"role": "user", "content": "Hi, é 日本"}, {"role": "assistant", "content": "Hello."}]}
    pair = {"prompt": "What is 2 + 2?", "completion": "4"}
    label = {"text": "fine, thanks", "label": "good"}
    turns = [{"role": role, "content": role} for role in ("user", "assistant")]
    compared = {"prompt": "Hi", "chosen": "Hello, you.", "rejected": "Go away."}
    rows = {
        "chat": chat, "pair": pair, "label": label, "preference": compared,
        "messages": {"chosen": turns, "rejected": [turns[0], {**turns[1], "content": "No."}]},
        "openai": {
            "input": {"messages": turns[:1]}, "preferred_output": turns[1:],
            "non_preferred_output": [{**turns[1], "content": "No."}],
        },
        "unpaired": {"prompt": "Hi", "completion": "Hello.", "label": True},
        "scored": {"prompt": "Hi", "completions": ["Hello.", "No.", "Hm."], "scores": [2.0, 0, 1]},
        "pairs": {"anchor": "a cat", "positive": "the cat", "negative": "a dog"},
        "ranked": {"query": "cats", "documents": ["a cat", "a dog"], "labels": [1, 0]},
    }  # fmt: skip
    lines = {name: b"".join(json.dumps(row).encode() + b"\n" for row in [row] * 5) for name, row in rows.items()}
    nested = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([rows["messages"], chat] * 3), nested)
    table = pa.table({"text": ["a b c", "d e", "f"] * 4, "label": ["x", "y", "x"] * 4})
    parquet = io.BytesIO()
    pq.write_table(table, parquet)
    csv = b'text,label\n"one, two",good\n"three ""four""",bad\nfive,good\n' * 3
    seeds = [(f"{name}.jsonl", content) for name, content in lines.items()]
    seeds += [("rows.json", json.dumps([pair] * 4, indent=1).encode()), ("rows.csv", csv)]
    seeds += [("nested.parquet", nested.getvalue())]
    seeds += [("rows.tsv", csv.replace(b",", b"\t")), ("rows.parquet", parquet.getvalue())]
    seeds += [("rows.conll", b"EU B-ORG\nrejects O\nGerman B-MISC\n\nPeter B-PER\nsaid O\n\n" * 3)]
    return [*seeds, ("rows.txt", "A text of some lines.\n\nAnd another é one.\n".encode() * 5)]


def mutated(content: bytes, draw: random.Random) -> bytes:
    """One to five changes of it."""
    whole = bytearray(content)
    for _ in range(draw.randint(1, 5)):
        at = draw.randrange(len(whole) + 1)
        end = min(len(whole), at + draw.choice((1, 1, 3, 20, 200)))
        kind = draw.randrange(7)
        if kind == 0 and at < len(whole):
            whole[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            whole[at:at] = draw.choice(PIECES)
        elif kind == 2:
            del whole[at:end]
        elif kind == 3:
            whole[at:at] = whole[at:end] * draw.choice((1, 2, 50))
        elif kind == 4:
            del whole[at:]
        elif kind == 5:
            whole[at:end] = draw.randbytes(end - at)
        else:
            other = draw.randrange(len(whole) + 1)
            whole[at:end] = whole[other : other + (end - at)]
    return bytes(whole)


def mutants(seeds: list[tuple[str, bytes]], num: int, seed: int) -> Iterator[tuple[str, bytes]]:
    """`num` changed files; one in eight compressed, some of those changed after it."""
    draw = random.Random(seed)
    for _ in range(num):
        name, content = draw.choice(seeds)
        content = mutated(content, draw)
        if draw.random() < 0.125 and not name.endswith((".parquet", ".yaml")):
            name, content = f"{name}.gz", gzip.compress(content, mtime=0)
            content = mutated(content, draw) if draw.random() < 0.5 else content
        yield name, content


@contextmanager
def at_most(seconds: int) -> Iterator[None]:
    """Ends what takes longer with a TimeoutError, where the system has alarms."""

    def ring(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"longer than {seconds} s")

    if not hasattr(signal, "SIGALRM"):
        yield
        return
    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
