"""Data by address: which files are meant, what fetching them costs, and the fetching, if they fit on the disk.

Data sets of the hub are pinned to a commit. The part of `GRAMMAR` before the question mark is huggingface_hub's
own; `path` names a file, a folder or a pattern (data/train-*). Without it, the README names subsets and splits
in its `configs:`, or else the files do by their names.
"""

from __future__ import annotations

import errno
import hashlib
import os
import posixpath
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from glob import has_magic
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast
from urllib.parse import parse_qsl, urlencode

import orjson

from tunesmith.data.detect_format import DOCUMENTS, SUFFIXES, is_about, suffix_of
from tunesmith.data.problems import refusal
from tunesmith.environment.hub import hub_failures, why_refused
from tunesmith.environment.packages import install_command
from tunesmith.errors import DataError, StorageError, one_line
from tunesmith.phrases import did_you_mean, listed, plural, size
from tunesmith.recipe.schema import Data, DataFile
from tunesmith.runs.atomic import TEMPORARY, clean, free_bytes, storing, write_atomic
from tunesmith.types import Aside

HUB = "hf://"
GRAMMAR = "hf://datasets/owner/name[@revision][/path][?subset=S&split=T]"
DATA_SIDES = ("train", "eval", "replay")
DISK_SHARE = 0.5
"""Most of the free disk that downloads may take: encoded rows and checkpoints need the rest."""
STALE_DOWNLOAD_S = 86400.0
"""Age at which a downloaded file that is to be removed counts as left over from a killed process."""
_SPLITS = {"train": "train training", "validation": "validation valid val dev", "test": "test testing eval evaluation"}
"""Words in the names of files that say their split, as in the library datasets."""
_SECRET = re.compile(r"\b(?!github:)([\w+.-]+)://[^/@]*:[^/@]*@")  # github://owner:name@revision has none
_HUB_PAGE = re.compile(r"https?://(?:huggingface|hf)\.co/datasets/([^/?#]+/[^/?#]+)")
_HUB_FILE = re.compile(r"hf://datasets/(?P<repo_id>[^/]+/[^/@]+)@(?P<revision>[0-9a-f]{40})/(?P<filename>.+)")


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file at an address; of the hub, hf://datasets/owner/name@commit/path."""

    address: str
    num_bytes: int
    version: str
    """Changes with the content: its SHA-256 where that is known, else a hash of the hub or the file system."""
    is_kept: bool = False
    """Downloads go into the hub's cache and stay there."""

    def cached(self) -> str | None:
        """Its place in the hub's cache, if it is there."""
        from huggingface_hub import try_to_load_from_cache

        on_hub = _HUB_FILE.fullmatch(self.address)
        path = try_to_load_from_cache(**on_hub.groupdict(), repo_type="dataset") if on_hub else None
        return path if isinstance(path, str) else None


REGISTERED: dict[str, Sequence[RemoteFile]] = {}
"""A cache: the files of each address that was listed in this process, and each of them by its own."""


def is_address(path: str) -> bool:
    """Whether a path is an address, such as hf://datasets/owner/name or s3://bucket/rows.jsonl."""
    return "://" in path


def register(address: str, files: Sequence[RemoteFile]) -> None:
    """Register the files of an address, so that they may be opened."""
    REGISTERED.update({address: files, **{file.address: [file] for file in files}})


def registered(address: str) -> Sequence[RemoteFile]:
    """The files of an address that `pin` has seen in this process, or that are all on this machine. Raises
    DataError for another."""
    if address not in REGISTERED:
        listing = _remembered(address)
        if listing is None or not all(file.cached() for file in listing[1]):
            message = "it is not on this machine, and nothing is fetched here."
            raise refusal(address, 0, "not_here", message, "Download it, and use the local file.")
        register(*listing)
    return REGISTERED[address]


def known(address: str) -> RemoteFile:
    """Facts about a file of a registered address. Raises DataError for another."""
    return registered(address)[0]


def size_of(path: str) -> int:
    """Bytes of a file, wherever it is; 0: it is not there."""
    if is_address(path):
        return known(path).num_bytes
    with suppress(OSError, ValueError):
        return os.stat(path).st_size
    return 0


def pin(data: Data, *, offline: bool) -> tuple[Data, list[str]]:
    """The data with every address of the hub pinned to a commit, and what is said of it.

    Data without an address is returned as it is, and no server is contacted. Raises DataError for an address
    that cannot be used.
    """
    files = {file.at: file for side in DATA_SIDES for file in getattr(data, side) if is_address(file.at)}
    if not files:
        return data, []
    from huggingface_hub.constants import HF_HUB_CACHE

    others: dict[str, list[str]] = {at: [] for at in files}
    listings = {at: find_files(at, others[at], offline=offline) for at in files}
    missing = {at: [remote for remote in listing if remote.cached() is None] for at, (_, listing) in listings.items()}
    of_hub = {remote.address: remote for at, remotes in missing.items() if at.startswith(HUB) for remote in remotes}
    if offline and of_hub:
        raise DataError(f"{next(iter(of_hub))}: not downloaded yet, and --offline forbids it. Run once without.")
    have_room, notes = _sum(of_hub.values()) <= DISK_SHARE * free_bytes(Path(HF_HUB_CACHE)), list[str]()
    for at, file in files.items():
        address, listing = listings[at]
        is_kept = have_room and address.startswith(HUB)
        register(address, [replace(remote, is_kept=is_kept) for remote in listing])
        pinned = f"pinned to {address}: " if address != at else ""
        facts = f"{plural(len(listing), 'file')}, {size(_sum(listing))}, {_cost(missing[at], is_kept=is_kept)}"
        notes += [Aside(f"{file.path}: {pinned}{facts}"), *others[at]]

    def at_commit(file: DataFile) -> DataFile:
        return file.model_copy(update={"path": listings[file.at][0]}) if file.at in listings else file

    return data.model_copy(update={side: tuple(map(at_commit, getattr(data, side))) for side in DATA_SIDES}), notes


def short_name(path: str) -> str:
    """The name of a data file, folder or data set, for a person."""
    return str(_parts(path)[0].id).rpartition("/")[2] if path.startswith(HUB) else Path(path).name


def _cost(missing: Sequence[RemoteFile], *, is_kept: bool) -> str:
    """The cost of reading files of which some are missing here: bytes to download, and bytes of disk."""
    if not missing:
        return "all here"
    if is_kept:
        return f"{size(_sum(missing))} to download, kept in the hub's cache"
    disk = f"the disk needs {size(max(file.num_bytes for file in missing))} for a file, and twice the encoded rows"
    return f"streamed: {size(_sum(missing))} to download, the first file once or twice more; {disk}"


def _sum(files: Iterable[RemoteFile]) -> int:
    return sum(file.num_bytes for file in files)


def find_files(text: str, notes: list[str], *, offline: bool) -> tuple[str, Sequence[RemoteFile]]:
    """An address, of the hub with its commit, and its files in their order. Of a commit that was
    listed before, and offline, no server is contacted. Raises DataError for what is not an address,
    is not there or may not be read."""
    from huggingface_hub.constants import is_offline_mode

    if secret := _SECRET.search(text):
        raise DataError(
            f"{secret[1]}://…@{text[secret.end() :]}: has a password, which the run's files and its report "
            f"would have too. Take it out, and set FSSPEC_{secret[1].upper()}_USERNAME and _PASSWORD, which "
            "fsspec reads. A run that was made with it ends with the version that began it, or is made again."
        )
    if page := _HUB_PAGE.match(text):
        raise DataError(f"{text}: a page of the hub. The data set is hf://datasets/{page[1]}.")
    is_hub = text.startswith(HUB)
    parts: tuple[Any, dict[str, str]] = _parts(text) if is_hub else (None, {})
    offline_by = "--offline" if offline else "HF_HUB_OFFLINE" if is_hub and is_offline_mode() else ""
    listing = _remembered(text)
    if listing and (offline_by or listing[0] == text):
        return listing
    if offline_by and not text.startswith(("file://", "memory://")):
        known_as = f"listed only as {listed(others, 20)}" if (others := _listed_as(parts[0])) else "never listed"
        raise DataError(f"{text}: {known_as} on this machine, and {offline_by} forbids more. Run once without.")
    try:
        if not is_hub:
            file_system(text)[0].invalidate_cache()
            return text, _rows_at(text, [text])
        address, files = _ask(*parts, notes)
    except Exception as error:  # of a dozen libraries, one a file system
        if isinstance(error, DataError) or (is_hub and not isinstance(error, hub_failures())):
            raise
        why = f"it cannot be listed ({type(error).__name__}: {one_line(error)}). Check it, and your right to read it."
        why = why_refused(error, parts[0].id, "dataset", parts[0].revision) if is_hub else why
        raise DataError(f"{text}: {why}") from error
    for name in {text, address}:
        with suppress(OSError, StorageError):  # a home that cannot be written to: it is listed again
            write_atomic(_listing_path(name), orjson.dumps([address, files, name]))
    return address, files


def _listing_path(name: str) -> Path:
    from huggingface_hub import cached_assets_path

    digest = hashlib.sha256(name.encode()).hexdigest()[:32]
    return Path(cached_assets_path("tunesmith", "datasets", "files")) / f"{digest}.json"


def _remembered(text: str) -> tuple[str, Sequence[RemoteFile]] | None:
    """The files of an address of the hub that was listed before on this machine."""
    with suppress(OSError, ValueError, TypeError):
        address, files, *_ = orjson.loads(_listing_path(text).read_bytes())
        return address, [RemoteFile(**file) for file in files]
    return None


def _listed_as(uri: Any) -> list[str]:
    """The addresses under which a data set of the hub was listed before on this machine."""
    names: set[str] = set()
    for path in _listing_path("").parent.glob("*.json") if uri else ():
        with suppress(OSError, ValueError, TypeError):
            address, _, *name = orjson.loads(path.read_bytes())
            names |= {*name, address} if _parts(address)[0].id == uri.id else set()
    return sorted(names, key=lambda name: (len(name), name))  # those with a commit last


def _parts(text: str) -> tuple[Any, dict[str, str]]:
    """The `HfUri` of an address of the hub, and its {"subset", "split"}. Raises DataError for another form."""
    from huggingface_hub import parse_hf_uri
    from huggingface_hub.errors import HfUriError

    place, _, query = text.partition("?")
    pairs = parse_qsl(query, keep_blank_values=True)
    words = dict(pairs)
    try:
        uri = parse_hf_uri(place.rstrip("/"))
    except HfUriError as error:
        why = error.msg.strip().rstrip(".")
        raise DataError(f"{text}: not the address of a data set ({why}). Write {GRAMMAR}.") from None
    if unknown := [word for word in words if word not in ("subset", "split")]:
        near = did_you_mean(unknown[0], ("subset", "split"))
        raise DataError(f"{text}: {unknown[0]!r} is neither subset nor split.{near} Write {GRAMMAR}.")
    is_odd = (uri.path_in_repo and words) or len(pairs) > len(words)
    if uri.type != "dataset" or is_odd:
        raise DataError(f"{text}: not the address of a data set, with a path or a subset and split. Write {GRAMMAR}.")
    return uri, words


def _address(uri: Any, words: Mapping[str, str]) -> str:
    return f"{uri.to_uri()}?{urlencode(words)}" if words else str(uri.to_uri())


def _ask(uri: Any, words: dict[str, str], notes: list[str]) -> tuple[str, Sequence[RemoteFile]]:
    from huggingface_hub import HfApi

    info = HfApi().dataset_info(uri.id, revision=uri.revision)
    if info.gated:
        HfApi().auth_check(uri.id, repo_type="dataset")
    typed, uri = _address(uri, words), replace(uri, revision=str(info.sha))
    if uri.path_in_repo:
        return uri.to_uri(), _rows_at(typed, [uri.to_uri()])
    configs = (info.card_data.get("configs") if info.card_data else None) or ()
    subsets = {str(entry.get("config_name", "default")): entry for entry in configs}
    if subsets or words.get("subset"):
        usual = next((name for name, config in subsets.items() if config.get("default")), "default")
        words["subset"] = _chosen(typed, "subset", words, subsets, usual)
    config = subsets[words["subset"]] if subsets else {}
    folder = posixpath.normpath(f"/{config.get('data_dir') or ''}")  # it may be written as ./en/ too
    root, patterns = f"{uri.to_uri()}{folder}".rstrip("/"), _patterns(config.get("data_files") or ())
    by_name = {} if patterns else _by_name(typed, root, notes)
    words["split"] = split = _chosen(typed, "split", words, patterns or by_name, "train")
    if others := [name for name in patterns or by_name if name != split]:
        notes.append(f"{uri.id}: the split {split} is read; others: {listed(others)}")
    files = by_name[split] if by_name else _rows_at(typed, [f"{root}/{pattern}" for pattern in patterns[split]])
    return _address(uri, words), files


def _patterns(given: Any) -> dict[str, list[str]]:
    """Patterns of paths by split, of any form that `data_files` has in a README."""
    by_split: dict[str, list[str]] = {}
    for pattern in [given] if isinstance(given, str) else given:
        split, path = (pattern["split"], pattern["path"]) if isinstance(pattern, Mapping) else ("train", pattern)
        by_split.setdefault(str(split), []).extend([path] if isinstance(path, str) else path)
    return by_split


def _by_name(given: str, root: str, notes: list[str]) -> dict[str, list[RemoteFile]]:
    """Files by split, from words in their names. Where no name has such a word, all are the split train."""
    splits: dict[str, list[RemoteFile]] = {}
    for file in _rows_at(given, [root]):
        folder, _, name = file.address.removeprefix(root).lower().rpartition("/")
        words = re.findall("[a-z]+", f"{name} {folder}")
        named = (split for word in words for split, ours in _SPLITS.items() if word in ours.split())
        splits.setdefault(next(named, ""), []).append(file)
    if len(splits) > 1 and (others := splits.pop("", [])):
        names = listed(file.address.removeprefix(f"{root}/") for file in others)
        notes.append(f"{given}: {names}: not of a split by name, and not read")
    return {name or "train": files for name, files in splits.items()}


def _chosen(given: str, what: str, words: Mapping[str, str], names: Iterable[str], usual: str) -> str:
    """The subset or split that was named, or the obvious one if none was. Raises DataError."""
    names, named = list(names), words.get(what)
    if named in names:
        return str(named)
    if named is None and (len(names) == 1 or usual in names):
        return names[0] if len(names) == 1 else usual
    why = f"no {what} {named!r}" if named else f"it has {len(names)} {what}s, and none is the usual one"
    raise DataError(f"{given}: {why}. There are: {listed(names, 20) or 'none'}. Choose by ?{what}=NAME.")


def _rows_at(given: str, addresses: Iterable[str]) -> list[RemoteFile]:
    """The files of rows at addresses, each a file, a folder or a pattern, in the order of addresses and names.

    Raises DataError where there are none, for the address `given`, and whatever a file system raises.
    """
    by_address: dict[str, RemoteFile] = {}
    others: list[str] = []
    for address in addresses:
        fs, path = file_system(address)
        first, mark, rest = address.partition("::")  # zip://*.jsonl::s3://bucket/rows.zip
        chain = mark + rest if "://" in first else ""
        entries = fs.glob(path, detail=True) if has_magic(path) else fs.find(path, detail=True)
        for name, facts in sorted(entries.items()):
            if name != path and not _is_rows(name):
                others.append(os.path.basename(name))
            elif facts["type"] == "file":
                small = f"git {facts['blob_id']}" if "blob_id" in facts else f"listed as {fs.ukey(name)}"
                version = str(facts["lfs"]["sha256"]) if facts.get("lfs") else small
                remote = RemoteFile(fs.unstrip_protocol(name) + chain, int(facts["size"]), version)
                by_address.setdefault(remote.address, remote)
    if not by_address:
        held = f" It holds {listed(others)}." if others else _near(fs, path)
        if given.startswith(HUB) and "There are: " not in held:
            held += " The hub may have converted it: @refs/convert/parquet."
        raise DataError(f"{given}: no file of rows is there: JSON lines, JSON, CSV or Parquet.{held}")
    return list(by_address.values())


def _near(fs: Any, path: str) -> str:
    """The files of rows in the folder of a path that is not there; on the hub, else in its repository."""
    folder, repository = path.partition("*")[0].rpartition("/")[0], "/".join(path.split("/")[:3])
    for place, depth in ((folder, {"maxdepth": 1}), *([(repository, {})] if fs.protocol == "hf" else [])):
        with suppress(OSError):  # of the folder too, there may be nothing
            root = f"{repository if fs.protocol == 'hf' else place}/"
            if names := sorted(name.removeprefix(root) for name in fs.find(place, **depth) if _is_rows(name)):
                return f"{did_you_mean(path.removeprefix(root), names)} There are: {listed(names, 20)}."
    return ""


def _is_rows(path: str) -> bool:
    name = path.rpartition("/")[2]
    return suffix_of(path) in (*SUFFIXES, *DOCUMENTS) and not name.startswith((".", "_")) and not is_about(name)


def file_system(address: str) -> tuple[Any, str]:
    """The file system of an address, and the path in it. Raises DataError where its package is not installed,
    and for a kind that fsspec does not know."""
    import fsspec

    try:
        return cast("tuple[Any, str]", fsspec.core.url_to_fs(address))
    except ImportError as error:
        lacking, cloud = getattr(error.__cause__, "name", None) or "", install_command("cloud")
        is_named = lacking in str(error) and lacking not in cloud
        way = f"pip install {lacking}" if is_named else f"for s3:// and gs://, {cloud}"
        why = f"a package is not installed ({error}). Download the data, or install it: {way}"
        raise DataError(f"{address}: {why}") from error
    except ValueError as error:
        if not (unknown := re.fullmatch("Protocol not known: (.*)", str(error))):
            raise
        near = did_you_mean(unknown[1].lower(), fsspec.available_protocols())
        kinds = f"no such kind of address.{near} There are {HUB}, s3://, gs:// and others of fsspec."
        raise DataError(f"{address}: {unknown[1]}://: {kinds}") from error


def is_elsewhere(file: DataFile) -> bool:
    """Whether a file has to be fetched to be read."""
    return is_address(file.at) and known(file.at).cached() is None


@contextmanager
def local(address: str) -> Iterator[str]:
    """A registered file on the disk: of the hub in its cache if there is room, else only while the block lasts.

    Raises DataError if it cannot be fetched; StorageError.
    """
    from huggingface_hub import cached_assets_path

    file, folder = known(address), Path(cached_assets_path("tunesmith", "datasets", "streamed"))
    if file.is_kept or file.cached():
        yield download(file)
        return
    clean(folder, older_than_s=STALE_DOWNLOAD_S)
    with storing(folder, num_bytes=file.num_bytes):
        place = TemporaryDirectory(prefix=TEMPORARY, dir=folder, ignore_cleanup_errors=True)
    with place:
        yield download(file, Path(place.name))


def download(file: RemoteFile, folder: Path | None = None) -> str:
    """Put a file into a folder, or one of the hub into its cache; continues a cut download. Returns its place.

    Raises DataError if it cannot be fetched; StorageError.
    """
    from huggingface_hub import hf_hub_download

    name = os.path.basename(file.address)
    try:
        if on_hub := _HUB_FILE.fullmatch(file.address):
            return str(hf_hub_download(**on_hub.groupdict(), repo_type="dataset", cache_dir=folder))
        fs, remote_path = file_system(file.address)
        fs.get_file(remote_path, place := os.path.join(folder or "", name))
        return place
    except Exception as error:  # of a dozen libraries, one a file system
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            with storing(folder or Path(name), num_bytes=file.num_bytes):
                raise
        way = "Start again: files that have arrived are not fetched twice."
        raise refusal(file.address, 0, "unreadable", f"it cannot be downloaded: {one_line(error)}.", way) from error
