import sys

import click
import pytest
from click.testing import CliRunner

from jigsaw_pretrain.cli import Command, LazyGroup
from jigsaw_pretrain.errors import UserError


@click.command(cls=Command)
def refuse() -> None:
    raise UserError("x.json is missing: name another")


group = LazyGroup(package="tests.jigsaw_pretrain", help="", lazy={"refuse": ("test_cli:refuse", "")})


@pytest.mark.parametrize(("command", "arguments"), [(refuse, []), (group, ["refuse"])])
def test_a_user_error_is_one_line_and_status_2(command: click.Command, arguments: list[str]) -> None:
    result = CliRunner().invoke(command, arguments)
    assert (result.exit_code, result.stdout, result.stderr) == (2, "", "Error: x.json is missing: name another\n")
    with pytest.raises(UserError, match="name another"):
        command.main(arguments, standalone_mode=False)


def test_the_library_raises_no_exception_of_click() -> None:
    assert not issubclass(UserError, click.ClickException) and "click" not in vars(sys.modules[UserError.__module__])
