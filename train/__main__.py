"""`python -m train`: the command line of train/cli.py."""

from train.cli import main

main()
