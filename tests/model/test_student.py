"""The student's forward pass: mixed batches, windows, heads, stochastic depth, training modes."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastagglo.features import Features
from fastagglo.model import HeadSpec, PackedBatch, Student, StudentOutput, create_student

HEADS = {
    "clip": HeadSpec(summary=10, spatial=12, hidden=32),
    "sam": HeadSpec(spatial=8, upsample=2, spatial_blocks=1),
    "text": HeadSpec(summary=6),
}
SIZES = [(96, 96), (160, 128), (64, 224)]


def student(seed: int = 0, **overrides) -> Student:
    """A small student with all parameters away from their symmetric starting values."""
    torch.manual_seed(seed)
    settings = {"heads": HEADS, "width": 48, "mlp_width": 96, "max_resolution": 512} | overrides
    model = create_student("tiny", **settings).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model


def images(n: int, h: int, w: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 1000 * h + w)
    return torch.randint(0, 256, (n, 3, h, w), dtype=torch.uint8, generator=generator)


def mixed() -> list[Tensor]:
    return [images(n, h, w) for n, (h, w) in zip((2, 1, 2), SIZES, strict=True)]


def tensors(features: Features) -> list[Tensor]:
    return [t for t in (features.summary, *(features.spatial or [])) if t is not None]


def all_tensors(out: StudentOutput) -> list[Tensor]:
    return [t for f in (*out.values(), out.backbone) for t in tensors(f)]


def test_shapes() -> None:
    out = student()(PackedBatch.from_images(mixed()))
    assert list(out) == ["clip", "sam", "text"]
    assert out["clip"].summary.shape == (5, 10)
    assert [t.shape for t in out["clip"].spatial] == [
        (2, 6, 6, 12),
        (1, 10, 8, 12),
        (2, 4, 14, 12),
    ]
    assert out["sam"].summary is None
    assert [t.shape for t in out["sam"].spatial] == [(2, 12, 12, 8), (1, 20, 16, 8), (2, 8, 28, 8)]
    assert out["text"].summary.shape == (5, 6)
    assert out["text"].spatial is None
    assert out.backbone.summary.shape == (5, 3 * 48)
    assert [t.shape for t in out.backbone.spatial] == [
        (2, 6, 6, 48),
        (1, 10, 8, 48),
        (2, 4, 14, 48),
    ]


@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_mixed_batch_equals_each_image_alone(window: int | None, dtype: torch.dtype) -> None:
    model, groups = student(window=window).to(dtype), mixed()
    out, first = model(PackedBatch.from_images(groups)), 0
    tolerance = (
        {"rtol": 1e-10, "atol": 1e-10} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-4}
    )
    for g, group in enumerate(groups):
        for i in range(len(group)):
            alone = model(group[i : i + 1])
            for name in (*out, None):
                a, b = (o.backbone if name is None else o[name] for o in (alone, out))
                if b.summary is not None:
                    torch.testing.assert_close(a.summary[0], b.summary[first + i], **tolerance)
                if b.spatial is not None:
                    torch.testing.assert_close(a.spatial[0][0], b.spatial[g][i], **tolerance)
        first += len(group)


def naive_trunk(model: Student, image: Tensor, window: int | None) -> tuple[Tensor, Tensor]:
    """One image through the trunk with padding-free dense code: CLS tokens, (h, w, C) patches."""
    c = model.config
    from fastagglo.model.packing import PIXEL_MEAN, PIXEL_STD

    mean, std = (
        torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (PIXEL_MEAN, PIXEL_STD)
    )
    x = (image.double() / 255 - mean) / std
    weight = model.patch_embed.weight.view(c.width, 3, c.patch_size, c.patch_size)
    x = F.conv2d(x[None], weight, model.patch_embed.bias, stride=c.patch_size)[0].permute(1, 2, 0)
    h, w = x.shape[:2]
    m = max(h, w)
    table = model.positions.table.view(1, c.grid, c.grid, c.width).permute(0, 3, 1, 2)
    x = x + F.interpolate(table, (m, m), mode="bilinear")[0, :, :h, :w].permute(1, 2, 0)
    prefix = torch.cat([torch.stack(list(model.cls_tokens.values())), model.registers])

    def norm(x: Tensor, layer: torch.nn.LayerNorm) -> Tensor:
        return F.layer_norm(x, (c.width,), layer.weight, layer.bias, layer.eps)

    def block(b: torch.nn.Module, x: Tensor) -> Tensor:
        qkv = F.linear(norm(x, b.norm1), b.attn.qkv.weight, b.attn.qkv.bias)
        q, k, v = qkv.view(len(x), 3, c.num_heads, -1).permute(1, 2, 0, 3)
        a = torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, -1) @ v
        a = F.linear(a.transpose(0, 1).flatten(1), b.attn.proj.weight, b.attn.proj.bias)
        x = x + (a * b.ls1.gamma if c.layer_scale is not None else a)
        y = norm(x, b.norm2)
        if c.mlp == "gelu":
            y = F.linear(F.gelu(F.linear(y, b.mlp.fc1.weight, b.mlp.fc1.bias)), b.mlp.fc2.weight)
            y = y + b.mlp.fc2.bias
        else:
            gate, value = F.linear(y, b.mlp.w12.weight, b.mlp.w12.bias).split(c.mlp_width, -1)
            y = F.linear(F.silu(gate) * value, b.mlp.w3.weight, b.mlp.w3.bias)
        return x + (y * b.ls2.gamma if c.layer_scale is not None else y)

    for i, b in enumerate(model.blocks):
        if window is None or i in c.global_layer_set:
            tokens = block(b, torch.cat([prefix, x.flatten(0, 1)]))
            prefix, x = tokens[: len(prefix)], tokens[len(prefix) :].view(h, w, -1)
        else:
            x = x.clone()
            for top in range(0, h, window):
                for left in range(0, w, window):
                    at = slice(top, top + window), slice(left, left + window)
                    x[at] = block(b, x[at].reshape(window**2, -1)).view(window, window, -1)
    return norm(prefix[: len(model.cls_tokens)], model.norm), norm(x, model.norm)


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param({}, id="plain"),
        pytest.param({"mlp": "swiglu", "layer_scale": 0.3, "patch_size": 8}, id="swiglu"),
        pytest.param({"global_layers": ()}, id="only-the-last"),
        pytest.param({"global_layers": (0, 3), "registers": 0}, id="explicit"),
    ],
)
@pytest.mark.parametrize("window", [None, 2])
def test_equals_dense_code(overrides: dict, window: int | None) -> None:
    model = student(window=window, **overrides)
    for h, w in ((64, 64), (32, 96)):
        image = images(1, h, w)
        out = model(image).backbone
        cls, patches = naive_trunk(model, image[0], window)
        # The position weights are fp32.
        torch.testing.assert_close(out.summary[0], cls.flatten(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(out.spatial[0][0], patches, rtol=1e-4, atol=1e-5)


def test_heads_read_their_own_tokens() -> None:
    model = student()
    batch = PackedBatch.from_images(mixed())
    out = model(batch)
    slots = out.backbone.summary.view(5, 3, 48)
    torch.testing.assert_close(out["clip"].summary, model.heads.summary["clip"](slots[:, 0]))
    torch.testing.assert_close(out["text"].summary, model.heads.summary["text"](slots[:, 2]))
    for got, tokens in zip(out["clip"].spatial, out.backbone.spatial, strict=True):
        torch.testing.assert_close(got, model.heads.spatial["clip"](tokens))
    # SAM's spatial head reads the patches through a block of its own.
    tokens = out.backbone.spatial[1]
    from fastagglo.ops.layout import PackedLayout

    through = model.head_blocks["sam"][0](tokens.flatten(0, 2), PackedLayout.from_lengths([80]))
    expected = model.heads.spatial["sam"](through.view(1, 10, 8, 48))
    torch.testing.assert_close(out["sam"].spatial[1], expected)


def test_rotations() -> None:
    model, batch = student(), PackedBatch.from_images(mixed())
    matrix = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))[0]
    plain, rotated = model(batch), model(batch, rotations={"sam": matrix})
    for a, b in zip(plain["sam"].spatial, rotated["sam"].spatial, strict=True):
        torch.testing.assert_close(b, a @ matrix)
    for a, b in zip(plain["clip"].spatial, rotated["clip"].spatial, strict=True):
        assert torch.equal(a, b)


def test_only_some_teachers() -> None:
    model, batch = student(), PackedBatch.from_images(mixed())
    full, part = model(batch), model(batch, only=["text", "clip"])
    assert list(part) == ["clip", "text"]
    assert torch.equal(full["text"].summary, part["text"].summary)
    model.head_blocks["sam"][0].register_forward_hook(lambda *_: pytest.fail("sam was computed"))
    assert model(batch, only=[]) == {}
    model(batch, only=["clip"])


def test_window_argument_overrides_the_config() -> None:
    groups = mixed()
    windowed, plain = student(window=2), student()
    a, b = windowed(groups[0]).backbone.summary, plain(groups[0]).backbone.summary
    assert (a - b).abs().max() > 1e-3
    assert torch.equal(windowed(groups[0], window=None).backbone.summary, b)
    assert torch.equal(plain(groups[0], window=2).backbone.summary, a)
    three = plain(groups[0], window=3).backbone.summary
    assert (three - a).abs().max() > 1e-3


def test_prefix_tokens_pass_windowed_layers_unchanged() -> None:
    model = student(window=2, global_layers=())  # the last layer is global all the same
    seen: list[Tensor] = []
    model.blocks[-1].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    image = mixed()[0]
    model(image)
    rows = seen[0].view(len(image), -1, 48)  # image by image, the prefix first
    for i, token in enumerate([*model.cls_tokens.values(), *model.registers]):
        assert torch.equal(rows[:, i], token.expand(len(image), -1))


def test_a_plain_backbone() -> None:
    out = student(heads={})(mixed()[0])
    assert out == {}
    assert out.backbone.summary.shape == (2, 48)


def test_no_images() -> None:
    model = student(window=2, drop_path=0.2)
    empty, some = images(0, 64, 64), images(1, 32, 32)
    out = model(PackedBatch.from_images([empty, some]))
    assert out["clip"].spatial[0].shape == (0, 4, 4, 12)
    torch.testing.assert_close(out["clip"].summary, model(some)["clip"].summary)
    out = model.train()(empty)
    assert out["clip"].summary.shape == (0, 10)
    assert out["sam"].spatial[0].shape == (0, 8, 8, 8)
    sum(t.sum() for t in all_tensors(out)).backward()


class TestTraining:
    def test_gradients_reach_every_parameter(self) -> None:
        model = student(window=2, layer_scale=0.1).train()
        out = model(PackedBatch.from_images(mixed()))
        generator = torch.Generator().manual_seed(0)
        loss = sum(
            (t * torch.randn(t.shape, generator=generator, dtype=t.dtype)).sum()
            for t in all_tensors(out)
        )
        loss.backward()
        assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []

    @pytest.mark.parametrize("window", [None, 2])
    def test_gradients_equal_the_sum_of_gradients_alone(self, window: int | None) -> None:
        model, groups = student(window=window), mixed()

        def gradients(batches: list[list[Tensor]]) -> list[Tensor]:
            model.zero_grad()
            for batch in batches:
                out = model(PackedBatch.from_images(batch))
                sum(t.square().sum() for t in all_tensors(out)).backward()
            return [p.grad.clone() for p in model.parameters()]

        together = gradients([groups])
        alone = gradients([[g[i : i + 1]] for g in groups for i in range(len(g))])
        for a, b in zip(together, alone, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)

    def test_generator_makes_a_step_repeatable(self) -> None:
        model, batch = student(drop_path=0.3).train(), PackedBatch.from_images(mixed())

        def run(seed: int) -> Tensor:
            generator = torch.Generator().manual_seed(seed)
            return model(batch, generator=generator)["clip"].summary

        assert torch.equal(run(1), run(1))
        assert not torch.equal(run(1), run(2))
        state = torch.get_rng_state()
        run(3)
        assert torch.equal(state, torch.get_rng_state())
        first = model(batch)["clip"].summary
        torch.set_rng_state(state)
        assert torch.equal(first, model(batch)["clip"].summary)

    def test_evaluation_draws_nothing(self) -> None:
        model = student(drop_path=0.3)
        state = torch.get_rng_state()
        model(mixed()[0])
        assert torch.equal(state, torch.get_rng_state())

    @pytest.mark.parametrize("window", [None, 2])
    def test_stochastic_depth_drops_whole_images(self, window: int | None) -> None:
        # One block that is the identity plus a large constant shows what was dropped.
        model = student(depth=3, drop_path=0.8, window=window, global_layers=(0,), registers=2)
        model.train()
        seen: list[Tensor] = []
        model.blocks[1].register_forward_hook(lambda _, args, out: seen.append(args[2]))
        n = 400
        model(PackedBatch.from_images([images(n, 32, 32), images(3, 32, 64)]))
        keep = seen[0]
        prefix = 0 if window else 5
        lengths = [4 + prefix] * n + [8 + prefix] * 3
        per_image = keep[..., 0].split(lengths, dim=1)
        assert all((p == p[:, :1]).all() for p in per_image)  # one fate per image and branch
        fates = torch.stack([p[:, 0] for p in per_image])
        assert fates.unique().tolist() == pytest.approx([0.0, 1 / 0.6])  # half of 0.8 is dropped
        rate = (fates == 0).double().mean(0)
        assert (rate - 0.4).abs().max() < 4 * 0.5 / n**0.5
        assert 0.4 < (fates[:, 0] == fates[:, 1]).double().mean() < 0.6  # branches apart

    def test_stochastic_depth_grows_from_zero(self) -> None:
        model = student(depth=3, drop_path=0.4, global_layers=1).train()
        keep = model._draw_keep(5000, torch.zeros(1, dtype=torch.float64), None)
        assert keep.shape == (3, 2, 5000)
        rates = (keep == 0).double().mean((1, 2))
        assert rates[0] == 0
        assert (rates - torch.tensor([0, 0.2, 0.4])).abs().max() < 0.02
        torch.testing.assert_close(keep.mean((1, 2)), torch.ones(3).double(), atol=0.03, rtol=0)

    @pytest.mark.parametrize("window", [None, 2])
    def test_checkpointing_changes_nothing(self, window: int | None) -> None:
        model = student(drop_path=0.3, window=window).train()
        batch, grads = PackedBatch.from_images(mixed()), []
        for flag in (False, True):
            model.checkpoint_blocks = flag
            model.zero_grad()
            out = model(batch, generator=torch.Generator().manual_seed(0))
            sum(t.square().sum() for t in all_tensors(out)).backward()
            grads.append([p.grad.clone() for p in model.parameters()])
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))

    def test_a_frozen_trunk_gets_no_gradients(self) -> None:
        model = student().train()
        for p in model.trunk_parameters():
            p.requires_grad_(False)
        out = model(mixed()[0])
        assert not out.backbone.summary.requires_grad
        sum(t.sum() for f in out.values() for t in tensors(f)).backward()
        assert all(p.grad is None for p in model.trunk_parameters())
        assert all(p.grad is not None for p in model.head_parameters())

    def test_training_after_inference_mode(self) -> None:
        # Everything cached for a mix must be usable by autograd later, whoever met the mix first.
        model, batch = student(window=2), PackedBatch.from_images([images(1, 288, 224)])
        with torch.inference_mode():
            model(batch)
            model.train()(batch)
        model.train()(batch)["sam"].spatial[0].sum().backward()
        model.eval()(batch)["sam"].spatial[0].sum().backward()
        assert model.patch_embed.weight.grad is not None

    def test_a_mix_first_met_under_another_default_device(self) -> None:
        model, batch = student(window=2), PackedBatch.from_images([images(1, 352, 224)])
        with torch.device("meta"):
            assert model(batch).backbone.summary.device.type == "cpu"


class TestPrecision:
    def test_autocast(self) -> None:
        model, batch = student(window=2).float(), PackedBatch.from_images(mixed())
        exact = model(batch)
        residual: list[Tensor] = []
        model.norm.register_forward_hook(lambda _, args, out: residual.append(args[0]))
        with torch.autocast("cpu", torch.bfloat16):
            out = model(batch, rotations={"clip": torch.eye(12)})
        assert residual[0].dtype == torch.float32  # the residual stream stays exact
        assert out["clip"].summary.dtype == torch.bfloat16
        for a, b in zip(all_tensors(out), all_tensors(exact), strict=True):
            assert (a.float() - b).norm() < 0.05 * b.norm()
        sum(t.float().sum() for t in all_tensors(out)).backward()
        assert all(p.grad.dtype == torch.float32 for p in model.parameters())

    def test_a_bf16_student(self) -> None:
        model, batch = student(drop_path=0.1).bfloat16().train(), PackedBatch.from_images(mixed())
        out = model(batch)
        assert out["sam"].spatial[0].dtype == torch.bfloat16
        sum(t.float().sum() for t in all_tensors(out)).backward()


def test_copies_are_independent() -> None:
    model = student()
    ema = copy.deepcopy(model)
    with torch.no_grad():
        model.patch_embed.weight.zero_()
    assert ema.patch_embed.weight.any()
    assert list(ema(mixed()[0])) == list(HEADS)


def test_blocks_compile_without_breaks() -> None:
    model, batch = student(), PackedBatch.from_images(mixed())
    expected = model(batch)["clip"].summary
    model.blocks[0].compile(backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(model(batch)["clip"].summary, expected)
    assert "blocks.0.attn.qkv.weight" in model.state_dict()


class TestErrors:
    def test_sizes(self) -> None:
        model = student()
        with pytest.raises(
            ValueError, match=r"multiples of the patch, 16 px, got 100; nearest: 96 or 112"
        ):
            model(images(1, 100, 96))
        with pytest.raises(ValueError, match="got 10; nearest: 16"):
            model(images(1, 96, 10))
        with pytest.raises(ValueError, match="at most max_resolution=512 px, got 528"):
            model(images(1, 528, 96))

    def test_windows(self) -> None:
        model = student(window=4)
        with pytest.raises(
            ValueError,
            match=r"windows .*96 x 128 px \(6 x 8 patches\).*64 px \(nearest: 96 -> 64 or 128\)",
        ):
            model(images(1, 96, 128))
        with pytest.raises(ValueError, match="windows of 5 patches"):
            model(PackedBatch.from_images([images(1, 80, 80), images(1, 96, 80)]), window=5)
        with pytest.raises(ValueError, match="at least 1 patch, got 0"):
            model(images(1, 64, 64), window=0)
        for bad in (2.0, True, "all"):
            with pytest.raises(TypeError, match="must be an int, None or 'config'"):
                model(images(1, 64, 64), window=bad)

    def test_inputs(self) -> None:
        model = student()
        with pytest.raises(TypeError, match=r"expected a PackedBatch or a .* tensor, got list"):
            model([images(1, 64, 64)])
        with pytest.raises(ValueError, match=r"\(N, 3, H, W\), got \(3, 64, 64\)"):
            model(images(1, 64, 64)[0])
        with pytest.raises(
            ValueError, match=r"batch is on meta, the student on cpu; call batch\.to"
        ):
            model(PackedBatch.from_images([images(1, 64, 64)]).to("meta"))
        with pytest.raises(ValueError, match=r"only: no teacher 'sma'; did you mean 'sam'\?"):
            model(images(1, 64, 64), only=["sma"])
        with pytest.raises(ValueError, match="'text' has no spatial head"):
            model(images(1, 64, 64), rotations={"text": torch.eye(6)})
        with pytest.raises(TypeError, match="config must be a StudentConfig"):
            Student({"width": 3})
