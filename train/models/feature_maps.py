"""Finds where a network of torchvision is cut: its last feature map, and the maps that a neck stands on.

The model is traced by torchvision's feature extraction and run on two input sizes without data (meta tensors, about a
second). The last 4-D value whose height and width grow with the input and whose consumers do not is what the final
pooling pools. Squeeze-and-excite branches are 1 x 1 and VGG's 7 x 7 pool does not grow, so neither is taken; Swin's map
is the one after its last permute. The stages of a neck (strides 4, 8, 16, 32) are the last map of each stride.
"""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torchvision.models import feature_extraction

from jigsaw_pretrain.errors import UserError

_NO_STAGES = (
    "does not show the stages of strides 4, 8, 16 and 32 that a neck stands on: choose a network of torchvision that "
    "has them, such as resnet50, or model.neck = none"
)

SIZES = (256, 512)
"""The input sizes tried, pixels: multiples of any stride in use."""


STAGES = (4, 8, 16, 32)
"""The strides of the stages that a neck stands on: P2 to P5."""


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

    head: the names in the whole model's state dict that lie behind the map: the classifier's. norm: one of
    models.layers.NORMS. stages: where the module gives a tuple of several maps instead (for a neck), what they are,
    finest first; the last is the map above.
    """

    name: str
    module: nn.Module
    channels: int
    stride: int
    head: frozenset[str]
    norm: str = "bn"
    stages: tuple[Stage, ...] = ()
    in_channels: int = 3

    @property
    def maps(self) -> tuple[Stage, ...]:
        """The maps that are classified: the stages, or else the one map."""
        return self.stages or (Stage(self.channels, self.stride),)


@dataclass(frozen=True)
class _Map(Stage):
    """A node to cut at, and what was measured there. alone: whether all that follows is computed from it alone."""

    node: str
    alone: bool


def _find_maps(name: str, whole: nn.Module, in_channels: int) -> list[_Map]:
    """Every feature map up to the last before the final pooling, in the order they are made."""
    try:
        meta = copy.deepcopy(whole).to("meta").eval()
        tracer = feature_extraction.NodePathTracer()
        graph = tracer.trace(meta)
        small, large = (_ShapeRecorder(fx.GraphModule(meta, graph)).shapes_at(size, in_channels) for size in SIZES)
    except Exception as error:
        reason = str(error).split("\n")[0]
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
            used_until = max([used_until, *(order[user] for user in node.users)])
        shape, larger = small.get(node), large.get(node)
        if shape is None or larger is None or not is_map(shape, larger):
            continue
        maps.append(_Map(shape[1], SIZES[0] // shape[2], tracer.node_to_qualname[node], alone))
        users = [user for user in node.users if user in small]
        if users and all(small[user].numel() == large[user].numel() for user in users):
            last = len(maps)
    if not last:
        raise UserError(
            f"backbone {name} has no feature map on a regular grid before its final pooling (its padding leaves parts "
            "of pixels over, or it pools nothing). Choose another one, such as resnet50."
        )
    return maps[:last]


def is_map(small: torch.Size, large: torch.Size) -> bool:
    """Whether a value of these shapes at the two sizes is a map of an integral stride."""
    if len(small) != 4 or len(large) != 4 or min(small[2:]) < 2:
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


def _up_to(whole: nn.Module, nodes: str | list[str]) -> nn.Module:
    """The part of the model up to the last node, returning that node's value, or a tuple of several; in train mode."""
    wanted = [nodes] if isinstance(nodes, str) else nodes
    graphs = []
    for training in (True, False):
        whole.train(training)
        tracer = feature_extraction.NodePathTracer()
        graph = fx.GraphModule(whole, tracer.trace(whole)).graph
        named = {tracer.node_to_qualname.get(one): one for one in graph.nodes}
        kept = tuple(named[name] for name in wanted)
        last = kept[-1]
        for later in reversed(graph.nodes):
            if later is last:
                break
            graph.erase_node(later)
        with graph.inserting_after(last):
            graph.output(last if isinstance(nodes, str) else kept)
        graph.eliminate_dead_code()
        graphs.append(graph)
    return feature_extraction.DualGraphModule(whole.train(), *graphs, class_name=type(whole).__name__)


def cut(name: str, whole: nn.Module, norm: str = "bn", multi_level: bool = False, in_channels: int = 3) -> Backbone:
    """A classification model without what lies behind its last feature map; the parameters are shared, not copied.

    multi_level: its module gives the maps of all STAGES. Raises UserError where there is no map that can be cut into
    regions, or not all stages; ``name`` is for the message.
    """
    maps = _find_maps(name, whole, in_channels)
    found = maps[-1]
    # A block that halves the map may begin with a convolution at the full one, beside its shortcut: not yet a stage.
    ends = {one.stride: one for one in maps if one.alone}
    stages = [ends.get(stride) for stride in STAGES] if multi_level else [found]
    nodes = [one.node for one in stages if one is not None]
    if len(nodes) < len(stages):
        strides = sorted(ends)
        raise UserError(f"backbone {name} has maps of strides {', '.join(map(str, strides))} and {_NO_STAGES}")
    module = _up_to(whole, nodes if multi_level else nodes[0])
    head = frozenset(whole.state_dict()) - frozenset(module.state_dict())
    kept = tuple(Stage(one.channels, one.stride) for one in stages if one is not None) if multi_level else ()
    return Backbone(name, module, found.channels, found.stride, head, norm, kept, in_channels)
