"""timm's vision transformers: tiny models of each family, saved, loaded, compared by hand."""

from __future__ import annotations

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from fastagglo.errors import UserError
from fastagglo.teachers import load_teacher

TINY = {"depth": 2, "embed_dim": 32, "num_heads": 2}
CLIP, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)

# family: architecture, extra arguments, prefix tokens, mean, std, patch
FAMILIES = {
    "clip": ("vit_base_patch16_clip_224", {"img_size": 64}, 1, CLIP, CLIP_STD, 16),
    "siglip2": ("vit_base_patch16_siglip_256", {"img_size": 64}, 0, HALF, HALF, 16),
    "siglip gap": ("vit_base_patch16_siglip_gap_256", {"img_size": 64}, 0, HALF, HALF, 16),
    "dinov2": ("vit_small_patch14_reg4_dinov2", {"img_size": 56}, 5, IMAGENET, IMAGENET_STD, 14),
    "dinov3": ("vit_small_patch16_dinov3", {"img_size": 64}, 5, IMAGENET, IMAGENET_STD, 16),
    "eva02": ("eva02_tiny_patch14_224", {"img_size": 56}, 1, CLIP, CLIP_STD, 14),
}


def randomise(model: nn.Module) -> nn.Module:
    """Weights away from their initial zeros and ones: every one of them must matter."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def normalise(images: torch.Tensor, mean, std) -> torch.Tensor:
    return (images - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def saved(tmp_path, architecture: str, **arguments) -> nn.Module:
    model = randomise(timm.create_model(architecture, **TINY, **arguments))
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    return model


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_features_are_the_models_own(family, tmp_path):
    architecture, arguments, prefix, mean, std, patch = FAMILIES[family]
    model = saved(tmp_path, architecture, num_classes=7, **arguments)
    teacher = load_teacher("timm", architecture, name=family, checkpoint=tmp_path)
    size = arguments["img_size"]
    images = torch.rand(2, 3, size, size)
    features = teacher(images)
    tokens = model.forward_features(normalise(images, mean, std))
    summary = (
        tokens[:, 0]
        if family in ("clip", "dinov2", "dinov3")
        else model.forward_head(tokens, pre_logits=True)
    )
    spatial = tokens[:, prefix:].reshape(2, size // patch, size // patch, 32)
    torch.testing.assert_close(features.summary, summary)
    torch.testing.assert_close(features.spatial, spatial)
    spec = teacher.spec
    assert (spec.name, spec.patch_size, spec.multiple, spec.input_size) == (
        family,
        patch,
        patch,
        None,
    )
    assert (spec.summary, spec.spatial) == (32, 32)
    # Another, oblong size: the positions are resized.
    oblong = (size + patch, size - patch)
    features = teacher(torch.rand(1, 3, *oblong))
    assert features.spatial.shape == (1, *spec.grid(oblong), 32)
    with pytest.raises(ValueError, match=f"multiples of {patch} pixels; got {size + 1} x {size}"):
        teacher(torch.rand(1, 3, size + 1, size))
    assert not any(p.requires_grad for p in teacher.train().parameters())
    assert not teacher.tower.training


@torch.no_grad()
def test_sam_gives_its_neck_and_no_summary(tmp_path):
    model = saved(tmp_path, "samvit_base_patch16", img_size=64, global_attn_indexes=(1,))
    teacher = load_teacher("timm", "samvit_base_patch16", checkpoint=tmp_path)
    images = torch.rand(2, 3, 64, 64)
    features = teacher(images)
    expected = model.forward_features(normalise(images, IMAGENET, IMAGENET_STD))
    torch.testing.assert_close(features.spatial, expected.permute(0, 2, 3, 1))
    assert features.summary is None
    assert (teacher.spec.summary, teacher.spec.spatial) == (None, 256)
    assert teacher(torch.rand(1, 3, 96, 64)).spatial.shape == (1, 6, 4, 256)
    assert load_teacher(
        "timm", "samvit_base_patch16", checkpoint=tmp_path, input_size=128
    ).spec.accepts.startswith("128 x 128")


@torch.no_grad()
@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_lone_weight_file_of_a_named_model(suffix, tmp_path):
    model = randomise(timm.create_model("test_vit"))
    file = tmp_path / f"weights.{suffix}"
    if suffix == "pth":
        torch.save({"state_dict": model.state_dict()}, file)
    else:
        save_file(model.state_dict(), file)
    teacher = load_teacher("timm", "test_vit", checkpoint=str(file), dtype=torch.bfloat16)
    exact = load_teacher("timm", "test_vit", checkpoint=file)
    images = torch.rand(1, 3, 160, 160)
    expected = model.forward_features(normalise(images, exact.spec.mean, exact.spec.std))
    torch.testing.assert_close(exact(images).summary, expected[:, 0])
    torch.testing.assert_close(exact(images).spatial.flatten(1, 2), expected[:, 1:])
    error = (teacher(images).spatial - exact(images).spatial).norm() / exact(images).spatial.norm()
    assert 1e-4 < error < 0.05


@torch.no_grad()
def test_native_size_that_the_patch_does_not_divide(tmp_path):
    """SigLIP-SO400M's 384 px with patches of 14: the remainder is cut off, as in its training."""
    model = saved(tmp_path, "vit_base_patch16_siglip_256", img_size=70)
    images = torch.rand(1, 3, 70, 70)
    teacher = load_teacher("timm", "siglip", checkpoint=tmp_path, input_size=70)
    assert teacher.spec.input_size == 70
    expected = model.forward_features(normalise(images, HALF, HALF))
    torch.testing.assert_close(teacher(images).spatial.flatten(1, 2), expected)
    with pytest.raises(ValueError, match="input_size=71 is not a positive multiple of 16"):
        load_teacher("timm", "siglip", checkpoint=tmp_path, input_size=71)


@torch.no_grad()
def test_model_that_cannot_resize_is_fixed(tmp_path):
    saved(tmp_path, "beit_base_patch16_224")
    teacher = load_teacher("timm", "beit", checkpoint=tmp_path)
    assert teacher.spec.accepts == "224 x 224 pixels"
    assert teacher(torch.rand(1, 3, 224, 224)).spatial.shape == (1, 14, 14, 32)
    with pytest.raises(ValueError, match="accepts 224 x 224 pixels; got 256 x 256"):
        teacher(torch.rand(1, 3, 256, 256))
    with pytest.raises(ValueError, match="it takes 224 only"):
        load_teacher("timm", "beit", checkpoint=tmp_path, input_size=256)


def test_weights_that_lack_something_are_refused(tmp_path):
    """timm would leave what is missing random, and go on."""
    state = timm.create_model("test_vit").state_dict()
    del state["blocks.0.attn.qkv.weight"]
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(
        UserError, match=r"does not fit timm model 'test_vit': .*attn\.qkv"
    ) as caught:
        load_teacher("timm", "test_vit", checkpoint=tmp_path)
    assert "\n" not in str(caught.value)


def test_other_architectures_and_unknown_names(tmp_path):
    model = timm.create_model("test_resnet")
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="is a ResNet; teachers are plain vision"):
        load_teacher("timm", "test_resnet", checkpoint=tmp_path)
    with pytest.raises(ValueError, match="no model 'vit_smal_patch14'"):
        load_teacher("timm", "vit_smal_patch14")
    with pytest.raises(UserError, match="publishes no weights"):
        load_teacher("timm", "vit_small_patch16_36x1_224")
