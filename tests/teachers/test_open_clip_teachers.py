"""open_clip's image towers: tiny CLIP and SigLIP models, saved, loaded, compared by hand."""

from __future__ import annotations

import copy
import json

import open_clip
import pytest
import torch
from safetensors.torch import save_file

from fastagglo.errors import UserError
from fastagglo.teachers import load_teacher

TEXT = {"context_length": 8, "vocab_size": 32, "width": 16, "heads": 2, "layers": 1}
CLIP = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 64, "layers": 2, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": TEXT,
}
SIGLIP = {
    "embed_dim": 64,
    "init_logit_bias": -10,
    "custom_text": True,
    "vision_cfg": {
        "image_size": 160,
        "timm_model_name": "test_vit",
        "timm_model_pretrained": True,  # must not be fetched
        "timm_pool": "avg",
        "timm_proj": "linear",
    },
    "text_cfg": TEXT,
}
MEAN, STD = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)


def build(config: dict) -> torch.nn.Module:
    config = copy.deepcopy(config)
    config["vision_cfg"].pop("timm_model_pretrained", None)
    custom = config.pop("custom_text", False)
    model = (open_clip.CustomTextCLIP if custom else open_clip.CLIP)(**config).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def save(model, config: dict, folder) -> None:
    state = {key: value.clone().contiguous() for key, value in model.state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors")
    preprocess = {"mean": MEAN, "std": STD}
    text = json.dumps({"model_cfg": config, "preprocess_cfg": preprocess})
    (folder / "open_clip_config.json").write_text(text)


def normalise(images, mean=MEAN, std=STD):
    return (images - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


@torch.no_grad()
@pytest.mark.parametrize("pool", ["tok", "avg"])
def test_clip_embedding_and_patch_tokens(pool, tmp_path):
    config = copy.deepcopy(CLIP)
    config["vision_cfg"]["pool_type"] = pool
    model = build(config)
    save(model, config, tmp_path)
    teacher = load_teacher("open_clip", "tiny", checkpoint=tmp_path)
    images = torch.rand(2, 3, 64, 64)
    features = teacher(images)
    torch.testing.assert_close(features.summary, model.encode_image(normalise(images)))
    visual = model.visual
    tokens = visual.ln_post(visual.transformer(visual._embeds(normalise(images))))[:, 1:]
    torch.testing.assert_close(features.spatial, tokens.reshape(2, 4, 4, 32))
    spec = teacher.spec
    assert (spec.summary, spec.spatial, spec.patch_size, spec.input_size) == (24, 32, 16, 64)
    assert spec.mean == MEAN
    with pytest.raises(ValueError, match="accepts 64 x 64 pixels; got 96 x 64"):
        teacher(torch.rand(1, 3, 96, 64))
    # The text tower is no part of the teacher.
    assert sum(p.numel() for p in teacher.parameters()) == sum(
        p.numel() for p in visual.parameters()
    )
    assert not any(p.requires_grad for p in teacher.parameters())
    half = load_teacher("open_clip", "tiny", checkpoint=tmp_path, dtype="bf16")(images)
    assert 1e-4 < (half.summary - features.summary).norm() / features.summary.norm() < 0.05


@torch.no_grad()
def test_pinned_size_resizes_the_positions(tmp_path):
    save(build(CLIP), CLIP, tmp_path)
    teacher = load_teacher("open_clip", "tiny", checkpoint=tmp_path, input_size=96)
    assert teacher(torch.rand(1, 3, 96, 96)).spatial.shape == (1, 6, 6, 32)
    resized = open_clip.create_model(f"local-dir:{tmp_path}", force_image_size=96).eval()
    images = torch.rand(1, 3, 96, 96)
    torch.testing.assert_close(teacher(images).summary, resized.encode_image(normalise(images)))
    with pytest.raises(ValueError, match="input_size=100 is not a positive multiple of 16"):
        load_teacher("open_clip", "tiny", checkpoint=tmp_path, input_size=100)


@torch.no_grad()
def test_siglip_has_a_timm_trunk(tmp_path):
    model = build(SIGLIP)
    save(model, SIGLIP, tmp_path)
    teacher = load_teacher("open_clip", "tiny", checkpoint=tmp_path)
    images = torch.rand(2, 3, 160, 160)
    features = teacher(images)
    torch.testing.assert_close(features.summary, model.encode_image(normalise(images)))
    tokens = model.visual.trunk.forward_features(normalise(images))
    torch.testing.assert_close(features.spatial, tokens[:, 1:].reshape(2, 10, 10, 64))
    assert (teacher.spec.summary, teacher.spec.spatial) == (64, 64)
    pinned = load_teacher("open_clip", "tiny", checkpoint=tmp_path, input_size=192)
    assert pinned(torch.rand(1, 3, 192, 192)).spatial.shape == (1, 12, 12, 64)


@torch.no_grad()
def test_lone_file_of_a_named_model(tmp_path):
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "tiny-clip.json").write_text(json.dumps(CLIP))
    open_clip.add_model_config(tmp_path / "config")
    model = build(CLIP)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    teacher = load_teacher("open_clip", "tiny-clip", checkpoint=tmp_path / "weights.pth")
    images = torch.rand(1, 3, 64, 64)
    mean, std = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
    expected = model.encode_image(normalise(images, mean, std))
    torch.testing.assert_close(teacher(images).summary, expected)


def test_what_cannot_be_loaded(tmp_path):
    with pytest.raises(ValueError, match=r"set checkpoint to a folder, a file or one of .*dfn5b"):
        load_teacher("open_clip", "ViT-H-14-378-quickgelu")
    with pytest.raises(UserError, match="hf download apple/DFN5B-CLIP-ViT-H-14-378"):
        load_teacher("open_clip", "ViT-H-14-378-quickgelu", checkpoint="dfn5b")
    with pytest.raises(UserError, match="hf download org/model"):
        load_teacher("open_clip", "hf-hub:org/model")
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"no model 'nonsense' and there is no open_clip_config"):
        load_teacher("open_clip", "nonsense", checkpoint=tmp_path)
    with pytest.raises(UserError, match="does not fit this open_clip model"):
        load_teacher("open_clip", "ViT-S-32-alt", checkpoint=tmp_path)
    resnet = {**CLIP, "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8}}
    save(build(resnet), resnet, tmp_path)
    with pytest.raises(ValueError, match="gives no map of patch tokens"):
        load_teacher("open_clip", "tiny", checkpoint=tmp_path)
