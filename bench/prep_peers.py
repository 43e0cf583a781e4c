"""What a user would write in place of prep: Pillow over each image, Pillow on several cores, a sample at a time.

The Pillow script is what a competent user writes: each image is opened once, its crops are encoded in memory and
written into one tar. With several processes an image is a task, in chunks, and the parent writes the tar. A sample at
a time is how img2dataset works (it resizes and encodes single samples by OpenCV): a crop is a sample, and each sample
reads and decodes its own file.
"""

import io
import tarfile
from collections.abc import Iterable, Sequence
from multiprocessing.pool import Pool
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from jigsaw_pretrain.prep.parts import PartTask

Work = tuple[str, list[list[int]]]
"""A file, and its boxes: left, top, right, bottom."""


def work_of(task: PartTask) -> list[Work]:
    """The images of a task with their boxes."""
    found: list[Work] = [(str(Path(task.source) / name), []) for name in task.images.files]
    for image, box in zip(task.crops.image.tolist(), task.crops.boxes.tolist(), strict=True):
        found[image][1].append(box)
    return found


def pillow_image(work: Work) -> list[bytes]:
    """The JPEGs of one image at q95 4:2:0."""
    jpegs = []
    with Image.open(work[0]) as opened:
        image = opened.convert("RGB")
        for left, top, right, bottom in work[1]:
            sink = io.BytesIO()
            image.crop((left, top, right, bottom)).save(sink, "JPEG", quality=95, subsampling=2)
            jpegs.append(sink.getvalue())
    return jpegs


def pillow_sample(file: str, box: Sequence[int]) -> bytes:
    """One crop by Pillow, its file opened for it alone."""
    return pillow_image((file, [list(box)]))[0]


def opencv_sample(file: str, box: Sequence[int]) -> bytes:
    """One crop by OpenCV, its file read for it alone, as img2dataset does with its samples."""
    flags = cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
    image = cv2.imdecode(np.frombuffer(Path(file).read_bytes(), dtype=np.uint8), flags)
    assert image is not None
    options = [cv2.IMWRITE_JPEG_QUALITY, 95, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_420]
    return cv2.imencode(".jpg", image[box[1] : box[3], box[0] : box[2]], options)[1].tobytes()


def write_tar(file: Path, jpegs: Iterable[bytes]) -> None:
    """A tar of the JPEGs, by tarfile."""
    with tarfile.open(file, mode="w:") as tar:
        for number, jpeg in enumerate(jpegs):
            member = tarfile.TarInfo(f"{number:08d}.jpg")
            member.size = len(jpeg)
            tar.addfile(member, io.BytesIO(jpeg))


def pillow_pool(pool: Pool, work: Sequence[Work], file: Path) -> None:
    """The Pillow script with multiprocessing."""
    write_tar(file, (jpeg for jpegs in pool.imap_unordered(pillow_image, work, chunksize=8) for jpeg in jpegs))
