"""The nearest right name for one that is misspelt, in a file or in a variable.

A setting that is silently not set is worse than none: pydantic-settings ignores an unknown
environment variable, so names are compared with the fields of the schema here.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel, ValidationError

PREFIX = "TWOLANE_"
DELIMITER = "__"


def problems(schema: type[BaseModel], error: ValidationError) -> Iterator[str]:
    """Each problem as a line: the place, what is wrong, and the nearest right name."""
    for problem in error.errors(include_url=False, include_context=False, include_input=False):
        where = ".".join(str(part) for part in problem["loc"] if part != "[key]")
        if problem["type"] == "extra_forbidden":
            *parents, name = problem["loc"]
            hint = _hint(str(name), _field_names(schema, parents))
            yield f"{where}: there is no such setting{hint}"
        else:
            yield f"{where or 'settings'}: {problem['msg'].removeprefix('Value error, ')}"


def misspelt_variable(schema: type[BaseModel], variable: str) -> str | None:
    """What is wrong with the name of an environment variable; None where nothing is."""
    if not variable.upper().startswith(PREFIX):
        return None
    annotation: Any = schema
    parents: list[str] = []
    for part in variable[len(PREFIX) :].lower().split(DELIMITER):
        below = _annotation_below(annotation, part)
        if below is None:
            allowed = _field_names(schema, parents) or _literal_keys(annotation)
            nearest = difflib.get_close_matches(part, allowed, n=1, cutoff=0.5)
            right = PREFIX + DELIMITER.join([*parents, *nearest]).upper()
            hint = f"; did you mean {right}?" if nearest else ""
            return f"{variable}: there is no such setting{hint}"
        annotation = below
        parents.append(part)
    return None


def _hint(name: str, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


def _field_names(schema: type[BaseModel], parents: Iterable[Any]) -> list[str]:
    """The names allowed below a place in the settings."""
    annotation: Any = schema
    for part in parents:
        annotation = _annotation_below(annotation, str(part))
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return list(annotation.model_fields)
    return []


def _annotation_below(annotation: Any, name: str) -> Any:
    """The type of one field or map entry; None where there is none."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        field = annotation.model_fields.get(name)
        return _plain(field.annotation) if field else None
    if get_origin(annotation) is dict:
        keys, values = get_args(annotation)
        if get_origin(keys) is Literal and name not in get_args(keys):
            return None
        return _plain(values)
    return None


def _plain(annotation: Any) -> Any:
    """An annotation without its Annotated and its None."""
    if get_origin(annotation) is Annotated:
        return _plain(get_args(annotation)[0])
    options = [option for option in get_args(annotation) if option is not type(None)]
    if len(options) == 1 and get_origin(annotation) is not tuple and len(get_args(annotation)) > 1:
        return _plain(options[0])
    return annotation


def _literal_keys(annotation: Any) -> list[str]:
    """The keys a map allows, where they are given."""
    if get_origin(annotation) is dict and get_origin(get_args(annotation)[0]) is Literal:
        return [str(key) for key in get_args(get_args(annotation)[0])]
    return []
