"""The Python API: light to import, the same names for people, type checkers and editors, and no command line in it."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import jigsaw_pretrain as jp
from tests.helpers.settings import REPOSITORY

HEAVY = ("torch", "numpy", "click", "pyarrow", "fsspec")


def test_importing_costs_nothing_heavy_and_changes_nothing() -> None:
    code = f"import jigsaw_pretrain as jp, sys; dir(jp); print(*(name for name in {HEAVY} if name in sys.modules))"
    code += "; jp.plan, jp.open_dataset; print(*(name for name in ('torch', 'click') if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == []


@pytest.mark.parametrize("package", [jp, jp.detect], ids=["jigsaw_pretrain", "detect"])
def test_type_checkers_and_users_see_the_same_names(package: Any) -> None:
    module = ast.parse(Path(package.__file__).read_text())
    block = next(node for node in module.body if isinstance(node, ast.If))
    seen: dict[str, str] = {}
    for node in block.body:
        assert isinstance(node, ast.ImportFrom) and node.module
        # A name that is imported under itself is public; others, such as Any, are for the types of this file.
        public = [alias.asname for alias in node.names if alias.asname]
        seen |= dict.fromkeys(public, node.module.removeprefix(f"{package.__name__}."))
    stages = {name for name, where in seen.items() if where == package.__name__}
    assert {name: where for name, where in seen.items() if name not in stages} == package._PUBLIC
    assert sorted(package.__all__) == sorted(seen) and set(seen) <= set(dir(package))
    assert all(getattr(package, name).__doc__ for name in seen)
    with pytest.raises(AttributeError):
        package.nothing  # noqa: B018


def test_a_public_function_stays_one_when_modules_are_imported() -> None:
    for name, module in jp.detect._PUBLIC.items():
        importlib.import_module(f"{jp.detect.__name__}.{module}")
        assert callable(getattr(jp.detect, name))


def test_the_reference_has_every_public_name() -> None:
    page = (REPOSITORY / "docs" / "reference" / "api.md").read_text()
    listed = [line.removeprefix("::: ") for line in page.splitlines() if line.startswith(":::")]
    public = [(package.__name__, *one) for package in (jp, jp.detect) for one in package._PUBLIC.items()]
    assert sorted(listed) == sorted(f"{package}.{module}.{name}" for package, name, module in public)
