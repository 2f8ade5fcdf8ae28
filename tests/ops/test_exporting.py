"""While ``torch.export`` traces, every op gives standard operators, with the op's own results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from fastagglo import Compress, ops
from fastagglo.compress import _exported_stride, _stride
from fastagglo.features import Features
from fastagglo.ops import PackedLayout


class Call(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *arguments: Tensor) -> Any:
        return self.function(*arguments)


def traced(
    function: Callable[..., Any], arguments: Sequence[Tensor], sizes: Any = None
) -> ExportedProgram:
    """The program of a function, in which nothing is left of this library."""
    program = torch.export.export(
        Call(function), tuple(arguments), dynamic_shapes=None if sizes is None else (sizes,)
    ).run_decompositions({})
    targets = {str(node.target) for node in program.graph.nodes}
    assert not [name for name in targets if "fastagglo" in name]
    return program


def assert_the_same(function: Callable[..., Any], arguments: Sequence[Tensor]) -> None:
    found = traced(function, arguments).module()(*arguments)
    torch.testing.assert_close(found, function(*arguments))


@pytest.mark.parametrize("inside", [False, True], ids=["layout given", "layout made"])
def test_attention(inside: bool) -> None:
    lengths = [5, 5, 0, 9, 5]
    given = PackedLayout.from_lengths(lengths, capacity=30)
    q, k, v = torch.randn(3, 30, 2, 8)
    bias = torch.randn(30, 2)
    bias[10:19, 0] = -torch.inf  # a whole segment of one head
    bias[2] = -torch.inf

    def attend(*qkv: Tensor) -> Tensor:
        layout = PackedLayout.from_lengths(lengths, capacity=30) if inside else given
        return ops.packed_attention(*qkv, layout, key_bias=bias, scale=0.3)

    assert_the_same(attend, (q, k, v))
    assert_the_same(lambda x: ops.packed_attention_qkv(x, given), (torch.stack([q, k, v], 1),))
    # What was made while tracing has left nothing behind that a later call would find.
    assert given.lengths == tuple(lengths)
    layout = PackedLayout.from_lengths([0], capacity=4)
    assert_the_same(lambda x: ops.packed_attention(x, x, x, layout), (q[:4],))


def test_attention_in_half_precision_keeps_its_bias() -> None:
    layout = PackedLayout.from_lengths([40])
    q, k, v = torch.randn(3, 40, 2, 8).bfloat16()
    bias = 100 + torch.rand(40)  # bfloat16 has steps of 0.5 there
    found = traced(lambda *x: ops.packed_attention(*x, layout, key_bias=bias), (q, k, v))
    exact = ops.packed_attention(*(x.double() for x in (q, k, v)), layout, key_bias=bias)
    torch.testing.assert_close(found.module()(q, k, v).double(), exact, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mlp(dtype: torch.dtype) -> None:
    x, residual = torch.randn(2, 3, 12).to(dtype), torch.randn(2, 3, 5)
    norm, weight, bias = torch.randn(12), torch.randn(5, 12).to(dtype), torch.randn(5).to(dtype)

    def steps(x: Tensor, residual: Tensor) -> tuple[Tensor, ...]:
        return (
            ops.layer_norm_gelu(x, norm, norm, approximate="tanh"),
            ops.linear_bias_gelu(x, weight, bias),
            ops.gelu_linear_residual(x, weight, bias, residual),
        )

    assert_the_same(steps, (x, residual))


def test_heads() -> None:
    specs = {
        "a": ops.HeadSpec(summary=4, spatial=6, blocks=1, upsample=2),
        "b": ops.HeadSpec(spatial=6, pre_norm=True),
        "c": ops.HeadSpec(summary=4, spatial=6, version="v1"),
    }
    heads = ops.AdaptorHeads(12, specs).requires_grad_(False)
    rotation = torch.linalg.qr(torch.randn(6, 6)).Q
    cls, patches = torch.randn(2, 3, 12), torch.randn(10, 12)
    program = torch.export.export(heads, (cls, patches)).run_decompositions({})
    assert not [n for n in program.graph.nodes if "fastagglo" in str(n.target)]
    torch.testing.assert_close(program.module()(cls, patches), heads(cls, patches))
    head = ops.AdaptorMLP(12, 24, 6, blocks=1, upsample=2).requires_grad_(False)
    grid = torch.randn(2, 3, 4, 12)
    assert_the_same(lambda x: ops.adaptor_mlp(x, head, rotation=rotation), (grid,))


@pytest.mark.parametrize(
    ("keep", "options"),
    [
        (13, {}),
        (5, {"protect": 1}),  # several rounds
        (4, {"protect": 2}),
        (20, {"partition": "strided", "grid": (6, 8), "protect": 2}),
        (7, {"partition": "strided", "grid": (6, 8), "protect": 2, "stride": (2, 3)}),
        (50, {"partition": "strided", "grid": (6, 8), "protect": 2}),  # nothing to do
    ],
    ids=str,
)
def test_merging(keep: int, options: dict[str, Any]) -> None:
    x, size = torch.randn(2, 50, 8), torch.randint(1, 5, (2, 50)).float()
    metric = torch.randn(2, 50, 3, 4)

    def merge(x: Tensor, size: Tensor, metric: Tensor) -> tuple[Tensor, ...]:
        merged = ops.merge_tokens(x, keep, size=size, metric=metric, **options)
        return merged.x, merged.size, merged.index, ops.unmerge_tokens(merged.x, merged)

    assert_the_same(merge, (x, size, metric))
    assert_the_same(lambda x: ops.merge_tokens(x, keep, **options).x, (x,))


def test_merging_any_number_of_images() -> None:
    x = torch.randn(2, 24, 8)
    merge = Call(lambda x: ops.merge_tokens(x, 10, partition="strided", grid=(4, 6)).x)
    program = torch.export.export(merge, (x,), dynamic_shapes=(({0: Dim("n", min=1)},),))
    for images in (1, 5):
        x = torch.randn(images, 24, 8)
        torch.testing.assert_close(program.module()(x), merge(x))


def test_what_cannot_be_exported_says_so() -> None:
    x = torch.randn(2, 24, 8)
    grid = {"partition": "random2d", "grid": (4, 6)}
    with pytest.raises(ValueError, match="'random2d' cannot be exported"):
        traced(lambda x: ops.merge_tokens(x, 10, **grid).x, (x,))
    with pytest.raises(ValueError, match="one keep and no layout can be exported"):
        traced(lambda x: ops.merge_tokens(x, [10, 9]).x, (x,))
    with pytest.raises(ValueError, match="keep of image 0 must be between 1 and its 24"):
        traced(lambda x: ops.merge_tokens(x, 25).x, (x,))
    x = torch.randn(2, 4, 6, 8)
    with pytest.raises(ValueError, match="'alternate' cannot be exported"):
        traced(lambda x: Compress(4, partition="alternate")(x).tokens, (x,))
    with pytest.raises(ValueError, match="valid cannot be exported"):
        traced(lambda x: Compress(4)(x, torch.ones(2, 4, 6, dtype=torch.bool)).tokens, (x,))


def test_the_window_of_a_graph_is_that_of_the_function() -> None:
    sides = [1, 2, 3, 5, 8, 13, 16, 17, 24, 27, 31, 48, 72, 100]
    for h in sides:
        for w in sides:
            for tokens in (1, 64, 196, 256):
                found = _exported_stride(h, w, tokens, torch.device("cpu"))
                assert tuple(map(int, found)) == _stride(h, w, min(h * w, tokens)), (h, w, tokens)


def test_compressing_any_grid() -> None:
    module = Compress(64)

    def compress(x: Tensor) -> tuple[Tensor, ...]:
        found = module(Features(None, [x]))
        return found.tokens, found.mask, found.size, found.index[0]

    side = {"min": 2, "max": 128}
    sizes = ({0: Dim("n", min=1), 1: Dim("h", **side), 2: Dim("w", **side)},)
    program = traced(compress, (torch.randn(2, 9, 11, 8),), sizes)
    for shape in [(1, 2, 2), (1, 4, 5), (3, 8, 8), (2, 16, 16), (2, 31, 9), (1, 128, 2)]:
        x = torch.randn(*shape, 8)
        expected = module(x)
        *found, index = program.module()(x)
        torch.testing.assert_close(found, [expected.tokens, expected.mask, expected.size])
        assert torch.equal(index, torch.stack(expected.index))


def test_compress_is_a_module() -> None:
    x = torch.randn(2, 20, 15, 8)
    module = Compress(49, partition="random2d", seed=3)
    expected = ops.merge_tokens(x.flatten(1, 2), 49, partition="random2d", grid=(20, 15),
                                stride=_stride(20, 15, 49), seed=3)  # fmt: skip
    assert torch.equal(module(x).tokens, expected.x)
    assert not module.state_dict()
    assert repr(module) == "Compress(tokens=49, partition='random2d')"
    with pytest.raises(TypeError, match="tokens must be an int, got float"):
        Compress(49.0)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        Compress(0)
    with pytest.raises(ValueError, match="partition must be one of"):
        Compress(partition="stride")
