"""detect's command line with the tests' tiny network on two ranks: `python -m tests.helpers.launch train ...`."""

import sys

from jigsaw_pretrain.detect.commands.train import train
from tests.helpers import detection
from tests.helpers.ranks import fork_ranks


def play(command: list[str]) -> None:
    """What one rank does."""
    assert detection.TINY
    train.main(command)


if __name__ == "__main__":
    fork_ranks(play, sys.argv[1:])
