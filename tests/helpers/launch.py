"""detect's command line with the tests' tiny network on two ranks: `python -m tests.helpers.launch train ...`."""

import os
import sys

from jigsaw_pretrain.detect.commands.train import train
from tests.helpers import detection
from tests.helpers.ranks import fork_ranks


def play(command: list[str]) -> None:
    """What one rank does."""
    assert detection.TINY
    try:
        train.main(command)
    except SystemExit as ended:
        # An agent that ends on a signal does not take what forked ranks return, and they would wait for it for 30 s.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(int(ended.code or 0))


if __name__ == "__main__":
    fork_ranks(play, sys.argv[1:])
