"""`python -m detect`: the command line of detect/cli.py."""

import os
import sys

try:
    here = os.path.realpath(os.curdir)
except FileNotFoundError:
    here = ""  # the working folder was removed, which the command will say
if sys.path[0] in ("", here):
    # Python puts the working folder first, where a user's torch.py or json.py would be taken for the library's.
    sys.path.append(sys.path.pop(0))

from jigsaw_pretrain.detect.cli import main

main()
