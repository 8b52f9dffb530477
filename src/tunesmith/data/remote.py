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
from tunesmith.runs.atomic import remove, sha256_file, storing

OnBytes = Callable[[int], None]
"""Bytes that have arrived since the last call."""

PART_BYTES = 256 * 1024 * 1024
"""Size from which on files that are not kept are downloaded and encoded together; see `data.parts`."""
BLOCK_BYTES, BLOCKS = 4 * 1024 * 1024, 16
"""Size of a range that is asked for at once, and how many are remembered: columns of Parquet lie far apart."""
CLOUD = ("s3", "s3a", "gs", "gcs")
"""Protocols of the packages of the extra `cloud`."""
_HUB_PAGE = re.compile(r"https?://(?:huggingface|hf)\.co/datasets/([^/?#]+/[^/?#]+)")
_HUB_FILE = re.compile(r"hf://datasets/(?P<repo_id>[^/]+/[^/@]+)@(?P<revision>[0-9a-f]{40})/(?P<filename>.+)")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file at an address; of the hub, hf://datasets/owner/name@commit/path."""

    address: str
    num_bytes: int
    version: str
    """Changes with the content: its SHA-256 where that is known, else a hash that the hub or the file system gives."""

    @property
    def on_hub(self) -> dict[str, str] | None:
        """Where it is on the hub, in words of huggingface_hub; None: it is a file of another file system."""
        match = _HUB_FILE.fullmatch(self.address)
        return {**match.groupdict(), "repo_type": "dataset"} if match else None

    def cached(self) -> str | None:
        """Its place in the hub's cache, if it is there."""
        if self.on_hub is None:
            return None
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(**self.on_hub)
        return found if isinstance(found, str) else None


REGISTERED: dict[str, Sequence[RemoteFile]] = {}
"""The files of each address that was listed in this process, and each of them by its own."""


def is_address(path: str) -> bool:
    """Whether a path is an address, such as hf://datasets/owner/name or s3://bucket/rows.jsonl."""
    return "://" in path


def register(address: str, files: Sequence[RemoteFile]) -> None:
    """Let the files of an address be opened."""
    REGISTERED[address] = files
    REGISTERED.update({file.address: [file] for file in files})


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


def verified(file: DataFile) -> str:
    """The version of a file: SHA-256 of a local one; of one from an address as it was listed there.

    Raises DataError where a downloaded file is not the one that was listed. OSError.
    """
    if not is_address(file.path):
        return sha256_file(Path(file.at))
    version = known(file.path).version
    if not is_address(file.at) and _SHA256.fullmatch(version) and (digest := sha256_file(Path(file.at))) != version:
        message = f"the copy at {file.at} has the SHA-256 {digest[:16]}, the file of the hub {version[:16]}."
        raise refusal(file.path, 0, "damaged_copy", message, "Remove the copy, and start again.")
    return version


class _Ranges(io.RawIOBase):
    """A file of fsspec whose every failure is a ConnectionError."""

    def __init__(self, opened: Any) -> None:
        self._opened = opened

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        return int(self._opened.seek(offset, whence))

    def tell(self) -> int:
        return int(self._opened.tell())

    def readinto(self, buffer: Any) -> int:
        try:
            content = self._opened.read(len(buffer))
        except Exception as error:  # of a dozen libraries, one a file system
            raise ConnectionError(errno.EIO, f"the connection failed ({reason(error)}). Start again") from error
        buffer[: len(content)] = content
        return len(content)


def open_remote(address: str) -> BinaryIO:
    """A registered file, read by ranges. Raises DataError; reading raises ConnectionError."""
    known(address)
    try:
        fs, path = file_system(address)
        options = {"cache_type": "blockcache", "cache_options": {"maxblocks": BLOCKS}, "block_size": BLOCK_BYTES}
        opened = fs.open(path, "rb", **options)
    except DataError:
        raise
    except Exception as error:
        raise refusal(address, 0, "unreadable", f"it cannot be opened: {reason(error)}.", "Start again.") from error
    return cast(BinaryIO, io.BufferedReader(_Ranges(opened), 1 << 20))


def file_system(address: str) -> tuple[Any, str]:
    """The file system of an address, and the path in it.

    Raises:
        DataError: its package is not installed, or it is a page of the hub.
    """
    import fsspec

    if page := _HUB_PAGE.match(address):
        raise DataError(f"{address}: a page of the hub. The data set is hf://datasets/{page[1]}.")
    protocol = address.partition("://")[0]
    try:
        return cast("tuple[Any, str]", fsspec.core.url_to_fs(address))
    except ImportError as error:
        way = f": {install_command('cloud')}" if protocol in CLOUD else "; install it, or download the data"
        raise DataError(f"{address}: {protocol}:// needs a package that is not installed ({error}){way}.") from error
    except ValueError as error:
        if "rotocol not known" not in str(error):
            raise DataError(f"{address}: {error}.") from error
        raise DataError(f"{address}: there are no addresses {protocol}://. Such as hf://, s3:// or gs://.") from None


@contextmanager
def local(file: DataFile, folder: Path | None = None, on_bytes: OnBytes = lambda num: None) -> Iterator[DataFile]:
    """The file on this disk: one at an address is downloaded, and removed when the block ends.

    In `folder` a download that was interrupted continues. Raises DataError if it cannot be fetched; StorageError.
    """
    if not is_address(file.at):
        yield file
        return
    with ExitStack() as held:
        place = folder or Path(held.enter_context(tempfile.TemporaryDirectory(prefix="tunesmith-")))
        path = download(known(file.at), place, on_bytes)
        held.callback(remove, path)
        there = file.at_place(str(path))
        verified(there)
        yield there


def download(file: RemoteFile, folder: Path | None, on_bytes: OnBytes) -> Path:
    """The file's copy in `folder`, or, of the hub, in the hub's cache. What arrived before is not fetched again."""
    try:
        if file.on_hub is not None:
            from huggingface_hub import hf_hub_download

            options: dict[str, Any] = {"local_dir": folder, "tqdm_class": _bar(on_bytes)}
            return Path(hf_hub_download(**file.on_hub, **options))
        assert folder is not None, "only the hub has a cache"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / os.path.basename(file.address)
        fs, there = file_system(file.address)
        fs.get_file(there, str(path))
        on_bytes(file.num_bytes)
        return path
    except DataError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            with storing(folder or Path(os.path.basename(file.address)), num_bytes=file.num_bytes):
                raise
        way = "Start again: what has arrived is not fetched twice."
        raise refusal(file.address, 0, "unreadable", f"it cannot be downloaded: {reason(error)}.", way) from error


def _bar(on_bytes: OnBytes) -> Any:
    """A progress bar that draws nothing."""
    from tqdm import tqdm

    class Bar(tqdm):  # type: ignore[type-arg]
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(total=options.get("total"), disable=True)

        def update(self, n: float | None = 1) -> bool | None:
            on_bytes(int(n or 0))
            return None

    return Bar


def reason(error: BaseException) -> str:
    """An error of another library in one line."""
    text = " ".join(str(error).split())[:300].rstrip(".")
    return text or type(error).__name__
