"""A comparison from its settings to its report: pre-train, sweep the learning rate, fine-tune over seeds, tabulate.

Each arm: one pre-training per seed; the sweep (the same rates for every arm) on a seed of its own, judged by AP on the
validation images; then the seeds at the best rate. Then the rival at equal total cost: scratch, trained longer by what
the pre-training took, measured. The order puts scratch and jigsaw first, so a comparison cut short has the main answer.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from jigsaw_pretrain.detect.comparison.arms import EQUAL_COST, JIGSAW, SCRATCH, Arm, choose
from jigsaw_pretrain.detect.comparison.report import write_report
from jigsaw_pretrain.detect.comparison.results import RunResult, read_result, spread
from jigsaw_pretrain.detect.comparison.runner import OutOfTime, Task, TaskRunner
from jigsaw_pretrain.detect.models.weights import BACKBONE_FILE
from jigsaw_pretrain.detect.recipe import DetectorRecipe
from jigsaw_pretrain.detect.run import SUMMARY
from jigsaw_pretrain.errors import Interrupted, UserError
from jigsaw_pretrain.formats.annotations.read import Reading
from jigsaw_pretrain.formats.dataset.dataset import open_dataset
from jigsaw_pretrain.storage.store import Storage
from jigsaw_pretrain.train.recipe import Recipe

Content = TypeVar("Content")

SWEEP_SEED = 1000
SETTINGS = "settings.json"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """What is compared; a folder holds one comparison.

    reading: what of a Reading is not the default's. data: the prepped dataset to pre-train on. recipe, pretrain_recipe:
    TOML files, None for the papers'. sets, pretrain_sets: key=value over them, the same for all arms. rates: of the
    sweep.
    """

    annotations: str
    images: str
    val_annotations: str
    val_images: str
    data: str
    arms: tuple[str, ...]
    seeds: tuple[int, ...]
    rates: tuple[float, ...]
    recipe: str | None
    sets: tuple[str, ...]
    pretrain_recipe: str | None
    pretrain_sets: tuple[str, ...]
    imagenet: str | None
    workers: int
    device: str
    gpus: int
    val_split: str | None = None
    reading: dict[str, Any] = field(default_factory=dict)


def _read(path: Path, kind: type[Content]) -> Content:
    """What a comparison has noted in a file of its folder; raises UserError where that is damaged."""
    try:
        return msgspec.json.decode(Storage(path.parent).read(path.name), type=kind)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}): remove it, or name another folder for the comparison") from error


def compare(
    out: str | Path,
    *,
    annotations: str | Path,
    images: str | Path,
    val_annotations: str | Path,
    val_images: str | Path,
    val_split: str | None = None,
    reading: Reading | None = None,
    data: str | Path,
    arms: str = "scratch,jigsaw",
    seeds: int = 3,
    rates: Sequence[float] = (0.01, 0.02, 0.04),
    recipe: str | Path | None = None,
    settings: Sequence[str] = (),
    pretrain_recipe: str | Path | None = None,
    pretrain_settings: Sequence[str] = (),
    imagenet: str | Path | None = None,
    budget: float | None = None,
    workers: int = 2,
    gpus: int = 1,
    device: str = "auto",
) -> list[RunResult]:
    """Pre-train, fine-tune and tabulate arms under equal conditions; called again it goes on.

    Args:
        out: folder of the comparison: tables, curves, all its runs.
        annotations: what detectors are fine-tuned on, as prep takes it.
        images: their images.
        val_annotations: what AP is reported on.
        val_images: their images.
        val_split: the split of the validation annotations, as ``reading`` has that of the training annotations.
        reading: how annotations and images are read; None for prep's defaults.
        data: what prep made of the same annotations, to pre-train on.
        arms: names of arms and TOML files of one's own, separated by commas (arms.py).
        seeds: how many, from 0.
        rates: learning rates of the sweep, for a batch of 16.
        recipe: the detector's TOML recipe; None for the Jigsaw paper's.
        settings: changes to it, the same for all arms.
        pretrain_recipe: the pre-training's TOML recipe; None for the paper's.
        pretrain_settings: changes to it, the same for all arms.
        imagenet: a weights file for one more arm.
        budget: seconds after which to stop; None for no limit.
        workers: data processes of each training.
        gpus: ranks of each training.
        device: ``auto``, ``cpu`` or ``cuda``.

    Returns:
        The finished runs that are reported; comparison.json and report.html in ``out`` have the tables.

    Raises:
        UserError: for a folder that holds another comparison, and for a training that fails.
        Interrupted: a signal ended it; the training under way has saved.
    """
    chosen = choose(arms, None if imagenet is None else Path(imagenet))

    def named(value: str | Path | None) -> str | None:
        return None if value is None else str(value)

    comparison = Comparison(
        Path(out),
        Settings(
            annotations=str(annotations),
            images=str(images),
            val_annotations=str(val_annotations),
            val_images=str(val_images),
            data=str(data),
            arms=tuple(arm.name for arm in chosen),
            seeds=tuple(range(seeds)),
            rates=tuple(rates),
            recipe=named(recipe),
            sets=tuple(settings),
            pretrain_recipe=named(pretrain_recipe),
            pretrain_sets=tuple(pretrain_settings),
            imagenet=named(imagenet),
            workers=workers,
            device=device,
            gpus=gpus,
            val_split=val_split,
            reading=(reading or Reading()).differences(),
        ),
        chosen,
    )
    comparison.prepare()
    if not comparison.run(TaskRunner(budget, gpus, comparison.trainings)):
        log.info("stopped before the end; the same call continues %s", out)
    return comparison.results()


class Comparison:
    """The tasks of a comparison in a folder, and its report."""

    def __init__(self, folder: Path, settings: Settings, arms: Sequence[Arm]) -> None:
        self.folder, self.settings, self.arms = folder, settings, list(arms)

    def prepare(self) -> None:
        """Check every arm's settings and note them, before the first one trains.

        Raises UserError for settings that an arm cannot have, and where the folder holds another comparison (other arms
        may be added).
        """
        for arm in self.arms:
            try:
                self._check(arm)
            except UserError as error:
                raise UserError(f"--arms {arm.name}: {error.message}") from error
        path = self.folder / SETTINGS
        values = json.loads(json.dumps(asdict(self.settings)))
        definitions = json.loads(json.dumps({arm.name: arm.to_dict() for arm in self.arms}))
        if path.exists():
            # Comparisons from before these keys have the defaults.
            before = {"val_split": None, "reading": {}, "definitions": {}, **_read(path, dict[str, Any])}
            known = before["definitions"]
            if not isinstance(known, dict):
                raise UserError(f"{path} is damaged: its definitions are no object. Remove it, or name another folder")
            for key, value in values.items():
                if key not in ("arms", "seeds", "workers", "device", "gpus") and before.get(key) != value:
                    raise UserError(
                        f"{self.folder} holds a comparison with {key} = {before.get(key)!r}, not {value!r}: continue "
                        "it with its own settings, or name another folder"
                    )
            for name, arm in definitions.items():
                if known.get(name, arm) != arm:
                    raise UserError(
                        f"{self.folder} holds a comparison with another arm {name}: give yours another name"
                    )
            definitions = {**known, **definitions}
        values["definitions"] = definitions
        self.folder.mkdir(parents=True, exist_ok=True)
        Storage(self.folder).publish(SETTINGS, json.dumps(values, indent=2).encode() + b"\n")

    def _check(self, arm: Arm) -> None:
        """Raise UserError for what an arm's trainings would refuse, as far as its settings say it."""
        detector = self._detector(arm).model
        if arm.has_neck and detector.name == "faster-rcnn-c4":
            raise UserError(f"{detector.name} has no pyramid for a neck's weights: --set model.name=faster-rcnn-fpn")
        if arm.weights is not None and not arm.weights.exists():
            raise UserError(f"{arm.weights} is missing: name a weights file")
        if arm.pretrain is None:
            return
        if arm.data is not None:
            open_dataset(arm.data)
        trained = Recipe.load(*self._pretraining(arm)).model.backbone
        if trained != detector.backbone and not detector.partial:
            raise UserError(
                f"the pre-training is of {trained} and the detector of {detector.backbone}: give both one "
                "model.backbone, with --pretrain-set and --set"
            )

    @property
    def trainings(self) -> int:
        """How many trainings the comparison consists of."""
        names = {arm.name for arm in self.arms}
        pretrainings = {arm.pretraining(self.arms) for arm in self.arms if arm.pretrain is not None}
        detectors = len(names) + ({SCRATCH, JIGSAW} <= names)
        swept = len(self.settings.rates) if len(self.settings.rates) > 1 else 0
        return (len(pretrainings) + detectors) * len(self.settings.seeds) + len(names) * swept

    def run(self, runner: TaskRunner) -> bool:
        """Run what is not done; False where time ran out. The report is written in any case.

        Raises Interrupted where a signal came.
        """
        finished, signal = True, None
        try:
            rates = {}
            for arm in self.arms:
                rates[arm.name] = self._sweep(runner, arm)
                for seed in self.settings.seeds:
                    runner.run(self._detect(runner, arm, seed, rates[arm.name]))
                if arm.name == JIGSAW and SCRATCH in rates:
                    self._equal_cost(runner, rates[SCRATCH])
        except OutOfTime:
            finished = False
        except Interrupted as error:
            signal = error
        found = self.results()
        if found:
            log.info("%s", write_report(self.folder, found, self.notes()))
        if signal is not None:
            raise signal
        return finished

    def notes(self) -> list[str]:
        """What readers of the tables must know."""
        rates = ", ".join(f"{rate:g}" for rate in self.settings.rates)
        sweep = f"the best of {rates} (for batch 16) on the validation images, with a seed that is not reported"
        return [
            f"Learning rate of each arm: {sweep if len(self.settings.rates) > 1 else rates}.",
            "Cost: device-seconds of training steps (on a CPU the computing time of the trainer, else the wall clock, "
            "waiting for data included); start-up, checkpoints, evaluation, the learning-rate sweep and prep are not.",
            "Intervals: Student's t at 95 % on differences paired by seed.",
        ]

    def results(self) -> list[RunResult]:
        """The finished runs that are reported."""
        names = [arm.name for arm in self.arms]
        if SCRATCH in names:
            names.insert(names.index(SCRATCH) + 1, EQUAL_COST)
        found = []
        for name in names:
            for seed in self.settings.seeds:
                run = self.folder / "detect" / name / f"seed-{seed}"
                if (run / SUMMARY).exists():
                    found.append(read_result(run, name))
        return found

    def _sweep(self, runner: TaskRunner, arm: Arm) -> float:
        """The best learning rate of an arm by AP on the validation images (the only one needs no sweep)."""
        rates = self.settings.rates
        if len(rates) == 1:
            return rates[0]
        best = (-1.0, rates[0])
        for rate in rates:
            task = self._detect(runner, arm, SWEEP_SEED, rate, folder=f"sweep-{rate:g}")
            runner.run(task)
            best = max(best, (read_result(task.folder, arm.name).ap["AP"], rate), key=lambda one: one[0])
        return best[1]

    def _pretrained(self, runner: TaskRunner, arm: Arm, seed: int) -> str:
        """Where an arm starts: scratch, its weights, or its pre-training run of a seed, run if need be."""
        settings = self.settings
        if arm.weights is not None:
            return str(arm.weights)
        if arm.pretrain is None:
            return "scratch"
        name = arm.pretraining(self.arms)
        seed = settings.seeds[0] if seed == SWEEP_SEED else seed
        folder = self.folder / "pretrain" / name / f"seed-{seed}"
        arguments = ["pretrain", "--data", arm.data or settings.data, "--run", str(folder), "--resume"]
        recipe, sets = self._pretraining(arm)
        if recipe is not None:
            arguments += ["--recipe", recipe]
        for item in (*sets, f"data.seed={seed}"):
            arguments += ["--set", item]
        arguments += ["--workers", str(settings.workers), "--device", settings.device]
        runner.run(
            Task(f"pre-train {name}, seed {seed}", "jigsaw_pretrain.train", tuple(arguments), folder, BACKBONE_FILE)
        )
        return str(folder)

    def _pretraining(self, arm: Arm) -> tuple[str | None, tuple[str, ...]]:
        """The recipe of an arm's pre-training and the settings over it, without the seed."""
        settings = self.settings
        recipe, sets = arm.pretrain_recipe or settings.pretrain_recipe, (*settings.pretrain_sets, *(arm.pretrain or ()))
        if arm.has_neck:
            # A detector takes a neck of its own width only.
            sets += (f"model.neck_channels={self._detector(arm).model.neck_channels}",)
        if arm.pretrain_steps != 1:
            whole = Recipe.load(recipe, sets).optim.steps
            sets += (f"optim.steps={max(1, round(arm.pretrain_steps * whole))}",)
        return recipe, sets

    def _detector(self, arm: Arm) -> DetectorRecipe:
        """An arm's recipe of the detector."""
        settings = self.settings
        return DetectorRecipe.load(arm.recipe or settings.recipe, (*settings.sets, *arm.detect))

    def _detect(
        self,
        runner: TaskRunner,
        arm: Arm,
        seed: int,
        rate: float,
        folder: str | None = None,
        name: str | None = None,
        more: tuple[str, ...] = (),
    ) -> Task:
        """The fine-tuning of an arm with a seed and a rate, its pre-training done first."""
        settings = self.settings
        place = self.folder / "detect" / (name or arm.name) / (folder or f"seed-{seed}")
        arguments = ["train", "--run", str(place), "--init", self._pretrained(runner, arm, seed), "--resume"]
        for option in ("annotations", "images", "val_annotations", "val_images"):
            arguments += [f"--{option.replace('_', '-')}", getattr(settings, option)]
        arguments += Reading(**settings.reading).words()
        arguments += ["--val-split", settings.val_split] if settings.val_split else []
        if recipe := arm.recipe or settings.recipe:
            arguments += ["--recipe", recipe]
        for item in (*settings.sets, *arm.detect, f"optim.lr={rate!r}", f"data.seed={seed}", *more):
            arguments += ["--set", item]
        arguments += ["--workers", str(settings.workers), "--device", settings.device]
        what = f"{name or arm.name}, {folder or f'seed {seed}'}, lr {rate:g}"
        return Task(what, "jigsaw_pretrain.detect", tuple(arguments), place, SUMMARY)

    def _equal_cost(self, runner: TaskRunner, rate: float) -> None:
        """Scratch, trained longer by what the pre-training took."""
        scratch, jigsaw = ([one for one in self.results() if one.arm == name] for name in (SCRATCH, JIGSAW))
        extra = spread([one.pretrain_seconds for one in jigsaw])[0]
        own = spread([one.detect_seconds for one in scratch])[0]
        steps = round(scratch[0].steps * (1 + extra / own))
        noted = self.folder / "detect" / EQUAL_COST / "steps.json"
        # Once begun, the number of steps stays, whatever later seeds add to the averages.
        if noted.exists():
            steps = _read(noted, int)
        noted.parent.mkdir(parents=True, exist_ok=True)
        Storage(noted.parent).publish(noted.name, json.dumps(steps).encode())
        arm = next(one for one in self.arms if one.name == SCRATCH)
        for seed in self.settings.seeds:
            runner.run(self._detect(runner, arm, seed, rate, name=EQUAL_COST, more=(f"optim.steps={steps}",)))
