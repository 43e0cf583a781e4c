"""A rehearsal of one micro-batch before a run: does the model compile here, and does its step fit into memory?

On GPUs, between several ranks, and where compiling is asked for: forward and backward of random jigsaws without
any exchange between ranks, so that all of them learn of a failure on any and none waits for one that is gone. Costs a
step, and the compilation that the run needs anyway; the model is left as it was.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from jigsaw_pretrain.errors import UserError
from jigsaw_pretrain.train.engine.distributed import Ranks
from jigsaw_pretrain.train.engine.precision import autocast
from jigsaw_pretrain.train.models.classifier import DenseClassifier, torch_dtype
from jigsaw_pretrain.train.recipe import Recipe

BACKEND = "inductor"
"""Of torch.compile."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that a GPU's or the host's memory is used up."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(
        text in str(error) for text in ("out of memory", "can't allocate memory", "not enough memory")
    )


def rehearsed(model: DenseClassifier, recipe: Recipe, ranks: Ranks, micro_batch: int, compiles: bool) -> nn.Module:
    """The model, compiled where ``compiles`` and that works on every rank; the same parameters and names either way.

    Raises UserError on all ranks where a micro-batch does not fit into the memory of any of them.
    """
    if compiles:
        compiled: nn.Module = torch.compile(model, backend=BACKEND)  # type: ignore[assignment]
        failure = _failure(compiled, model, recipe, micro_batch)
        failures = [text for text in ranks.gathered(_reason(failure)) if text]
        if not failures and not isinstance(failure, UserError):
            _check_memory(model, recipe, ranks, micro_batch, failure)
            return compiled
        ranks.say(f"torch.compile does not work here ({failures[0]}): going on without it")
        torch.compiler.reset()
    _check_memory(model, recipe, ranks, micro_batch, _failure(model, model, recipe, micro_batch))
    return model


def out_of_memory(model: DenseClassifier, recipe: Recipe, micro_batch: int, share: int) -> UserError:
    """What to say when ``micro_batch`` jigsaws do not fit; tries which smaller number does."""
    size = recipe.template_size
    fits = next((n for n in _smaller(micro_batch, share) if _failure(model, model, recipe, n) is None), None)
    lead = f"out of memory with {micro_batch} jigsaws of {size} x {size} pixels at once"
    if fits is None:
        return UserError(f"{lead}, and a single one does not fit either: choose a smaller backbone or template_size")
    statistics = "" if recipe.sync_bn else f"; batch norm's statistics are then of {fits}, unless sync_bn = true"
    return UserError(
        f"{lead}: {fits} fit. Begin the run with --set micro_batch={fits}: {share // fits} micro-batches a step and "
        f"process keep the batch of {recipe.batch} and its learning rates{statistics}"
    )


def _smaller(micro_batch: int, share: int) -> Iterator[int]:
    """Numbers of jigsaws to try: the divisors of a process's share, each at most half of the one before."""
    last = micro_batch
    for count in range(micro_batch // 2, 0, -1):
        if share % count == 0 and 2 * count <= last:
            last = count
            yield count


def _check_memory(
    model: DenseClassifier, recipe: Recipe, ranks: Ranks, micro_batch: int, failure: Exception | None
) -> None:
    def check() -> None:
        if failure is None:
            return
        if is_out_of_memory(failure):
            raise out_of_memory(model, recipe, micro_batch, recipe.batch // ranks.world)
        raise failure

    ranks.together(check)


def _failure(forward: nn.Module, model: DenseClassifier, recipe: Recipe, count: int) -> Exception | None:
    """Why a forward and backward pass of ``count`` jigsaws fails, if it does."""
    with unchanged(model):
        try:
            size, device = recipe.template_size, model.mean.device
            shape = (count, size, size, model.pixels.channels)
            images = torch.randint(0, 256, shape, dtype=torch.uint8, device=device).to(torch_dtype(model.pixels))
            with autocast(recipe.precision, device):
                logits = forward(images)
            torch.stack([one.float().logsumexp(dim=1).mean() for one in logits]).mean().backward()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        except Exception as error:
            # Its traceback holds the frames, they the tensors, and those the memory that the next try needs.
            return error.with_traceback(None)
    return None


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Undo what a pass does to a model in train mode: running statistics and gradients, and torch's random state."""
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    was_training = model.training
    model.train()
    for part in model.modules():
        if isinstance(part, nn.SyncBatchNorm):
            # In train mode it would wait for the other ranks.
            part.eval()
    device = next(model.parameters()).device
    with torch.random.fork_rng([device.index] if device.type == "cuda" else []):
        try:
            yield
        finally:
            model.train(was_training)
            for parameter in model.parameters():
                parameter.grad = None
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)
            if torch.cuda.is_initialized():
                torch.cuda.empty_cache()


def _reason(failure: Exception | None) -> str | None:
    """In a line, why compiling failed; none where it did not or memory was the cause."""
    if failure is None or is_out_of_memory(failure):
        return None
    lines = str(failure).strip().splitlines()
    return f"{type(failure).__name__}: {lines[0][:200] if lines else ''}"
