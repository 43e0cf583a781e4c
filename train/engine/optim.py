"""Parts of an optimizer step: the optimizer, its learning rate's schedule, the EMA of the weights, and the precision.

The schedule is section 4.1's: linear warm-up, then cosine to zero. SGD with momentum is the paper's optimizer; AdamW
keeps two numbers per weight where SGD keeps one, so a checkpoint has three times the weights' bytes instead of twice.
Prefer it for networks that are published with it.

The exponential moving average of weights and buffers is what is exported where a recipe keeps one. It costs one pass
over the weights per step (ResNet-50: 0.1 ms on a GPU) and their size once more in memory and in checkpoints.

bf16 halves the memory of features and is two to four times as fast on GPUs that have it; fp16 needs its loss scaled,
which costs nothing but a step skipped now and then. Weights, gradients' sums, the loss and the receptive fields stay
float32. Prefer fp32 on CPUs, where lower precision is emulated and slow.
"""

import math
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torchvision.ops.misc import FrozenBatchNorm2d

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
    """What a recipe's section ``optim`` says of the optimizer (train/recipe.py)."""

    @property
    def name(self) -> str:
        """One of "sgd", "adamw"."""
        ...

    @property
    def momentum(self) -> float:
        """The momentum of SGD."""
        ...

    @property
    def beta1(self) -> float:
        """A coefficient of AdamW."""
        ...

    @property
    def beta2(self) -> float:
        """A coefficient of AdamW."""
        ...

    @property
    def weight_decay(self) -> float:
        """The weight decay of parameters without a key of their own."""
        ...

    @property
    def norm_decay(self) -> float | None:
        """Weight decay of norm layers."""
        ...

    @property
    def bias_decay(self) -> float | None:
        """Weight decay of what is no layer's weight."""
        ...

    @property
    def layer_decay(self) -> float:
        """Factor of the rate per block of the backbone."""
        ...


NORMS = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm, FrozenBatchNorm2d)
"""Layers that normalise."""

_BLOCK = re.compile(r"(?:[^.]*\.)*?(?:\d+\.)+")


def blocks_of(names: Iterable[str]) -> dict[str, int]:
    """The block of each of a backbone's parameters, counted from 0 in their order.

    A block is what names share up to their first numbers: `layer2.1.conv1.weight` is of `layer2.1`. What comes before
    the first (a stem, tokens) is block 0, what comes after one belongs to it.
    """
    found: dict[str, int] = {}
    seen: list[str] = []
    for name in names:
        match = _BLOCK.match(name)
        if match and match[0] not in seen:
            seen.append(match[0])
        found[name] = len(seen)
    return found


def parameter_groups(
    model: nn.Module,
    settings: OptimSettings,
    own_name: Callable[[str], str | None],
    backbone_rate: float = 1.0,
) -> list[dict[str, Any]]:
    """The groups of what learns in a model, for torch's optimizers; one alone where nothing sets parameters apart.

    Args:
        model: the model.
        settings: the section ``optim`` of the recipe.
        own_name: a parameter's name within the backbone, from that in the model; None for those of other parts.
        backbone_rate: factor of the rate of the whole backbone.

    Returns:
        Groups with their ``weight_decay``, and ``lr_scale`` where it is not 1: the factor of the schedule's rate, which
        is backbone_rate * layer_decay ^ (blocks - block) for a block of the backbone, so that the last one has
        backbone_rate * layer_decay.
    """
    normalising = {f"{name}." for name, part in model.named_modules() if isinstance(part, NORMS)}
    blocks = blocks_of(own for name, _ in model.named_parameters() if (own := own_name(name)) is not None)
    most = max(blocks.values(), default=0) + 1
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        owner, _, last = name.rpartition(".")
        decay: float | None = None
        if f"{owner}." in normalising:
            decay = settings.norm_decay
        elif last != "weight":
            decay = settings.bias_decay
        decay = settings.weight_decay if decay is None else decay
        own = own_name(name)
        scale = 1.0 if own is None else backbone_rate * settings.layer_decay ** (most - blocks[own])
        group = groups.setdefault((decay, scale), {"params": [], "weight_decay": decay})
        if scale != 1:
            group["lr_scale"] = scale
        group["params"].append(parameter)
    return list(groups.values())


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group the schedule's rate, times its own factor."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_scale", 1.0)


def make_optimizer(
    groups: list[dict[str, Any]], settings: OptimSettings, *, lr: float, fused: bool | None = None
) -> torch.optim.Optimizer:
    """The optimizer of pre-training and of detectors: torch's SGD, the paper's, or its AdamW.

    Args:
        groups: of parameter_groups.
        settings: the section ``optim`` of the recipe.
        lr: learning rate; both trainings set it anew at every step (set_rate).
        fused: one kernel per step, on GPUs; None leaves it to torch.
    """
    decay = settings.weight_decay
    if settings.name == "adamw":
        betas = (settings.beta1, settings.beta2)
        return torch.optim.AdamW(groups, lr=lr, betas=betas, weight_decay=decay, fused=fused)
    return torch.optim.SGD(groups, lr=lr, momentum=settings.momentum, weight_decay=decay, fused=fused)


def begin_momentum(optimizer: torch.optim.Optimizer) -> None:
    """Give SGD's parameters a momentum of zero, which makes the first step what it is without one.

    Where the loss is scaled: a first step that the scaler skips leaves the fused kernel's own buffer unwritten, and the
    next step would go on with whatever was in that memory.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"] if group.get("momentum") else ():
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


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
def arithmetic(
    device: torch.device, *, tf32: bool, deterministic: bool = False, one_shape: bool = True
) -> Iterator[None]:
    """``set_arithmetic`` for a while: the switches are afterwards as they were."""
    matmul, cudnn, name = torch.backends.cuda.matmul, torch.backends.cudnn, "CUBLAS_WORKSPACE_CONFIG"
    before = matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark, os.environ.get(name)
    was_deterministic = torch.are_deterministic_algorithms_enabled()
    set_arithmetic(device, tf32=tf32, deterministic=deterministic, one_shape=one_shape)
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark, workspace = before
        torch.use_deterministic_algorithms(was_deterministic)
        if workspace is None:
            os.environ.pop(name, None)


@contextmanager
def true_float32() -> Iterator[None]:
    """Products of float32 are not rounded to TF32 inside: for what is measured, such as receptive fields."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = False
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


def set_arithmetic(device: torch.device, *, tf32: bool, deterministic: bool = False, one_shape: bool = True) -> None:
    """Set torch's global arithmetic switches for this process; call before the first kernel runs.

    deterministic: every operation gives the same bits on the same machine, or fails where it cannot; up to a third
    slower on a GPU. one_shape: all batches are of one shape, so that cuDNN may try its kernels out once and keep the
    fastest; unless it is to be deterministic.
    """
    torch.backends.cuda.matmul.allow_tf32 = tf32
    torch.backends.cudnn.allow_tf32 = tf32
    torch.backends.cudnn.benchmark = device.type == "cuda" and one_shape and not deterministic
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)
