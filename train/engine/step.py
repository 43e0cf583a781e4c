"""One optimizer step: micro-batches forward and backward, their gradients summed, clipped and applied.

Gradients are accumulated over a process's share of the batch in micro-batches of the recipe's size, and exchanged
between ranks once, with the last of them. A sum over micro-batches equals the whole batch's gradient to rounding where
nothing depends on the batch's statistics. With a neck the loss is the mean of its levels' losses: all levels count
alike, however many positions they have. All is a function of the state, the images and (seed, step, rank). Costs about
0.2 ms of host time per step beside the model's own. Prefer a larger micro-batch wherever it fits.

Machine options may change the last bits of a result, never which experiment it is. They are command-line options, free
to differ between two parts of one run; whatever changes the result is a key of the recipe. Compiling takes a minute or
two at the start and saves a tenth to a third of each step on a GPU. Determinism costs up to a third of a GPU's speed.

A dry run of one micro-batch comes before the first step on GPUs, between several ranks, and where compiling is asked
for: does the model compile here (if not it is left out, and said), and does a step fit into memory? It goes forward and
backward on random jigsaws without any exchange between ranks, so that all of them learn of a failure on any and none
waits for one that is gone. It costs a step, and the compilation that the run needs anyway; the model is left as it was.
"""

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from jigsaw_pretrain.config import check_fields
from jigsaw_pretrain.errors import UserError
from jigsaw_pretrain.rng import derive_key
from jigsaw_pretrain.train import losses
from jigsaw_pretrain.train.data.batch import torch_dtype
from jigsaw_pretrain.train.engine.distributed import Ranks
from jigsaw_pretrain.train.engine.optim import autocast, learning_rate, set_rate
from jigsaw_pretrain.train.engine.state import State
from jigsaw_pretrain.train.models.classifier import DenseClassifier
from jigsaw_pretrain.train.recipe import MICRO_BATCH, Compile, Recipe

BACKEND: Any = "inductor"
"""The backend of torch.compile."""


@dataclass(frozen=True)
class MachineOptions:
    """How a run uses its machine.

    compile: a recipe.Compile. deterministic: the same bits each time, or an error.
    """

    compile: Compile = "auto"
    deterministic: bool = False

    def __post_init__(self) -> None:
        """Refuse another word."""
        check_fields(self)

    def compiles(self, device: torch.device) -> bool:
        """Whether the model is to be compiled on that device."""
        return self.compile == "on" or (self.compile == "auto" and device.type == "cuda")


def micro_batch_of(recipe: Recipe, world: int) -> int:
    """Jigsaws that each of ``world`` processes takes at once; UserError where those asked for do not divide its share.

    Where the recipe does not say, it is the divisor of the share that is nearest to the paper's MICRO_BATCH, as a
    ratio, so that batch statistics cover nearly as many jigsaws as the paper's, whatever the batch and the number of
    processes. The largest divisor not above it would be 2 for a share of 134.
    """
    share = recipe.data.batch // world
    divisors = [n for n in range(1, share + 1) if share % n == 0]
    if recipe.optim.micro_batch is None:
        return min(divisors, key=lambda n: max(n / MICRO_BATCH, MICRO_BATCH / n))
    chosen = min(recipe.optim.micro_batch, share)
    if share % chosen:
        raise UserError(
            f"optim.micro_batch = {chosen} does not divide the {share} jigsaws of each of {world} processes: "
            f"choose one of {divisors}, or leave it out"
        )
    return chosen


@dataclass(frozen=True)
class StepOutput:
    """What a step found before it was taken, on the device.

    losses: the mean loss over the images of each map classified, [maps]; what is descended is their mean. predictions:
    the predicted class of each region, int64 [n, 4]. lr: the learning rate. skipped: whether the loss's scaler left the
    step out, since a gradient was not finite (bool []); None where nothing is scaled.
    """

    losses: Tensor
    predictions: Tensor
    lr: float
    skipped: Tensor | None = None


class Stepper:
    """Runs optimizer steps. Create one per process: it compiles the model and joins the ranks' gradients.

    Raises UserError where a micro-batch does not divide the share or does not fit into memory.
    """

    def __init__(
        self, recipe: Recipe, state: State, ranks: Ranks, region_maps: Sequence[Tensor], options: MachineOptions
    ) -> None:
        self._recipe, self._state, self._ranks, self._region_maps = recipe, state, ranks, region_maps
        self.micro_batch = micro_batch_of(recipe, ranks.world)
        compiles = options.compiles(ranks.device)
        if compiles and recipe.model.sync_bn and ranks.world > 1:
            ranks.log_rank_zero("model.sync_bn: torch.compile cannot trace its exchange; going on without compiling")
            compiles = False
        # Alone on a CPU the first step itself tells.
        if compiles or ranks.device.type == "cuda" or ranks.world > 1:
            self._parallel = compile_and_dry_run(state.model, recipe, ranks, self.micro_batch, compiles)
        else:
            self._parallel = state.model
        self._parallel.train()

    def take(self, images: Tensor, labels: Tensor) -> StepOutput:
        """One step on this rank's images and labels, on its device; the state's step is left to the caller.

        Raises UserError where memory runs out.
        """
        rate = self._set_rate()
        # Stochastic depth and dropout draw from here: keyed by step and rank, not by what ran before.
        torch.manual_seed(int(derive_key(self._recipe.data.seed, self._state.step, self._ranks.rank)[0]))
        try:
            found, predictions = self._gradients(images, labels)
            skipped = self._apply()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            failure = error.with_traceback(None)
        else:
            return StepOutput(found, predictions, rate, skipped)
        # Outside of the handler, so that what the failed step held is free for the tries.
        del failure
        refusal = out_of_memory(self._state.model, self._recipe, self.micro_batch, len(images))
        self._ranks.log_alone(refusal.message)
        raise refusal

    def _gradients(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        recipe, state, ranks = self._recipe, self._state, self._ranks
        state.optimizer.zero_grad(set_to_none=True)
        starts = range(0, len(images), self.micro_batch)
        total, predictions = torch.zeros(len(self._region_maps), device=images.device), []
        for start in starts:
            part, own = images[start : start + self.micro_batch], labels[start : start + self.micro_batch]
            waits = isinstance(self._parallel, DistributedDataParallel) and start != starts[-1]
            with self._parallel.no_sync() if waits else nullcontext():  # type: ignore[operator]
                with autocast(recipe.run.precision, ranks.device):
                    logits = self._parallel(part)
                logits = [one.float() for one in logits]
                found = torch.stack([self._loss(level, one, own) for level, one in enumerate(logits)])
                # DDP averages over ranks; shares of unequal size would otherwise count alike.
                state.scaler.scale(found.mean() * (len(part) * ranks.world / recipe.data.batch)).backward()
            total += found.detach() * (len(part) / len(images))
            with torch.no_grad():
                predictions.append(losses.predictions([one.detach() for one in logits], self._region_maps))
        return total, torch.cat(predictions)

    def _apply(self) -> Tensor | None:
        state = self._state
        scales = state.scaler.is_enabled()
        scale = state.scaler._get_scale_async() if scales else None
        before = None if scale is None else scale.clone()
        if self._recipe.optim.clip_norm > 0:
            state.scaler.unscale_(state.optimizer)
            torch.nn.utils.clip_grad_norm_(state.model.parameters(), self._recipe.optim.clip_norm)
        state.scaler.step(state.optimizer)
        state.scaler.update()
        if state.ema is not None:
            state.ema.update(state.step)
        # It lowers its scale where it has skipped a step, and then only; asking for the number would wait for a GPU.
        after = state.scaler._get_scale_async() if scales else None
        return None if before is None or after is None else after < before

    def _loss(self, level: int, logits: Tensor, labels: Tensor) -> Tensor:
        """The recipe's loss of one map, a scalar: the mean over these images."""
        region_map, options = self._region_maps[level], self._recipe.loss
        if options.strategy == "block-wise":
            return losses.block_wise_loss(logits, labels, region_map, options.label_smoothing)
        if options.strategy == "global":
            return losses.global_loss(logits, labels, region_map, options.label_smoothing)
        weights = self._state.tables[level].weights
        return losses.erf_adaptive_loss(logits, labels, weights, region_map, options.label_smoothing)

    def _set_rate(self) -> float:
        """Set and return this step's learning rate."""
        recipe = self._recipe
        start, peak = recipe.rates
        rate = learning_rate(
            self._state.step, steps=recipe.optim.steps, warmup_steps=recipe.optim.warmup_steps, start=start, peak=peak
        )
        set_rate(self._state.optimizer, rate)
        return rate


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that a GPU's or the host's memory is used up."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(
        text in str(error) for text in ("out of memory", "can't allocate memory", "not enough memory")
    )


def compile_and_dry_run(
    model: DenseClassifier, recipe: Recipe, ranks: Ranks, micro_batch: int, compiles: bool
) -> nn.Module:
    """The model as it is trained: joined to other ranks' models, compiled where ``compiles`` and all ranks can.

    It is compiled as it lies in DistributedDataParallel, so that the backward pass is cut where a bucket of gradients
    is full, and exchanging them overlaps with the rest of it; compiled before, all exchange would come after it.
    Parameters and names are the model's own. Raises UserError on all ranks where a micro-batch does not fit into the
    memory of any of them.
    """
    if compiles:
        compiled = ranks.joined(torch.compile(model, backend=BACKEND))  # type: ignore[arg-type]
        failure = _failure(compiled, model, recipe, micro_batch)
        failures = [text for text in ranks.all_gather(_reason(failure)) if text]
        if not failures and not isinstance(failure, UserError):
            _check_memory(model, recipe, ranks, micro_batch, failure)
            return compiled
        ranks.log_rank_zero(f"torch.compile does not work here ({failures[0]}): going on without it")
        # It would go on collecting the parameters' gradients for as long as it lives.
        del compiled
        gc.collect()
        torch.compiler.reset()
    joined = ranks.joined(model)
    _check_memory(model, recipe, ranks, micro_batch, _failure(joined, model, recipe, micro_batch))
    return joined


def out_of_memory(model: DenseClassifier, recipe: Recipe, micro_batch: int, share: int) -> UserError:
    """What to say when ``micro_batch`` jigsaws do not fit; tries which smaller number does."""
    size = recipe.data.template_size
    fits = next((n for n in _smaller(micro_batch, share) if _failure(model, model, recipe, n) is None), None)
    lead = f"out of memory with {micro_batch} jigsaws of {size} x {size} pixels at once"
    if fits is None:
        return UserError(
            f"{lead}, and a single one does not fit either: choose a smaller model.backbone or data.template_size"
        )
    statistics = (
        "" if recipe.model.sync_bn else f"; batch norm's statistics are then of {fits}, unless model.sync_bn = true"
    )
    return UserError(
        f"{lead}: {fits} fit. Begin the run with --set optim.micro_batch={fits}: {share // fits} micro-batches per "
        f"step and process keep the batch of {recipe.data.batch} and its learning rates{statistics}"
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
            raise out_of_memory(model, recipe, micro_batch, recipe.data.batch // ranks.world)
        raise failure

    ranks.run_on_all(check)


def _failure(forward: nn.Module, model: DenseClassifier, recipe: Recipe, count: int) -> Exception | None:
    """Why a forward and backward pass of ``count`` jigsaws fails, if it does."""
    # No gradients are exchanged, so a rank that fails here leaves none waiting.
    alone = forward.no_sync() if isinstance(forward, DistributedDataParallel) else nullcontext()
    with unchanged(model), alone:
        try:
            size, device = recipe.data.template_size, model.mean.device
            shape = (count, size, size, model.pixels.channels)
            images = torch.randint(0, 256, shape, dtype=torch.uint8, device=device).to(torch_dtype(model.pixels))
            with autocast(recipe.run.precision, device):
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
    """Why compiling failed, in one line; none where it did not or memory was the cause."""
    if failure is None or is_out_of_memory(failure):
        return None
    lines = str(failure).strip().splitlines()
    return f"{type(failure).__name__}: {lines[0][:200] if lines else ''}"
