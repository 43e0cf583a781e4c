"""examples/ and the Dockerfile: what they say is run, at toy size.

Slurm's scripts run in bash with sbatch, srun and scontrol that write down what they are given; a Job's command is put
together as Kubernetes does it. The commands found so run in this process.
"""

import os
import re
import shlex
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import nbclient
import nbformat
import pytest
import yaml
from torch.distributed.run import get_args_parser

from jigsaw_pretrain.formats.dataset.dataset import open_dataset
from jigsaw_pretrain.prep.cli import main as prep
from jigsaw_pretrain.train.cli import main as train
from tests.helpers.commands import run_command
from tests.helpers.jobs import BASE
from tests.helpers.prepped import Small
from tests.helpers.settings import REPOSITORY, SOAK
from tests.test_tree import tracked

EXAMPLES = REPOSITORY / "examples"

RECORDED = ("docker", "jigsaw-prep", "jigsaw-train", "jupyter", "kubectl", "make", "sbatch", "torchrun")
"""Programs that only write down how they are called."""
RECORD = 'printf "%q " "$(basename "$0")" "$@" >> "$CALLS"; echo >> "$CALLS"'


@dataclass(frozen=True)
class Shell:
    """bash in a folder, with programs of our own first in PATH."""

    folder: Path
    bin: Path

    def program(self, name: str, body: str) -> None:
        """Put a script there."""
        (self.bin / name).write_text(f"#!/bin/bash\n{body}\n")
        (self.bin / name).chmod(0o755)

    def run(self, *command: str, **environment: str) -> list[list[str]]:
        """Run a script with bash; how the programs were called."""
        log = self.folder / "calls"
        log.write_text("")
        path = f"{self.bin}{os.pathsep}{os.environ['PATH']}"
        done = subprocess.run(
            ["bash", "-eu", *command],
            env={"PATH": path, "CALLS": str(log), **environment},
            cwd=EXAMPLES,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return [shlex.split(line) for line in log.read_text().splitlines()]


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    made = Shell(tmp_path, tmp_path / "bin")
    made.bin.mkdir()
    for name in RECORDED:
        made.program(name, RECORD)
    made.program("sbatch", 'printf "%q " sbatch "$@" >> "$CALLS"; echo >> "$CALLS"; echo 4711')
    made.program("scontrol", 'case $1 in show) printf "node7\\nnode8\\n";; *) echo scontrol "$@" >> "$CALLS";; esac')
    # Its own options end where the program's name is.
    made.program("srun", '[ "$1" = --cpus-per-task ] && shift 2; "$@"')
    return made


def headers(name: str) -> dict[str, str]:
    """The #SBATCH lines of a script, which must stand before its first command."""
    lines = (EXAMPLES / "slurm" / name).read_text().splitlines()
    assert lines[0] == "#!/bin/bash"
    head = lines[1 : next(i for i, line in enumerate(lines) if line and not line.startswith("#"))]
    options = [line.removeprefix("#SBATCH --") for line in head if line.startswith("#SBATCH")]
    assert sum("#SBATCH" in line for line in lines) == len(options)
    return {name: value for name, _, value in (option.partition("=") for option in options)}


def data_of(small: Small) -> str:
    """The prepped dataset."""
    return str(small.annotations.parent / "out")


def in_this_process(call: Sequence[str], *more: str) -> None:
    command = {"jigsaw-prep": prep, "jigsaw-train": train}[call[0]]
    done = run_command(command, *call[1:], *more)
    assert done.exit_code == 0, done.output


def of_torchrun(call: Sequence[str]) -> tuple[Any, list[str]]:
    """torchrun's own options, as it reads them, and the command that it starts in every process."""
    assert call[0] == "torchrun"
    own = get_args_parser().parse_args(call[1:])
    assert own.no_python
    return own, [own.training_script, *own.training_script_args]


def test_slurms_scripts_cut_and_finish(
    shell: Shell, small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, last = headers("prep.sbatch")["array"].split("-")
    assert int(first) == 0 and "requeue" in headers("prep.sbatch") and headers("finish.sbatch")["job-name"]
    data = {"ANNOTATIONS": str(small.annotations), "IMAGES": str(small.images), "OUT": str(tmp_path / "crops")}
    for task in range(2):
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", str(task))
        monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "2")
        (call,) = shell.run("slurm/prep.sbatch", SLURM_CPUS_PER_TASK="1", **data)
        in_this_process(call, "--crops-per-part", str(small.crops_per_part))
    (call,) = shell.run("slurm/finish.sbatch", **data)
    in_this_process(call)
    assert open_dataset(data["OUT"]).description.totals["crops"]


def test_slurms_training_starts_all_ranks_and_comes_back_where_its_time_was_up(
    shell: Shell, small: Small, tmp_path: Path
) -> None:
    head = headers("train.sbatch")
    grace = int(re.fullmatch(r"TERM@(\d+)", head["signal"])[1])  # type: ignore[index]
    run = tmp_path / "run"
    job = {"SLURM_JOB_NODELIST": "node[7-8]", "SLURM_NNODES": head["nodes"], "SLURM_JOB_ID": "4711"}
    job |= {"SLURM_GPUS_ON_NODE": head["gpus-per-node"], "SLURM_CPUS_PER_TASK": head["cpus-per-task"]}
    given = {**job, "DATA": data_of(small), "RUN": str(run), "RECIPE": "sample"}
    shell.program("torchrun", f'{RECORD}; echo "$TORCH_ELASTIC_SHUTDOWN_TIMEOUT" > "$CALLS-seconds"')
    calls = shell.run("slurm/train.sbatch", **given, SLURM_JOB_END_TIME="0")
    assert calls[1:] == [["scontrol", "requeue", "4711"]]
    assert len(shell.run("slurm/train.sbatch", **given, SLURM_JOB_END_TIME="99999999999")) == 1
    own, command = of_torchrun(calls[0])
    assert (own.nnodes, own.nproc_per_node, own.rdzv_endpoint) == ("2", "8", "node7:29400")
    assert 30 < int((shell.folder / "calls-seconds").read_text()) < grace
    in_this_process(command, *BASE, "--workers", "0", "--no-page", "--device", "cpu")
    assert (run / "backbone.pth").is_file()
    assert len(shell.run("slurm/train.sbatch", **given, SLURM_JOB_END_TIME="0")) == 1


def jobs(name: str) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """The Jobs of a file, each with its only container."""
    for document in yaml.safe_load_all((EXAMPLES / "kubernetes" / name).read_text()):
        if document["kind"] == "Job":
            pod = document["spec"]["template"]["spec"]
            (container,) = pod["containers"]
            assert {one["name"] for one in container["volumeMounts"]} == {one["name"] for one in pod["volumes"]}
            yield document["spec"], container


def command_of(container: Mapping[str, Any], **environment: str) -> list[str]:
    """A container's command, its variables put in as Kubernetes does it."""
    values = {one["name"]: one["value"] for one in container["env"]}
    assert set(environment) <= set(values) and all(isinstance(value, str) for value in values.values())
    values |= environment
    words = [*container["command"], *container["args"]]
    return [re.sub(r"\$\((\w+)\)", lambda found: values[found[1]], word) for word in words]


def test_kubernetes_jobs_cut_and_finish(small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ((spec, container),) = jobs("prep.yaml")
    assert spec["completionMode"] == "Indexed" and spec["completions"] == spec["parallelism"]
    assert f"--task-count={spec['completions']}" in command_of(container)
    out = str(tmp_path / "crops")
    data = {"ANNOTATIONS": str(small.annotations), "IMAGES": str(small.images), "OUT": out}
    for index in range(2):
        monkeypatch.setenv("JOB_COMPLETION_INDEX", str(index))
        in_this_process(command_of(container, TASKS="2", **data), "--workers", "1")
    ((_, container),) = jobs("finish.yaml")
    in_this_process(command_of(container, OUT=out))
    assert open_dataset(out).description.totals["crops"]


def test_kubernetes_training_finds_its_first_pod_and_has_time_to_save(small: Small, tmp_path: Path) -> None:
    ((spec, container),) = jobs("train.yaml")
    service, job = yaml.safe_load_all((EXAMPLES / "kubernetes" / "train.yaml").read_text())
    run = tmp_path / "run"
    own, command = of_torchrun(command_of(container, DATA=data_of(small), RUN=str(run), RECIPE="sample"))
    pod, name = spec["template"]["spec"], job["metadata"]["name"]
    assert own.rdzv_endpoint == f"{name}-0.{service['metadata']['name']}:{service['spec']['ports'][0]['port']}"
    assert pod["subdomain"] == service["metadata"]["name"] and service["spec"]["selector"] == {"job-name": name}
    assert int(own.nnodes) == spec["completions"] == spec["parallelism"]
    assert own.nproc_per_node == container["resources"]["limits"]["nvidia.com/gpu"]
    (seconds,) = [int(one["value"]) for one in container["env"] if one["name"] == "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]
    assert 30 < seconds < pod["terminationGracePeriodSeconds"]
    assert "/dev/shm" in [one["mountPath"] for one in container["volumeMounts"]]
    in_this_process(command, *BASE, "--workers", "0", "--no-page", "--device", "cpu", "--stop-after", "1")
    assert (run / "run.json").is_file()


def blocks(document: Path) -> list[str]:
    return re.findall(r"```sh\n(.*?)```", document.read_text(), flags=re.S)


def test_the_commands_of_the_examples_readme_name_what_is_there(shell: Shell, tmp_path: Path) -> None:
    notebook, slurm, kubernetes = blocks(EXAMPLES / "README.md")
    assert "quickstart.ipynb" in notebook
    (tmp_path / "commands").write_text(slurm)
    calls = shell.run(str(tmp_path / "commands"))
    assert [call[0] for call in calls] == ["sbatch"] * 3 and "--dependency=afterok:4711" in calls[1]
    assert all((EXAMPLES / call[-1]).is_file() for call in calls)
    (tmp_path / "commands").write_text(kubernetes)
    calls = shell.run(str(tmp_path / "commands"))
    applied = [call[-1] for call in calls if call[:2] == ["kubectl", "apply"]]
    named = [call[-1] for call in calls if call[:2] == ["kubectl", "wait"]]
    assert [f"job/{job['metadata']['name']}" for job in documents(applied[:2])] == named
    assert {call[3] for call in calls if call[0] == "docker"} == {one["image"] for one in containers(applied)}
    assert (EXAMPLES / calls[0][-1] / "Dockerfile").is_file()


def documents(names: Sequence[str]) -> list[dict[str, Any]]:
    return [one for name in names for one in yaml.safe_load_all((EXAMPLES / name).read_text())]


def containers(names: Sequence[str]) -> list[dict[str, Any]]:
    return [container for name in names for _, container in jobs(Path(name).name)]


INSTRUCTIONS = {"CMD", "COPY", "ENV", "FROM", "RUN", "WORKDIR"}


def test_the_dockerfile_copies_what_is_tracked_and_runs_targets_that_are_there() -> None:
    text = re.sub(r"\\\n", "", (REPOSITORY / "Dockerfile").read_text())
    lines = [line.split(None, 1) for line in text.splitlines() if line and not line.startswith("#")]
    assert lines[0] == ["FROM", "python:3.12-slim"] and {name for name, _ in lines} <= INSTRUCTIONS
    sources = [source for name, rest in lines if name == "COPY" for source in rest.split()[:-1]]
    assert sources and all((REPOSITORY / source).exists() for source in sources)
    makefile = (REPOSITORY / "Makefile").read_text()
    targets = re.findall(r"(?:^RUN |&& |pretrain:0\.1 )make ([a-z]+)", text, flags=re.M)
    assert {"venv", "pretrain", "test"} <= set(targets)
    assert all(re.search(rf"^{target}:", makefile, flags=re.M) for target in targets)
    ignored = [line for line in (REPOSITORY / ".dockerignore").read_text().splitlines() if line[:1] not in ("#", "")]
    kept = {pattern[1:] for pattern in ignored if pattern.startswith("!")}
    assert [name for name in tracked() if name not in kept and any(is_below(name, one) for one in ignored)] == []


def is_below(name: str, pattern: str) -> bool:
    """Whether a file or one of its folders is what a line of .dockerignore names, counted from the top."""
    folders = [name, *map(str, Path(name).parents)]
    return any(fnmatchcase(one, pattern) and one.count("/") == pattern.count("/") for one in folders)


SMALL_SIZES = """
folder = Path("quickstart")
images = 6
tiny = ["data.template_size=64", "data.batch=2", "data.lanes=2", "optim.steps=2", "optim.warmup_steps=1"]
recipe = jp.Recipe.load("sample", [*tiny, "model.norm=gn"])
small = ["optim.steps=1", "data.batch=2", "data.short_side=64", "model.rois=8", "model.proposals=16"]
detector_recipe = jp.detect.DetectorRecipe.load("detect-sample", small)
"""


@pytest.mark.skipif(not SOAK, reason="15 s and more of the eight minutes; make soak runs it")
def test_the_notebook_runs_and_shows_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(EXAMPLES / "quickstart.ipynb", as_version=4)
    (sizes,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    sizes.source = SMALL_SIZES
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert sum("image/jpeg" in output.get("data", {}) for output in outputs) == 5
    printed = "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")
    assert "crops of 6 images" in printed and "AP" in printed
    assert {"backbone.pth", "detector"} <= {path.name for path in (tmp_path / "quickstart").iterdir()}
