"""A click group whose commands are imported when they are called.

`train digest` must not pay for what `train pretrain` imports (torch takes two seconds), and `--help` for neither.
"""

import importlib
from collections.abc import Mapping

import click


class LazyGroup(click.Group):
    """A group over ``{"name": ("module:attribute", "one line of help")}``, the modules being those of ``package``."""

    def __init__(self, *, package: str, lazy: Mapping[str, tuple[str, str]], help: str) -> None:
        super().__init__(help=help, context_settings={"help_option_names": ["-h", "--help"]})
        self._package = package
        self._lazy = dict(lazy)

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The commands in the order in which a user meets them."""
        return list(self._lazy)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return one command."""
        if cmd_name not in self._lazy:
            return None
        module, attribute = self._lazy[cmd_name][0].split(":")
        command = getattr(importlib.import_module(f"{self._package}.{module}"), attribute)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands from their given lines, importing none."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in self._lazy.items()])
