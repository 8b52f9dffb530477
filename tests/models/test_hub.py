"""Hub ids: the cache first, no socket when offline or cached, refusals before any weight is downloaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors

from tunesmith.errors import ModelError
from tunesmith.models import load
from tunesmith.models.locate import locate

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
    located = locate("acme/tiny", **how)
    assert (located.kind, located.path, located.name, located.revision) == ("hub", snapshot, "acme/tiny", COMMIT)
    load.load_tokenizer(located, None)
    load.load_model(located, dtype=torch.float32, device="cpu")


def test_offline_and_not_cached_says_so_without_a_socket(cache, no_sockets):
    with pytest.raises(ModelError, match=r"acme/tiny: neither a folder .* --offline forbids"):
        locate("acme/tiny", offline=True)


def test_socket_test_catches_a_look_at_the_hub(cache, no_sockets):  # planted
    with pytest.raises(pytest.fail.Exception):
        locate("acme/tiny", offline=False)


@pytest.mark.parametrize("model", ["acme/ti..ny", "ac--me/tiny", "acme/tiny.git", "acme/tiny-"])
def test_what_the_hub_allows_no_model_to_be_called_is_refused_without_a_socket(cache, no_sockets, model):
    with pytest.raises(ModelError, match="neither a folder nor the form of a hub id"):
        locate(model)


def test_half_downloaded_model_is_not_taken(cache, made_folder, no_sockets):
    put(cache, made_folder, without=("model.safetensors",))
    with pytest.raises(ModelError, match="--offline forbids"):
        locate("acme/tiny", offline=True)


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
            return str(put(self.cache, self.folder, without=tuple(set(self.names) - set(allow_patterns))))

        def model_info(api, repo_id, revision=None):
            if self.error:
                raise self.error
            return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in self.names], sha=COMMIT)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
        monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)


@pytest.fixture
def hub(cache, folder, monkeypatch) -> Hub:
    return Hub(cache, folder, monkeypatch)


def test_download_brings_safetensors_and_never_pickles(hub):
    for name in ("pytorch_model.bin", "consolidated.safetensors", "original.pth", "README.md"):
        (hub.folder / name).write_bytes(b"x")
        hub.names.append(name)
    located = locate("acme/tiny")
    assert located.revision == COMMIT
    assert "model.safetensors" in hub.asked
    assert not {"pytorch_model.bin", "consolidated.safetensors", "original.pth", "README.md"} & set(hub.asked)


def test_code_is_refused_before_the_weights_are_downloaded(hub):
    config = json.loads((hub.folder / "config.json").read_text())
    (hub.folder / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoConfig": "evil.Evil"}}))
    with pytest.raises(ModelError, match="auto_map"):
        locate("acme/tiny")
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
        locate("acme/tiny")
    assert not hub.asked


def answer_of(kind: type[Exception]) -> Exception:
    error = kind.__new__(kind)
    Exception.__init__(error, "the hub's words")
    return error


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (errors.GatedRepoError, r"accept terms first: https://huggingface.co/acme/tiny"),
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
        locate("acme/tiny", revision="v9")


def test_misspelled_local_folder_is_mentioned_when_the_hub_knows_nothing(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(hub.folder.parent)
    hub.error = answer_of(errors.RepositoryNotFoundError)
    with pytest.raises(ModelError, match=r"nor a model on the hub.*Did you mean tiny-llama\?"):
        locate("tiny-lama")


def test_hash_of_a_cached_blob_is_taken_from_its_name(cache, made_folder):
    """Gigabytes of weights are not read again: the cache names large files by their SHA-256."""
    snapshot = put(cache, made_folder)
    blob = (snapshot / "model.safetensors").resolve()
    named = blob.rename(blob.with_name("ab" * 32))
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to(named)
    assert load.fingerprint(locate("acme/tiny", offline=True))["model.safetensors"] == "ab" * 32
