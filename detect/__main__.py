"""`python -m detect`: the command line of detect/cli.py."""

from detect.cli import main

main()
