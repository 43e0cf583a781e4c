"""The arms of a comparison: what each changes in pre-training and in the detector, and nothing else.

Every arm is trained with the same images, seeds and sweep of the learning rate (on a seed that is not reported); what
else differs, an arm says itself. The arms here are the paper's; further ones are files, such as those in recipes/arms/:

    [half]                                # a table per arm, its name
    about = "half of the steps"
    pretrain = []                         # settings over the comparison's; left out, there is no pre-training
    pretrain_steps = 0.5                  # times the steps of the pre-training's recipe
    detect = ["model.norm=gn"]            # settings over the comparison's
    data = "/data/crops-without-context"  # another prepped dataset to pre-train on
    recipe = "recipes/detect-scratch.toml"           # another recipe of the detector
    pretrain_recipe = "recipes/convnext-tiny.toml"   # another recipe of the pre-training
    weights = "imagenet.pth"              # in place of pre-training
"""

import tomllib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

import msgspec

from jigsaw_pretrain.config import read_bytes
from jigsaw_pretrain.errors import UserError

SCRATCH = "scratch"
JIGSAW = "jigsaw"
NECK = "neck"
EQUAL_COST = "scratch-equal-cost"

_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"


@dataclass(frozen=True)
class Arm:
    """An arm.

    about: what it shows. pretrain: settings of `train pretrain` over the comparison's, None for no pre-training.
    detect: settings of `detect train` over the comparison's. weights: a file to start from in place of pre-training.
    data: the prepped dataset to pre-train on, None for the comparison's. recipe, pretrain_recipe: TOML files, None for
    the comparison's. pretrain_steps: factor of the steps of the pre-training's recipe.
    """

    name: str
    about: str = ""
    pretrain: tuple[str, ...] | None = None
    detect: tuple[str, ...] = ()
    weights: Path | None = None
    data: str | None = None
    recipe: str | None = None
    pretrain_recipe: str | None = None
    pretrain_steps: float = 1.0

    @property
    def has_neck(self) -> bool:
        """Whether a pyramid is pre-trained."""
        return "model.neck=fpn" in (self.pretrain or ())

    def pretraining(self, others: Sequence["Arm"]) -> str:
        """The name of its pre-training: that of the first arm with the same one, for such arms share it."""
        return next((arm.name for arm in (*ARMS.values(), *others) if arm._origin == self._origin), self.name)

    @property
    def _origin(self) -> tuple[Any, ...]:
        return self.pretrain, self.data, self.pretrain_recipe, self.pretrain_steps

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as a comparison's settings keep them."""
        return {**asdict(self), "weights": self.weights and str(self.weights)}


class _ArmTable(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """An arm in a file."""

    about: str = ""
    pretrain: tuple[str, ...] | None = None
    detect: tuple[str, ...] = ()
    weights: str | None = None
    data: str | None = None
    recipe: str | None = None
    pretrain_recipe: str | None = None
    pretrain_steps: Annotated[float, msgspec.Meta(gt=0)] = 1.0


_ArmFile = dict[Annotated[str, msgspec.Meta(pattern=_NAME)], _ArmTable]


def read_arms(file: str) -> list[Arm]:
    """The arms of a TOML file, in its order; where there is no such file, of the program's own (recipes/arms/).

    Raises UserError that names what is wrong with it.
    """
    own = resources.files("jigsaw_pretrain.recipes") / "arms" / Path(file).name
    chosen = own if own.is_file() and not Path(file).exists() else Path(file)
    try:
        tables = msgspec.convert(tomllib.loads(read_bytes(chosen).decode()), _ArmFile)
    except OSError as error:
        raise UserError(f"--arms {file} cannot be read ({error.strerror}): name a TOML file of arms") from error
    except (ValueError, RecursionError, msgspec.ValidationError) as error:
        raise UserError(f"--arms {file}: {error}: write a table per arm (see docs/detectors.md)") from error
    if not tables:
        raise UserError(f"--arms {file} holds no arm: write a table per arm (see docs/detectors.md)")
    found = []
    for name, table in tables.items():
        values = msgspec.structs.asdict(table)
        if name in ARMS or name == EQUAL_COST:
            raise UserError(f"--arms {file}: {name} is an arm of this program: give yours another name")
        if table.weights is not None and table.pretrain is not None:
            raise UserError(f"--arms {file}: {name} has pretrain and weights: an arm starts from one of them")
        if table.pretrain is None and (table.data or table.pretrain_recipe or table.pretrain_steps != 1):
            raise UserError(f"--arms {file}: {name} says how to pre-train, and has no pretrain: add pretrain = []")
        found.append(Arm(name, **{**values, "weights": table.weights and Path(table.weights)}))
    return found


_TAUS = ("0.5", "0.6", "0.7", "0.8", "0.9", "1.0")

ARMS = {
    arm.name: arm
    for arm in (
        Arm(SCRATCH, "random initialisation"),
        Arm(JIGSAW, "Jigsaw pre-training, then fine-tuning", pretrain=()),
        Arm(
            "jigsaw-frozen",
            "Jigsaw pre-training, backbone frozen, cascade head with 4conv1fc",
            pretrain=(),
            detect=("model.freeze=backbone", "model.name=cascade-rcnn-fpn", "model.head=4conv1fc"),
        ),
        Arm(
            "jigsaw-cascade",
            "the same head, backbone not frozen",
            (),
            ("model.name=cascade-rcnn-fpn", "model.head=4conv1fc"),
        ),
        Arm("global", "global classification (Table 2)", ("loss.strategy=global",)),
        Arm("block-wise", "block-wise classification (Table 2)", ("loss.strategy=block-wise",)),
        Arm("warp", "crops warped to their regions (Table 1)", ("data.fit=warp",)),
        Arm("resize", "crops resized into their regions (Table 1)", ("data.fit=resize",)),
        Arm(NECK, "Jigsaw pre-training of backbone and pyramid (model.neck = fpn)", ("model.neck=fpn",)),
        Arm(
            "neck-backbone-only",
            "the same, but the pyramid starts at random",
            ("model.neck=fpn",),
            ("model.pretrained_neck=none",),
        ),
        *(Arm(f"tau-{tau}", f"threshold {tau} (Figure 7a)", (f"loss.tau={tau}",)) for tau in _TAUS),
        Arm("imagenet", "a given weights file", weights=Path("imagenet")),
    )
}
"""The arms by name; the equal-cost rival of scratch is added by the comparison, from measured costs."""


def choose(names: str, imagenet: Path | None) -> list[Arm]:
    """The arms of a comma-separated list of names and TOML files, scratch first; ``imagenet`` adds its arm.

    Raises UserError for an unknown name, for one given twice, for no name, and for imagenet without a file.
    """
    wanted = [one.strip() for one in names.split(",") if one.strip()]
    if not wanted:
        raise UserError(f"--arms {names!r} names no arm: name some, such as {SCRATCH},{JIGSAW}")
    if imagenet is not None and "imagenet" not in wanted:
        wanted.append("imagenet")
    if "imagenet" in wanted and imagenet is None:
        raise UserError("--arms imagenet needs --imagenet FILE, a weights file under torchvision's names")
    found: dict[str, Arm] = {}
    for name in wanted:
        if name.endswith(".toml"):
            arms = read_arms(name)
        elif name in ARMS:
            arm = ARMS[name]
            arms = [Arm(arm.name, arm.about, weights=imagenet) if name == "imagenet" else arm]
        else:
            raise UserError(f"--arms: there is no arm {name!r}; the arms are {', '.join(ARMS)}, or a TOML file")
        if twice := [arm.name for arm in arms if arm.name in found and found[arm.name] != arm]:
            raise UserError(f"--arms: two files have an arm {twice[0]}: give it another name in one of them")
        found |= {arm.name: arm for arm in arms}
    return sorted(found.values(), key=lambda arm: arm.name != SCRATCH)
