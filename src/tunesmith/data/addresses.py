"""Data by address: which files are meant, what fetching them costs, and the fetching, if they fit on the disk.

Data sets of the hub are pinned to a commit:

    hf://datasets/owner/name[@revision][/path][?subset=S&split=T]

The part before the question mark is huggingface_hub's own form of a path. `path` names a file, a folder or a pattern
(data/train-*). Without it, subsets and splits are those of the README's `configs:`; else those in the names of the
files.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, quote, unquote, urlencode

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
    if not file.at.startswith(HUB):
        members = _list_files(file.at, offline=offline)
        notes.append(f"{file.at}: {plural(len(members), 'file')}, {size(_sum(members))}, {_cost(members)}")
        return file
    listing = find_listing(file.at, offline=offline)
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
    listing = remembered(address)
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


GRAMMAR = "hf://datasets/owner/name[@revision][/path][?subset=S&split=T]"
_ADDRESS = re.compile(
    r"hf://datasets/(?P<repo>[^/@?#]+/[^/@?#]+)(?:@(?P<revision>refs/(?:convert|pr)/[^/?]+|[^/?]+))?"
    r"(?:/(?P<path>[^?]*))?(?:\?(?P<query>.*))?"
)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SPLITS = {
    "train": re.compile(r"(?<![a-z])train(ing)?(?![a-z])"),
    "validation": re.compile(r"(?<![a-z])(validation|valid|val|dev)(?![a-z])"),
    "test": re.compile(r"(?<![a-z])(test|testing|eval|evaluation)(?![a-z])"),
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
        match = _ADDRESS.fullmatch(text)
        if match is None:
            raise DataError(f"{text}: not the address of a data set. Write {GRAMMAR}.")
        query = dict(parse_qsl(match["query"] or "", keep_blank_values=True))
        if unknown := sorted(query.keys() - {"subset", "split"}):
            raise DataError(f"{text}: ?{unknown[0]}=: an address has subset and split. Write {GRAMMAR}.")
        path = (match["path"] or "").strip("/")
        if path and query:
            raise DataError(f"{text}: a path says which files are read, and a subset or split too. Give one of both.")
        revision = match["revision"] or ""
        revision = revision if revision.startswith("refs/") else unquote(revision)
        return cls(match["repo"], revision, path, query.get("subset", ""), query.get("split", ""))

    def __str__(self) -> str:
        revision = self.revision if self.revision.startswith("refs/") else quote(self.revision, safe="")
        query = urlencode({key: value for key in ("subset", "split") if (value := getattr(self, key))})
        parts = [f"hf://datasets/{self.repo}", f"@{revision}" if revision else "", f"/{self.path}" if self.path else ""]
        return "".join(parts) + (f"?{query}" if query else "")


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
    from huggingface_hub.constants import is_offline_mode
    from huggingface_hub.errors import HFValidationError

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
    except HFValidationError as error:
        raise DataError(f"{text}: {address.repo} is no hub id ({reason(error)}). Check the spelling.") from error
    except hub_failures() as error:
        way = " --offline reads what was downloaded before." if remembered(text) else ""
        raise DataError(f"{text}: {why_refused(error, address.repo, 'dataset', address.revision)}{way}") from error
    for name in {str(address), listing.address}:
        with suppress(OSError, StorageError):  # a home that cannot be written to: it is asked for again
            write_atomic(_listing_path(name), orjson.dumps(asdict(listing)))
    return listing


def _listing_path(name: str) -> Path:
    from huggingface_hub import cached_assets_path

    digest = hashlib.sha256(name.encode()).hexdigest()[:32]
    return Path(cached_assets_path("tunesmith", "datasets", "listings")) / f"{digest}.json"


def remembered(text: str) -> Listing | None:
    """The listing of an address that was asked for before on this machine."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        kept = orjson.loads(_listing_path(str(HubAddress.parse(text))).read_bytes())
        return Listing(kept["address"], tuple(RemoteFile(**file) for file in kept["files"]), tuple(kept["notes"]))
    return None


def _ask(address: HubAddress) -> Listing:
    from huggingface_hub import HfApi

    info = HfApi().dataset_info(address.repo, revision=address.revision or None)
    if info.gated:
        HfApi().auth_check(address.repo, repo_type="dataset")
    address = replace(address, commit=str(info.sha))
    if address.path:
        return Listing(address.pinned, _files(address, [address.path]))
    configs = (info.card_data.get("configs") if info.card_data else None) or ()
    configs = [one for one in configs if isinstance(one, Mapping) and one.get("data_files")]
    if configs:
        return _of_configs(address, configs)
    return _by_name(address)


def _of_configs(address: HubAddress, configs: Sequence[Mapping[str, Any]]) -> Listing:
    """By the README's `configs:`."""
    by_name = {str(config.get("config_name", "default")): config for config in configs}
    preferred = next((name for name, config in by_name.items() if config.get("default")), "default")
    subset = _chosen(address, "subset", by_name, preferred)
    splits = _patterns(by_name[subset]["data_files"], str(by_name[subset].get("data_dir") or ""))
    split = _chosen(address, "split", splits, "train")
    chosen = replace(address, subset=subset, split=split)
    return Listing(chosen.pinned, _files(address, splits[split]), _others(chosen, splits))


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
    tree = _tree(address, "")
    splits: dict[str, list[RemoteFile]] = {}
    for file in tree:
        if _is_rows(file.path):
            folder, _, name = file.path.lower().rpartition("/")
            words = (split for text in (name, folder) for split, word in _SPLITS.items() if word.search(text))
            splits.setdefault(next(words, ""), []).append(file)
    if not splits:
        raise _no_rows(address, tree)
    others = splits.pop("", []) if len(splits) > 1 else []
    splits = {name or "train": found for name, found in splits.items()}
    split = _chosen(address, "split", splits, "train")
    left = f"{address.repo}: {listed(file.path for file in others)}: not of a split by name, and not read"
    chosen = replace(address, split=split)
    notes = (*_others(chosen, splits), *([left] if others else []))
    return Listing(chosen.pinned, tuple(splits[split]), notes)


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


def _files(address: HubAddress, patterns: Sequence[str]) -> tuple[RemoteFile, ...]:
    """The files of rows that patterns name, each once, in the order of patterns and names."""
    from fsspec.utils import glob_translate

    found: dict[str, RemoteFile] = {}
    seen: list[RemoteFile] = []
    for pattern in patterns:
        magic = _MAGIC.search(pattern)
        is_meant = re.compile(glob_translate(pattern)) if magic else None
        for file in _tree(address, pattern[: magic.start()].rpartition("/")[0] if magic else pattern):
            if is_meant is None or is_meant.fullmatch(file.path):
                seen.append(file)
                if file.path == pattern or _is_rows(file.path):
                    found.setdefault(file.path, file)
    if not found:
        raise _no_rows(address, seen)
    return tuple(found.values())


def _tree(address: HubAddress, prefix: str) -> list[RemoteFile]:
    """All files below a folder, or the file of that path, by name."""
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    api, at = HfApi(), {"revision": address.commit, "repo_type": "dataset"}
    entries = api.get_paths_info(address.repo, [prefix], **at) if prefix else None
    if entries is None or (entries and not isinstance(entries[0], RepoFile)):
        entries = api.list_repo_tree(address.repo, prefix or None, recursive=True, **at)
    files = sorted((entry for entry in entries if isinstance(entry, RepoFile)), key=lambda file: str(file.path))
    base = HubAddress(address.repo, commit=address.commit)
    return [
        RemoteFile(
            replace(base, path=file.path).pinned,
            int(file.size),
            file.lfs.sha256 if file.lfs else f"git {file.blob_id}",
            address.repo,
            address.commit,
            file.path,
        )
        for file in files
    ]


def _is_rows(path: str) -> bool:
    name = path.rpartition("/")[2]
    return suffix_of(path) in (*SUFFIXES, *DOCUMENTS) and not name.startswith((".", "_")) and not is_about(name)


def _no_rows(address: HubAddress, seen: Sequence[RemoteFile]) -> DataError:
    held = f" It holds {listed(file.path for file in seen)}." if seen else ""
    way = (
        f" The hub may have converted it: {HubAddress(address.repo, CONVERTED)}/SUBSET/SPLIT"
        if not address.path
        else ""
    )
    return DataError(f"{address}: no file of rows is there: JSON lines, JSON, CSV or Parquet.{held}{way}")
