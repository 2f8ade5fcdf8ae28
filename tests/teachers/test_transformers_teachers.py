"""Hugging Face families: tiny models of the real classes, saved, loaded, compared by hand."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastagglo.errors import UserError
from fastagglo.teachers import load_teacher

TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "patch_size": 8,
    "image_size": 32,
}
DINO = {k: v for k, v in TINY.items() if k != "intermediate_size"}
TEXT = {**TINY, "vocab_size": 40, "max_position_embeddings": 8}
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def randomise(model: nn.Module) -> nn.Module:
    """Weights away from their initial zeros and ones: every one of them must matter."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def normalise(images: Tensor, colours) -> Tensor:
    mean, std = (torch.tensor(c).view(3, 1, 1) for c in colours)
    return (images - mean) / std


def clip():
    # As in some published files, the vision part's own projection_dim is not the model's.
    config = transformers.CLIPConfig(
        text_config=TEXT, vision_config={**TINY, "projection_dim": 512}, projection_dim=24
    )
    return transformers.CLIPModel(config)


def siglip():
    return transformers.SiglipModel(
        transformers.SiglipConfig(text_config={**TEXT, "projection_size": 32}, vision_config=TINY)
    )


# family: the saved model, prefix tokens, summary width, colours; and its features by hand
def by_hand_clip(model, x):
    out = model.vision_model(pixel_values=x, interpolate_pos_encoding=True)
    return model.visual_projection(out.pooler_output), out.last_hidden_state[:, 1:]


def by_hand_pooled(prefix, **options):
    def run(model, x):
        model = getattr(model, "vision_model", model)
        out = model(pixel_values=x, **options)
        return out.pooler_output, out.last_hidden_state[:, prefix:]

    return run


def by_hand_class_token(prefix, **options):
    def run(model, x):
        tokens = model(pixel_values=x, **options).last_hidden_state
        return tokens[:, 0], tokens[:, prefix:]

    return run


RESIZE = {"interpolate_pos_encoding": True}
FAMILIES = {
    "clip": (clip, by_hand_clip, 24, CLIP),
    "clip_vision": (
        lambda: transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**TINY)),
        by_hand_pooled(1, **RESIZE),
        32,
        CLIP,
    ),
    "siglip": (siglip, by_hand_pooled(0, **RESIZE), 32, HALF),
    "siglip_vision": (
        lambda: transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**TINY)),
        by_hand_pooled(0, **RESIZE),
        32,
        HALF,
    ),
    "dinov2": (
        lambda: transformers.Dinov2Model(transformers.Dinov2Config(**DINO)),
        by_hand_class_token(1),
        32,
        IMAGENET,
    ),
    "dinov2_with_registers": (
        lambda: transformers.Dinov2WithRegistersModel(
            transformers.Dinov2WithRegistersConfig(**DINO, num_register_tokens=4)
        ),
        by_hand_class_token(5),
        32,
        IMAGENET,
    ),
    "dinov3_vit": (
        lambda: transformers.DINOv3ViTModel(
            transformers.DINOv3ViTConfig(**TINY, num_register_tokens=4)
        ),
        by_hand_class_token(5),
        32,
        IMAGENET,
    ),
    "vit": (
        lambda: transformers.ViTForImageClassification(transformers.ViTConfig(**TINY)),
        lambda model, x: by_hand_class_token(1, **RESIZE)(model.vit, x),
        32,
        HALF,
    ),
}


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_features_are_the_models_own(family, tmp_path):
    build, by_hand, width, colours = FAMILIES[family]
    model = randomise(build())
    model.save_pretrained(tmp_path)
    teacher = load_teacher("transformers", family, checkpoint=tmp_path)
    spec = teacher.spec
    assert (spec.summary, spec.spatial) == (width, 32)
    assert (spec.patch_size, spec.multiple, spec.input_size) == (8, 8, None)
    for height, width_px in ((32, 32), (40, 24)):  # native, and another, oblong one
        images = torch.rand(2, 3, height, width_px)
        features = teacher(images)
        summary, tokens = by_hand(model, normalise(images, colours))
        torch.testing.assert_close(features.summary, summary)
        torch.testing.assert_close(
            features.spatial, tokens.reshape(2, height // 8, width_px // 8, 32)
        )
    with pytest.raises(ValueError, match="multiples of 8 pixels; got 33 x 32"):
        teacher(torch.rand(1, 3, 33, 32))
    assert not any(p.requires_grad for p in teacher.train().parameters())
    assert not teacher.tower.network.training
    half = load_teacher("transformers", family, checkpoint=tmp_path, dtype="bf16")
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    error = (half(images).spatial - features.spatial).norm() / features.spatial.norm()
    assert 1e-4 < error < 0.05


@torch.no_grad()
@pytest.mark.parametrize("part", ["whole", "vision"])
def test_siglip2_takes_flattened_patches(part, tmp_path):
    vision = {**{k: v for k, v in TINY.items() if k != "image_size"}, "num_patches": 16}
    if part == "whole":
        config = transformers.Siglip2Config(
            text_config={**TEXT, "projection_size": 32}, vision_config=vision
        )
        model = randomise(transformers.Siglip2Model(config))
    else:
        model = randomise(
            transformers.Siglip2VisionModel(transformers.Siglip2VisionConfig(**vision))
        )
    model.save_pretrained(tmp_path)
    teacher = load_teacher("transformers", "siglip2", checkpoint=tmp_path)
    images = torch.rand(2, 3, 40, 24)
    features = teacher(images)

    from transformers.models.siglip2.image_processing_siglip2 import convert_image_to_patches

    patches = [convert_image_to_patches(image, 8) for image in normalise(images, HALF)]
    expected = getattr(model, "vision_model", model)(
        pixel_values=torch.stack(patches),
        pixel_attention_mask=torch.ones(2, 15, dtype=torch.int32),
        spatial_shapes=torch.tensor([[5, 3], [5, 3]]),
    )
    torch.testing.assert_close(features.summary, expected.pooler_output)
    torch.testing.assert_close(features.spatial, expected.last_hidden_state.reshape(2, 5, 3, 32))
    assert teacher.spec.accepts == "height and width in multiples of 8 pixels"


@torch.no_grad()
@pytest.mark.parametrize("part", ["whole", "vision"])
def test_sam_gives_its_neck_and_no_summary(part, tmp_path):
    vision = transformers.SamVisionConfig(
        hidden_size=32,
        mlp_dim=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=64,
        patch_size=16,
        window_size=2,
        global_attn_indexes=[1],
        output_channels=20,
    )
    if part == "whole":
        config = transformers.SamConfig(
            vision_config=vision.to_dict(),
            prompt_encoder_config={"hidden_size": 20, "image_size": 64},
            mask_decoder_config={"hidden_size": 20, "mlp_dim": 16, "num_attention_heads": 2},
        )
        model = randomise(transformers.SamModel(config))
    else:
        model = randomise(transformers.SamVisionModel(vision))
    model.save_pretrained(tmp_path)
    teacher = load_teacher("transformers", "sam", checkpoint=tmp_path)
    images = torch.rand(2, 3, 64, 64)
    features = teacher(images)
    expected = model.vision_encoder(normalise(images, IMAGENET)).last_hidden_state
    torch.testing.assert_close(features.spatial, expected.permute(0, 2, 3, 1))
    assert features.spatial.shape == (2, 4, 4, 20)
    assert features.summary is None
    assert (teacher.spec.input_size, teacher.spec.summary, teacher.spec.spatial) == (64, None, 20)
    with pytest.raises(ValueError, match="accepts 64 x 64 pixels; got 128 x 128"):
        teacher(torch.rand(1, 3, 128, 128))
    with pytest.raises(ValueError, match="input_size=128, but it takes 64 only"):
        load_teacher("transformers", "sam", checkpoint=tmp_path, input_size=128)


@torch.no_grad()
@pytest.mark.parametrize("whole", [False, True])
def test_sam3_gives_its_backbone(whole, tmp_path):
    backbone = transformers.Sam3ViTConfig(
        **{**TINY, "image_size": 64, "hidden_size": 64},
        window_size=4,
        global_attn_indexes=[1],
        pretrain_image_size=32,
    )
    config = transformers.Sam3VisionConfig(backbone_config=backbone, fpn_hidden_size=16)
    model = randomise(transformers.Sam3VisionModel(config))
    model.save_pretrained(tmp_path)
    if whole:  # as the published checkpoint nests it
        state = load_file(tmp_path / "model.safetensors")
        nested = {f"detector_model.vision_encoder.{k}": v for k, v in state.items()}
        save_file({**nested, "tracker_model.x": torch.zeros(1)}, tmp_path / "model.safetensors")
        video = transformers.Sam3VideoConfig().to_dict()
        video["detector_config"]["vision_config"] = config.to_dict()
        (tmp_path / "config.json").write_text(json.dumps(video))
    teacher = load_teacher("transformers", "sam3", checkpoint=tmp_path)
    images = torch.rand(2, 3, 64, 64)
    features = teacher(images)
    expected = model(normalise(images, HALF)).last_hidden_state
    torch.testing.assert_close(features.spatial, expected.reshape(2, 8, 8, 64))
    assert features.summary is None
    assert (teacher.spec.input_size, teacher.spec.summary, teacher.spec.spatial) == (64, None, 64)


@torch.no_grad()
def test_colours_come_from_the_processor_beside_the_weights(tmp_path):
    model = randomise(FAMILIES["dinov2"][0]())
    model.save_pretrained(tmp_path)
    images = torch.rand(1, 3, 32, 32)
    own = ((0.1, 0.2, 0.3), (0.9, 0.8, 0.7))
    content = {"image_mean": own[0], "image_std": own[1]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(content))
    teacher = load_teacher("transformers", "dino", checkpoint=tmp_path)
    expected = model(normalise(images, own)).last_hidden_state[:, 0]
    torch.testing.assert_close(teacher(images).summary, expected)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"do_normalize": False}))
    teacher = load_teacher("transformers", "dino", checkpoint=tmp_path)
    torch.testing.assert_close(teacher(images).summary, model(images).last_hidden_state[:, 0])
    (tmp_path / "preprocessor_config.json").unlink()
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": content}))
    assert load_teacher("transformers", "dino", checkpoint=tmp_path).spec.mean == own[0]


@torch.no_grad()
def test_lone_weight_file_with_the_models_configuration(tmp_path):
    model = randomise(FAMILIES["siglip"][0]())
    model.save_pretrained(tmp_path / "model")
    file = tmp_path / "weights.pth"
    torch.save(model.state_dict(), file)
    images = torch.rand(1, 3, 32, 32)
    teacher = load_teacher("transformers", str(tmp_path / "model"), name="siglip", checkpoint=file)
    folder = load_teacher("transformers", str(tmp_path / "model"))
    assert torch.equal(teacher(images).summary, folder(images).summary)
    assert teacher.name == "siglip"
    assert folder.name == str(tmp_path / "model")


def test_weights_that_lack_something_are_refused(tmp_path, capfd):
    """transformers would fill what is missing with random numbers, and go on."""
    model = FAMILIES["dinov2"][0]()
    model.save_pretrained(tmp_path)
    capfd.readouterr()
    file = tmp_path / "model.safetensors"
    state = load_file(file)
    del state["layernorm.weight"]
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks 1 weights of Dinov2Model, e.g. layernorm.weight"):
        load_teacher("transformers", "dino", checkpoint=tmp_path)
    assert capfd.readouterr() == ("", "")


def test_pickled_weights_and_other_models_are_refused(tmp_path):
    model = FAMILIES["dinov2"][0]()
    model.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match="safetensors only") as caught:
        load_teacher("transformers", "dino", checkpoint=tmp_path)
    assert "\n" not in str(caught.value)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ValueError, match=r"model_type 'bert' .* none of clip,"):
        load_teacher("transformers", "dino", checkpoint=tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"cannot read .*config\.json"):
        load_teacher("transformers", "dino", checkpoint=tmp_path)


def test_remote_code_never_runs(tmp_path):
    model = FAMILIES["dinov2"][0]()
    model.save_pretrained(tmp_path)
    marker = tmp_path / "ran"
    (tmp_path / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass Config: pass\n")
    config = json.loads((tmp_path / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModel": "evil.Config"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    load_teacher("transformers", "dino", checkpoint=tmp_path)
    assert not marker.exists()
