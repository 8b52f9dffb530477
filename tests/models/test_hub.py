"""Hub ids: the cache first, no socket when offline or cached, refusals before any weight is downloaded."""

import gc
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors
from typer.testing import CliRunner

from tiny_run import chats, tiny_recipe
from tunesmith.cli.app import app
from tunesmith.errors import DoesNotFitError, ModelError
from tunesmith.models import load
from tunesmith.models import resolve_model as locating
from tunesmith.models.folder import read_tensors
from tunesmith.models.resolve_model import resolve_model
from tunesmith.models.size import model_size
from tunesmith.planning import devices
from tunesmith.recipe.schema import Recipe
from tunesmith.training.setup import prepare

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty hub cache; whatever is downloaded lands here."""
    path = tmp_path / "cache"
    path.mkdir()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(path))
    return path


def put(cache: Path, folder: Path, *, without: tuple[str, ...] = ()) -> Path:
    """A model as huggingface_hub keeps it: blobs by hash, a snapshot of links, a ref to its commit."""
    repo = cache / "models--acme--tiny"
    snapshot = repo / "snapshots" / COMMIT
    snapshot.mkdir(parents=True, exist_ok=True)
    (repo / "blobs").mkdir(exist_ok=True)
    (repo / "refs").mkdir(exist_ok=True)
    (repo / "refs" / "main").write_text(COMMIT)
    for file in folder.iterdir():
        if file.name not in without and not (snapshot / file.name).exists():
            blob = repo / "blobs" / f"{len(file.name):064x}{file.suffix}"
            shutil.copy(file, blob)
            (snapshot / file.name).symlink_to(blob)
    return snapshot


@pytest.mark.parametrize("how", [{"offline": True}, {"offline": False}, {"offline": True, "revision": COMMIT}])
def test_cached_model_is_loaded_without_a_socket(cache, made_folder, no_sockets, how):
    snapshot = put(cache, made_folder)
    located = resolve_model("acme/tiny", **how)
    assert (located.kind, located.path, located.name, located.revision) == ("hub", snapshot, "acme/tiny", COMMIT)
    load.load_tokenizer(located, None)
    load.load_model(located, dtype=torch.float32, device="cpu")


def test_offline_and_not_cached_says_so_without_a_socket(cache, no_sockets):
    with pytest.raises(ModelError, match=r"acme/tiny: neither a folder .* --offline forbids"):
        resolve_model("acme/tiny", offline=True)


def test_socket_test_catches_a_look_at_the_hub(cache, no_sockets):  # planted
    with pytest.raises(pytest.fail.Exception):
        resolve_model("acme/tiny", offline=False)


@pytest.mark.parametrize("model", ["acme/ti..ny", "ac--me/tiny", "acme/tiny.git", "acme/tiny-"])
def test_names_that_the_hub_forbids_are_refused_without_a_socket(cache, no_sockets, model):
    with pytest.raises(ModelError, match="neither a folder nor the form of a hub id"):
        resolve_model(model)


def test_half_downloaded_model_is_not_taken(cache, made_folder, no_sockets):
    put(cache, made_folder, without=("model.safetensors",))
    with pytest.raises(ModelError, match="--offline forbids"):
        resolve_model("acme/tiny", offline=True)


class Hub:
    """A hub of one model that remembers what was asked of it."""

    def __init__(self, cache: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.cache, self.folder = cache, folder
        self.asked: list[str] = []
        self.names = sorted(file.name for file in folder.iterdir())
        self.error: Exception | None = None
        real = huggingface_hub.snapshot_download

        def download(repo_id, revision=None, allow_patterns=None, local_files_only=False):
            if local_files_only:
                return real(repo_id, revision=revision, local_files_only=True)
            self.asked += allow_patterns
            had_name = (self.cache / "models--acme--tiny" / "refs" / "main").exists()
            snapshot = put(self.cache, self.folder, without=tuple(set(self.names) - set(allow_patterns)))
            if revision == COMMIT and not had_name:  # the cache learns a name only by being asked for it
                (self.cache / "models--acme--tiny" / "refs" / "main").unlink()
            return str(snapshot)

        def headers(api, repo_id, name, revision=None):
            self.asked.append(f"headers of {name} at {revision}")
            text = (self.folder / name).read_bytes()
            told = json.loads(text[8 : 8 + int.from_bytes(text[:8], "little")])
            metadata = told.pop("__metadata__", {})
            tensors = {key: SimpleNamespace(**one) for key, one in told.items()}
            return SimpleNamespace(metadata=metadata, tensors=tensors)

        def model_info(api, repo_id, revision=None):
            if self.error:
                raise self.error
            return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in self.names], sha=COMMIT)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
        monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
        monkeypatch.setattr(huggingface_hub.HfApi, "parse_safetensors_file_metadata", headers)


@pytest.fixture
def hub(cache, folder, monkeypatch) -> Hub:
    return Hub(cache, folder, monkeypatch)


def test_download_brings_safetensors_and_never_pickles(hub):
    for name in ("pytorch_model.bin", "consolidated.safetensors", "original.pth", "README.md"):
        (hub.folder / name).write_bytes(b"x")
        hub.names.append(name)
    located = resolve_model("acme/tiny")
    assert located.revision == COMMIT
    assert "model.safetensors" in hub.asked
    assert not {"pytorch_model.bin", "consolidated.safetensors", "original.pth", "README.md"} & set(hub.asked)


def test_what_was_downloaded_is_found_again_without_the_hub(hub, no_sockets):
    first = resolve_model("acme/tiny")
    assert resolve_model("acme/tiny", offline=True) == first


def test_without_weights_their_headers_alone_are_fetched(hub):
    located = resolve_model("acme/tiny", weights=False)
    assert not located.has_weights
    assert f"headers of model.safetensors at {COMMIT}" in hub.asked
    assert "model.safetensors" not in hub.asked
    whole = resolve_model(str(hub.folder))
    assert model_size(located) == model_size(whole)
    assert read_tensors(located.path, "acme/tiny") == read_tensors(whole.path, "tiny")
    # Headers may be written with other spaces.
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (located.path, hub.folder)]
    assert sizes[0] == pytest.approx(sizes[1], abs=1000)
    load.load_tokenizer(located, None)


def test_the_folder_of_headers_goes_with_what_names_it(hub):
    located = resolve_model("acme/tiny", weights=False)
    path = located.path
    assert path.is_dir()
    del located
    gc.collect()
    assert not path.exists()


def test_what_is_cached_is_whole_whoever_asks(cache, made_folder, no_sockets):
    put(cache, made_folder)
    assert resolve_model("acme/tiny", weights=False).has_weights


def recipe_on_hub(folder: Path, **more: object) -> Recipe:
    return tiny_recipe(folder, **more).model_copy(update={"model": "acme/tiny"})


def test_a_run_that_does_not_fit_is_refused_before_the_download(hub, tmp_path, monkeypatch):
    monkeypatch.setattr("tunesmith.planning.devices.room", lambda device: devices.resident_bytes() // 2)
    with pytest.raises(DoesNotFitError, match="memory: this run needs"):
        prepare(recipe_on_hub(tmp_path), root=tmp_path / "runs")
    assert "model.safetensors" not in hub.asked


def test_planted_a_run_that_looks_for_its_model_with_weights_would_be_seen(hub, tmp_path, monkeypatch):
    real = locating.resolve_model
    monkeypatch.setattr(locating, "resolve_model", lambda model, **how: real(model, **how | {"weights": True}))
    monkeypatch.setattr("tunesmith.planning.devices.room", lambda device: devices.resident_bytes() // 2)
    with pytest.raises(DoesNotFitError):
        prepare(recipe_on_hub(tmp_path), root=tmp_path / "runs")
    assert "model.safetensors" in hub.asked


def test_a_run_that_fits_downloads_weights_and_equals_a_folders_run(hub, tmp_path):
    told: list[str] = []
    recipe = recipe_on_hub(tmp_path)
    setup = prepare(recipe, root=tmp_path / "runs", on_progress=lambda what, done, total: told.append(what))
    assert setup.located.has_weights
    assert setup.located.path.parent.name == "snapshots"
    assert told.index("plan") < told.index("download") < told.index("load")


def test_a_plan_downloads_no_weights_and_says_why_it_is_not_tried(hub, tmp_path):
    data = chats(tmp_path / "rows.jsonl", 20)
    words = ["plan", "acme/tiny", str(data), "--runs", str(tmp_path / "runs"), "--method", "lora"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert "memory: " in result.stdout
    assert "not probed: its weights (" in result.stdout
    assert "model.safetensors" not in hub.asked


def test_code_is_refused_before_the_weights_are_downloaded(hub):
    config = json.loads((hub.folder / "config.json").read_text())
    (hub.folder / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoConfig": "evil.Evil"}}))
    with pytest.raises(ModelError, match="auto_map"):
        resolve_model("acme/tiny")
    assert "config.json" in hub.asked
    assert "model.safetensors" not in hub.asked


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["config.json", "pytorch_model.bin"], "pytorch_model.bin only"),
        (["tiny-Q4.gguf", "README.md"], "GGUF files only. Download one, such as tiny-Q4.gguf"),
        (["README.md"], "not a model that can be tuned"),
    ],
)
def test_hub_models_without_safetensors_are_refused_undownloaded(hub, names, said):
    hub.names = names
    with pytest.raises(ModelError, match=said):
        resolve_model("acme/tiny")
    assert not hub.asked


def answer_of(kind: type[Exception]) -> Exception:
    error = kind.__new__(kind)
    Exception.__init__(error, "the hub's words")
    return error


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (errors.GatedRepoError, r"accept its owner's terms first: https://huggingface.co/acme/tiny"),
        (errors.RepositoryNotFoundError, "nor a model on the hub"),
        (errors.RevisionNotFoundError, "no revision 'v9' on the hub"),
        (errors.HfHubHTTPError, "the hub cannot be reached"),
        (ConnectionError, "the hub cannot be reached"),
        (errors.HfHubHTTPError.__bases__[0], "the hub cannot be reached"),
    ],
)
def test_refusals_of_the_hub_are_explained(hub, error, said):
    hub.error = answer_of(error)
    with pytest.raises(ModelError, match=said):
        resolve_model("acme/tiny", revision="v9")


def test_misspelled_local_folder_is_mentioned_when_the_hub_knows_nothing(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(hub.folder.parent)
    hub.error = answer_of(errors.RepositoryNotFoundError)
    with pytest.raises(ModelError, match=r"nor a model on the hub.*Did you mean tiny-llama\?"):
        resolve_model("tiny-lama")


def test_hash_of_a_cached_blob_is_taken_from_its_name(cache, made_folder):
    """Gigabytes of weights are not read again: the cache names large files by their SHA-256."""
    snapshot = put(cache, made_folder)
    blob = (snapshot / "model.safetensors").resolve()
    named = blob.rename(blob.with_name("ab" * 32))
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to(named)
    assert load.fingerprint(resolve_model("acme/tiny", offline=True))["model.safetensors"] == "ab" * 32
