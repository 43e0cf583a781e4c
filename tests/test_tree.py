"""The tree keeps its shape: small folders, imports that point one way, names that say what a module holds.

The files are read with ast and nothing is imported; imports inside functions count like any other. Which folder may
import which stands in pyproject.toml and is checked by `make lint`; here is what import-linter cannot count.
"""

import ast
import subprocess
from collections import defaultdict
from functools import cache
from pathlib import Path

import pytest

from tests.helpers.settings import REPOSITORY

PACKAGE = "jigsaw_pretrain"
FOLDERS = ("jigsaw_pretrain", "formats", "prep", "train", "detect")

MOST_NAMES = 15
MOST_FLOORS = 5
SMALL = 80
"""Below so many lines a module with a single importer belongs into that importer, unless its docstring says why not."""

WHY_APART = "A module of its own"
"""How such a docstring says it: `A module of its own, because ...`."""

METAPHORS = {
    *("average", "campaign", "checkup", "feed", "fetch", "field", "findings", "litter", "look", "machine", "manner"),
    *("mirror", "mishaps", "outcome", "outside", "paste", "photo", "picks", "pyramid", "rasters", "redo", "rehearsal"),
    *("slots", "stepper", "trunk", "views", "weight", "window", "witness"),
}
"""Words that do not say what a module holds; modules had these names once."""


@cache
def tracked() -> list[str]:
    """The files of the repository: what git tracks and what is new, without what it ignores."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split("\n")
    return sorted(name for name in set(listed) if name and (REPOSITORY / name).is_file())


@cache
def modules() -> dict[str, Path]:
    """Every module of the five packages under the name it is imported by."""
    found = {}
    for name in tracked():
        path = Path(name)
        if path.suffix == ".py" and path.parts[0] in FOLDERS:
            parts = path.with_suffix("").parts
            parts = parts if parts[0] == PACKAGE else (PACKAGE, *parts)
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = REPOSITORY / path
    return found


@cache
def parsed(module: str) -> ast.Module:
    return ast.parse(modules()[module].read_text())


@cache
def imported_by(module: str) -> frozenset[str]:
    """The project's modules that ``module`` imports, anywhere in its text."""
    named: set[str] = set()
    for node in ast.walk(parsed(module)):
        if isinstance(node, ast.Import):
            named.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                named.add(inner if inner in modules() else node.module)
    return frozenset((named & modules().keys()) - {module})


@cache
def children() -> dict[str, set[str]]:
    """What lies directly in each package: modules and subpackages, by their full names."""
    found: dict[str, set[str]] = defaultdict(set)
    for module in modules():
        parts = module.split(".")
        for depth in range(1, len(parts)):
            found[".".join(parts[:depth])].add(".".join(parts[: depth + 1]))
    return dict(found)


def edges(package: str) -> dict[str, set[str]]:
    """Which child of ``package`` imports which other one, itself or by a module deeper down."""

    def child_of(module: str) -> str | None:
        return next((child for child in children()[package] if f"{module}.".startswith(f"{child}.")), None)

    drawn: dict[str, set[str]] = {child: set() for child in children()[package]}
    for module in modules():
        importer = child_of(module)
        if importer is not None:
            drawn[importer] |= {child for name in imported_by(module) if (child := child_of(name))} - {importer}
    return drawn


def floors(package: str) -> tuple[int, list[str]]:
    """The longest chain of imports among the children of ``package``, or the circle that was met."""
    drawn = edges(package)
    longest: dict[str, list[str]] = {}

    def chain(child: str, above: tuple[str, ...]) -> list[str]:
        assert child not in above, f"a circle of imports: {' -> '.join([*above[above.index(child) :], child])}"
        if child not in longest:
            below = [chain(name, (*above, child)) for name in sorted(drawn[child])]
            longest[child] = [child, *max(below, key=len, default=[])]
        return longest[child]

    best = max((chain(child, ()) for child in sorted(drawn)), key=len)
    return len(best), best


@pytest.mark.parametrize("package", sorted(children()))
def test_a_folder_holds_few_names_on_few_floors_without_a_circle(package: str) -> None:
    inside = {name.removeprefix(f"{package}.") for name in children()[package]}
    assert len(inside) <= MOST_NAMES, sorted(inside)
    count, chain = floors(package)
    assert count <= MOST_FLOORS, " -> ".join(chain)


def test_no_circle_among_modules() -> None:
    seen: set[str] = set()

    def visit(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, " -> ".join([*above[above.index(module) :], module])
        if module not in seen:
            for name in sorted(imported_by(module)):
                visit(name, (*above, module))
            seen.add(module)

    # jigsaw_pretrain/__init__.py alone may reach up, inside functions.
    for module in modules().keys() - {PACKAGE}:
        visit(module, ())


def test_a_class_name_occurs_once() -> None:
    defined = defaultdict(list)
    for module in modules():
        for node in ast.walk(parsed(module)):
            if isinstance(node, ast.ClassDef):
                defined[node.name].append(module)
    assert {name: where for name, where in defined.items() if len(where) > 1} == {}


def test_a_small_module_with_one_importer_says_why_it_stands_alone() -> None:
    importers: dict[str, set[str]] = defaultdict(set)
    for module in modules():
        for name in imported_by(module):
            importers[name].add(module)
    alone = [
        f"{module} ({lines} lines, imported by {', '.join(importers[module]) or 'nobody'})"
        for module, path in modules().items()
        if path.stem not in ("__init__", "__main__", "cli")
        and path.parent.name != "commands"
        and (lines := len(path.read_text().splitlines())) < SMALL
        and len(importers[module]) < 2
        and WHY_APART not in (ast.get_docstring(parsed(module)) or "")
    ]
    assert alone == []


def test_every_folder_with_python_files_is_a_package() -> None:
    folders = {Path(name).parent for name in tracked() if name.endswith(".py")} - {Path("."), Path("docs")}
    assert [str(folder) for folder in sorted(folders) if not (REPOSITORY / folder / "__init__.py").is_file()] == []


def test_every_module_has_a_docstring() -> None:
    assert [module for module in modules() if not ast.get_docstring(parsed(module))] == []


def test_module_names_say_what_is_inside() -> None:
    words = {module: set(module.rpartition(".")[2].split("_")) & METAPHORS for module in modules()}
    assert {module: found for module, found in words.items() if found} == {}


def test_no_compiled_code_in_the_repository() -> None:
    suffixes = {".c", ".cc", ".cpp", ".cu", ".cxx", ".h", ".hpp", ".pyx", ".pxd", ".rs", ".so", ".dylib", ".dll"}
    assert [name for name in tracked() if Path(name).suffix in suffixes] == []
