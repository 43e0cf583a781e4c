"""Batch norm's running statistics measured anew, over jigsaws at the recipe's batch, weights untouched.

The running statistics of a run come from one rank's micro-batches and lag behind the weights; averaged weights (`ema`)
have their own only approximately. A detector that freezes batch norm lives with them, so measure again before an export
where micro-batches were small. N forward passes without gradients; prefer the run's own where each GPU had 32 or more.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from jigsaw_pretrain.errors import UserError
from jigsaw_pretrain.formats.dataset.dataset import open_dataset
from jigsaw_pretrain.train.data.batch import BatchSource
from jigsaw_pretrain.train.engine.run_folder import RunFolder, check_classes, check_pixels, pixels_of, read_description
from jigsaw_pretrain.train.engine.state import build_model
from jigsaw_pretrain.train.recipe import Recipe

NORMS = (nn.modules.batchnorm._BatchNorm,)


def remeasure(model: nn.Module, source: BatchSource) -> int:
    """Give every batch norm of the model the plain mean of its statistics over the source's batches; returns them.

    Returns how many layers that were; the model's mode is left as it was, its gradients are not touched.
    """
    norms = [part for part in model.modules() if isinstance(part, NORMS) and part.track_running_stats]
    modes = [(part, part.training) for part in model.modules()]
    kept = [norm.momentum for norm in norms]
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.train()
        norm.momentum = None  # the cumulative mean, not the moving one
    with torch.no_grad():
        for batch in source:
            model(batch.images)
    for norm, momentum in zip(norms, kept, strict=True):
        norm.momentum = momentum
    for part, mode in modes:
        part.train(mode)
    return len(norms)


def recalibrated(
    folder: RunFolder,
    classes: list[str],
    recipe: Recipe,
    state: dict[str, Tensor],
    data: str,
    jigsaws: int,
    workers: int,
) -> dict[str, Tensor]:
    """The model's state with statistics of (at least) ``jigsaws`` jigsaws of the dataset, augmented as in training.

    Raises UserError for a dataset of other classes and for a backbone without batch norm.
    """
    from jigsaw_pretrain.train.data.loader import JigsawLoader

    dataset = open_dataset(data)
    check_classes(folder, classes, tuple(dataset.classes))
    check_pixels(folder, pixels_of(folder, read_description(folder)), dataset.pixels)
    _, model = build_model(recipe, dataset.label_count, dataset.pixels)
    model.load_state_dict(state)
    batch = min(recipe.micro_batch or recipe.batch, 64, jigsaws)
    stream = replace(recipe.stream, batch=batch, lanes=None)
    source = JigsawLoader(dataset, recipe.template, stream, workers=workers, stop_step=-(-jigsaws // batch))
    try:
        found = remeasure(model, source)
    finally:
        source.close()
    if not found:
        raise UserError(f"--recalibrate-bn: {recipe.backbone} has no batch norm with running statistics; leave it out")
    return model.state_dict()
