"""`make lint` sees the stages: a planted fault in any of them is refused.

To mypy and import-linter jigsaw_pretrain/ of the checkout holds four modules and no stage, and they find no fault in
it. So `make lint` shows them a folder of links that looks like the installed package; here is one like it, made of
copies, with faults. mypy reads the planted modules alone.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.settings import REPOSITORY
from tests.test_tree import FOLDERS, PACKAGE, tracked

STAGES = tuple(name for name in FOLDERS if name != PACKAGE)


@pytest.fixture(scope="module")
def view(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of build/view with one fault of each kind in every stage."""
    folder = tmp_path_factory.mktemp("view")
    for name in tracked():
        if name.split("/")[0] in FOLDERS:
            copy = folder / (name if name.startswith(f"{PACKAGE}/") else f"{PACKAGE}/{name}")
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPOSITORY / name, copy)
    shutil.copy2(REPOSITORY / "pyproject.toml", folder)
    for stage in STAGES:
        with (folder / PACKAGE / stage / "__init__.py").open("a") as text:
            text.write(f'\nimport os\n\nPLANTED_IN_{stage.upper()}: int = "a type error"\n')
    # Each goes up, one of them inside a function.
    with (folder / PACKAGE / "formats" / "boxes.py").open("a") as text:
        text.write(f"\n\ndef planted() -> None:\n    import {PACKAGE}.prep.plan.plan\n")
    with (folder / PACKAGE / "train" / "recipe.py").open("a") as text:
        text.write(f"\nimport {PACKAGE}.train.engine.state\nimport {PACKAGE}.prep.records\n")
    with (folder / PACKAGE / "train" / "evaluate.py").open("a") as text:
        text.write(f"\nimport {PACKAGE}.detect.recipe\nimport {PACKAGE}.train.commands.options\n")
    return folder


def refused(folder: Path, *command: str) -> str:
    """What a tool says that must not be content."""
    environment = {**os.environ, "COLUMNS": "200"}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 1, done.stdout + done.stderr
    return done.stdout


def test_a_planted_type_error_in_each_stage_is_found(view: Path) -> None:
    packages = [part for stage in STAGES for part in ("-m", f"{PACKAGE}.{stage}")]
    said = refused(view, sys.executable, "-m", "mypy", "--follow-imports=skip", "--cache-dir", ".mypy_cache", *packages)
    for stage in STAGES:
        assert re.search(rf"^{PACKAGE}/{stage}/__init__\.py:\d+: error: Incompatible types in assignment", said, re.M)


def test_planted_imports_against_the_direction_are_found(view: Path) -> None:
    said = refused(view, str(Path(sys.executable).parent / "lint-imports"), "--no-cache")
    for line in (
        f"{PACKAGE}.formats is not allowed to import {PACKAGE}.prep",
        f"{PACKAGE}.train is not allowed to import {PACKAGE}.prep",
        f"{PACKAGE}.train is not allowed to import {PACKAGE}.detect",
        f"{PACKAGE}.train.recipe is not allowed to import {PACKAGE}.train.engine",
        f"{PACKAGE}.train.evaluate -> {PACKAGE}.train.commands",
    ):
        assert line in said, said


def test_a_planted_unused_import_in_each_stage_is_found(view: Path) -> None:
    said = refused(view, sys.executable, "-m", "ruff", "check", "--no-cache", "--output-format", "concise", ".")
    for stage in STAGES:
        assert re.search(rf"^{PACKAGE}/{stage}/__init__\.py:\d+:\d+: F401 ", said, re.M)


def test_a_stage_imported_by_its_short_name_is_refused(tmp_path: Path) -> None:
    shutil.copy2(REPOSITORY / "pyproject.toml", tmp_path)
    (tmp_path / "planted.py").write_text('"""Planted."""\n\nfrom prep.plan import plan\n\nprint(plan)\n')
    said = refused(tmp_path, sys.executable, "-m", "ruff", "check", "--no-cache", "--output-format", "concise", ".")
    assert "planted.py:3:1: TID251" in said
