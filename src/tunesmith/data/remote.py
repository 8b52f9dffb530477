"""Files at an address: what is known of each, read by ranges, or downloaded one at a time.

Nothing here opens a connection to a file that was not registered by `data.addresses` first.
"""

from __future__ import annotations

import errno
import io
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from tunesmith.data.problems import refusal
from tunesmith.environment import install_command
from tunesmith.errors import DataError
from tunesmith.recipe.schema import DataFile
from tunesmith.runs.atomic import remove, storing

PART_BYTES = 256 * 1024 * 1024
"""Size from which on files that are not kept are downloaded and encoded together; see `data.parts`."""
RANGES: dict[str, Any] = {
    "cache_type": "blockcache",
    "cache_options": {"maxblocks": 16},
    "block_size": 4 * 1024 * 1024,
}
"""How much is asked for at once, and how many such ranges are remembered: columns of Parquet lie far apart."""
_HUB_PAGE = re.compile(r"https?://(?:huggingface|hf)\.co/datasets/([^/?#]+/[^/?#]+)")
_HUB_FILE = re.compile(r"hf://datasets/(?P<repo_id>[^/]+/[^/@]+)@(?P<revision>[0-9a-f]{40})/(?P<filename>.+)")


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file at an address; of the hub, hf://datasets/owner/name@commit/path."""

    address: str
    num_bytes: int
    version: str
    """Changes with the content: its SHA-256 where that is known, else a hash that the hub or the file system gives."""

    def cached(self) -> str | None:
        """Its place in the hub's cache, if it is there."""
        from huggingface_hub import try_to_load_from_cache

        on_hub = _HUB_FILE.fullmatch(self.address)
        found = try_to_load_from_cache(**on_hub.groupdict(), repo_type="dataset") if on_hub else None
        return found if isinstance(found, str) else None


REGISTERED: dict[str, Sequence[RemoteFile]] = {}
"""The files of each address that was listed in this process, and each of them by its own."""


def is_address(path: str) -> bool:
    """Whether a path is an address, such as hf://datasets/owner/name or s3://bucket/rows.jsonl."""
    return "://" in path


def register(address: str, files: Sequence[RemoteFile]) -> None:
    """Let the files of an address be opened."""
    REGISTERED.update({address: files, **{file.address: [file] for file in files}})


def registered(address: str) -> Sequence[RemoteFile]:
    """The files of a registered address. Raises DataError for another."""
    if address not in REGISTERED:
        message = "it is not on this machine, and nothing is fetched here."
        raise refusal(address, 0, "not_here", message, "Download it, and use the local file.")
    return REGISTERED[address]


def known(address: str) -> RemoteFile:
    """Facts about a registered file. Raises DataError for another address."""
    return registered(address)[0]


def size_of(path: str) -> int:
    """Bytes of a file, wherever it is; 0: it is not there."""
    if is_address(path):
        return known(path).num_bytes
    try:
        return os.stat(path).st_size
    except (OSError, ValueError):
        return 0


def open_remote(address: str) -> BinaryIO:
    """A registered file, read by ranges. Raises DataError; reading raises ConnectionError."""
    known(address)
    fs, path = file_system(address)
    opened = _connected(lambda: fs.open(path, "rb", **RANGES))
    if ranges := getattr(opened, "cache", None):
        fetch = ranges.fetcher
        ranges.fetcher = lambda start, end: _connected(lambda: fetch(start, end))
    return cast(BinaryIO, io.BufferedReader(opened, 1 << 20))


def _connected(read: Callable[[], Any]) -> Any:
    try:
        return read()
    except Exception as error:  # of a dozen libraries, one a file system
        raise ConnectionError(errno.EIO, f"the connection failed ({reason(error)}). Start again") from error


def file_system(address: str) -> tuple[Any, str]:
    """The file system of an address, and the path in it.

    Raises:
        DataError: there is none, its package is not installed, or it is a page of the hub.
    """
    import fsspec

    if page := _HUB_PAGE.match(address):
        raise DataError(f"{address}: a page of the hub. The data set is hf://datasets/{page[1]}.")
    try:
        return cast("tuple[Any, str]", fsspec.core.url_to_fs(address))
    except ImportError as error:
        way = f"Install it, or download the data; for s3:// and gs://: {install_command('cloud')}"
        raise DataError(f"{address}: a package is not installed ({error}). {way}") from error
    except ValueError as error:
        raise DataError(f"{address}: {error}. There are hf://, s3://, gs:// and others of fsspec.") from error


@contextmanager
def local(file: DataFile, folder: Path | None = None) -> Iterator[DataFile]:
    """The file on this disk: one at an address is downloaded, into `folder`, and removed when the block ends.

    Raises DataError if it cannot be fetched; StorageError.
    """
    if not is_address(file.at):
        yield file
        return
    with ExitStack() as held:
        path = (folder or Path(held.enter_context(tempfile.TemporaryDirectory()))) / os.path.basename(file.at)
        held.callback(remove, path)
        download(known(file.at), path)
        yield file.at_place(str(path))


def download(file: RemoteFile, path: Path | None = None) -> None:
    """Put a file at a path, or one of the hub into the hub's cache, where a download that was cut continues.

    Raises DataError if it cannot be fetched; StorageError.
    """
    try:
        if path is None:
            from huggingface_hub import hf_hub_download
            from huggingface_hub.utils import disable_progress_bars

            disable_progress_bars()
            hf_hub_download(**cast("re.Match[str]", _HUB_FILE.fullmatch(file.address)).groupdict(), repo_type="dataset")
            return
        fs, there = file_system(file.address)
        with storing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        fs.get_file(there, str(path))
    except DataError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            with storing(path or Path(os.path.basename(file.address)), num_bytes=file.num_bytes):
                raise
        way = "Start again: files that have arrived are not fetched twice."
        raise refusal(file.address, 0, "unreadable", f"it cannot be downloaded: {reason(error)}.", way) from error


def reason(error: BaseException) -> str:
    """An error of another library in one line."""
    return " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__
