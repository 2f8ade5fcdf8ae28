"""open_clip, torchvision and PyTorch's own attention: the same before and after."""

from __future__ import annotations

from collections.abc import Callable
from unittest import mock

import open_clip
import pytest
import torch
import torchvision
from torch import nn

import fastagglo
from fastagglo.interop import attend

VISION = {"image_size": 32, "patch_size": 8, "width": 32, "head_width": 16, "layers": 2}
TEXT = {"context_length": 8, "vocab_size": 50, "width": 32, "heads": 2, "layers": 2}
# model: built how, attention and MLP modules that are patched, those that stay (towers of 2 blocks)
MODELS: dict[str, tuple[Callable[[], nn.Module], int, int, set[str]]] = {
    "clip": (
        lambda: open_clip.model.CLIP(16, VISION, TEXT),
        *(2, 4),
        {"a causal text tower: packed attention lets every token see all others of its image"},
    ),
    "clip, quick gelu": (
        lambda: open_clip.model.CLIP(16, VISION, TEXT, quick_gelu=True),
        *(2, 0),
        {
            "a causal text tower: packed attention lets every token see all others of its image",
            "its activation is QuickGELU, not GELU",
        },
    ),
    "timm tower": (
        lambda: open_clip.model.CustomTextCLIP(
            16,
            {
                "timm_model_name": "test_vit",
                "timm_model_pretrained": False,
                "timm_pool": "",
                "timm_proj": "linear",
                "image_size": 160,
            },
            TEXT,
        ),
        *(6, 8),
        {"a causal text tower: packed attention lets every token see all others of its image"},
    ),
    "coca": (
        lambda: open_clip.coca_model.CoCa(
            32,
            TEXT | {"layers": 1, "dim_head": 16},
            TEXT | {"embed_cls": True, "output_tokens": True, "layers": 1},
            VISION | {"attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True},
        ),
        *(2, 5),
        {
            "a causal text tower: packed attention lets every token see all others of its image",
            "pooling: its queries are not the tokens",
        },
    ),
}


def create(name: str, helpers) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    model = MODELS[name][0]()
    if name == "coca":  # which leaves it as the memory was
        nn.init.zeros_(model.text_decoder.text_projection)
    helpers.randomise(model)
    texts = torch.randint(1, 50, (2, 8))
    side = 160 if name == "timm tower" else 32
    return model, torch.randn(2, 3, side, side, requires_grad=True), texts


@pytest.mark.parametrize("name", MODELS)
def test_open_clip_stays_the_same(name, helpers):
    model, images, texts = create(name, helpers)
    _, attentions, mlps, reasons = MODELS[name]

    def outputs():
        return model(images, texts)

    names = list(model.state_dict())
    before = helpers.run(outputs, model, images)
    report = fastagglo.patch(model)
    kinds = [module.what for module in report.patched]
    assert kinds.count("packed attention") == attentions
    assert kinds.count("gelu_linear_residual") == mlps
    assert {module.what for module in report.left} == reasons
    # float32 throughout; a logit scale of 14 and normalised features.
    helpers.same(before, helpers.run(outputs, model, images), 3e-5)
    assert list(model.state_dict()) == names
    fastagglo.unpatch(model)
    after = helpers.run(outputs, model, images)
    assert all(torch.equal(after.outputs[k], v) for k, v in before.outputs.items())


def test_packed_attention_is_what_runs(helpers):
    model, images, _ = create("clip", helpers)
    fastagglo.patch(model)
    with mock.patch.object(
        attend, "packed_attention_qkv", wraps=attend.packed_attention_qkv
    ) as ours:
        model.encode_image(images)
    assert ours.call_count == 2


def test_torchvision_stays_the_same(helpers):
    torch.manual_seed(0)
    model = torchvision.models.VisionTransformer(32, 8, 2, 2, 32, 64, num_classes=5)
    helpers.randomise(model)
    x = torch.randn(2, 3, 32, 32, requires_grad=True)
    before = helpers.run(lambda: model(x), model, x)
    report = fastagglo.patch(model)
    assert [m.what for m in report.patched] == ["packed attention"] * 2
    helpers.same(before, helpers.run(lambda: model(x), model, x), 1e-5)


@pytest.mark.parametrize("batch_first", [True, False])
def test_what_multihead_attention_is_asked_for(batch_first, helpers):
    """Ours: self-attention, with padding too. PyTorch's: all other calls, with the same results."""
    torch.manual_seed(0)
    model = nn.MultiheadAttention(32, 2, batch_first=batch_first)
    helpers.randomise(model)
    x = torch.randn((2, 7, 32) if batch_first else (7, 2, 32))
    other = torch.randn((2, 5, 32) if batch_first else (5, 2, 32))
    padding = torch.tensor([[0, 0, 0, 0, 0, 1, 1], [0, 0, 0, 0, 0, 0, 0]]).bool()
    added = torch.zeros(2, 7).masked_fill(padding, float("-inf"))
    causal = nn.Transformer.generate_square_subsequent_mask(7)
    quiet = {"need_weights": False}
    calls = {
        "plain": ((x, x, x), quiet, True),
        "padding": ((x, x, x), quiet | {"key_padding_mask": padding}, True),
        "padding, added": ((x, x, x), quiet | {"key_padding_mask": added}, True),
        "weights": ((x, x, x), {}, False),
        "a mask of pairs": ((x, x, x), quiet | {"attn_mask": causal}, False),
        "causal": ((x, x, x), quiet | {"attn_mask": causal, "is_causal": True}, False),
        "other keys": ((x, other, other), quiet, False),
        "one sequence": ((x[0], x[0], x[0]), quiet, False),
    }
    expected = {name: model(*args, **options) for name, (args, options, _) in calls.items()}
    fastagglo.patch(model)
    for name, (args, options, ours) in calls.items():
        packed = attend.packed_attention_qkv
        with mock.patch.object(attend, "packed_attention_qkv", wraps=packed) as spy:
            out, weights = model(*args, **options)
        assert bool(spy.call_count) == ours, name
        torch.testing.assert_close(out, expected[name][0], msg=name)
        assert (weights is None) == (expected[name][1] is None)


def test_dropout_of_weights_in_training_is_pytorchs(helpers):
    model = helpers.randomise(nn.MultiheadAttention(32, 2, dropout=0.5, batch_first=True)).train()
    x = torch.randn(2, 7, 32)

    def outputs():
        return model(x, x, x, need_weights=False)[0]

    before = helpers.run(outputs, model)
    fastagglo.patch(model)
    helpers.same(before, helpers.run(outputs, model), 1e-6)


def test_unusual_multihead_attention_is_left_with_its_reason():
    for model, why in (
        (nn.MultiheadAttention(32, 2, kdim=8, vdim=8), "cross-attention"),
        (nn.MultiheadAttention(32, 2, add_bias_kv=True), "added keys"),
        (nn.MultiheadAttention(32, 2, add_zero_attn=True), "added keys"),
    ):
        with pytest.raises(ValueError, match=why):
            fastagglo.patch(model)
