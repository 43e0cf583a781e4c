"""A batch of jigsaws and where it comes from: what the loader hands to the training loop.

The loop knows these names alone, so it can be driven by any source of batches (a test's list of arrays among them).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from jigsaw_pretrain.formats.pixels import PixelFormat


def torch_dtype(pixels: PixelFormat) -> torch.dtype:
    """The type in which images of that format travel."""
    found = getattr(torch, pixels.dtype)
    assert isinstance(found, torch.dtype)
    return found


@dataclass(frozen=True)
class Batch:
    """One rank's share of global batch ``step``, in lane order.

    images: uint8 [n, size, size, 3], rows of RGB pixels (NHWC), or of the channels and type that the dataset has
    (formats/pixels.py): valid until the next batch but one is drawn.
    labels: int64 [n, 4], the class of each region (formats.jigsaw.REGIONS), the background being class C.
    groups: uint8 [n, 4], the aspect group each region's crop came from (an index into formats.jigsaw.GROUPS).
    replaced: how many of these crops stand in for one that could not be decoded.
    digests: per jigsaw the (identity, pixels) sha256 digests of 32 bytes each, where asked for.
    left_out: name and reason of every shard that the rank's workers go on without.
    """

    step: int
    images: torch.Tensor
    labels: torch.Tensor
    groups: torch.Tensor
    replaced: int = 0
    digests: tuple[tuple[bytes, bytes], ...] | None = None
    left_out: tuple[tuple[str, str], ...] = ()


class BatchSource(Protocol):
    """Batches from a given step on, one after the other."""

    lanes_per_rank: int

    def __iter__(self) -> Iterator[Batch]:
        """The batches of this rank, from the first step asked for."""
        ...

    def leave_out(self, shards: Sequence[str]) -> None:
        """Leave these shards out (by name); call before the first batch is drawn."""
        ...

    def close(self) -> None:
        """Stop the workers."""
        ...
