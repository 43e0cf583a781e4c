"""The command line with the tests' tiny network, for processes of their own: `python -m tests.helpers.launch`."""

from jigsaw_pretrain.detect.cli import main
from tests.helpers import detection

if __name__ == "__main__":
    assert detection.TINY
    main()
