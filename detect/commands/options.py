"""What several commands of the detection stage share: choices of an option, and what is looked at at once."""

from pathlib import Path

from jigsaw_pretrain.config import choices
from jigsaw_pretrain.errors import UserError
from jigsaw_pretrain.train.recipe import Device

DEVICES = choices(Device)


def check_weights(file: str, option: str) -> None:
    """Raise UserError where no weights file and no run's folder of that name is there; a URL is looked at later."""
    if "://" not in file and not Path(file).exists():
        raise UserError(f"{option} {file} is missing: name a weights file, or the folder of a run")
