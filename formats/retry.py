"""Asking again: requests to object stores fail now and then, and most failures pass.

Waits are exponential with full jitter, so that a thousand workers that failed together do not come back together.
Costs nothing where the first try succeeds; a store that is down costs about half a minute before it is said.
"""

import random
import re
import time
from collections.abc import Callable
from typing import TypeVar

from jigsaw_pretrain.errors import UserError

Answer = TypeVar("Answer")

TRIES = 8
FIRST_WAIT, LONGEST_WAIT = 0.2, 10.0
"""Seconds: the first wait is drawn from 0 to FIRST_WAIT, each next one from a range twice as long."""

_FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, FileExistsError)
_FINAL += (UserError, NotImplementedError, ImportError, MemoryError)  # type: ignore[assignment]
_CREDENTIALS = ("NoCredentials", "PartialCredentials", "CredentialRetrieval", "DefaultCredentials", "ProfileNotFound")


class StoreError(OSError):
    """A request that failed for good, in words without credentials."""


def patiently(action: Callable[[], Answer], what: str, tries: int = TRIES) -> Answer:
    """What ``action`` returns, tried up to ``tries`` times; ``what`` names the thing in messages.

    FileNotFoundError and the like are raised at once; StoreError after the last try; UserError without credentials.
    """
    for turn in range(tries):
        try:
            return action()
        except _FINAL:
            raise
        except Exception as error:
            name = type(error).__name__
            if any(word in name for word in _CREDENTIALS):
                raise UserError(
                    f"{redacted(what)}: the driver found no credentials ({name}). Give them in its usual way, such as "
                    "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY."
                ) from error
            if turn + 1 == tries or not passing(error):
                raise StoreError(f"{redacted(what)}: {name} {redacted(_one_line(error))}".rstrip()) from error
            time.sleep(random.uniform(0, min(LONGEST_WAIT, FIRST_WAIT * 2**turn)))
    raise AssertionError("unreachable")


def passing(error: Exception) -> bool:
    """Whether a failure may pass: all but those that say the request itself is wrong (4xx and the driver's own)."""
    if isinstance(error, ValueError | TypeError):
        return False
    status = getattr(error, "status", None)
    return not (isinstance(status, int) and 400 <= status < 500 and status not in (408, 425, 429))


def redacted(text: str) -> str:
    """A URL or a message without what follows a question mark (signatures) and without user names and passwords."""
    return re.sub(r"\?[^\s'\")>]+", "?...", re.sub(r"://[^/@\s]+@", "://", text))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
