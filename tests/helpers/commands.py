"""Running commands in this process, as a user gives them."""

import click
from click.testing import CliRunner, Result

from jigsaw_pretrain.train.cli import main


def run_command(command: click.Command, *arguments: object) -> Result:
    """Run a command; an exception that is no exit is raised here."""
    result = CliRunner().invoke(command, [str(one) for one in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def call(*arguments: object) -> Result:
    """Run one of train's commands."""
    return run_command(main, *arguments)


def told(output: str) -> list[str]:
    """The lines of a command's output, without the word that is given before the work begins."""
    return [
        line
        for line in output.strip().splitlines()
        if not line.endswith((": reading the annotations", ": loading torch"))
    ]
