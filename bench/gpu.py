"""Everything that only a GPU can show, in one script: the first run on a new card, or after a change.

    python bench/gpu.py [--toy] [--budget 585] [--only PHASE ...] [--data OUT] [--again]

Phases run one after the other, each in a process of its own with a time limit, so that one that hangs or dies costs
itself alone. What a phase found is added to bench/results/gpu.json as soon as it is known; a second call goes on with
the phases that are missing (--again begins anew). At the end a table says what passed and shows the figures beside
their goals. ``--toy`` runs every phase at toy size on the CPU, which shows that the script works and nothing else;
phases that mean nothing on a CPU say so and pass.
"""

import copy
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
# On a CPU the loader's workers share its cores (train/cli.py).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import click
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import jigsaw_pretrain as jp
from bench.sample import draw, prep
from bench.timing import RESULTS, Goal
from jigsaw_pretrain.cli import Command
from jigsaw_pretrain.train.data.device import DeviceCopies
from jigsaw_pretrain.train.engine.checkpoint import list_checkpoints, read_checkpoint
from jigsaw_pretrain.train.engine.distributed import start
from jigsaw_pretrain.train.engine.optim import arithmetic
from jigsaw_pretrain.train.engine.pretraining import PretrainingTask, TrainingJob, loader_source, trainer_of
from jigsaw_pretrain.train.engine.run_folder import RunFolder, origin_of
from jigsaw_pretrain.train.engine.state import build_state
from jigsaw_pretrain.train.engine.step import MachineOptions

ROOT = Path(__file__).resolve().parents[1]

REPEATED = ("optim.warmup_steps=2", "loss.erf_every=1_000_000_000", "run.log_every=1")
SMALL = ("model.backbone=resnet18", "data.template_size=128", "data.template_split=32", "data.batch=64")
TOY = ("model.backbone=resnet18", "data.template_size=64", "data.template_split=32", "data.batch=8", "data.lanes=4")

GOALS = {
    "real / synthetic": Goal(0.98, True),
    "dense / classification": Goal(0.97, True),
    "ERF share": Goal(0.003),
    "hours of 64,000 steps": Goal(3.5),
}


class NotHereError(Exception):
    """A phase means nothing on this machine; it says why."""


@dataclass(frozen=True)
class Place:
    """Where a phase runs: its device, a folder to work in, the datasets, and whether all is at toy size."""

    device: str
    work: Path
    data: str
    drawn: Path
    toy: bool

    @property
    def on_gpu(self) -> bool:
        """Whether the device is a GPU."""
        return self.device == "cuda"

    def recipe(self, *settings: str) -> jp.Recipe:
        """A small recipe for the dataset."""
        return jp.Recipe.load(None, (*(TOY if self.toy else SMALL), *REPEATED, *settings))

    def job(self, name: str, *settings: str, machine: MachineOptions | None = None) -> TrainingJob:
        """A job on the dataset in a folder of that name."""
        dataset, ranks = jp.open_dataset(self.data), start(self.device)
        recipe = self.recipe(*settings).resolved(dataset)
        folder = RunFolder(self.work / name)
        options = machine or MachineOptions("off")
        return TrainingJob(recipe, origin_of(dataset, recipe.data), folder, ranks, machine_options=options)

    @contextmanager
    def task(self, job: TrainingJob, steps: int) -> Iterator[tuple[PretrainingTask, Iterator[Any]]]:
        """The job's task and that many batches."""
        dataset = jp.open_dataset(self.data)
        state = build_state(job.recipe, len(dataset.classes) + 1, job.ranks, dataset.pixels)
        trainer = trainer_of(job, state)
        source = loader_source(job, dataset, 1, False)(0, steps)
        try:
            yield trainer.task, iter(source)
        finally:
            source.close()
            trainer.close()


def card(place: Place) -> dict[str, Any]:
    """What the machine is."""
    shared = os.statvfs("/dev/shm")
    found: dict[str, Any] = {
        "torch": str(torch.__version__),
        "cores": os.cpu_count(),
        "/dev/shm GB": round(shared.f_bavail * shared.f_frsize / 1e9, 1),
    }
    if place.on_gpu:
        about = torch.cuda.get_device_properties(0)
        memory = round(about.total_memory / 2**30, 1)
        found |= {"card": about.name, "capability": f"{about.major}.{about.minor}", "GiB": memory}
        found |= {"cards": torch.cuda.device_count()}
    return found


def copies(place: Place) -> dict[str, Any]:
    """Speed of a batch's way to the device: from pageable, page-locked and registered memory."""
    size = (1 << 20) if place.toy else (77 << 20)
    plain = torch.empty(size, dtype=torch.uint8)
    sources = {"pageable": plain}
    if place.on_gpu:
        sources["pinned"] = plain.pin_memory()
        shared = torch.empty(size, dtype=torch.uint8).share_memory_()
        failed = torch.cuda.cudart().cudaHostRegister(shared.data_ptr(), size, 0)
        if int(failed) == 0:
            sources["registered"] = shared
    found = {}
    for name, source in sources.items():
        seconds = []
        for _ in range(6):
            began = now(place)
            source.to(place.device, non_blocking=True, copy=True)
            seconds.append(now(place) - began)
        found[f"{name} GB/s"] = round(size / min(seconds) / 1e9, 2)
    return found


def compiled(place: Place) -> dict[str, Any]:
    """Thirty compiled steps: no break in the graph, no compilation after the first."""
    from torch._dynamo.utils import counters

    steps, backend = (3, "off") if place.toy else (30, "on")
    counters.clear()
    job = place.job("compiled", f"optim.steps={steps}", "loss.strategy=block-wise", machine=MachineOptions(backend))
    with place.task(job, steps) as (task, batches):
        for nth, batch in enumerate(batches):
            task.take(batch)
            task.step += 1
            if nth == 0:
                frames = dict(counters["frames"])
        after = dict(counters["frames"])
    breaks = sum(counters["graph_break"].values())
    expect(not breaks, f"the graph breaks {breaks} times")
    expect(after == frames, f"compiled again during the run: {frames}, then {after}")
    return {"steps": steps, "graph breaks": breaks, "frames": after.get("total", 0)}


def agree(place: Place) -> dict[str, Any]:
    """The device and the CPU give the same losses and the same ERF table at tf32 = false."""
    found = []
    for device in ("cpu", place.device):
        job = replace(place, device=device).job(f"agree-{device}", "optim.steps=3", "run.tf32=false")
        with arithmetic(job.ranks.device, tf32=False, deterministic=False), place.task(job, 3) as (task, batches):
            losses = []
            for batch in batches:
                losses.append(float(task.take(batch).sums["loss"]))
                task.step += 1
            found.append((torch.tensor(losses), task.state.tables[0].weights.cpu()))
    (ours, weights), (others, table) = found
    apart = float(((ours - others).abs() / ours.abs()).max())
    tables = float((weights - table).abs().max())
    expect(apart < 2e-3, f"losses differ by {apart:.2g} of their size")
    expect(tables < 2e-3, f"ERF weights differ by {tables:.2g}")
    return {"losses apart": apart, "ERF weights apart": tables}


def ring(place: Place) -> dict[str, Any]:
    """Batches arrive whole though the device lags behind: read back, they are those of a loader without workers."""
    steps = 4 if place.toy else 12
    job = place.job("ring", f"optim.steps={steps}")
    dataset = jp.open_dataset(place.data)
    plain = loader_source(job, dataset, 0, False)(0, steps)
    expected = [digest_of(batch.images) for batch in plain]
    plain.close()
    kept: list[Tensor] = []
    to_device = DeviceCopies(job.ranks.device, job.ranks.streams)
    with place.task(job, steps) as (_, batches):
        for batch in batches:
            if place.on_gpu:
                torch.cuda._sleep(50_000_000)
            (images,), _ = to_device(batch.images)
            kept.append(images.clone())
    wrong = [nth for nth, (one, sha) in enumerate(zip(kept, expected, strict=True)) if digest_of(one.cpu()) != sha]
    expect(not wrong, f"batches {wrong} arrived with other pixels")
    return {"batches": steps}


def waits(place: Place) -> dict[str, Any]:
    """Steady steps never wait for the device."""
    if not place.on_gpu:
        raise NotHereError("a CPU has nothing to wait for")
    job = place.job("waits", "optim.steps=8", "loss.strategy=block-wise")
    with place.task(job, 8) as (task, batches):
        for nth, batch in enumerate(batches):
            if nth == 4:
                torch.cuda.set_sync_debug_mode("error")
            task.take(batch)
            task.step += 1
        torch.cuda.set_sync_debug_mode("default")
    return {"steps": 4}


def precisions(place: Place) -> dict[str, Any]:
    """fp16 from a scale of 2^24, and bf16: all weights stay finite."""
    # Of fp16 a CPU makes a second for each image.
    steps, fewer = (2, ("data.batch=4", "loss.strategy=block-wise")) if place.toy else (20, ())
    found = {}
    for precision in ("fp16", "bf16"):
        job = place.job(precision, f"optim.steps={steps}", f"run.precision={precision}", *fewer)
        with place.task(job, steps) as (task, batches):
            if precision == "fp16":
                scaler = torch.amp.GradScaler(place.device, init_scale=2.0**24)
                task.state.scaler = scaler
            for batch in batches:
                loss = task.take(batch).sums["loss"]
                task.step += 1
            finite = all(bool(torch.isfinite(one).all()) for one in task.state.model.parameters())
        expect(finite, f"{precision}: weights are not finite after {steps} steps")
        found[f"loss {precision}"] = float(loss) / len(batch.images)
    return found


def deterministic(place: Place) -> dict[str, Any]:
    """The same run twice gives the same bits."""
    steps = 2 if place.toy else 10
    found = []
    for nth in range(2):
        folder = place.work / f"deterministic-{nth}"
        jp.pretrain(
            *(jp.open_dataset(place.data), folder, place.recipe(f"optim.steps={steps}")),
            workers=1, device=place.device, deterministic=True, page=False,
        )  # fmt: skip
        found.append(torch.load(folder / "backbone.pth", weights_only=True))
    apart = [name for name in found[0] if not torch.equal(found[0][name], found[1][name])]
    expect(not apart, f"{len(apart)} tensors differ")
    return {"steps": steps}


def stopped(place: Place) -> dict[str, Any]:
    """SIGTERM to torchrun saves, and the resumed run is the undisturbed one."""
    steps = 12 if place.toy else 40
    settings = [part for one in (*(TOY if place.toy else SMALL), *REPEATED) for part in ("--set", one)]
    settings += ["--set", f"optim.steps={steps}", "--set", "loss.erf_every=4"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1", "-m", "--"]

    def run(name: str, *more: str) -> subprocess.Popen[bytes]:
        command = [*launch, "train", "pretrain", "--data", place.data, "--run", str(place.work / name), *settings]
        command += ["--workers", "1", "--device", place.device, "--no-page", "--log", "none", "--deterministic", *more]
        return subprocess.Popen(command, cwd=ROOT, stdout=sys.stderr)

    expect(run("whole").wait() == 0, "the whole run fails")
    process, metrics = run("cut"), place.work / "cut" / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") >= 3):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    process.wait()
    at = list_checkpoints(place.work / "cut" / "checkpoints")
    expect(bool(at), "no checkpoint was saved")
    expect(run("cut", "--resume").wait() == 0, "the resumed run fails")
    contents = [
        read_checkpoint(list_checkpoints(place.work / name / "checkpoints")[-1][1]) for name in ("whole", "cut")
    ]
    first, second = (content["model"] for content in contents)
    expect(all(torch.equal(first[name], second[name]) for name in first), "the resumed run's weights differ")
    return {"stopped at": at[-1][0], "of": steps}


def memory(place: Place) -> dict[str, Any]:
    """What does not fit is refused with what does."""
    if not place.on_gpu:
        raise NotHereError("of a GPU's memory")
    chosen = ("data.batch=65536", "data.lanes=64", "data.template_size=448", "data.template_split=128")
    job = place.job("memory", "model.backbone=resnet50", *chosen)
    try:
        with arithmetic(job.ranks.device, tf32=True, deterministic=False):
            state = build_state(job.recipe, 10, job.ranks)
            _ = trainer_of(job, state).task.stepper
    except jp.UserError as error:
        expect("fit" in error.message, error.message)
        return {"said": error.message[:120]}
    raise AssertionError("65,536 jigsaws of 448 pixels fit into memory at once")


def speed(place: Place) -> dict[str, Any]:
    """The paper's step from shards, on the device, and beside classification; what a refresh costs."""
    base = ["--device", place.device, "--data", place.data]
    if place.toy:
        base += ["--repeats", "1", "--block", "1", "--workers", "1", "--set", "data.batch=8"]
        base += [part for one in TOY[:3] for part in ("--set", one)]
        settings: tuple[tuple[str, ...], ...] = ((),)
    else:
        chosen = ("data.batch=512", "optim.micro_batch=64")
        base += ["--repeats", "3", "--block", "4", *(part for one in chosen for part in ("--set", one))]
        settings = (("--workers", "2"), ("--workers", "4"))
    found: dict[str, Any] = {}
    for more in settings:
        subprocess.run([sys.executable, "bench/train.py", *base, *more], cwd=ROOT, check=True, stdout=sys.stderr)
        results = json.loads((RESULTS / "train.json").read_text())
        real, dense, refresh = (goal["measured"] for goal in results["goals"])
        at = f", {more[1]} workers" if more else ""
        found |= {f"real / synthetic{at}": real, "dense / classification": dense, "ERF share": refresh}
        rows = results["steps"]
        per_second = 1e6 / rows["jigsaws from shards"]["us"]
        found[f"images/s{at}"] = round(per_second, 1)
        found["hours of 64,000 steps"] = 64_000 * 512 / per_second / 3600
    return found


def parts(place: Place) -> dict[str, Any]:
    """What a run does now and then: start, a refresh, a save."""
    steps = 2 if place.toy else 20
    dataset = jp.open_dataset(place.data)
    found = jp.estimate(dataset, place.recipe(f"optim.steps={steps}"), steps=steps, workers=1, device=place.device)
    costs = found.costs
    return {"start s": costs.start, "step s": costs.step, "refresh s": costs.refresh, "save s": costs.save}


def joined(place: Place) -> dict[str, Any]:
    """DistributedDataParallel over NCCL with one rank, and with all cards where there are several."""
    backend = "nccl" if place.on_gpu else "gloo"
    torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
    dataset = jp.open_dataset(place.data)
    job = place.job("joined")
    model = build_state(job.recipe, len(dataset.classes) + 1, job.ranks).model
    alone = copy.deepcopy(model)
    devices = [job.ranks.device] if place.on_gpu else None
    together = torch.nn.parallel.DistributedDataParallel(model, device_ids=devices, broadcast_buffers=False)
    size = job.recipe.data.template_size
    images = torch.randint(0, 256, (4, size, size, 3), dtype=torch.uint8, device=job.ranks.device)
    for one in (alone, together):
        one(images)[0].float().logsumexp(1).mean().backward()
    pairs = zip(alone.parameters(), model.parameters(), strict=True)
    apart = max(float((a.grad - b.grad).abs().max()) for a, b in pairs if a.grad is not None and b.grad is not None)
    torch.distributed.destroy_process_group()
    expect(apart < 1e-3, f"gradients differ by {apart:.2g}")
    cards = torch.cuda.device_count() if place.on_gpu else 1
    if cards > 1:
        settings = [part for one in (*SMALL, *REPEATED, "optim.steps=4") for part in ("--set", one)]
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(cards), "-m"]
        command = ["--", "train", "pretrain", "--data", place.data, "--run", str(place.work / "cards"), *settings]
        subprocess.run([*launch, *command, "--workers", "1", "--no-page"], cwd=ROOT, check=True, stdout=sys.stderr)
    return {"backend": backend, "gradients apart": apart, "cards": cards}


def detectors(place: Place) -> dict[str, Any]:
    """C4 and FPN detectors take steps and are evaluated, in float32 and bf16."""
    found = {}
    steps, side = (1, 64) if place.toy else (6, 400)
    for model in ("faster-rcnn-c4", "faster-rcnn-fpn"):
        for precision in ("fp32",) if place.toy else ("fp32", "bf16"):
            run = place.work / f"{model}-{precision}"
            settings = [f"optim.steps={steps}", "data.batch=2", f"data.short_side={side}", "model.backbone=resnet18"]
            settings += [f"model.name={model}", f"run.precision={precision}", "model.norm=gn"]
            if place.toy:
                settings += ["model.neck_channels=16", "model.fc=16", "model.rois=8", "model.proposals=16"]
            recipe = jp.detect.DetectorRecipe.load("detect-sample", settings)
            source = str(place.drawn / "annotations.json"), str(place.drawn / "images")
            began = now(place)
            jp.detect.train(
                *(*source, run, recipe), val_annotations=source[0], val_images=source[1], workers=1, device=place.device
            )
            found[f"{model} {precision} s"] = round(now(place) - began, 1)
            ap = jp.detect.evaluate(run, workers=0, device=place.device, out=run / "again").boxes.stats["AP"]
            expect(0 <= ap <= 1, f"AP of {model} in {precision} is {ap}")
    return found


PHASES: dict[str, tuple[float, Callable[[Place], dict[str, Any]]]] = {
    "card": (30, card),
    "copies": (30, copies),
    "compiled": (120, compiled),
    "agree": (60, agree),
    "ring": (60, ring),
    "waits": (60, waits),
    "precisions": (60, precisions),
    "deterministic": (90, deterministic),
    "stopped": (150, stopped),
    "memory": (60, memory),
    "speed": (240, speed),
    "parts": (90, parts),
    "joined": (60, joined),
    "detectors": (150, detectors),
}
"""Each phase's time limit in seconds, and what it does."""


def expect(good: bool, what: str) -> None:
    """Fail the phase, saying what is wrong."""
    if not good:
        raise AssertionError(what)


def now(place: Place) -> float:
    """Wall time after all that was asked of the device is done."""
    if place.on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter()


def digest_of(images: Tensor) -> str:
    """SHA-256 of a batch's pixels."""
    return hashlib.sha256(images.contiguous().numpy().tobytes()).hexdigest()


def run_here(name: str, place: Place) -> dict[str, Any]:
    """Run a phase in this process; what is added to the results."""
    began = time.perf_counter()
    try:
        found: dict[str, Any] = {"passed": True, "figures": PHASES[name][1](place)}
    except NotHereError as reason:
        found = {"passed": True, "figures": {"left out": str(reason)}}
    except Exception as error:
        found = {"passed": False, "figures": {"failed": f"{type(error).__name__}: {error}"[:400]}}
    return {**found, "seconds": round(time.perf_counter() - began, 1)}


def run_apart(name: str, arguments: list[str], limit: float) -> dict[str, Any]:
    """Run a phase in a process of its own."""
    command = [sys.executable, str(Path(__file__).resolve()), "--phase", name, *arguments]
    with tempfile.NamedTemporaryFile(suffix=".json") as answer:
        try:
            subprocess.run([*command, "--answer", answer.name], timeout=limit, stdout=sys.stderr, check=True)
            found: dict[str, Any] = json.loads(Path(answer.name).read_text())
        except subprocess.TimeoutExpired:
            found = {"passed": False, "figures": {"failed": f"not done after {limit:.0f} s"}, "seconds": limit}
        except (subprocess.CalledProcessError, ValueError) as error:
            found = {"passed": False, "figures": {"failed": f"its process died ({error})"[:200]}, "seconds": 0.0}
    return found


def show(results: dict[str, Any]) -> None:
    """Print the phases, and the figures that have goals."""
    table = Table(title=f"{results['where']}, {results['commit']}, {results['date']}")
    for head in ("phase", "", "s", "found"):
        table.add_column(head)
    for name, found in results["phases"].items():
        told = ", ".join(f"{key} {_shown(value)}" for key, value in found["figures"].items())
        table.add_row(name, "passed" if found["passed"] else "FAILED", f"{found['seconds']:.0f}", told)
    Console().print(table)
    figures = results["phases"].get("speed", {}).get("figures", {})
    for name, goal in GOALS.items():
        values = [value for key, value in figures.items() if key.startswith(name) and isinstance(value, float)]
        note = "; toy size: no measurement" if results["toy"] else ""
        for value in values:
            click.echo(f"{name}: {value:.4g} (goal {goal.verdict(value)}{note})")


def _shown(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


@click.command(cls=Command)
@click.option("--toy", is_flag=True, help="Every phase at toy size on the CPU.")
@click.option("--budget", default=585.0, show_default=True, help="Begin no phase after this many seconds.")
@click.option("--only", multiple=True, type=click.Choice(list(PHASES)), help="These phases alone; repeatable.")
@click.option("--data", help="A prepped dataset of the paper's size; the sample where none is given.")
@click.option("--work", type=click.Path(path_type=Path), help="Folder for runs; a temporary one by default.")
@click.option("--again", is_flag=True, help="Forget earlier results.")
@click.option("--phase", type=click.Choice(list(PHASES)), hidden=True)
@click.option("--answer", type=click.Path(path_type=Path), hidden=True)
def main(
    toy: bool,
    budget: float,
    only: tuple[str, ...],
    data: str | None,
    work: Path | None,
    again: bool,
    phase: str | None,
    answer: Path | None,
) -> None:
    """Run the phases that are missing, print the table, write bench/results/gpu.json; status 1 where one failed."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        folder = work or Path(scratch)
        drawn = draw(folder / "drawn", 24 if toy else 240)
        place = Place("cpu" if toy else "cuda", folder, data or str(prep(drawn, folder / "out")), drawn, toy)
        if phase is not None:
            assert answer is not None
            answer.write_text(json.dumps(run_here(phase, place)))
            return
        file = RESULTS / ("gpu-toy.json" if toy else "gpu.json")
        commit = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
        ).stdout.strip()
        where = "CPU, toy size" if toy else torch.cuda.get_device_name(0)
        fresh: dict[str, Any] = {
            "where": where,
            "commit": commit,
            "date": time.strftime("%Y-%m-%d"),
            "toy": toy,
            "phases": {},
        }
        results: dict[str, Any] = fresh if again or not file.exists() else json.loads(file.read_text())
        if (results["where"], results["commit"]) != (where, commit):
            results = fresh
        given = ["--work", str(folder), "--data", place.data, *(["--toy"] if toy else [])]
        for name, (limit, _) in PHASES.items():
            if (only and name not in only) or results["phases"].get(name, {}).get("passed"):
                continue
            left = budget - (time.monotonic() - began)
            if left <= 0:
                click.echo(f"{name}: no time left; call again to go on")
                continue
            results["phases"][name] = run_apart(name, given, min(2 * limit if toy else limit, left))
            RESULTS.mkdir(exist_ok=True)
            file.write_text(json.dumps(results, indent=2) + "\n")
            click.echo(f"{name}: {results['phases'][name]}")
    show(results)
    sys.exit(0 if all(found["passed"] for found in results["phases"].values()) else 1)


if __name__ == "__main__":
    main()
