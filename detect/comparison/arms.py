"""The arms of a comparison: what each changes in pre-training and in the detector, and nothing else.

Every arm is trained with the same detector recipe, seeds, images and norm; its learning rate is chosen by the same
sweep on a seed that is not reported.
"""

from dataclasses import dataclass
from pathlib import Path

from jigsaw_pretrain.errors import UserError

SCRATCH = "scratch"
JIGSAW = "jigsaw"
NECK = "neck"
EQUAL_COST = "scratch-equal-cost"


@dataclass(frozen=True)
class Arm:
    """An arm.

    pretrain: settings of `train pretrain` over the comparison's, None for no pre-training. detect: settings of `detect
    train` over the comparison's. weights: a file to start from in place of pre-training. about: what it shows.
    """

    name: str
    about: str
    pretrain: tuple[str, ...] | None = None
    detect: tuple[str, ...] = ()
    weights: Path | None = None

    @property
    def has_neck(self) -> bool:
        """Whether a pyramid is pre-trained."""
        return "model.neck=fpn" in (self.pretrain or ())

    @property
    def pretraining(self) -> str:
        """The name of its pre-training: that of the first arm with these settings, for such arms share it."""
        return next((arm.name for arm in ARMS.values() if arm.pretrain == self.pretrain), self.name)


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
    """The arms of a comma-separated list, scratch first; ``imagenet`` adds its arm.

    Raises UserError for a name that is none, and for imagenet without a file.
    """
    wanted = [one.strip() for one in names.split(",") if one.strip()]
    if imagenet is not None and "imagenet" not in wanted:
        wanted.append("imagenet")
    for name in wanted:
        if name not in ARMS:
            raise UserError(f"--arms: there is no arm {name!r}; the arms are {', '.join(ARMS)}")
    if "imagenet" in wanted and imagenet is None:
        raise UserError("--arms imagenet needs --imagenet FILE, a weights file under torchvision's names")
    found = []
    for name in sorted(set(wanted), key=lambda one: (one != SCRATCH, wanted.index(one))):
        arm = ARMS[name]
        found.append(Arm(arm.name, arm.about, weights=imagenet) if name == "imagenet" else arm)
    return found
