"""The rules of the house that a program can check: names, sizes, and no circle of imports.

CONTRIBUTING.md, "The rules of the house", explains them.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import TypeAlias

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("backends", "gateway", "loadtests")
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for package in PACKAGES
    for path in sorted((ROOT / package).rglob("*.py"))
}
TREES = {name: ast.parse(path.read_text()) for name, path in MODULES.items()}
TEST_TREES = {path: ast.parse(path.read_text()) for path in sorted((ROOT / "tests").rglob("*.py"))}

#: Participles and pronouns that say nothing without their neighbours.
BARE = frozenset(
    ("told", "said", "seen", "asked", "kept", "drawn", "found", "came", "looked", "held", "heard",
     "shown", "meant", "given", "made", "done", "taken", "sent", "here", "there", "one", "each")
)  # fmt: skip
MOST_LINES = 400
MOST_LINES_OF_A_FUNCTION = 60
#: A longer module says why in its docstring, in a sentence that begins so.
REASON = "Longer than 400 lines: "


Definition: TypeAlias = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
#: Every function and class, inner ones too, by module.
DEFINITIONS = {
    name: [node for node in ast.walk(tree) if isinstance(node, Definition)]
    for name, tree in TREES.items()
}


def modules_of(package: str) -> list[str]:
    """The modules of a top-level package, by their full name."""
    return [name for name in MODULES if name.split(".")[0] == package]


def constants(name: str) -> Iterator[tuple[str, str]]:
    """The constants of a module and their values, as they are written."""
    for node in TREES[name].body:
        if isinstance(node, ast.Assign):
            targets = node.targets
        elif isinstance(node, ast.AnnAssign):
            targets = [node.target]
        else:
            continue
        for target in targets:
            if isinstance(target, ast.Name) and target.id.isupper() and node.value is not None:
                yield target.id, ast.unparse(node.value)


@pytest.mark.parametrize("package", PACKAGES)
def test_no_name_is_a_bare_participle(package: str) -> None:
    bare = {
        (name, node.name)
        for name in modules_of(package)
        for node in DEFINITIONS[name]
        if node.name.strip("_").lower() in BARE
    }

    assert not bare, "say what it returns or does"


@pytest.mark.parametrize("package", PACKAGES)
def test_a_public_class_has_a_name_of_its_own(package: str) -> None:
    places = defaultdict(list)
    for name in modules_of(package):
        for node in TREES[name].body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places[node.name].append(name)
    twice = {name: where for name, where in places.items() if len(where) > 1}

    assert not twice, "one name, one meaning in a package"


@pytest.mark.parametrize("package", PACKAGES)
def test_a_constant_has_one_value(package: str) -> None:
    values: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name in modules_of(package):
        for constant, value in constants(name):
            values[constant][value].append(name)
    several = {name: dict(found) for name, found in values.items() if len(found) > 1}

    assert not several, "name what it is the value of, or have it in one place"


@pytest.mark.parametrize("package", PACKAGES)
def test_a_long_module_says_why(package: str) -> None:
    long = {
        name: lines
        for name in modules_of(package)
        if (lines := len(MODULES[name].read_text().splitlines())) > MOST_LINES
        and REASON not in (ast.get_docstring(TREES[name]) or "")
    }

    assert not long, f"split it, or say in its docstring `{REASON}` and why"


@pytest.mark.parametrize("package", PACKAGES)
def test_a_function_fits_on_a_screen(package: str) -> None:
    long = {
        (name, node.name): (node.end_lineno or 0) - node.lineno + 1
        for name in modules_of(package)
        for node in DEFINITIONS[name]
        if not isinstance(node, ast.ClassDef)
        and (node.end_lineno or 0) - node.lineno + 1 > MOST_LINES_OF_A_FUNCTION
        and "Table:" not in (ast.get_docstring(node) or "")
    }

    assert not long, "split it, or say in its docstring `Table:` and of what"


def test_no_circle_of_imports() -> None:
    imports = {name: set(imported(name)) for name in MODULES}
    done: set[str] = set()

    def visit(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, " -> ".join((*way[way.index(name) :], name))
        if name not in done:
            for other in sorted(imports[name]):
                visit(other, (*way, name))
            done.add(name)

    for name in MODULES:
        visit(name, ())


def test_no_constant_is_patched() -> None:
    patched = [
        (str(path.relative_to(ROOT)), name)
        for path, tree in TEST_TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "setattr"
        for argument in node.args[:2]
        if isinstance(argument, ast.Constant) and isinstance(argument.value, str)
        and (name := argument.value.rpartition(".")[2]).isupper()
    ]  # fmt: skip

    assert not patched, "pass it: the gateway's intervals are in `Timings`"


def test_the_loop_that_waits_is_written_once() -> None:
    names = ("until", "wait_for", "eventually", "wait_until")
    places = {
        path.relative_to(ROOT): node.name
        for path, tree in TEST_TREES.items()
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name in names
    }

    assert list(places) == [Path("tests/support/waiting.py")]


def imported(name: str) -> Iterator[str]:
    """Our own modules that a module names, imports inside its functions included."""
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            for alias in node.names:
                module = f"{node.module}.{alias.name}"
                if module in MODULES:
                    yield module
                elif node.module in MODULES and node.module != name:
                    yield node.module
