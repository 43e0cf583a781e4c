"""The exceptions for a user's mistake and for a signal that ended a run, neither a defect; and what a message may show.

Raise UserError wherever the cause lies outside the program: a file, an option, a machine. Commands print its message
and no traceback (jigsaw_pretrain/cli.py). Anything else that is raised is a defect of this project and keeps its
traceback.
"""

import re
from contextvars import ContextVar

COMMAND_LINE: ContextVar[tuple[str, ...]] = ContextVar("COMMAND_LINE", default=())
"""The words of the command that runs; none in a program that calls the library.

What a file of someone else's must not decide is allowed by them (train/models/backbones.py).
"""


_COPIED: dict[str, str] = {}
"""Folders of copies, and where each was copied from."""


def name_copies(folder: str, source: str) -> None:
    """Have messages name what lies in a folder of copies as the user does: by where it was copied from."""
    _COPIED[folder] = redacted(source)


def as_named(text: str) -> str:
    """A message in which copies are named by where they were copied from."""
    for folder, source in _COPIED.items():
        text = text.replace(folder, source)
    return text


class UserError(Exception):
    """A mistake that the user can fix: one line that names the file, the thing and the remedy."""

    exit_code = 2
    """The exit status of a command that ends with it."""

    def __init__(self, message: str) -> None:
        self.message = as_named(message)
        super().__init__(self.message)


class Interrupted(KeyboardInterrupt):
    """A signal (Ctrl-C, SIGTERM) ended a run before its end: what was done is kept, and the same call goes on.

    An interrupt, so that a program that does not await it ends there, and does not export half a run.
    """

    exit_code = 3
    """The exit status of a command that a signal ended."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


_SECRET = re.compile(
    r"(?i)\b([\w-]*(?:token|signature|secret|password|passwd|credential|accesskey|access_key|apikey|api_key|sig))=[^\s&'\")]+"
)


def redacted(text: str) -> str:
    """A text without what may be secret in its URLs: user names and passwords, queries, fragments, tokens."""
    text = re.sub(r"://[^/\s'\"]*@", "://", text)
    text = re.sub(r"(://[^\s'\")>?#]*)[?#][^\s'\")>]+", r"\1?...", text)
    return _SECRET.sub(r"\1=...", text)
