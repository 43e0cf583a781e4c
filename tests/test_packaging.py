"""The wheel is complete and runs anywhere, also beside a user's own train.py, prep/ and formats.py.

The environment it is installed into is a fresh one. Its libraries are this one's, by a line in a .pth file, which does
not pull in the finder of the editable installation.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.helpers.settings import REPOSITORY
from tests.test_tree import FOLDERS, PACKAGE, tracked

USERS_OWN = {
    "train.py": """
import multiprocessing
import sys

from jigsaw_pretrain.detect.cli import main as detect
from jigsaw_pretrain.train.cli import main as train

if __name__ == "__main__":
    method, *arguments = sys.argv[1:]
    multiprocessing.set_start_method(method)
    while arguments:
        end = arguments.index(";") if ";" in arguments else len(arguments)
        stage, *command = arguments[:end]
        {"train": train, "detect": detect}[stage](command, standalone_mode=False)
        arguments = arguments[end + 1 :]
    assert not {"prep", "train", "formats", "detect"} & set(sys.modules)
    print(*(module.__file__ for name, module in sys.modules.items() if name.startswith("jigsaw_pretrain.")))
""",
    "prep/__init__.py": "raise ImportError('the user has a prep of their own')",
    "formats.py": "raise ImportError('the user has a formats of their own')",
    "detect.py": "raise ImportError('the user has a detect of their own')",
    "mymodel.py": """
from torch import nn


def small():
    widths = (3, 8, 16, 32, 32, 32)
    pairs = zip(widths, widths[1:])
    return nn.Sequential(*(nn.Sequential(nn.Conv2d(a, b, 3, stride=2, padding=1), nn.ReLU()) for a, b in pairs))
""",
}

TOY = [
    part
    for setting in (
        *(
            "data.template_size=64",
            "data.template_split=32",
            "data.batch=4",
            "data.lanes=4",
            "optim.steps=2",
            "optim.warmup_steps=1",
        ),
        *("optim.lr_batch=4", "optim.lr_start=0.01", "optim.lr_peak=0.02", "loss.erf_every=2"),
    )
    for part in ("--set", setting)
]


@dataclass(frozen=True)
class Installed:
    """A wheel in an environment of its own."""

    wheel: Path
    bin: Path
    folder: Path
    """The user's folder, in which everything runs."""

    def run(self, *command: str, timeout: float = 240) -> str:
        """Run ``command`` in the user's folder, a script of the environment or ``python ...``; its output."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        environment |= {"PATH": f"{self.bin}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [str(self.bin / command[0]), *command[1:]],
            cwd=self.folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}"
        return done.stdout


def expected_files() -> set[str]:
    """What the wheel must hold, from what git tracks."""
    found = set()
    for name in tracked():
        first, _, rest = name.partition("/")
        if first in FOLDERS:
            found.add(f"{PACKAGE}/{rest}" if first == PACKAGE else f"{PACKAGE}/{name}")
        elif first == "recipes":
            found.add(f"{PACKAGE}/{name}")
    return found


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the tracked files: setuptools leaves build/lib where it builds, and would pack it again."""
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in tracked():
        if name.split("/")[0] in (*FOLDERS, "recipes", "pyproject.toml", "setup.py", "README.md", "LICENSE"):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPOSITORY / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", str(source), "--no-deps", "--no-build-isolation", "--quiet"]
    command += ["--disable-pip-version-check", "--wheel-dir", str(built)]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    (found,) = built.iterdir()
    return found


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    environment, folder = tmp_path_factory.mktemp("venv"), tmp_path_factory.mktemp("user")
    venv.create(environment, with_pip=False, symlinks=True)
    python = environment / "bin" / "python"
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index", "--quiet"]
    subprocess.run([*command, "--disable-pip-version-check", str(wheel)], check=True, capture_output=True, timeout=120)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(environment)}))
    (site / "libraries.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    for name, text in USERS_OWN.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    found = Installed(wheel, environment / "bin", folder)
    found.run("jigsaw-prep", "sample-data", "--out", "sample", "--images", "24")
    source = ("--annotations", "sample/annotations.json", "--images", "sample/images")
    found.run("jigsaw-prep", "shards", *source, "--out", "data", "--workers", "2")
    return found


def test_the_wheel_has_one_name_and_every_file(wheel: Path) -> None:
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
        (top_level,) = (name for name in names if name.endswith(".dist-info/top_level.txt"))
        assert archive.read(top_level).decode().split() == [PACKAGE]
    metadata = top_level.split("/")[0]
    assert {name for name in names if not name.startswith(f"{metadata}/")} == expected_files()
    assert f"{PACKAGE}/py.typed" in names
    assert any(name.endswith(".j2") for name in names) or not any(name.endswith(".j2") for name in tracked())


def only_the_wheel(installed: Installed, printed: str) -> bool:
    """Whether the modules that ran were those of the wheel: the driver's last line lists them."""
    files = printed.splitlines()[-1].split()
    return len(files) > 40 and all(name.startswith(str(installed.bin.parent)) for name in files)


@pytest.mark.slow(seconds=35)
def test_a_backbone_of_ones_own_is_pretrained_by_a_spawned_worker(installed: Installed) -> None:
    command = ("pretrain", "--data", "data", "--run", "own", "--workers", "1", "--no-page", "--log", "none")
    done = installed.run(
        "python", "train.py", "spawn", "train", *command, *TOY, "--set", "model.backbone=mymodel:small"
    )
    assert (installed.folder / "own" / "backbone.pth").is_file()
    assert only_the_wheel(installed, done)


@pytest.mark.slow(seconds=15)
def test_a_forked_worker_then_export_and_a_detector(installed: Installed) -> None:
    pretrain = ("pretrain", "--data", "data", "--run", "resnet", "--workers", "1", "--no-page", "--log", "none")
    export = ("export", "--run", "resnet", "--to", "torchvision", "--out", "weights.pth")
    tiny = (
        "data.batch=2",
        "optim.steps=1",
        "data.short_side=64",
        "model.neck_channels=16",
        "model.fc=16",
        "model.rois=8",
        "model.proposals=16",
        "model.backbone=resnet18",
    )
    recipe = "detect-sample"
    detector: tuple[str, ...] = ("train", "--annotations", "sample/annotations.json", "--images", "sample/images")
    detector += ("--run", "detector", "--init", "weights.pth", "--recipe", recipe, "--workers", "1")
    detector += tuple(part for setting in tiny for part in ("--set", setting))
    begun = ("train", *pretrain, *TOY, "--set", "model.backbone=resnet18")
    stages = (*begun, ";", "train", *export, ";", "detect", *detector, ";", "detect", "compare", "--help")
    done = installed.run("python", "train.py", "fork", *stages)
    assert (installed.folder / "weights.pth").stat().st_size > 1 << 20
    assert "scratch" in done and "compare" in installed.run("jigsaw-detect", "--help")
    assert any((installed.folder / "detector").iterdir())
    assert only_the_wheel(installed, done)


LAUNCH = ("python", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node")


@pytest.mark.slow(seconds=25)
def test_torchrun_starts_the_module(installed: Installed) -> None:
    # Python 3.11's argparse would take --run for torchrun's ambiguous --run-path, were it not for the two dashes.
    base = ("-m", "--", "jigsaw_pretrain.train", "pretrain", "--data", "data", "--run", "ranks", "--workers", "0")
    chosen = ("--no-page", *TOY, "--set", "model.backbone=mymodel:small", "--log", "none")
    installed.run(*LAUNCH, "2", *base, *chosen)
    assert (installed.folder / "ranks" / "backbone.pth").is_file()


def test_torchrun_starts_the_script(installed: Installed) -> None:
    # What the script does from then on is what the module does; that takes a rank ten seconds of imports.
    assert "pretrain" in installed.run(*LAUNCH, "1", "--no-python", "--", "jigsaw-train", "--help")


RUN_THE_STAGES = """
import collections, runpy, sys
for stage in ("prep", "train", "detect"):
    sys.argv = [stage, "--help"]
    try:
        runpy.run_module(stage, run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        assert not ended.code, ended
import jigsaw_pretrain.detect.training, jigsaw_pretrain.prep.pipeline, jigsaw_pretrain.train.engine.trainer
loaded = {id(module): module for module in sys.modules.values()}.values()
origins = collections.Counter(spec.origin for module in loaded if (spec := getattr(module, "__spec__", None)))
print(*(origin for origin, count in origins.items() if count > 1 and str(origin).endswith(".py")))
"""


@pytest.mark.slow(seconds=4)
def test_the_stages_run_in_the_checkout_and_no_module_is_there_twice() -> None:
    command = [sys.executable, "-c", RUN_THE_STAGES]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("Usage:") == 3
    # `python -m prep` imports the package prep for its docstring: that one file, and no module that does anything.
    twice = {str(Path(name).relative_to(REPOSITORY)) for name in done.stdout.splitlines()[-1].split()}
    assert twice <= {"prep/__init__.py", "train/__init__.py", "detect/__init__.py"}
