"""Vision transformers of timm as teachers: CLIP, SigLIP(2), DINOv2, DINOv3, SAM, plain ViTs."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from fastagglo.errors import UserError, require
from fastagglo.teachers.base import (
    Teacher,
    TeacherSettingError,
    TeacherSpec,
    as_grid,
    fixed_size,
)
from fastagglo.teachers.weights import (
    existing,
    find_weights,
    hub_folder,
    one_line,
    read_json,
    read_weights,
)

WEIGHTS = ("model.safetensors", "pytorch_model.bin")


def load_timm(
    model: str,
    *,
    name: str,
    checkpoint: str | Path | None,
    input_size: int | None,
    dtype: torch.dtype,
    summary: bool,
    allow_download: bool,
) -> Teacher:
    """See ``fastagglo.teachers.load_teacher``."""
    timm = require("timm", extra="teachers", purpose=f"teacher {name!r}")
    if checkpoint is not None:
        path = existing(checkpoint, name)
    else:
        path = hub_folder(
            _repository(timm, model, name),
            WEIGHTS,
            ("config.json",),
            name=name,
            allow_download=allow_download,
        )
    network = _create(timm, model, path, input_size, name)
    tower: nn.Module
    if hasattr(network, "num_prefix_tokens") and hasattr(network, "patch_embed"):
        tower = TokenTower(network)
        patch, channels = tower.patch_size, network.embed_dim
        width: int | None = channels if tower.class_token else network.head_hidden_size
        fixed = (
            None if getattr(network, "dynamic_img_size", False) else network.patch_embed.img_size
        )
    elif type(network).__name__ == "VisionTransformerSAM":
        tower = SamTower(network)
        patch, channels, width, fixed = _patch_size(network), network.num_features, None, None
    else:
        raise TeacherSettingError(
            f"teacher {name!r}: timm model {model!r} is a {type(network).__name__}; teachers are "
            f"plain vision transformers (CLIP, SigLIP, DINOv2, DINOv3, SAM, ViT)"
        )
    config = network.pretrained_cfg
    spec = TeacherSpec(
        name,
        fixed_size(name, input_size, fixed and fixed[0], patch),
        patch,
        patch,
        tuple(config["mean"]),
        tuple(config["std"]),
        width if summary else None,
        channels,
    )
    return Teacher(spec, tower, dtype)


def _repository(timm: ModuleType, model: str, name: str) -> str:
    """The hub repository of a timm model's weights."""
    for prefix in ("hf-hub:", "hf_hub:"):
        if model.startswith(prefix):
            return model.removeprefix(prefix)
    _known(timm, model, name)
    config = timm.get_pretrained_cfg(model, allow_unregistered=True)
    if config is None or not config.hf_hub_id:
        raise UserError(
            f"teacher {name!r}: timm publishes no weights for {model!r}; give checkpoint=PATH"
        )
    return config.hf_hub_id


def _known(timm: ModuleType, model: str, name: str) -> None:
    if not timm.is_model(model):
        close = timm.list_models(f"*{model.split('.')[0]}*")[:4]
        hint = f"did you mean {', '.join(close)}?" if close else "timm.list_models() shows all"
        raise TeacherSettingError(f"teacher {name!r}: timm has no model {model!r}; {hint}")


def _create(
    timm: ModuleType, model: str, path: Path, input_size: int | None, name: str
) -> nn.Module:
    """Build the architecture and load every weight of it, with timm's own key conversion."""
    file = find_weights(path, WEIGHTS, name)
    folder = path if path.is_dir() else path.parent
    if (folder / "config.json").is_file():
        config = read_json(folder / "config.json", name)
        config = config.get("pretrained_cfg", config)
        architecture = f"local-dir:{folder}"
    else:
        _known(timm, model, name)
        registered = timm.get_pretrained_cfg(model, allow_unregistered=True)
        config = registered.to_dict() if registered else {}
        architecture = model
    heads = config.get("classifier") or "head"
    heads = (heads,) if isinstance(heads, str) else tuple(heads)
    state = {
        key: value
        for key, value in read_weights(file, name).items()
        if not key.startswith(tuple(f"{head}." for head in heads))
    }
    overlay: dict[str, Any] = {
        "state_dict": state,
        "source": None,
        "file": None,
        "custom_load": False,
        # With unequal class counts timm loads loosely and leaves missing weights random.
        "num_classes": 0,
        "label_offset": 0,
    }
    arguments: dict[str, Any] = {
        "pretrained": True,
        "num_classes": 0,
        "pretrained_cfg_overlay": overlay,
    }
    # At its native size a model runs as it is; that size need not be a multiple of the patch.
    if input_size is None or input_size != (config.get("input_size") or (None,))[-1]:
        arguments["dynamic_img_size"] = True
    try:
        try:
            network = timm.create_model(architecture, **arguments)
        except TypeError as error:
            if arguments.pop("dynamic_img_size", None) is None or "dynamic_img_size" not in str(
                error
            ):
                raise
            network = timm.create_model(architecture, **arguments)
    except (RuntimeError, TypeError, KeyError, ValueError) as error:
        raise UserError(
            f"teacher {name!r}: {file} does not fit timm model {model!r}: {one_line(error)}"
        ) from error
    network.pretrained_cfg["state_dict"] = None  # else the weights stay in memory twice
    return network.eval()


def _patch_size(network: nn.Module) -> int:
    """Pixels per token, counting the strides of a convolutional stem."""
    embed = network.patch_embed
    return embed.feat_ratio() if hasattr(embed, "feat_ratio") else embed.patch_size[0]


class TokenTower(nn.Module):
    """A timm model of prefix and patch tokens (``VisionTransformer``, ``Eva``).

    The summary is the class token after the final norm, where there is one, as DINO and CLIP mean
    it (timm pools DINOv3 by averaging unless told otherwise); else the model's own pooled output,
    e.g. SigLIP's attention pool.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.prefix = network.num_prefix_tokens
        self.patch_size = _patch_size(network)
        self.class_token = (
            getattr(network, "cls_token", None) is not None
            and getattr(network, "attn_pool", None) is None
            and not isinstance(network.norm, nn.Identity)
        )

    def tokens(self, x: Tensor) -> Tensor:
        return self.network.forward_features(x)

    def pool(self, tokens: Tensor) -> Tensor:
        if self.class_token:
            return tokens[:, 0]
        return self.network.forward_head(tokens, pre_logits=True)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.network.forward_features(x)
        return self.pool(tokens), as_grid(tokens[:, self.prefix :], x, self.patch_size)


class SamTower(nn.Module):
    """The image encoder of Segment Anything (arXiv 2304.02643): the neck's map, no summary."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> tuple[None, Tensor]:
        return None, self.network.forward_features(x).permute(0, 2, 3, 1)
