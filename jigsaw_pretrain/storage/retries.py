"""Requests that are made again: which failures pass and which do not, how long to wait, and how they are reported.

Most failures of a store pass. Waits grow and are drawn at random, so that a thousand workers that failed together do
not come back together. This costs nothing where the first try succeeds; a store that is down costs about half a minute
before that is reported. Messages hold no credentials (``redacted``).
"""

import errno
import random
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from jigsaw_pretrain.errors import UserError, redacted

Answer = TypeVar("Answer")

PATIENCE_SECONDS = 12.0
"""A failed request of a Storage is not repeated after this many seconds, so a silent store is reported within 30 s."""

TRIES = 8
"""How often a request of a Storage is made before its failure is raised."""

FIRST_WAIT, LONGEST_WAIT = 0.2, 10.0
"""Seconds before a second try of ``with_retries``, and the most before any."""

FIRST_PAUSE, LONGEST_PAUSE = 0.25, 20.0
"""The same of ``fetch_with_retries``."""

_FINAL = (
    *(FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, FileExistsError),
    *(UserError, NotImplementedError, ImportError, MemoryError),
)

_HOPELESS = (FileNotFoundError, UserError, ImportError, TypeError, AttributeError, NotImplementedError)

_SETTLED = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EINVAL)
"""What no further try changes: a full disk, a file that is too large or none."""

_CREDENTIALS = ("NoCredentials", "PartialCredentials", "CredentialRetrieval", "DefaultCredentials", "ProfileNotFound")

# Not the module's own generator: a forked worker inherits its state, and workers must not wait alike.
_RANDOM = random.SystemRandom()


class StoreError(OSError):
    """A request that failed for good, in words without credentials."""


class WrongContent(Exception):
    """What was fetched is not what the manifest says; the message says how."""


class TooLong(WrongContent):
    """What was fetched has more bytes than such a file may have: no further try changes that."""


def with_retries(
    action: Callable[[], Answer],
    what: str,
    tries: int = TRIES,
    *,
    waits: tuple[float, float, float] | None = None,
    failure: "Callable[[Exception, str, bool], Exception | None] | None" = None,
) -> Answer:
    """What ``action`` returns, tried up to ``tries`` times; ``what`` names the thing in messages.

    FileNotFoundError and the like are raised at once; StoreError after the last try; UserError without credentials.
    Callers may decide otherwise. failure: gives what to raise for an exception of the action, told ``what`` and whether
    this was the last try; None to try again. waits: seconds before the second try at most, before any try at most, and
    the least share of these that is waited; each wait may be twice as long as the one before.
    """
    first, longest, least = waits or (FIRST_WAIT, LONGEST_WAIT, 0.0)
    begun = time.monotonic()
    for attempt in range(tries):
        try:
            return action()
        except Exception as error:
            is_last = attempt + 1 == tries or (failure is None and time.monotonic() - begun > PATIENCE_SECONDS)
            raised = (failure or _store_failure)(error, what, is_last)
            if raised is error:
                raise
            if raised is not None:
                raise raised from error
        time.sleep(min(longest, first * 2**attempt) * _RANDOM.uniform(least, 1.0))
    raise AssertionError("unreachable")


def _store_failure(error: Exception, what: str, is_last: bool) -> Exception | None:
    """What a request of a Storage raises for a failure; None where it is made again."""
    known = in_words(error, what)
    if known is not None or isinstance(error, _FINAL):
        return known or error
    name = type(error).__name__
    if any(word in name for word in _CREDENTIALS):
        return UserError(
            f"{redacted(what)}: the driver found no credentials ({name}). Give them in its usual way, such as "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY."
        )
    if is_last or not is_transient(error):
        return StoreError(f"{redacted(what)}: {name} {redacted(' '.join(str(error).split())[:200])}".rstrip())
    return None


_MEANINGS = {
    **dict.fromkeys(
        ("ExpiredToken", "TokenRefreshRequired", "RequestExpired"), "the credentials have expired: renew them"
    ),
    **dict.fromkeys(
        ("PermanentRedirect", "TemporaryRedirect", "Redirect", "301", "307", "IllegalLocationConstraintException"),
        "the store redirects to another place: name the bucket's own region (AWS_REGION) or endpoint",
    ),
    "AuthorizationHeaderMalformed": "the bucket is in another region: name it in AWS_REGION",
    **dict.fromkeys(("SignatureDoesNotMatch", "InvalidAccessKeyId"), "the credentials are wrong"),
    "RequestTimeTooSkewed": "this machine's clock is wrong, so the store refuses its signatures",
    "TooManyRedirects": "the web server redirects without end: name the address that it leads to",
    **dict.fromkeys(
        ("NonHttpUrlRedirectClientError", "InvalidUrlRedirectClientError"),
        "the web server redirects to what is no web address: ask whoever runs it for the right one",
    ),
    "401": "the web server asks for credentials, or those in the URL have expired",
    "403": "the web server refuses access: the credentials or the signature in the URL are wrong or have expired",
}
"""What a store's or a web server's refusal means, by its code or its exception's name."""

OUT_OF_FILES = (errno.EMFILE, errno.ENFILE)


def in_words(error: Exception, what: str) -> UserError | None:
    """A failure that no further try will change and whose cause is known, in words."""
    if isinstance(error, OSError) and error.errno in OUT_OF_FILES:
        return UserError(
            f"{redacted(what)}: too many files are open: raise the limit (ulimit -n), or use fewer --workers"
        )
    response = getattr(error.__cause__, "response", None)
    codes = [str(response.get("Error", {}).get("Code"))] if isinstance(response, dict) else []
    codes += [str(_status(error)), *(type(one).__name__ for one in _chain(error))]
    if "maximum recursion depth" in str(error):
        # So ends botocore where a store redirects to itself.
        codes.append("Redirect")
    meaning = next((_MEANINGS[code] for code in codes if code in _MEANINGS), None)
    return UserError(f"{redacted(what)}: {meaning} ({redacted(first_line(error))})") if meaning else None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An exception and those that it came from."""
    for _ in range(10):
        if error is None:
            return
        yield error
        error = error.__cause__ or error.__context__


def _status(error: Exception) -> Any:
    """The status of an answer, by whichever name the driver gives it; None where there is none."""
    found = (getattr(error, name, None) for name in ("status", "status_code", "code"))
    return next((one for one in found if isinstance(one, int)), None)


def is_transient(error: Exception) -> bool:
    """Whether a failure may pass: all but those that say the request itself is wrong (4xx and the driver's own)."""
    if isinstance(error, ValueError | TypeError):
        return False
    status = _status(error)
    return not (isinstance(status, int) and 400 <= status < 500 and status not in (408, 425, 429))


def fetch_with_retries(action: Callable[[], Answer], retries: int, what: str, verb: str = "read") -> Answer:
    """The result of ``action``, tried again up to ``retries`` times, whatever fails: for files that training needs.

    Raises UserError naming ``what`` where the store keeps failing or cannot be asked, WrongContent where its content
    keeps being wrong, FileNotFoundError where there is none.
    """

    def failure(error: Exception, what: str, is_last: bool) -> Exception | None:
        if (known := in_words(error, what)) is not None:
            return known
        if isinstance(error, PermissionError):
            return UserError(redacted(f"{what} may not be {verb} ({first_line(error)}): check the credentials"))
        settled = isinstance(error, OSError) and error.errno in _SETTLED
        if settled or isinstance(error, (*_HOPELESS, TooLong)) or (is_last and isinstance(error, WrongContent)):
            return error
        if is_last:
            return UserError(
                f"{redacted(what)} cannot be {verb} after {retries + 1} attempts ({redacted(first_line(error))}): "
                "check the store and the network, then run the command again (pretrain: with --resume); --read-retries "
                "and --read-timeout allow for a slower or less reliable store"
            )
        return None

    # Half of each wait is certain: a training run has few readers, and a store that is down needs time.
    return with_retries(action, what, retries + 1, waits=(FIRST_PAUSE, LONGEST_PAUSE, 0.5), failure=failure)


def first_line(error: BaseException) -> str:
    """The kind of an exception and the first line of what it says."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
