"""The dataset that measurements use where none is given: the project's own sample, prepped."""

import subprocess
import sys
from pathlib import Path


def prepped(folder: Path, images: int) -> str:
    """Draw and prep that many images under ``folder``; returns what to give as --data."""
    root = Path(__file__).parents[1]
    drawn, out = folder / "drawn", folder / "out"
    sample = ["sample-data", "--out", str(drawn), "--images", str(images)]
    shards = ["shards", "--annotations", str(drawn / "annotations.json"), "--images", str(drawn / "images")]
    for arguments in (sample, [*shards, "--out", str(out), "--workers", "1"]):
        subprocess.run([sys.executable, "-m", "prep", *arguments], check=True, cwd=root, stdout=subprocess.DEVNULL)
    return str(out)
