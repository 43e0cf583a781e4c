"""Where the tests find the repository and real data, and whether they run for long."""

import os
from pathlib import Path

SOAK = os.environ.get("JIGSAW_SOAK") == "1"
"""Set by `make soak`: the same tests, with hundreds of kills and thousands of cases."""

REPOSITORY = Path(__file__).resolve().parents[2]
REAL_DATA = Path(os.environ.get("JIGSAW_DATA", REPOSITORY.parent / "shared" / "data"))
FIRST_VERSION = REPOSITORY / "tests" / "fixtures" / "version-1"
"""A dataset as the first format version was written, and its digests."""


def sets(*settings: str) -> list[str]:
    """The --set options of a command."""
    return [part for setting in settings for part in ("--set", setting)]
