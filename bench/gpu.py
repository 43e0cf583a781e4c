"""Everything that only a GPU can show, in one script: the first run on a new card, or after a change.

    python bench/gpu.py [--toy] [--budget 585] [--only PHASE ...] [--data OUT] [--again]

Phases run one after the other, each in a process of its own with a time limit, so that one that hangs or dies costs
itself alone; they are forked, so that imports are made once. What a phase found is added to bench/results/gpu.json as
soon as it is known; a second call goes on with the phases that are missing or failed (--again begins anew). At the end
a table says what passed and shows the figures beside their goals. All limits together, with PREPARATION, are within
BUDGET. ``--toy`` runs every phase at toy size on the CPU, which shows that the script works and nothing else; phases
that mean nothing on a CPU say so and pass.
"""

import contextlib
import copy
import hashlib
import json
import multiprocessing
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
from bench import train
from bench.sample import checked_out, draw, prep
from bench.timing import RESULTS, Goal
from jigsaw_pretrain.cli import Command
from jigsaw_pretrain.train import evaluate
from jigsaw_pretrain.train.data.device import CudaStreams, DeviceCopies
from jigsaw_pretrain.train.data.loader import JigsawLoader
from jigsaw_pretrain.train.data.remote import ReadOptions
from jigsaw_pretrain.train.engine.checkpoint import list_checkpoints, read_checkpoint
from jigsaw_pretrain.train.engine.distributed import start
from jigsaw_pretrain.train.engine.optim import arithmetic
from jigsaw_pretrain.train.engine.pretraining import PretrainingTask, TrainingJob, loader_source, trainer_of
from jigsaw_pretrain.train.engine.run_folder import RunFolder, origin_of
from jigsaw_pretrain.train.engine.state import build_state
from jigsaw_pretrain.train.engine.step import MachineOptions
from jigsaw_pretrain.train.estimate import measure
from jigsaw_pretrain.train.report.page import write_report

ROOT = Path(__file__).resolve().parents[1]

REPEATED = ("optim.warmup_steps=2", "loss.erf_every=1_000_000_000", "run.log_every=1")
SMALL = ("model.backbone=resnet18", "data.template_size=128", "data.template_split=32", "data.batch=64")
TOY = (
    "model.backbone=shufflenet_v2_x0_5",
    "data.template_size=64",
    "data.template_split=32",
    "data.batch=8",
    "data.lanes=4",
)

BUDGET = 585.0
"""Seconds for everything, on a machine whose card costs by the minute."""

PREPARATION = 20.0
"""What drawing and prepping the sample takes of these at most."""

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

    @property
    def size(self) -> tuple[str, ...]:
        """The settings of a small recipe."""
        return (*(TOY if self.toy else SMALL), *REPEATED)

    def job(
        self, name: str, *settings: str, machine: MachineOptions | None = None, base: str | None = None
    ) -> TrainingJob:
        """A job on the dataset in a folder of that name; ``base``: a recipe in place of the small one."""
        dataset, ranks = jp.open_dataset(self.data), start(self.device)
        chosen = REPEATED if base and not self.toy else self.size
        recipe = jp.Recipe.load(base, (*chosen, *settings)).resolved(dataset)
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
    plain, found = torch.empty(size, dtype=torch.uint8), {}
    sources = {"pageable": plain}
    if place.on_gpu:
        streams = CudaStreams(torch.device(place.device))
        shared = torch.empty(size, dtype=torch.uint8).share_memory_()
        sources["pinned"] = streams.pin(plain)
        if streams.register(shared):
            sources["registered"] = shared
    for name, source in sources.items():
        seconds = []
        for _ in range(6):
            began = now(place)
            source.to(place.device, non_blocking=True, copy=True)
            seconds.append(now(place) - began)
        found[f"{name} GB/s"] = round(size / min(seconds) / 1e9, 2)
    if "registered" in sources:
        streams.unregister(shared)
    return found


def compiled(place: Place) -> dict[str, Any]:
    """Thirty compiled steps of the sample recipe: no break in the graph, no compilation after the first."""
    from torch._dynamo.utils import counters

    # As TORCH_LOGS does: the reasons are in the output.
    torch._logging.set_logs(graph_breaks=True, recompiles=True)
    steps = 3 if place.toy else 30
    counters.clear()
    machine = MachineOptions("off" if place.toy else "on")
    job = place.job("compiled", f"optim.steps={steps}", machine=machine, base="sample")
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
    expect(place.toy or after.get("total", 0) > 0, "nothing was compiled")
    return {"steps": steps, "graph breaks": breaks, "frames": after.get("total", 0)}


def agree(place: Place) -> dict[str, Any]:
    """The device and the CPU give the same losses and the same ERF table at tf32 = false."""
    found = []
    for device in ("cpu", place.device):
        job = replace(place, device=device).job(f"agree-{device}", "optim.steps=3", "run.tf32=false")
        with arithmetic(job.ranks.device, tf32=False), place.task(job, 3) as (task, batches):
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


class Unregistered(CudaStreams):
    """Streams of a system that does not let memory be page-locked where it lies."""

    def register(self, memory: Tensor) -> bool:
        """Never."""
        return False


def ring(place: Place) -> dict[str, Any]:
    """Batches arrive whole though the device lags behind, from the workers' memory and from copies of it.

    Read back, they are those that `digest` takes, of a loader without workers.
    """
    steps = 4 if place.toy else 12
    job, dataset = place.job("ring", f"optim.steps={steps}"), jp.open_dataset(place.data)
    with contextlib.closing(JigsawLoader(dataset, job.recipe.data, workers=0, stop_step=steps)) as plain:
        expected = [digest_of(batch.images) for batch in plain]
    device, found = job.ranks.device, {}
    kinds = {"registered": CudaStreams(device), "copied": Unregistered(device)} if place.on_gpu else {"plain": None}
    for name, streams in kinds.items():
        kept: list[Tensor] = []
        loader = JigsawLoader(dataset, job.recipe.data, workers=2, stop_step=steps, streams=streams)
        to_device, began = DeviceCopies(device, streams), now(place)
        with contextlib.closing(loader) as batches:
            for batch in batches:
                if streams is not None:
                    for stream in (torch.cuda.current_stream(), streams.copying):
                        with torch.cuda.stream(stream):
                            torch.cuda._sleep(50_000_000)
                (images,), _ = to_device(batch.images)
                kept.append(images.clone())
            locked = loader.is_registered
        found[f"{name} s"] = now(place) - began
        pairs = enumerate(zip(kept, expected, strict=True))
        wrong = [nth for nth, (one, sha) in pairs if digest_of(one.cpu()) != sha]
        expect(not wrong, f"batches {wrong} arrived with other pixels ({name})")
        if name == "registered":
            found["page-locked where it lies"] = locked
    return {"batches": steps, **found}


def waits(place: Place) -> dict[str, Any]:
    """Steady steps never wait for the device."""
    if not place.on_gpu:
        raise NotHereError("a CPU has nothing to wait for")
    job = place.job("waits", "optim.steps=8")
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
    # Of fp16 a CPU makes a second for each image of a larger network.
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
            *(jp.open_dataset(place.data), folder, None, (*place.size, f"optim.steps={steps}")),
            workers=1, device=place.device, compiling="off", deterministic=True, page=False,
        )  # fmt: skip
        found.append(torch.load(folder / "backbone.pth", weights_only=True))
    apart = [name for name in found[0] if not torch.equal(found[0][name], found[1][name])]
    expect(not apart, f"{len(apart)} tensors differ")
    return {"steps": steps}


LAUNCH = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node")


def launched(ranks: int, *command: object) -> subprocess.Popen[bytes]:
    """A command of the project under torchrun; its output goes to standard error."""
    stage, *more = map(str, command)
    given = [*LAUNCH, str(ranks), "-m", "--", f"jigsaw_pretrain.{stage}", *more]
    return subprocess.Popen(given, cwd=ROOT, stdout=sys.stderr)


def cut_after(rows: int, metrics: Path, process: subprocess.Popen[bytes]) -> None:
    """Once the run has so many rows, send SIGTERM to its launcher, which passes it to whole groups; wait for it."""
    while process.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") >= rows):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    process.wait()


def stopped(place: Place) -> dict[str, Any]:
    """SIGTERM to torchrun saves, and the resumed run is the undisturbed one."""
    steps = 12 if place.toy else 40
    settings = [part for one in place.size for part in ("--set", one)]
    settings += ["--set", f"optim.steps={steps}", "--set", "loss.erf_every=4", "--workers", "1"]
    settings += ["--device", place.device, "--no-page", "--log", "none", "--deterministic", "--compile", "off"]

    def run(name: str, *more: str) -> subprocess.Popen[bytes]:
        return launched(1, "train", "pretrain", "--data", place.data, "--run", place.work / name, *settings, *more)

    # Side by side: most of the time is imports.
    whole, cut = run("whole"), run("cut")
    cut_after(3, place.work / "cut" / "metrics.jsonl", cut)
    at = list_checkpoints(place.work / "cut" / "checkpoints")
    expect(bool(at) and at[-1][0] < steps, f"the run was not cut short, or not saved: {at}")
    expect(run("cut", "--resume").wait() == 0, "the resumed run fails")
    expect(whole.wait() == 0, "the whole run fails")
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
        with arithmetic(job.ranks.device, tf32=True):
            state = build_state(job.recipe, 10, job.ranks)
            _ = trainer_of(job, state).task.stepper
    except jp.UserError as error:
        expect("fit" in error.message, error.message)
        return {"said": error.message[:120]}
    raise AssertionError("65,536 jigsaws of 448 pixels fit into memory at once")


def speed(place: Place) -> dict[str, Any]:
    """The paper's step from shards, on the device, and beside classification; what a refresh costs."""
    counts = (1,) if place.toy else (2, 4)
    given = (*TOY[:3], "data.batch=8") if place.toy else ("data.batch=512", "optim.micro_batch=64")
    repeats, block = (1, 1) if place.toy else (3, 8)
    arguments = ["--device", place.device, "--data", place.data, "--brief"]
    arguments += ["--repeats", str(repeats), "--block", str(block)]
    arguments += [part for one in given for part in ("--set", one)]
    arguments += [part for one in counts for part in ("--workers", str(one))]
    train.main(arguments, standalone_mode=False)
    results = json.loads((RESULTS / "train.json").read_text())
    found: dict[str, Any] = {}
    for workers, one in results["by_workers"].items():
        at = f", {workers} workers"
        found |= {f"real / synthetic{at}": one["real"], f"images/s{at}": one["images_per_second"]}
        found |= {
            f"idle{at}": one["idle"],
            f"hours of 64,000 steps{at}": 64_000 * 512 / one["images_per_second"] / 3600,
        }
    return {**found, "dense / classification": results["dense"], "ERF share": results["refresh_share"]}


def parts(place: Place) -> dict[str, Any]:
    """What a run does now and then, timed apart: start, a refresh, a save, the page, a validation."""
    steps = 2 if place.toy else 20
    dataset, job = jp.open_dataset(place.data), place.job("parts", "optim.steps=1_000")
    job.folder.path.mkdir()
    with arithmetic(job.ranks.device, tf32=True):
        costs = measure(job, loader_source(job, dataset, 1, False), steps)
        state = build_state(job.recipe, len(dataset.classes) + 1, job.ranks, dataset.pixels)
        validate = evaluate.validation(job, dataset, 1, ReadOptions())
        began = now(place)
        seen = validate(state, lambda: False)
        validated = now(place) - began
        # The first page imports what draws.
        write_report(job.folder.path, finished=False)
        began = now(place)
        write_report(job.folder.path, finished=False)
        page = now(place) - began
    assert seen is not None
    found = {"start s": costs.start, "step s": costs.step, "refresh s": costs.refresh, "save s": costs.save}
    found |= {"page s": page, "validation s": validated, "validated jigsaws": seen["jigsaws"]}
    return {**found, "idle": costs.wait / costs.step}


def joined(place: Place) -> dict[str, Any]:
    """DistributedDataParallel over NCCL with one rank, compiled within, and with all cards where there are several."""
    backend = "nccl" if place.on_gpu else "gloo"
    torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
    dataset = jp.open_dataset(place.data)
    job = place.job("joined")
    model = build_state(job.recipe, len(dataset.classes) + 1, job.ranks).model
    alone = copy.deepcopy(model)
    inner: Any = torch.compile(model) if place.on_gpu else model
    devices = [job.ranks.device] if place.on_gpu else None
    together = torch.nn.parallel.DistributedDataParallel(inner, device_ids=devices)
    size = job.recipe.data.template_size
    images = torch.randint(0, 256, (4, size, size, 3), dtype=torch.uint8, device=job.ranks.device)
    with arithmetic(job.ranks.device, tf32=False):
        for one in (alone, together):
            one(images)[0].float().logsumexp(1).mean().backward()
    pairs = zip(alone.parameters(), model.parameters(), strict=True)
    apart = max(float((a.grad - b.grad).abs().max()) for a, b in pairs if a.grad is not None and b.grad is not None)
    torch.distributed.destroy_process_group()
    expect(apart < 1e-3, f"gradients differ by {apart:.2g}")
    cards = torch.cuda.device_count() if place.on_gpu else 1
    if cards > 1:
        settings = [part for one in (*place.size, "optim.steps=4") for part in ("--set", one)]
        command = ("train", "pretrain", "--data", place.data, "--run", place.work / "cards", *settings)
        expect(launched(cards, *command, "--workers", "1", "--no-page").wait() == 0, f"a run on {cards} cards fails")
    return {"backend": backend, "gradients apart": apart, "cards": cards}


def few(place: Place) -> tuple[str, str]:
    """Annotations of some of the drawn images, and the images' folder."""
    whole = json.loads((place.drawn / "annotations.json").read_text())
    kept = {one["id"] for one in whole["images"][: 8 if place.toy else 32]}
    whole["images"] = [one for one in whole["images"] if one["id"] in kept]
    whole["annotations"] = [one for one in whole["annotations"] if one["image_id"] in kept]
    path = place.work / "few.json"
    path.write_text(json.dumps(whole))
    return str(path), str(place.drawn / "images")


def detector_settings(place: Place, model: str, steps: int, precision: str) -> list[str]:
    """The recipe of a small detector."""
    side = 64 if place.toy else 400
    settings = [f"optim.steps={steps}", "data.batch=2", f"data.short_side={side}", "model.backbone=resnet18"]
    settings += [f"model.name={model}", f"run.precision={precision}", "model.norm=gn", "run.log_every=1"]
    if place.toy:
        settings += ["model.neck_channels=16", "model.fc=16", "model.rois=8", "model.proposals=16"]
    return settings


def detectors(place: Place) -> dict[str, Any]:
    """C4 and FPN detectors take steps and are evaluated, in float32 and bf16."""
    found, source = {}, few(place)
    for model in ("faster-rcnn-c4", "faster-rcnn-fpn"):
        for precision in ("fp32",) if place.toy else ("fp32", "bf16"):
            run, settings = (
                place.work / f"{model}-{precision}",
                detector_settings(place, model, 1 if place.toy else 6, precision),
            )
            recipe = jp.detect.DetectorRecipe.load("detect-sample", settings)
            began = now(place)
            jp.detect.train(
                *(*source, run, recipe), val_annotations=source[0], val_images=source[1], workers=1, device=place.device
            )
            found[f"{model} {precision} s"] = round(now(place) - began, 1)
            ap = jp.detect.evaluate(run, workers=0, device=place.device, out=run / "again").boxes.stats["AP"]
            expect(0 <= ap <= 1, f"AP of {model} in {precision} is {ap}")
    return found


def stopped_detector(place: Place) -> dict[str, Any]:
    """SIGTERM to torchrun saves a detector with two workers, and the run goes on from there."""
    annotations, images = few(place)
    run, steps = place.work / "cut-detector", 2_000
    settings = [part for one in detector_settings(place, "retinanet", steps, "fp32") for part in ("--set", one)]
    command = [
        "detect",
        "train",
        "--annotations",
        annotations,
        "--images",
        images,
        "--run",
        run,
        "--recipe",
        "detect-sample",
    ]
    command += ["--device", place.device, "--workers", 2, "--log", "none", *settings]
    cut_after(3, run / "metrics.jsonl", launched(1, *command))
    at = list_checkpoints(run / "checkpoints")
    expect(bool(at), "no checkpoint was saved")
    until = at[-1][0] + 2
    launched(1, *command, "--resume", "--stop-after", until).wait()
    reached = list_checkpoints(run / "checkpoints")[-1][0]
    expect(reached == until, f"the resumed run reached step {reached}, not {until}")
    return {"stopped at": at[-1][0], "resumed to": reached}


PHASES: dict[str, tuple[float, Callable[[Place], dict[str, Any]]]] = {
    "card": (10, card),
    "copies": (15, copies),
    "compiled": (50, compiled),
    "agree": (30, agree),
    "ring": (20, ring),
    "waits": (15, waits),
    "precisions": (25, precisions),
    "deterministic": (25, deterministic),
    "stopped": (45, stopped),
    "memory": (20, memory),
    "speed": (155, speed),
    "parts": (30, parts),
    "joined": (40, joined),
    "detectors": (45, detectors),
    "stopped detector": (40, stopped_detector),
}
"""Each phase's time limit in seconds, and what it does; at toy size, on a CPU that others use, four times as long."""


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


def run_apart(work: Callable[[], Any], limit: float) -> Any:
    """What ``work`` returns in a process of its own; TimeoutError where that takes longer, EOFError where it dies."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def child() -> None:
        os.setsid()
        # The tables of other scripts are not this one's answer.
        os.dup2(2, 1)
        sender.send(work())

    process = context.Process(target=child)
    process.start()
    assert process.pid is not None
    sender.close()
    try:
        if not receiver.poll(limit):
            raise TimeoutError
        found = receiver.recv()
        process.join(10)
        return found
    finally:
        receiver.close()
        # torchrun ends its ranks, which are in sessions of their own, at the first one.
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            process.join(5)


def found_by(name: str, place: Place, limit: float) -> dict[str, Any]:
    """What a phase in a process of its own found, or what became of it."""
    try:
        found: dict[str, Any] = run_apart(lambda: run_here(name, place), limit)
    except TimeoutError:
        found = {"passed": False, "figures": {"failed": f"not done after {limit:.0f} s"}, "seconds": limit}
    except EOFError:
        found = {"passed": False, "figures": {"failed": "its process died"}, "seconds": 0.0}
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
@click.option("--budget", default=BUDGET, show_default=True, help="Begin no phase after this many seconds.")
@click.option("--only", multiple=True, type=click.Choice(list(PHASES)), help="These phases alone; repeatable.")
@click.option("--data", help="A prepped dataset of the paper's size; the sample where none is given.")
@click.option("--work", type=click.Path(path_type=Path), help="Folder for runs; a temporary one by default.")
@click.option("--again", is_flag=True, help="Forget earlier results.")
def main(
    toy: bool,
    budget: float,
    only: tuple[str, ...],
    data: str | None,
    work: Path | None,
    again: bool,
) -> None:
    """Run the phases that are missing, print the table, write bench/results/gpu.json; status 1 where one failed."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        folder = work or Path(scratch)
        drawn = draw(folder / "drawn", 24 if toy else 240)
        place = Place("cpu" if toy else "cuda", folder, data or str(prep(drawn, folder / "out")), drawn, toy)
        file = RESULTS / ("gpu-toy.json" if toy else "gpu.json")
        commit = checked_out()
        # Asked for apart: a process that has used CUDA cannot be forked.
        where = "CPU, toy size" if toy else run_apart(torch.cuda.get_device_name, 60)
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
        for name, (limit, _) in PHASES.items():
            if (only and name not in only) or results["phases"].get(name, {}).get("passed"):
                continue
            left = budget - (time.monotonic() - began)
            if left <= 0:
                click.echo(f"{name}: no time left; call again to go on")
                continue
            results["phases"][name] = found_by(name, place, min(4 * limit if toy else limit, left))
            RESULTS.mkdir(exist_ok=True)
            file.write_text(json.dumps(results, indent=2) + "\n")
            click.echo(f"{name}: {results['phases'][name]}")
    show(results)
    sys.exit(0 if all(found["passed"] for found in results["phases"].values()) else 1)


if __name__ == "__main__":
    main()
