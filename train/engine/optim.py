"""The learning rate of every step: linear warm-up, then cosine to zero (section 4.1). Pure arithmetic."""

import math


def scaled_rate(rate: float, batch: int, reference_batch: int) -> float:
    """The linear scaling rule: ``rate * batch / reference_batch``. The paper's 0.2 and 0.8 are for 512 jigsaws."""
    return rate * batch / reference_batch


def learning_rate(step: int, *, steps: int, warmup_steps: int, start: float, peak: float) -> float:
    """The rate of step ``step`` (counted from 0) of a run of ``steps``.

    ``start + (peak - start) * step / warmup_steps`` for the first ``warmup_steps`` steps, then ``peak * (1 + cos(pi *
    (step - warmup_steps) / (steps - warmup_steps))) / 2``: the peak at step ``warmup_steps``, zero at ``steps``.
    Depends on no other state, so a resumed run and one that stopped early are on the same curve.
    """
    if step < warmup_steps:
        return start + (peak - start) * step / warmup_steps
    return peak * (1 + math.cos(math.pi * (step - warmup_steps) / (steps - warmup_steps))) / 2
