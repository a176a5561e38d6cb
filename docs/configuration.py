"""Writes `configuration.md`: every setting, from the settings' own descriptions.

    python docs/configuration.py

A test compares the file with what this writes now.
"""

from __future__ import annotations

import json
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, SecretStr
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from backends.kinds import Kind
from gateway.settings import Settings

FILE = Path(__file__).with_name("configuration.md")

HEAD = """\
# Configuration

<!-- Written by docs/configuration.py from the settings' descriptions. Change those. -->

`twolane serve --config twolane.yaml` reads a YAML file. Every setting is also an environment
variable: the prefix `TWOLANE_`, parts joined by two underscores, lists and maps as JSON.

```sh
TWOLANE_PORT=9000 TWOLANE_LIMITS__MAX_WAIT_S=30 twolane serve
```

The command line takes precedence over variables, and variables over the file. A misspelt name stops
the start, and the message names the nearest right one. `twolane.example.yaml` is a commented file
with every setting. An *engine* is `ollama`, `vllm` or `llamacpp`.

Without `engines` and `models` the gateway looks for engines on their usual ports of this machine,
and starts the embedded one if it finds none. Without `models` it serves every model that the
engines list.
"""

#: How a type is called in the table.
NAMES = {str: "text", int: "whole number", float: "number", bool: "true or false", Path: "file"}


def page() -> str:
    """The whole document."""
    parts = [HEAD]
    for title, about, rows in sections("", Settings):
        heading = f"`{title}`" if title else "The top level"
        lines = [f"## {heading}\n", *([f"{about}\n"] if about else [])]
        lines += ["| setting | type | default | |", "|---|---|---|---|"]
        lines += [
            f"| `{name}` | {kind} | {default} | {text} |" for name, kind, default, text in rows
        ]
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


Row = tuple[str, str, str, str]


def sections(prefix: str, model: type[BaseModel]) -> Iterator[tuple[str, str, list[Row]]]:
    """Each part of the settings: its path, what it is, and its own settings."""
    rows: list[Row] = []
    inner: list[tuple[str, type[BaseModel]]] = []
    for name, field in model.model_fields.items():
        part = _part(field.annotation)
        if part is None:
            rows.append((f"`{name}`", _kind(field.annotation), _default(field), _text(field)))
        else:
            inner.append((f"{prefix}{name}{_key(field.annotation)}", part))
    yield prefix.removesuffix("."), _about(model) if prefix else "", rows
    for path, part in inner:
        yield from sections(f"{path}.", part)


def _about(model: type[BaseModel]) -> str:
    return (model.__doc__ or "").strip().split("\n\n")[0].replace("\n", " ")


def _text(field: FieldInfo) -> str:
    if not field.description:
        raise SystemExit(f"a setting has no description: {field!r}")
    return " ".join(field.description.split()).replace("|", "\\|")


def _bare(kind: Any) -> Any:
    """A type without what only validates it, and without None."""
    while get_origin(kind) is Annotated:
        kind = get_args(kind)[0]
    if get_origin(kind) in (Union, types.UnionType):
        kinds = [inner for inner in get_args(kind) if inner is not type(None)]
        return _bare(kinds[0])
    return kind


def _key(kind: Any) -> str:
    """What stands between a map and the settings of one of its entries."""
    bare = _bare(kind)
    if get_origin(bare) is not dict:
        return ""
    return ".ENGINE" if get_args(bare)[0] == Kind else ".NAME"


def _part(kind: Any) -> type[BaseModel] | None:
    """The settings below this one, if it is a part or a map of parts."""
    bare = _bare(kind)
    if get_origin(bare) is dict:
        bare = _bare(get_args(bare)[1])
    return bare if isinstance(bare, type) and issubclass(bare, BaseModel) else None


def _kind(kind: Any) -> str:
    bare = _bare(kind)
    origin = get_origin(bare)
    if bare == Kind:
        return "engine"
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in get_args(bare))
    if origin in (tuple, list):
        return f"list of {_kind(get_args(bare)[0])}"
    if origin is dict:
        key, value = get_args(bare)
        return f"map of {_kind(key)} to {_kind(value)}"
    return "secret" if bare is SecretStr else NAMES.get(bare, "text")


def _default(field: FieldInfo) -> str:
    value = field.default
    if value is PydanticUndefined:
        return "required"
    if value is None:
        return "-"
    if isinstance(value, tuple):
        value = list(value)
    return f"`{json.dumps(value)}`" if not isinstance(value, str) else f"`{value}`"


if __name__ == "__main__":
    FILE.write_text(page())
