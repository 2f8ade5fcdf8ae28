"""The configuration that transformers' own ``RadioModel`` needs beside a student's weights."""

from __future__ import annotations

from typing import Any

from fastagglo.errors import UserError
from fastagglo.model import StudentConfig

__all__ = ["transformers_config"]


def transformers_config(config: StudentConfig) -> dict[str, Any]:
    """``config.json`` of a folder for ``transformers.AutoModel``.

    Raises:
        UserError: the student has something that RadioModel cannot say; the message names it.
    """
    wrong = {
        "patch_bias": config.patch_bias,
        "final_norm": config.final_norm,
        "feature_normaliser": config.feature_normaliser,
    }
    if found := [name for name, value in wrong.items() if value]:
        raise UserError(
            f"transformers' RadioModel has no {', '.join(found)}; write a .safetensors file, or "
            f"train a student with {', '.join(f'{name}=False' for name in found)}"
        )
    hidden = config.mlp_width
    if config.mlp == "swiglu":  # of which it keeps two thirds, rounded up to a multiple of 8
        if hidden % 8:
            raise UserError(
                f"transformers' RadioModel has SwiGLU widths in multiples of 8, got {hidden}; "
                "write a .safetensors file"
            )
        hidden = -(-hidden * 3 // 2)
    ratio = hidden / config.width
    if int(config.width * ratio) != hidden:  # it cuts the product
        ratio = (hidden + 0.5) / config.width
    names = config.cls_names
    return {
        "architectures": ["RadioModel"],
        "model_type": "radio",
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.num_heads,
        "mlp_ratio": ratio,
        "use_swiglu_ffn": config.mlp == "swiglu",
        "layerscale_value": 1.0 if config.layer_scale is None else config.layer_scale,
        "layer_norm_eps": config.norm_eps,
        "patch_size": config.patch_size,
        "max_img_size": config.grid * config.patch_size,
        "num_cls_tokens": len(names),
        "num_registers": config.registers,
        "summary_idxs": [names.index(name) for name in config.summary or names],
        "norm_mean": list(config.pixel_mean),
        "norm_std": list(config.pixel_std),
        "drop_path_rate": 0.0,
    }
