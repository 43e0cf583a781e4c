"""`python -m train`: the command line of train/cli.py."""

from jigsaw_pretrain.train.cli import main

main()
