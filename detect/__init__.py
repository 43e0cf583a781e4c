"""Stage 3: backbone -> detector -> AP: does the pre-training pay?

Imports ``train`` for backbones and checkpoints, ``formats`` for what all stages share, and never ``prep``. What stands
here is public: ``jigsaw_pretrain.detect.train`` and so on, each imported when it is first used.
"""

# Nothing is imported here: `python -m jigsaw_pretrain.detect` imports this module before it takes the working folder
# from the front of sys.path, where a user's typing.py would be taken for Python's.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from jigsaw_pretrain.detect.coco_eval import Evaluation as Evaluation
    from jigsaw_pretrain.detect.comparison.comparison import compare as compare
    from jigsaw_pretrain.detect.evaluation import evaluate as evaluate
    from jigsaw_pretrain.detect.evaluation import evaluate_results as evaluate_results
    from jigsaw_pretrain.detect.recipe import DetectorRecipe as DetectorRecipe
    from jigsaw_pretrain.detect.training import train as train

_PUBLIC = {
    "DetectorRecipe": "recipe",
    "Evaluation": "coco_eval",
    "compare": "comparison.comparison",
    "evaluate": "evaluation",
    "evaluate_results": "evaluation",
    "train": "training",
}
"""The module of each public name; no module bears one, or it would take the name's place as soon as it is imported."""

__all__ = [*_PUBLIC]


def __getattr__(name: str) -> "Any":
    import importlib

    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
