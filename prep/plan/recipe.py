"""The recipes that fit a dataset and the machine at hand, ``OUT/recipe.toml`` and its detector's, with their reasons.

The rule. *Sizes:* the paper's template and resize ratios are for COCO, whose crops fill 69 % of the large slot. Where
another dataset's fill much more or less, they are resized to fill as much; small objects, and machines without a GPU,
get a smaller template. *Steps:* the paper draws every crop 138 times;
so does this, in batches that leave at least a thousand steps, up to the paper's own 64,000 (2,000 without a GPU).
*Memory:* how many jigsaws the machine takes at once is a micro-batch, which changes nothing but the time, for the norm
is group norm: that of the detector's recipes for few images at once (recipes/detect-sample.toml, detect-fpn.toml).

Prep does not know training's code: what is written here is read by train/recipe.py, which its tests hold it to. Pure
arithmetic but for ``this_machine``, which asks the system and, where it is installed, nvidia-smi.
"""

import hashlib
import json
import os
import shutil
import subprocess
import textwrap
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from jigsaw_pretrain.config import read_toml
from jigsaw_pretrain.errors import UserError
from jigsaw_pretrain.formats.jigsaw import REGION_GROUPS, Fit, Template, usual_lanes
from jigsaw_pretrain.prep.plan.forecast import ONE_SIDED, PAPER_RATIOS, CropSizes, JigsawFit, Summary

PASSES = 138
"""How often the paper draws each crop: 64,000 steps of 512 jigsaws over about 950,000 crops of COCO train2017."""

PAPER_STEPS, PAPER_BATCH, PAPER_WARMUP, PAPER_ERF = 64_000, 512, 1_250, 5_000

CPU_STEPS, CPU_BATCH = 2_000, 16
"""The most on a machine without a GPU: an hour or so of a few cores."""

CPU_DETECTOR_STEPS = 450

LEAST_STEPS = 1_000
"""A smaller batch is chosen before a run has fewer."""

LANE_CROPS = 64
"""Balance draws within a lane's share of a shard, so it does nothing where that is a few crops."""

FEW_STEPS = 500
"""Below this many steps the user is told that the crops are few."""

JIGSAW_BYTES = {"resnet50": 130e6, "resnet18": 40e6}
"""What a jigsaw of 224 x 224 takes of memory in a training step, about."""

BYTES_PER_IMAGE = 8 << 30
"""What an image of 1333 x 800 takes of memory in a detector's training step, at most."""

MEMORY_SHARE = 0.75
"""The share of a GPU's memory that a step may take."""

SMALL_TEMPLATE = Template(128, 32)

NORM = "gn"


@dataclass(frozen=True)
class MachineMemory:
    """Bytes of memory of this machine, and of its smallest GPU; 0 for no GPU."""

    host: int
    gpu: int = 0


@dataclass(frozen=True)
class FittedKey:
    """A key of the recipe, its value, and why it is that; no reason where the one above it says it."""

    section: str
    name: str
    value: Any
    why: str = ""


@dataclass(frozen=True)
class FittedRecipe:
    """The keys of a recipe by section. about: what it is fitted to, in words."""

    keys: tuple[FittedKey, ...]
    about: str

    def to_toml(self) -> str:
        """The file, the reasons as comments."""
        lines = [
            f"# Written by `jigsaw-prep shards` for {self.about}. Change what you like: a file that was changed is",
            "# never written again. docs/recipes.md has every key.",
        ]
        section = ""
        for key in self.keys:
            if key.section != section:
                section = key.section
                lines += ["", f"[{section}]"]
            lines += [f"# {line}" for line in textwrap.wrap(key.why, 110)]
            lines.append(f"{key.name} = {json.dumps(key.value)}")
        text = "\n".join(lines) + "\n"
        return f"{text}{_MARK}{_digest(text)}\n"


_MARK = "\n# unchanged: "


def is_unchanged(text: str) -> bool:
    """Whether a recipe.toml is as prep wrote it."""
    body, mark, digest = text.rpartition(_MARK)
    return bool(mark) and digest == f"{_digest(body)}\n"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def fitted_recipe(summary: Summary, machine: MachineMemory) -> FittedRecipe:
    """The recipe for a dataset that has crops, on a machine."""
    jigsaw, why = fitted_jigsaw(summary.sizes, machine)
    backbone = _backbone(machine)
    batch, why_batch = _batch(summary.crops, machine)
    steps, why_steps = _steps(summary.crops, batch, machine)
    micro_batch, why_micro = _micro_batch(backbone, jigsaw.template.size, batch, machine)
    balanced = _balance(summary, batch)
    keys = (
        FittedKey("data", "template_size", jigsaw.template.size, why),
        FittedKey("data", "template_split", jigsaw.template.split),
        FittedKey("data", "resize_low", jigsaw.ratios[0], _why_resize(jigsaw, summary.sizes.side)),
        FittedKey("data", "resize_high", jigsaw.ratios[1]),
        FittedKey("data", "batch", batch, why_batch),
        *balanced,
        FittedKey(
            "model",
            "backbone",
            backbone,
            "the paper's; resnet18 trains in a third of the time"
            if machine.gpu
            else "this machine shows no GPU; on one take resnet50, the paper's, with template_size 224",
        ),
        FittedKey(
            "model",
            "norm",
            NORM,
            "group norm, as in the detector's recipes for few images at once (`make detect`); bn for detectors with "
            "frozen batch norm",
        ),
        FittedKey("optim", "steps", steps, why_steps),
        FittedKey("optim", "warmup_steps", min(PAPER_WARMUP, steps // 10), "a tenth of the steps, at most the paper's"),
        FittedKey("optim", "micro_batch", micro_batch, why_micro),
        FittedKey("loss", "erf_every", min(PAPER_ERF, max(1, steps // 10)), "ten times a run, at most the paper's"),
        FittedKey("run", "checkpoint_every", min(1_000, max(20, steps // 10))),
    )
    return FittedRecipe(keys, f"pre-training on {summary.crops:,} crops of {len(summary.classes):,} classes")


def fitted_detector(machine: MachineMemory) -> FittedRecipe:
    """The recipe of a detector that takes the backbone and the norm of ``fitted_recipe``.

    Its length and its images' size are fitted to the dataset where it is trained (detect/recipe.py).
    """
    same = "that of recipe.toml: weights are of use in the network and under the norm that they were trained in"
    keys = [
        FittedKey("model", "name", "faster-rcnn-fpn"),
        FittedKey("model", "backbone", _backbone(machine), same),
        FittedKey("model", "norm", NORM),
    ]
    if machine.gpu:
        batch = max(2, min(16, machine.gpu // BYTES_PER_IMAGE))
        why = f"what a GPU of {machine.gpu / 2**30:.0f} GiB takes of images as large as COCO's; the rate scales with it"
        return FittedRecipe((FittedKey("data", "batch", batch, why), *keys), "fine-tuning a detector")
    small = "as recipes/detect-sample.toml, for a machine without a GPU: enough to see it learn, not to judge it by"
    data = [FittedKey("data", "batch", 4, small), FittedKey("data", "short_side", 256)]
    narrow = {"neck_channels": 64, "fc": 256, "rois": 64, "proposals": 200}
    keys += [FittedKey("model", name, value, "" if nth else small) for nth, (name, value) in enumerate(narrow.items())]
    optim = {"lr": 0.08, "steps": CPU_DETECTOR_STEPS, "clip_norm": 10.0}
    keys += [FittedKey("optim", name, value, "" if nth else small) for nth, (name, value) in enumerate(optim.items())]
    return FittedRecipe((*data, *keys), "fine-tuning a detector")


def _balance(summary: Summary, batch: int) -> list[FittedKey]:
    """The keys that have rare labels drawn more often, where nearly all are of one; none elsewhere."""
    name, share = summary.commonest()
    if share < ONE_SIDED:
        return []
    keys = [
        FittedKey("data", "balance", "sqrt", f"{share:.0%} of all regions would be {name}: rare ones come more often")
    ]
    lanes = usual = usual_lanes(batch)
    fewest = min(count for count in summary.by_group if count)
    while lanes > 1 and fewest < LANE_CROPS * lanes:
        lanes //= 2
    if lanes < usual:
        why = "so few that each lane holds crops of every label to balance; a multiple of the number of GPUs"
        keys.append(FittedKey("data", "lanes", lanes, why))
    return keys


def _backbone(machine: MachineMemory) -> str:
    return "resnet50" if machine.gpu else "resnet18"


def fitted_jigsaw(sizes: CropSizes, machine: MachineMemory) -> tuple[JigsawFit, str]:
    """The template and the ratios for crops of these sizes, and why that template."""
    if not machine.gpu:
        return sizes.fit(SMALL_TEMPLATE), "a third of the paper's pixels (224 split at 64), for a machine without a GPU"
    found = sizes.fit(Template())
    if found.ratios > PAPER_RATIOS:
        why = (
            f"the objects are small (crops of {sizes.side:.0f} pixels, median): the paper's 224 would be mostly padding"
        )
        return sizes.fit(SMALL_TEMPLATE), why
    return found, "the paper's"


def jigsaw_of(sizes: CropSizes, recipe: str) -> JigsawFit:
    """The jigsaw of another recipe: a TOML file, or the name of one that comes with the program.

    Raises UserError for what is none.
    """
    data = read_toml(recipe).get("data", {})
    try:
        low, high = (
            float(data.get(key, own)) for key, own in zip(("resize_low", "resize_high"), PAPER_RATIOS, strict=True)
        )
        template = Template(
            int(data.get("template_size", Template.size)), int(data.get("template_split", Template.split))
        )
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{recipe}: [data] does not have the numbers of a template and its ratios ({error})") from error
    fit = data.get("fit", "crop")
    if fit not in get_args(Fit):
        raise UserError(f"{recipe}: data.fit {fit!r} is none of {', '.join(get_args(Fit))}")
    return sizes.jigsaw(template, (low, high), fit)


def _why_resize(jigsaw: JigsawFit, side: float) -> str:
    if jigsaw.ratios == PAPER_RATIOS:
        return "the paper's"
    return (
        f"crops of {side:.0f} pixels (median) then fill their regions, and show in them, as COCO's do in the paper's "
        "jigsaws (0.8 to 1.5)"
    )


def _batch(crops: int, machine: MachineMemory) -> tuple[int, str]:
    most = PAPER_BATCH if machine.gpu else CPU_BATCH
    batch = most
    while batch > CPU_BATCH and _passes_to_steps(crops, batch) < LEAST_STEPS:
        batch //= 2
    if not machine.gpu:
        return batch, "for a machine without a GPU; the learning rate scales with it (the paper's is for 512)"
    if batch == PAPER_BATCH:
        return batch, "the paper's"
    return batch, (
        f"smaller than the paper's {PAPER_BATCH}, which would leave {_passes_to_steps(crops, PAPER_BATCH):,} steps; "
        "the learning rate scales with it"
    )


def _passes_to_steps(crops: int, batch: int) -> int:
    return max(1, round(PASSES * crops / (len(REGION_GROUPS) * batch)))


def _steps(crops: int, batch: int, machine: MachineMemory) -> tuple[int, str]:
    wanted, most = _passes_to_steps(crops, batch), PAPER_STEPS if machine.gpu else CPU_STEPS
    steps = min(wanted, most)
    passes = steps * batch * len(REGION_GROUPS) / max(1, crops)
    if steps < wanted:
        limit = "the paper's own length" if machine.gpu else "the most for a machine without a GPU"
        return steps, (
            f"{limit}: each of {crops:,} crops is drawn about {passes:.3g} times, where the paper draws it {PASSES} "
            f"times ({wanted:,} steps here)" + ("" if machine.gpu else ": enough to see it learn, not to judge it by")
        )
    said = f"each of {crops:,} crops is drawn about {passes:.3g} times, as in the paper ({PASSES})"
    if steps < FEW_STEPS:
        said += ". These are few steps: so few crops teach a backbone little"
    return steps, said


def _micro_batch(backbone: str, size: int, batch: int, machine: MachineMemory) -> tuple[int, str]:
    memory = machine.gpu or machine.host
    room = MEMORY_SHARE * memory / (JIGSAW_BYTES[backbone] * (size / 224) ** 2)
    count = 1
    while count < batch and 2 * count <= room:
        count *= 2
    where = f"a GPU of {memory / 2**30:.0f} GiB" if machine.gpu else f"{memory / 2**30:.0f} GiB of memory"
    return count, f"what fits into {where} at once; it changes the time and the memory, not the result"


def this_machine() -> MachineMemory:
    """The memory of this machine, as far as this process may have it, and of its smallest GPU."""
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with suppress(OSError, ValueError):
        host = min(host, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return MachineMemory(host, _gpu_memory())


def _gpu_memory() -> int:
    program = shutil.which("nvidia-smi")
    if program is None or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return 0
    asked = [program, "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    with suppress(OSError, ValueError, subprocess.SubprocessError):
        told = subprocess.run(asked, capture_output=True, text=True, timeout=20, check=True).stdout
        return min((int(line) for line in told.split()), default=0) << 20
    return 0
