"""Finds where a network is cut: its last feature map, the maps that a pyramid stands on, and its last stage.

The model is traced by torchvision's feature extraction and run on two input sizes without data (meta tensors, about a
second). The last 4-D value whose height and width grow with the input and whose consumers do not is what the final
pooling pools. Squeeze-and-excite branches are 1 x 1 and VGG's 7 x 7 pool does not grow, so neither is taken; Swin's map
is the one after its last permute. The stages (strides 4, 8, 16, 32) are the last map of each stride from which alone
all that follows is computed; maps [n, h, w, channels], as within Swin, are permuted. A detector that pools regions from
stride 16 (C4) gets the network in two modules, before that map and after it.

A network whose maps are all of stride 16 (a plain ViT, whose grid is its map) gets the simple pyramid of ViTDet (Li et
al. 2022) from its last one, with bilinear interpolation in place of the deconvolutions, so that it has no weights of
its own. Prefer a network of four stages where small objects matter.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torchvision.models import feature_extraction

from jigsaw_pretrain.errors import UserError

STAGED = (
    "resnet50",
    "resnext101_32x4d",
    "wide_resnet50_2",
    "vgg16",
    "efficientnet_b0",
    "convnext_tiny",
    "swin_t",
    "regnet_y_800mf",
    "densenet121",
    "mobilenet_v3_large",
)
"""One of each family that shows the stages of a pyramid: what a refusal names. resnext101_32x4d is Table 4's."""

NO_STAGES = (
    "does not show the stages of strides 4, 8, 16 and 32 that a pyramid stands on: choose a network that has them "
    f"({', '.join(STAGED)}, most of timm's), or do without the pyramid (model.neck = none, faster-rcnn-c4)"
)

SIZES = (256, 512)
"""The input sizes tried, pixels: multiples of any stride in use."""


STAGES = (4, 8, 16, 32)
"""The strides of the stages that a pyramid stands on: P2 to P5."""

REGIONS_STRIDE = 16
"""The stride of the map that C4 pools regions from."""


@dataclass(frozen=True)
class Stage:
    """A map of the backbone: [n, ``channels``, H / ``stride``, W / ``stride``]."""

    channels: int
    stride: int

    @property
    def level(self) -> str:
        """Its pyramid level's name: P5 at stride 32."""
        return f"P{self.stride.bit_length() - 1}"


@dataclass(frozen=True)
class Backbone:
    """A module that maps [n, ``in_channels``, H, W] to [n, ``channels``, H / ``stride``, W / ``stride``].

    head: the names in the whole model's state dict that lie behind the map: the classifier's. norm: bn
    or gn. stages: where the module gives a tuple of several maps instead (for a pyramid), what they are, finest first;
    the last is the map above. rest: where the module ends before the network's last stage, that stage,
    from the module's map of ``stride`` to one of ``channels``; the module's own channels are then those of stages[0].
    """

    name: str
    module: nn.Module
    channels: int
    stride: int
    head: frozenset[str]
    norm: str = "bn"
    stages: tuple[Stage, ...] = ()
    in_channels: int = 3
    rest: nn.Module | None = None

    @property
    def parts(self) -> tuple[nn.Module, ...]:
        """The modules that hold the weights, under the library's own names."""
        return (self.module,) if self.rest is None else (self.module, self.rest)

    @property
    def maps(self) -> tuple[Stage, ...]:
        """The maps that are classified: the stages, or else the one map."""
        return self.stages or (Stage(self.channels, self.stride),)


@dataclass(frozen=True)
class _Map(Stage):
    """A node to cut at, and what was measured there.

    alone: whether all that follows is computed from it alone. channels_last: whether it is [n, h, w, channels].
    """

    node: str
    alone: bool
    channels_last: bool


def _find_maps(name: str, whole: nn.Module, in_channels: int, pooled: bool) -> list[_Map]:
    """Every feature map up to the last, in the order they are made.

    pooled: whether the network is a classifier, whose last map its final pooling pools; else the last is its output.
    """
    try:
        meta = _on_meta(whole).eval()
        tracer = feature_extraction.NodePathTracer(leaf_modules=[nn.modules.batchnorm._BatchNorm])
        graph = tracer.trace(meta)
        small, large = (_ShapeRecorder(fx.GraphModule(meta, graph)).shapes_at(size, in_channels) for size in SIZES)
    except Exception as error:
        reason = (str(error) or type(error).__name__).split("\n")[0][:200]
        raise UserError(
            f"backbone {name} cannot be traced at {SIZES[0]} and {SIZES[1]} pixels ({reason}): it has no feature map "
            "that follows the input's size. Choose a convolutional network or Swin."
        ) from error
    maps: list[_Map] = []
    last = 0
    of_image: set[fx.Node] = set()
    used_until = 0  # the place of the last node that takes something made before this one
    order = {node: nth for nth, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        alone = used_until <= order[node]
        if node.op == "placeholder" or of_image & {*node.all_input_nodes}:
            of_image.add(node)
            used_until = max([used_until, *(order[user] for user in node.users if user.op != "output")])
        shape, larger = small.get(node), large.get(node)
        if shape is None or larger is None or node.op in ("placeholder", "output"):
            continue
        channels_last = not is_map(shape, larger)
        if channels_last:
            if len(shape) != 4 or len(larger) != 4 or shape[3] != larger[3]:
                continue
            shape, larger = (torch.Size((one[0], one[3], one[1], one[2])) for one in (shape, larger))
            if not is_map(shape, larger):
                continue
        maps.append(_Map(shape[1], SIZES[0] // shape[2], tracer.node_to_qualname[node], alone, channels_last))
        users = [user for user in node.users if user in small]
        if pooled and users and all(small[user].numel() == large[user].numel() for user in users):
            last = len(maps)
        if not pooled and any(user.op == "output" for user in node.users):
            last = len(maps)
    if not last:
        raise UserError(
            f"backbone {name} has no feature map on a regular grid before its final pooling (its padding leaves parts "
            "of pixels over, or it pools nothing). Choose another one, such as resnet50."
        )
    return maps[:last]


def _on_meta(whole: nn.Module) -> nn.Module:
    """A copy without data."""
    memo: dict[int, Any] = {id(one): nn.Parameter(one.detach().to("meta")) for one in whole.parameters()}
    memo |= {id(one): one.to("meta") for one in whole.buffers()}
    return copy.deepcopy(whole, memo).to("meta")


def is_map(small: torch.Size, large: torch.Size) -> bool:
    """Whether a value of these shapes at the two sizes is a map [n, channels, h, w] of an integral stride."""
    if len(small) != 4 or len(large) != 4 or small[1] != large[1]:
        return False
    if not 2 <= min(small[2:]) <= max(small[2:]) <= SIZES[0]:
        return False
    grown = [
        [shape[2], shape[3]] == [size // (SIZES[0] // small[2])] * 2
        for shape, size in zip((small, large), SIZES, strict=True)
    ]
    return SIZES[0] % small[2] == 0 and all(grown)


class _ShapeRecorder(fx.Interpreter):
    """Runs a graph without data and notes the shape of every tensor.

    torch's own ShapeProp prints a traceback where a network refuses the size; here that is an answer.
    """

    def shapes_at(self, size: int, in_channels: int) -> dict[fx.Node, torch.Size]:
        """The shape of every tensor of the graph for one image of that size."""
        self._shapes: dict[fx.Node, torch.Size] = {}
        self.run(torch.empty(1, in_channels, size, size, device="meta"))
        return self._shapes

    def run_node(self, n: fx.Node) -> object:
        """Run one node."""
        result = super().run_node(n)
        if isinstance(result, Tensor):
            self._shapes[n] = result.shape
        return result


def _traced(whole: nn.Module, edit: Callable[[fx.Graph, dict[str, fx.Node]], None]) -> nn.Module:
    """The model with both of its graphs, of train and eval, edited by node names; in train mode."""
    graphs = []
    for training in (True, False):
        whole.train(training)
        tracer = feature_extraction.NodePathTracer(leaf_modules=[nn.modules.batchnorm._BatchNorm])
        graph = fx.GraphModule(whole, tracer.trace(whole)).graph
        named = {tracer.node_to_qualname[one]: one for one in graph.nodes if one in tracer.node_to_qualname}
        edit(graph, named)
        graph.eliminate_dead_code()
        graphs.append(graph)
    return feature_extraction.DualGraphModule(whole.train(), *graphs, class_name=type(whole).__name__)


def _up_to(
    whole: nn.Module, maps: Sequence[_Map], form: Callable[..., Tensor | tuple[Tensor, ...]] | None = None
) -> nn.Module:
    """The part of the model up to the last map, in train mode.

    It returns a tuple of the maps where ``form`` is tuple, the only one where it is None, else what form makes of it.
    """

    def edit(graph: fx.Graph, named: dict[str, fx.Node]) -> None:
        last = named[maps[-1].node]
        for later in reversed(graph.nodes):
            if later is last:
                break
            graph.erase_node(later)
        with graph.inserting_after(last):
            found = []
            for one in maps:
                node = named[one.node]
                found.append(graph.call_method("permute", (node, 0, 3, 1, 2)) if one.channels_last else node)
            if form is not None and form is not tuple:
                found = [graph.call_function(form, (found[0],))]
        graph.output(found[0] if form is not tuple else tuple(found))

    return _traced(whole, edit)


def _from(whole: nn.Module, first: _Map, last: _Map) -> nn.Module:
    """The part of the model from one map, not included, to another; in train mode."""

    def edit(graph: fx.Graph, named: dict[str, fx.Node]) -> None:
        begin, end = named[first.node], named[last.node]
        with graph.inserting_before(begin):
            given = graph.placeholder("regions")
            value = graph.call_method("permute", (given, 0, 2, 3, 1)) if first.channels_last else given
        begin.replace_all_uses_with(value)
        for later in reversed(graph.nodes):
            if later is end:
                break
            graph.erase_node(later)
        with graph.inserting_after(end):
            found = graph.call_method("permute", (end, 0, 3, 1, 2)) if last.channels_last else end
        needed = {output := graph.output(found)}
        for node in reversed(graph.nodes):
            if node in needed:
                needed.update(node.all_input_nodes)
            elif node is not given and node is not output:
                graph.erase_node(node)

    return _traced(whole, edit)


def cut(
    name: str,
    whole: nn.Module,
    norm: str = "bn",
    multi_level: bool = False,
    in_channels: int = 3,
    *,
    split: bool = False,
    pooled: bool = True,
) -> Backbone:
    """A network without what lies behind its last feature map; the parameters are shared, not copied.

    Args:
        name: for messages.
        whole: the network.
        norm: its norm.
        multi_level: whether the module gives the maps of all STAGES.
        in_channels: of its images.
        split: whether the module ends at its last map of stride 16, with ``rest`` from there.
        pooled: whether it is a classifier; else its output is its last map.

    Raises:
        UserError: where there is no map that can be cut into regions, or not the stages asked for.
    """
    maps = _find_maps(name, whole, in_channels, pooled)
    found = maps[-1]
    # A block that halves the map may begin with a convolution at the full one, beside its shortcut: not yet a stage.
    ends = {one.stride: one for one in maps if one.alone} | {found.stride: found}
    strides = sorted(ends)
    rest = None
    if split:
        before = ends.get(REGIONS_STRIDE)
        if before is None or before is found or found.stride != 2 * REGIONS_STRIDE:
            raise UserError(no_last_stage(name))
        module, rest, kept = _up_to(whole, [before]), _from(whole, before, found), [before]
    elif multi_level and is_columnar(strides):
        module, kept = _up_to(whole, [found], simple_pyramid), [replace(found, stride=stride) for stride in STAGES]
    elif multi_level:
        kept = [ends[stride] for stride in STAGES if stride in ends]
        if len(kept) < len(STAGES):
            raise UserError(f"backbone {name} has maps of strides {', '.join(map(str, strides))} and {NO_STAGES}")
        module = _up_to(whole, kept, tuple)
    else:
        module, kept = _up_to(whole, [found]), []
    parts = [module] if rest is None else [module, rest]
    stages = tuple(Stage(one.channels, one.stride) for one in kept)
    stride = REGIONS_STRIDE if split else found.stride
    return Backbone(name, module, found.channels, stride, _head(whole, parts), norm, stages, in_channels, rest)


def no_last_stage(name: str) -> str:
    """What to tell of a network that C4 cannot stand on."""
    return (
        f"backbone {name} cannot be cut into the part up to stride 16 and a last stage of stride 32, as C4 needs it: "
        "choose a detector with a pyramid (--model faster-rcnn-fpn), or another network, such as resnet50"
    )


def is_columnar(strides: Sequence[int]) -> bool:
    """Whether a network's maps, told by their strides, are all of stride 16."""
    return set(strides) == {REGIONS_STRIDE}


def _head(whole: nn.Module, parts: Sequence[nn.Module]) -> frozenset[str]:
    return frozenset(whole.state_dict()) - frozenset(key for part in parts for key in part.state_dict())


def simple_pyramid(found: Tensor) -> tuple[Tensor, ...]:
    """From a map [n, C, h, w] of stride 16, maps of strides 4, 8, 16 and 32: [n, C, 4h, 4w] to [n, C, h / 2, w / 2]."""
    finer = [F.interpolate(found, scale_factor=float(by), mode="bilinear", align_corners=False) for by in (4, 2)]
    return (*finer, found, F.max_pool2d(found, 2))
