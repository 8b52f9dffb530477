"""Data sets of the hub by address, over HTTP against a stand-in: what is read, refused, and fetched once."""

import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import constants

from data.families import bert_like
from hub_server import hub_at, json_lines, parquet
from often import often
from tiny import CHATML, tiny_tokenizer
from tunesmith.data import addresses
from tunesmith.data.addresses import pin
from tunesmith.data.dataset import build
from tunesmith.data.encode import in_parts
from tunesmith.data.read import expand_folders, read
from tunesmith.data.renderer import Renderer
from tunesmith.errors import DataError
from tunesmith.recipe.schema import Data, DataFile, Limits
from tunesmith.tasks import TASKS
from tunesmith.types import Problem


def renderer_for(task: Any) -> Renderer:
    settings: dict[str, Any] = {"max_tokens": 200, "too_long": "cut", "control_tokens": "error"}
    if task == "classify":
        return Renderer(bert_like(), TASKS[task], kind="encoder", **settings)
    return Renderer(tiny_tokenizer(CHATML), TASKS[task], **settings)


def pin_path(address: str, *, offline: bool) -> tuple[str, list[str]]:
    data, notes = pin(Data(train=(DataFile(path=address),)), offline=offline)
    return data.train[0].path, notes


def members(address: str) -> tuple[DataFile, ...]:
    return expand_folders([DataFile(path=address)], pytest.fail)


def chat(i: int) -> dict[str, Any]:
    return {"prompt": f"question {i} " + "word " * (i % 7), "completion": f"answer {i}", "junk": "x" * 40}


@pytest.fixture
def server(tmp_path, monkeypatch):
    addresses.REGISTERED.clear()
    with hub_at(tmp_path, monkeypatch) as running:
        yield running


CONFIGS = [
    {
        "config_name": "default",
        "data_files": [{"split": "train", "path": "data/train-*"}, {"split": "test", "path": "data/test-*"}],
    },
    {"config_name": "small", "data_files": "small/*.parquet"},
]


def shards(num: int, rows: int = 5, name: str = "data/train") -> dict[str, bytes]:
    return {
        f"{name}-{i:05d}-of-{num:05d}.parquet": parquet([chat(rows * i + j) for j in range(rows)]) for i in range(num)
    }


@pytest.fixture
def chats(server):
    files = {**shards(4), **shards(1, name="data/test"), "small/a.parquet": parquet([chat(100)]), "README.md": b"x"}
    return server.dataset("acme/chats", files, card={"configs": CONFIGS})


def rows_of(address: str, **how: Any) -> list[tuple[str, Any]]:
    problems: list[Problem] = []
    pinned, _ = pin_path(address, offline=how.get("offline", False))
    found = read([DataFile(path=pinned)], limits=Limits(), on_problem=problems.append)
    rows = [(str(source), row["prompt"].split()[1]) for _, row, source in found]
    assert not problems
    return rows


def test_rows_of_all_shards_are_read_in_order_with_commit_and_row_number(chats, server):
    rows = rows_of("hf://datasets/acme/chats")
    commit = chats.branches["main"]
    assert [int(prompt) for _, prompt in rows] == list(range(20))
    assert rows[6][0] == f"hf://datasets/acme/chats@{commit}/data/train-00001-of-00004.parquet:2"


@pytest.mark.parametrize(
    ("address", "prompts"),
    [
        ("hf://datasets/acme/chats?split=test", [0, 1, 2, 3, 4]),
        ("hf://datasets/acme/chats?subset=small", [100]),
        ("hf://datasets/acme/chats/small", [100]),
        ("hf://datasets/acme/chats/small/a.parquet", [100]),
        ("hf://datasets/acme/chats/data/train-0000[12]*", list(range(5, 15))),
    ],
)
def test_subset_split_and_path_choose_files(chats, address, prompts):
    assert [int(prompt) for _, prompt in rows_of(address)] == prompts


def test_address_is_pinned_and_says_commit_size_and_other_splits(chats):
    pinned, notes = pin_path("hf://datasets/acme/chats", offline=False)
    commit = chats.branches["main"]
    assert pinned == f"hf://datasets/acme/chats@{commit}?subset=default&split=train"
    assert notes[0].startswith(f"hf://datasets/acme/chats: pinned to {pinned}: 4 files, ")
    assert notes[0].endswith("to download, kept in the hub's cache")
    assert notes[1] == "acme/chats: the split train is read; others: test"


def test_pinned_address_reads_the_same_rows_after_a_push(chats):
    pinned, _ = pin_path("hf://datasets/acme/chats", offline=False)
    before = rows_of(pinned)
    chats.push({"data/train-00000-of-00001.parquet": parquet([chat(7)])})
    addresses._listing_path(pinned).unlink()  # so that the hub is asked again
    assert rows_of(pinned) == before
    assert [int(prompt) for _, prompt in rows_of("hf://datasets/acme/chats")] == [7]


def test_listed_and_downloaded_data_needs_no_hub(chats, server):
    data, _ = pin(Data(train=(DataFile(path="hf://datasets/acme/chats"),)), offline=False)
    before, num = rows_of(data.train[0].path), len(server.requests)
    addresses.REGISTERED.clear()
    assert rows_of(data.train[0].path, offline=True) == before
    assert rows_of("hf://datasets/acme/chats", offline=True) == before
    assert len(server.requests) == num


@pytest.mark.parametrize("form", ["list", "text", "folder"])
def test_forms_of_data_files_in_a_readme(server, form):
    forms = {
        "list": {"data_files": [{"split": "train", "path": ["a.jsonl", "b.jsonl"]}]},
        "text": {"data_files": "*.jsonl"},
        "folder": {"data_files": "*.jsonl", "data_dir": "inner"},
    }
    folder = "inner/" if form == "folder" else ""
    files = {f"{folder}{name}.jsonl": json_lines([chat(i)]) for i, name in enumerate("ab")}
    server.dataset("acme/forms", {**files, "other.csv": b"a,b\n"}, card={"configs": [forms[form]]})
    assert [prompt for _, prompt in rows_of("hf://datasets/acme/forms")] == ["0", "1"]


def test_converted_branch_is_read_if_named_and_suggested_without_rows(server):
    repo = server.dataset("acme/old", {"old.py": b"x", "archive.tar": b"x"})
    repo.push({"default/train/0000.parquet": parquet([chat(1)]), "default/test/0000.parquet": parquet([chat(2)])},
              branch="refs/convert/parquet")  # fmt: skip
    with pytest.raises(DataError, match=r"no file of rows.*@refs/convert/parquet"):
        pin_path("hf://datasets/acme/old", offline=False)
    assert [prompt for _, prompt in rows_of("hf://datasets/acme/old@refs/convert/parquet")] == ["1"]
    assert [prompt for _, prompt in rows_of("hf://datasets/acme/old@refs/convert/parquet?split=test")] == ["2"]


def test_without_a_list_of_splits_the_names_of_files_say_them(server):
    files = {"train.jsonl": json_lines([chat(1)]), "dev/rows.jsonl": json_lines([chat(2)]), "notes.csv": b"a,b\n1,2\n"}
    server.dataset("acme/plain", files)
    assert [prompt for _, prompt in rows_of("hf://datasets/acme/plain")] == ["1"]
    assert [prompt for _, prompt in rows_of("hf://datasets/acme/plain?split=validation")] == ["2"]
    _, notes = pin_path("hf://datasets/acme/plain", offline=False)
    assert "hf://datasets/acme/plain: notes.csv: not of a split by name, and not read" in notes


def test_csv_and_gzip_are_read_as_local_files_are(server):
    server.dataset("acme/table", {"rows.csv": b"prompt,completion\nquestion 5,answer\n"})
    assert [prompt for _, prompt in rows_of("hf://datasets/acme/table")] == ["5"]


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("hf://datasets/acme", "not the address of a data set (Repository id must be 'namespace/name', got 'acme')"),
        ("hf://acme/chats", "not the address of a data set"),
        ("hf://datasets/acme/chats?slit=test", "Write hf://datasets/owner/name[@revision][/path][?subset=S&split=T]"),
        ("hf://datasets/acme/chats/data?split=test", "with a path or a subset and split"),
        ("hf://datasets/acme/chats?split=train&split=test", "with a path or a subset and split"),
        ("hf://datasets/acme/chats?split=tset", "no split 'tset'. There are: train, test."),
        ("hf://datasets/acme/chats?subset=big", "no subset 'big'. There are: default, small."),
        ("hf://datasets/acme/chats@v9", "no revision 'v9' on the hub. Give a branch"),
        ("hf://datasets/acme/chats/none.parquet", "no file of rows is there"),
        ("hf://datasets/acme/nothing", "no such data set on the hub"),
        ("hf://datasets/acme/-x-", "not the address of a data set ("),
        (
            "xyz://bucket/rows.jsonl",
            "xyz://: no such kind of address. There are hf://, s3://, gs:// and others of fsspec.",
        ),
        ("HF://datasets/acme/chats", "HF://: no such kind of address. Did you mean hf?"),
        ("hf://datasets/acme/chats?splt=test", "'splt' is neither subset nor split. Did you mean split? Write hf://"),
        ("memory://nothing.jsonl", "no file of rows is there"),
    ],
)
def test_wrong_addresses_are_refused_with_the_choices_there_are(chats, address, message):
    with pytest.raises(DataError) as refused:
        pin_path(address, offline=False)
    assert message in str(refused.value)
    assert str(refused.value).startswith(f"{address}: ")


def test_without_a_usual_subset_or_split_one_has_to_be_named(server):
    configs = [{"config_name": name, "data_files": f"{name}.jsonl"} for name in ("en", "de")]
    server.dataset("acme/many", {"en.jsonl": json_lines([chat(1)])}, card={"configs": configs})
    with pytest.raises(
        DataError, match=r"2 subsets, and none is the usual one. There are: en, de. Choose by \?subset="
    ):
        pin_path("hf://datasets/acme/many", offline=False)


def test_a_subset_may_be_a_folder_whose_files_say_their_splits(server):
    configs = [{"config_name": name, "data_dir": f"./{name}/"} for name in ("en", "de")]
    files = {f"{name}/{split}.jsonl": json_lines([chat(i)])
             for i, (name, split) in enumerate([("en", "train"), ("en", "test"), ("de", "train")])}  # fmt: skip
    server.dataset("acme/folders", files, card={"configs": configs})
    assert [prompt for _, prompt in rows_of("hf://datasets/acme/folders?subset=en")] == ["0"]
    assert [prompt for _, prompt in rows_of("hf://datasets/acme/folders?subset=en&split=test")] == ["1"]
    with pytest.raises(DataError, match=r"2 subsets, and none is the usual one\. There are: en, de"):
        pin_path("hf://datasets/acme/folders", offline=False)


def test_subsets_that_name_no_files_are_offered_with_those_that_do(server):
    configs = [
        {"config_name": "en", "data_files": [{"split": "train", "path": "en/rows.jsonl"}]},
        {"config_name": "de", "data_dir": "de"},
        {"config_name": "all"},
    ]
    files = {"en/rows.jsonl": json_lines([chat(0)]), "de/train.jsonl": json_lines([chat(1)]),
             "train.jsonl": json_lines([chat(2)])}  # fmt: skip
    server.dataset("acme/mixed", files, card={"configs": configs})
    with pytest.raises(DataError, match=r"3 subsets, and none is the usual one\. There are: en, de, all"):
        pin_path("hf://datasets/acme/mixed", offline=False)
    found = {name: rows_of(f"hf://datasets/acme/mixed?subset={name}") for name in ("en", "de", "all")}
    assert {name: [prompt for _, prompt in rows] for name, rows in found.items()} == {
        "en": ["0"], "de": ["1"], "all": ["1", "2"]
    }  # fmt: skip


@pytest.mark.parametrize("place", ["hf://datasets/acme/chats", "memory://chats", "zip"])
def test_a_folder_at_an_address_with_held_out_rows_is_not_trained(server, tmp_path: Path, place: str):
    import fsspec

    files = {f"data/{name}-0.jsonl": json_lines([chat(i)]) for i, name in enumerate(("train", "test"))}
    if place.startswith("hf"):
        server.dataset("acme/chats", files)
    elif place == "zip":
        with zipfile.ZipFile(tmp_path / "rows.zip", "w") as archive:
            for name, content in files.items():
                archive.writestr(name, content)
    else:
        fsspec.filesystem("memory").pipe({f"/chats/{name}": content for name, content in files.items()})
    end = f"::file://{tmp_path}/rows.zip" if place == "zip" else ""
    folder = f"zip://data{end}" if place == "zip" else f"{place}/data"
    pinned, _ = pin_path(folder, offline=False)
    with pytest.raises(
        DataError, match=r"is_folder: .*held-out rows: 'test-0.jsonl'. They would be trained"
    ) as refused:
        expand_folders([DataFile(path=pinned)], pytest.fail, trained=True)
    assert f"/data/train-0.jsonl{end} --eval " in str(refused.value).replace("zip://data", "/data")
    assert len(members(pinned)) == 2
    pattern, _ = pin_path(f"zip://data/t*{end}" if end else f"{folder}/t*", offline=False)
    assert len(expand_folders([DataFile(path=pattern)], pytest.fail, trained=True)) == 2  # as by their names


def test_a_path_that_is_not_there_is_answered_with_the_files_that_are(chats):
    for path, said in {
        "small/b.parquet": " Did you mean small/a.parquet? There are: small/a.parquet.",
        "data/trian-*": f" There are: data/test-00000-of-00001.parquet, {', '.join(shards(4))}.",
        "none/x.parquet": ", data/train-00003-of-00004.parquet, small/a.parquet.",
    }.items():
        with pytest.raises(DataError, match=r"no file of rows is there: JSON lines, JSON, CSV or Parquet\.") as refused:
            pin_path(f"hf://datasets/acme/chats/{path}", offline=False)
        assert str(refused.value).endswith(said)


def test_offline_names_the_addresses_that_were_listed(chats):
    pin_path("hf://datasets/acme/chats?subset=default&split=test", offline=False)
    for address in ("hf://datasets/acme/chats?split=test", "hf://datasets/acme/chats@main?subset=default&split=test"):
        said = rf": listed only as hf://datasets/acme/chats\?subset=default&split=test, .*@{chats.branches['main']}"
        with pytest.raises(DataError, match=said):
            pin_path(address, offline=True)
    with pytest.raises(DataError, match="never listed"):
        pin_path("hf://datasets/acme/other", offline=True)


def test_gated_data_set_says_where_terms_are_accepted(server, monkeypatch):
    server.tokens = {"mine"}
    server.dataset("acme/gated", shards(1), gated=True)
    with pytest.raises(
        DataError, match=r"gated: accept its owner's terms first: http.*/datasets/acme/gated. Then `hf auth login`"
    ):
        pin_path("hf://datasets/acme/gated", offline=False)
    monkeypatch.setenv("HF_TOKEN", "mine")
    with pytest.raises(DataError, match=r"gated: .* The token here was not granted access"):
        pin_path("hf://datasets/acme/gated", offline=False)


def test_private_data_set_needs_a_token_that_may_read_it(server, monkeypatch):
    server.tokens = {"mine", "another"}
    server.dataset("acme/private", shards(1), private=True, readers=("mine",))
    with pytest.raises(DataError, match=r"no such data set .* a private one needs `hf auth login`"):
        pin_path("hf://datasets/acme/private", offline=False)
    monkeypatch.setenv("HF_TOKEN", "another")
    with pytest.raises(DataError, match=r"the token here may not read it if it is private"):
        pin_path("hf://datasets/acme/private", offline=False)
    monkeypatch.setenv("HF_TOKEN", "expired")
    with pytest.raises(DataError, match=r"does not accept the token here"):
        pin_path("hf://datasets/acme/private", offline=False)
    server.powerless = {"weak"}
    monkeypatch.setenv("HF_TOKEN", "weak")
    with pytest.raises(DataError, match=r"the token here has no right to read it .*no permission"):
        pin_path("hf://datasets/acme/private", offline=False)
    monkeypatch.setenv("HF_TOKEN", "mine")
    assert len(rows_of("hf://datasets/acme/private")) == 5


def test_hub_out_of_reach_is_no_missing_data_set(chats, server):
    server.down = True
    with pytest.raises(DataError, match=r"the hub cannot be reached.*Check the network, or give local files\.$"):
        pin_path("hf://datasets/acme/chats", offline=False)


def test_offline_is_refused_without_a_socket(chats, no_sockets, monkeypatch):
    with pytest.raises(DataError, match="never listed on this machine, and --offline forbids"):
        pin_path("hf://datasets/acme/chats", offline=True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="HF_HUB_OFFLINE forbids"):
        pin_path("hf://datasets/acme/chats", offline=False)
    with pytest.raises(DataError, match=r"s3://b/x.jsonl: never listed .* --offline forbids"):
        pin_path("s3://b/x.jsonl", offline=True)


def test_offline_with_a_listing_but_without_the_files_is_refused(chats):
    pin_path("hf://datasets/acme/chats", offline=False)
    with pytest.raises(DataError, match=r"train-00000-of-00004.parquet: not downloaded yet, and --offline forbids"):
        pin_path("hf://datasets/acme/chats", offline=True)


def test_data_without_an_address_asks_nobody(no_sockets, tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(json_lines([chat(1)]))
    data = Data(train=(DataFile(path=str(tmp_path / "rows.jsonl")),))
    assert pin(data, offline=False) == (data, [])


def test_address_that_no_command_pinned_is_not_fetched(chats):
    """A run's data are looked up again by `serve` and `export`, which fetch nothing."""
    pinned, _ = pin_path("hf://datasets/acme/chats", offline=False)
    addresses.REGISTERED.clear()
    with pytest.raises(DataError, match="not on this machine, and nothing is fetched here"):
        members(pinned)


# Downloads and streams


def encoded(data: Data, folder: Path, problems: list[Problem] | None = None, progress: Any = None) -> Any:
    how: dict[str, Any] = {"progress": progress} if progress else {}
    hear = (problems if problems is not None else []).append
    return build(folder, data=data, files=data.train, renderer=renderer_for("generate"), on_problem=hear, **how)


def content_of(store: Any) -> list[Any]:
    return [(str(store.source(i)), store.row(i).ids.tolist(), int(store.hashes[i])) for i in range(len(store))]


def pinned_data(address: str = "hf://datasets/acme/chats", **options: Any) -> Data:
    return pin(Data(train=(DataFile(path=address),), **options), offline=False)[0]


@pytest.fixture
def full_disk(monkeypatch):
    monkeypatch.setattr(addresses, "DISK_SHARE", 0.0)


def test_downloads_of_all_sides_share_the_free_disk(server, monkeypatch):
    """Three addresses of 40 % of it each."""
    names = [f"acme/part-{i}" for i in range(3)]
    for i, name in enumerate(names):
        server.dataset(name, {"train.parquet": parquet([chat(i)])})
    addresses_ = [DataFile(path=f"hf://datasets/{name}") for name in names]
    num_bytes = [addresses.find_files(file.path, [], offline=False)[1][0].num_bytes for file in addresses_]
    usage = shutil.disk_usage("/")._replace(free=int(2.5 * max(num_bytes) / addresses.DISK_SHARE))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    _, notes = pin(Data(train=tuple(addresses_[:2]), eval=(addresses_[0],)), offline=False)
    assert [note.rpartition(", ")[2] for note in notes] == ["kept in the hub's cache"] * 2
    data, notes = pin(Data(train=tuple(addresses_[:2]), eval=(addresses_[2],)), offline=False)
    assert ["streamed: " in note for note in notes] == [True] * 3
    assert not any(addresses.known(file.path).is_kept for file in (*data.train, *data.eval))


@pytest.mark.parametrize("is_kept", often([True, False], True))
def test_download_goes_on_after_cut_connections(server, monkeypatch, is_kept):
    monkeypatch.setattr(addresses, "DISK_SHARE", 0.5 if is_kept else 0.0)
    content = parquet([chat(i) for i in range(3000)], compression="none")
    server.dataset("acme/chats", {"train.parquet": content})
    data = pinned_data()
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)  # before it tries again
    server.cut_after = [len(content) // 3, len(content) // 3]
    assert len(rows_of(data.train[0].path)) == 3000
    if is_kept:
        assert Path(members(data.train[0].path)[0].at).read_bytes() == content
    ranges = [one for one in server.downloads() if "bytes=" in one]
    assert len(ranges) == 2  # each goes on where the one before was cut


def test_download_that_failed_goes_on_with_the_files_that_are_missing(chats, server, monkeypatch):
    data, real = pinned_data(), addresses.download

    def failing(file, folder=None):
        server.down = "train-00002" in file.address
        return real(file, folder)

    monkeypatch.setattr(addresses, "download", failing)
    with pytest.raises(DataError, match=r"train-00002\S*: unreadable: it cannot be downloaded: .* not fetched twice"):
        rows_of(data.train[0].path)
    monkeypatch.setattr(addresses, "download", real)
    server.down = False
    server.requests.clear()
    assert len(rows_of(data.train[0].path)) == 20
    assert {one.split("/")[-1][:11] for one in server.downloads()} == {"train-00002", "train-00003"}


def test_streamed_rows_are_those_of_downloaded_files(chats, tmp_path, full_disk, monkeypatch):
    monkeypatch.setattr("tunesmith.data.encode.PART_BYTES", 1)
    data, notes = pin(Data(train=(DataFile(path="hf://datasets/acme/chats"),)), offline=False)
    assert "streamed: " in notes[0]
    streamed = encoded(data, tmp_path / "streamed")
    assert not (tmp_path / "cache" / "hub").exists()
    assert {path.suffix for path in (tmp_path / "streamed").iterdir()} == {".arrow", ".json", ".lock"}
    local = encoded_locally(chats, tmp_path, data)
    assert content_of(streamed) == content_of(local)
    assert streamed.key == local.key
    assert streamed.summary.arrow_bytes > 0


def test_files_that_are_kept_are_one_part(chats, monkeypatch):
    monkeypatch.setattr("tunesmith.data.encode.PART_BYTES", 1)
    data, notes = pin(Data(train=(DataFile(path="hf://datasets/acme/chats"),)), offline=False)
    assert "kept in the hub's cache" in notes[0]
    assert len(in_parts(members(data.train[0].path))) == 1


def encoded_locally(chats: Any, tmp_path: Path, data: Data) -> Any:
    """The same files from a folder, under their addresses."""
    files = []
    for member in members(data.train[0].path):
        path = tmp_path / Path(member.path).name
        path.write_bytes(chats.commits[chats.branches["main"]][f"data/{path.name}"])
        files.append(member.at_place(str(path)))
    data = data.model_copy(update={"train": tuple(files)})
    return encoded(data, tmp_path / "local")


def test_interrupted_stream_goes_on_with_the_shard_that_is_missing(chats, server, tmp_path, full_disk, monkeypatch):
    monkeypatch.setattr("tunesmith.data.encode.PART_BYTES", 1)
    data = pinned_data()
    real = addresses.download

    def killed(file, folder):
        if "train-00002" in file.address:
            raise KeyboardInterrupt
        return real(file, folder)

    monkeypatch.setattr(addresses, "download", killed)
    with pytest.raises(KeyboardInterrupt):
        encoded(data, tmp_path / "rows")
    monkeypatch.setattr(addresses, "download", real)
    server.requests.clear()
    store = encoded(data, tmp_path / "rows")
    assert len(store) == 20
    assert not [one for one in server.downloads() if "train-00000" in one or "train-00001" in one]
    assert len({one for one in server.downloads() if "train-0000" in one}) == 2
    assert [path.name for path in (tmp_path / "rows").iterdir() if path.is_dir()] == []


def test_streamed_and_local_files_mix(chats, tmp_path, full_disk, monkeypatch):
    monkeypatch.setattr("tunesmith.data.encode.PART_BYTES", 1)
    (tmp_path / "own.jsonl").write_bytes(json_lines([chat(77), chat(78)]))
    data = pinned_data()
    data = data.model_copy(update={"train": (*data.train, DataFile(path=str(tmp_path / "own.jsonl"), weight=2.0))})
    seen: list[tuple[int, int, int]] = []
    store = encoded(data, tmp_path / "rows", progress=lambda *numbers: seen.append(numbers))
    assert len(store) == 22
    assert str(store.source(21)) == f"{tmp_path / 'own.jsonl'}:2"
    assert seen[-1][0] == 22
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)
    assert seen[-1][1] == seen[-1][2]


def test_at_most_one_shard_is_on_the_disk(chats, tmp_path, full_disk, monkeypatch):
    monkeypatch.setattr("tunesmith.data.encode.PART_BYTES", 1)
    data, most = pinned_data(), 0

    def look(file, folder):
        nonlocal most
        place = real(file, folder)
        most = max(most, len(list(tmp_path.rglob("*.parquet"))))
        return place

    real = addresses.download
    monkeypatch.setattr(addresses, "download", look)
    encoded(data, tmp_path / "rows")
    assert most == 1
    assert not list(tmp_path.rglob("*.parquet"))


def test_bad_rows_of_streamed_shards_are_named_by_file_and_row(server, tmp_path, full_disk, monkeypatch):
    monkeypatch.setattr("tunesmith.data.encode.PART_BYTES", 1)
    bad = {**chat(1), "completion": ""}
    files = {f"train-{i}.jsonl": json_lines([chat(1), bad, chat(i)]) for i in range(3)}
    repo = server.dataset("acme/chats", files)
    problems: list[Problem] = []
    with pytest.raises(DataError, match=r"1 problem in the rows of the first 1 file; the others were not read"):
        encoded(pinned_data(), tmp_path / "rows")
    server.requests.clear()
    store = encoded(pinned_data(bad_rows="skip"), tmp_path / "rows", problems)
    assert not [one for one in server.downloads() if "train-0" in one]
    at = f"hf://datasets/acme/chats@{repo.branches['main']}"
    errors = [problem for problem in problems if problem.severity == "error"]
    assert [str(problem.source) for problem in errors] == [f"{at}/train-{i}.jsonl:2" for i in range(3)]
    assert (len(store), store.skipped, store.summary.errors) == (6, 3, {"empty_answer": 3})


def test_classes_of_streamed_shards_are_those_of_one_file(server, tmp_path, full_disk, monkeypatch):
    monkeypatch.setattr("tunesmith.data.encode.PART_BYTES", 1)
    words = ["b", "a", "c", "a", "d", "b"]
    rows = [{"text": f"text {i}", "label": word} for i, word in enumerate(words)]
    server.dataset("acme/classes", {f"train-{i}.jsonl": json_lines(rows[2 * i : 2 * i + 2]) for i in range(3)})
    data = pinned_data("hf://datasets/acme/classes")
    how: dict[str, Any] = {"renderer": renderer_for("classify"), "on_problem": lambda problem: None}
    store = build(tmp_path / "rows", data=data, files=data.train, **how)
    assert store.labels.vocabulary == ("b", "a", "c", "d")
    assert [store.labels.vocabulary[int(store.labels.at(i)[0])] for i in range(6)] == words
    assert store.file_index.tolist() == [0, 0, 1, 1, 2, 2]
    assert np.array_equal(store.lines, [1, 2] * 3)


# Other file systems


def test_files_of_any_file_system_are_streamed_and_never_kept(tmp_path):
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.pipe({"/bucket/b.jsonl": json_lines([chat(2)]), "/bucket/a.jsonl": json_lines([chat(1)])})
    memory.pipe("/bucket/notes.pdf", b"x")
    data, notes = pin(Data(train=(DataFile(path="memory://bucket"),)), offline=False)
    assert "2 files" in notes[0]
    assert "streamed" in notes[0]
    store = encoded(data, tmp_path / "rows")
    assert [str(store.source(i)) for i in range(2)] == ["memory:///bucket/a.jsonl:1", "memory:///bucket/b.jsonl:1"]
    memory.pipe("/bucket/a.jsonl", json_lines([chat(3)]))
    data, _ = pin(data, offline=False)
    assert encoded(data, tmp_path / "rows").key != store.key


def test_rows_in_an_archive_are_read_by_an_address_of_both(tmp_path: Path):
    with zipfile.ZipFile(tmp_path / "rows.zip", "w") as archive:
        for i in (1, 2):
            archive.writestr(f"part-{i}.jsonl", json_lines([chat(i)]))
    place = f"zip://part-*.jsonl::file://{tmp_path}/rows.zip"
    assert [prompt for _, prompt in rows_of(place)] == ["1", "2"]
    assert rows_of(place.replace("*", "2"))[0][0] == f"zip://part-2.jsonl::file://{tmp_path}/rows.zip:1"


@pytest.mark.parametrize("host", ["huggingface.co", "hf.co"])
def test_a_page_of_the_hub_is_answered_with_its_address(host: str):
    with pytest.raises(DataError, match=r"The data set is hf://datasets/acme/support\.$"):
        pin_path(f"https://{host}/datasets/acme/support/viewer?split=train", offline=False)


def test_a_bare_name_of_the_hub_is_answered_with_its_address(tmp_path: Path):
    with pytest.raises(DataError, match=r"hf://datasets/acme/support\."):
        encoded(Data(train=(DataFile(path="acme/support"),)), tmp_path)


def test_missing_package_of_a_file_system_is_named(monkeypatch):
    import fsspec

    def missing(address):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    with pytest.raises(DataError, match=r"s3://b/x.jsonl: a package is not installed .* -m pip install"):
        pin_path("s3://b/x.jsonl", offline=False)


def test_missing_package_of_https_is_the_one_to_install(monkeypatch):
    import fsspec

    def missing(address):
        text = 'HTTPFileSystem requires "requests" and "aiohttp" to be installed'  # as fsspec says it
        raise ImportError(text) from ModuleNotFoundError("No module named 'aiohttp'", name="aiohttp")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    with pytest.raises(DataError, match=r"a package is not installed .* install it: pip install aiohttp$"):
        pin_path("https://example.com/x.jsonl", offline=False)


@pytest.mark.parametrize("before", ["", "simplecache::", "zip://rows.jsonl::"])
def test_a_password_in_an_address_is_refused_and_not_repeated(before: str):
    with pytest.raises(DataError, match=r"sftp://…@host/rows.jsonl: has a password.* FSSPEC_SFTP_USERNAME") as error:
        addresses.find_files(f"{before}sftp://me:s3cret@host/rows.jsonl", [], offline=False)
    assert "s3cret" not in str(error.value)


def test_the_owner_in_an_address_of_github_is_no_password(monkeypatch: pytest.MonkeyPatch):
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.pipe("/github.jsonl", json_lines([chat(1)]))
    monkeypatch.setattr(fsspec.core, "url_to_fs", lambda address: (memory, "/github.jsonl"))
    assert addresses.find_files("github://acme:rows@main/github.jsonl", [], offline=False)[1]
