"""`python -m train export`: a run's backbone under the names another library uses.

Seconds: the newest checkpoint is read, its backbone renamed, and the result loaded into the target's own module before
anything is written. A key that finds no place is the classic way to lose a pre-training, so one such key is an error.
"""

from collections.abc import Callable
from pathlib import Path

import click
import torch
from torch import Tensor

from formats.errors import UserError
from train import backbones
from train.checkpoint import backbone_state, save_file
from train.run import open_run, open_trained

State = dict[str, Tensor]


def to_torchvision(name: str, state: State) -> State:
    """The state for ``torchvision.models.NAME().load_state_dict(state, strict=False)``: all but the classifier's keys.

    Checked by loading it into a fresh model of torchvision's and comparing the feature map of one random image with the
    run's own; raises UserError for a key that is missing, left over or of another shape, and for another map.
    """
    own = backbones.build(name)
    refuse = f"the checkpoint is not of torchvision's {name}"
    try:
        own.module.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(f"{refuse}: {' '.join(str(error).split())[:300]}") from error
    target = backbones.whole_model(name)
    missing, extra = set(target.state_dict()) - own.head - set(state), set(state) - set(target.state_dict())
    if missing or extra:
        raise UserError(f"{refuse}: missing {sorted(missing)[:3]}, left over {sorted(extra)[:3]}")
    target.load_state_dict(state, strict=False)
    image = torch.rand(1, 3, 4 * own.stride, 4 * own.stride, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = own.module.eval()(image)
        found = backbones.cut(name, target).module.eval()(image)
    if not torch.equal(expected, found):
        raise UserError(f"{refuse}: its feature map there differs by up to {(expected - found).abs().max():.3g}")
    return state


TARGETS: dict[str, Callable[[str, State], State]] = {"torchvision": to_torchvision}
"""For each library, the function from a backbone's name and state to that library's checked state."""


@click.command()
@click.option("--run", required=True, help="Folder or URL of the run.")
@click.option("--to", required=True, type=click.Choice(list(TARGETS)), help="Whose names to use.")
@click.option("--out", required=True, type=click.Path(path_type=Path, dir_okay=False), help="File to write.")
def export(run: str, to: str, out: Path) -> None:
    """Write the backbone of the run's newest checkpoint, checked by loading it."""
    _, recipe, content = open_trained(open_run(run))
    state = TARGETS[to](recipe.backbone, backbone_state(content["model"]))
    save_file(out, state)
    size = sum(value.numel() * value.element_size() for value in state.values())
    click.echo(
        f"{out}: {recipe.backbone} after {content['step']} of {recipe.steps} steps, {len(state)} tensors, "
        f"{size / 1e6:.1f} MB, checked against {to}"
    )
