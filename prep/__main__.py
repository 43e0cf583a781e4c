"""`python -m prep`: the command line of prep/cli.py."""

from prep.cli import main

main()
