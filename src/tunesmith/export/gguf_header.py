"""What every GGUF says of itself before its numbers: whose it is, of which base, how it is stored."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from errno import EIO, ENOSPC
from pathlib import Path

import gguf

from tunesmith.errors import ModelError
from tunesmith.export.card import base_id
from tunesmith.export.gguf_kinds import KINDS
from tunesmith.export.options import Options
from tunesmith.export.source import Source
from tunesmith.models.gguf import read_gguf

ROOM = 1 << 20
"""Bytes left on a disk that is full: the last blocks are seldom to be had."""


def file_stem(source: Source) -> str:
    """The run's name as the beginning of a file's: safe as a word of a command line and as a line of a Modelfile."""
    return re.sub(r"[^\w.-]+", "-", source.run.path.name).strip("-.") or "run"


@contextmanager
def gguf_writer(
    path: Path, source: Source, options: Options, *, architecture: str, kind: str
) -> Iterator[gguf.GGUFWriter]:
    """A file of `architecture` that is closed at the end; `kind`: a model or an adapter."""
    writer = gguf.GGUFWriter(path, architecture)
    try:
        writer.add_type(kind)
        # Not a bare word: transformers takes a file whose name is just "mistral" for another architecture.
        writer.add_name(f"{source.run.path.name} ({source.recipe.task})")
        writer.add_file_type(KINDS[options.quant].file)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        if options.license is not None:
            writer.add_license(options.license)
        if (base := base_id(source)) is not None:
            writer.add_base_model_count(1)
            writer.add_base_model_name(0, base)
            writer.add_base_model_repo_url(0, f"https://huggingface.co/{base}")
        yield writer
        writer.close()
        read_gguf(path)
    except ModelError as error:  # the last numbers may be lost without a word when the file is closed
        raise _refused(path) from error
    except OSError as error:
        if error.errno is not None:
            raise
        raise _refused(path) from error  # numpy tells how many numbers arrived, not why the others did not
    finally:
        writer.close()


def _refused(path: Path) -> OSError:
    number = ENOSPC if shutil.disk_usage(path.parent).free < ROOM else EIO
    return OSError(number, os.strerror(number), str(path))
