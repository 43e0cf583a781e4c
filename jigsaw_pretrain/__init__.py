"""Pre-train a detector's backbone from the detection dataset itself (Jigsaw pre-training).

What stands here is the public API; everything else may move. A name is imported when it is first used, so importing
the package costs neither torch nor numpy. Most commands are functions of the same name.
"""

# Nothing is imported here: `python -m jigsaw_pretrain.train` imports this module before it takes the working folder
# from the front of sys.path, where a user's typing.py would be taken for Python's.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from jigsaw_pretrain import detect as detect
    from jigsaw_pretrain.errors import Interrupted as Interrupted
    from jigsaw_pretrain.errors import UserError as UserError
    from jigsaw_pretrain.formats.dataset.dataset import Dataset as Dataset
    from jigsaw_pretrain.formats.dataset.dataset import open_dataset as open_dataset
    from jigsaw_pretrain.formats.jigsaw import Template as Template
    from jigsaw_pretrain.prep.manifests import finish as finish
    from jigsaw_pretrain.prep.pipeline import plan as plan
    from jigsaw_pretrain.prep.pipeline import repair as repair
    from jigsaw_pretrain.prep.pipeline import shards as shards
    from jigsaw_pretrain.prep.plan.plan import Plan as Plan
    from jigsaw_pretrain.prep.records import status as status
    from jigsaw_pretrain.prep.sample.scenes import sample_data as sample_data
    from jigsaw_pretrain.prep.split import Split as Split
    from jigsaw_pretrain.prep.split import split as split
    from jigsaw_pretrain.prep.verify import verify as verify
    from jigsaw_pretrain.train.data.loader import JigsawLoader as JigsawLoader
    from jigsaw_pretrain.train.data.loader import digest as digest
    from jigsaw_pretrain.train.erf import label_weights as label_weights
    from jigsaw_pretrain.train.erf import region_masses as region_masses
    from jigsaw_pretrain.train.estimate import Estimate as Estimate
    from jigsaw_pretrain.train.estimate import estimate as estimate
    from jigsaw_pretrain.train.evaluate import evaluate as evaluate
    from jigsaw_pretrain.train.export.export import Exported as Exported
    from jigsaw_pretrain.train.export.export import export as export
    from jigsaw_pretrain.train.losses import block_wise_loss as block_wise_loss
    from jigsaw_pretrain.train.losses import erf_adaptive_loss as erf_adaptive_loss
    from jigsaw_pretrain.train.losses import global_loss as global_loss
    from jigsaw_pretrain.train.models.backbones import allow_backbone as allow_backbone
    from jigsaw_pretrain.train.models.classifier import DenseClassifier as DenseClassifier
    from jigsaw_pretrain.train.probe import probe as probe
    from jigsaw_pretrain.train.recipe import Recipe as Recipe
    from jigsaw_pretrain.train.report.sheet import preview as preview
    from jigsaw_pretrain.train.run import Run as Run
    from jigsaw_pretrain.train.run import open_run as open_run
    from jigsaw_pretrain.train.run import pretrain as pretrain

_PUBLIC = {
    "allow_backbone": "train.models.backbones",
    "Dataset": "formats.dataset.dataset",
    "DenseClassifier": "train.models.classifier",
    "Estimate": "train.estimate",
    "Exported": "train.export.export",
    "Interrupted": "errors",
    "JigsawLoader": "train.data.loader",
    "Plan": "prep.plan.plan",
    "Recipe": "train.recipe",
    "Run": "train.run",
    "Split": "prep.split",
    "Template": "formats.jigsaw",
    "UserError": "errors",
    "block_wise_loss": "train.losses",
    "digest": "train.data.loader",
    "erf_adaptive_loss": "train.losses",
    "estimate": "train.estimate",
    "evaluate": "train.evaluate",
    "export": "train.export.export",
    "finish": "prep.manifests",
    "global_loss": "train.losses",
    "label_weights": "train.erf",
    "open_dataset": "formats.dataset.dataset",
    "open_run": "train.run",
    "plan": "prep.pipeline",
    "pretrain": "train.run",
    "preview": "train.report.sheet",
    "probe": "train.probe",
    "region_masses": "train.erf",
    "repair": "prep.pipeline",
    "sample_data": "prep.sample.scenes",
    "shards": "prep.pipeline",
    "split": "prep.split",
    "status": "prep.records",
    "verify": "prep.verify",
}
"""The module of each public name, below this package; the same imports stand above for type checkers and editors."""

_STAGES = ("detect",)
"""Packages with public names of their own."""

__all__ = [*_PUBLIC, *_STAGES]


def __getattr__(name: str) -> "Any":
    import importlib

    if name in _STAGES:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC, *_STAGES})
