"""The project's own sample dataset, drawn and prepped: what measurements use where no data is given."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def command(stage: str, *arguments: object) -> None:
    """A command of the project, such as ``prep shards ...``; its output goes to standard error."""
    # By its whole name: a command's own processes import nothing from the working folder.
    given = [sys.executable, "-m", f"jigsaw_pretrain.{stage}", *map(str, arguments)]
    subprocess.run(given, check=True, cwd=ROOT, stdout=sys.stderr)


def draw(folder: Path, images: int, seed: int = 0) -> Path:
    """Draw that many images with their annotations.json into ``folder``, unless they are there; returns it."""
    if not (folder / "annotations.json").exists():
        command("prep", "sample-data", "--out", folder, "--images", images, "--seed", seed)
    return folder


def prep(source: Path, out: Path, *options: object) -> Path:
    """Prep annotations.json and images/ of ``source`` into ``out``, unless that is done; returns ``out``."""
    return prep_files(source / "annotations.json", source / "images", out, *options)


def prep_files(annotations: Path, images: Path, out: Path, *options: object) -> Path:
    """Prep these annotations and images into ``out``, unless that is done; returns ``out``."""
    if not (out / "manifests" / "dataset.json").exists():
        command("prep", "shards", "--annotations", annotations, "--images", images, "--out", out, *options)
    return out


def checked_out() -> str:
    """The commit that is checked out, in short; nothing where git does not know."""
    git = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()


def prepped(folder: Path, images: int) -> str:
    """Draw and prep that many images under ``folder``; returns what to give as --data."""
    return str(prep(draw(folder / "drawn", images), folder / "out", "--workers", 1))
