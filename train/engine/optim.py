"""Parts of an optimizer step: the optimizer, its learning rate's schedule, the EMA of the weights, and the precision.

The schedule is section 4.1's: linear warm-up, then cosine to zero.

The exponential moving average of weights and buffers is what is exported where a recipe keeps one. It costs one pass
over the weights per step (ResNet-50: 0.1 ms on a GPU) and their size once more in memory and in checkpoints.

bf16 halves the memory of features and is two to four times as fast on GPUs that have it; fp16 needs its loss scaled,
which costs nothing but a step skipped now and then. Weights, gradients' sums, the loss and the receptive fields stay
float32. Prefer fp32 on CPUs, where lower precision is emulated and slow.
"""

import math
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def learning_rate(step: int, *, steps: int, warmup_steps: int, start: float, peak: float) -> float:
    """The rate of step ``step`` (counted from 0) of a run of ``steps``.

    ``start + (peak - start) * step / warmup_steps`` for the first ``warmup_steps`` steps, then ``peak * (1 + cos(pi *
    (step - warmup_steps) / (steps - warmup_steps))) / 2``: the peak at step ``warmup_steps``, zero at ``steps``.
    Depends on no other state, so a resumed run and one that stopped early are on the same curve.
    """
    if step < warmup_steps:
        return start + (peak - start) * step / warmup_steps
    return peak * (1 + math.cos(math.pi * (step - warmup_steps) / (steps - warmup_steps))) / 2


class OptimSettings(Protocol):
    """What a recipe's section ``optim`` says of the optimizer."""

    @property
    def momentum(self) -> float:
        """Of SGD."""
        ...

    @property
    def weight_decay(self) -> float:
        """Of the parameters in groups without one of their own."""
        ...


def make_optimizer(
    parameters: Iterable[Tensor] | Iterable[dict[str, Any]],
    settings: OptimSettings,
    *,
    lr: float,
    fused: bool | None = None,
) -> torch.optim.Optimizer:
    """SGD, the paper's optimizer, for pre-training and detectors alike; another one is chosen here.

    Args:
        parameters: tensors, or groups of them, which may have a ``weight_decay`` of their own.
        settings: the section ``optim`` of the recipe.
        lr: learning rate; both trainings set it anew at every step.
        fused: one kernel per step, on GPUs; None leaves it to torch.
    """
    momentum, decay = settings.momentum, settings.weight_decay
    return torch.optim.SGD(parameters, lr=lr, momentum=momentum, weight_decay=decay, fused=fused)


class EMA:
    """The moving average of ``model``, which begins as the model is; the model's tensors must stay the same objects.

    The decay grows with the first steps, min(decay, (1 + step) / (10 + step)), so that the random start is soon
    forgotten.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._decay = decay
        self._current = model.state_dict()
        self.state: dict[str, Tensor] = {key: value.detach().clone() for key, value in self._current.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after ``step`` (from 0) was done; counters are copied."""
        decay = min(self._decay, (1 + step) / (10 + step))
        floating = [key for key, value in self.state.items() if value.is_floating_point()]
        mine, theirs = ([state[key] for key in floating] for state in (self.state, self._current))
        get_ema_multi_avg_fn(decay)(mine, theirs, None)
        for key in self.state.keys() - set(floating):
            self.state[key].copy_(self._current[key])

    def restore(self, state: dict[str, Tensor]) -> None:
        """Take a checkpoint's average, bit for bit."""
        for key, value in self.state.items():
            value.copy_(state[key])


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """The context of a forward pass; of fp32 it changes nothing."""
    return torch.autocast(device.type, dtype=_DTYPES[precision], enabled=precision != "fp32")


def loss_scaler(precision: str, device: torch.device) -> torch.amp.GradScaler:
    """Scales the loss of fp16 so that small gradients survive; passes all through in any other precision."""
    return torch.amp.GradScaler(device.type, enabled=precision == "fp16")


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """torch's global generators begin at ``seed`` inside; afterwards they are as they were."""
    with torch.random.fork_rng(range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []):
        torch.manual_seed(seed)
        yield


@contextmanager
def arithmetic(device: torch.device, *, tf32: bool, deterministic: bool) -> Iterator[None]:
    """``set_arithmetic`` for a while: the switches are afterwards as they were."""
    matmul, cudnn, name = torch.backends.cuda.matmul, torch.backends.cudnn, "CUBLAS_WORKSPACE_CONFIG"
    before = matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark, os.environ.get(name)
    was_deterministic = torch.are_deterministic_algorithms_enabled()
    set_arithmetic(device, tf32=tf32, deterministic=deterministic)
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark, workspace = before
        torch.use_deterministic_algorithms(was_deterministic)
        if workspace is None:
            os.environ.pop(name, None)


def set_arithmetic(device: torch.device, *, tf32: bool, deterministic: bool) -> None:
    """Set torch's global arithmetic switches for this process; call before the first kernel runs.

    deterministic: every operation gives the same bits on the same machine, or fails where it cannot; up to a third
    slower on a GPU. Without it cuDNN tries its kernels out and keeps the fastest, since all batches are of one shape.
    """
    torch.backends.cuda.matmul.allow_tf32 = tf32
    torch.backends.cudnn.allow_tf32 = tf32
    torch.backends.cudnn.benchmark = device.type == "cuda" and not deterministic
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)
