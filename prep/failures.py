"""What the system or a store says, as one line for the user."""

from collections.abc import Iterator
from contextlib import contextmanager

from jigsaw_pretrain.errors import UserError
from jigsaw_pretrain.formats.retry import redacted


@contextmanager
def plain_errors(out: str) -> Iterator[None]:
    """Turn what the system says (no space, no permission, a store that is down) into one line for the user."""
    try:
        yield
    except OSError as error:
        where = redacted(str(error.filename or out))
        reason = error.strerror or str(error) or type(error).__name__
        raise UserError(
            f"{where}: {redacted(reason)}. Mend that and run the same command again: it goes on with what is done."
        ) from error
