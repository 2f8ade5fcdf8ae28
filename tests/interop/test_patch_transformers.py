"""transformers' families, tiny and randomly weighted: the same before, after, and after that."""

from __future__ import annotations

import copy
import pickle
from typing import Any
from unittest import mock

import pytest
import torch
import transformers
from torch import nn

import fastagglo
from fastagglo.interop import attend

TINY = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
IMAGES = {"image_size": 32, "patch_size": 8}
SAM = {"window_size": 2, "global_attn_indexes": [1], "output_channels": 16, "mlp_dim": 64}
CLIP = TINY | IMAGES | {"intermediate_size": 64, "hidden_act": "gelu"}
# family: name of its classes, settings, attention and MLP modules that are patched of 2 blocks
FAMILIES: dict[str, tuple[str, dict[str, Any], int, int]] = {
    "clip": ("CLIPVision", CLIP, 2, 2),
    "clip, quick gelu": ("CLIPVision", CLIP | {"hidden_act": "quick_gelu"}, 2, 0),
    "siglip": ("SiglipVision", TINY | IMAGES | {"intermediate_size": 64}, 2, 3),
    "siglip2": ("Siglip2Vision", TINY | {"intermediate_size": 64, "patch_size": 8}, 2, 3),
    "dinov2": ("Dinov2", TINY | {"image_size": 28, "patch_size": 7}, 2, 2),
    "dinov2-g": (
        "Dinov2",
        TINY | {"image_size": 28, "patch_size": 7, "use_swiglu_ffn": True},
        *(2, 0),
    ),
    "dinov2, registers": (
        "Dinov2WithRegisters",
        TINY | {"image_size": 28, "patch_size": 7, "num_register_tokens": 4},
        *(2, 2),
    ),
    "dinov3": (
        "DINOv3ViT",
        TINY | IMAGES | {"intermediate_size": 64, "num_register_tokens": 4},
        *(2, 2),
    ),
    "dinov3, gated": (
        "DINOv3ViT",
        TINY | IMAGES | {"intermediate_size": 64, "use_gated_mlp": True, "num_register_tokens": 1},
        *(2, 0),
    ),
    "vit": ("ViT", TINY | IMAGES | {"intermediate_size": 64}, 2, 2),
    "sam": ("SamVision", TINY | IMAGES | SAM, 2, 2),
}


def create(family: str, helpers, **more: Any) -> tuple[nn.Module, torch.Tensor, dict]:
    """A model, images that take gradients, and all inputs."""
    name, settings, *_ = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**settings | more)
    model = helpers.randomise(getattr(transformers, f"{name}Model")(config))
    if family == "siglip2":
        patches = torch.randn(2, 12, 3 * 8 * 8, requires_grad=True)
        shapes, mask = torch.tensor([[3, 4], [2, 3]]), torch.ones(2, 12, dtype=torch.int64)
        mask[1, 6:] = 0
        inputs = {"pixel_values": patches, "pixel_attention_mask": mask, "spatial_shapes": shapes}
        return model, patches, inputs
    side = settings["image_size"]
    images = torch.randn(2, 3, side, side, requires_grad=True)
    return model, images, {"pixel_values": images}


@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_gradients_and_names_stay(family, helpers):
    model, images, inputs = create(family, helpers)
    *_, attentions, mlps = FAMILIES[family]
    types = [type(module) for module in model.modules()]
    names = list(model.state_dict())
    before = helpers.run(lambda: model(**inputs), model, images)
    report = fastagglo.patch(model)
    kinds = [module.what for module in report.patched]
    assert kinds.count("packed attention") == attentions
    assert kinds.count("gelu_linear_residual") == mlps
    assert all(module.what for module in report.left)
    # float32 throughout: sums of up to 64 terms in another order.
    helpers.same(before, helpers.run(lambda: model(**inputs), model, images), 1e-5)
    assert list(model.state_dict()) == names
    assert fastagglo.patch(model) == report
    fastagglo.unpatch(model)
    assert [type(module) for module in model.modules()] == types
    assert model.config._attn_implementation == "sdpa"
    after = helpers.run(lambda: model(**inputs), model, images)
    assert all(torch.equal(after.outputs[k], v) for k, v in before.outputs.items())


@pytest.mark.parametrize("family", [name for name in FAMILIES if "," not in name])
def test_packed_attention_is_what_runs(family, helpers):
    model, _, inputs = create(family, helpers)
    if family.startswith("siglip"):
        model.head.attention = nn.Identity()  # pooling, which is PyTorch's
        model.head.attention.forward = lambda probe, x, v, **options: (x.mean(1, True),)
    fastagglo.patch(model)
    sdpa = mock.patch.object(
        torch.nn.functional, "scaled_dot_product_attention", side_effect=AssertionError
    )
    with sdpa:
        model(**inputs)
    fastagglo.unpatch(model)
    with sdpa, pytest.raises(AssertionError):
        model(**inputs)


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_two_towers(family, helpers):
    """CLIP's text tower is causal and stays; SigLIP's is not, and its padding becomes a bias."""
    name = {"clip": "CLIP", "siglip": "Siglip"}[family]
    text = TINY | {"intermediate_size": 64, "vocab_size": 50, "max_position_embeddings": 8}
    config = getattr(transformers, f"{name}Config")(
        vision_config=FAMILIES[family][1],
        text_config=text | {"projection_size": 32, "hidden_act": "gelu", "eos_token_id": 49},
        projection_dim=16,
    )
    torch.manual_seed(0)
    model = helpers.randomise(getattr(transformers, f"{name}Model")(config))
    images = torch.randn(2, 3, 32, 32, requires_grad=True)
    tokens, mask = torch.randint(1, 49, (2, 8)), torch.ones(2, 8, dtype=torch.int64)
    mask[0, 5:] = 0

    def outputs():
        found = model(pixel_values=images, input_ids=tokens, attention_mask=mask)
        return {"image": found.image_embeds, "text": found.text_embeds}

    before = helpers.run(outputs, model, images)
    report = fastagglo.patch(model)
    with mock.patch.object(attend, "packed_attention", wraps=attend.packed_attention) as ours:
        helpers.same(before, helpers.run(outputs, model, images), 1e-5)
    assert ours.call_count == (2 if family == "clip" else 4)
    causal = {m.name for m in report.left if "causal" in m.what}
    assert len(causal) == (2 if family == "clip" else 0)
    assert model.config.text_config._attn_implementation == (
        "sdpa" if family == "clip" else "fastagglo"
    )
    fastagglo.unpatch(model)
    configs = (model.config, model.config.vision_config, model.config.text_config)
    assert {config._attn_implementation for config in configs} == {"sdpa"}


def test_calls_that_are_sdpas(helpers):
    """A mask over pairs and a causal one, and dropout of weights in training."""
    model, images, inputs = create("vit", helpers, attention_probs_dropout_prob=0.3)
    attention = model.layers[0].attention
    x = torch.randn(2, 5, 32)
    pairs = (torch.rand(2, 1, 5, 5) > 0.4) | torch.eye(5, dtype=torch.bool)
    calls = ({"attention_mask": pairs}, {"is_causal": True}, {})
    expected = [attention(x, **options)[0] for options in calls]
    model.train()
    before = helpers.run(lambda: model(**inputs), model, images)
    fastagglo.patch(model)
    with mock.patch.object(attend, "packed_attention", wraps=attend.packed_attention) as ours:
        helpers.same(before, helpers.run(lambda: model(**inputs), model, images), 1e-6)
        model.eval()
        for options, result in zip(calls, expected, strict=True):
            torch.testing.assert_close(attention(x, **options)[0], result)
    assert ours.call_count == 1


def test_eager_models_keep_their_weights(helpers):
    model, _, inputs = create("vit", helpers, attn_implementation="eager")
    before = model(**inputs, output_attentions=True).attentions
    report = fastagglo.patch(model)
    assert {m.what for m in report.left} == {
        "its attn_implementation is 'eager'; call model.set_attn_implementation('sdpa') first"
    }
    after = model(**inputs, output_attentions=True).attentions
    assert len(after) == 2
    torch.testing.assert_close(after, before)
    model.set_attn_implementation("sdpa")
    assert len(fastagglo.patch(model).patched) == 4
    model.set_attn_implementation("eager")  # and back, as for any other implementation
    torch.testing.assert_close(model(**inputs, output_attentions=True).attentions, before)
    assert fastagglo.unpatch(model).config._attn_implementation == "eager"
    sam, _, _ = create("sam", helpers, attn_implementation="eager")
    reasons = {m.what for m in fastagglo.patch(sam).left}
    assert reasons == {"it gives its weights; load with attn_implementation='sdpa'"}


def test_sams_own_size_and_its_limit():
    with torch.device("meta"):  # windows of 14 x 14, and its global 64 x 64 tokens
        config = transformers.SamVisionConfig(num_hidden_layers=3)
        sam = transformers.SamModel(transformers.SamConfig(vision_config=config))
    report = fastagglo.patch(sam, mlp=False)
    assert [m.name[-13:] for m in report.patched] == ["layers.0.attn", "layers.1.attn"]
    left = {m.name: m.what for m in report.left if m.what != "mlp=False"}
    encoder = left.pop("vision_encoder.layers.2.attn")
    assert "64 x 64 tokens would make a head of 192 channels" in encoder
    assert set(left.values()) == {"SAM's mask decoder: its queries are not the tokens"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [True, False])
def test_low_precision(dtype, autocast, helpers):
    """About as far from float64 as transformers is in the same precision."""
    model, _, inputs = create("dinov3", helpers)
    images = inputs["pixel_values"].detach()
    exact = copy.deepcopy(model).double()(images.double()).last_hidden_state
    if not autocast:
        model.to(dtype)

    def error():
        with torch.autocast("cpu", dtype, enabled=autocast):
            found = model(images if autocast else images.to(dtype)).last_hidden_state
        return (found - exact).norm() / exact.norm()

    theirs = error()
    fastagglo.patch(model)
    assert error() < 1.5 * theirs + 1e-6


def test_copies_pickles_and_saved_models(tmp_path, helpers):
    model, _, inputs = create("dinov2", helpers)
    report = fastagglo.patch(model)
    expected = model(**inputs).last_hidden_state
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(**inputs).last_hidden_state, expected)
        assert fastagglo.patch(twin) == report
        fastagglo.unpatch(twin)
        assert twin.config._attn_implementation == "sdpa"
    assert model.config._attn_implementation == "fastagglo"
    model.save_pretrained(tmp_path)
    assert "fastagglo" not in (tmp_path / "config.json").read_text()
    fresh = transformers.AutoModel.from_pretrained(tmp_path).eval()
    assert fresh.config._attn_implementation == "sdpa"
    torch.testing.assert_close(fresh(**inputs).last_hidden_state, expected)


def test_compiles_whole(helpers):
    model, images, inputs = create("vit", helpers)
    fastagglo.patch(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    eager = helpers.run(lambda: model(**inputs), model, images)
    helpers.same(eager, helpers.run(lambda: compiled(**inputs), model, images), 1e-5)
