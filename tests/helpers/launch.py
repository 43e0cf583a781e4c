"""The command line with the tests' tiny network, for processes of their own: `python -m tests.detect.launch`."""

from jigsaw_pretrain.detect.cli import main
from tests.detect import conftest

if __name__ == "__main__":
    assert conftest.TINY
    main()
