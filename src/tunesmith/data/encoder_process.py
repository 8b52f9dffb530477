"""A process that encodes rows for another.

    python -m tunesmith.data.encoder_process

reads the settings of a renderer and then chunks of examples from its standard input, and writes what became of each to
its standard output, each as a frame. It ends when its input does: with the other, however that ends. It never imports
torch.
"""

from __future__ import annotations

import gc
import hashlib
import os
import struct
import sys
from contextlib import suppress
from typing import BinaryIO

import orjson
from transformers import PreTrainedTokenizerFast

from tunesmith.data.chunks import chunk_of, encode, encoded_bytes
from tunesmith.data.collecting import collected_between
from tunesmith.data.render import Renderer

_LENGTH = struct.Struct("<Q")


def write_frame(file: BinaryIO, content: bytes) -> None:
    """A frame: its length in 8 bytes, and its bytes."""
    file.write(_LENGTH.pack(len(content)))
    file.write(content)
    file.flush()


def read_frame(file: BinaryIO) -> bytes:
    """The next frame. Raises EOFError where none follows."""
    head = file.read(_LENGTH.size)
    content = file.read(*_LENGTH.unpack(head)) if len(head) == _LENGTH.size else b""
    if len(head) < _LENGTH.size or len(content) < _LENGTH.unpack(head)[0]:
        raise EOFError
    return content


def main() -> None:
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print goes with their warnings
    with suppress(EOFError, BrokenPipeError):
        _serve(sys.stdin.buffer, out)


def identity(renderer: Renderer) -> str:
    """SHA-256 over all that rows follow from: equal where two renderers give equal rows."""
    backend = renderer.tokenizer.backend_tokenizer
    backend.no_padding()
    backend.no_truncation()
    return hashlib.sha256(f"{renderer.fingerprint}{backend.to_str()}".encode()).hexdigest()


def _serve(source: BinaryIO, out: BinaryIO) -> None:
    given = orjson.loads(read_frame(source))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(given["folder"])
    renderer = Renderer(tokenizer, given["task"], **given["options"])
    write_frame(out, identity(renderer).encode())
    gc.collect()
    gc.freeze()  # what is there now stays: not to be looked through again and again
    with collected_between() as collect:
        while True:
            write_frame(out, encoded_bytes(encode(renderer, chunk_of(read_frame(source)))))
            collect()


if __name__ == "__main__":
    main()
