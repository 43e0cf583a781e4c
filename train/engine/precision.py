"""In which numbers a step is computed: autocast, loss scaling, TF32, and determinism.

bf16 halves the memory of features and is two to four times as fast on GPUs that have it; fp16 needs its loss scaled,
which costs nothing but a step skipped now and then. Weights, gradients' sums, the loss and the receptive fields stay
float32. Prefer fp32 on CPUs, where lower precision is emulated and slow.
"""

import os

import torch

PRECISIONS = ("fp32", "bf16", "fp16")

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """The context of a forward pass; of fp32 it changes nothing."""
    return torch.autocast(device.type, dtype=_DTYPES[precision], enabled=precision != "fp32")


def loss_scaler(precision: str, device: torch.device) -> torch.amp.GradScaler:
    """Scales the loss of fp16 so that small gradients survive; passes all through in any other precision."""
    return torch.amp.GradScaler(device.type, enabled=precision == "fp16")


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
