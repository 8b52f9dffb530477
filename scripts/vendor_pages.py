"""Take the libraries of the pages from their archives, byte for byte: python scripts/vendor_pages.py

Needs npm, which fetches an archive and verifies nothing that this script does not: an archive of another SHA-512 is
refused. Writes src/tunesmith/pages/static/vendor/NAME-VERSION/ and vendor.json, which a test reads again.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

VENDOR = Path(__file__).parents[1] / "src" / "tunesmith" / "pages" / "static" / "vendor"
PACKAGES = (
    (
        "uplot", "1.6.32", "MIT",
        "2883159c6ebccefbb95d751b0b82d010f9e1c0ec41b8bc96d401eda66e882935"
        "c89a46cb824332fa369b8cb8122cc6ac36e186cd09bf7a9ded3a4c93c6989023",
        {"package/dist/uPlot.iife.min.js": "uPlot.iife.min.js", "package/dist/uPlot.min.css": "uPlot.min.css",
         "package/LICENSE": "LICENSE"},
    ),
    (
        "idiomorph", "0.8.0", "0BSD",
        "478ec904bfba8c70d0bdc9dba69214b575dcc62e61ebec2e0841195e7461525b"
        "6c8333c52b34e12f93ee1e9a4ff72a49bb2fbb59ac1c6354ec4810ff8906cc87",
        {"package/dist/idiomorph.min.js": "idiomorph.min.js", "package/LICENSE": "LICENSE"},
    ),
)  # fmt: skip
"""Name, version, licence, SHA-512 of the archive, and its files by where they are there."""


def take(package: tuple[str, str, str, str, dict[str, str]], work: Path) -> dict[str, object]:
    """Fetch one archive and write its files; returns the entry of vendor.json."""
    name, version, licence, sha512, files = package
    words = ["npm", "pack", "--silent", f"{name}@{version}"]
    archive = work / subprocess.run(words, cwd=work, check=True, capture_output=True, text=True).stdout.split()[-1]
    got = hashlib.sha512(archive.read_bytes()).hexdigest()
    if got != sha512:
        raise SystemExit(f"{name} {version}: the archive has SHA-512 {got}, not {sha512}. Look at what changed.")
    folder = VENDOR / f"{name}-{version}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with tarfile.open(archive) as tar:
        for inside, outside in files.items():
            member = tar.extractfile(inside)
            assert member is not None, inside
            (folder / outside).write_bytes(member.read())
    hashes = {file: hashlib.sha256((folder / file).read_bytes()).hexdigest() for file in sorted(files.values())}
    return {"name": name, "version": version, "licence": licence, "archive_sha512": sha512, "sha256": hashes}


def main() -> None:
    with tempfile.TemporaryDirectory() as work:
        entries = [take(package, Path(work)) for package in PACKAGES]
    (VENDOR / "vendor.json").write_text(json.dumps(entries, indent=2) + "\n")


if __name__ == "__main__":
    main()
