"""Token merging inside other libraries' models."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import open_clip
import pytest
import timm
import torch
import transformers
from torch import Tensor, nn

import fastagglo
from fastagglo import tome
from fastagglo.interop.swap import Swapped
from fastagglo.ops import reference

TINY = {"depth": 3, "embed_dim": 32, "num_heads": 2, "num_classes": 5, "img_size": 64}
SMALL = {
    "hidden_size": 32,
    "num_attention_heads": 2,
    "num_hidden_layers": 3,
    "intermediate_size": 64,
    "image_size": 64,
    "patch_size": 16,
}


def timm_model(name: str, **more: Any) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, **TINY | more)


def hf_model(name: str, **more: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        config = getattr(transformers, f"{name}Config")(**SMALL | more)
        return getattr(transformers, f"{name}Model")(config)

    return make


def clip() -> nn.Module:
    vision = {"image_size": 64, "patch_size": 16, "width": 32, "head_width": 16, "layers": 3}
    text = {"context_length": 8, "vocab_size": 50, "width": 32, "heads": 2, "layers": 1}
    return open_clip.model.CLIP(16, vision, text).visual


# model: built how, path of its blocks, prefix tokens
MODELS: dict[str, tuple[Callable[[], nn.Module], str, int]] = {
    "clip": (timm_model("vit_base_patch16_clip_224"), "blocks", 1),
    "siglip": (timm_model("vit_base_patch16_siglip_256"), "blocks", 0),
    "average pooling": (timm_model("vit_base_patch16_siglip_gap_256"), "blocks", 0),
    "dinov2": (timm_model("vit_small_patch14_reg4_dinov2", img_size=56), "blocks", 5),
    "dinov3": (timm_model("vit_small_patch16_dinov3"), "blocks", 5),
    "eva02": (timm_model("eva02_base_patch14_224", img_size=56), "blocks", 1),
    "naflex": (timm_model("naflexvit_base_patch16_map", img_size=None), "blocks", 1),
    "open_clip": (clip, "transformer.resblocks", 1),
    "hf clip": (hf_model("CLIPVision"), "encoder.layers", 1),
    "hf siglip": (hf_model("SiglipVision"), "encoder.layers", 0),
    "hf dinov2": (hf_model("Dinov2"), "encoder.layer", 1),
    "hf registers": (hf_model("Dinov2WithRegisters", num_register_tokens=4), "encoder.layer", 5),
    "hf dinov3": (hf_model("DINOv3ViT", num_register_tokens=4), "model.layer", 5),
    "hf vit": (hf_model("ViT"), "layers", 1),
}


def create(name: str, helpers) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = helpers.randomise(MODELS[name][0]())
    side = 56 if name in ("dinov2", "eva02") else 64
    return model, torch.randn(2, 3, side, side, requires_grad=True)


def blocks_of(model: nn.Module, name: str) -> list[nn.Module]:
    return list(model.get_submodule(MODELS[name][1]))


def alike_in_fours(model: nn.Module, name: str) -> None:
    """Let each four patches in a row be one patch, at one place."""
    prefix = MODELS[name][2]

    def twins(x: Tensor) -> Tensor:
        return x[:, prefix::4].repeat_interleave(4, 1)

    def change(module: nn.Module, args: tuple, options: dict) -> tuple[tuple, dict]:
        if options.get("rope") is not None:
            rope = options["rope"]
            options = options | {"rope": rope[3:4].expand(rope.shape)}
        if options.get("position_embeddings") is not None:
            rows = (y[3:4].expand(y.shape) for y in options["position_embeddings"])
            options = options | {"position_embeddings": tuple(rows)}
        x = args[0]
        if module is first:
            x = torch.cat((x[:, :prefix], twins(x)), dim=1)
        return (x, *args[1:]), options

    first, *_ = blocks_of(model, name)
    for block in blocks_of(model, name):
        block.register_forward_pre_hook(change, with_kwargs=True)


@pytest.mark.parametrize("name", MODELS)
def test_merging_what_is_alike_changes_nothing(name, helpers):
    """Sixteen patches of four kinds as eight: attention knows how many each token stands for."""
    model, x = create(name, helpers)
    model, x = model.double(), x.detach().double().requires_grad_()
    alike_in_fours(model, name)
    names = list(model.state_dict())
    types = [type(module) for module in model.modules()]
    before = helpers.run(lambda: model(x), model, x)
    assert tome.apply(model, 8) is model
    lengths = seen(model, name)
    # float64: what is alike ties exactly.
    helpers.same(before, helpers.run(lambda: model(x), model, x), 1e-8)
    prefix = MODELS[name][2]
    assert lengths == [prefix + 16, prefix + 13, prefix + 11]
    assert list(model.state_dict()) == names
    assert fastagglo.unpatch(model) is model
    assert [type(module) for module in model.modules()] == types
    assert not hasattr(blocks_of(model, name)[0], "fastagglo_tome")


def seen(model: nn.Module, name: str) -> list[int]:
    """Filled with the lengths that the blocks are given."""
    lengths: list[int] = []
    for block in blocks_of(model, name):
        block.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    return lengths


def plain_tome(model: nn.Module, x: Tensor, keeps: list[int]) -> Tensor:
    """The paper's formulas, written out for timm's DINOv2 and DINOv3."""
    x = model._pos_embed(model.patch_embed(x))
    x, rope = x if isinstance(x, tuple) else (x, None)
    size = torch.ones(x.shape[:2])
    where = torch.arange(x.shape[1]).expand(x.shape[:2])
    prefix = model.num_prefix_tokens
    rope = None if rope is None else rope.expand(len(x), *rope.shape)
    for block, keep in zip(model.blocks, keeps, strict=True):
        attention = block.attn
        qkv = attention.qkv(block.norm1(x)).unflatten(-1, (3, attention.num_heads, -1))
        q, k, v = qkv.transpose(1, 3).unbind(2)
        if rope is not None:
            q, k = (turned(y, rope, prefix, attention.rotate_half) for y in (q, k))
        logits = q @ k.mT * q.shape[-1] ** -0.5 + size.log()[:, None, None]
        out = attention.proj((logits.softmax(-1) @ v).transpose(1, 2).flatten(2))
        scale = block.ls1 if hasattr(block, "ls1") else block.gamma_1.mul
        x = x + scale(out)
        if keep < x.shape[1]:
            merged = reference.merge_tokens(
                x, keep, size=size, metric=k.mean(1), partition="alternate", protect=prefix
            )
            if rope is not None:
                weights = torch.zeros(len(x), keep, x.shape[1])
                weights.scatter_(1, merged.index[:, None], size[:, None])
                rope = (weights / weights.sum(-1, keepdim=True))[:, prefix:, prefix:] @ rope
            x, size, where = merged.x, merged.size, merged.index.gather(1, where)
        scale = block.ls2 if hasattr(block, "ls2") else block.gamma_2.mul
        x = x + scale(block.mlp(block.norm2(x)))
    return model.norm(x.take_along_dim(where[..., None], 1))


def turned(x: Tensor, rope: Tensor, prefix: int, half: bool) -> Tensor:
    sin, cos = rope[:, None].chunk(2, -1)
    patches = x[:, :, prefix:]
    if half:
        a, b = patches.chunk(2, -1)
        other = torch.cat((-b, a), -1)
    else:
        other = torch.stack((-patches[..., 1::2], patches[..., ::2]), -1).flatten(-2)
    return torch.cat((x[:, :, :prefix], patches * cos + other * sin), 2)


@pytest.mark.parametrize("name", ["dinov2", "dinov3"])
def test_it_is_the_papers_formulas(name, helpers):
    model, x = create(name, helpers)
    expected = plain_tome(model, x, [5 + 12, 5 + 8, 5 + 5])
    plain = model.forward_features(x)
    tome.apply(model, schedule=[4, 4, 3])
    # float32, three blocks.
    torch.testing.assert_close(model.forward_features(x), expected, rtol=1e-4, atol=1e-4)
    assert (plain - expected).abs().max() > 0.1


@pytest.mark.parametrize(
    ("tokens", "schedule", "left"),
    [
        (4, "constant", [16, 12, 8, 4]),
        (5, "constant", [16, 12, 9, 5]),
        (4, "decreasing", [16, 8, 4, 4]),
        (0.25, "constant", [16, 12, 8, 4]),
        (0.3, "constant", [16, 12, 9, 5]),
        (1.0, "constant", [16, 16, 16, 16]),
        (16, "decreasing", [16, 16, 16, 16]),
        (500, "constant", [16, 16, 16, 16]),
        (1, "decreasing", [16, 6, 1, 1]),
        (None, [3, 0, 100], [16, 13, 13, 7]),
    ],
)
def test_schedules(tokens, schedule, left, helpers):
    model, x = create("dinov3", helpers)
    expected = model(x)
    tome.apply(model, tokens, schedule=schedule)
    lengths = seen(model, "dinov3")
    model.blocks[-1].mlp.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    found = model(x)
    assert lengths == [5 + length for length in left]
    same = torch.allclose(found, expected, atol=1e-4)
    assert same == (left[-1] == 16)


def test_sizes_may_change_from_call_to_call(helpers):
    torch.manual_seed(0)
    make = timm_model("vit_small_patch16_dinov3", dynamic_img_size=True)
    model = helpers.randomise(make())
    tome.apply(model, 0.5)
    lengths = seen(model, "dinov3")
    for grid in ((4, 4), (2, 6), (4, 4)):
        images = torch.randn(1, 3, grid[0] * 16, grid[1] * 16)
        assert model.forward_features(images).shape == (1, 5 + grid[0] * grid[1], 32)
    assert [x - 5 for x in lengths] == [16, 13, 11, 12, 10, 8, 16, 13, 11]


def test_remove_keeps_the_patch(helpers):
    model, x = create("dinov2", helpers)
    fastagglo.patch(model)
    expected = model(x)
    tome.apply(model, 4)
    assert not torch.allclose(model(x), expected)
    with pytest.raises(ValueError, match="merges already"):
        tome.apply(model, 4)
    assert tome.remove(model) is model
    assert torch.equal(model(x), expected)
    assert len(fastagglo.patch(model).patched) == 6
    tome.apply(model, 8, schedule="decreasing")
    assert fastagglo.tome is tome


def test_copies_and_pickles(helpers):
    model, x = create("hf dinov3", helpers)
    tome.apply(model, 6)
    expected = model(x).last_hidden_state
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x).last_hidden_state, expected)
        tome.remove(twin)
        assert not torch.allclose(twin(x).last_hidden_state, expected)
    assert torch.equal(model(x).last_hidden_state, expected)


def test_checkpointed_blocks_find_their_tokens_again(helpers):
    model, x = create("dinov3", helpers)
    tome.apply(model, 6)
    plain = helpers.run(lambda: model(x), model, x)
    model.set_grad_checkpointing()
    helpers.same(plain, helpers.run(lambda: model(x), model, x), 1e-6)
    both = model(x).sum() + model(2 * x).sum()
    with pytest.raises(ValueError, match="after another call of the model; call backward"):
        both.backward()


@pytest.mark.parametrize("name", ["dinov3", "hf dinov3"])
@pytest.mark.parametrize("autocast", [True, False])
def test_bfloat16(name, autocast, helpers):
    model, x = create(name, helpers)
    tome.apply(model, 8)
    x = x.detach()
    if not autocast:
        model, x = model.bfloat16(), x.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), torch.no_grad():
        out = model(x)
    assert all(y.isfinite().all() for y in (out if name == "dinov3" else out.last_hidden_state))
    stages = blocks_of(model, name)[0].fastagglo_tome.stages
    assert not stages  # nothing is held behind a call without gradients


def test_compiles_whole(helpers):
    torch.manual_seed(0)
    model = helpers.randomise(timm_model("vit_small_patch16_dinov3", depth=2)())
    x = torch.randn(2, 3, 64, 64, requires_grad=True)
    tome.apply(model, 6)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    eager = helpers.run(lambda: model(x), model, x)
    helpers.same(eager, helpers.run(lambda: compiled(x), model, x), 1e-5)


def test_a_tower_inside_a_model(helpers):
    text = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
    config = transformers.SiglipConfig(vision_config=SMALL, text_config=text)
    model = transformers.SiglipModel(config).eval()
    tome.apply(model, 4)
    assert all(isinstance(block, Swapped) for block in model.vision_model.encoder.layers)
    assert not isinstance(model.text_model.encoder.layers[0], Swapped)
    assert model.config.text_config._attn_implementation == "sdpa"
    images, tokens = torch.randn(2, 3, 64, 64), torch.zeros(1, 4, dtype=torch.int64)
    assert model(pixel_values=images, input_ids=tokens).logits_per_image.shape == (2, 1)


def test_masks_are_refused(helpers):
    config = transformers.Siglip2VisionConfig(**{**SMALL, "patch_size": 8})
    model = tome.apply(transformers.Siglip2VisionModel(config).eval(), 4)
    patches, shapes = torch.randn(2, 12, 192), torch.tensor([[3, 4], [3, 4]])
    mask = torch.ones(2, 12, dtype=torch.int64)
    assert model(patches, mask, shapes).last_hidden_state.shape == (2, 12, 32)
    mask[1, 8:] = 0
    with pytest.raises(ValueError, match="merged tokens know no masks"):
        model(patches, mask, shapes)
    vit, _ = create("dinov3", helpers)
    packed = fastagglo.pack(tome.apply(vit, 4))
    with pytest.raises(ValueError, match="merged tokens know no masks"):
        packed([torch.zeros(3, 64, 64)])


def test_what_it_does_not_take(helpers):
    model, x = create("dinov2", helpers)
    for options, error, match in (
        ({}, ValueError, "say how many tokens"),
        ({"tokens": 0}, ValueError, "at least 1 or a float"),
        ({"tokens": 1.5}, ValueError, "at least 1 or a float"),
        ({"tokens": True}, TypeError, "got bool"),
        ({"tokens": "many"}, TypeError, "got str"),
        ({"tokens": 4, "schedule": "cosine"}, ValueError, "'constant', 'decreasing' or a list"),
        ({"tokens": 4, "schedule": [1, 1, 1]}, ValueError, "not both"),
        ({"schedule": [1, 1]}, ValueError, "each of the 3 blocks"),
        ({"schedule": [1, 1, -1]}, ValueError, "0 or more"),
        ({"schedule": 3}, TypeError, "a name or a list"),
    ):
        with pytest.raises(error, match=match):
            tome.apply(model, **options)
    with pytest.raises(TypeError, match=r"must hold timm's VisionTransformer.*got ResNet"):
        tome.apply(timm.create_model("resnet10t"), 4)
    with pytest.raises(TypeError, match=r"tome\.remove: model must be"):
        tome.remove("vit")
    with pytest.raises(ValueError, match=r"several transformers, give one of: 0, 1"):
        tome.apply(nn.Sequential(model, copy.deepcopy(model)), 4)
    post_norm = timm.create_model(
        "eva_giant_patch14_224", **TINY | {"img_size": 56}, use_post_norm=True
    )
    with pytest.raises(ValueError, match=r"blocks\.0 is a EvaBlockPostNorm, a block that"):
        tome.apply(post_norm, 4)
    mixed = tome.apply(timm.create_model("vit_small_patch16_rope_mixed_224", **TINY), 4)
    with pytest.raises(ValueError, match="rotary embeddings of another form"):
        mixed(x.new_zeros(1, 3, 64, 64))
    eager = transformers.ViTModel(transformers.ViTConfig(**SMALL, attn_implementation="eager"))
    with pytest.raises(ValueError, match=r"layers\.0\.attention is not patched: its attn_impl"):
        tome.apply(eager, 4)
