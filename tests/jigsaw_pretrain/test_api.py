"""The Python API: light to import, the same names for people, type checkers and editors, and no command line in it."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import jigsaw_pretrain as jp
from tests.helpers.settings import REPOSITORY

HEAVY = ("torch", "numpy", "click", "pyarrow", "fsspec")


def test_importing_costs_nothing_heavy_and_changes_nothing() -> None:
    code = f"import jigsaw_pretrain as jp, sys; dir(jp); print(*(name for name in {HEAVY} if name in sys.modules))"
    code += "; jp.plan, jp.open_dataset; print(*(name for name in ('torch', 'click') if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == []


def test_type_checkers_and_users_see_the_same_names() -> None:
    module = ast.parse(Path(jp.__file__).read_text())
    block = next(node for node in module.body if isinstance(node, ast.If))
    seen: dict[str, str] = {}
    for node in block.body:
        assert isinstance(node, ast.ImportFrom) and node.module
        seen |= {str(alias.asname): node.module.removeprefix("jigsaw_pretrain.") for alias in node.names}
    assert seen == jp._PUBLIC and sorted(jp.__all__) == sorted(seen) and set(seen) <= set(dir(jp))
    assert all(getattr(jp, name).__doc__ for name in seen)
    with pytest.raises(AttributeError):
        jp.nothing  # noqa: B018


def test_the_reference_has_every_public_name() -> None:
    page = (REPOSITORY / "docs" / "reference" / "api.md").read_text()
    listed = [line.removeprefix("::: ") for line in page.splitlines() if line.startswith(":::")]
    assert sorted(listed) == sorted(f"jigsaw_pretrain.{module}.{name}" for name, module in jp._PUBLIC.items())
