"""A clean clone of this checkout, its uncommitted changes included."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def clone(folder: Path) -> None:
    """Copy what git tracks, and what it would track, into a folder; nothing that it ignores."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)


def commands(document: str, naming: str) -> list[str]:
    """The lines of a document's shell block that has this line in it, without comments."""
    text = (ROOT / document).read_text()
    blocks = re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    [block] = [block for block in blocks if naming in block]
    return [line.split("  #")[0].rstrip() for line in block.splitlines()]


def build(target: str, source: Path, out: Path) -> Path:
    """The archive that a source tree makes, `sdist` or `wheel`; without a network."""
    command = [sys.executable, "-m", "hatchling", "build", "-t", target, "-d", str(out)]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    [archive] = out.glob("*.whl" if target == "wheel" else "*.tar.gz")
    return archive
