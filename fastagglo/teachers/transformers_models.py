"""transformers models as teachers: CLIP, SigLIP(2), DINOv2, DINOv3, SAM, SAM 3, plain ViT."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
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

Colour = tuple[float, float, float]
# The constants that each family's image processor publishes, for weights that come without one.
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

# Model type -> class of its image tower and the colours that its processor subtracts.
FAMILIES = {
    "clip": ("CLIPVisionModelWithProjection", CLIP),
    "clip_vision_model": ("CLIPVisionModel", CLIP),
    "siglip": ("SiglipVisionModel", HALF),
    "siglip_vision_model": ("SiglipVisionModel", HALF),
    "siglip2": ("Siglip2VisionModel", HALF),
    "siglip2_vision_model": ("Siglip2VisionModel", HALF),
    "dinov2": ("Dinov2Model", IMAGENET),
    "dinov2_with_registers": ("Dinov2WithRegistersModel", IMAGENET),
    "dinov3_vit": ("DINOv3ViTModel", IMAGENET),
    "sam": ("SamVisionModel", IMAGENET),
    "sam_vision_model": ("SamVisionModel", IMAGENET),
    "sam3": ("Sam3ViTModel", HALF),
    "sam3_video": ("Sam3ViTModel", HALF),
    "sam3_vision_model": ("Sam3ViTModel", HALF),
    "sam3_vit_model": ("Sam3ViTModel", HALF),
    "vit": ("ViTModel", HALF),
}
WEIGHTS = ("model.safetensors",)


def load_transformers(
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
    transformers = require("transformers", extra="teachers", purpose=f"teacher {name!r}")
    if checkpoint is None and Path(model).expanduser().is_dir():
        checkpoint = model
    file: Path | None = None
    if checkpoint is None:
        folder = hub_folder(
            model,
            (*WEIGHTS, "model-*.safetensors"),
            ("config.json", "preprocessor_config.json", "*.safetensors.index.json"),
            name=name,
            allow_download=allow_download,
        )
    else:
        folder = existing(checkpoint, name)
        if folder.is_file():
            file, folder = folder, folder.parent
            if not (folder / "config.json").is_file() and Path(model).is_dir():
                folder = Path(model)  # weights alone: the configuration is the model's
    config = read_json(folder / "config.json", name)
    kind = config.get("model_type")
    if kind not in FAMILIES:
        raise TeacherSettingError(
            f"teacher {name!r}: model_type {kind!r} in {folder / 'config.json'} is none of "
            f"{', '.join(FAMILIES)}"
        )
    class_name, colours = FAMILIES[kind]
    if "CLIPVisionModelWithProjection" in (config.get("architectures") or ()):
        class_name = "CLIPVisionModelWithProjection"
    network = _load(transformers, class_name, folder, file, dtype, name)
    mean, std = _colours(folder, name) or colours
    return Teacher(*_describe(network, kind, name, input_size, mean, std, summary), dtype)


def _load(
    transformers: ModuleType,
    class_name: str,
    folder: Path,
    file: Path | None,
    dtype: torch.dtype,
    name: str,
) -> nn.Module:
    """The image tower with all of its weights."""
    where = file or folder
    options: dict[str, Any] = {"add_pooling_layer": False} if class_name == "ViTModel" else {}
    with _quiet(transformers):
        try:
            config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
            if class_name == "CLIPVisionModelWithProjection" and hasattr(config, "vision_config"):
                # The whole model's width holds; the vision part of some files repeats a default.
                config.vision_config.projection_dim = config.projection_dim
            for part in ("detector_config", "vision_config", "backbone_config"):
                config = getattr(config, part, config)
            state = read_weights(file, name) if file else None
            if class_name == "Sam3ViTModel":
                state = _sam3_backbone(
                    state or read_weights(find_weights(folder, WEIGHTS, name), name)
                )
            network, report = getattr(transformers, class_name).from_pretrained(
                None if state else folder,
                config=config,
                state_dict=state,
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
                dtype=dtype,
                **options,
            )
        except UserError:
            raise
        except Exception as error:  # the library raises many kinds for a folder that is not right
            raise UserError(
                f"teacher {name!r}: cannot load {class_name} from {where} (safetensors only): "
                f"{one_line(error)}"
            ) from error
    # The library fills missing weights with random numbers and goes on.
    lacking = sorted({*report["missing_keys"], *report.get("mismatched_keys", ())}, key=str)
    if lacking:
        raise UserError(
            f"teacher {name!r}: {where} lacks {len(lacking)} weights of {class_name}, e.g. "
            f"{lacking[0]}; is it another model, or saved incompletely?"
        )
    return network.eval()


def _sam3_backbone(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of SAM 3's vision transformer, wherever they are in the whole model's."""
    landmark = "embeddings.patch_embeddings.projection.weight"
    prefix = next((k.removesuffix(landmark) for k in state if k.endswith(landmark)), "")
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


@contextmanager
def _quiet(transformers: ModuleType) -> Iterator[None]:
    """No progress bars, nor a report of the text tower's unused weights, while loading."""
    log = transformers.utils.logging
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()


def _colours(folder: Path, name: str) -> tuple[Colour, Colour] | None:
    """Mean and standard deviation that the image processor beside the weights subtracts."""
    for file, key in (
        ("preprocessor_config.json", None),
        ("processor_config.json", "image_processor"),
    ):
        if not (folder / file).is_file():
            continue
        content = read_json(folder / file, name)
        content = content.get(key, {}) if key else content
        if content.get("do_normalize") is False:
            return (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
        if content.get("image_mean") and content.get("image_std"):
            return tuple(content["image_mean"]), tuple(content["image_std"])
    return None


def _describe(
    network: nn.Module,
    kind: str,
    name: str,
    input_size: int | None,
    mean: Colour,
    std: Colour,
    summary: bool,
) -> tuple[TeacherSpec, nn.Module]:
    config = network.config
    patch = config.patch_size
    width: int | None = config.hidden_size
    channels = config.hidden_size
    native: int | None = None
    tower: nn.Module
    if kind.startswith("sam"):
        width, native = None, config.image_size
        if kind.startswith("sam3"):
            tower = TokenTower(network, kind, patch)
        else:
            tower, channels = SamTower(network), config.output_channels
    elif kind.startswith("siglip2"):
        tower = NaFlexTower(network, patch)
        width = width if config.vision_use_head else None
    else:
        tower = TokenTower(network, kind, patch)
        if kind.startswith("siglip") and not config.vision_use_head:
            width = None
        elif hasattr(network, "visual_projection"):
            width = config.projection_dim
    spec = TeacherSpec(
        name,
        fixed_size(name, input_size, native, patch, getattr(config, "image_size", None)),
        patch,
        patch,
        mean,
        std,
        width if summary else None,
        channels,
    )
    return spec, tower


class TokenTower(nn.Module):
    """Class token or pooled embedding as summary; the last layer's patch tokens as map."""

    def __init__(self, network: nn.Module, kind: str, patch_size: int) -> None:
        super().__init__()
        self.network = network
        self.patch_size = patch_size
        registers = getattr(network.config, "num_register_tokens", 0)
        self.prefix = 0 if kind.startswith(("siglip", "sam3")) else 1 + registers
        # The DINO families adapt to any size by themselves and do not know the argument.
        resizes = kind.startswith(("clip", "siglip", "vit"))
        self.options = {"interpolate_pos_encoding": True} if resizes else {}

    def forward(self, x: Tensor) -> tuple[Tensor | None, Tensor]:
        output = self.network(pixel_values=x, **self.options)
        tokens = output.last_hidden_state
        summary = getattr(output, "image_embeds", None)  # CLIP with its projection
        if summary is None:
            summary = getattr(output, "pooler_output", None)
        if summary is None and self.prefix:
            summary = tokens[:, 0]  # a plain ViT
        return summary, as_grid(tokens[:, self.prefix :], x, self.patch_size)


class NaFlexTower(nn.Module):
    """SigLIP 2 in its variable-aspect form (arXiv 2502.14786), which takes flattened patches."""

    def __init__(self, network: nn.Module, patch_size: int) -> None:
        super().__init__()
        self.network = network
        self.patch_size = patch_size

    def forward(self, x: Tensor) -> tuple[Tensor | None, Tensor]:
        p = self.patch_size
        patches = x.unflatten(3, (-1, p)).unflatten(2, (-1, p))  # (N, C, h, p, w, p)
        patches = patches.permute(0, 2, 4, 3, 5, 1)
        count, rows, columns = patches.shape[:3]
        patches = patches.reshape(count, rows * columns, -1)
        output = self.network(
            pixel_values=patches,
            pixel_attention_mask=None,  # no padding: every patch is an image's own
            spatial_shapes=torch.tensor([(rows, columns)] * count),  # read on the CPU, row by row
        )
        return output.pooler_output, as_grid(output.last_hidden_state, x, p)


class SamTower(nn.Module):
    """The image encoder of Segment Anything (arXiv 2304.02643): the neck's map, no summary."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> tuple[None, Tensor]:
        return None, self.network(pixel_values=x).last_hidden_state.permute(0, 2, 3, 1)
