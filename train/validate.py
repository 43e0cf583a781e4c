"""Validation while training: accuracy on a held-out dataset's jigsaws, by region, class and group, every so often.

The same jigsaws every time (unaugmented, from the first position of every lane), each rank judging its own lanes, so
the figures depend on no number of ranks. It leaves no trace in the run: weights, statistics and randomness after it
are those of a run without. Costs a forward pass a jigsaw (at most MOST_JIGSAWS) and the start of the workers.
"""

from dataclasses import replace
from typing import Any

import numpy as np

from jigsaw_pretrain.formats.dataset.dataset import Dataset
from jigsaw_pretrain.train.data.access import Access
from jigsaw_pretrain.train.engine.state import State, region_maps
from jigsaw_pretrain.train.engine.trainer import Job, Validate
from jigsaw_pretrain.train.evaluate import MOST_JIGSAWS, Answers, one_pass, predict, summarise


def validation(job: Job, dataset: Dataset, workers: int, access: Access) -> Validate:
    """What judges a state of the job's run on ``dataset``, which has the run's classes; call it on all ranks."""
    from jigsaw_pretrain.train.data.loader import JigsawLoader

    recipe, ranks = job.recipe, job.ranks
    wanted = min(MOST_JIGSAWS, one_pass(dataset))
    stream = replace(recipe.stream, augment=False, balance="none")

    def validate(state: State) -> dict[str, Any]:
        # Running statistics differ between ranks; those that count are rank 0's.
        ranks.share_buffers(state.model)
        maps = region_maps(recipe, state.backbone, ranks.device)
        source = JigsawLoader(
            dataset,
            recipe.template,
            stream,
            rank=ranks.rank,
            world=ranks.world,
            workers=workers,
            stop_step=-(-wanted // recipe.batch),
            access=access,
        )
        try:
            found = predict(state.model, source, maps)
        finally:
            source.close()
        shares = ranks.gathered((found.predictions, found.labels, found.groups))
        answers = Answers(*(np.concatenate(parts) for parts in zip(*shares, strict=True)))
        report = summarise(answers, dataset.classes)
        overall = report["overall"]
        ranks.say(
            f"step {state.step}: validation accuracy {overall['accuracy']:.1%} on {report['jigsaws']} jigsaws "
            f"(always the commonest class: {overall['majority_share']:.1%})"
        )
        return report

    return validate
