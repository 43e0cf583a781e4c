"""`python -m prep`: the command line of prep/cli.py."""

from jigsaw_pretrain.prep.cli import main

main()
