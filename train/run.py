"""A pre-training run from Python: `pretrain` begins or continues one, `open_run` opens one that is there.

`pretrain` is what the command of that name calls, alone or in every process under torchrun. Dataset and recipe alone
decide a run: the same seed gives the same run with any number of workers. torch's random state and
switches, thread counts and logging are afterwards as they were; under torchrun the group of ranks stays joined.
"""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from jigsaw_pretrain.config import Count, CountOrZero, checked
from jigsaw_pretrain.errors import UserError
from jigsaw_pretrain.formats.dataset.dataset import Dataset, require_dataset
from jigsaw_pretrain.train import evaluate as evaluation
from jigsaw_pretrain.train import probe as probing
from jigsaw_pretrain.train.data.remote import ReadOptions, default_cache
from jigsaw_pretrain.train.engine.checkpoint import backbone_state, trained_state
from jigsaw_pretrain.train.engine.distributed import start
from jigsaw_pretrain.train.engine.loggers import wanted
from jigsaw_pretrain.train.engine.metrics import Row, read_rows
from jigsaw_pretrain.train.engine.pretraining import TrainingJob, digest_lines, execute, loader_source
from jigsaw_pretrain.train.engine.run_folder import (
    check_classes,
    check_pixels,
    choose_recipe,
    open_run_folder,
    open_trained,
    origin_of,
    pixels_of,
)
from jigsaw_pretrain.train.engine.state import build_model
from jigsaw_pretrain.train.engine.step import MachineOptions
from jigsaw_pretrain.train.export import export as exporting
from jigsaw_pretrain.train.export.export import Exported
from jigsaw_pretrain.train.recipe import Compile, Recipe
from jigsaw_pretrain.train.report.page import RunPage


class Run:
    """A run's folder or URL, and what can be done with it once there is a checkpoint."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = str(folder)

    def __repr__(self) -> str:
        """The folder, as the call that opens it."""
        return f"Run({self.folder!r})"

    @property
    def recipe(self) -> Recipe:
        """The recipe that the run was begun with."""
        return open_trained(open_run_folder(self.folder))[1]

    def metrics(self) -> list[Row]:
        """The rows of metrics.jsonl, one per step."""
        folder = open_run_folder(self.folder)
        folder.read_apart()
        return read_rows(folder.metrics)

    def evaluate(self, dataset: Dataset, **options: Any) -> dict[str, Any]:
        """Accuracy on a dataset's jigsaws: `jigsaw_pretrain.evaluate` of this run."""
        return evaluation.evaluate(self.folder, dataset, **options)

    def probe(self, dataset: Dataset, **options: Any) -> dict[str, Any]:
        """A linear probe on held-out crops: `jigsaw_pretrain.probe` of this run."""
        return probing.probe(self.folder, dataset, **options)

    def export(self, to: str, out: str | Path, **options: Any) -> Exported:
        """Write the backbone for another library: `jigsaw_pretrain.export` of this run."""
        return exporting.export(self.folder, to, out, **options)

    def load_backbone(self) -> nn.Module:
        """The backbone with the newest checkpoint's weights, on the CPU and in eval mode.

        Returns:
            A module that maps normalised images, float32 [n, channels, H, W], to their last feature map.

        Raises:
            UserError: where there is no run or no checkpoint yet.
        """
        folder = open_run_folder(self.folder)
        description, recipe, content = open_trained(folder)
        labels = len(description["classes"]) + 1
        backbone, _ = build_model(recipe, labels, pixels_of(folder, description))
        backbone.module.load_state_dict(backbone_state(trained_state(content)))
        return backbone.module.eval()


def commonest_label(dataset: Dataset) -> tuple[str, float] | None:
    """The label that most of a dataset's crops have, and their share, 0 to 1; None where its manifest does not say."""
    counts = dataset.description.totals.get("by_label")
    if not counts or not sum(counts):
        return None
    label = max(range(len(counts)), key=lambda one: counts[one])
    return [*dataset.classes, "background"][label], counts[label] / sum(counts)


def open_run(folder: str | Path) -> Run:
    """The run of a folder or URL; nothing is read yet."""
    return Run(folder)


def pretrain(
    dataset: Dataset,
    run: str | Path,
    recipe: Recipe | str | Path | None = None,
    settings: Sequence[str] = (),
    *,
    resume: bool = False,
    stop_after: int | None = None,
    workers: int = 2,
    device: str = "auto",
    compiling: Compile = "auto",
    deterministic: bool = False,
    page: bool = True,
    log: Sequence[str] = ("none",),
    log_digest: bool = False,
    keep: int | None = None,
    held_out: Dataset | None = None,
    val_every: int = 0,
    access: ReadOptions | None = None,
    title: str | None = None,
) -> Run:
    """Pre-train a backbone on a dataset, or continue where the run stopped.

    Args:
        dataset: a prepped dataset.
        run: folder or URL of the run, made where it is not there.
        recipe: a recipe, a TOML file, or None for the paper's; of a run that is continued None takes its own.
        settings: changes to it, such as ``"optim.steps=200"``.
        resume: continue from the newest checkpoint, or begin.
        stop_after: end once the run has this many steps; the schedule stays.
        workers: processes that make this rank's jigsaws; 0 makes them here.
        device: ``auto``, ``cpu`` or ``cuda``.
        compiling: ``auto``, ``on`` or ``off``: torch.compile.
        deterministic: the same bits on the same GPU, or an error.
        page: keep RUN/report.html up to date.
        log: where else numbers and pictures go; empty for tensorboard where it is installed.
        log_digest: write what every batch held to RUN/digest.txt.
        keep: checkpoints that stay; None for the recipe's.
        held_out: a dataset to evaluate on meanwhile, with the same classes.
        val_every: steps between these evaluations; 0 makes 20 in the whole run.
        access: how shards at a URL are read and cached.
        title: of a progress bar on a terminal; None logs lines.

    Returns:
        The run, with RUN/backbone.pth where the schedule is done.

    Raises:
        UserError: for whatever the user can put right, on all ranks.
        Interrupted: a signal ended it, after a checkpoint.
    """
    for value, kind, name in (
        (stop_after, Count | None, "stop_after"),
        (workers, CountOrZero, "workers"),
        (keep, Count | None, "keep"),
        (val_every, CountOrZero, "val_every"),
    ):
        checked(value, kind, name)
    require_dataset(dataset)
    if held_out is not None:
        require_dataset(held_out, "held_out")
    if val_every and held_out is None:
        raise UserError(f"val_every = {val_every} has nothing to validate on: give held_out, or leave it out")
    ranks = start(device)
    read_options = access or ReadOptions(default_cache())
    folder = ranks.run_on_all(lambda: open_run_folder(run))
    with closing(folder):
        if folder.remote:
            ranks.run_on_rank_zero(folder.remote.pull)
        chosen = ranks.run_on_rank_zero(lambda: choose_recipe(folder, recipe, tuple(settings), resume, dataset))
        options, logs = MachineOptions(compiling, deterministic), ranks.run_on_rank_zero(lambda: wanted(log))
        origin = origin_of(dataset, chosen.data)
        callbacks = (RunPage(folder.path, chosen, origin),) if page else ()
        commonest = commonest_label(dataset)
        job = TrainingJob(
            chosen, origin, folder, ranks, callbacks, logs, options, keep, title=title, commonest=commonest
        )
        if held_out is not None:
            check_classes(folder, job.origin.classes, tuple(held_out.classes))
            check_pixels(folder, job.origin.pixels, held_out.pixels)
            validate = evaluation.validation(job, held_out, workers, read_options)
            job = replace(job, validate=validate, val_every=val_every or max(1, chosen.optim.steps // 20))
        source = loader_source(job, dataset, workers, log_digest, read_options)
        execute(job, source, stop_after=stop_after, digest_line=digest_lines(job) if log_digest else None)
    return Run(run)
