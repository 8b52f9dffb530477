"""Data by address: which files are meant, what fetching them costs, and the fetching, if they fit on the disk."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from tunesmith.data import hub, remote
from tunesmith.data.detect_format import SUFFIXES, suffix_of
from tunesmith.data.remote import PART_BYTES, RemoteFile, is_address, reason
from tunesmith.errors import DataError
from tunesmith.formatting import plural, size
from tunesmith.recipe.schema import Data, DataFile

OnProgress = Callable[[str, int, int], None]
"""(what is done, bytes done, bytes in all)"""

HUB = "hf://"
SIDES = ("train", "eval", "replay")
DISK_SHARE = 0.5
"""Most of the free disk that downloads may take: encoded rows and checkpoints need the rest."""
_MAGIC = re.compile(r"[*?\[]")


def pin(data: Data, *, offline: bool) -> tuple[Data, list[str]]:
    """The data with every address of the hub pinned to a commit, and what is said of it.

    Data without an address is returned as it is, and nothing is asked of anybody. Raises DataError for every address
    that cannot be used, all at once.
    """
    refused: list[str] = []
    notes: list[str] = []
    sides: dict[str, tuple[DataFile, ...]] = {}
    for side in SIDES:
        files = []
        for file in getattr(data, side):
            try:
                files.append(_pinned(file, notes, offline=offline))
            except DataError as error:
                refused.append(str(error))
        sides[side] = tuple(files)
    if refused:
        raise DataError("\n".join(dict.fromkeys(refused)))
    return data.model_copy(update=sides), notes


def pin_path(path: str, *, offline: bool) -> tuple[str, list[str]]:
    """The path of one file as `pin` has it."""
    data, notes = pin(Data(train=(DataFile(path=path),)), offline=offline)
    return data.train[0].path, notes


def short_name(path: str) -> str:
    """The name of a data file, folder or data set, for a person."""
    if path.startswith(HUB):
        return hub.HubAddress.parse(path).repo.rpartition("/")[2]
    return Path(path).name


def _pinned(file: DataFile, notes: list[str], *, offline: bool) -> DataFile:
    if not is_address(file.at):
        return file
    if not file.at.startswith(HUB):
        members = _list_files(file.at, offline=offline)
        notes.append(f"{file.at}: {plural(len(members), 'file')}, {size(_sum(members))}, {_cost(members)}")
        return file
    listing = hub.find_listing(file.at, offline=offline)
    missing = [one for one in listing.files if one.cached() is None]
    if offline and missing:
        raise DataError(f"{missing[0].address}: not downloaded yet, and --offline forbids it. Run once without.")
    for one in listing.files:
        remote.register(one)
    counted = f"{plural(len(listing.files), 'file')}, {size(_sum(listing.files))}"
    notes.append(f"{file.path}: pinned to {listing.address}: {counted}, {_cost(listing.files)}")
    notes += listing.notes
    return file.model_copy(update={"path": listing.address})


def members(address: str) -> list[DataFile]:
    """The files of an address, each read where it is: on this machine, or by ranges.

    Raises DataError for one that `pin` has not seen in this process and that is not on this machine either.
    """
    if not address.startswith(HUB):
        return [DataFile(path=file.address) for file in _LISTED.get(address) or [remote.known(address)]]
    listing = hub.remembered(address)
    found = []
    for file in [remote.known(address)] if listing is None else listing.files:
        place = file.cached()
        if place is not None:
            remote.register(file)
        found.append(DataFile(path=file.address).at_place(place or remote.known(file.address).address))
    return found


_LISTED: dict[str, list[RemoteFile]] = {}
"""Files of addresses outside the hub, as `pin` found them in this process."""


def _list_files(address: str, *, offline: bool) -> list[RemoteFile]:
    """The files of an address of any file system: one, those of a folder, or those of a pattern."""
    if offline and not address.startswith(("file://", "memory://")):
        raise DataError(f"{address}: it is not on this machine, and --offline forbids to fetch it. Use a local file.")
    fs, path = remote.file_system(address)
    try:
        fs.invalidate_cache()
        if _MAGIC.search(path):
            paths = [one for one in fs.glob(path) if suffix_of(one) in SUFFIXES]
        else:
            paths = [one for one in fs.find(path) if one == path or suffix_of(one) in SUFFIXES]
        found = [
            RemoteFile(fs.unstrip_protocol(one), int(fs.info(one)["size"]), f"listed as {fs.ukey(one)}")
            for one in sorted(map(str, paths))
        ]
    except Exception as error:  # of a dozen libraries, one a file system
        way = "Check the address, and that this machine may read it"
        raise DataError(f"{address}: it cannot be listed ({type(error).__name__}: {reason(error)}). {way}.") from error
    if not found:
        raise DataError(f"{address}: no file of rows is there: JSON lines, JSON, CSV or Parquet. Check the address.")
    _LISTED[address] = found
    for file in found:
        remote.register(file)
    return found


def fetch(data: Data, on_progress: OnProgress) -> None:
    """Download the data's files into the hub's cache if half of the free disk has room for them.

    Those that do not fit, and those of other file systems, stay where they are: `dataset.build` takes one at a time.
    Raises DataError if one cannot be fetched; what has arrived is not fetched again. StorageError.
    """
    files = [file for side in SIDES for file in getattr(data, side) if is_address(file.at)]
    missing = [remote.known(one.path) for file in files for one in members(file.at) if is_address(one.at)]
    if not missing:
        return
    total, done = _sum(missing), 0
    words = f"data: {plural(len(missing), 'file')}, {size(total)}, {_cost(missing)}"
    on_progress(words, 0, total)
    if not _fit(missing):
        return
    for file in missing:
        arrived = 0

        def tick(num: int, of: int = file.num_bytes, before: int = done) -> None:
            nonlocal arrived
            arrived = min(arrived + num, of)
            on_progress(words, before + arrived, total)

        remote.download(file, None, tick)
        done += file.num_bytes
        on_progress(words, done, total)


def _cost(files: Sequence[RemoteFile]) -> str:
    """The cost of reading these files: bytes to download, and bytes of disk."""
    missing = [file for file in files if file.cached() is None]
    if not missing:
        return "all here"
    if _fit(missing):
        return f"{size(_sum(missing))} to download, kept in the hub's cache"
    most = max(file.num_bytes for file in missing)
    return (
        f"streamed: {size(_sum(missing))} to download, of which at most {size(most + PART_BYTES)} are on the disk at "
        "a time; encoded rows need up to twice their size while they are put together"
    )


def _fit(missing: Sequence[RemoteFile]) -> bool:
    """Whether files are kept: all are of the hub, and their place has room."""
    if not all(file.repo for file in missing):
        return False
    from huggingface_hub.constants import HF_HUB_CACHE

    cache = Path(HF_HUB_CACHE)
    place = next(folder for folder in (cache, *cache.parents) if folder.exists())
    return _sum(missing) <= DISK_SHARE * shutil.disk_usage(place).free


def _sum(files: Sequence[RemoteFile]) -> int:
    return sum(file.num_bytes for file in files)
