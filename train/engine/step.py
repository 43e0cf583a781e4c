"""One optimizer step: micro-batches forward and backward, their gradients summed, clipped and applied.

With a neck the loss is the mean of its levels' losses: all levels count alike, however many positions they have.

Gradients are accumulated over a process's share of the batch in micro-batches of the recipe's size, and exchanged
between ranks once, with the last of them. A sum over micro-batches equals the whole batch's gradient to rounding where
nothing depends on the batch's statistics. All is a function of the state, the images and (seed, step, rank). Beside the
model's own time about 0.2 ms of host time a step. Prefer a larger micro-batch wherever it fits.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from jigsaw_pretrain.errors import UserError
from jigsaw_pretrain.rng import derive_key
from jigsaw_pretrain.train import losses
from jigsaw_pretrain.train.engine.distributed import Ranks
from jigsaw_pretrain.train.engine.machine import Machine
from jigsaw_pretrain.train.engine.optim import learning_rate
from jigsaw_pretrain.train.engine.precision import autocast
from jigsaw_pretrain.train.engine.rehearsal import is_out_of_memory, out_of_memory, rehearsed
from jigsaw_pretrain.train.engine.state import State
from jigsaw_pretrain.train.recipe import Recipe


def micro_batch_of(recipe: Recipe, world: int) -> int:
    """Jigsaws that each of ``world`` processes takes at once; UserError where they do not divide its share."""
    share = recipe.batch // world
    chosen = min(recipe.micro_batch or share, share)
    if share % chosen:
        near = [n for n in range(1, share + 1) if share % n == 0]
        raise UserError(
            f"micro_batch = {chosen} does not divide the {share} jigsaws of each of {world} processes: "
            f"choose one of {near}"
        )
    return chosen


@dataclass(frozen=True)
class Taken:
    """What a step found before it was taken, on the device.

    losses: the mean loss over the images of each map classified, [maps]; what is descended is their mean. guesses: the
    predicted class of each region, int64 [n, 4]. rate: the learning rate.
    """

    losses: Tensor
    guesses: Tensor
    rate: float


class Stepper:
    """Takes a state's model through steps. Make one a process: it compiles the model and joins the ranks' gradients.

    Raises UserError where a micro-batch does not divide the share or does not fit into memory.
    """

    def __init__(
        self, recipe: Recipe, state: State, ranks: Ranks, region_maps: Sequence[Tensor], machine: Machine
    ) -> None:
        self._recipe, self._state, self._ranks, self._region_maps = recipe, state, ranks, region_maps
        self.micro_batch = micro_batch_of(recipe, ranks.world)
        self._parallel: nn.Module = state.model
        compiles = machine.compiles(ranks.device)
        # Alone on a CPU the first step itself tells.
        if compiles or ranks.device.type == "cuda" or ranks.world > 1:
            self._parallel = rehearsed(state.model, recipe, ranks, self.micro_batch, compiles)
        if ranks.world > 1:
            devices = [ranks.device] if ranks.device.type == "cuda" else None
            # Running statistics are rank 0's wherever they count (ERF, checkpoint), so they need no broadcast a step.
            self._parallel = DistributedDataParallel(self._parallel, device_ids=devices, broadcast_buffers=False)
        self._parallel.train()

    def take(self, images: Tensor, labels: Tensor) -> Taken:
        """One step on this rank's images and labels, on its device; the state's step is left to the caller.

        Raises UserError where memory runs out.
        """
        rate = self._set_rate()
        # Stochastic depth and dropout draw from here: keyed by step and rank, not by what ran before.
        torch.manual_seed(int(derive_key(self._recipe.seed, self._state.step, self._ranks.rank)[0]))
        try:
            found, guesses = self._gradients(images, labels)
            self._apply()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            failure = error.with_traceback(None)
        else:
            return Taken(found, guesses, rate)
        # Outside of the handler, so that what the failed step held is free for the tries.
        del failure
        refusal = out_of_memory(self._state.model, self._recipe, self.micro_batch, len(images))
        self._ranks.alone(refusal.format_message())
        raise refusal

    def _gradients(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        recipe, state, ranks = self._recipe, self._state, self._ranks
        state.optimizer.zero_grad(set_to_none=True)
        starts = range(0, len(images), self.micro_batch)
        total, guesses = torch.zeros(len(self._region_maps), device=images.device), []
        for start in starts:
            part, own = images[start : start + self.micro_batch], labels[start : start + self.micro_batch]
            waits = isinstance(self._parallel, DistributedDataParallel) and start != starts[-1]
            with self._parallel.no_sync() if waits else nullcontext():  # type: ignore[operator]
                with autocast(recipe.precision, ranks.device):
                    logits = self._parallel(part)
                logits = [one.float() for one in logits]
                found = torch.stack([self._loss(level, one, own) for level, one in enumerate(logits)])
                # DDP averages over ranks; shares of unequal size would otherwise count alike.
                state.scaler.scale(found.mean() * (len(part) * ranks.world / recipe.batch)).backward()
            total += found.detach() * (len(part) / len(images))
            with torch.no_grad():
                guesses.append(losses.predictions([one.detach() for one in logits], self._region_maps))
        return total, torch.cat(guesses)

    def _apply(self) -> None:
        state = self._state
        if self._recipe.clip_norm > 0:
            state.scaler.unscale_(state.optimizer)
            torch.nn.utils.clip_grad_norm_(state.model.parameters(), self._recipe.clip_norm)
        state.scaler.step(state.optimizer)
        state.scaler.update()
        if state.average is not None:
            state.average.update(state.step)

    def _loss(self, level: int, logits: Tensor, labels: Tensor) -> Tensor:
        """The recipe's loss of one map, a scalar: the mean over these images."""
        region_map = self._region_maps[level]
        if self._recipe.strategy == "block-wise":
            return losses.block_wise_loss(logits, labels, region_map)
        if self._recipe.strategy == "global":
            return losses.global_loss(logits, labels, region_map)
        return losses.erf_adaptive_loss(logits, labels, self._state.tables[level].weights, region_map)

    def _set_rate(self) -> float:
        """Set and return this step's learning rate."""
        recipe = self._recipe
        start, peak = recipe.rates
        rate = learning_rate(
            self._state.step, steps=recipe.steps, warmup_steps=recipe.warmup_steps, start=start, peak=peak
        )
        for group in self._state.optimizer.param_groups:
            group["lr"] = rate
        return rate
