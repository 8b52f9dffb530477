"""Data by address: which files are meant, what fetching them costs, and the fetching, if they fit on the disk.

Data sets of the hub are pinned to a commit:

    hf://datasets/owner/name[@revision][/path][?subset=S&split=T]

The part before the question mark is huggingface_hub's own form of a path. `path` names a file, a folder or a pattern
(data/train-*). Without it, subsets and splits are those of the README's `configs:`; else those in the names of the
files.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlencode

import orjson

from tunesmith.data import remote
from tunesmith.data.detect_format import DOCUMENTS, SUFFIXES, is_about, suffix_of
from tunesmith.data.remote import PART_BYTES, RemoteFile, is_address, reason
from tunesmith.errors import DataError, StorageError, hub_failures, why_refused
from tunesmith.phrases import listed, plural, size
from tunesmith.recipe.schema import Data, DataFile
from tunesmith.runs.atomic import write_atomic

OnProgress = Callable[[str, int, int], None]
"""(what is done, bytes done, bytes in all)"""

HUB = "hf://"
CONVERTED = "refs/convert/parquet"
"""Branch into which the hub converts data sets: subset/split/0000.parquet."""
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
        return HubAddress.parse(path).repo.rpartition("/")[2]
    return Path(path).name


def _pinned(file: DataFile, notes: list[str], *, offline: bool) -> DataFile:
    if not is_address(file.at):
        return file
    listing = find_listing(file.at, offline=offline)
    missing = [one for one in listing.files if one.cached() is None]
    if offline and missing and file.at.startswith(HUB):
        raise DataError(f"{missing[0].address}: not downloaded yet, and --offline forbids it. Run once without.")
    remote.register(listing.address, listing.files)
    counted = f"{plural(len(listing.files), 'file')}, {size(_sum(listing.files))}, {_cost(missing)}"
    pinned = f"pinned to {listing.address}: " if listing.address != file.at else ""
    notes += [f"{file.path}: {pinned}{counted}", *listing.notes]
    return file.model_copy(update={"path": listing.address})


def members(address: str) -> list[DataFile]:
    """The files of an address, each read where it is: on this machine, or by ranges.

    Raises DataError for one that `pin` has not seen in this process and that is not on this machine either.
    """
    listing = None if address in remote.REGISTERED else remembered(address)
    if listing is not None and all(file.cached() for file in listing.files):
        remote.register(address, listing.files)
    return [DataFile(path=file.address).at_place(file.cached() or file.address) for file in remote.registered(address)]


def fetch(data: Data, on_progress: OnProgress) -> None:
    """Download the data's files into the hub's cache if half of the free disk has room for them.

    Those that do not fit, and those of other file systems, stay where they are: `dataset.build` takes one at a time.
    Raises DataError if one cannot be fetched; what has arrived is not fetched again. StorageError.
    """
    files = [file for side in SIDES for file in getattr(data, side) if is_address(file.at)]
    missing = [remote.known(one.path) for file in files for one in members(file.at) if is_address(one.at)]
    if not missing:
        return
    total, arrived = _sum(missing), 0
    words = f"data: {plural(len(missing), 'file')}, {size(total)}, {_cost(missing)}"

    def tick(num: int) -> None:
        nonlocal arrived
        arrived = min(arrived + num, total)
        on_progress(words, arrived, total)

    tick(0)
    if _fit(missing):
        for file in missing:
            remote.download(file, None, tick)
        tick(total)


def _cost(missing: Sequence[RemoteFile]) -> str:
    """The cost of reading files of which these are missing: bytes to download, and bytes of disk."""
    if not missing:
        return "all here"
    if _fit(missing):
        return f"{size(_sum(missing))} to download, kept in the hub's cache"
    most = size(max(file.num_bytes for file in missing) + PART_BYTES)
    return (
        f"streamed: {size(_sum(missing))} to download, of which at most {most} are on the disk at a time; encoded rows "
        "need up to twice their size while they are put together"
    )


def _fit(missing: Sequence[RemoteFile]) -> bool:
    """Whether files are kept: all are of the hub, and their place has room."""
    if not all(file.address.startswith(HUB) for file in missing):
        return False
    from huggingface_hub.constants import HF_HUB_CACHE

    cache = Path(HF_HUB_CACHE)
    place = next(folder for folder in (cache, *cache.parents) if folder.exists())
    return _sum(missing) <= DISK_SHARE * shutil.disk_usage(place).free


def _sum(files: Sequence[RemoteFile]) -> int:
    return sum(file.num_bytes for file in files)


GRAMMAR = "hf://datasets/owner/name[@revision][/path][?subset=S&split=T]"
_COMMIT = re.compile(r"[0-9a-f]{40}")
_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
"""Splits by words in the names of files, as in the library datasets."""


@dataclass(frozen=True, slots=True)
class HubAddress:
    """The parts of an address."""

    repo: str
    revision: str = ""
    path: str = ""
    subset: str = ""
    split: str = ""
    commit: str = ""
    """Commit that `revision` is now; not part of the text."""

    @property
    def pinned(self) -> str:
        """The address with its commit as its revision."""
        return str(replace(self, revision=self.commit))

    @classmethod
    def parse(cls, text: str) -> HubAddress:
        """Raises DataError for an address of another form."""
        from huggingface_hub import parse_hf_uri
        from huggingface_hub.errors import HfUriError

        place, _, query = text.partition("?")
        words = dict(parse_qsl(query, keep_blank_values=True))
        try:
            uri = parse_hf_uri(place.rstrip("/"))
        except HfUriError as error:
            why = error.msg.strip().rstrip(".")
            raise DataError(f"{text}: not the address of a data set ({why}). Write {GRAMMAR}.") from None
        if uri.type != "dataset" or words.keys() - {"subset", "split"}:
            raise DataError(f"{text}: not the address of a data set. Write {GRAMMAR}.")
        if uri.path_in_repo and query:
            raise DataError(f"{text}: a path says which files are read, and a subset or split too. Give one of both.")
        return cls(uri.id, uri.revision or "", uri.path_in_repo, words.get("subset", ""), words.get("split", ""))

    def __str__(self) -> str:
        from huggingface_hub import HfUri

        query = urlencode({key: value for key in ("subset", "split") if (value := getattr(self, key))})
        place = HfUri("dataset", self.repo, self.revision or None, self.path).to_uri()
        return f"{place}?{query}" if query else str(place)


@dataclass(frozen=True, slots=True)
class Listing:
    """The files of an address, in their order."""

    address: str
    """Pinned to a commit."""
    files: tuple[RemoteFile, ...]
    notes: tuple[str, ...] = ()


def find_listing(text: str, *, offline: bool) -> Listing:
    """The files of an address, pinned. Of a commit that was listed before, and `offline`, the hub is not asked.

    Raises DataError: an address of another form, a data set that is missing, gated, private or out of reach, a
    revision, subset, split or path that is not there.
    """
    if not text.startswith(HUB):
        return _of_file_system(text, offline=offline)
    from huggingface_hub.constants import is_offline_mode

    address = HubAddress.parse(text)
    is_offline = offline or is_offline_mode()
    known = remembered(text) if is_offline or _COMMIT.fullmatch(address.revision) else None
    if known is not None:
        return known
    if is_offline:
        why = "--offline" if offline else "HF_HUB_OFFLINE"
        raise DataError(f"{text}: it was never asked for on this machine, and {why} forbids that. Run once without.")
    try:
        listing = _ask(address)
    except hub_failures() as error:
        way = " --offline reads what was downloaded before." if remembered(text) else ""
        raise DataError(f"{text}: {why_refused(error, address.repo, 'dataset', address.revision)}{way}") from error
    for name in {str(address), listing.address}:
        with suppress(OSError, StorageError):  # a home that cannot be written to: it is asked for again
            write_atomic(_listing_path(name), orjson.dumps(asdict(listing)))
    return listing


def _of_file_system(address: str, *, offline: bool) -> Listing:
    if offline and not address.startswith(("file://", "memory://")):
        raise DataError(f"{address}: it is not on this machine, and --offline forbids to fetch it. Use a local file.")
    try:
        remote.file_system(address)[0].invalidate_cache()
        return Listing(address, _rows_at(address, [address]))
    except DataError:
        raise
    except Exception as error:  # of a dozen libraries, one a file system
        way = "Check the address, and that this machine may read it"
        raise DataError(f"{address}: it cannot be listed ({type(error).__name__}: {reason(error)}). {way}.") from error


def _listing_path(name: str) -> Path:
    from huggingface_hub import cached_assets_path

    digest = hashlib.sha256(name.encode()).hexdigest()[:32]
    return Path(cached_assets_path("tunesmith", "datasets", "listings")) / f"{digest}.json"


def remembered(text: str) -> Listing | None:
    """The listing of an address of the hub that was asked for before on this machine."""
    with suppress(OSError, ValueError, KeyError, TypeError, DataError):
        kept = orjson.loads(_listing_path(str(HubAddress.parse(text))).read_bytes())
        files = [RemoteFile(file["address"], file["num_bytes"], file["version"]) for file in kept["files"]]
        return Listing(kept["address"], tuple(files), tuple(kept["notes"]))
    return None


def _ask(address: HubAddress) -> Listing:
    from huggingface_hub import HfApi

    info = HfApi().dataset_info(address.repo, revision=address.revision or None)
    if info.gated:
        HfApi().auth_check(address.repo, repo_type="dataset")
    address = replace(address, commit=str(info.sha))
    if address.path:
        return Listing(address.pinned, _rows_at(address, [address.pinned]))
    configs = (info.card_data.get("configs") if info.card_data else None) or ()
    configs = [one for one in configs if isinstance(one, Mapping) and one.get("data_files")]
    if not configs:
        return _by_name(address)
    by_name = {str(config.get("config_name", "default")): config for config in configs}
    preferred = next((name for name, config in by_name.items() if config.get("default")), "default")
    subset = _chosen(address, "subset", by_name, preferred)
    splits = _patterns(by_name[subset]["data_files"], str(by_name[subset].get("data_dir") or ""))
    address = replace(address, subset=subset, split=_chosen(address, "split", splits, "train"))
    root = HubAddress(address.repo, commit=address.commit).pinned
    files = _rows_at(address, [f"{root}/{pattern}" for pattern in splits[address.split]])
    return Listing(address.pinned, files, _others(address, splits))


def _patterns(data_files: Any, folder: str) -> dict[str, list[str]]:
    """Patterns of paths by split, of any form that `data_files` has in a README."""
    found: dict[str, list[str]] = {}
    if isinstance(data_files, Mapping):
        data_files = [{"split": split, "path": path} for split, path in data_files.items()]
    for one in [data_files] if isinstance(data_files, str) else data_files:
        split, path = (one["split"], one["path"]) if isinstance(one, Mapping) else ("train", one)
        paths = [path] if isinstance(path, str) else path
        found.setdefault(str(split), []).extend("/".join(filter(None, [folder.strip("/"), name])) for name in paths)
    return found


def _by_name(address: HubAddress) -> Listing:
    """By words in the names of files; all files are the split train where no name has one."""
    if address.subset:
        raise DataError(f"{address}: this data set has no subsets. Leave ?subset= out.")
    root, splits = HubAddress(address.repo, commit=address.commit).pinned, dict[str, list[RemoteFile]]()
    for file in _rows_at(address, [root], HubAddress(address.repo, CONVERTED)):
        folder, _, name = file.address.removeprefix(root).lower().rpartition("/")
        words = re.findall("[a-z]+", f"{name} {folder}")
        splits.setdefault(next((_WORDS[word] for word in words if word in _WORDS), ""), []).append(file)
    others = splits.pop("", []) if len(splits) > 1 else []
    splits = {name or "train": found for name, found in splits.items()}
    address = replace(address, split=_chosen(address, "split", splits, "train"))
    names = listed(file.address.removeprefix(f"{root}/") for file in others)
    left = [f"{address.repo}: {names}: not of a split by name, and not read"] if others else []
    return Listing(address.pinned, tuple(splits[address.split]), (*_others(address, splits), *left))


def _chosen(address: HubAddress, what: str, names: Iterable[str], preferred: str) -> str:
    """The subset or split that was asked for, or the one that is meant if none was. Raises DataError."""
    names, given = list(names), getattr(address, what)
    if given in names:
        return str(given)
    there = f"There {'is' if len(names) == 1 else 'are'}: {listed(names, 20)}."
    if given:
        raise DataError(f"{address}: no {what} {given!r}. {there}")
    if len(names) == 1:
        return names[0]
    if preferred in names:
        return preferred
    way = replace(address, **{what: names[0]})
    raise DataError(f"{address}: it has {len(names)} {what}s, and none is the usual one. {there} Such as: {way}")


def _others(address: HubAddress, splits: Iterable[str]) -> tuple[str, ...]:
    others = [name for name in splits if name != address.split]
    if not others:
        return ()
    held_out = next((name for name in others if name in ("validation", "test")), others[0])
    return (f"other splits: {listed(others)}; to measure on one: --eval '{replace(address, split=held_out)}'",)


def _rows_at(given: object, addresses: Iterable[str], way: object = "") -> tuple[RemoteFile, ...]:
    """The files of rows at addresses, each a file, a folder or a pattern, in the order of addresses and names.

    Raises DataError where there are none, for the address `given`, and whatever a file system raises.
    """
    found: dict[str, RemoteFile] = {}
    others: list[str] = []
    for address in addresses:
        fs, path = remote.file_system(address)
        entries = fs.glob(path, detail=True) if _MAGIC.search(path) else fs.find(path, detail=True)
        for name, facts in sorted(entries.items()):
            if name != path and not _is_rows(name):
                others.append(name)
            elif facts["type"] == "file":
                one = RemoteFile(fs.unstrip_protocol(name), int(facts["size"]), _version(fs, name, facts))
                found.setdefault(one.address, one)
    if not found:
        held = f" It holds {listed(map(os.path.basename, others))}." if others else ""
        converted = f" The hub may have converted it: {way}/SUBSET/SPLIT" if way else ""
        raise DataError(f"{given}: no file of rows is there: JSON lines, JSON, CSV or Parquet.{held}{converted}")
    return tuple(found.values())


def _version(fs: Any, name: str, facts: Mapping[str, Any]) -> str:
    """Changes with a file's content: the SHA-256 of a large file of the hub, else a hash that the file system gives."""
    if facts.get("lfs"):
        return str(facts["lfs"]["sha256"])
    return f"git {facts['blob_id']}" if "blob_id" in facts else f"listed as {fs.ukey(name)}"


def _is_rows(path: str) -> bool:
    name = path.rpartition("/")[2]
    return suffix_of(path) in (*SUFFIXES, *DOCUMENTS) and not name.startswith((".", "_")) and not is_about(name)
