"""Data sets of the hub: an address, pinned to a commit, as a list of files.

    hf://datasets/owner/name[@revision][/path][?subset=S&split=T]

The part before the question mark is huggingface_hub's own form of a path. `path` names a file, a folder or a pattern
(data/train-*). Without it, subsets and splits are those of the README's `configs:`; else those of the branch
refs/convert/parquet, into which the hub converts data sets; else those in the names of the files.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, quote, unquote, urlencode

import orjson

from tunesmith.data.detect_format import DOCUMENTS, SUFFIXES, is_about, suffix_of
from tunesmith.data.remote import RemoteFile, reason
from tunesmith.errors import DataError, StorageError
from tunesmith.formatting import listed
from tunesmith.hub_errors import hub_failures, why_refused
from tunesmith.runs.atomic import write_atomic

GRAMMAR = "hf://datasets/owner/name[@revision][/path][?subset=S&split=T]"
CONVERTED = "refs/convert/parquet"
_ADDRESS = re.compile(
    r"hf://datasets/(?P<repo>[^/@?#]+/[^/@?#]+)(?:@(?P<revision>refs/(?:convert|pr)/[^/?]+|[^/?]+))?"
    r"(?:/(?P<path>[^?]*))?(?:\?(?P<query>.*))?"
)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_MAGIC = re.compile(r"[*?\[]")
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
    return (None if address.revision else _converted(address)) or _by_name(address)


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


def _converted(address: HubAddress) -> Listing | None:
    """By the branch into which the hub converts data sets: subset/split/0000.parquet; None: there is no such branch."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RevisionNotFoundError

    try:
        branch = replace(address, commit=str(HfApi().dataset_info(address.repo, revision=CONVERTED).sha))
    except RevisionNotFoundError:
        return None
    subsets: dict[str, dict[str, str]] = {}
    for subset, folder, *_ in (file.path.split("/") for file in _tree(branch, "") if file.path.count("/") == 2):
        subsets.setdefault(subset, {})[folder.removeprefix("partial-")] = folder
    if not subsets:
        return None
    subset = _chosen(address, "subset", subsets, "default")
    split = _chosen(address, "split", subsets[subset], "train")
    folder = subsets[subset][split]
    part = f", which has only the beginning of the split {split}: give a path to read all" if folder != split else ""
    note = f"{address.repo} has no list of splits: read from its branch {CONVERTED}{part}"
    chosen = HubAddress(address.repo, path=f"{subset}/{folder}/*.parquet", commit=branch.commit)
    others = _others(replace(address, subset=subset, split=split), subsets[subset])
    return Listing(chosen.pinned, _files(chosen, [chosen.path]), (note, *others))


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
    return DataError(f"{address}: no file of rows is there: JSON lines, JSON, CSV or Parquet.{held}")
