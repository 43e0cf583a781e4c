"""What a run carries from step to step, and its form in a checkpoint.

That is the model, the optimizer, the loss scale, the EMA, the ERF tables and the step. Everything is built from the
recipe and the seed on the CPU, the same on every rank, then moved; nothing else of a run has a memory (data and
randomness are functions of the step).
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from jigsaw_pretrain.errors import UserError
from jigsaw_pretrain.formats.pixels import RGB8, PixelFormat
from jigsaw_pretrain.rng import key_of_text
from jigsaw_pretrain.train.engine.distributed import Ranks
from jigsaw_pretrain.train.engine.optim import (
    EMA,
    begin_momentum,
    loss_scaler,
    make_optimizer,
    parameter_groups,
    seeded,
)
from jigsaw_pretrain.train.erf import Grid, measuring_grid
from jigsaw_pretrain.train.models import backbones, feature_maps
from jigsaw_pretrain.train.models.classifier import DenseClassifier
from jigsaw_pretrain.train.models.layers import GroupNorm, Neck
from jigsaw_pretrain.train.recipe import Recipe


@dataclass(frozen=True)
class ErfTable:
    """A map's label weights in force: made at ``step`` from ``masses``; both tensors float32 [4, h, w]."""

    step: int
    masses: Tensor
    weights: Tensor


@dataclass
class State:
    """A run's moving parts; ``step`` counts the steps done, so it is the next batch's number.

    tables: of each map classified, finest first; none before the first refresh. replaced: crops drawn so far that could
    not be decoded. left_out: names of the shards that the run goes on without.
    """

    backbone: feature_maps.Backbone
    model: DenseClassifier
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    ema: EMA | None = None
    step: int = 0
    tables: tuple[ErfTable, ...] = ()
    replaced: int = 0
    left_out: list[str] = field(default_factory=list)

    def to_checkpoint(self) -> dict[str, Any]:
        """Tensors and plain values only, so that weights_only loading takes it."""
        tables = [{"step": one.step, "masses": one.masses, "weights": one.weights} for one in self.tables]
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "average": self.ema and self.ema.state,
            # A run without a neck has one, in the form that was before there were necks.
            "erf": tables if len(tables) > 1 else tables[0] if tables else None,
            "replaced": self.replaced,
            "left_out": list(self.left_out),
        }

    def restore(self, content: dict[str, Any]) -> None:
        """Take a checkpoint's place, bit for bit."""
        self.model.load_state_dict(content["model"])
        self.optimizer.load_state_dict(content["optimizer"])
        for group in self.optimizer.param_groups:
            # The machine's, not the run's: it may have begun on another one.
            group["fused"] = self.optimizer.defaults["fused"]
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(content["scaler"])
        if self.ema is not None:
            self.ema.restore(content["average"])
        self.step = content["step"]
        self.replaced, self.left_out = content.get("replaced", 0), list(content.get("left_out", ()))
        device = self.model.mean.device
        found = content["erf"] or []
        self.tables = tuple(
            ErfTable(step=one["step"], masses=one["masses"].to(device), weights=one["weights"].to(device))
            for one in ([found] if isinstance(found, dict) else found)
        )


def build_model(
    recipe: Recipe, label_count: int, pixels: PixelFormat = RGB8
) -> tuple[feature_maps.Backbone, DenseClassifier]:
    """The recipe's backbone and classifier, initialised from its seed; refuses a template off the backbone's grid.

    Raises UserError too for a neck on a backbone without its stages.
    """
    with seeded(key_of_text(recipe.data.seed, "initial weights")):
        backbone = backbones.build(
            recipe.model.backbone, recipe.model.norm, recipe.model.neck != "none", pixels.channels
        )
        recipe.data.template.region_map(backbone.stride)
        neck = None
        if recipe.model.neck == "fpn":
            # As a detector has it: group norm with a backbone of group norm, none beside batch norm.
            norm = GroupNorm if recipe.model.norm == "gn" else None
            neck = Neck([stage.channels for stage in backbone.stages], recipe.model.neck_channels, norm)
        mean, std = recipe.data.normalisation
        return backbone, DenseClassifier(backbone.module, backbone.channels, label_count, mean, std, neck, pixels)


def region_maps(recipe: Recipe, backbone: feature_maps.Backbone, device: torch.device) -> list[Tensor]:
    """The region of every position (0 to 3, int64 [h, w]) of each map classified, in the order of the logits."""
    return [torch.from_numpy(recipe.data.template.region_map(one.stride)).to(device) for one in backbone.maps]


def grids(recipe: Recipe, backbone: feature_maps.Backbone) -> list[Grid]:
    """Where the receptive fields of each of these maps are measured."""
    return [measuring_grid(recipe.data.template, one.stride, backbone.stride) for one in backbone.maps]


def build_state(recipe: Recipe, label_count: int, ranks: Ranks, pixels: PixelFormat = RGB8) -> State:
    """A run's state before its first step, on this rank's device.

    Raises UserError for an unknown backbone or a template off its grid, and for sync_bn between CPUs.
    """
    backbone, model = build_model(recipe, label_count, pixels)
    if recipe.model.sync_bn and ranks.world > 1:
        if ranks.device.type != "cuda":
            raise UserError(
                "model.sync_bn = true: torch shares batch statistics between GPUs only; set it to false on CPUs"
            )
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    model.to(device=ranks.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    fused = ranks.device.type == "cuda" or None
    groups = parameter_groups(model, recipe.optim, _own_name)
    optimizer = make_optimizer(groups, recipe.optim, lr=recipe.rates[0], fused=fused)
    ema = EMA(model, recipe.optim.ema) if recipe.optim.ema else None
    scaler = loss_scaler(recipe.run.precision, ranks.device)
    if scaler.is_enabled():
        begin_momentum(optimizer)
    return State(backbone, model, optimizer, scaler, ema)


def _own_name(name: str) -> str | None:
    """The backbone's name of a parameter of the classifier."""
    return name.removeprefix("backbone.") if name.startswith("backbone.") else None
