"""What a vision transformer costs, by arithmetic: parameters, FLOPs, memory of activations.

A multiply and an add are 2 FLOPs; norms, activations and softmax are not counted. A backward pass
costs twice its forward. Attention is counted as the sum over segments of rows squared, which is
what packed attention does: no padding.
"""

from __future__ import annotations

from dataclasses import dataclass

from fastagglo.model.config import StudentConfig
from fastagglo.ops.heads import HeadSpec

__all__ = ["VitShape", "activation_bytes", "block_flops", "student_flops", "vit_flops"]


@dataclass(frozen=True)
class VitShape:
    """Of a plain vision transformer.

    Attributes:
        width, depth, mlp_width: channels, blocks, hidden channels of a block's MLP.
        patch: pixels per patch and side.
        prefix: CLS and register tokens.
        gated: the MLP has three matrices (SwiGLU) instead of two.
        window: patches per side of windowed attention, or 0.
        global_layers: blocks that attend globally where there are windows.
        extra: parameters beside patches, blocks and tokens: position tables, pooling heads, necks.
    """

    width: int
    depth: int
    mlp_width: int
    patch: int
    prefix: int = 1
    gated: bool = False
    window: int = 0
    global_layers: int = 0
    extra: int = 0

    @property
    def parameters(self) -> int:
        """Matrices, biases and norms of all blocks, the patch embedding, tokens and ``extra``."""
        c, m = self.width, self.mlp_width
        mlp = 3 * c * m + 2 * m + c if self.gated else 2 * c * m + m + c
        block = 4 * c * c + 4 * c + mlp + 4 * c
        embed = 3 * self.patch**2 * c + c
        return embed + self.depth * block + self.prefix * c + 2 * c + self.extra


def block_flops(
    width: int, mlp_width: int, tokens: int, squares: int, *, gated: bool = False
) -> int:
    """Forward FLOPs of one block over all images: 2 a product, attention by the segments.

    Args:
        width, mlp_width: channels of a token and of the hidden layer.
        tokens: rows of the linear layers.
        squares: sum over attention's segments of rows squared.
        gated: a SwiGLU instead of two layers.
    """
    linear = 8 * width**2 + (6 if gated else 4) * width * mlp_width
    return tokens * linear + 4 * width * squares


def vit_flops(shape: VitShape, height: int, width: int) -> int:
    """Forward FLOPs of one image of ``height`` x ``width`` pixels.

    Windows that do not divide the grid are padded, as SAM does: attention and its projections run
    on the pads too.
    """
    c, m, window = shape.width, shape.mlp_width, shape.window
    rows, columns = height // shape.patch, width // shape.patch
    patches = rows * columns
    tokens = patches + shape.prefix
    flops = 6 * patches * shape.patch**2 * c
    whole = shape.global_layers if window else shape.depth
    flops += whole * block_flops(c, m, tokens, tokens**2, gated=shape.gated)
    if window:
        padded = -(-rows // window) * -(-columns // window) * window**2
        near = block_flops(c, m, tokens, padded * window**2, gated=shape.gated)
        flops += (shape.depth - whole) * (near + 8 * c**2 * (padded - patches))
    return flops


def student_flops(
    config: StudentConfig, height: int, width: int, window: int | None = None
) -> tuple[int, int]:
    """Forward FLOPs of one image through the trunk, and through all heads.

    Args:
        config: the student.
        height, width: pixels.
        window: patches per side of a ViTDet window, or None: every layer global.
    """
    c, m, gated = config.width, config.mlp_width, config.mlp == "swiglu"
    patches = (height // config.patch_size) * (width // config.patch_size)
    tokens = patches + config.prefix_tokens
    trunk = 6 * patches * config.patch_size**2 * c
    for layer in range(config.depth):
        if window is None or layer in config.global_layer_set:
            trunk += block_flops(c, m, tokens, tokens**2, gated=gated)
        else:  # CLS and register tokens pass by
            trunk += block_flops(c, m, patches, patches * window**2, gated=gated)
    if config.feature_normaliser:
        trunk += 2 * patches * c**2
    heads = 0
    for spec in config.heads.values():
        if spec.summary:
            hidden = _summary_hidden(spec, c)
            heads += 2 * hidden * (c + _summary_blocks(spec) * hidden + spec.summary)
        if spec.spatial:
            hidden = spec.hidden or c
            out = spec.spatial * spec.upsample**2
            heads += 2 * patches * hidden * (c + spec.blocks * hidden + out)
            if spec.spatial_block == "timm":
                block = block_flops(c, 4 * c, patches, patches**2)
            else:
                block = block_flops(c, m, patches, patches**2, gated=gated)
            heads += spec.spatial_blocks * block
    return trunk, heads


def activation_bytes(
    config: StudentConfig,
    height: int,
    width: int,
    *,
    bf16: bool = True,
    checkpoint_blocks: bool = False,
) -> int:
    """Bytes that one image leaves in memory between the student's forward and its backward.

    The residual stream and normalised CLS tokens are fp32; under autocast the operands of products
    are bfloat16. Heads keep one hidden layer for each of their blocks and recompute the rest.

    Args:
        config: the student; every layer global (windows keep as much).
        height, width: pixels.
        bf16: the student runs under autocast.
        checkpoint_blocks: blocks keep only their input; one block's activations come beside.
    """
    e, c = (2 if bf16 else 4), config.width
    patches = (height // config.patch_size) * (width // config.patch_size)
    tokens = patches + config.prefix_tokens
    scaled = 2 * e * c if config.layer_scale is not None else 0
    hidden = (4 if config.mlp == "swiglu" else 2) * e * config.mlp_width
    # Two residuals and their norms' outputs, q, k, v and attention's output, the MLP's hidden
    # layers; log-sums and the norms' statistics are four bytes a row (and head).
    block = 8 * c + 2 * e * c + 4 * e * c + scaled + hidden + 4 * config.num_heads + 16
    kept = 4 * c if checkpoint_blocks else block
    total = tokens * (config.depth * kept + (block if checkpoint_blocks else 0))
    total += patches * 3 * config.patch_size**2 * e + 4 * c * tokens
    for spec in config.heads.values():
        if spec.summary:
            total += e * _summary_hidden(spec, c) * (1 + _summary_blocks(spec))
        if spec.spatial:
            row = e * (spec.hidden or c) * (1 + spec.blocks)
            # Its transformer blocks have LayerScale and are checkpointed as the trunk's are.
            width = 2 * e * 4 * c if spec.spatial_block == "timm" else hidden
            own = 4 * c if checkpoint_blocks else block - scaled - hidden + width + 2 * e * c
            total += patches * (row + spec.spatial_blocks * own)
    return total


def _summary_hidden(spec: HeadSpec, width: int) -> int:
    return spec.summary_hidden or spec.hidden or width


def _summary_blocks(spec: HeadSpec) -> int:
    return spec.blocks if spec.summary_blocks is None else spec.summary_blocks
