"""What the detectors stand on."""

import re

from tests.helpers.settings import REPOSITORY


def test_detect_never_imports_prep() -> None:
    paths = sorted((REPOSITORY / "detect").rglob("*.py"))
    assert len(paths) > 15
    for path in paths:
        assert not re.search(r"^\s*(from|import) (jigsaw_pretrain\.)?prep\b", path.read_text(), re.MULTILINE), path
        assert not re.search(r"^\s*from jigsaw_pretrain import .*\bprep\b", path.read_text(), re.MULTILINE), path
