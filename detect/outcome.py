"""What a run ends with: evaluations on its way and at its end, its weights, its summary and its page."""

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from jigsaw_pretrain.detect.annotations import Annotations
from jigsaw_pretrain.detect.evaluate import AP, Evaluation, evaluate_model, save_evaluation
from jigsaw_pretrain.detect.loop import Trainer
from jigsaw_pretrain.detect.models import backbone
from jigsaw_pretrain.detect.models.weights import BACKBONE_FILE
from jigsaw_pretrain.detect.report import write_page
from jigsaw_pretrain.detect.run import DETECTOR, SUMMARY, Config, read_rows
from jigsaw_pretrain.storage import Storage
from jigsaw_pretrain.train.engine.checkpoint import save_file
from jigsaw_pretrain.train.engine.distributed import Ranks


class Evaluator:
    """Evaluates the model as it is; keeps the last evaluation for the end of the run."""

    def __init__(
        self, model: nn.Module, config: Config, validation: Annotations, images: Path, ranks: Ranks, workers: int
    ) -> None:
        self._model, self._config, self._validation = model, config, validation
        self._images, self._ranks, self._workers = images, ranks, workers
        self.last: Evaluation | None = None

    def __call__(self, stopped: Callable[[], bool]) -> dict[str, Any] | None:
        """The AP values of a metrics row, or None where a signal came in between."""
        recipe, ranks = self._config.recipe, self._ranks
        self.last = evaluate_model(
            self._model,
            recipe,
            self._config.plan,
            self._validation,
            self._images,
            ranks,
            self._workers,
            max(1, recipe.batch // ranks.world),
            stopped,
        )
        if self.last is None:
            return None
        row: dict[str, Any] = dict(self.last.boxes.stats)
        if self.last.masks:
            row |= {f"mask_{name}": value for name, value in self.last.masks.stats.items()}
        return row | {"evaluation_seconds": round(self.last.seconds, 3)}


def finish(trainer: Trainer, validation: Annotations | None, images: Path | None) -> None:
    """Write the weights, the evaluation's files, the summary and the page."""
    ranks, folder, evaluator = trainer.ranks, trainer.folder, trainer.evaluate
    assert evaluator is None or isinstance(evaluator, Evaluator)
    if evaluator is not None and evaluator.last is None and not ranks.on_first(lambda: (folder / AP).exists()):
        evaluator(lambda: False)

    def write() -> None:
        save_file(folder / DETECTOR, {key: value.cpu() for key, value in trainer.model.state_dict().items()})
        save_file(folder / BACKBONE_FILE, backbone.backbone_state(trainer.model))
        if evaluator is not None and evaluator.last is not None:
            save_evaluation(folder, evaluator.last)
        summary = summarise(trainer)
        Storage(folder).publish(SUMMARY, json.dumps(summary, indent=2).encode() + b"\n")
        if validation is not None and images is not None:
            write_page(folder, validation, images)

    ranks.on_first(write)
    ranks.say(f"{folder}: finished after {trainer.progress.step} steps, {trainer.progress.seconds:.0f} s of training")


def summarise(trainer: Trainer) -> dict[str, Any]:
    """summary.json: cost, speed, memory and AP of a finished run."""
    rows = read_rows(trainer.folder)
    speeds = [row["seconds_per_step"] for row in rows if "seconds_per_step" in row]
    memory = [row["gpu_memory"] for row in rows if row.get("gpu_memory")]
    scored = [row for row in rows if "AP" in row]
    device = trainer.ranks.device
    return {
        "steps": trainer.progress.step,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "world": trainer.ranks.world,
        "seconds": round(trainer.progress.seconds, 3),
        "device_seconds": round(trainer.progress.seconds * trainer.ranks.world, 3),
        "evaluation_seconds": round(trainer.progress.evaluation_seconds, 3),
        "seconds_per_step": statistics.median(speeds) if speeds else None,
        "gpu_memory": max(memory) if memory else None,
        "parameters_learned": sum(one.numel() for one in trainer.model.parameters() if one.requires_grad),
        "AP": {key: scored[-1][key] for key in scored[-1] if "AP" in key} if scored else None,
    }
