"""What a model on this disk weighs. Only headers are read, and nothing is downloaded."""

from __future__ import annotations

from pathlib import Path

from gateway.errors import UsageError
from gateway.sizing.gguf import read_gguf
from gateway.sizing.safetensors import read_safetensors
from gateway.sizing.shapes import Weights


def read_weights(path: Path) -> Weights:
    """The weights of the model in a file or folder.

    Args:
        path: A GGUF file (one part of a split model stands for all), a folder of safetensors, or
            its config.json.

    Raises:
        UsageError: There is no such file, it is broken, or its header lacks what is needed.
    """
    try:
        if path.is_dir():
            return read_safetensors(path)
        if path.name == "config.json" or path.suffix == ".safetensors":
            return read_safetensors(path.parent)
        return read_gguf(path)
    except OSError as exc:
        raise UsageError(f"{exc.filename or path}: {exc.strerror or exc}") from exc
