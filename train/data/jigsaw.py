"""Assembles jigsaws: four crops decoded, resized, flipped, cut or padded into one image (section 3.2).

A pure function of (dataset, options, lane, position). On COCO crops, decoding a jigsaw's four crops whole being 1, a
jigsaw of 224 x 224 takes 1.28. See data/loader.py for batches.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from jigsaw_pretrain.errors import UserError
from jigsaw_pretrain.formats.dataset.dataset import Dataset
from jigsaw_pretrain.formats.jigsaw import GROUPS, REGIONS
from jigsaw_pretrain.train.data.augment import (
    Draws,
    Windows,
    draw,
    jitter_colours,
    place_windows,
    resample,
    resample_channels,
    with_drawn_context,
)
from jigsaw_pretrain.train.data.reader import SOURCE, CropArray, CropReader, shard_files
from jigsaw_pretrain.train.data.remote import ReadOptions
from jigsaw_pretrain.train.data.sampler import CropSampler, slots_of, sort_square_crops
from jigsaw_pretrain.train.recipe import DataOptions

Pixels = npt.NDArray[Any]

EDGES = ("left", "top", "width", "height")


@dataclass(frozen=True)
class WorkerBatch:
    """What a worker adds to the pixels of its jigsaws, in its lanes' order and each lane's order of positions.

    labels: int64 [n, 4] and groups: uint8 [n, 4] by region. replaced: crops that stand in for undecodable ones.
    digests: (identity, pixels) of each jigsaw, 32 bytes each, where asked for. left_out: name and reason of every shard
    that the worker goes on without; crops that stand in for theirs are not counted as replaced.
    """

    labels: npt.NDArray[np.int64]
    groups: npt.NDArray[np.uint8]
    replaced: int
    digests: tuple[tuple[bytes, bytes], ...] | None
    left_out: tuple[tuple[str, str], ...] = ()


@contextmanager
def _one_thread() -> Iterator[None]:
    """Windows are too small to share out, and threads would compete with the other workers' for the cores."""
    before = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        yield
    finally:
        if before != 1:
            cv2.setNumThreads(before)


class Assembler:
    """Assembles the jigsaws of some lanes of a dataset; build it in the process that uses it.

    left_out: names of shards to do without from the start. Raises UserError where crops.parquet cannot be read.
    """

    def __init__(
        self,
        dataset: Dataset,
        options: DataOptions,
        lanes: Sequence[int],
        *,
        with_digests: bool = False,
        access: ReadOptions | None = None,
        left_out: Iterable[str] = (),
    ) -> None:
        self._template, self._options, self._lanes = options.template, options, list(lanes)
        self._dataset, self._begun = dataset, False
        access = access or ReadOptions()
        slots = slots_of(dataset, options)
        self._reader = CropReader(
            dataset,
            shard_files(dataset, access),
            capacity=len(slots.sources) * len(self._lanes) + len(GROUPS),
            with_keys=with_digests,
            skip_bad=access.on_bad_shard == "skip",
            left_out=left_out,
        )
        self._sampler = CropSampler(dataset, slots, options, self._lanes, self._reader)
        self._with_digests = with_digests

    def step(self, step: int, out: Sequence[Pixels] | Pixels) -> WorkerBatch:
        """Write the lanes' jigsaws of batch ``step`` over all of ``out``: lanes * k of [size, size, channels].

        Raises UserError where a group has no crop left that can be read.
        """
        count = self._options.chunk
        if not self._begun:
            self._sampler.begin(step * count)
            self._begun = True
        lanes = np.repeat(np.array(self._lanes, dtype=np.int64), count)
        positions = np.tile(np.arange(step * count, (step + 1) * count, dtype=np.int64), len(self._lanes))
        channels = self._dataset.pixels.channels
        draws = draw(self._options, lanes, positions, self._reader.context is not None, channels)
        drawn = np.empty((len(lanes), len(REGIONS)), dtype=self._reader.dtype)
        for nth, lane in enumerate(self._lanes):
            own = slice(nth * count, (nth + 1) * count)
            drawn[own] = self._sampler.chunk(lane, step * count, count, draws.substitute[own])
        crops, windows = self._arrange(drawn, draws)
        with _one_thread():
            broken = self._render(range(len(drawn)), crops, draws, windows, out)
            replaced = sum(
                self._replace_undecodable(int(lanes[nth]), int(positions[nth]), drawn[nth]) for nth in broken
            )
            if broken:
                crops, windows = self._arrange(drawn, draws)
                self._render(broken, crops, draws, windows, out)
        return WorkerBatch(
            labels=crops["label"].astype(np.int64),
            groups=crops["group"].astype(np.uint8),
            replaced=replaced,
            digests=self._digests(crops, draws, windows, out) if self._with_digests else None,
            left_out=tuple((self._dataset.shards[nth].name, why) for nth, why in self._reader.left_out.items()),
        )

    def close(self) -> None:
        """Release the shards and stop fetching ahead."""
        self._reader.close()

    def _arrange(self, drawn: CropArray, draws: Draws) -> tuple[CropArray, Windows]:
        """Crops by region, CROP [n, 4], and where they land; the order is the boxes', whatever context is drawn."""
        crops = sort_square_crops(drawn)
        if self._reader.context is not None and draws.shifts is not None:
            crops = with_drawn_context(crops, draws.shifts, self._reader.context)
        width, height = crops["width"].astype(np.int64), crops["height"].astype(np.int64)
        options = self._options
        return crops, place_windows(width, height, draws, self._template, options.fit, options.pad)

    def _render(
        self, which: Sequence[int], crops: CropArray, draws: Draws, windows: Windows, out: Sequence[Pixels] | Pixels
    ) -> list[int]:
        """Write some of the jigsaws; those with a crop that cannot be read are returned, half done."""
        broken: list[int] = []
        decode, regions = self._reader.decode, self._template.regions
        land = resample if self._dataset.pixels.channels == 3 else resample_channels
        sources, places = crops[SOURCE].tolist(), windows.table().tolist()
        for nth in which:
            jigsaw = out[nth]
            jitters = (None,) * len(regions) if draws.jitter is None else draws.jitter[nth]
            for region, source, place, jitter in zip(regions, sources[nth], places[nth], jitters, strict=True):
                pixels = decode(*source)
                if pixels is None:
                    broken.append(nth)
                    break
                scaled_x, scaled_y, flip, from_x, from_y, to_x, to_y, width, height, smooth = place
                if width < region.width or height < region.height:
                    jigsaw[region.top : region.top + region.height, region.left : region.left + region.width] = 0
                window = jigsaw[to_y : to_y + height, to_x : to_x + width]
                land(pixels, (scaled_x, scaled_y), bool(flip), (from_x, from_y), bool(smooth), window)
                if jitter is not None:
                    jitter_colours(window, jitter)
        return broken

    def _replace_undecodable(self, lane: int, position: int, drawn: CropArray) -> int:
        """Replace the unreadable of a jigsaw's crops, CROP [4] by slot, in place; how many could not be decoded."""
        replaced = 0
        for slot in range(len(REGIONS)):
            if self._readable(drawn[slot]):
                continue
            for other in self._sampler.replacements(lane, position, slot, drawn[slot]):
                if self._readable(other):
                    replaced += int(drawn[slot]["shard"]) not in self._reader.left_out
                    drawn[slot] = other
                    break
            else:
                raise UserError(
                    f"group {GROUPS[int(drawn[slot]['group'])]} has no crop that can be decoded: its shards are "
                    "damaged. Run `jigsaw-prep verify --repair`, or prep the dataset again"
                )
        return replaced

    def _readable(self, crop: CropArray) -> bool:
        return self._reader.decode(*crop[SOURCE].tolist()) is not None

    def _digests(
        self, crops: CropArray, draws: Draws, windows: Windows, out: Sequence[Pixels] | Pixels
    ) -> tuple[tuple[bytes, bytes], ...]:
        """Identity and pixels of each jigsaw.

        The identity hashes, by region, the key's length and UTF-8 bytes, then as little-endian 64-bit words the label,
        the region's left, top, width and height, the resize ratio (a float) and the fields of Windows in their order;
        then, where the trainer draws the context, the crop's left, top, width and height in its image; last, where
        colours are changed, the factors (floats).
        """
        regions = np.array([(r.left, r.top, r.width, r.height) for r in self._template.regions], dtype=np.int64)
        plain = np.concatenate(
            [
                crops["label"].astype(np.int64)[..., None],
                np.broadcast_to(regions, (len(crops), *regions.shape)),
                draws.ratio.view(np.int64)[..., None],
                windows.table(),
                *(crops[name].astype(np.int64)[..., None] for name in EDGES if self._reader.context is not None),
                *(() if draws.jitter is None else (draws.jitter.view(np.int64),)),
            ],
            axis=-1,
        ).astype("<i8")
        found = []
        for nth, jigsaw in enumerate(crops):
            identity = hashlib.sha256()
            for key, numbers in zip(self._reader.keys(jigsaw), plain[nth], strict=True):
                name = key.encode()
                identity.update(len(name).to_bytes(8, "little") + name + numbers.tobytes())
            found.append((identity.digest(), hashlib.sha256(np.ascontiguousarray(out[nth]).data).digest()))
        return tuple(found)
