import importlib.util
import logging
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from jigsaw_pretrain.cli import (
    DEBUG,
    NEXT,
    UNFORESEEN,
    ByteCount,
    Command,
    FiniteRange,
    LazyGroup,
    Share,
    as_typed,
    run_named,
    tell_next,
)
from jigsaw_pretrain.errors import Interrupted, UserError


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


def failing(error: BaseException) -> click.Command:
    @click.command(cls=Command)
    @click.option("--data")
    def fail(data: str) -> None:
        raise error

    return fail


@click.command(cls=Command)
def wait() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(10)


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_signal_is_one_line_of_the_first_rank_and_status_3(rank: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", rank)
    for ends, told in (
        (wait, "SIGTERM"),
        (failing(Interrupted("3 of 8")), "3 of 8"),
        (failing(KeyboardInterrupt()), ""),
    ):
        result = CliRunner().invoke(ends, [])
        assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (3, "", int(rank == "0"))
        assert told in result.stderr or rank == "1"
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


MACHINE = (
    OSError(28, "No space left on device", "/disk/x"),
    PermissionError(13, "Permission denied", "/disk/x"),
    OSError(24, "Too many open files"),
    RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.\nmore"),
    RuntimeError("[enforce fail at inline_container.cc] . PytorchStreamWriter failed writing file data/0"),
    MemoryError("Unable to allocate 9 GiB"),
)


@pytest.mark.parametrize("error", MACHINE, ids=str)
def test_what_the_machine_says_is_one_line(error: Exception) -> None:
    result = CliRunner().invoke(failing(error), [])
    assert result.exit_code == 2 and result.stderr.count("\n") == 1 and "Traceback" not in result.stderr
    assert str(getattr(error, "filename", None) or "") in result.stderr


def test_an_error_is_one_line_whatever_a_files_names_are() -> None:
    for name in ("\x1b[31mred", "a\nError: b", "\x9b2J", "\u202egnp", "x" * 100_000):
        result = CliRunner().invoke(failing(UserError(f"{name} is missing")), [], color=True)
        assert result.exit_code == 2 and result.stderr.count("\n") == 1 and len(result.stderr) < 2000
        assert result.stderr.rstrip("\n").isprintable() and "is missing" in result.stderr


@pytest.mark.parametrize(
    "words", [("-m", "jigsaw_pretrain.prep"), ("-c", "from jigsaw_pretrain.prep.cli import main; main()")]
)
def test_a_working_folder_that_is_gone_is_told(words: tuple[str, str], tmp_path: Path) -> None:
    gone = f'cd {tmp_path} && mkdir gone && cd gone && rmdir {tmp_path}/gone && exec "$0" "$@"'
    shown = subprocess.run(
        ["sh", "-c", gone, sys.executable, *words, "status", "--out", "x"], capture_output=True, text=True
    )
    assert shown.returncode == 2 and shown.stderr.count("\n") == 1, shown.stderr


def test_what_nobody_foresaw_is_a_line_a_file_and_status_70(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(DEBUG)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    url = "https://me:geheim@host/x?sig=geheim"
    command = failing(KeyError(f"no {url}"))
    result = CliRunner().invoke(command, ["--data", url])
    assert result.exit_code == UNFORESEEN and result.stderr.count("\n") == 1
    (kept,) = tmp_path.iterdir()
    assert str(kept) in result.stderr and "Traceback" in kept.read_text() and "KeyError" in result.stderr
    assert "geheim" not in result.stderr + kept.read_text()
    with pytest.raises(KeyError):
        CliRunner().invoke(command, ["--debug"], catch_exceptions=False)


def put_own(folder: Path) -> None:
    """Modules of a user with the names of all of Python's that are there, and of some libraries."""
    there = (name for name in sys.stdlib_module_names if name[0] != "_" and importlib.util.find_spec(name))
    for name in (*there, "numpy", "torch", "click", "fsspec", "msgspec", "train"):
        path = folder / name / "__init__.py" if name in ("importlib", "email") else folder / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"raise SystemExit('{name} of the working folder')\n")


def test_nor_in_a_process_that_python_starts_for_a_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @click.command(cls=Command)
    def command() -> None:
        click.echo(subprocess.run([sys.executable, "-c", "import multiprocessing.spawn"]).returncode)

    put_own(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    assert CliRunner().invoke(command).stdout == "0\n" and "PYTHONSAFEPATH" not in os.environ


@pytest.mark.parametrize("stage", ["prep", "train", "detect"])
def test_a_users_file_in_the_working_folder_does_not_take_a_librarys_place(stage: str, tmp_path: Path) -> None:
    put_own(tmp_path)
    command = [sys.executable, "-m", f"jigsaw_pretrain.{stage}", "--help"]
    shown = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert shown.returncode == 0 and "Commands" in shown.stdout, shown.stderr


def test_a_wrong_path_is_told_without_torch() -> None:
    """Which takes seconds to import."""
    script = """
import sys
from jigsaw_pretrain.errors import UserError
for stage, words in COMMANDS:
    module = __import__(f"jigsaw_pretrain.{stage}.cli", fromlist=["main"])
    try:
        module.main(words.split(), standalone_mode=False)
    except UserError as error:
        print("/none" in error.message, "torch" in sys.modules, words)
"""
    data, held_out = "--annotations /none.json --images /", "--val-annotations /none.json --val-images /"
    commands = [
        ("train", "pretrain --data /none --run r"),
        ("train", "estimate --data /none"),
        ("train", "evaluate --run /none --data /"),
        ("train", "probe --run /none --data /"),
        ("train", "export --run /none --to timm --out w.pth"),
        ("train", "erf --weights random --data /none"),
        ("train", "preview --data /none --out p.png"),
        ("train", "report --run /none"),
        ("train", "digest --data /none"),
        ("detect", f"train {data} --run r"),
        ("detect", "eval --run /none"),
        ("detect", f"compare --out o --data / {data} {held_out}"),
    ]
    done = subprocess.run(
        [sys.executable, "-c", script.replace("COMMANDS", repr(commands))], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == [f"True False {words}" for _, words in commands], done.stderr


def test_warnings_of_libraries_are_shown_to_those_who_debug() -> None:
    @click.command(cls=Command)
    def warn() -> None:
        warnings.warn("of a library", FutureWarning, stacklevel=1)

    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        CliRunner().invoke(warn, [], env={DEBUG: ""})
        assert not seen
        CliRunner().invoke(warn, ["--debug"])
        assert [str(one.message) for one in seen] == ["of a library"]


def test_logs_go_to_standard_error_from_the_first_rank_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    @click.command(cls=Command)
    def speak() -> None:
        logging.getLogger("jigsaw_pretrain.x").info("from s3://me:geheim@bucket/x")
        logging.getLogger("jigsaw_pretrain.x").error("broken")

    assert CliRunner().invoke(speak, []).stderr == "from s3://bucket/x\nerror: broken\n"
    monkeypatch.setenv("RANK", "1")
    assert CliRunner().invoke(speak, []).stderr == "error: broken\n"


@pytest.mark.parametrize(
    "error",
    [
        ImportError("libtorch_cpu.so: failed to map segment from shared object"),
        OSError("libx.so: failed to map segment from shared object"),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ],
)
def test_what_memory_lacks_is_a_line_and_no_bug(error: Exception) -> None:
    result = CliRunner().invoke(failing(error), ["--data", "x"])
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1) and "memory" in result.stderr


def test_commands_are_told_as_the_shell_finds_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    programs = tmp_path / "env" / "bin"
    programs.mkdir(parents=True)
    for name in ("jigsaw-prep", "jigsaw-train"):
        (programs / name).write_text("")
        (programs / name).chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(programs / "python"))
    monkeypatch.setenv("PATH", "")
    text = "`jigsaw-prep shards`, /there/jigsaw-train, jigsaw-pretrain, jigsaw-detect"
    monkeypatch.chdir(tmp_path)
    assert as_typed(text) == text.replace("`jigsaw-prep", "`env/bin/jigsaw-prep")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert f"`{programs}/jigsaw-prep shards`" in as_typed(text)
    monkeypatch.setenv("PATH", str(programs))
    assert as_typed(text) == text


def test_what_comes_next_can_be_typed_and_is_told_by_the_first_rank(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["jigsaw-prep", "shards", "--images", "my photos/"]
    tell_next(("cut", words))
    told = capsys.readouterr().err.splitlines()
    assert "# cut" in told[1] and shlex.split(told[2])[1:] == words[1:]
    for variable in ("RANK", NEXT):
        # Another rank, and a command of `make`, which names its own targets.
        with monkeypatch.context() as here:
            here.setenv(variable, "1")
            tell_next(("cut", words))
        assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("data", "run"), [("/a/crops/", "crops"), (".", "mine"), ("s3://b/c", "c"), ("crops", "crops")]
)
def test_a_run_is_named_after_its_dataset(data: str, run: str) -> None:
    assert run_named(data) == f"runs/{run}"


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "1e999"])
@pytest.mark.parametrize("kind", [FiniteRange(0, 100), FiniteRange(min=0.1), ByteCount(), Share()])
def test_a_number_that_is_none_is_a_mistake_of_usage(kind: click.ParamType, text: str) -> None:
    with pytest.raises(click.BadParameter):
        kind.convert(text, None, None)


@pytest.mark.parametrize(("text", "count"), [("1", 1), ("500M", 500 << 20), ("1.5kb", 1536), ("200G", 200 << 30)])
def test_bytes_are_counted_in_powers_of_1024(text: str, count: int) -> None:
    assert ByteCount().convert(text, None, None) == count
    for wrong in ("0", "0.5", "-1", "1e305T", "M", ""):
        with pytest.raises(click.BadParameter):
            ByteCount().convert(wrong, None, None)


@pytest.mark.parametrize("stage", ["prep", "train", "detect"])
def test_no_command_takes_a_float_that_is_not_finite(stage: str) -> None:
    main = importlib.import_module(f"jigsaw_pretrain.{stage}.cli").main
    context, floats = click.Context(main), []
    for name in main.list_commands(context):
        found = main.get_command(context, name).params
        floats += [option.type for option in found if isinstance(option.type, type(click.FLOAT))]
    assert floats and all(isinstance(one, FiniteRange) for one in floats)
