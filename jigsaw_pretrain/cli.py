"""What the command lines of all stages share: groups, commands, types of options, errors in one line, the log.

A group imports a command when it is called, and no command for its own ``--help``: `train digest` must not pay for
what `train pretrain` imports (torch takes two seconds). A UserError that leaves a command is printed without a
traceback, whether the command is called by itself or through its group. Ctrl-C and SIGTERM end every command in one
line and status 3, and those that train save first. Libraries log, and commands show the log.
"""

import importlib
import io
import json
import logging
import math
import os
import re
import shlex
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

from jigsaw_pretrain.errors import COMMAND_LINE, Interrupted, UserError, redacted
from jigsaw_pretrain.process import LIBRARIES, TORCH, check_address_space, end_at_once, own_semaphores

if TYPE_CHECKING:
    from rich.console import Console


def is_first_rank() -> bool:
    """Whether this process is rank 0 of torchrun's, or alone; known before torch is imported."""
    return os.environ.get("RANK", "0") == "0"


def is_one_of_several() -> bool:
    """Whether this process is one of several ranks of torchrun's."""
    return os.environ.get("WORLD_SIZE", "1") not in ("", "1")


def is_restarted() -> bool:
    """Whether torchrun has started all ranks anew after a failure, with the same command line: then a run resumes."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "") not in ("", "0")


def as_typed(text: str) -> str:
    """A text whose commands of this project (``jigsaw-prep ...``) can be typed where this process was started.

    They lie beside Python, where an environment that was not activated does not let the shell find them.
    """
    return _PROGRAM.sub(lambda found: _as_found(found[0]), text)


_PROGRAM = re.compile(r"(?<![\w./-])jigsaw-(?:prep|train|detect)(?![\w-])")


def _as_found(name: str) -> str:
    path = Path(sys.executable).parent / name
    if shutil.which(name) or not path.exists():
        return name
    try:
        here = Path.cwd()
    except FileNotFoundError:
        return str(path)  # the working folder was removed
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")

MOST_CHARACTERS = 1200
"""The most of an error's line that is shown."""


def printable(text: str) -> str:
    """A text as one line that a terminal shows as it is written: a file's names may hold what moves the cursor."""
    return _UNPRINTABLE.sub(lambda found: " " if found[0] in "\r\n\t" else ascii(found[0])[1:-1], text)


_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def plain(text: str) -> str:
    """A name from a file as rich prints it as it is: no control characters, and brackets that are no markup."""
    from rich.markup import escape

    return escape(_CONTROL.sub("?", text))


def console_for_names() -> "Console":
    """A rich console that prints what ``plain`` gives as it is: without emoji, for a class may be called :car:."""
    from rich.console import Console

    return Console(emoji=False)


def _shortened(line: str) -> str:
    half = MOST_CHARACTERS // 2
    return line if len(line) <= MOST_CHARACTERS else f"{line[:half]} ... {line[-half:]}"


def tell_next(*steps: tuple[str, Sequence[str]]) -> None:
    """Say on standard error what can be typed next; steps: what it is for, and the words of the command.

    Silent under `make`, which names its own targets instead.
    """
    if is_first_rank() and NEXT not in os.environ:
        lines = [f"  # {purpose}\n  {shlex.join(words)}" for purpose, words in steps]
        click.echo(as_typed(redacted("\n".join(["next, whichever you like:", *lines]))), err=True)


NEXT = "JIGSAW_NEXT"
"""The environment variable by which the Makefile keeps to itself what can be typed next."""

HELD_OUT = "-validation"
"""Ends the name of the folder of crops that a run has not seen: runs/mine-validation."""


def run_named(data: str) -> str:
    """What a run on a dataset may be called, ``runs/crops`` of ``/data/crops``."""
    name = data.rstrip("/").rpartition("/")[2]
    return f"runs/{'mine' if name in ('', '.', '..') else name}"


class _Echo(logging.Handler):
    """Shows what this project's modules log on standard error; of several ranks only the first tells what is no error.

    Standard error is looked up for each record: tests and progress bars replace it.
    """

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno < logging.ERROR and not is_first_rank():
            return
        level = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        # click.echo would write below a progress bar's stand-in for standard error, into the bar's own line.
        if sys.stderr is None:
            return  # closed by the shell (2>&-): print would take standard output in its place
        told = "\n".join(printable(line) for line in record.getMessage().split("\n"))
        print(as_typed(redacted(level + told)), file=sys.stderr, flush=True)


def show_log() -> None:
    """Show the log of the project's modules, from INFO on; for commands, as a library's log is its caller's."""
    for stream in (sys.stdout, sys.stderr):
        # What a terminal's encoding lacks (class names) is replaced, and never ends a command.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    logger = logging.getLogger(__package__)
    logger.setLevel(logging.INFO)
    if not any(isinstance(handler, _Echo) for handler in logger.handlers):
        logger.addHandler(_Echo())


UNFORESEEN = 70
"""The exit status of a command that ends with an exception that nobody foresaw (EX_SOFTWARE of sysexits.h)."""

DEBUG = "JIGSAW_DEBUG"
"""The environment variable that does what ``--debug`` does."""

_SAFE = "PYTHONSAFEPATH"
"""Python's variable that keeps the working folder from its modules: a user's json.py would be taken for its own."""


class Command(click.Command):
    """A click command whose errors are one line on standard error: ``@click.command(cls=Command)``.

    A UserError is the user's to mend, an OSError the machine's; anything else is a bug, whose traceback goes to a file
    unless ``--debug`` is given.
    """

    def __init__(self, *args: Any, **extra: Any) -> None:
        super().__init__(*args, **extra)
        shown = "Show the traceback of an error that nobody foresaw, and libraries' warnings."
        self.params.append(click.Option(["--debug"], is_flag=True, expose_value=False, help=shown))

    def main(self, *args: Any, **extra: Any) -> Any:
        """Run the command; without ``standalone_mode`` the error is the caller's, as click's own are."""
        try:
            return self._main(*args, **extra)
        except SystemExit as ending:
            # gloo's threads drop a collective's tensors some time after its callers have gone on, and need the
            # interpreter for it: where that is at its end, C++ ends the process instead, by SIGABRT (torch 2.15).
            if is_one_of_several() and extra.get("standalone_mode", True) and isinstance(ending.code, int | None):
                end_at_once(ending.code or 0)
            raise

    def _main(self, *args: Any, **extra: Any) -> Any:
        show_log()
        own_semaphores()
        words = list(args[0] if args and args[0] is not None else extra.get("args") or sys.argv[1:])
        COMMAND_LINE.set(tuple(words))
        debug = "--debug" in words or bool(os.environ.get(DEBUG))
        hook = threading.excepthook
        if not debug:
            threading.excepthook = _tell_of_thread
        # Python starts its own processes (workers' among them) with the working folder first among the modules' places.
        safe = os.environ.get(_SAFE)
        os.environ[_SAFE] = "1"
        former = signal.getsignal(signal.SIGTERM)
        # Only the main thread may install handlers; what ignores the signal, or serves it, stays as it is.
        serves = former == signal.SIG_DFL and threading.current_thread() is threading.main_thread()
        if serves:
            signal.signal(signal.SIGTERM, _interrupt)
        try:
            with warnings.catch_warnings():
                if not debug and not sys.warnoptions:
                    # Libraries' own, of what is theirs or ours to mend; what a user should know is logged.
                    warnings.simplefilter("ignore")
                _check_working_folder()
                return super().main(*args, **extra)
        except Exception as error:
            if not extra.get("standalone_mode", True):
                raise
            if _of_machine(error) is None and debug:
                raise
            line, status = _one_line(error, words)
        finally:
            threading.excepthook = hook
            if safe is None:
                os.environ.pop(_SAFE, None)
            else:
                os.environ[_SAFE] = safe
            if serves:
                signal.signal(signal.SIGTERM, former)
        said = as_typed(f"Error: {_shortened(printable(line))}")
        _tell_torchrun(said)
        click.echo(said, err=True)
        sys.exit(status)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command's function; a signal that ends it is one line and status 3."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            # Here, because click itself would make it "Aborted!" and status 1.
            if is_first_rank():
                told = error.message if isinstance(error, Interrupted) else "stopped before the end"
                click.echo(as_typed(redacted(printable(told))), err=True)
            sys.exit(Interrupted.exit_code)


def _check_working_folder() -> None:
    """Refuse a working folder that was removed: relative paths lead nowhere, and torch's libraries are not found."""
    try:
        Path.cwd()
    except FileNotFoundError as error:
        raise UserError("the working folder was removed: change to one that exists (cd) and run it again") from error


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise Interrupted(f"stopped on {signal.Signals(number).name} before the end")


def _tell_of_thread(ended: threading.ExceptHookArgs) -> None:
    """Say in one line that a library's thread has ended with an exception; the command goes on, or says its own."""
    error = ended.exc_value
    if isinstance(error, Exception):
        told = _of_machine(error) or f"{type(error).__name__} {_first_line(error)}"
        logging.getLogger(__package__).warning("a thread has ended: %s", told)


def _tell_torchrun(said: str) -> None:
    """Leave an error for torchrun, whose own end of a run then repeats it; nothing where it did not start this."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:
        left = {"message": {"message": said, "extraInfo": {"py_callstack": said, "timestamp": str(int(time.time()))}}}
        with suppress(OSError):
            Path(file).write_text(json.dumps(left), encoding="utf-8")


def _one_line(error: Exception, words: Sequence[str]) -> tuple[str, int]:
    """What to say of an error that ends a command called with these words, and the exit status."""
    if isinstance(error, UserError):
        return redacted(error.message), error.exit_code
    if (told := _of_machine(error)) is not None:
        return redacted(told), UserError.exit_code
    called = redacted(" ".join([Path(sys.argv[0]).name, *words]))[:300]
    told = "".join(traceback.format_exception(error))
    try:
        with tempfile.NamedTemporaryFile("w", prefix="jigsaw-traceback-", suffix=".txt", delete=False) as file:
            file.write(f"{called}\n\n{redacted(told)}")
        kept = f"the traceback in {file.name}"
    except OSError:
        kept = "the traceback that --debug shows"
    innermost = traceback.extract_tb(error.__traceback__)[-1]
    found = redacted(f"{type(error).__name__} {_first_line(error)}".strip())
    return (
        f"{called}: {found} (in {Path(innermost.filename).name}, line {innermost.lineno}). Nobody foresaw this: it is "
        f"a bug of jigsaw-pretrain. Please report it with {kept}."
    ), UNFORESEEN


_MACHINE = {
    "DataLoader worker": "a process that loads data was killed, most likely for want of memory: run the command again "
    "(pretrain: with --resume), with fewer --workers",
    "Too many open files": "too many files are open: raise the limit (ulimit -n), or lower --workers",
    "No space left on device": "the disk is full: make room and run the command again",
    "Permission denied": "you may not do that there: mend its permissions, or name another place",
    "Read-only file system": "nothing can be written there: name another place",
    "inline_container": "a file cannot be written whole, most likely as the disk is full: make room",
    "PytorchStreamWriter": "a file cannot be written whole, most likely as the disk is full: make room",
    "could not create a primitive": "there is not enough memory: lower the batch or --workers",
    "DefaultCPUAllocator": "there is not enough memory: lower the batch or --workers",
    "CUDA out of memory": "the GPU has not enough memory: lower optim.micro_batch or the batch",
    "failed to map segment": "there is not enough memory to load a library: raise the limit (ulimit -v)",
    "can't start new thread": "no more threads can be started: raise the limit (ulimit -u)",
}
"""What errors of libraries mean that come from the machine, by a part of their text."""


def _of_machine(error: Exception) -> str | None:
    """What to say of an error that the user or the machine has caused; None for any other."""
    if isinstance(error, UserError):
        return error.message
    where = f"{error.filename}: " if isinstance(error, OSError) and error.filename else ""
    text = str(error)
    for part, meaning in _MACHINE.items():
        if part in text and isinstance(error, OSError | RuntimeError | ImportError):
            said = error.strerror if where and isinstance(error, OSError) and error.strerror else _first_line(error)
            return f"{where}{meaning} ({said})"
    if isinstance(error, OSError):
        return f"{where}{error.strerror or _first_line(error) or type(error).__name__}"
    if isinstance(error, MemoryError):
        return f"there is not enough memory for this: give it more, or fewer --workers ({_first_line(error)})"
    return None


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else ""


class LazyGroup(Command, click.Group):
    """A group over ``{"name": ("module:attribute", "one line of help")}``, the modules being those of ``package``.

    light: the commands that do not load torch, or None for all of them.
    """

    def __init__(
        self,
        *,
        package: str,
        lazy: Mapping[str, tuple[str, str]],
        help: str,
        light: Collection[str] | None = None,
    ) -> None:
        super().__init__(help=help, context_settings={"help_option_names": ["-h", "--help"]})
        self._package = package
        self._lazy = dict(lazy)
        self._light = frozenset(lazy if light is None else light)
        click.version_option(package_name="jigsaw-pretrain", message="%(package)s %(version)s")(self)

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The commands in the order in which a user meets them."""
        return list(self._lazy)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return one command."""
        if cmd_name not in self._lazy:
            return None
        check_address_space(LIBRARIES if cmd_name in self._light else TORCH)
        module, attribute = self._lazy[cmd_name][0].split(":")
        command = getattr(importlib.import_module(f"{self._package}.{module}"), attribute)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands from their given lines, importing none."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in self._lazy.items()])


@contextmanager
def one_line_errors(out: str) -> Iterator[None]:
    """Turn what the system says (no space, no permission, a store that is down) into a UserError of one line."""
    try:
        yield
    except OSError as error:
        where = redacted(str(error.filename or out))
        reason = error.strerror or str(error) or type(error).__name__
        raise UserError(
            f"{where}: {redacted(reason)}. Fix this and run the same command again; finished parts are kept."
        ) from error


class FiniteRange(click.FloatRange):
    """A number on the command line, within bounds; nan, which lies within any, and infinity are none."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The number."""
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is no number that this option takes: write a finite one.", param, ctx)
        return float(number)


class Share(click.ParamType):
    """A share on the command line: ``1%`` or ``0.01``."""

    name = "share"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The share as a number from 0 to 1."""
        text = str(value).strip()
        try:
            share = float(text[:-1]) / 100 if text.endswith("%") else float(text)
        except ValueError:
            self.fail(f"{text!r} is no share. Write it as 1% or as 0.01.", param, ctx)
        if not 0 <= share <= 1:
            self.fail(f"{text} is not between 0 and 100 %. Write it as 1% or as 0.01.", param, ctx)
        return share


class ByteCount(click.ParamType):
    """A number of bytes, with K, M, G or T for powers of 1024."""

    name = "bytes"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The number."""
        if isinstance(value, int):
            return value
        text = str(value).upper().removesuffix("B")
        power = "KMGT".find(text[-1:]) + 1 if text else 0
        try:
            count = float(text[:-1] if power else text) * 1024**power
        except ValueError:
            self.fail(f"{value!r} is not a number of bytes such as 500M or 200G", param, ctx)
        if not 1 <= count < math.inf:
            self.fail(f"{value} is not a number of bytes of at least 1: write one such as 500M or 200G", param, ctx)
        return int(count)
