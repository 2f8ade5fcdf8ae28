"""Images of several sizes in one call, against one call for each."""

from __future__ import annotations

from unittest import mock

import pytest
import timm
import torch
import transformers
from torch import nn

import fastagglo
from fastagglo.interop import attend

TINY = {"depth": 2, "embed_dim": 32, "num_heads": 2, "num_classes": 5}
DYNAMIC = {"img_size": 32, "dynamic_img_size": True}
# family: architecture, arguments, patch
FAMILIES = {
    "clip": ("vit_base_patch16_clip_224", DYNAMIC, 16),
    "siglip": ("vit_base_patch16_siglip_256", DYNAMIC, 16),
    "dinov2": ("vit_small_patch14_reg4_dinov2", DYNAMIC | {"img_size": 28}, 14),
    "dinov3": ("vit_small_patch16_dinov3", DYNAMIC, 16),
    "eva02": ("eva02_tiny_patch14_224", DYNAMIC | {"img_size": 28}, 14),
    "pe": ("vit_pe_core_tiny_patch16_384", DYNAMIC, 16),
    "mixed rope": ("vit_small_patch16_rope_mixed_224", DYNAMIC, 16),
    "post norm": ("eva_giant_patch14_224", DYNAMIC | {"img_size": 28, "use_post_norm": True}, 14),
    "naflex": ("naflexvit_base_patch16_map", {}, 16),
    "naflex, rope": ("naflexvit_base_patch16_gap", {"rope_type": "axial", "reg_tokens": 2}, 16),
    "naflex, mixed rope": ("naflexvit_base_patch16_gap", {"rope_type": "mixed"}, 16),
}
GRIDS = [(2, 3), (4, 2), (2, 3), (1, 1), (4, 2)]


def create(family: str, helpers, **more) -> nn.Module:
    name, arguments, _ = FAMILIES[family]
    torch.manual_seed(0)
    return helpers.randomise(timm.create_model(name, **TINY, **arguments, **more))


def images_of(patch: int) -> list[torch.Tensor]:
    """The last but one are three of one size."""
    torch.manual_seed(1)
    shapes = [(3, h * patch, w * patch) for h, w in GRIDS]
    shapes[3] = (3, *shapes[3])
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("family", FAMILIES)
def test_one_call_is_one_call_for_each(family, helpers):
    model = create(family, helpers)
    images = images_of(FAMILIES[family][2])

    def each():
        found = [model(x) if x.dim() == 4 else model(x[None])[0] for x in images]
        tokens = [model.forward_features(x if x.dim() == 4 else x[None]) for x in images]
        return found, [y if x.dim() == 4 else y[0] for x, y in zip(images, tokens, strict=True)]

    before = helpers.run(each, model, *images)
    packed = fastagglo.pack(model)
    assert packed.model is model

    def together():
        return packed(images), packed.forward_features(images)

    # float32; sums of up to 64 terms in another order.
    helpers.same(before, helpers.run(together, model, *images), 1e-5)
    assert [tuple(x.shape) for x in packed(images)] == [(5,)] * 3 + [(3, 5), (5,)]
    assert len(before.gradients) > len(images)


def test_all_images_share_one_call_of_attention(helpers):
    model = create("dinov3", helpers)
    packed = fastagglo.pack(model)
    with mock.patch.object(attend, "packed_attention", wraps=attend.packed_attention) as ours:
        packed(images_of(16))
    assert ours.call_count == 2
    layout = ours.call_args.args[3]
    assert layout.cu_seqlens.diff().tolist() == [6 + 5, 6 + 5, 8 + 5, 8 + 5] + [1 + 5] * 3


def test_an_image_does_not_depend_on_the_others(helpers):
    packed = fastagglo.pack(create("dinov2", helpers))
    images = images_of(14)
    expected = packed(images)
    changed = [images[0], torch.full_like(images[1], 1e3), *images[2:]]
    found = packed(changed)
    assert not torch.allclose(found[1], expected[1])
    for index in (0, 2, 3, 4):
        torch.testing.assert_close(found[index], expected[index])


def siglip2(helpers) -> nn.Module:
    config = transformers.Siglip2VisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_attention_heads=2,
        num_hidden_layers=2,
        patch_size=8,
        num_patches=16,
    )
    torch.manual_seed(0)
    return helpers.randomise(transformers.Siglip2VisionModel(config)).double()


def test_siglip2(helpers):
    """Against its own processor's patches, one image at a time."""
    from transformers.models.siglip2.image_processing_siglip2 import convert_image_to_patches

    model = siglip2(helpers)
    torch.manual_seed(1)
    images = [torch.randn(3, h * 8, w * 8).double().requires_grad_() for h, w in GRIDS]

    def each():
        found = []
        for image, grid in zip(images, GRIDS, strict=True):
            patches = convert_image_to_patches(image, 8)[None]
            mask = torch.ones(1, patches.shape[1], dtype=torch.int64)
            out = model(patches, mask, torch.tensor([grid]))
            found.append({key: value[0] for key, value in out.items()})
        return found

    before = helpers.run(each, model, *images)
    packed = fastagglo.pack(model)
    # float64: in float32 the gradients of keys' biases, which cancel to nothing, are noise. Siglip2
    # resizes positions in float32.
    helpers.same(before, helpers.run(lambda: packed(images), model, *images), 1e-6)
    (first, *_) = packed(images)
    assert first.pooler_output.shape == (32,)
    assert first.last_hidden_state.shape == (6, 32)


def test_checkpointing_gives_the_same_gradients(helpers):
    model = create("dinov3", helpers)
    images = images_of(16)
    packed = fastagglo.pack(model)
    plain = helpers.run(lambda: packed(images), model, *images)
    model.set_grad_checkpointing()
    helpers.same(plain, helpers.run(lambda: packed(images), model, *images), 1e-6)


def test_what_pack_does_not_take(helpers):
    with pytest.raises(TypeError, match=r"VisionTransformer, Eva or NaFlexVit.*got ResNet"):
        fastagglo.pack(timm.create_model("resnet10t"))
    with pytest.raises(TypeError, match=r"pack: model must be a torch\.nn\.Module"):
        fastagglo.pack("vit")
    fixed = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1)
    packed = fastagglo.pack(fixed)
    assert packed([torch.zeros(3, 32, 32)])[0].shape == (1000,)
    with pytest.raises(ValueError, match=r"32 x 32 alone, got 64 x 32.*dynamic_img_size=True"):
        packed([torch.zeros(3, 64, 32)])
    parallel = timm.create_model("vit_small_patch16_36x1_224", depth=1)
    assert fastagglo.pack(parallel)
    other = timm.create_model("vit_small_patch16_18x2_224", depth=1)
    with pytest.raises(ValueError, match=r"blocks\.0\.attn is not patched"):
        fastagglo.pack(other)
    with pytest.raises(ValueError, match="multiples of the patch, 8, got 12 x 8"):
        fastagglo.pack(siglip2(helpers))([torch.zeros(3, 12, 8)])


def test_what_a_packed_model_does_not_take(helpers):
    model = create("dinov2", helpers, drop_path_rate=0.1)
    packed = fastagglo.pack(model)
    with pytest.raises(TypeError, match="a list of tensors, got Tensor"):
        packed(torch.zeros(2, 3, 28, 28))
    with pytest.raises(TypeError, match=r"a list with \['str'\]"):
        packed(["photo.jpg"])
    with pytest.raises(ValueError, match="empty"):
        packed([])
    with pytest.raises(ValueError, match=r"must be float.*got torch\.uint8 at position 1"):
        packed([torch.zeros(3, 28, 28), torch.zeros(3, 28, 28, dtype=torch.uint8)])
    with pytest.raises(ValueError, match=r"does not take images of 30 x 28.*divisible by patch"):
        packed([torch.zeros(3, 28, 28), torch.zeros(3, 30, 28)])
    with pytest.raises(ValueError, match=r"got \(28, 28\) at position 0"):
        packed([torch.zeros(28, 28)])
    model.train()
    with pytest.raises(ValueError, match=r"blocks\.1\.drop_path1 drops 0\.1 of the images"):
        packed([torch.zeros(3, 28, 28)])
    model.eval()
    fastagglo.unpatch(model)
    with pytest.raises(ValueError, match="was unpatched"):
        packed([torch.zeros(3, 28, 28)])
    dropped = fastagglo.pack(create("dinov2", helpers, attn_drop_rate=0.1).train())
    with pytest.raises(ValueError, match="cannot run with dropout"):
        dropped([torch.zeros(3, 28, 28)])
