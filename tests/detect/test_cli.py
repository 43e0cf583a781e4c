"""What the detectors stand on."""

import re

from tests.helpers.settings import REPOSITORY


def test_detect_never_imports_prep() -> None:
    for path in sorted((REPOSITORY / "detect").glob("*.py")):
        assert not re.search(r"^\s*(from|import) prep\b", path.read_text(), re.MULTILINE), path
