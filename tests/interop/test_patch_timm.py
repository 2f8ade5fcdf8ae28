"""timm's families, tiny and randomly weighted: the same before and after, and after that again."""

from __future__ import annotations

import copy
import pickle
from unittest import mock

import numpy as np
import pytest
import timm
import torch
from torch import nn

import fastagglo
from fastagglo.interop import attend
from fastagglo.interop.swap import Swapped
from fastagglo.ops.worklist import build_tiles

TINY = {"depth": 2, "embed_dim": 32, "num_heads": 2, "num_classes": 5}
# family: architecture, arguments, attention and MLP modules that are patched of a model of 2 blocks
FAMILIES = {
    "clip": ("vit_base_patch16_clip_224", {"img_size": 64}, 2, 2),
    "clip, quick gelu": ("vit_base_patch16_clip_quickgelu_224", {"img_size": 64}, 2, 0),
    "siglip": ("vit_base_patch16_siglip_256", {"img_size": 64}, 2, 3),
    "siglip gap": ("vit_base_patch16_siglip_gap_256", {"img_size": 64}, 2, 2),
    "dinov2": ("vit_small_patch14_reg4_dinov2", {"img_size": 56}, 2, 2),
    "dinov2-g": ("vit_giant_patch14_dinov2", {"img_size": 56}, 2, 0),
    "dinov3": ("vit_small_patch16_dinov3", {"img_size": 64}, 2, 2),
    "eva02": ("eva02_tiny_patch14_224", {"img_size": 56}, 2, 0),
    "eva02-b": ("eva02_base_patch14_224", {"img_size": 56}, 2, 0),
    "pe": ("vit_pe_core_tiny_patch16_384", {"img_size": 64}, 2, 3),
    "mixed rope": ("vit_small_patch16_rope_mixed_224", {"img_size": 64}, 2, 2),
    "naflex": ("naflexvit_base_patch16_map", {}, 2, 3),
    "sam": ("samvit_base_patch16", {"img_size": 64, "global_attn_indexes": (1,)}, 2, 2),
    "beit": ("beit_base_patch16_224", {"img_size": 64}, 0, 2),
    "query and key norms": (
        "vit_small_patch16_224",
        {"img_size": 64, "qk_norm": True, "scale_attn_norm": True},
        *(2, 2),
    ),
}


def create(family: str, helpers, **more) -> tuple[nn.Module, torch.Tensor]:
    name, arguments, *_ = FAMILIES[family]
    model = helpers.randomise(timm.create_model(name, **TINY, **arguments, **more))
    side = arguments.get("img_size", 64)
    return model, torch.randn(2, 3, side, side, requires_grad=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_gradients_and_names_stay(family, helpers):
    model, x = create(family, helpers)
    *_, attentions, mlps = FAMILIES[family]
    types = [type(module) for module in model.modules()]
    names = list(model.state_dict())
    before = helpers.run(lambda: model(x), model, x)
    report = fastagglo.patch(model)
    kinds = [module.what for module in report.patched]
    assert kinds.count("packed attention") == attentions
    assert kinds.count("gelu_linear_residual") == mlps
    assert all(module.what for module in report.left)
    # float32 throughout: sums of up to 128 terms in another order.
    helpers.same(before, helpers.run(lambda: model(x), model, x), 1e-5)
    assert list(model.state_dict()) == names
    for module, cls in zip(model.modules(), types, strict=True):
        assert isinstance(module, cls)
        assert type(module).__name__ == cls.__name__
    assert fastagglo.patch(model) == report
    assert fastagglo.unpatch(model) is model
    assert [type(module) for module in model.modules()] == types
    after = helpers.run(lambda: model(x), model, x)
    assert all(torch.equal(after.outputs[k], v) for k, v in before.outputs.items())


@pytest.mark.parametrize("family", ["dinov2", "dinov3", "sam"])
def test_packed_attention_is_what_runs(family, helpers):
    model, x = create(family, helpers)
    fastagglo.patch(model)
    sdpa = mock.patch.object(
        torch.nn.functional, "scaled_dot_product_attention", side_effect=AssertionError
    )
    with sdpa:
        model(x)
    fastagglo.unpatch(model)
    with sdpa, pytest.raises(AssertionError):
        model(x)


def test_the_report_says_what_and_why(helpers):
    model, _ = create("siglip", helpers)
    text = str(fastagglo.patch(model))
    assert "patched 5 modules, left 1 alone" in text
    assert "2 x Attention (blocks.0.attn .. blocks.1.attn): packed attention" in text
    assert "AttentionPoolLatent (attn_pool): pooling" in text
    model, _ = create("clip, quick gelu", helpers)
    assert "its activation is QuickGELU, not GELU" in str(fastagglo.patch(model))
    report = fastagglo.patch(create("clip", helpers)[0], mlp=False)
    assert {module.what for module in report.left} == {"mlp=False"}
    assert len(report.patched) == 2
    with torch.device("meta"):  # the real one's windows of 14 x 14, and its global 64 x 64 tokens
        sam = timm.create_model("samvit_base_patch16", depth=3)
    report = fastagglo.patch(sam, mlp=False)
    left = {module.name: module.what for module in report.left if module.what != "mlp=False"}
    assert set(left) == {"blocks.2.attn"}
    assert "64 x 64 tokens would make a head of 192 channels" in left["blocks.2.attn"]


def test_what_cannot_be_patched_raises():
    with pytest.raises(ValueError, match=r"nothing to patch in ResNet.*no attention or MLP"):
        fastagglo.patch(timm.create_model("resnet10t"))
    with pytest.raises(ValueError, match=r"WindowAttention.*a class that is not known") as error:
        fastagglo.patch(timm.create_model("swin_tiny_patch4_window7_224"), mlp=False)
    assert "mlp=False" in str(error.value)
    with pytest.raises(TypeError, match=r"patch: model must be a torch.nn.Module, got str"):
        fastagglo.patch("vit_base_patch16_224")
    with pytest.raises(TypeError, match="unpatch"):
        fastagglo.unpatch(None)
    linear = nn.Linear(3, 3)
    assert fastagglo.unpatch(linear) is linear


@pytest.mark.parametrize("family", ["dinov2", "dinov3"])
def test_masks(family, helpers):
    """A mask of keys becomes a bias; one over pairs, and a causal one, run timm's code."""
    model, _ = create(family, helpers)
    attention = model.blocks[0].attn
    x = torch.randn(2, 7, 32)
    keys = torch.tensor([[1, 1, 1, 1, 1, 0, 0], [1, 0, 1, 1, 1, 1, 1]]).bool()[:, None, None]
    pairs = torch.rand(2, 1, 7, 7) > 0.3
    pairs |= torch.eye(7, dtype=torch.bool)
    calls = {
        "keys": ({"attn_mask": keys.expand(2, 1, 7, 7)}, True),
        "keys, not expanded": ({"attn_mask": keys}, True),
        "keys, added": ({"attn_mask": torch.randn(2, 1, 1, 7)}, True),
        "keys, of each head": ({"attn_mask": keys.expand(2, 2, 7, 7)}, True),
        "pairs": ({"attn_mask": pairs}, False),
        "causal": ({"is_causal": True}, False),
    }
    expected = {name: attention(x, **options) for name, (options, _) in calls.items()}
    fastagglo.patch(model)
    for name, (options, ours) in calls.items():
        with mock.patch.object(attend, "packed_attention", wraps=attend.packed_attention) as a:
            qkv = attend.packed_attention_qkv
            with mock.patch.object(attend, "packed_attention_qkv", wraps=qkv) as b:
                torch.testing.assert_close(attention(x, **options), expected[name])
        assert bool(a.call_count + b.call_count) == ours, name


def test_padded_batches_of_naflex(helpers):
    model, _ = create("naflex", helpers)
    patches = torch.randn(2, 12, 16 * 16 * 3)
    grid = torch.stack(torch.meshgrid(torch.arange(3), torch.arange(4), indexing="ij"), -1)
    coordinates = grid.reshape(1, 12, 2).repeat(2, 1, 1)
    valid = torch.ones(2, 12, dtype=torch.bool)
    valid[1, 8:] = False
    batch = {"patches": patches, "patch_coord": coordinates, "patch_valid": valid}
    before = helpers.run(lambda: model(batch), model)
    fastagglo.patch(model)
    helpers.same(before, helpers.run(lambda: model(batch), model), 1e-5)


@pytest.mark.parametrize("rates", [{"attn_drop_rate": 0.4}, {"proj_drop_rate": 0.4}])
def test_dropout_in_training_is_timms_own(rates, helpers):
    model, x = create("dinov2", helpers, **rates)
    model.train()
    before = helpers.run(lambda: model(x), model, x)
    fastagglo.patch(model)
    helpers.same(before, helpers.run(lambda: model(x), model, x), 1e-5)
    helpers.same(
        helpers.run(lambda: model.eval()(x), model, x), _unpatched(model, x, helpers), 1e-5
    )


def _unpatched(model, x, helpers):
    return helpers.run(lambda: fastagglo.unpatch(model)(x), model, x)


@pytest.mark.parametrize("family", ["dinov2", "dinov3", "sam"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [True, False])
def test_low_precision(family, dtype, autocast, helpers):
    """About as far from float64 as timm is in the same precision."""
    model, x = create(family, helpers)
    reference = copy.deepcopy(model).double()
    exact = helpers.run(lambda: reference.forward_features(x.double()), reference)
    if not autocast:
        model.to(dtype)
        x = x.detach().to(dtype)

    def outputs():
        with torch.autocast("cpu", dtype, enabled=autocast):
            return helpers.run(lambda: model.forward_features(x), model)

    def error(found):
        return (found.outputs["out"] - exact.outputs["out"]).norm() / exact.outputs["out"].norm()

    theirs = error(outputs())
    fastagglo.patch(model)
    ours = outputs()
    assert error(ours) < 1.5 * theirs + 1e-6
    assert ours.gradients
    assert all(g.isfinite().all() for g in ours.gradients.values())


def test_copies_and_pickles(helpers):
    model, x = create("dinov3", helpers)
    fastagglo.patch(model)
    expected = model(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), expected)
        assert isinstance(twin.blocks[0].attn, Swapped)
        twin.blocks[0].attn.qkv.weight.data.zero_()
        assert not torch.equal(twin(x), expected)
        fastagglo.unpatch(twin)
        assert type(twin.blocks[0].attn) is timm.models.eva.EvaAttention
    assert torch.equal(model(x), expected)
    fresh, _ = create("dinov3", helpers)
    fresh.load_state_dict(model.state_dict())
    torch.testing.assert_close(fresh(x), expected)


class Adapter(nn.Module):
    """A low-rank adapter around a layer, as PEFT puts it there."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer
        self.down = nn.Linear(layer.in_features, 2)
        self.up = nn.Linear(2, layer.out_features)

    @property
    def weight(self) -> torch.Tensor:
        return self.layer.weight

    @property
    def bias(self) -> torch.Tensor:
        return self.layer.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) + self.up(self.down(x))


@pytest.mark.parametrize("order", ["patch first", "adapters first"])
def test_adapters_and_hooks_are_not_passed_by(order, helpers):
    model, x = create("dinov2", helpers)
    if order == "patch first":
        fastagglo.patch(model)
    for block in model.blocks:
        block.mlp.fc2 = Adapter(block.mlp.fc2)
        block.attn.qkv = Adapter(block.attn.qkv)
    if order == "adapters first":
        report = fastagglo.patch(model)
        assert {m.what for m in report.left} == {"one of its layers is a Adapter or carries a hook"}
    found = helpers.run(lambda: model(x), model, x)
    helpers.same(found, _unpatched(model, x, helpers), 1e-5)
    assert "blocks.0.mlp.fc2.up.weight" in found.gradients

    seen = []
    model, x = create("dinov2", helpers)
    model.blocks[0].attn.fused_attn = False  # as those do who want the maps
    model.blocks[0].attn.attn_drop.register_forward_hook(lambda *a: seen.append(a[2]))
    fastagglo.patch(model)
    model.blocks[0].mlp.fc2.register_forward_hook(lambda *a: seen.append(a[2]))
    model(x)
    assert [y.shape[-1] for y in seen] == [21, 32]

    seen = []
    model, x = create("dinov2", helpers)
    before = model(x)
    fastagglo.patch(model)
    own = model.blocks[0].mlp.fc2.forward  # as accelerate replaces it
    model.blocks[0].mlp.fc2.forward = lambda y: own(y) + 1
    model.blocks[1].mlp.act.register_forward_hook(lambda *a: seen.append(a[2]))
    assert not torch.allclose(model(x), before, atol=1e-3)
    assert len(seen) == 1
    fastagglo.unpatch(model)
    model.blocks[1].mlp.forward = model.blocks[1].mlp.forward
    (left,) = fastagglo.patch(model).left[-1:]
    assert (left.name, left.what[:38]) == ("blocks.1.mlp", "its object has a forward of its own (a")


def test_an_mlp_keeps_less_for_its_backward(helpers):
    model, _ = create("dinov2", helpers)
    x = torch.randn(1, 50, 32, requires_grad=True)

    def kept() -> int:
        sizes = {}

        def pack(t: torch.Tensor) -> torch.Tensor:
            sizes[t.data_ptr()] = t.numel()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            model.blocks[0].mlp(x)
        return sum(sizes.values())

    before = kept()
    fastagglo.patch(model)
    # What the GELU gave; the second layer's bias is kept now too.
    assert before - kept() == 50 * 128 - 32


def test_compiles_whole_and_for_other_sizes(helpers):
    model, x = create("dinov3", helpers, dynamic_img_size=True)
    fastagglo.patch(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for images in (x, torch.randn(3, 3, 112, 64, requires_grad=True)):
        eager = helpers.run(lambda x=images: model(x), model, images)
        helpers.same(eager, helpers.run(lambda x=images: compiled(x), model, images), 1e-5)
    fastagglo.unpatch(model)
    with mock.patch.object(attend, "packed_attention", side_effect=AssertionError):
        torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize(("batch", "length"), [(3, 50), (2, 128), (5, 300), (1, 1)])
def test_a_traced_layout_is_the_usual_one(batch, length):
    def traced(x):
        layout = attend.even_layout(x)
        return layout.cu_seqlens, layout.cu_seqlens_cpu, layout.tiles, layout.tile_rows

    x = torch.randn(batch, length, 4)
    usual = attend.even_layout(x)
    with mock.patch.object(attend, "_TILED", ("cpu",)):
        found = torch.compile(traced, fullgraph=True, backend="eager", dynamic=True)(x)
    assert torch.equal(found[0], usual.cu_seqlens)
    assert torch.equal(found[1], usual.cu_seqlens_cpu)
    boundaries = np.arange(batch + 1) * length
    assert found[3] == usual.tile_rows
    expected = build_tiles(boundaries, batch * length, usual.tile_rows, None)
    assert np.array_equal(found[2].numpy(), expected)
    assert found[2].dtype == torch.int32
