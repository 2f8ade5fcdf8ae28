"""Adaptor heads against plain PyTorch, their twin and gradcheck."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from fastagglo.ops import mlp_torch
from fastagglo.ops.backend import use_backend
from fastagglo.ops.heads import AdaptorHeads, AdaptorMLP, HeadSpec, adaptor_mlp, pixel_shuffle
from fastagglo.ops.reference.heads import adaptor_mlp as reference


def gemms(call: Callable[[], object]) -> list[int]:
    """Multiplications of each GEMM that runs, within operators too."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as record:
        call()
    # aten::linear and aten::matmul come down to these.
    places = {"aten::mm": 0, "aten::addmm": 1, "aten::addmm_": 1}
    return [
        math.prod(event.input_shapes[place]) * event.input_shapes[place + 1][1]
        for event in record.events()
        if (place := places.get(event.name)) is not None
    ]


@contextmanager
def saved_bytes(skip: Sequence[Tensor]) -> Iterator[list[int]]:
    """Bytes of each memory block that autograd keeps, but those of some tensors."""
    seen = {x.untyped_storage().data_ptr() for x in skip} | {0}
    sizes: list[int] = []

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            sizes.append(storage.nbytes())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        yield sizes


VARIANTS = [
    pytest.param({}, id="plain"),
    pytest.param({"blocks": 2}, id="blocks"),
    pytest.param({"pre_norm": True}, id="pre_norm"),
    pytest.param({"upsample": 2}, id="upsample"),
    pytest.param({"upsample": 3, "blocks": 1, "pre_norm": True}, id="all"),
]


def make(out: int = 5, dtype: torch.dtype = torch.float64, **options) -> AdaptorMLP:
    """A head whose parameters are all random: zero biases and unit norms would hide mistakes."""
    torch.manual_seed(0)
    head = AdaptorMLP(6, 7, out, **options).to(dtype)
    with torch.no_grad():
        for p in head.parameters():
            p.copy_(torch.randn_like(p) * 0.5)
    return head


def rotation(size: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.linalg.qr(torch.randn(size, size, dtype=dtype, generator=generator))[0]


def grid(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(1))


def test_names_are_those_of_the_published_weights() -> None:
    head = AdaptorMLP(6, 7, 5, blocks=2, upsample=2, pre_norm=True)
    shapes = {name: tuple(p.shape) for name, p in head.named_parameters()}
    assert shapes == {
        "pre_norm.0.weight": (6,),
        "pre_norm.0.bias": (6,),
        "fc1.weight": (7, 6),
        "fc1.bias": (7,),
        "blocks.0.0.weight": (7,),
        "blocks.0.0.bias": (7,),
        "blocks.0.2.weight": (7, 7),
        "blocks.0.2.bias": (7,),
        "blocks.1.0.weight": (7,),
        "blocks.1.0.bias": (7,),
        "blocks.1.2.weight": (7, 7),
        "blocks.1.2.bias": (7,),
        "final.0.weight": (7,),
        "final.0.bias": (7,),
        "final.2.weight": (20, 7),
        "final.2.bias": (20,),
    }
    for module in head.modules():
        if isinstance(module, nn.Linear):
            assert not module.bias.any()
            assert 0 < module.weight.std() < 0.04


def test_equals_a_plain_sequential() -> None:
    head = make(blocks=1, pre_norm=True)
    state = head.state_dict()

    class Residual(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return x + super().forward(x)

    plain = nn.Sequential(
        nn.LayerNorm(6),
        nn.GELU(),
        nn.Linear(6, 7),
        Residual(nn.LayerNorm(7), nn.GELU(), nn.Linear(7, 7)),
        nn.LayerNorm(7),
        nn.GELU(),
        nn.Linear(7, 5),
    ).double()
    plain.load_state_dict(dict(zip(plain.state_dict(), state.values(), strict=True)))
    x = grid(3, 4, 6)
    torch.testing.assert_close(head(x), plain(x), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("options", VARIANTS)
@pytest.mark.parametrize("rotate", [False, True])
def test_equals_the_twin_with_gradients(options: dict, rotate: bool) -> None:
    head, matrix = make(**options), rotation(5) if rotate else None
    x = grid(2, 4, 3, 6).transpose(1, 2).requires_grad_()  # not contiguous
    upstream = grid(*reference(x, head, rotation=matrix).shape)
    inputs = [x, *head.parameters()]
    expected = torch.autograd.grad(reference(x, head, rotation=matrix), inputs, upstream)
    y = adaptor_mlp(x, head, rotation=matrix)
    torch.testing.assert_close(y, reference(x, head, rotation=matrix), rtol=1e-12, atol=1e-12)
    for got, want in zip(torch.autograd.grad(y, inputs, upstream), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("options", [{}, {"upsample": 2, "blocks": 1, "pre_norm": True}])
def test_gradcheck(options: dict) -> None:
    head, matrix = make(3, **options), rotation(3)
    x = grid(1, 2, 1, 6).requires_grad_()
    names, parameters = zip(*head.named_parameters(), strict=True)

    def run(x: Tensor, matrix: Tensor, *values: Tensor) -> Tensor:
        state = dict(zip(names, values, strict=True))
        return torch.func.functional_call(head, state, (x, matrix))

    matrix.requires_grad_()  # a learned rotation gets its gradient too
    assert torch.autograd.gradcheck(run, (x, matrix, *parameters))


@pytest.mark.parametrize("frozen", ["fc1", "final", "blocks", "x"])
def test_each_part_can_be_frozen(frozen: str) -> None:
    head, x = make(blocks=1), grid(3, 6).requires_grad_(frozen != "x")
    wanted = {name: p for name, p in head.named_parameters() if not name.startswith(frozen)}
    everything = torch.autograd.grad(head(x, rotation(5)).square().sum(), list(wanted.values()))
    for name, p in head.named_parameters():
        p.requires_grad_(name in wanted)
    head(x, rotation(5)).square().sum().backward()
    for (name, p), want in zip(wanted.items(), everything, strict=True):
        torch.testing.assert_close(p.grad, want, msg=name)
    assert all(p.grad is None for name, p in head.named_parameters() if name not in wanted)
    assert (x.grad is None) == (frozen == "x")


def test_the_rotation_multiplies_by_its_transpose() -> None:
    head = make(2)
    quarter = torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=torch.float64)
    x = grid(4, 6)
    y = head(x)
    # R^T (a, b) = (b, -a), by hand.
    torch.testing.assert_close(head(x, quarter), torch.stack([y[:, 1], -y[:, 0]], dim=1))


def test_the_fold_is_in_fp32_under_autocast() -> None:
    torch.manual_seed(0)
    head, x = make(64, torch.float32), grid(32, 6, dtype=torch.float32)
    matrix = rotation(64)  # fp64, as eigh on a CPU leaves it
    exact = head.double()(x.double(), matrix)
    head.float()
    with torch.autocast("cpu", torch.bfloat16):
        assert head._rotated(matrix.mT)[0].dtype == torch.float32
        folded, plain = head(x, matrix), head(x) @ matrix.float()
    assert folded.dtype == torch.bfloat16
    error, budget = ((v.double() - exact).norm() for v in (folded, plain))
    # One rounding of the folded weight may cost what rounding weight and output costs, no more.
    assert error < 1.2 * budget
    assert error < 0.01 * exact.norm()


@pytest.mark.parametrize("options", [{}, {"upsample": 2}])
def test_rotate_output_keeps_the_function(options: dict) -> None:
    head, x = make(**options), grid(2, 3, 3, 6)
    before, matrix = head(x), rotation(5)
    head.rotate_output_(matrix)
    torch.testing.assert_close(head(x, matrix), before, rtol=1e-12, atol=1e-12)
    assert (head(x) - before).abs().max() > 0.1
    assert head.final[2].weight.requires_grad


@pytest.mark.parametrize("options", [{}, {"upsample": 2}])
@pytest.mark.parametrize("per_channel", [False, True])
def test_fold_affine_predicts_the_teachers_own_space(options: dict, per_channel: bool) -> None:
    head, x = make(**options), grid(2, 3, 3, 6)
    mean, matrix = grid(5), rotation(5)
    scale = grid(5).abs() + 0.5 if per_channel else torch.tensor(1.7, dtype=torch.float64)
    expected = scale * (head(x) @ matrix) + mean
    head.fold_affine_(mean, scale, matrix)
    torch.testing.assert_close(head(x), expected, rtol=1e-12, atol=1e-12)
    head = make(**options)
    expected = 2.0 * head(x) + mean
    head.fold_affine_(mean, 2.0)
    torch.testing.assert_close(head(x), expected, rtol=1e-12, atol=1e-12)


def test_pixel_shuffle_channel_order() -> None:
    h, w, u, c = 2, 3, 2, 4
    tokens = torch.arange(h * w * u * u * c).reshape(1, h, w, u * u * c)
    cells = pixel_shuffle(tokens, u)
    assert cells.shape == (1, h * u, w * u, c)
    for y in range(h * u):
        for x in range(w * u):
            first = ((y % u) * u + x % u) * c
            assert cells[0, y, x].tolist() == tokens[0, y // u, x // u, first : first + c].tolist()


def test_tokens_are_the_unshuffled_grid() -> None:
    head, x = make(upsample=2), grid(2, 3, 4, 6)
    tokens = head.tokens(x.flatten(0, 2), rotation(5))
    assert tokens.shape == (24, 20)
    torch.testing.assert_close(pixel_shuffle(tokens.view(2, 3, 4, 20), 2), head(x, rotation(5)))


@pytest.mark.parametrize("shape", [(0, 6), (1, 6), (6,), (2, 0, 3, 6)])
def test_few_or_no_rows(shape: tuple[int, ...]) -> None:
    x = grid(*shape).requires_grad_()
    head = make(blocks=1)
    y = head(x, rotation(5))
    assert y.shape == (*shape[:-1], 5)
    y.sum().backward()
    assert head.fc1.weight.grad is not None
    assert x.grad.shape == x.shape


def test_layer_norm_is_fp32_under_autocast_and_in_bf16_modules() -> None:
    head = make(dtype=torch.float32, pre_norm=True)
    x = 100 + grid(4, 6, dtype=torch.float32)  # a large mean, which bf16 statistics would lose
    with torch.autocast("cpu", torch.bfloat16):
        assert head.pre_norm[0](x.bfloat16()).dtype == torch.float32
        y = head(x)
    torch.testing.assert_close(y.float(), head(x), rtol=0.05, atol=0.05)
    half = make(dtype=torch.bfloat16, pre_norm=True)
    assert half(x.bfloat16(), rotation(5)).dtype == torch.bfloat16


def test_shapes_on_the_meta_device() -> None:
    head = make(upsample=2).to("meta", torch.float32)
    x, r = torch.empty(2, 3, 4, 6, device="meta"), torch.eye(5, device="meta")
    assert adaptor_mlp(x, head, rotation=r).shape == (2, 6, 8, 5)


def test_compiles_without_breaks() -> None:
    head, x, matrix = make(upsample=2, blocks=1), grid(1, 2, 2, 6), rotation(5)
    compiled = torch.compile(adaptor_mlp, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, head, rotation=matrix), head(x, matrix))


def test_backends() -> None:
    head, x = make(), grid(2, 6)
    with use_backend("torch"):
        adaptor_mlp(x, head)
    with use_backend("xformers"), pytest.raises(ValueError, match="adaptor_mlp"):
        adaptor_mlp(x, head)


class TestErrors:
    def test_sizes(self) -> None:
        with pytest.raises(ValueError, match="AdaptorMLP: hidden must be at least 1, got 0"):
            AdaptorMLP(6, 0, 5)
        with pytest.raises(ValueError, match="upsample must be at least 1, got 0"):
            AdaptorMLP(6, 7, 5, upsample=0)
        with pytest.raises(TypeError, match=r"out_features must be an int, got 5\.0"):
            AdaptorMLP(6, 7, 5.0)
        with pytest.raises(TypeError, match="blocks must be an int, got True"):
            AdaptorMLP(6, 7, 5, blocks=True)
        with pytest.raises(TypeError, match="pre_norm must be a bool, got 'no'"):
            AdaptorMLP(6, 7, 5, pre_norm="no")

    def test_inputs(self) -> None:
        head = make()
        with pytest.raises(TypeError, match="head must be an AdaptorMLP, got Linear"):
            adaptor_mlp(grid(2, 6), nn.Linear(6, 5))
        with pytest.raises(TypeError, match="adaptor_mlp: x must be a floating-point tensor, got"):
            adaptor_mlp(torch.ones(2, 6, dtype=torch.int64), head)
        with pytest.raises(TypeError, match="got list"):
            adaptor_mlp([1.0], head)
        with pytest.raises(ValueError, match=r"x must be \(\.\.\., 6\), got \(2, 7\)"):
            head(grid(2, 7))
        with pytest.raises(ValueError, match="x is on meta, the head on cpu"):
            head(torch.empty(2, 6, device="meta"))
        with pytest.raises(ValueError, match=r"\(N, h, w, 6\) because upsample is 2, got \(4, 6\)"):
            make(upsample=2)(grid(4, 6))

    def test_input_of_another_dtype(self) -> None:
        for head in (make(), make(pre_norm=True)):
            for call in (head, lambda x, head=head: adaptor_mlp(x, head)):
                with pytest.raises(TypeError, match=r"x must have the head's dtype, torch.float64"):
                    call(grid(2, 6).bfloat16())
        with torch.autocast("cpu", torch.bfloat16):
            assert make().float()(grid(2, 6).bfloat16()).shape == (2, 5)

    def test_rotation(self) -> None:
        head, x = make(), grid(2, 6)
        with pytest.raises(ValueError, match=r"rotation must be \(5, 5\), got \(6, 6\)"):
            head(x, rotation(6))
        with pytest.raises(ValueError, match=r"rotation must be \(5, 5\), got \(4, 4\)"):
            head.rotate_output_(rotation(4))
        with pytest.raises(TypeError, match="rotation must be a floating-point tensor"):
            head(x, torch.eye(5, dtype=torch.int64))
        with pytest.raises(ValueError, match="rotation is on meta"):
            head(x, torch.eye(5, device="meta"))

    def test_fold(self) -> None:
        with pytest.raises(ValueError, match=r"mean must be \(5,\), got \(4,\)"):
            make().fold_affine_(torch.zeros(4), 1.0)
        with pytest.raises(ValueError, match=r"scale must be \(\) or \(5,\), got \(4,\)"):
            make().fold_affine_(torch.zeros(5), torch.ones(4))

    def test_pixel_shuffle(self) -> None:
        with pytest.raises(ValueError, match=r"got \(2, 2, 6\)"):
            pixel_shuffle(torch.zeros(2, 2, 6), 2)
        with pytest.raises(ValueError, match=r"got \(4, 8\)"):
            pixel_shuffle(torch.zeros(4, 8), 2)

    def test_spec(self) -> None:
        with pytest.raises(ValueError, match="give summary, spatial or both"):
            HeadSpec()
        with pytest.raises(ValueError, match="need a spatial head"):
            HeadSpec(summary=4, upsample=2)
        with pytest.raises(ValueError, match="needs a summary head"):
            HeadSpec(spatial=4, summary_hidden=3)
        with pytest.raises(ValueError, match="summary_blocks needs a summary head"):
            HeadSpec(spatial=4, summary_blocks=3)
        with pytest.raises(ValueError, match="spatial_block must be 'student' or 'timm'"):
            HeadSpec(spatial=4, spatial_block="vit")
        with pytest.raises(ValueError, match="spatial must be at least 1, got 0"):
            HeadSpec(spatial=0)
        with pytest.raises(TypeError, match="summary must be an int, got '4'"):
            HeadSpec(summary="4")
        with pytest.raises(TypeError, match="pre_norm must be a bool, got 1"):
            HeadSpec(summary=4, pre_norm=1)
        with pytest.raises(ValueError, match=r"'upsampl'; did you mean 'upsample'\?"):
            HeadSpec.from_dict({"spatial": 4, "upsampl": 2})
        with pytest.raises(TypeError, match="expected a mapping"):
            HeadSpec.from_dict(3)

    @pytest.mark.parametrize("name", ["", "a.b", "keys", "training", "forward", "get"])
    def test_names(self, name: str) -> None:
        with pytest.raises(ValueError, match="teacher"):
            AdaptorHeads(6, {name: HeadSpec(summary=4)})

    def test_heads(self) -> None:
        with pytest.raises(TypeError, match="must be a string, got 3"):
            AdaptorHeads(6, {3: HeadSpec(summary=4)})
        with pytest.raises(TypeError, match="must be a HeadSpec, got 4"):
            AdaptorHeads(6, {"clip": 4})
        with pytest.raises(TypeError, match="must map names to HeadSpec"):
            AdaptorHeads(6, [HeadSpec(summary=4)])
        heads = AdaptorHeads(6, {"clip": HeadSpec(summary=4), "sam": HeadSpec(spatial=3)})
        summary, spatial = torch.zeros(2, 2, 6), torch.zeros(5, 6)
        with pytest.raises(ValueError, match=r"only: no teacher 'clp'; did you mean 'clip'\?"):
            heads(summary, spatial, only=["clp"])
        with pytest.raises(TypeError, match="only must be a collection"):
            heads(summary, spatial, only="clip")
        with pytest.raises(ValueError, match="rotations: no teacher 'dino'; known: 'clip', 'sam'"):
            heads(summary, spatial, {"dino": torch.eye(4)})
        with pytest.raises(ValueError, match="'clip' has no spatial head"):
            heads(summary, spatial, {"clip": torch.eye(4)})
        with pytest.raises(ValueError, match=r"summary must be \(N, 2, C\).*got \(2, 3, 6\)"):
            heads(torch.zeros(2, 3, 6), spatial)
        with pytest.raises(ValueError, match="spatial lacks teacher 'sam'"):
            heads(summary, {"clip": spatial})
        with pytest.raises(TypeError, match=r"summary must be a tensor, a mapping .*got list"):
            heads([summary], spatial)
        with pytest.raises(TypeError, match=r"spatial must be a tensor, a mapping .*got list"):
            heads(summary, [spatial])
        with pytest.raises(TypeError, match=r"rotations must map .*got list"):
            heads(summary, spatial, [torch.eye(3)])


def test_spec_round_trip() -> None:
    spec = HeadSpec(4, 5, 6, 7, blocks=1, upsample=2, pre_norm=True, spatial_blocks=2)
    assert HeadSpec.from_dict(spec.to_dict()) == spec


class TestAdaptorHeads:
    specs = {  # noqa: RUF012
        "clip": HeadSpec(summary=4, spatial=3, hidden=8, summary_hidden=9, blocks=1),
        "sam": HeadSpec(spatial=2, upsample=2),
        "text": HeadSpec(summary=5, pre_norm=True),
    }

    def heads(self) -> AdaptorHeads:
        torch.manual_seed(0)
        return AdaptorHeads(6, self.specs).double()

    def test_each_head_reads_its_slot(self) -> None:
        heads, summary, spatial = self.heads(), grid(2, 3, 6), grid(7, 6)
        out = heads(summary, spatial, {"clip": rotation(3)})
        assert list(out) == ["clip", "sam", "text"]
        torch.testing.assert_close(out["clip"][0], heads.summary["clip"](summary[:, 0]))
        torch.testing.assert_close(out["text"][0], heads.summary["text"](summary[:, 2]))
        torch.testing.assert_close(out["clip"][1], heads.spatial["clip"](spatial) @ rotation(3))
        assert out["sam"][1].shape == (7, 8)
        assert out["sam"][0] is None
        assert out["text"][1] is None

    def test_mappings_equal_slots(self) -> None:
        heads, summary, spatial = self.heads(), grid(2, 3, 6), grid(7, 6)
        expected = heads(summary, spatial)
        named = {name: summary[:, i] for i, name in enumerate(self.specs)}
        got = heads(named, dict.fromkeys(self.specs, spatial))
        for name, pair in expected.items():
            for a, b in zip(pair, got[name], strict=True):
                assert (a is None and b is None) or torch.equal(a, b)

    def test_hidden_widths(self) -> None:
        heads = self.heads()
        assert heads.summary["clip"].fc1.out_features == 9
        assert heads.spatial["clip"].fc1.out_features == 8
        assert heads.spatial["sam"].fc1.out_features == 6
        assert len(heads.summary["clip"].blocks) == len(heads.spatial["clip"].blocks) == 1

    def test_dropped_teachers_cost_nothing(self) -> None:
        heads, spatial = self.heads(), grid(7, 6).requires_grad_()
        done: dict[str, list[int]] = {}
        for only in ("text", "clip sam", "clip sam text"):

            def step(only: str = only) -> None:
                out = heads(grid(2, 3, 6), spatial, {"clip": rotation(3)}, only.split())
                assert list(out) == only.split()
                sum(x.sum() for pair in out.values() for x in pair if x is not None).backward()

            done[only] = sorted(gemms(step))
        assert done["text"]
        assert done["clip sam text"] == sorted(done["clip sam"] + done["text"])

    def test_an_unused_output_costs_no_gemm(self) -> None:
        heads, x = self.heads(), grid(7, 6).requires_grad_()

        def backward(*names: str) -> list[int]:
            out = heads(None, x)
            loss = sum(out[name][1].sum() for name in names)
            return gemms(loss.backward)

        with_sam, without = backward("clip", "sam"), backward("clip")
        # Gradients of sam's last layer (6 -> 8) and of its fc1 (6 -> 6), weight and input each.
        assert sum(with_sam) - sum(without) == 7 * 2 * (6 * 8 + 6 * 6)

    @pytest.mark.parametrize("joined", [False, True])
    def test_teachers_share_the_first_layer(
        self, joined: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(mlp_torch, "joined", lambda *_: joined)  # as on a CPU, and as on CUDA
        heads, x = self.heads(), grid(7, 6).requires_grad_()
        grads = {}
        for shared in (True, False):
            heads.zero_grad()
            x.grad = None
            given = x if shared else {"clip": x, "sam": x}
            out = heads(None, given, {"clip": rotation(3)})
            (out["clip"][1].square().sum() + out["sam"][1].sum()).backward()
            grads[shared] = [x.grad, *(p.grad for p in heads.spatial.parameters())]
        for one, other in zip(*grads.values(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)

    def test_recompute_is_a_switch_for_all_heads(self) -> None:
        heads, x = self.heads(), grid(7, 6).requires_grad_()
        kept, grads = {}, {}
        for recompute in (True, False):
            heads.recompute = recompute
            assert heads.recompute is recompute
            heads.zero_grad()
            with saved_bytes(skip=[x, *heads.parameters()]) as kept[recompute]:
                out = heads(None, x)
            sum(tokens.sum() for _, tokens in out.values() if tokens is not None).backward()
            grads[recompute] = [p.grad for p in heads.spatial.parameters()]
        # clip: 8 channels before its block and its last layer; sam: 6 before its last.
        assert sum(kept[True]) == 7 * 8 * (8 + 2 + 8 + 2 + 6 + 2)
        assert sum(kept[False]) - sum(kept[True]) == 7 * 8 * (8 + 8 + 6)
        for one, other in zip(*grads.values(), strict=True):
            assert torch.equal(one, other)

    def test_one_kind_alone(self) -> None:
        heads = self.heads()
        assert all(summary is None for summary, _ in heads(None, grid(7, 6)).values())
        assert all(spatial is None for _, spatial in heads(grid(2, 3, 6), None).values())

    def test_no_heads(self) -> None:
        assert AdaptorHeads(6, {})(torch.zeros(2, 0, 6), torch.zeros(3, 6)) == {}


def test_the_cells_of_a_patch_start_out_equal():
    head = AdaptorMLP(8, 8, 5, upsample=2)
    out = head(torch.randn(1, 3, 4, 8))
    for dy, dx in ((0, 1), (1, 0), (1, 1)):
        assert torch.equal(out[:, dy::2, dx::2], out[:, ::2, ::2])
