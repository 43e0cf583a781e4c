"""`python -m detect`: the command line of detect/cli.py."""

from jigsaw_pretrain.detect.cli import main

main()
