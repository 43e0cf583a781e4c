"""Where an output's annotations and images were, remembered for this user on this machine, never in the output.

``retry-skipped --out OUT`` and ``verify --out OUT --repair`` must read images again, and OUT holds no paths. So the
commands that cut remember them in the user's state folder ($XDG_STATE_HOME, else ~/.local/state): a small file each.
URLs with a password or a signature in them are not written down; elsewhere, give --annotations and --images.
"""

import contextlib
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import msgspec

from jigsaw_pretrain.errors import UserError
from jigsaw_pretrain.storage import publish_locally, redacted


@dataclass(frozen=True)
class Inputs:
    """Annotations and images of an output, as paths or URLs that hold from any folder."""

    annotations: str
    images: str


def remember(out: str, inputs: Inputs) -> None:
    """Keep the inputs of ``out``, where that can be done."""
    kept = Inputs(_anywhere(inputs.annotations), _anywhere(inputs.images))
    if any(redacted(text) != text for text in (kept.annotations, kept.images)):
        return
    with contextlib.suppress(OSError, RuntimeError):
        publish_locally(_place(out), msgspec.json.encode(kept))


def recall(out: str, annotations: str | None, images: str | None) -> Inputs:
    """The inputs of ``out``: as given, else as remembered. Raises UserError where they are neither."""
    found: Inputs | None = None
    with contextlib.suppress(OSError, RuntimeError, msgspec.MsgspecError):
        found = msgspec.json.decode(_place(out).read_bytes(), type=Inputs)
    annotations = annotations or (found.annotations if found else None)
    images = images or (found.images if found else None)
    if annotations is None or images is None:
        raise UserError(
            f"{redacted(out)} does not hold where its annotations and images are, and this machine does not remember: "
            "give --annotations and --images."
        )
    return Inputs(annotations, images)


def _place(out: str) -> Path:
    state = os.environ.get("XDG_STATE_HOME")
    folder = Path(state) if state else Path.home() / ".local" / "state"
    return folder / "jigsaw-prep" / f"{hashlib.sha256(_anywhere(out).encode()).hexdigest()[:32]}.json"


def _anywhere(url: str) -> str:
    return url if "://" in url else os.path.realpath(url)
