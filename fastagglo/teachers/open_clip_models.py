"""Image towers of open_clip as teachers: CLIP and SigLIP."""

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
from fastagglo.teachers.timm_models import TokenTower
from fastagglo.teachers.weights import (
    existing,
    find_weights,
    hub_folder,
    one_line,
    read_json,
)

WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin", "model.safetensors")
CONFIG = "open_clip_config.json"


def load_open_clip(
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
    open_clip = require("open_clip", extra="teachers", purpose=f"teacher {name!r}")
    path, tag = _locate(open_clip, model, checkpoint, name, allow_download)
    file = find_weights(path, WEIGHTS, name)
    folder = path if path.is_dir() else path.parent
    if (folder / CONFIG).is_file():
        config = read_json(folder / CONFIG, name)
        architecture, preprocess = config.get("model_cfg", {}), config.get("preprocess_cfg", {})
    else:
        architecture = open_clip.get_model_config(model)
        preprocess = tag or _first_tag(open_clip, model)
    if not architecture:
        raise TeacherSettingError(
            f"teacher {name!r}: open_clip has no model {model!r} and there is no {CONFIG} beside "
            f"the weights; open_clip.list_models() shows the names"
        )
    if tag.get("quick_gelu"):
        architecture["quick_gelu"] = True  # as these weights were trained, whatever the name says
    clip = _build(open_clip, architecture, file, input_size, name)
    visual = clip.visual
    tower: nn.Module
    if hasattr(visual, "trunk"):
        if not hasattr(visual.trunk, "num_prefix_tokens"):
            raise TeacherSettingError(
                f"teacher {name!r}: the image tower of {model!r} is a "
                f"{type(visual.trunk).__name__}; teachers are vision transformers"
            )
        tower = TrunkTower(visual, TokenTower(visual.trunk))
        patch, channels = tower.trunk.patch_size, visual.trunk.embed_dim
    elif hasattr(visual, "output_tokens") and visual.attn_pool is None:
        tower = ClipTower(visual)
        patch, channels = visual.patch_size[0], visual.ln_post.normalized_shape[0]
    else:
        raise TeacherSettingError(
            f"teacher {name!r}: the image tower of {model!r} gives no map of patch tokens "
            f"(a residual network or CoCa's pooled queries); teachers are CLIP and SigLIP "
            f"vision transformers"
        )
    size, native = visual.image_size[0], architecture["vision_cfg"].get("image_size", 224)
    spec = TeacherSpec(
        name,
        fixed_size(name, size, None, patch, usual=native),
        patch,
        patch,
        tuple(preprocess.get("mean") or open_clip.OPENAI_DATASET_MEAN),
        tuple(preprocess.get("std") or open_clip.OPENAI_DATASET_STD),
        architecture["embed_dim"] if summary else None,
        channels,
    )
    return Teacher(spec, tower, dtype)


def _locate(
    open_clip: ModuleType,
    model: str,
    checkpoint: str | Path | None,
    name: str,
    allow_download: bool,
) -> tuple[Path, dict[str, Any]]:
    """Folder or file of the weights, and what open_clip knows of them if they are a tag of its."""
    if model.startswith("hf-hub:") and checkpoint is None:
        repo, tag = model.removeprefix("hf-hub:"), {}
    else:
        tags = open_clip.list_pretrained_tags_by_model(model)
        tag = open_clip.get_pretrained_cfg(model, str(checkpoint)) if checkpoint else {}
        if checkpoint is None:
            raise TeacherSettingError(
                f"teacher {name!r}: open_clip weights of {model!r}: set checkpoint to a folder, a "
                f"file or one of open_clip's names ({', '.join(tags) or 'it has none'})"
            )
        if not tag:
            return existing(checkpoint, name), {}
        repo = tag.get("hf_hub", "").split("/")
        if len(repo) < 2:
            raise UserError(
                f"teacher {name!r}: download {tag.get('url')} on a connected machine and set "
                f"checkpoint to the file"
            )
        repo = "/".join(repo[:2])
    folder = hub_folder(repo, WEIGHTS[:2], (CONFIG,), name=name, allow_download=allow_download)
    return folder, tag


def _first_tag(open_clip: ModuleType, model: str) -> dict[str, Any]:
    """Preprocessing of an architecture's first published weights.

    A lone weight file does not say how its images were normalised; all of SigLIP's weights agree,
    and nearly all of CLIP's.
    """
    tags = open_clip.list_pretrained_tags_by_model(model)
    return open_clip.get_pretrained_cfg(model, tags[0]) if tags else {}


def _build(
    open_clip: ModuleType,
    architecture: dict[str, Any],
    file: Path,
    input_size: int | None,
    name: str,
) -> nn.Module:
    """The model with all its weights; their position table is resized to ``input_size``."""
    arguments = {key: value for key, value in architecture.items() if key != "custom_text"}
    # All weights come from the file: the towers must not fetch weights of their own.
    vision = arguments["vision_cfg"] = {**architecture["vision_cfg"]}
    text = arguments["text_cfg"] = {**architecture["text_cfg"]}
    custom = architecture.get("custom_text", False) or "hf_model_name" in text
    vision["timm_model_pretrained"] = text["hf_model_pretrained"] = False
    if input_size is not None:
        vision["image_size"] = input_size
    try:
        clip = (open_clip.CustomTextCLIP if custom else open_clip.CLIP)(**arguments)
        open_clip.load_checkpoint(clip, str(file), strict=True, weights_only=True)
        if input_size is not None and hasattr(clip.visual, "trunk"):
            clip.visual.set_input_size(input_size)
    except Exception as error:
        raise UserError(
            f"teacher {name!r}: {file} does not fit this open_clip model: {one_line(error)}"
        ) from error
    return clip.eval()


class ClipTower(nn.Module):
    """open_clip's own vision transformer: projected image embedding and last patch tokens."""

    def __init__(self, visual: nn.Module) -> None:
        super().__init__()
        visual.output_tokens = True
        self.visual = visual

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        summary, tokens = self.visual(x)
        return summary, as_grid(tokens, x, self.visual.patch_size[0])


class TrunkTower(nn.Module):
    """A timm trunk under open_clip (SigLIP): pooled and projected embedding, patch tokens."""

    def __init__(self, visual: nn.Module, trunk: nn.Module) -> None:
        super().__init__()
        self.head = visual.head
        self.trunk = trunk

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        network = self.trunk.network
        tokens = network.forward_features(x)
        spatial = as_grid(tokens[:, self.trunk.prefix :], x, self.trunk.patch_size)
        return self.head(network.forward_head(tokens)), spatial
