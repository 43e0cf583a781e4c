"""Pre-train a detector's backbone from the detection dataset itself (Jigsaw pre-training).

What stands here is the public API; everything else may move. A name is imported when it is first used, so importing
the package costs neither torch nor numpy. Functions have the names of the commands that call them.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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
    from jigsaw_pretrain.prep.verify import verify as verify

_PUBLIC = {
    "Dataset": "formats.dataset.dataset",
    "Plan": "prep.plan.plan",
    "Template": "formats.jigsaw",
    "UserError": "errors",
    "finish": "prep.manifests",
    "open_dataset": "formats.dataset.dataset",
    "plan": "prep.pipeline",
    "repair": "prep.pipeline",
    "shards": "prep.pipeline",
    "status": "prep.records",
    "verify": "prep.verify",
}
"""The module of each public name, below this package; the same imports stand above for type checkers and editors."""

__all__ = [*_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
