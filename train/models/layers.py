"""Normalisation of a backbone: batch norm as its library builds it, or GN(32) in its place (`norm` in a recipe).

Group norm needs no statistics, so it is the choice where a detector is to be fine-tuned with small batches and without
frozen batch norm ("Rethinking ImageNet Pre-training", section 3.1): weights trained under one norm are worth little
under another. It costs some 10 to 20 % of a step. Prefer `bn` where the detector freezes it, as this paper's does.
"""

import math

from torch import nn

from jigsaw_pretrain.errors import UserError

GROUPS = 32

NORMS = ("bn", "gn")


class GroupNorm(nn.GroupNorm):
    """GN(32) by channel count; 16 channels make 16 groups, 48 make 16."""

    def __init__(self, channels: int) -> None:
        super().__init__(math.gcd(GROUPS, channels), channels)


def with_norm(name: str, module: nn.Module, norm: str) -> nn.Module:
    """The module under ``norm``: with "gn" every BatchNorm2d in it gives its place, name and initial scale to GN(32).

    Raises UserError for a module (``name`` is for the message) whose batch norms do more than normalise, or that has
    none.
    """
    if norm == "bn":
        return module
    found = 0
    for parent in list(module.modules()):
        for child, layer in list(parent.named_children()):
            if not isinstance(layer, nn.modules.batchnorm._BatchNorm):
                continue
            if type(layer) is not nn.BatchNorm2d or not layer.affine:
                raise UserError(
                    f"norm = gn: {name} has a {type(layer).__name__}, whose place GroupNorm cannot take: train it with "
                    "norm = bn, or name another backbone, such as resnet50"
                )
            group_norm = GroupNorm(layer.num_features)
            # Some libraries begin the last norm of a block at zero.
            group_norm.load_state_dict({"weight": layer.weight, "bias": layer.bias})
            setattr(parent, child, group_norm)
            found += 1
    if not found:
        raise UserError(f"norm = gn: {name} has no batch norm to replace: leave `norm` out of the recipe")
    return module
